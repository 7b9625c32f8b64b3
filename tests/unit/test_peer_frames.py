"""zstd frames on the wire: where one ends, what is in it, and what is none."""

from __future__ import annotations

import random

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import DigestMismatch
from dadi.index.chunks import blob_of
from dadi.peers.frames import Frames, Scan, frame_end, longest, packed, unpacked

TEXT = b"".join(b"line %d of a text that compresses\n" % n for n in range(20_000))
BLOB = blob_of(TEXT, 64 << 10)


@given(data=st.binary(max_size=3000), times=st.integers(1, 60), level=st.integers(1, 9), checksum=st.booleans(),
       known=st.booleans(), behind=st.binary(max_size=50))  # fmt: skip
def test_a_frame_ends_where_the_next_begins(
    data: bytes, times: int, level: int, checksum: bool, known: bool, behind: bytes
) -> None:
    data *= times
    compressor = zstandard.ZstdCompressor(level=level, write_checksum=checksum, write_content_size=known)
    frame = compressor.compress(data)
    assert frame_end(frame + behind, len(frame)) == len(frame)
    assert frame_end(frame[:-1], len(frame)) is None
    assert unpacked(frame, len(data)) == data
    with pytest.raises(DigestMismatch):
        unpacked(frame, len(data) + 1)
    if data:
        with pytest.raises(DigestMismatch):
            unpacked(frame, len(data) - 1)


@given(st.binary(max_size=200))
def test_whatever_comes_is_a_frame_or_an_error_and_never_anything_else(data: bytes) -> None:
    for hostile in (data, b"\x28\xb5\x2f\xfd" + data):
        try:
            end = frame_end(hostile, 100)
        except DigestMismatch:
            continue
        assert end is None or 0 < end <= min(100, len(hostile))
        if end is not None:
            try:
                assert len(unpacked(hostile[:end], 50)) == 50
            except DigestMismatch:
                pass


def test_a_frame_that_is_cut_anywhere_is_waited_for() -> None:
    frame = packed(TEXT[: 200 << 10])
    for at in (0, 3, 4, 5, 6, 8, 9, 11, 100, len(frame) - 1):
        assert frame_end(frame[:at], 200 << 10) is None


def test_a_frame_larger_than_its_chunk_is_refused_before_all_of_it_has_come() -> None:
    frame = zstandard.ZstdCompressor().compress(random.Random(1).randbytes(300 << 10))
    with pytest.raises(DigestMismatch, match="longer than"):
        frame_end(frame[: 200 << 10], 64 << 10)


@given(data=st.binary(min_size=1, max_size=3000), times=st.integers(1, 60), piece=st.integers(1, 4000))
def test_where_a_frame_ends_is_found_as_well_in_pieces(data: bytes, times: int, piece: int) -> None:
    frame = zstandard.ZstdCompressor().compress(data * times)
    scan, sent = Scan(longest(len(data) * times)), bytearray()
    for at in range(0, len(frame), piece):
        assert at == 0 or scan.end(sent) is None
        sent += frame[at : at + piece]
    assert scan.end(sent + b"behind") == len(frame)


@pytest.mark.parametrize("size", [1, 300, 64 << 10, 300 << 10, 4 << 20])
def test_what_does_not_compress_is_a_frame_a_little_longer(size: int) -> None:
    data = random.Random(1).randbytes(size)
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(data)
    assert len(frame) > size
    assert unpacked(frame, size) == data


def test_a_frame_of_many_blocks_is_refused_with_the_first_that_are_too_many() -> None:
    data = b"a" * (256 << 10)
    head = b"\x28\xb5\x2f\xfd\xa0" + len(data).to_bytes(4, "little")
    runs = [((128 << 10) << 3 | 1 << 1 | last).to_bytes(3, "little") + b"a" for last in (0, 1)]
    assert unpacked(head + b"".join(runs), len(data)) == data
    for number in (300, 80_000):
        frame = head + bytes(3 * number) + b"".join(runs)  # zstd takes it
        with pytest.raises(DigestMismatch, match="more blocks"):
            frame_end(frame[:1500], longest(len(data)))
        with pytest.raises(DigestMismatch, match="more blocks"):
            unpacked(frame, len(data))


def test_a_frame_with_something_behind_it_is_refused() -> None:
    with pytest.raises(DigestMismatch, match="nothing else"):
        unpacked(packed(TEXT[: 64 << 10]) + b"more", 64 << 10)


def test_a_bomb_is_refused() -> None:
    bomb = zstandard.ZstdCompressor(level=19, write_content_size=False).compress(bytes(1 << 26))
    with pytest.raises(DigestMismatch):
        unpacked(bomb, 64 << 10)


def test_what_does_not_compress_is_not_packed() -> None:
    assert packed(random.Random(1).randbytes(64 << 10)) == b""


def test_the_frames_not_used_for_longest_go_first() -> None:
    frames = Frames(3 * 1200)
    for chunk in range(3):
        frames.keep(BLOB, chunk, bytes([chunk]) * 1000)
    assert frames.get(BLOB, 0) == bytes(1000)
    frames.keep(BLOB, 3, b"3" * 1000)
    assert frames.get(BLOB, 1) is None
    assert frames.get(BLOB, 0) == bytes(1000)
    assert frames.bytes == 3 * 1200
    assert not Frames(0)


def test_a_cache_of_nothing_keeps_nothing() -> None:
    frames = Frames(0)
    frames.keep(BLOB, 0, b"x")
    assert frames.get(BLOB, 0) is None
