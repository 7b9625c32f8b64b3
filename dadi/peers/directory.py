"""Who has which blob, and whose child a node becomes. Pure: time is an argument, and nothing is sent from here.

Superpeers run one for all nodes, a delegate one for its group (`group.py`); there, read "the superpeer" for the root.

A node *joins* a blob and gets its place in that blob's tree (`tree.py` says which): parents that joined
earlier, in the order in which it should ask them. The superpeer is the root; every node knows it and asks it last.

**Soft state.** Nothing is written down. A node tells in each heartbeat which blobs it has, with order, depth and
parents, so the trees are back one heartbeat after a restart; meanwhile nodes keep the parents they know. Orders are
microseconds of the Unix clock (made unique), so that those given after a restart are higher than those given before.

**Reports are claims.** A peer that is reported as failing or slow gets no children for a while, and loses those it has;
one that nodes at several addresses say has lied, for good (ids cost nothing). An address that accuses more than
`accusations` peers within ten minutes is not believed: else one liar could take the whole tree apart.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Collection
from typing import Any

import msgspec

from dadi.errors import InvalidRequest, Unavailable
from dadi.peers.places import Fault, Heartbeat, Peer, Place, Told
from dadi.peers.tree import Member, Node, Tree

_AHEAD = 600.0
"""Seconds by which the clock of another superpeer may be ahead of ours."""


class Settings(msgspec.Struct, frozen=True):
    """What a directory does; durations in seconds."""

    root_slots: int = 2
    """Children in a blob's tree that the superpeer takes before it sends others to nodes. 0: as many as the node takes
    that is the first one there, 1 or 2: where links are slow, a node gets a stream soonest if nobody divides it."""
    far_slots: int = 1
    """Children in other racks that a node gets, for each blob."""
    standbys: int = 2
    """Parents that a node is told of besides the first."""
    max_depth: int = 48
    """A node this deep gets no children."""
    heartbeat: float = 5.0
    expiry: float = 15.0
    """A node that was not heard for so long is forgotten."""
    suspended: float = 10.0
    """How long a failing or slow peer gets no children; doubled with each further report, up to `suspended_most`."""
    suspended_most: float = 600.0
    lied_to: int = 2
    """Nodes at so many addresses must say that a peer lied until it is barred; the first suspends it for the most."""
    accusations: int = 16
    most_nodes: int = 100_000
    most_blobs: int = 4096
    """Blobs of one node."""


class _Accuser(msgspec.Struct):
    since: float
    about: set[str]


class Directory:
    """The nodes and trees of one superpeer; see the head of this file. `now` is Unix time in seconds throughout."""

    def __init__(self, settings: Settings | None = None, *, zone: str = "", now: float = 0.0) -> None:
        """`zone`: where the superpeer is; empty: equally near to all. `now`: when this directory started."""
        self.settings = settings or Settings()
        self._zone = zone
        self._started = now
        self._last_order = 0
        self._nodes: OrderedDict[str, Node] = OrderedDict()  # those not heard for longest come first
        self._trees: dict[str, Tree] = {}
        self._accusers: dict[str, _Accuser] = {}
        self._hosts: Counter[str] = Counter()
        self._barred: set[str] = set()
        self._past_overflows = 0
        self.joins = 0
        self.moves = 0
        """Times that a member got another parent."""

    def __repr__(self) -> str:
        return f"Directory({len(self._nodes)} nodes, {len(self._trees)} blobs, {len(self._barred)} barred)"

    # ── what nodes do ─────────────────────────────────────────────────────────────────────────────────────────────

    def join(self, peer: Peer, blob: str, now: float, without: Collection[str] = (), order: int = 0) -> Place:
        """Return the place of `peer` in the tree of `blob`; the same again as long as its parent can be used.

        `without`: ids of peers that the node does not want (they failed it, or lied to it). `order`: the number that it
        has from another directory, or from before a restart: its children may be here already, and must stay below it.
        Raises Unavailable when there are too many nodes, InvalidRequest when the node has too many blobs.
        """
        node = self._heard(peer, now)
        member = node.members.get(blob)
        if member is None:
            if len(node.members) >= self.settings.most_blobs:
                raise InvalidRequest(f"{peer.id} has joined {len(node.members)} blobs; that is the limit")
            tree = self._tree(blob, peer.slots)
            self.joins += 1
            member = tree.enter(node, self._numbered(order, now))
            tree.settle(member, without)
        else:
            tree = self._trees[blob]
            if self._must_move(member, without, now):
                self.moves += 1
                tree.settle(member, without)
        return tree.place(member, self.settings.standbys, without)

    def heartbeat(self, beat: Heartbeat, now: float) -> dict[str, Place]:
        """Take in what a node says. Returns new places, of those blobs whose parent it must leave.

        A node that this directory has never heard of, or not of its blobs, is believed: that is how trees come back.
        Memberships that it does not name any more have ended. Raises as `join` does.
        """
        if len(beat.blobs) > self.settings.most_blobs:
            raise InvalidRequest(f"{beat.peer.id} names {len(beat.blobs)} blobs; that is too many")
        node = self._heard(beat.peer, now)
        self._take_in_fitness(node, beat, now)
        for liar in beat.liars[: self.settings.accusations]:
            self.report(beat.peer.id, liar, Fault.LIED, now)
        changed = {}
        for told in beat.blobs:
            member = node.members.get(told.blob) or self._adopt(node, told, now)
            tree = self._trees[told.blob]
            if told.complete and not member.complete:
                tree.complete(member)
            elif member.complete and not told.complete:
                self._last_order += 1
                member = tree.restart(member, self._last_order)
            member.chunks = told.chunks
            if self._must_move(member, (), now):
                self.moves += 1
                tree.settle(member)
                changed[told.blob] = tree.place(member, self.settings.standbys)
        if len(node.members) > len(beat.blobs):
            self._end_unnamed(node, {told.blob for told in beat.blobs}, now)
        return changed

    def report(self, by: str, about: str, fault: Fault, now: float) -> None:
        """Take in what one node says of another. Nothing is believed of, or by, nodes that are not here."""
        node = self._nodes.get(about)
        if node is None or by == about or by not in self._nodes or not self._believed(by, about, now):
            return
        if fault is Fault.LIED:
            node.accusers = node.accusers or set()
            accuser = _host(self._nodes[by].peer) or by
            if accuser in node.accusers:
                return  # told again
            node.accusers.add(accuser)
            if len(node.accusers) >= self.settings.lied_to:
                node.barred = True
                self._barred.add(about)
            until = now + self.settings.suspended_most
        else:
            if now > node.struck + self.settings.suspended_most:
                node.strikes = 0
            until = now + min(self.settings.suspended * 2**node.strikes, self.settings.suspended_most)
            node.strikes = min(node.strikes + 1, 16)
            node.struck = now
        node.suspended_until = max(node.suspended_until, until)
        self._relist(node)

    def leave(self, peer_id: str, blob: str | None = None) -> None:
        """A node gives up a blob, or everything; not being there any more is no error."""
        node = self._nodes.get(peer_id)
        if node is None:
            return
        if blob is not None:
            if member := node.members.get(blob):
                self._exit(blob, member)
            return
        for digest, member in list(node.members.items()):
            self._exit(digest, member)
        node.here = False
        del self._nodes[peer_id]
        self._count(node.peer, -1)

    def expire(self, now: float) -> list[str]:
        """Forget the nodes that were not heard for `expiry`; returns their ids."""
        gone = []
        for peer_id, node in self._nodes.items():
            if node.heard + self.settings.expiry > now:
                break
            gone.append(peer_id)
        for peer_id in gone:
            self.leave(peer_id)
        # Not when a node leaves: it would come again, and be believed again.
        old = now - self.settings.suspended_most
        for by in [by for by, accuser in self._accusers.items() if accuser.since < old]:
            del self._accusers[by]
        return gone

    # ── what others ask ───────────────────────────────────────────────────────────────────────────────────────────

    def vouches_for(self, peer_id: str) -> Peer | None:
        """Return a node as it introduced itself, if it is here and not barred."""
        node = self._nodes.get(peer_id)
        return node.peer if node is not None and not node.barred else None

    def bars(self, peer_id: str) -> bool:
        """Whether nodes at enough addresses have said that this one lied."""
        return peer_id in self._barred

    def ids(self) -> set[str]:
        """Return the ids of all nodes."""
        return set(self._nodes)

    def has_tree(self, blob: str) -> bool:
        """Whether any node is in a blob's tree."""
        return blob in self._trees

    def has_joined(self, peer_id: str, blob: str) -> bool:
        """Whether a node is in a blob's tree."""
        node = self._nodes.get(peer_id)
        return node is not None and blob in node.members

    def nodes_at(self, peer: Peer) -> int:
        """Return how many nodes have the address of `peer`, whatever their ports."""
        return self._hosts[_host(peer)]

    def tree(self, blob: str) -> list[dict[str, Any]]:
        """Return a row for each member: id, zone, rack, depth, parent ("": superpeer), children, chunks, state, …"""
        return self._trees[blob].rows() if blob in self._trees else []

    def statistics(self) -> dict[str, int]:
        """Return counts."""
        return {
            "nodes": len(self._nodes), "blobs": len(self._trees), "joins": self.joins, "moves": self.moves,
            "barred": len(self._barred),
            "suspended": sum(1 for node in self._nodes.values() if node.suspended_until),
            "memberships": sum(len(tree.members) for tree in self._trees.values()),
            "root_children": sum(tree.root_children for tree in self._trees.values()),
            "overflows": self._past_overflows + sum(tree.overflows for tree in self._trees.values()),
        }  # fmt: skip

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _heard(self, peer: Peer, now: float) -> Node:
        node = self._nodes.get(peer.id)
        if node is None:
            if len(self._nodes) >= self.settings.most_nodes:
                raise Unavailable(f"the directory holds {len(self._nodes)} nodes; that is the limit", retry_after=60)
            node = self._nodes[peer.id] = Node(peer, now, {}, barred=peer.id in self._barred)
            self._count(peer, 1)
        elif node.peer != peer:
            # The lists are by zone and rack: off the old ones before they change.
            for blob, member in node.members.items():
                self._trees[blob].unlist(member)
            self._count(node.peer, -1)
            self._count(peer, 1)
            node.peer = peer
            self._relist(node)
        node.heard = now
        self._nodes.move_to_end(peer.id)
        return node

    def _count(self, peer: Peer, count: int) -> None:
        host = _host(peer)
        self._hosts[host] += count
        if not self._hosts[host]:
            del self._hosts[host]

    def _take_in_fitness(self, node: Node, beat: Heartbeat, now: float) -> None:
        was = node.fit
        node.load, node.refuses = beat.load, beat.refuses
        if node.suspended_until and now >= node.suspended_until:
            node.suspended_until = 0.0
        if node.fit != was:
            self._relist(node)

    def _relist(self, node: Node) -> None:
        for blob, member in node.members.items():
            self._trees[blob].relist(member)

    def _tree(self, blob: str, slots: int) -> Tree:
        tree = self._trees.get(blob)
        if tree is None:
            s = self.settings
            root_slots = s.root_slots or max(1, min(slots, 2))
            tree = self._trees[blob] = Tree(
                blob, root_slots=root_slots, far_slots=s.far_slots, max_depth=s.max_depth, zone=self._zone
            )
        return tree

    def _adopt(self, node: Node, told: Told, now: float) -> Member:
        """Believe a membership that another directory, or this one before a restart, has given."""
        tree = self._tree(told.blob, node.peer.slots)
        member = tree.enter(node, self._numbered(told.order, now))
        tree.adopt(member, told.depth, told.parents[0] if told.parents else None)
        return member

    def _numbered(self, told: int, now: float) -> int:
        """Return the number that a node tells; a new one if it tells none.

        Also where it lies in the future: all that were given later would be higher still, and such memberships do not
        end.
        """
        if told <= 0 or told > (now + _AHEAD) * 1e6:
            told = max(self._last_order + 1, int(now * 1e6))
        self._last_order = max(self._last_order, told)
        return told

    def _exit(self, blob: str, member: Member) -> None:
        tree = self._trees[blob]
        tree.exit(member)
        if not tree.members:
            self._past_overflows += tree.overflows
            del self._trees[blob]

    def _end_unnamed(self, node: Node, named: set[str], now: float) -> None:
        # What it has joined since it composed this heartbeat it could not name.
        before = (now - self.settings.heartbeat) * 1e6
        for blob, member in list(node.members.items()):
            if blob not in named and member.order < before:
                self._exit(blob, member)

    def _must_move(self, member: Member, without: Collection[str], now: float) -> bool:
        if member.complete or member.rooted:
            return False
        if member.awaited:
            # Its child knows better than we do, for as long as the parent may still be heard of.
            return now >= self._started + self.settings.expiry
        parent = member.parent
        return parent is None or not (parent.here and parent.node.usable) or parent.node.peer.id in without

    def _believed(self, by: str, about: str, now: float) -> bool:
        by = _host(self._nodes[by].peer) or by
        accuser = self._accusers.get(by)
        if accuser is None or now > accuser.since + self.settings.suspended_most:
            accuser = self._accusers[by] = _Accuser(now, set())
        if about not in accuser.about and len(accuser.about) >= self.settings.accusations:
            return False
        accuser.about.add(about)
        return True


def _host(peer: Peer) -> str:
    return peer.address.rpartition(":")[0]
