"""Chunk tables: the arithmetic between offsets and chunks, and refusing what does not fit together."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import DigestMismatch, Malformed
from dadi.index.chunks import (
    DEFAULT_CHUNK_SIZE,
    MAX_CHUNK_SIZE,
    MIN_CHUNK_SIZE,
    Blob,
    ChunkHashes,
    ChunkTable,
    blob_of,
    table_of,
)

SIZES = st.sampled_from([0, 1, 4095, 4096, 4097, 8192, 50_000])


def table(size: int, chunk_size: int = 4096) -> ChunkTable:
    return ChunkTable(size, chunk_size, bytes(-(-size // chunk_size) * 32))


@given(SIZES)
def test_chunks_cover_the_blob_without_gap_or_overlap(size: int) -> None:
    extents = [table(size).extent(chunk) for chunk in range(table(size).count)]
    assert sum(length for _, length in extents) == size
    assert [offset for offset, _ in extents] == [4096 * i for i in range(len(extents))]
    assert all(0 < length <= 4096 for _, length in extents)


@pytest.mark.parametrize("chunk", [-1, 2, 1 << 70])
def test_there_is_no_chunk_outside(chunk: int) -> None:
    with pytest.raises(IndexError):
        table(5000).extent(chunk)


@given(SIZES, st.integers(0, 60_000), st.integers(0, 60_000))
def test_covering_is_the_smallest_run_that_holds_the_bytes(size: int, offset: int, length: int) -> None:
    run = table(size).covering(offset, length)
    touched = {at // 4096 for at in (offset, min(offset + length, size) - 1) if offset < min(offset + length, size)}
    assert list(run) == (list(range(min(touched), max(touched) + 1)) if touched else [])
    if run:
        start, span = table(size).span(run)
        assert start <= offset
        assert min(offset + length, size) <= start + span <= size


@given(st.binary(max_size=20_000))
def test_a_table_verifies_its_own_bytes_and_no_others(data: bytes) -> None:
    blob = blob_of(data, 4096)
    assert blob.digest == "sha256:" + hashlib.sha256(data).hexdigest()
    assert (blob.size, blob.table) == (len(data), table_of(memoryview(data), 4096))
    assert blob.table.check() is blob.table
    hashes = ChunkHashes(4096)
    for at in range(0, len(data), 1500):
        hashes.update(data[at : at + 1500])
    assert (hashes.table(), hashes.size) == (blob.table, len(data))
    for chunk in range(blob.table.count):
        offset, length = blob.table.extent(chunk)
        good = data[offset : offset + length]
        blob.verify(chunk, good, source="somebody")
        for bad in (good[:-1], good + b"\0", bytes([good[0] ^ 1]) + good[1:]):
            with pytest.raises(DigestMismatch) as caught:
                blob.verify(chunk, bad, source="somebody")
            assert caught.value.source == "somebody"
            told = str(caught.value)  # all that whoever is on duty has
            assert all(word in told for word in (f"chunk {chunk} of {blob.digest}", "from somebody", "`dadi verify`"))


@pytest.mark.parametrize(
    "wrong",
    [
        ChunkTable(0, 0, b""),
        ChunkTable(0, -4096, b""),
        ChunkTable(0, 4097, b""),
        ChunkTable(0, MIN_CHUNK_SIZE // 2, b""),
        ChunkTable(0, MAX_CHUNK_SIZE * 2, b""),
        ChunkTable(-1, 4096, b""),
        ChunkTable(0, 4096, bytes(32)),
        ChunkTable(1, 4096, b""),
        ChunkTable(4096, 4096, bytes(31)),
        ChunkTable(4097, 4096, bytes(32)),
        ChunkTable(1 << 62, 4096, bytes(32)),
    ],
)
def test_a_table_whose_parts_do_not_fit_is_malformed(wrong: ChunkTable) -> None:
    with pytest.raises(Malformed):
        wrong.check()


def test_blobs_are_told_apart_by_digest_and_table() -> None:
    data = b"x" * 10_000
    assert blob_of(data, 4096) == blob_of(data, 4096)
    assert blob_of(data, 4096) != blob_of(data, 8192)
    assert blob_of(data, 4096) != blob_of(b"y" * 10_000, 4096)
    assert len({blob_of(data), blob_of(data), blob_of(data, 4096)}) == 2
    assert blob_of(data) != data
    assert repr(blob_of(data, 4096)) == f"Blob({digests.of(data)[7:19]}, 10000 bytes, 3 chunks)"


def test_the_default_is_a_power_of_two_in_range() -> None:
    assert MIN_CHUNK_SIZE <= DEFAULT_CHUNK_SIZE <= MAX_CHUNK_SIZE
    assert ChunkTable(0, DEFAULT_CHUNK_SIZE, b"").check().count == 0
    assert Blob(digests.of(b""), table_of(b"")).size == 0
