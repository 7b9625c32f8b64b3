"""The seek table: where one can start to unpack a layer in the middle. Pure; `unpack` is work for threads.

A *point* is a place where unpacking can begin; a *unit* is what lies between two neighbouring points: unit i is the tar
bytes [points[i].offset, points[i + 1].offset), the last one ends with the tar. A plain tar has no points but the
first, and its units are pieces of 1 MiB. To read tar bytes: `units` that hold them, `compressed_extent` of those (to be
fetched and verified by the chunk table of the compressed blob), `unpack`.

    bytes        what
    0..7         magic "DADISEK1"
    8..          MessagePack (https://github.com/msgpack/msgpack/blob/master/spec.md) of `SeekTable`: an array of its
                 fields in the order below; a point is an array of its fields in the order below

Unpacking in the middle of a deflate stream (RFC 1951) needs the 32 KiB before as a dictionary, and input that begins at
a byte: what stands before the block in its first byte is overwritten with empty blocks that end at that very bit.
Nothing here tells right bytes from wrong ones: chunk digests do that. What is promised is their number.
"""

from __future__ import annotations

import enum
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from itertools import pairwise
from operator import attrgetter
from typing import Any, cast

import msgspec
import zstandard
from isal import isal_zlib

from dadi import digest as digests
from dadi.errors import InvalidRequest, Malformed, TooLarge, Unsupported
from dadi.index.chunks import OTHER_VERSION, Blob, ChunkTable
from dadi.index.decompress import MAX_ZSTD_WINDOW

MAGIC = b"DADISEK1"
VERSION = 1
COMPRESSED_CHUNK = 64 << 10
"""Bytes of a chunk of the compressed blob: the grain in which a registry is asked."""
PLAIN_UNIT = 1 << 20
PIECE = 1 << 20
"""Bytes of a piece that `unpack` yields, at most."""
MAX_WINDOW = 32 << 10
"""How far back a deflate stream can refer (RFC 1951, 3.2.5), in bytes."""
MAX_POINTS = 1 << 20
MAX_SIZE = 128 << 20
"""Bytes of an encoded table, unless the caller says otherwise."""

_MAX_PACKED_WINDOW = MAX_WINDOW + 256
_FEED = 128 << 10
_RAW, _GZIP, _TRAILER = -15, 31, 8
_IsalError = cast(type[Exception], isal_zlib.IsalError)

# Deflate blocks without content (RFC 1951, 3.2.6 and 3.2.7), as (bits, how many), first bit lowest: with fixed codes,
# and with dynamic ones, which are 0 for the literal 255 and 1 for the end.
_FIXED = (0b0000000_01_0, 10)
_DYNAMIC = (0x46AFF90000000000081C004, 91)


def _empty_blocks(bit: int) -> tuple[int, int]:
    """Return empty blocks that begin at a byte and end at that bit of another."""
    blocks, bits = _DYNAMIC if bit % 2 else (0, 0)
    while bits % 8 != bit:
        blocks, bits = blocks | _FIXED[0] << bits, bits + _FIXED[1]
    return blocks, bits


_EMPTY_BLOCKS = [_empty_blocks(bit) for bit in range(8)]


class Form(enum.IntEnum):
    """What the layer's bytes are, as the registry has them."""

    PLAIN = 0
    GZIP = 1
    ZSTD = 2


class SeekPoint(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A place to begin: at bit `position` of the compressed blob (deflate blocks do not begin at bytes; a multiple of 8
    elsewhere) begins what unpacks to the tar from byte `offset` on.

    `raw`: it is a block inside a deflate stream, else the beginning of a gzip member or zstd frame. `window` (raw
    points only): the up to 32 KiB of the tar before `offset`, zstd-compressed, with zeros in the place of what nothing
    refers to; empty if nothing refers to any.
    """

    position: int
    offset: int
    raw: bool
    window: bytes


FIRST = SeekPoint(0, 0, False, b"")
"""The point that every table begins with."""

_offset = attrgetter("offset")


class SeekTable(msgspec.Struct, frozen=True, array_like=True):
    """See the head of this file. `layer_digest` names the compressed blob and `compressed` is its chunk table (chunks
    of `COMPRESSED_CHUNK`); `diff_id` names the uncompressed tar, which has `size` bytes."""

    version: int
    form: Form
    layer_digest: str
    diff_id: str
    size: int
    compressed: ChunkTable
    points: tuple[SeekPoint, ...]

    @property
    def blob(self) -> Blob:
        """The compressed blob."""
        return Blob(self.layer_digest, self.compressed)

    @property
    def count(self) -> int:
        """How many units there are."""
        return -(-self.size // PLAIN_UNIT) if self.form is Form.PLAIN else len(self.points)

    def units(self, offset: int, length: int) -> range:
        """Return the units that hold the tar bytes [offset, offset + length), cut off at the tar's end."""
        end = min(offset + length, self.size)
        if offset >= end:
            return range(0)
        if self.form is Form.PLAIN:
            return range(offset // PLAIN_UNIT, (end - 1) // PLAIN_UNIT + 1)
        first = bisect_right(self.points, offset, key=_offset) - 1
        return range(first, bisect_left(self.points, end, lo=first + 1, key=_offset))

    def extent(self, units: range) -> tuple[int, int]:
        """Return (offset, length) in bytes of the tar of a run of neighbouring units; an empty run has none, at 0.

        Raises IndexError if there are no such units.
        """
        if not self._has(units):
            return 0, 0
        begin, end = units[0], units[-1] + 1
        if self.form is Form.PLAIN:
            offset = begin * PLAIN_UNIT
            return offset, min(end * PLAIN_UNIT, self.size) - offset
        offset = self.points[begin].offset
        return offset, (self.points[end].offset if end < len(self.points) else self.size) - offset

    def compressed_extent(self, units: range) -> tuple[int, int]:
        """Return (offset, length) in bytes of the compressed blob that unpacking a run of units needs.

        A byte that two units share is in both. Raises IndexError if there are no such units.
        """
        if not self._has(units) or self.form is Form.PLAIN:
            return self.extent(units)
        begin, end = units[0], units[-1] + 1
        offset = self.points[begin].position // 8
        return offset, (-(-self.points[end].position // 8) if end < len(self.points) else self.compressed.size) - offset

    def _has(self, units: range) -> bool:
        if units and not (units.step == 1 and 0 <= units.start and units.stop <= self.count):
            raise IndexError(f"{units} of {self.count} units")
        return bool(units)

    def __repr__(self) -> str:
        layer = digests.short(self.layer_digest)
        return f"SeekTable({layer}, {self.form.name}, {self.size} bytes, {len(self.points)} points)"


class _Head(msgspec.Struct, array_like=True):
    """What is looked at before the rest is taken apart: of a newer version only the first field is known."""

    version: int


class _Uncounted(msgspec.Struct, array_like=True):
    """A table whose points are not taken apart yet."""

    version: int
    form: msgspec.Raw
    layer_digest: msgspec.Raw
    diff_id: msgspec.Raw
    size: msgspec.Raw
    compressed: msgspec.Raw
    points: msgspec.Raw


_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(SeekTable)
_head_decoder = msgspec.msgpack.Decoder(_Head)
_uncounted_decoder = msgspec.msgpack.Decoder(_Uncounted)
def encode(table: SeekTable) -> bytes:
    """Return the bytes of the table; deterministic."""
    return MAGIC + _encoder.encode(table)


def decode(data: bytes, max_size: int = MAX_SIZE) -> SeekTable:
    """Return the table; raise Malformed if it contradicts itself, Unsupported if it is of another version, TooLarge
    above `max_size` bytes. A table costs no more memory than some times its bytes.

    What only unpacking can show, `unpack` checks: windows, and what a unit's bytes unpack to.
    """
    if data[: len(MAGIC)] != MAGIC:
        raise Malformed("not a seek table: wrong magic")
    if len(data) > max_size:
        raise TooLarge(f"a seek table of {len(data)} bytes; the limit is {max_size}")
    body = memoryview(data)[len(MAGIC) :]
    try:
        version = _head_decoder.decode(body).version
        if version != VERSION:
            text = f"a seek table of version {version}; this dadi knows version {VERSION}"
            raise Unsupported(text, hint=OTHER_VERSION)
        count = _length(bytes(_uncounted_decoder.decode(body).points))
        if count > MAX_POINTS:
            raise TooLarge(f"a seek table of {count} points; the limit is {MAX_POINTS}")
        table = _decoder.decode(body)
        digests.parse(table.layer_digest)
        digests.parse(table.diff_id)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, InvalidRequest) as error:
        raise Malformed(f"not a seek table: {error}") from None
    _check(table)
    return table


def _length(array: bytes) -> int:
    """Return how many elements a MessagePack array says it has; 0 if it is none."""
    if array[0] & 0xF0 == 0x90:
        return array[0] & 0x0F
    width = {0xDC: 2, 0xDD: 4}.get(array[0], 0)
    return int.from_bytes(array[1 : 1 + width], "big")


def _check(table: SeekTable) -> None:
    points, blob = table.points, table.compressed.check()
    if blob.chunk_size != COMPRESSED_CHUNK:
        raise Malformed(f"seek table: chunks of {blob.chunk_size} bytes, not {COMPRESSED_CHUNK}")
    if not points or points[0] != FIRST or table.size < 0:
        raise Malformed("seek table: it does not begin at the layer's beginning")
    if not all(one.position < two.position and one.offset < two.offset for one, two in pairwise(points)):
        raise Malformed("seek table: its points do not ascend")
    if len(points) > 1 and not (points[-1].offset < table.size and points[-1].position < blob.size * 8):
        raise Malformed("seek table: it has points behind the layer's end")
    if table.form is Form.PLAIN:
        if len(points) > 1 or table.size != blob.size or table.layer_digest != table.diff_id:
            raise Malformed("seek table: of a plain tar, and yet the blob is not the tar")
        return
    for point in points:
        if not point.raw and (point.position % 8 or point.window):
            raise Malformed(f"seek table: no member or frame begins at bit {point.position}, or it has a dictionary")
        if point.raw and (table.form is Form.ZSTD or len(point.window) > _MAX_PACKED_WINDOW):
            raise Malformed(f"seek table: the dictionary of byte {point.offset} cannot be one")


def unpack(
    table: SeekTable, units: range, data: bytes | memoryview, *, beginning: bool = False
) -> Iterator[bytes]:
    """Yield the tar bytes `extent(units)` in pieces of at most `PIECE`; exactly as many, or Malformed.

    `data`: exactly the bytes `compressed_extent(units)` of the blob, verified. With `beginning`, only their first ones,
    and what comes is the beginning of the tar bytes, as far as these lead. Memory is bounded whatever they are (beside
    a zstd frame's window, at most `MAX_ZSTD_WINDOW`). Raises IndexError if there are no such units.
    """
    _, length = table.extent(units)
    _, expected = table.compressed_extent(units)
    if len(data) != expected and not (beginning and len(data) < expected):
        raise Malformed(f"units {units} of {table} need {expected} compressed bytes, not {len(data)}")
    if not units:
        return
    view = memoryview(data)
    try:
        left = length
        for piece in _pieces(table, units[0], view, length):
            left -= len(piece)
            if left < 0:
                raise Malformed(f"units {units} of {table} unpack to more than {length} bytes")
            yield piece
        if left and not beginning:
            raise Malformed(f"units {units} of {table} unpack to {length - left} bytes, not {length}")
    except (zstandard.ZstdError, _IsalError) as error:
        raise Malformed(f"units {units} of {table} cannot be unpacked: {error}") from None


# Each of these yields, at the end, more than `length` bytes in all if there are more (not necessarily all of them).


def _pieces(table: SeekTable, unit: int, view: memoryview, length: int) -> Iterator[bytes]:
    if table.form is Form.PLAIN:
        return (bytes(view[at : at + PIECE]) for at in range(0, len(view), PIECE))
    if table.form is Form.ZSTD:
        return _unzstd(view, length)
    return _gunzip(table.points[unit], view, length)


def _unzstd(view: memoryview, length: int) -> Iterator[bytes]:
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    with decompressor.stream_reader(view, read_across_frames=True) as reader:
        left = length
        while piece := reader.read(min(PIECE, max(left, 1))):
            left -= len(piece)
            yield piece


def _gunzip(point: SeekPoint, view: memoryview, length: int) -> Iterator[bytes]:
    if point.raw:
        stream = inflater(point.position, view[:1], window_of(point))
        at, trailer = min(point.position % 8, 1), _TRAILER
    else:
        stream, at, trailer = isal_zlib.decompressobj(wbits=_GZIP), 0, 0
    left = length
    while True:
        feed = view[at : at + _FEED]
        piece = stream.decompress(feed, min(PIECE, max(left, 1)))
        taken = len(feed) - len(stream.unused_data if stream.eof else stream.unconsumed_tail)
        at += taken
        if piece:
            left -= len(piece)
            yield piece
        if stream.eof:
            at = _skip_zeros(view, at + trailer)
            if at >= len(view):
                return
            stream, trailer = isal_zlib.decompressobj(wbits=_GZIP), 0  # its header is read, its trailer is checked
        elif not piece and not taken:
            return


def _skip_zeros(view: memoryview, at: int) -> int:
    while at < len(view) and view[at] == 0:
        feed = bytes(view[at : at + _FEED])
        at += len(feed) - len(feed.lstrip(b"\0"))
    return at


def window_of(point: SeekPoint) -> bytes:
    """Return the dictionary of a point; raise Malformed if it is none, or larger than any can be."""
    if not point.window:
        return b""
    try:
        # looked at first, since `decompress` makes room for as many bytes as the frame says that it holds
        if not 0 < zstandard.get_frame_parameters(point.window).content_size <= MAX_WINDOW:
            raise Malformed(f"the dictionary of byte {point.offset} is not one of 1 to {MAX_WINDOW} bytes")
        return zstandard.ZstdDecompressor().decompress(point.window)
    except zstandard.ZstdError as error:
        raise Malformed(f"the dictionary of byte {point.offset} is damaged: {error}") from None


def inflater(position: int, first: bytes | memoryview, window: bytes) -> Any:
    """Return a decompressor for the deflate stream from the block at bit `position` on.

    `first`: the byte in which that bit stands. If `position` is a multiple of 8 this byte is to be fed next, else it
    has been taken, and the one after it is next.
    """
    stream = isal_zlib.decompressobj(wbits=_RAW, zdict=window) if window else isal_zlib.decompressobj(wbits=_RAW)
    if first and (bit := position % 8):
        blocks, bits = _EMPTY_BLOCKS[bit]
        aligned = blocks | first[0] >> bit << bits
        stream.decompress(aligned.to_bytes(bits // 8 + 1, "little"), 1)  # nothing comes of a block's first 7 bits
    return stream
