"""The layer index: what is in one layer, and where. Pure.

For one layer: the digests of its compressed blob and of its uncompressed tar, the chunk table of that tar, and every
tar member in the order of the tar, with its attributes and with the offset and length of its data *in the
uncompressed tar*. The same layer always gives the same bytes.

    bytes        what
    0..7         magic "DADILYR1"
    8..          MessagePack (https://github.com/msgpack/msgpack/blob/master/spec.md) of `LayerIndex`: an array of its
                 fields in the order below; an entry is an array of its fields in the order below
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from dadi.errors import Malformed, TooLarge, Unsupported
from dadi.index.chunks import OTHER_VERSION, ChunkTable

MAGIC = b"DADILYR1"
VERSION = 1
TAR_BLOCK = 512

MAX_ENTRIES, MAX_METADATA = 2_000_000, 256 << 20
"""Entries, and bytes of what `DecodeRoom` counts, unless the caller says otherwise: what `TarLimits` lets in."""
_MAX_ENTRY = 8 << 20  # bytes, encoded; with `TarLimits` an entry has 3 MiB at most
_ITEM_COST = 64  # as in tar.py


class Kind(enum.IntEnum):
    """What a tar member is; whiteouts and opaque marks are recognised by name (OCI image spec, "Layer > Whiteouts")."""

    FILE = 0
    DIRECTORY = 1
    SYMLINK = 2
    HARDLINK = 3
    CHARACTER = 4
    BLOCK = 5
    FIFO = 6
    WHITEOUT = 7
    """`path` is the path that is to be removed from the layers below (without the `.wh.` prefix)."""
    OPAQUE = 8
    """`path` is the directory whose contents in the layers below are hidden."""


class Extent(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A piece of a sparse file: `length` bytes at `file_offset` stand at `tar_offset` in the uncompressed tar."""

    file_offset: int
    tar_offset: int
    length: int


class Entry(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One tar member.

    `path` is relative to the root, normalised: no leading "/" or "./", no trailing "/", no "." or ".." or empty
    component, b"" for the root itself; names are bytes, as on Linux. `mode` has only the permission bits (0o7777).
    `mtime` is in nanoseconds since 1970. `size` is what stat(2) shows. `offset` is where a FILE's data begins in the
    uncompressed tar (a multiple of 512). `target` is a SYMLINK's text or a HARDLINK's normalised path. `extents` is
    given for sparse files only and then `offset` is 0; whatever no extent covers is a hole.
    """

    path: bytes
    kind: Kind
    mode: int = 0
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    size: int = 0
    offset: int = 0
    target: bytes = b""
    major: int = 0
    minor: int = 0
    xattrs: tuple[tuple[bytes, bytes], ...] = ()
    extents: tuple[Extent, ...] | None = None


class LayerIndex(msgspec.Struct, frozen=True, array_like=True):
    """See the head of this file. `layer_digest`, `layer_size`: the blob as the registry has it (bytes)."""

    version: int
    layer_digest: str
    layer_size: int
    diff_id: str
    table: ChunkTable
    entries: tuple[Entry, ...]

    def __repr__(self) -> str:
        return f"LayerIndex({self.diff_id[7:19]}, {self.table.size} bytes, {len(self.entries)} entries)"


class DecodeRoom:
    """How much may still be decoded: `entries`, and `metadata` bytes of names, link targets, attributes and extents.

    Counted as the tar parser does (an attribute as 64 bytes beside its content, an extent as 128). One room for all
    layers of an image bounds the memory of their indexes together.
    """

    __slots__ = ("entries", "metadata")

    def __init__(self, entries: int = MAX_ENTRIES, metadata: int = MAX_METADATA) -> None:
        self.entries = entries
        self.metadata = metadata

    def __repr__(self) -> str:
        return f"DecodeRoom({self.entries} entries, {self.metadata} bytes)"


class _Unread(msgspec.Struct, array_like=True):
    """An index whose entries are counted, and not taken apart yet."""

    version: int
    layer_digest: str
    layer_size: int
    diff_id: str
    table: ChunkTable
    entries: Annotated[list[msgspec.Raw], msgspec.Meta(max_length=MAX_ENTRIES)]


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(_Unread)
_entry_decoder = msgspec.msgpack.Decoder(Entry)


def encode(index: LayerIndex) -> bytes:
    """Return the bytes of the index; deterministic."""
    return MAGIC + _encoder.encode(index)


def decode(data: bytes, room: DecodeRoom | None = None) -> LayerIndex:
    """Return the index; raise Malformed for anything `encode` cannot have made, Unsupported for another version.

    Checks form and bounds (every file's data lies inside the tar); paths are checked where they are used, by the
    EROFS tree. Raises TooLarge if it does not fit `room`, from which it takes what it needs; few bytes may say that
    there is a lot, so that entries are counted before any is made, and made one by one.
    """
    room = room or DecodeRoom()
    if data[: len(MAGIC)] != MAGIC:
        raise Malformed("not a layer index: wrong magic")
    try:
        unread = _decoder.decode(memoryview(data)[len(MAGIC) :])
        if unread.version != VERSION:
            text = f"a layer index of version {unread.version}; this dadi knows version {VERSION}"
            raise Unsupported(text, hint=OTHER_VERSION)
        unread.table.check()
        entries = _entries(unread.entries, unread.table.size, room)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        kind = TooLarge if f"length <= {MAX_ENTRIES}" in str(error) else Malformed
        raise kind(f"not a layer index: {error}") from None
    return LayerIndex(VERSION, unread.layer_digest, unread.layer_size, unread.diff_id, unread.table, entries)


def _entries(encoded: list[msgspec.Raw], end: int, room: DecodeRoom) -> tuple[Entry, ...]:
    """Return the entries, checked; `end`: bytes of the tar."""
    if len(encoded) > room.entries:
        raise TooLarge(f"a layer index of {len(encoded)} entries, where {room.entries} are allowed")
    found: list[Entry] = []
    left = room.metadata
    for raw in encoded:
        if memoryview(raw).nbytes > _MAX_ENTRY:
            raise TooLarge(f"a layer index with an entry of more than {_MAX_ENTRY} bytes")
        entry = _entry_decoder.decode(raw)
        left -= len(entry.path) + len(entry.target)
        if entry.xattrs:
            left -= sum(len(name) + len(value) + _ITEM_COST for name, value in entry.xattrs)
        if entry.extents:
            left -= 2 * _ITEM_COST * len(entry.extents)
        if left < 0:
            raise TooLarge(f"a layer index with names, attributes and extents above {room.metadata} bytes")
        size, offset = entry.size, entry.offset
        if size < 0 or offset < 0:
            raise Malformed(f"layer index: {entry.path!r} has a negative size or offset")
        if entry.extents:
            inside = all(_inside(extent, size, end) for extent in entry.extents)
        else:
            inside = entry.extents is not None or entry.kind is not Kind.FILE or offset <= end - size
        if not inside:
            raise Malformed(f"layer index: the data of {entry.path!r} lies outside of the layer")
        found.append(entry)
    room.entries -= len(found)
    room.metadata = left
    return tuple(found)


def _inside(extent: Extent, size: int, end: int) -> bool:
    """Whether the extent lies in its file, of `size` bytes, and in the tar, of `end` bytes."""
    return (
        extent.length >= 0
        and 0 <= extent.tar_offset <= end - extent.length
        and 0 <= extent.file_offset <= size - extent.length
    )
