"""Which nodes of a rack are a group, and so place each other in trees (`dadi/peers/group.py`). Pure.

A node is in the first group of its rack that has room, and stays there as long as it is heard of. A group has a version
that grows with each change: whoever knows it is not told the members again. Groups are soft state, as the directory is:
after a restart nodes introduce themselves within a heartbeat. Without a rack, and where it serves nobody, a node has
none. Nobody needs a token for a group: a member is believed nothing, and shown no token (`group.proof`); it can cost
its mates a moment, and they go to the superpeer then. So that an address cannot fill a rack's groups it has few places.
"""

from __future__ import annotations

from collections import Counter, OrderedDict

import msgspec

from dadi.peers.places import Peer, is_loopback

_MOST_AT_ONE_HOST = 4
"""In one rack; other than over loopback."""
_MOST = 100_000
HEARTBEATS_A_SECOND = 250
"""What a superpeer wants to hear: where there are more nodes each is heard of less often."""

_Rack = tuple[str, str, bool]


class _Group(msgspec.Struct, eq=False):
    rack: _Rack
    version: int
    members: dict[str, Peer]


class _Member(msgspec.Struct, eq=False):
    group: _Group
    heard: float


class Groups:
    """See the head of this file. Times in seconds of the Unix clock."""

    def __init__(self, *, size: int = 48) -> None:
        """`size`: the most members of a group."""
        self._size = size
        self._members: OrderedDict[str, _Member] = OrderedDict()  # those not heard for longest come first
        self._racks: dict[_Rack, list[_Group]] = {}
        self._hosts: dict[_Rack, Counter[str]] = {}
        self._version = 0

    def __repr__(self) -> str:
        return f"Groups({len(self._members)} nodes in {self.count} groups)"

    def __len__(self) -> int:
        return len(self._members)

    @property
    def count(self) -> int:
        """How many groups there are."""
        return sum(map(len, self._racks.values()))

    def find(self, peer_id: str) -> Peer | None:
        """Return a member as it was vouched for."""
        member = self._members.get(peer_id)
        return member.group.members[peer_id] if member else None

    def introduce(self, peer: Peer, known: int, now: float) -> tuple[int, tuple[Peer, ...] | None]:
        """Take a node in; return the version of its group, and its members unless `known` is that version."""
        member = self._members.get(peer.id)
        if member is not None and (member.group.rack != _rack(peer) or not _may(peer)):
            self.leave(peer.id)
            member = None
        if member is None:
            group = self._enter(peer, now)
            if group is None:
                return 0, ()
            member = self._members[peer.id] = _Member(group, now)
        elif member.group.members[peer.id] != peer:
            self._count(member.group.rack, member.group.members[peer.id], -1)
            self._count(member.group.rack, peer, 1)
            member.group.members[peer.id] = peer
            self._changed(member.group, now)
        member.heard = now
        self._members.move_to_end(peer.id)
        group = member.group
        return group.version, None if known == group.version else tuple(group.members.values())

    def leave(self, peer_id: str) -> None:
        """A node is gone; not being there is no error."""
        member = self._members.pop(peer_id, None)
        if member is None:
            return
        group = member.group
        self._count(group.rack, group.members.pop(peer_id), -1)
        self._changed(group, member.heard)
        if not group.members:
            self._racks[group.rack].remove(group)
            if not self._racks[group.rack]:
                del self._racks[group.rack], self._hosts[group.rack]

    def expire(self, now: float, expiry: float) -> None:
        """Forget who was not heard for `expiry` seconds."""
        while self._members:
            peer_id, member = next(iter(self._members.items()))
            if member.heard + expiry > now:
                break
            self.leave(peer_id)

    def _enter(self, peer: Peer, now: float) -> _Group | None:
        rack, host = _rack(peer), _host(peer)
        crowded = not rack[2] and self._hosts.get(rack, Counter())[host] >= _MOST_AT_ONE_HOST
        if not _may(peer) or crowded or len(self._members) >= _MOST:
            return None
        groups = self._racks.setdefault(rack, [])
        self._hosts.setdefault(rack, Counter())
        group = next((group for group in groups if len(group.members) < self._size), None)
        if group is None:
            group = _Group(rack, 0, {})
            groups.append(group)
        group.members[peer.id] = peer
        self._count(rack, peer, 1)
        self._changed(group, now)
        return group

    def _count(self, rack: _Rack, peer: Peer, count: int) -> None:
        self._hosts[rack][_host(peer)] += count

    def _changed(self, group: _Group, now: float) -> None:
        self._version = group.version = max(self._version + 1, int(now * 1e6))


def _may(peer: Peer) -> bool:
    return bool(peer.rack and peer.slots)


def _rack(peer: Peer) -> _Rack:
    # Over loopback nodes reach only those of their own machine.
    return peer.zone, peer.rack, is_loopback(peer.address)


def _host(peer: Peer) -> str:
    return peer.address.rpartition(":")[0]
