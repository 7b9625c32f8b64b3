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

import msgspec

from dadi.errors import Malformed, Unsupported
from dadi.index.chunks import ChunkTable

MAGIC = b"DADILYR1"
VERSION = 1
TAR_BLOCK = 512


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


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(LayerIndex)


def encode(index: LayerIndex) -> bytes:
    """Return the bytes of the index; deterministic."""
    return MAGIC + _encoder.encode(index)


def decode(data: bytes) -> LayerIndex:
    """Return the index; raise Malformed for anything `encode` cannot have made, Unsupported for a newer version.

    Checks form and bounds (every file's data lies inside the tar); paths are checked where they are used, by the
    EROFS tree.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise Malformed("not a layer index: wrong magic")
    try:
        index = _decoder.decode(memoryview(data)[len(MAGIC) :])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"not a layer index: {error}") from None
    if index.version != VERSION:
        raise Unsupported(f"a layer index of version {index.version}; this dadi knows version {VERSION}")
    index.table.check()
    end = index.table.size
    for entry in index.entries:
        if entry.size < 0 or entry.offset < 0:
            raise Malformed(f"layer index: {entry.path!r} has a negative size or offset")
        extents = entry.extents
        if extents is None and entry.kind is Kind.FILE:
            extents = (Extent(0, entry.offset, entry.size),)
        for extent in extents or ():
            inside = extent.length >= 0 and 0 <= extent.tar_offset <= end - extent.length
            if not inside or not 0 <= extent.file_offset <= entry.size - extent.length:
                raise Malformed(f"layer index: the data of {entry.path!r} lies outside of the layer")
    return index
