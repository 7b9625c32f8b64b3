"""What nodes and the directory say to each other: who a node is, its place in a tree, heartbeats, reports. Pure.

    node → superpeer    join       Join: Peer, blobs, ids it does not want  →  Joined: a Place for each blob
    node → superpeer    heartbeat  Heartbeat                                →  Changed: new Places, where a node must
                                                                               leave its parent
    node → superpeer    leave      Leave: its id
    node → superpeer    report     peer's id and Fault, with the next join or heartbeat

    node → superpeer    group      Introduce: who it is                     →  Grouped: the mates of its rack
    node → delegate     join, heartbeat, leave: the same messages, see `group.py`

As JSON, by `superpeer/peers.py` and `dadi/peers/directory_client.py`, between nodes by `dadi/peers/desk.py` and
`dadi/peers/grouped.py`; what is longer than the limits below is refused.

The directory itself is `dadi/peers/directory.py`; what a node makes of its place, `dadi/peers/choose.py`.
"""

from __future__ import annotations

import enum
import ipaddress
from typing import Annotated

import msgspec
from msgspec import Meta

MAX_JOINED = 256
"""Blobs of one join."""
MAX_TOLD = 4096
"""Blobs of one heartbeat."""
MAX_NAMED = 256
"""Peers that one message names for one reason."""
MAX_CHILDREN = 1024
MAX_MATES = 64

Id = Annotated[str, Meta(min_length=1, max_length=128)]
Name = Annotated[str, Meta(max_length=128)]
Address = Annotated[str, Meta(max_length=300)]
Digest = Annotated[str, Meta(pattern="^sha256:[0-9a-f]{64}$")]
Count = Annotated[int, Meta(ge=0, lt=1 << 62)]
Proof = Annotated[str, Meta(max_length=64)]
"""What shows that a node holds the token of a blob, to who holds it too (`group.proof`); empty where none is needed."""


def is_loopback(address: str) -> bool:
    """Does host:port lead everybody to his own machine?"""
    ip = _ip_of(address)
    return ip.is_loopback if ip else address.rpartition(":")[0] == "localhost"


def is_unspecified(address: str) -> bool:
    """Is host:port where a server listens (0.0.0.0, ::), which is nowhere to be reached?"""
    ip = _ip_of(address)
    return bool(ip and ip.is_unspecified)


def _ip_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        ip = ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
    except ValueError:
        return None
    return (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip


class Fault(enum.Enum):
    """What a node reports of a peer."""

    FAILED = "failed"
    """Refused, cut off, or silent."""
    SLOW = "slow"
    """Alive, and much later than others."""
    LIED = "lied"
    """Sent bytes that are not what their digest says."""


class Peer(msgspec.Struct, frozen=True):
    """A node as it introduces itself. Without a rack, all such nodes of a zone count as one rack.

    `slots`: how many nodes of its own rack may be its children, for each blob; 0: it serves nobody.
    """

    id: Id
    address: Address = ""
    """host:port, where it serves blobs. The superpeer says from where it heard of the node, whatever the node says."""
    zone: Name = ""
    rack: Name = ""
    slots: Annotated[int, Meta(ge=0, le=MAX_CHILDREN)] = 2
    far: Annotated[int, Meta(ge=0, le=MAX_CHILDREN)] = 0
    """How many nodes of other racks it takes as the root of a group, and so many less of its own; 0: as others."""


class Place(msgspec.Struct, frozen=True):
    """A node's place in a blob's tree.

    `parents` in the order in which to ask them: the parent, then its stand-ins. After them comes the superpeer, which
    is not named; without parents it is the parent. `order`: the node's number in joining order; it tells it again.
    """

    order: Count
    depth: Count
    parents: Annotated[tuple[Peer, ...], Meta(max_length=MAX_NAMED)] = ()


class Told(msgspec.Struct, frozen=True):
    """What a node says of one blob it has joined. `parents`: ids, as it got them; `chunks`: how many it has."""

    blob: Digest
    order: Count
    depth: Count
    parents: Annotated[tuple[Id, ...], Meta(max_length=MAX_NAMED)] = ()
    chunks: Count = 0
    complete: bool = False
    proof: Proof = ""
    """For delegates."""


class Heartbeat(msgspec.Struct, frozen=True):
    """What a node says every few seconds.

    `load`: the share of its upload rate in use, 0 to 1. `refuses`: it takes no more children (memory, processor,
    limits). `liars`: peers that sent it wrong bytes; told again and again, so that a restart does not forget them.
    `reports`: what else it has seen of peers, told once.
    """

    peer: Peer
    load: Annotated[float, Meta(ge=0, le=1e9)] = 0.0
    refuses: bool = False
    blobs: Annotated[tuple[Told, ...], Meta(max_length=MAX_TOLD)] = ()
    liars: Annotated[tuple[Id, ...], Meta(max_length=MAX_NAMED)] = ()
    reports: Annotated[tuple[tuple[Id, Fault], ...], Meta(max_length=MAX_NAMED)] = ()


class Join(msgspec.Struct, frozen=True):
    """A node joins blobs, all those of an image at once. `without`: ids of peers that it does not want as parents."""

    peer: Peer
    blobs: Annotated[tuple[Digest, ...], Meta(max_length=MAX_JOINED)]
    without: Annotated[tuple[Id, ...], Meta(max_length=MAX_NAMED)] = ()
    reports: Annotated[tuple[tuple[Id, Fault], ...], Meta(max_length=MAX_NAMED)] = ()
    proof: Proof = ""
    """For delegates: of the token that names all these blobs."""
    orders: dict[Digest, Count] = {}
    """For delegates: the numbers of places that the node has from others of them."""


Proofs = dict[Digest, dict[Id, Proof]]
"""By blob and parent: what the parents that a delegate names have shown it."""


class JoinAnswer(msgspec.Struct, frozen=True):
    """The node's places by blob, and every how many seconds it is to be heard of."""

    places: dict[Digest, Place]
    heartbeat: Annotated[float, Meta(ge=0.1, le=3600)]
    proofs: Proofs = {}


class Changed(msgspec.Struct, frozen=True):
    """What a heartbeat has changed: new places by blob. `heartbeat`: as in `JoinAnswer`; 0: as before.

    `unproven`: blobs that are not known of the node, and that the token it has shown does not name: they are believed
    when they are told again with one that does.
    """

    places: dict[Digest, Place] = {}
    heartbeat: Annotated[float, Meta(ge=0, le=3600)] = 0.0
    unproven: Annotated[tuple[Digest, ...], Meta(max_length=MAX_TOLD)] = ()
    proofs: Proofs = {}


class Leave(msgspec.Struct, frozen=True):
    """A node gives up everything."""

    id: Id


class Introduce(msgspec.Struct, frozen=True):
    """A node says who it is, whether or not it has joined anything. `known`: the version of the group that it knows."""

    peer: Peer
    known: Count = 0


class Grouped(msgspec.Struct, frozen=True):
    """A node's group: its members at the addresses that the superpeer vouches for, the node itself among them.

    `mates` is None where nothing has changed since the version that the node knows, empty where it has no group.
    `heartbeat`: as in `JoinAnswer`.
    """

    version: Count
    heartbeat: Annotated[float, Meta(ge=0.1, le=3600)]
    mates: Annotated[tuple[Peer, ...], Meta(max_length=MAX_MATES)] | None = None
