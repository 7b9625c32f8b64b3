"""Chunks out of compressed ranges: right ones, in bounded memory, and nobody blamed for what our own disk did."""

from __future__ import annotations

import random
from bisect import bisect_right

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.blobs.source import Urgency
from dadi.blobs.unpacked import Unpacked, largest_extent
from dadi.errors import DigestMismatch
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, ChunkTable, blob_of, table_of
from dadi.index.seek import COMPRESSED_CHUNK, FIRST, VERSION, Form, SeekPoint, SeekTable
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.sources import ScriptedSource

CHUNK = 16 << 10
RANDOM = random.Random(4)
TAR = RANDOM.randbytes(1 << 20) + bytes(300_000) + RANDOM.randbytes(200_123)


def framed(tar: bytes, size: int) -> tuple[bytes, SeekTable]:
    """Return a layer of zstd frames of that many bytes each, and its seek table."""
    layer, points = b"", []
    for offset in range(0, len(tar), size):
        points.append(SeekPoint(len(layer) * 8, offset, False, b""))
        layer += zstandard.compress(tar[offset : offset + size])
    compressed = table_of(layer, COMPRESSED_CHUNK)
    return layer, SeekTable(VERSION, Form.ZSTD, digests.of(layer), digests.of(tar), len(tar), compressed, tuple(points))


LAYER, TABLE = framed(TAR, 100_000)
BLOB = blob_of(TAR, CHUNK)


def unpacked(packed: ScriptedSource, again: ScriptedSource, *, most: int = 8 << 20) -> Unpacked:
    return Unpacked(MemoryBlobs(), TABLE, packed, again, Fallbacks(), most=most)


def source() -> ScriptedSource:
    return ScriptedSource((TABLE.blob, LAYER))


@settings(max_examples=40)
@given(st.integers(0, BLOB.table.count - 1), st.integers(0, 60), st.sampled_from(Urgency), st.integers(1, 1 << 20))
async def test_any_run_is_right_however_little_may_be_held(first: int, count: int, urgency: Urgency, most: int) -> None:
    chunks = range(first, min(first + count, BLOB.table.count))
    found = await unpacked(source(), ScriptedSource(), most=most).read(BLOB, chunks, urgency)
    assert b"".join(found) == TAR[chunks.start * CHUNK : chunks.stop * CHUNK]
    assert len(found) == len(chunks)


async def test_a_read_fetches_no_more_at_a_time_than_it_may_hold() -> None:
    packed = source()
    await unpacked(packed, source(), most=300_000).read(BLOB, range(BLOB.table.count), Urgency.BACKFILL)
    assert len(packed.asked) > 3
    assert max(map(len, packed.asked)) <= 300_000 // COMPRESSED_CHUNK + 2  # a chunk at either end in part


def test_what_one_chunk_needs_is_known_of_a_table_whose_units_are_all_small() -> None:
    unit, units = 1 << 20, 40
    points = (FIRST, *(SeekPoint(n * unit * 8, n, False, b"") for n in range(1, units)))
    blob = ChunkTable(unit * units, COMPRESSED_CHUNK, bytes(32 * unit * units // COMPRESSED_CHUNK))
    table = SeekTable(VERSION, Form.GZIP, digests.of(b"a"), digests.of(b"b"), 1 << 20, blob, points)
    assert max(table.compressed_extent(range(n, n + 1))[1] for n in range(units)) == unit
    assert largest_extent(table, ChunkTable(1 << 20, CHUNK, b"")) == unit * units


def test_what_one_chunk_needs_is_what_its_frames_have() -> None:
    places = [point.offset for point in TABLE.points]
    ends = [point.position // 8 for point in TABLE.points[1:]] + [len(LAYER)]

    def needed(chunk: int) -> int:
        first = bisect_right(places, chunk * CHUNK) - 1
        last = bisect_right(places, min((chunk + 1) * CHUNK, len(TAR)) - 1) - 1
        return ends[last] - TABLE.points[first].position // 8

    assert largest_extent(TABLE, BLOB.table) == max(map(needed, range(BLOB.table.count)))
    assert largest_extent(TABLE, ChunkTable(0, CHUNK, b"")) == 0


async def test_what_our_own_disk_spoilt_is_fetched_again_and_nobody_is_blamed() -> None:
    packed, again = source(), source()
    packed.change = lambda part: bytes(len(part))
    fallbacks = Fallbacks()
    sut = Unpacked(MemoryBlobs(), TABLE, packed, again, fallbacks, most=8 << 20)
    found = await sut.read(BLOB, range(20, 30))
    assert b"".join(found) == TAR[20 * CHUNK : 30 * CHUNK]
    assert {row["kind"] for row in fallbacks.statistics()} == {"our own disk spoilt bytes, fetched again"}


async def test_only_the_spoilt_chunks_are_fetched_again() -> None:
    packed, again = source(), source()
    spoilt = LAYER[3 * COMPRESSED_CHUNK : 4 * COMPRESSED_CHUNK]
    packed.change = lambda part: bytes(len(part)) if part == spoilt else part
    found = await unpacked(packed, again).read(BLOB, range(40))
    assert b"".join(found) == TAR[: 40 * CHUNK]
    assert again.asked == [range(3, 4)]


async def test_a_table_that_lies_is_blamed_and_nothing_fetched_again() -> None:
    table = BLOB.table
    lying = ChunkTable(table.size, table.chunk_size, table.digests[:320] + bytes(32) + table.digests[352:])
    packed, again = source(), source()
    with pytest.raises(DigestMismatch, match="index lies"):
        await unpacked(packed, again).read(Blob(BLOB.digest, lying), range(8, 12))
    assert again.asked == []
