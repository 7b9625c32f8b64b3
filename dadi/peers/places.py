"""What nodes and the directory say to each other: who a node is, its place in a tree, heartbeats, reports. Pure.

    node → superpeer    join       Peer, blob, ids it does not want   →  Place
    node → superpeer    heartbeat  Heartbeat                          →  new Places, of blobs whose parent it must leave
    node → superpeer    report     its id, the peer's id, Fault

The directory itself is `superpeer/directory.py`; what a node makes of its place, `dadi/peers/choose.py`.
"""

from __future__ import annotations

import enum

import msgspec


class Peer(msgspec.Struct, frozen=True):
    """A node as it introduces itself. Without a rack, all such nodes of a zone count as one rack.

    `slots`: how many nodes of its own rack may be its children, for each blob; 0: it serves nobody.
    """

    id: str
    address: str = ""
    zone: str = ""
    rack: str = ""
    slots: int = 2


class Place(msgspec.Struct, frozen=True):
    """A node's place in a blob's tree.

    `parents` in the order in which to ask them: the parent, then its stand-ins. After them comes the superpeer, which
    is not named; without parents it is the parent. `order`: the node's number in joining order; it tells it again.
    """

    order: int
    depth: int
    parents: tuple[Peer, ...] = ()


class Told(msgspec.Struct, frozen=True):
    """What a node says of one blob it has joined. `parents`: ids, as it got them; `chunks`: how many it has."""

    blob: str
    order: int
    depth: int
    parents: tuple[str, ...] = ()
    chunks: int = 0
    complete: bool = False


class Heartbeat(msgspec.Struct, frozen=True):
    """What a node says every few seconds.

    `load`: the share of its upload rate in use, 0 to 1. `refuses`: it takes no more children (memory, processor,
    limits). `liars`: peers that sent it wrong bytes; told again and again, so that a restart does not forget them.
    """

    peer: Peer
    load: float = 0.0
    refuses: bool = False
    blobs: tuple[Told, ...] = ()
    liars: tuple[str, ...] = ()


class Fault(enum.Enum):
    """What a node reports of a peer."""

    FAILED = "failed"
    """Refused, cut off, or silent."""
    SLOW = "slow"
    """Alive, and much later than others."""
    LIED = "lied"
    """Sent bytes that are not what their digest says."""
