"""One blob's tree: its members, who is whose parent, and who has a free child slot. Pure.

**No cycles.** Each member has an order number, and a parent's is lower than its child's, whenever the child got it.
Only of a member that has the whole blob, and so asks nobody, the order does not matter.

**Whose child.** Candidates have a free child slot and are fit. Same rack first, then same zone (there the superpeer
counts as a candidate of depth 0 while it has a free root slot), then other zones; then the least depth; then the least
load. If there is nobody, the superpeer. Slots for children of the own rack and of other racks are counted apart: else
the first node of a rack would spend its slots on other racks, and its neighbours would have to fetch from outside what
the rack already has.

Those with a free slot are listed by rack (near) and by zone (far), and there by depth; a join looks at a few of the
least deep, so that its cost does not grow with the tree.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import msgspec

from dadi.peers.places import Peer, Place

_LOOK_AT = 64
"""Candidates of one list that are looked at, at most."""
_COMPARE = 8
"""Candidates of one depth whose loads are compared."""
_NOT_LISTED = -1


class Node(msgspec.Struct, eq=False, gc=False):
    """A node, whatever it has joined; times are Unix seconds."""

    peer: Peer
    heard: float
    members: dict[str, Member]
    """Its place in each tree, by the blob's digest."""
    load: float = 0.0
    refuses: bool = False
    strikes: int = 0
    struck: float = 0.0
    suspended_until: float = 0.0
    """0 if it is not suspended. It ends with the first heartbeat after that time, not before."""
    accusers: set[str] | None = None
    barred: bool = False
    here: bool = True

    @property
    def usable(self) -> bool:
        """Whether those that are its children may stay."""
        return self.here and not (self.barred or self.suspended_until)

    @property
    def fit(self) -> bool:
        """Whether it may get more children."""
        return self.usable and not self.refuses


class Member(msgspec.Struct, eq=False, gc=False):
    """A node in one tree. `parent` is None for a child of the superpeer (`rooted`), and where it is not known.

    `awaited`: it has told who its parent is, which has not been heard of (after a restart). `as_far`: it has one of its
    parent's far slots. `near`, `far`: its children; `near_listed`, `far_listed`: the depth it is listed at.
    """

    node: Node
    order: int
    depth: int = 0
    parent: Member | None = None
    rooted: bool = False
    awaited: bool = False
    as_far: bool = False
    near: int = 0
    far: int = 0
    near_listed: int = _NOT_LISTED
    far_listed: int = _NOT_LISTED
    chunks: int = 0
    complete: bool = False
    here: bool = True


_List = dict[int, dict[Member, None]]
"""Members by depth; those of one depth in the order in which they came."""


class Tree:
    """The tree of one blob; see the head of this file."""

    def __init__(self, digest: str, *, root_slots: int, far_slots: int, max_depth: int, zone: str) -> None:
        """`zone`: the superpeer's; empty: it is equally near to all."""
        self.digest = digest
        self.members: dict[str, Member] = {}
        self.root_children = 0
        self.overflows = 0
        """Times that a node became the superpeer's child although its root slots were taken."""
        self._root_slots = root_slots
        self._far_slots = far_slots
        self._max_depth = max_depth
        self._zone = zone
        self._near: dict[tuple[str, str], _List] = {}
        self._far: dict[str, _List] = {}
        self._awaited: dict[str, list[Member]] = {}

    def __repr__(self) -> str:
        return f"Tree({self.digest}: {len(self.members)} members, {self.root_children} at the root)"

    # ── coming, going, moving ─────────────────────────────────────────────────────────────────────────────────────

    def enter(self, node: Node, order: int) -> Member:
        """Add a node, without a parent as yet."""
        # The tree's own string as the key: one for each digest, however many nodes name it.
        member = node.members[self.digest] = self.members[node.peer.id] = Member(node, order)
        return member

    def exit(self, member: Member) -> None:
        """Take a node out. Its children hold on to it, and move when they are next heard of."""
        del member.node.members[self.digest]
        del self.members[member.node.peer.id]
        member.here = False
        self._release(member)
        self.unlist(member)
        member.parent = None  # its children keep it alive; not its ancestors too

    def settle(self, member: Member, without: Collection[str] = ()) -> None:
        """Give a member the best parent there is now, in place of the one it has. `without`: ids it does not want."""
        self._release(member)
        self.unlist(member)
        parent = self._find(member, without)
        if parent is None:
            member.rooted, member.depth = True, 1
            self.overflows += self.root_children >= self._root_slots
            self.root_children += 1
        else:
            self._attach(member, parent)
            member.depth = parent.depth + 1
        self.relist(member)

    def adopt(self, member: Member, depth: int, parent_id: str | None) -> None:
        """Believe what a new member says of its place; a parent that is not here yet is waited for."""
        member.depth = min(max(1, depth), self._max_depth)
        if parent_id is None:
            member.rooted = True
            self.root_children += 1
        elif parent := self.members.get(parent_id):
            self._attach(member, parent)
        else:
            member.awaited = True
            self._awaited.setdefault(parent_id, []).append(member)
        for child in self._awaited.pop(member.node.peer.id, ()):
            if child.here and child.awaited:
                self._attach(child, member)
        self.relist(member)

    def complete(self, member: Member) -> None:
        """It has the whole blob: it needs no parent any more, and is as good as the root."""
        self._release(member)
        self.unlist(member)
        member.complete, member.depth = True, 0
        self.relist(member)

    def restart(self, member: Member, order: int) -> Member:
        """It lost some of a blob that it had. Its children may be older than it: it comes back without them."""
        self.exit(member)
        return self.enter(member.node, order)

    def place(self, member: Member, standbys: int, without: Collection[str] = ()) -> Place:
        """Return the member's place, with at most so many stand-ins for its parent."""
        return Place(member.order, member.depth, tuple(self._ancestors(member, 1 + standbys, without)))

    def _ancestors(self, member: Member, most: int, without: Collection[str]) -> Iterator[Peer]:
        """Yield the parent and its stand-ins: they have the bytes sooner than it does, and cannot make a cycle."""
        at = member.parent
        while at is not None and most:
            if at.here and at.node.usable and _may_serve(at, member, without):
                most -= 1
                yield at.node.peer
            at = at.parent

    # ── finding a parent ──────────────────────────────────────────────────────────────────────────────────────────

    def _find(self, member: Member, without: Collection[str]) -> Member | None:
        """Return the best parent; None: the superpeer."""
        peer = member.node.peer
        if found := _best(self._near.get((peer.zone, peer.rack)), member, without):
            return found
        root_is_free = self.root_children < self._root_slots
        if root_is_free and self._zone in ("", peer.zone):
            return None
        if found := _best(self._far.get(peer.zone), member, without):
            return found
        if root_is_free:
            return None
        others = [_best(listed, member, without) for zone, listed in self._far.items() if zone != peer.zone]
        return min((other for other in others if other), key=lambda other: (other.depth, other.node.load), default=None)

    def _attach(self, child: Member, parent: Member) -> None:
        theirs, ours = parent.node.peer, child.node.peer
        child.parent, child.awaited = parent, False
        elsewhere = theirs.rack != ours.rack or theirs.zone != ours.zone
        child.as_far = elsewhere or parent.near >= theirs.slots
        if child.as_far:
            parent.far += 1
        else:
            parent.near += 1
        self.relist(parent)

    def _release(self, child: Member) -> None:
        parent = child.parent
        if child.rooted:
            self.root_children -= 1
        elif parent is not None:
            if child.as_far:
                parent.far -= 1
            else:
                parent.near -= 1
            if parent.here:
                self.relist(parent)
        child.parent, child.rooted, child.awaited = None, False, False

    # ── lists of those with free slots ────────────────────────────────────────────────────────────────────────────

    def relist(self, member: Member) -> None:
        """Put a member on the lists where it belongs now, and off the others."""
        peer = member.node.peer
        listable = member.depth < self._max_depth and member.node.fit
        most_far = min(max(self._far_slots, peer.far), peer.slots) if self._far_slots else 0
        # Who gives to more racks than others is a group's root: it takes one less of its own, in the group's tree.
        most_near = max(1, peer.slots - most_far + self._far_slots) if member.rooted and peer.slots else peer.slots
        near = member.depth if listable and member.near < most_near else _NOT_LISTED
        far = member.depth if listable and member.far < most_far else _NOT_LISTED
        if near != member.near_listed:
            listed = self._near.setdefault((peer.zone, peer.rack), {})
            member.near_listed = _relisted(listed, member, member.near_listed, near)
        if far != member.far_listed:
            member.far_listed = _relisted(self._far.setdefault(peer.zone, {}), member, member.far_listed, far)

    def unlist(self, member: Member) -> None:
        """Take a member off all lists (before it moves, or its node changes rack)."""
        peer = member.node.peer
        if member.near_listed != _NOT_LISTED:
            listed = self._near[peer.zone, peer.rack]
            member.near_listed = _relisted(listed, member, member.near_listed, _NOT_LISTED)
        if member.far_listed != _NOT_LISTED:
            member.far_listed = _relisted(self._far[peer.zone], member, member.far_listed, _NOT_LISTED)

    # ── what it looks like ────────────────────────────────────────────────────────────────────────────────────────

    def rows(self) -> list[dict[str, Any]]:
        """Return a row for each member; parent "" is the superpeer, or none."""
        return [
            {
                "id": peer_id, "zone": member.node.peer.zone, "rack": member.node.peer.rack, "depth": member.depth,
                "parent": member.parent.node.peer.id if member.parent else "", "children": member.near + member.far,
                "chunks": member.chunks, "complete": member.complete, "load": member.node.load,
                "state": _state(member.node),
            }
            for peer_id, member in self.members.items()
        ]  # fmt: skip


def _best(listed: _List | None, member: Member, without: Collection[str]) -> Member | None:
    """Return the least loaded of the first few that may serve `member` at the least depth that has any."""
    if not listed:
        return None
    looked_at = 0
    for depth in sorted(listed):
        found: list[Member] = []
        for candidate in listed[depth]:
            looked_at += 1
            if _may_serve(candidate, member, without):
                found.append(candidate)
            if len(found) == _COMPARE or looked_at == _LOOK_AT:
                break
        if found:
            return min(found, key=lambda candidate: candidate.node.load)
        if looked_at == _LOOK_AT:
            break
    return None


def _may_serve(parent: Member, child: Member, without: Collection[str]) -> bool:
    return (
        (parent.order < child.order or parent.complete)
        and parent.node is not child.node
        and not (without and parent.node.peer.id in without)
    )


def _relisted(listed: _List, member: Member, old: int, new: int) -> int:
    """Move a member from the list of one depth to that of another; returns the new depth."""
    if old != _NOT_LISTED:
        level = listed[old]
        del level[member]
        if not level:
            del listed[old]
    if new != _NOT_LISTED:
        listed.setdefault(new, {})[member] = None
    return new


def _state(node: Node) -> str:
    if node.barred:
        return "barred"
    if node.suspended_until:
        return "suspended"
    return "refuses" if node.refuses else "fit"
