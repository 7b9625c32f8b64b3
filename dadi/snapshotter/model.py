"""What a snapshot is: kinds, records, containerd's labels and limits. Pure.

    Prepare ──► active ──Commit──► committed          only a committed snapshot can be a parent
    View ─────► view                                  a lazy layer is committed from the start

Backend keys ("names" here) come from containerd as NAMESPACE/NUMBER/KEY; they are opaque to us, whatever characters
they have.
"""

from __future__ import annotations

import enum
import re
from typing import NamedTuple

import msgspec

from dadi.errors import InvalidRequest

REF = "containerd.io/snapshot.ref"
"""On a Prepare: the chain ID of the layer that is to be made. On a committed snapshot: the layer that it is."""

_REFERENCE = "containerd.io/snapshot/cri.image-ref"
_MANIFEST = "containerd.io/snapshot/cri.manifest-digest"
_LAYER = "containerd.io/snapshot/cri.layer-digest"
_LAYERS = "containerd.io/snapshot/cri.image-layers"

_UNPACKING = re.compile(r"(?:^|/)extract-\S+ (sha256:[0-9a-f]{64})$")
MAX_LABEL = 4096
"""Bytes of a label's key and value together, by containerd's protocol."""
MAX_NAME = 16 << 10


class Kind(enum.IntEnum):
    """The numbers are the protocol's; kept in the database too."""

    VIEW = 1
    ACTIVE = 2
    COMMITTED = 3


class Info(msgspec.Struct, frozen=True):
    """What Stat and List tell of a snapshot. `created`, `updated`: nanoseconds since 1970. `parent`: "" without one."""

    name: str
    parent: str
    kind: Kind
    created: int
    updated: int
    labels: dict[str, str]


class Usage(NamedTuple):
    """What a snapshot holds on disk by itself, without its parents: bytes of allocated blocks, and inodes."""

    size: int
    inodes: int


class Mount(NamedTuple):
    """A mount as mount(8) has it, without a target; `options` in order."""

    type: str
    source: str
    options: tuple[str, ...]


class LazyLayer(NamedTuple):
    """Layer `depth` (1: the lowest) of the image whose index is `image`: its content with all below it.

    `reference` and `manifest` say where it came from, `layer` which blob it is in the registry ("" where unknown).
    """

    image: str
    depth: int
    chain_id: str
    reference: str
    manifest: str
    layer: str


class Request(NamedTuple):
    """What the labels of a Prepare say about the layer that is wanted; `layers`: this one's digest, and those above."""

    reference: str
    manifest: str | None
    layers: tuple[str, ...]


def request_in(labels: dict[str, str]) -> Request | None:
    """Return what the labels ask for; None if they do not name an image."""
    reference = labels.get(_REFERENCE)
    if not reference:
        return None
    own = labels.get(_LAYER, "")
    layers = [digest for digest in labels.get(_LAYERS, "").split(",") if digest]
    if own and own not in layers:
        layers.insert(0, own)
    return Request(reference, labels.get(_MANIFEST) or None, tuple(layers))


def unpacked_layer(key: str) -> str | None:
    """Return the chain ID of the layer that a client is about to unpack into this key; None if it is for another use.

    Clients that know nothing of remote snapshots (`ctr image pull` of containerd 1.x) give no label, only such a key.
    """
    found = _UNPACKING.search(key)
    return found[1] if found else None


def checked_name(name: str, what: str) -> str:
    """Return the name; raise InvalidRequest for none, or one of absurd length."""
    if not name:
        raise InvalidRequest(f"{what} must not be empty")
    if len(name) > MAX_NAME:
        raise InvalidRequest(f"{what} has {len(name)} characters; the limit is {MAX_NAME}")
    return name


def checked_labels(labels: dict[str, str]) -> dict[str, str]:
    """Return the labels without those whose value is empty (containerd's way to delete one); raise InvalidRequest."""
    for key, value in labels.items():
        size = len(key.encode()) + len(value.encode())
        if size > MAX_LABEL:
            raise InvalidRequest(f"the label {key[:64]!r} has {size} bytes with its value; the limit is {MAX_LABEL}")
    return {key: value for key, value in labels.items() if value}


def updated_labels(old: dict[str, str], new: dict[str, str], paths: list[str]) -> dict[str, str]:
    """Return the labels after an Update with these field paths ("labels", "labels.KEY"; none: all that can change).

    Raises InvalidRequest for a field that cannot be changed.
    """
    result = dict(old)
    for path in paths or ["labels"]:
        if path == "labels":
            result = dict(new)
        elif path.startswith("labels."):
            key = path.removeprefix("labels.")
            result[key] = new.get(key, "")
        else:
            raise InvalidRequest(f"the field {path[:64]!r} of a snapshot cannot be changed", hint="only labels can")
    return checked_labels(result)
