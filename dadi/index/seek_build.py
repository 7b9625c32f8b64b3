"""Where the seek points of a layer are. For threads; blocks.

gzip: indexed_gzip finds deflate blocks to begin at (7 CPU seconds per GiB of tar; zlib by ctypes takes the same).
rapidgzip takes 5 to 13, but 110 to 290 MiB of memory, and fails on zeros behind a member.

Points that need a dictionary stand `SPACING` bytes of the tar apart, those that need none (members, frames) only
`FREE_SPACING`. A dictionary keeps only the bytes that something refers to, which makes it six times smaller: since no
reference reaches further back than 32 KiB, the first 32 KiB that follow show them all. They are unpacked with
dictionaries of other content: what differs stands where a reference led into the dictionary, and a dictionary of
positions shows where to.
"""

from __future__ import annotations

import hashlib
import itertools
import struct
import sys
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, cast

import indexed_gzip
import zstandard

from dadi.errors import Malformed
from dadi.index.chunks import DEFAULT_CHUNK_SIZE, ChunkTable
from dadi.index.decompress import MAX_ZSTD_WINDOW
from dadi.index.layer import LayerIndex
from dadi.index.seek import (
    COMPRESSED_CHUNK,
    FIRST,
    MAX_POINTS,
    MAX_WINDOW,
    PIECE,
    VERSION,
    Form,
    SeekPoint,
    SeekTable,
    inflater,
)  # fmt: skip

SPACING = 1 << 20
"""Bytes of the tar from one point with a dictionary to the next, at least. Of a tar of 1 GiB, 408 MiB as gzip:

    spacing   encoded table   fetched to read 256 KiB somewhere (their share is 101 KiB)
    1 MiB     2253 KiB         594 KiB
    2 MiB     1264 KiB        1000 KiB
    3 MiB      918 KiB        1405 KiB
    4 MiB      728 KiB        1812 KiB

1 MiB costs a quarter of a percent of the layer more than 2 MiB, and the first start of a Debian image with Python takes
14.0 % of its bytes from the registry instead of 16.1 % (13.5 % at 512 KiB, with an index twice as large).
"""
FREE_SPACING = DEFAULT_CHUNK_SIZE
"""Bytes of the tar from one point without a dictionary to the next, about."""
MAX_WINDOWS = 2560
"""Dictionaries at most: indexed_gzip holds them all, 32 KiB each. In a layer above 2.5 GiB they stand further apart."""

_LEVEL = 9
_LIBRARY_MIN_SPACING = 2 * MAX_WINDOW
_FEED = 64 << 10
_MEMBER = b"\x1f\x8b\x08"
_GZIP, _ZSTD, _SKIPPABLE = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
_MAX_FRAME_HEADER = 18

# What indexed_gzip exports, in this machine's byte order: a header, a row a point, then the windows of those that have
# one. Header: "GZIDX", version, flags, compressed and uncompressed size, spacing, window size, number of points. Row:
# first whole byte of compressed data, byte of uncompressed data, bits of the byte before that count too, has a window.
_HEADER, _ROW = struct.Struct("=5sBBQQIII"), struct.Struct("=QQBB")

# Dictionaries that tell by what comes out of them where it stood: places from 1 on, by their low and their high byte;
# what differs between the first and the third comes from a dictionary at all.
_PLACES = range(1, MAX_WINDOW + 1)
_LOW = bytes(place & 0xFF for place in _PLACES)
_HIGH = bytes(place >> 8 for place in _PLACES)
_INVERTED = bytes(byte ^ 0xFF for byte in _LOW)
_LOW_AT, _HIGH_AT = (0, 1) if sys.byteorder == "little" else (1, 0)

_Found = tuple[int, int, bytes]
"""Bit in the blob, byte in the tar, dictionary (b"": none is needed): where one could begin."""


def build(path: Path, index: LayerIndex, *, spacing: int = SPACING) -> SeekTable:
    """Return the seek table of the layer that `path` holds, as the registry has it: verified, and the one of `index`.

    Deterministic; of memory it takes at most 32 KiB for each of `MAX_WINDOWS`, and four times the spacing. `spacing`:
    see `SPACING`; gzip's is 64 KiB at least. A layer that is one zstd frame, or too odd for the library (a gzip header
    above 1 MiB, a million members), has just the first point.
    Raises Malformed if file and index do not fit each other, and OSError.
    """
    with path.open("rb") as file:
        form = _form(file.read(4))
        compressed, members = _hashed(file)
        size = index.table.size
        if compressed.size != index.layer_size:
            raise Malformed(f"layer {index.layer_digest} has {index.layer_size} bytes, its file {compressed.size}")
        found: Iterator[_Found] = iter(())
        if form is Form.GZIP and size and members < MAX_POINTS:
            found = _blocks(path, size, max(spacing, size // MAX_WINDOWS, _LIBRARY_MIN_SPACING))
        elif form is Form.ZSTD:
            found = _frames(file)
        free_spacing = max(min(spacing, FREE_SPACING), 4 * size // MAX_POINTS)
        points = [FIRST]
        for position, offset, window in _chosen(found, size, free_spacing):
            packed = _packed(_referenced(file, position, window)) if window else b""
            points.append(SeekPoint(position, offset, form is Form.GZIP, packed))
    return SeekTable(VERSION, form, index.layer_digest, index.diff_id, size, compressed, tuple(points))


def _form(head: bytes) -> Form:
    if head.startswith(_GZIP):
        return Form.GZIP
    skippable = head[1:4] == _SKIPPABLE and head[0] & 0xF0 == 0x50
    return Form.ZSTD if skippable or head.startswith(_ZSTD) else Form.PLAIN


def _hashed(file: BinaryIO) -> tuple[ChunkTable, int]:
    """Return the chunk table, and how many gzip members there can be at most (up to one more for each chunk)."""
    file.seek(0)
    hashes, size, members = [], 0, 0
    while chunk := file.read(COMPRESSED_CHUNK):
        hashes.append(hashlib.sha256(chunk).digest())
        size += len(chunk)
        members += chunk.count(_MEMBER)
    return ChunkTable(size, COMPRESSED_CHUNK, b"".join(hashes)), members


def _chosen(found: Iterator[_Found], size: int, free_spacing: int) -> Iterator[_Found]:
    """Yield the points after the first that are worth it: as few as there can be with gaps of `free_spacing`."""
    last = 0
    for (position, offset, window), (_, following, _) in pairwise(itertools.chain(found, [(0, size, b"")])):
        if last < offset < size and (window or following - last > free_spacing):
            yield position, offset, window
            last = offset


def _blocks(path: Path, size: int, spacing: int) -> Iterator[_Found]:
    """Yield beginnings of deflate blocks: the first of each member, and others `spacing` apart; none if that fails."""
    with tempfile.TemporaryDirectory(prefix="dadi-seek-") as scratch:
        exported = Path(scratch, "points")
        with indexed_gzip.IndexedGzipFile(str(path), spacing=spacing, drop_handles=False) as gzip:
            try:
                gzip.seek(size - 1)  # finds all points on its way, and, unlike build_full_index, without the GIL
                complete = len(gzip.read(2)) == 1
            except (OSError, ValueError):  # of the library's own: every byte of the file has been read just now
                return
            if not complete:
                return
            gzip.export_index(str(exported))
        with exported.open("rb") as file:
            *_, window_size, count = _HEADER.unpack(file.read(_HEADER.size))
            rows = file.read(count * _ROW.size)
            for byte, offset, bits, has_window in _ROW.iter_unpack(rows):
                yield 8 * byte - bits, offset, file.read(window_size) if has_window else b""


def _referenced(file: BinaryIO, position: int, window: bytes) -> bytes:
    """Return the dictionary from the first byte on that something refers to, with zeros where nothing does."""
    low, high, inverted = (_beginning(file, position, labels) for labels in (_LOW, _HIGH, _INVERTED))
    from_window = int.from_bytes(low) ^ int.from_bytes(inverted)
    places = bytearray(2 * len(low))
    places[_LOW_AT::2] = (int.from_bytes(low) & from_window).to_bytes(len(low))
    places[_HIGH_AT::2] = (int.from_bytes(high) & from_window).to_bytes(len(high))
    referenced = set(memoryview(places).cast("H")) - {0}
    if not referenced:
        return b""
    keep = bytearray(MAX_WINDOW + 1)
    for place in referenced:
        keep[place] = 0xFF
    sparse = int.from_bytes(window) & int.from_bytes(keep[1:])
    return sparse.to_bytes(MAX_WINDOW)[min(referenced) - 1 :]


def _beginning(file: BinaryIO, position: int, window: bytes) -> bytes:
    """Return the first 32 KiB that the stream gives from there on, or all if it ends before."""
    file.seek(position // 8)
    stream = inflater(position, file.read(1) if position % 8 else b"", window)
    found = b""
    while len(found) < MAX_WINDOW and not stream.eof and (feed := stream.unconsumed_tail or file.read(_FEED)):
        found += stream.decompress(feed, MAX_WINDOW - len(found))
    return found


def _packed(window: bytes) -> bytes:
    return zstandard.ZstdCompressor(level=_LEVEL).compress(window) if window else b""


def _frames(file: BinaryIO) -> Iterator[_Found]:
    """Yield the beginnings of zstd frames (RFC 8878, 3.1), skippable ones apart."""
    at = offset = 0
    earlier: tuple[int, int, int] | None = None
    while head := _at(file, at, _MAX_FRAME_HEADER):
        if head[1:4] == _SKIPPABLE and head[0] & 0xF0 == 0x50:
            at += 8 + int.from_bytes(head[4:8], "little")
            continue
        if earlier is not None:
            offset += _content_size(file, *earlier)
        yield 8 * at, offset, b""
        try:
            parameters = zstandard.get_frame_parameters(head)
            blocks = at + zstandard.frame_header_size(head)
        except zstandard.ZstdError as error:
            raise Malformed(f"no zstd frame begins at byte {at}: {error}") from None
        end = _end_of_blocks(file, blocks) + 4 * parameters.has_checksum
        at, earlier = end, (at, end, parameters.content_size)


def _end_of_blocks(file: BinaryIO, at: int) -> int:
    last = False
    while not last:
        header = int.from_bytes(_at(file, at, 3).ljust(3, b"\x07"), "little")
        last, kind, size = bool(header & 1), header >> 1 & 3, header >> 3
        if kind == 3:
            raise Malformed(f"no zstd block begins at byte {at}")
        at += 3 + (1 if kind == 1 else size)  # kind 1: one byte, repeated
    return at


def _content_size(file: BinaryIO, begin: int, end: int, said: int) -> int:
    """Return how many bytes the frame unpacks to: what its header says, else by unpacking it."""
    if said != zstandard.CONTENTSIZE_UNKNOWN:
        return said
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    size = 0
    try:
        with decompressor.stream_reader(cast(BinaryIO, _Part(file, begin, end)), closefd=False) as reader:
            while piece := reader.read(PIECE):
                size += len(piece)
    except zstandard.ZstdError as error:
        raise Malformed(f"the zstd frame at byte {begin} is damaged: {error}") from None
    return size


class _Part:
    """The bytes [begin, end) of a file."""

    def __init__(self, file: BinaryIO, begin: int, end: int) -> None:
        self._file = file
        self._left = end - begin
        file.seek(begin)

    def read(self, size: int, /) -> bytes:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data


def _at(file: BinaryIO, at: int, size: int) -> bytes:
    file.seek(at)
    return file.read(size)
