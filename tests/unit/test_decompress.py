"""Decompressing a layer: every form it comes in, every way it can be broken, and bounded pieces whatever the input."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import tracemalloc
import zlib

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from isal import igzip

from dadi.errors import DadiError, Malformed, TooLarge, Unsupported
from dadi.index.decompress import PIECE, uncompressed

DATA = random.Random(1).randbytes(3000) * 500 + b"the end"
SMALL = random.Random(2).randbytes(100) * 20


class Counted(io.BytesIO):
    """A source that says how much of it was taken, and gives at most `step` bytes at a time."""

    def __init__(self, data: bytes, step: int = 1 << 20) -> None:
        super().__init__(data)
        self._step = step

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(min(size or 0, self._step) if size is not None and size >= 0 else self._step)


def through(data: bytes, step: int = 1 << 20, max_size: int = 1 << 30) -> bytes:
    pieces = list(uncompressed(Counted(data, step), max_size=max_size, media_type="application/test"))
    assert all(0 < len(piece) <= PIECE for piece in pieces)
    return b"".join(pieces)


def zstd(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def gzip_with_header(data: bytes, flags: int, fields: bytes) -> bytes:
    body = zlib.compressobj(6, zlib.DEFLATED, -15)
    head = b"\x1f\x8b\x08" + bytes([flags]) + b"\0\0\0\0\0\xff" + fields
    trailer = struct.pack("<II", zlib.crc32(data), len(data) & 0xFFFFFFFF)
    return head + body.compress(data) + body.flush() + trailer


def skippable(data: bytes, kind: int = 0) -> bytes:
    return struct.pack("<II", 0x184D2A50 + kind, len(data)) + data


FORMS = {
    "gzip": gzip.compress(DATA),
    "isal": igzip.compress(DATA),
    "gzip of members": gzip.compress(DATA[:1000]) + gzip.compress(b"") + gzip.compress(DATA[1000:]),
    "gzip of many members": b"".join(gzip.compress(DATA[at : at + 5000]) for at in range(0, len(DATA), 5000)),
    "gzip with zeros behind": gzip.compress(DATA) + bytes(2000),
    "gzip with zeros between": gzip.compress(DATA[:10]) + bytes(700) + gzip.compress(DATA[10:]),
    "gzip with a name": gzip_with_header(DATA, 8, b"layer.tar\0"),
    "gzip with everything": gzip_with_header(DATA, 4 | 8 | 16, b"\x05\0extra" + b"name\0" + b"c" * 100_000 + b"\0"),
    "zstd": zstd(DATA),
    "zstd with checksum": zstd(DATA, write_checksum=True),
    "zstd without size": zstd(DATA, write_content_size=False),
    "zstd of frames": b"".join(zstd(DATA[at : at + 4096]) for at in range(0, len(DATA), 4096)),
    "zstd with skippable frames": skippable(b"in front") + zstd(DATA) + skippable(b"behind", 15),
    "plain": DATA,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("step", [1 << 20, 1000])
def test_every_form_is_told_by_its_first_bytes(form: str, step: int) -> None:
    assert through(FORMS[form], step) == DATA


@pytest.mark.parametrize("form", [gzip.compress(b"", mtime=0), zstd(b""), skippable(b"nothing else"), b""])
def test_nothing_is_nothing(form: bytes) -> None:
    assert through(form) == b""


@pytest.mark.parametrize("size", [1, 15, 16, 17, PIECE - 17, PIECE - 16, PIECE - 15, PIECE, PIECE + 1, 2 * PIECE - 3])
def test_sizes_about_a_piece(size: int) -> None:
    data = DATA[:size]
    assert through(zstd(data)) == through(gzip.compress(data, 1)) == data


def test_a_plain_tar_of_few_bytes_is_passed_on() -> None:
    for size in range(8):
        assert through(bytes(size)) == bytes(size)


@settings(deadline=None)
@given(st.binary(max_size=3000), st.lists(st.integers(0, 3000), max_size=4), st.integers(1, 700), st.booleans())
def test_members_and_frames_in_pieces_of_any_size(data: bytes, cuts: list[int], step: int, gz: bool) -> None:
    edges = [0, *sorted(cuts), 3000]
    compress = gzip.compress if gz else zstd
    assert through(b"".join(compress(data[a:b]) for a, b in zip(edges, edges[1:], strict=False)), step) == data  # noqa: RUF007


# ---- broken


@pytest.mark.parametrize(
    "form", [gzip.compress(SMALL), igzip.compress(SMALL), zstd(SMALL), zstd(SMALL, write_checksum=True)]
)
def test_a_stream_that_is_cut_off_is_malformed_wherever_the_cut_is(form: bytes) -> None:
    for cut in range(4, len(form)):
        for step in (1 << 20, 1, 7):
            with pytest.raises(Malformed, match=r"cut off|damaged"):
                through(form[:cut], step)


@pytest.mark.parametrize("form", ["gzip of many members", "zstd of frames"])
def test_a_cut_between_members_cannot_be_told_from_an_end(form: str) -> None:
    # The digest of the compressed bytes tells it; see test_layer_build.py.
    first = FORMS[form][: FORMS[form].index(FORMS[form][:4], 4)]
    assert DATA.startswith(through(first))


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (gzip.compress(DATA)[:-8] + b"\0\0\0\0" + gzip.compress(DATA)[-4:], "CRC"),
        (gzip.compress(DATA)[:-1] + b"\x55", "length"),
        (gzip.compress(DATA)[:200] + b"\xff\xff\xff" + gzip.compress(DATA)[203:], "damaged"),
        (gzip.compress(DATA) + b"garbage that is no gzip", "behind its gzip data"),
        (gzip.compress(DATA) + bytes(10) + b"garbage that is no gzip", "behind its gzip data"),
        (gzip.compress(DATA) + b"short", "cut off"),
        (b"\x1f\x8b\x09" + bytes(30), "damaged"),
        (b"\x1f\x8b", "cut off"),
        (zstd(DATA, write_checksum=True)[:-1] + b"\0", "damaged"),
        (zstd(DATA) + b"garbage", "damaged"),
        (zstd(DATA) + bytes(512), "damaged"),
        (zstd(DATA) + gzip.compress(b"x"), "damaged"),
        (b"\x28\xb5\x2f\xfd\xff\xff\xff\xff", "damaged|window"),
        (struct.pack("<II", 0x184D2A50, 1000) + b"cut", "cut off"),
    ],
)
def test_damage_is_malformed_and_named(data: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why):
        through(data)


@settings(deadline=None)
@given(st.sampled_from([gzip.compress(SMALL), zstd(SMALL, write_checksum=True)]), st.data())
def test_a_flipped_bit_is_found_or_changes_nothing(form: bytes, data: st.DataObject) -> None:
    at = data.draw(st.integers(4, len(form) - 1))
    flipped = bytearray(form)
    flipped[at] ^= 1 << data.draw(st.integers(0, 7))
    try:
        assert through(bytes(flipped)) == SMALL
    except Malformed as error:
        assert str(error)  # noqa: PT017 (either is right)


@settings(deadline=None)
@given(st.sampled_from([b"", b"\x1f\x8b\x08\0", b"\x28\xb5\x2f\xfd", b"\x50\x2a\x4d\x18"]), st.binary(max_size=300))
def test_any_bytes_give_bytes_or_an_error_of_ours(magic: bytes, rest: bytes) -> None:
    try:
        out = through(magic + rest, max_size=1 << 22)
    except DadiError as error:
        assert str(error)  # noqa: PT017 (nothing else may be raised)
    else:
        assert magic or out == rest or rest[:2] == b"\x1f\x8b"


@pytest.mark.parametrize(
    ("data", "name"), [(bz2.compress(DATA), "bzip2"), (lzma.compress(DATA), "xz"), (b"\x04\x22\x4d\x18....", "lz4")]
)
def test_other_compressions_are_unsupported_by_name(data: bytes, name: str) -> None:
    with pytest.raises(Unsupported, match=f"compressed with {name}.*application/test"):
        through(data)


class Broken(io.BytesIO):
    """A source that fails in the middle."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(1000)
        if not data:
            raise TimeoutError("the source failed")
        return data


@pytest.mark.parametrize("form", ["gzip", "zstd", "plain"])
def test_what_the_source_raises_passes_through(form: str) -> None:
    with pytest.raises(TimeoutError, match="the source failed"):
        list(uncompressed(Broken(FORMS[form][:-4000]), max_size=1 << 30))


# ---- hostile


def zstd_bomb(blocks: int) -> bytes:
    """A frame of blocks of 128 KiB of zeros, four bytes each."""
    rle = struct.pack("<I", (128 << 10) << 3 | 1 << 1)[:3] + b"\0"
    return b"\x28\xb5\x2f\xfd" + b"\x00" + b"\x38" + rle * blocks + struct.pack("<I", 1)[:3]


def gzip_bomb(size: int) -> bytes:
    body = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join(body.compress(bytes(1 << 20)) for _ in range(size >> 20)) + body.flush()


@pytest.mark.parametrize("bomb", [zstd_bomb(1024), gzip_bomb(128 << 20)])
def test_bombs_come_out_in_bounded_pieces_and_stop_at_the_limit(bomb: bytes) -> None:
    assert len(bomb) < 200_000
    size = 0
    tracemalloc.start()
    try:
        for piece in uncompressed(io.BytesIO(bomb), max_size=128 << 20):
            assert len(piece) <= PIECE
            size += len(piece)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert size == 128 << 20
    assert peak < 8 * PIECE
    with pytest.raises(TooLarge, match="more than 1000000 bytes"):
        through(bomb, max_size=1_000_000)


def test_a_limit_is_met_exactly() -> None:
    assert through(gzip.compress(DATA), max_size=len(DATA)) == DATA
    with pytest.raises(TooLarge):
        through(gzip.compress(DATA), max_size=len(DATA) - 1)


def test_input_is_taken_as_it_is_needed() -> None:
    data = random.Random(3).randbytes(20 << 20)
    for form in (gzip.compress(data, 1), zstd(data, level=1), data):
        source = io.BytesIO(form)
        next(uncompressed(source, max_size=1 << 30))
        assert source.tell() <= 3 << 20


def test_a_zstd_window_above_the_limit_is_too_large() -> None:
    parameters = zstandard.ZstdCompressionParameters(window_log=28, compression_level=1)
    compressor = zstandard.ZstdCompressor(compression_params=parameters)
    stream = compressor.compressobj()
    with pytest.raises(TooLarge, match="window"):
        through(stream.compress(b"x" * 1000) + stream.flush())


@pytest.mark.parametrize("flags", [8, 16])
def test_a_gzip_header_without_an_end_is_too_large(flags: int) -> None:
    with pytest.raises(TooLarge, match="header"):
        through(gzip_with_header(b"", flags, b"n" * (8 << 20)))
