"""A node's group: who of its rack places the others in trees, and what a node believes of it. Pure.

A superpeer that ten thousand nodes join in one second has six seconds of work. So the nodes of a rack are a *group*
(`superpeer/groups.py` says who, long before any image comes), and join with one of themselves:

    node ── join ──► delegate of its group ──► a place among the mates
     └─ the delegate says "the root" (the first of the group) ── join ──► superpeer ──► a place in the blob's tree

The *delegate* for an image is the mate that rendezvous hashing names, the same for all mates. It need not have the
image: it runs a `Directory`, nothing else. Whoever is the group's root has its place from the superpeer, which so sees
one or two joins for each group and blob.

**No cycles.** A node has its place in a blob either from the superpeer or from its group, never both: who has one from
the superpeer keeps it, and is told to delegates as a root. So ways lead from mates to a root, from there through the
superpeer's tree, and never back into a group. Whoever joins anew, or at another delegate, tells the number that it has:
its children stay below it.

**What is believed of a delegate**: ids, of mates that the superpeer has named, at the addresses that *it* gave; and
only of those that can prove that they hold the blob's token. A mate shows tokens to its parents, so these must have
one: a parent's `proof` is made of the very token, which nodes that got the image in the same minute have alike, and of
the id of who made it. Whoever cannot check it asks the superpeer. The delegate is shown no token at all.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Callable, Iterable, Mapping

import msgspec

from dadi.peers.owners import owners
from dadi.peers.places import Peer, Place

LEAST = 4
"""Members; a smaller group asks the superpeer, which that costs little."""
MOST_ASKED = 2
"""Delegates that are asked before the superpeer."""
FAR = 2
"""Nodes of other racks that a group's root takes: it has no mates in the superpeer's tree that would take some."""
SUPERPEER = ""
"""In place of a delegate's id."""


def proof(token: str, peer_id: str) -> str:
    """Return what shows that a node holds a token, to nobody but who holds it too."""
    return hmac.new(token.encode(), b"dadi mate v1\n" + peer_id.encode(), hashlib.sha256).hexdigest()[:32]


def proves(token: str, peer_id: str, shown: str) -> bool:
    """Whether `shown` was made of this token, by this node."""
    return hmac.compare_digest(proof(token, peer_id).encode(), shown.encode())


def outward(peer: Peer) -> Peer:
    """Return a node as its superpeer and its mates hear of it: as a root it would take children of other racks.

    Not on slow links, where a node has one child of its own rack and one elsewhere: racks are a chain there.
    """
    return msgspec.structs.replace(peer, far=FAR) if peer.slots >= FAR else peer


class Group:
    """What a node knows of its group, and by whom it has its places."""

    def __init__(self) -> None:
        self.version = 0
        self.mates: dict[str, Peer] = {}
        """All members, as the superpeer vouches for them."""
        self._keys: dict[str, str] = {}
        self._placed_by: dict[str, str] = {}
        self._orders: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"Group({len(self.mates)} nodes)"

    def learn(self, version: int, mates: Iterable[Peer] | None) -> None:
        """Take in what the superpeer says; None: nothing new."""
        self.version = version
        if mates is not None:
            self.mates = {peer.id: peer for peer in mates}

    @property
    def stands(self) -> bool:
        """Whether it is large enough to be of use."""
        return len(self.mates) >= LEAST

    def expect(self, blobs: Iterable[str]) -> None:
        """These are joined together: one delegate for all of them, named by the first (an image's metadata)."""
        new = [blob for blob in blobs if blob not in self._keys]
        self._keys.update((blob, new[0]) for blob in new)

    def delegates(self, blob: str) -> tuple[str, ...]:
        """Return the ids of those to ask for a place before the superpeer, in order."""
        if not self.stands:
            return ()
        return tuple(owners(self._keys.get(blob, blob), self.mates)[:MOST_ASKED])

    def placed_by(self, blob: str) -> str:
        """Return the delegate that gave the place, SUPERPEER if that was the superpeer; both if there is none."""
        return self._placed_by.get(blob, SUPERPEER)

    def has_outer_place(self, blob: str) -> bool:
        """Whether the place is the superpeer's: then it stays so."""
        return self._placed_by.get(blob) == SUPERPEER

    def took(self, blob: str, by: str, order: int = 0) -> None:
        """A place was given, by this delegate or SUPERPEER; `order`: its number, 0 for the one before."""
        self._placed_by[blob] = by
        self._orders[blob] = order or self._orders.get(blob, 0)

    def order(self, blob: str) -> int:
        """Return the number of the place that a delegate has given, 0 if there is none."""
        return self._orders.get(blob, 0) if self.placed_by(blob) != SUPERPEER else 0

    def keep(self, blobs: Iterable[str]) -> None:
        """Forget all blobs but these."""
        kept = set(blobs)
        for blob in self._keys.keys() - kept:
            for known in (self._keys, self._placed_by, self._orders):
                known.pop(blob, None)

    def believed(self, place: Place, proofs: Mapping[str, str], proven: Callable[[str, str], bool]) -> Place | None:
        """Return what of a delegate's place may be used; None: it says, or leaves, no parent, so ask the superpeer.

        `proven`: whether a node of this id has shown this as its proof.
        """
        parents = (self.mates[peer.id] for peer in place.parents
                   if peer.id in self.mates and proven(peer.id, proofs.get(peer.id, "")))  # fmt: skip
        usable = tuple(parents)
        return msgspec.structs.replace(place, parents=usable) if usable else None
