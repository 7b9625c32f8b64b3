"""Seek tables: there and back, arithmetic, and hostile ones, of which nothing comes but our errors or right lengths."""

from __future__ import annotations

import random
import resource
import zlib
from itertools import pairwise

import msgspec
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import Malformed, TooLarge, Unsupported
from dadi.index import seek
from dadi.index.chunks import ChunkTable, table_of
from dadi.index.seek import (
    COMPRESSED_CHUNK,
    FIRST,
    MAGIC,
    MAX_WINDOW,
    PIECE,
    PLAIN_UNIT,
    VERSION,
    Form,
    SeekPoint,
    SeekTable,
    decode,
    encode,
    inflater,
    unpack,
    window_of,
)
from tests.contracts import formats
from tests.fakes import gzips

LAYER, DIFF = digests.of(b"layer"), digests.of(b"tar")


def packed(window: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(window)


def table_of_points(*points: SeekPoint, form: Form = Form.GZIP, size: int = 1 << 20, blob: int = 200_000) -> SeekTable:
    chunks = ChunkTable(blob, COMPRESSED_CHUNK, bytes(-(-blob // COMPRESSED_CHUNK) * 32))
    diff_id = LAYER if form is Form.PLAIN else DIFF
    return SeekTable(VERSION, form, LAYER, diff_id, size, chunks, (FIRST, *points))


def table_for(layer: bytes, size: int, *points: SeekPoint, form: Form = Form.GZIP) -> SeekTable:
    return SeekTable(VERSION, form, LAYER, DIFF, size, table_of(layer, COMPRESSED_CHUNK), (FIRST, *points))


def raw(position: int, offset: int, window: bytes = b"") -> SeekPoint:
    return SeekPoint(position, offset, True, packed(window) if window else b"")


@st.composite
def tables(draw: st.DrawFn) -> SeekTable:
    form = draw(st.sampled_from(Form))
    if form is Form.PLAIN:
        size = draw(st.integers(0, 5 << 20))
        return table_of_points(form=form, size=size, blob=size)
    count = draw(st.integers(0, 6))
    whole = 8 if form is Form.ZSTD else 1
    bits = draw(st.lists(st.integers(1, 1_500_000 // whole), min_size=count, max_size=count, unique=True).map(sorted))
    bytes_ = draw(st.lists(st.integers(1, 999_999), min_size=count, max_size=count, unique=True).map(sorted))
    windows = draw(st.lists(st.binary(max_size=20), min_size=count, max_size=count))
    points = [
        SeekPoint(bit * whole, byte, form is Form.GZIP, window if form is Form.GZIP else b"")
        for bit, byte, window in zip(bits, bytes_, windows, strict=True)
    ]
    return table_of_points(*points, form=form, size=1_000_000)


@given(tables())
def test_there_and_back(table: SeekTable) -> None:
    data = encode(table)
    assert data.startswith(MAGIC)
    assert decode(data) == table
    assert encode(decode(data)) == data


@given(tables(), st.integers(0, 6 << 20), st.integers(0, 4 << 20))
def test_units_are_the_fewest_that_hold_a_range(table: SeekTable, offset: int, length: int) -> None:
    units = table.units(offset, length)
    wanted = range(min(offset, table.size), min(offset + length, table.size))
    assert bool(units) == bool(wanted)
    if wanted:
        begin, size = table.extent(units)
        assert begin <= wanted.start
        assert wanted.stop <= begin + size
        first, last = units[:1], units[-1:]
        assert sum(table.extent(first)) > wanted.start
        assert table.extent(last)[0] < wanted.stop


@given(tables())
def test_units_lie_side_by_side_and_make_the_whole(table: SeekTable) -> None:
    every = [range(unit, unit + 1) for unit in range(table.count)]
    end = 0
    for units in every:
        offset, length = table.extent(units)
        assert offset == end
        end += length
    assert end == table.size
    spans = [table.compressed_extent(units) for units in every]
    assert all(0 <= one + size - two <= 1 for (one, size), (two, _) in pairwise(spans))
    if every:
        assert table.compressed_extent(range(table.count)) == (0, table.compressed.size)
        assert spans[0][0] == 0
        assert sum(spans[-1]) == table.compressed.size


def test_a_byte_that_two_units_share_is_in_both() -> None:
    table = table_of_points(raw(1001 * 8 + 3, 5000), raw(2000 * 8, 9000))
    assert table.compressed_extent(range(1)) == (0, 1002)
    assert table.compressed_extent(range(1, 2)) == (1001, 999)
    assert table.compressed_extent(range(2, 3)) == (2000, 198_000)


@pytest.mark.parametrize("units", [range(2), range(-1, 1), range(1, 2), range(0, 1, 2)])
@pytest.mark.parametrize("form", Form)
def test_units_that_do_not_exist(form: Form, units: range) -> None:
    table = table_of_points(form=form, size=3000, blob=3000)
    if units == range(0, 1, 2):
        units = range(0, 3, 2)
    with pytest.raises(IndexError):
        table.extent(units)
    with pytest.raises(IndexError):
        table.compressed_extent(units)
    with pytest.raises(IndexError):
        list(unpack(table, units, b""))


def test_the_blob_is_the_compressed_one() -> None:
    table = table_of_points()
    assert (table.blob.digest, table.blob.size) == (LAYER, 200_000)
    assert "GZIP" in repr(table)


# What comes from outside.

SAMPLE = encode(table_of_points(raw(1003, 4000, b"abc"), raw(8000, 5000)))


@given(formats.strange(MAGIC))
def test_any_bytes_give_a_table_or_an_error_of_ours(data: bytes) -> None:
    formats.taken_or_refused(data, decode, encode)


@given(st.integers(0, len(SAMPLE) - 1), st.binary(max_size=3), st.integers(0, 3))
@settings(max_examples=500)
def test_a_table_with_bytes_put_in_or_left_out_gives_a_table_or_an_error_of_ours(at: int, put: bytes, cut: int) -> None:
    formats.taken_or_refused(SAMPLE[:at] + put + SAMPLE[at + cut :], decode, encode)


def test_a_newer_version_is_unsupported_whatever_it_looks_like() -> None:
    with pytest.raises(Unsupported, match="version 2"):
        decode(MAGIC + msgspec.msgpack.encode([VERSION + 1, {"something": "else"}]))


good = table_of_points(raw(1000, 4000), raw(8000, 5000))
HOSTILE = {
    "no points": msgspec.structs.replace(good, points=()),
    "a first point of its own": msgspec.structs.replace(good, points=good.points[1:]),
    "a first point with a window": msgspec.structs.replace(good, points=(SeekPoint(0, 0, True, b"w"),)),
    "positions that fall": table_of_points(raw(8000, 4000), raw(1000, 5000)),
    "positions that stay": table_of_points(raw(1000, 4000), raw(1000, 5000)),
    "offsets that fall": table_of_points(raw(1000, 5000), raw(8000, 4000)),
    "offsets that stay": table_of_points(raw(1000, 5000), raw(8000, 5000)),
    "a negative position": table_of_points(raw(-8, 4000)),
    "a position behind the blob": table_of_points(raw(200_000 * 8, 4000)),
    "an offset behind the tar": table_of_points(raw(1000, 1 << 20)),
    "a negative size": msgspec.structs.replace(table_of_points(), size=-1),
    "a member inside of a byte": table_of_points(SeekPoint(1001, 4000, False, b"")),
    "a member with a window": table_of_points(SeekPoint(1000, 4000, False, b"w")),
    "a window that is too large": table_of_points(SeekPoint(1000, 4000, True, bytes(40_000))),
    "a frame in the middle": table_of_points(raw(1000, 4000), form=Form.ZSTD),
    "a plain tar with points": table_of_points(raw(1000, 4000), form=Form.PLAIN, size=200_000),
    "a plain tar of another size": table_of_points(form=Form.PLAIN, size=200_001),
    "a plain tar of other name": msgspec.structs.replace(table_of_points(form=Form.PLAIN, size=200_000), diff_id=DIFF),
    "no digest": msgspec.structs.replace(good, layer_digest="sha256:x"),
    "no diff ID": msgspec.structs.replace(good, diff_id=""),
    "too few chunks": msgspec.structs.replace(good, compressed=ChunkTable(200_000, COMPRESSED_CHUNK, bytes(32))),
    "other chunks": msgspec.structs.replace(good, compressed=ChunkTable(4096, 4096, bytes(32))),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_tables_that_contradict_themselves_are_malformed(what: str) -> None:
    assert decode(encode(good)) == good
    with pytest.raises(Malformed):
        decode(encode(HOSTILE[what]))


def test_too_large_a_table_is_refused_before_it_is_read() -> None:
    assert decode(SAMPLE, max_size=len(SAMPLE))
    with pytest.raises(TooLarge, match="limit"):
        decode(SAMPLE, max_size=len(SAMPLE) - 1)


def test_millions_of_points_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    fields = list(msgspec.msgpack.decode(SAMPLE[len(MAGIC) :]))
    head = msgspec.msgpack.encode(fields[:-1])[1:]
    points = b"\x94\0\0\xc2\xc4\0" * (seek.MAX_POINTS + 1)
    bomb = MAGIC + b"\x97" + head + b"\xdd" + (seek.MAX_POINTS + 1).to_bytes(4, "big") + points
    monkeypatch.setattr(seek, "_decoder", None)  # would fail if it were used
    with pytest.raises(TooLarge, match="points"):
        decode(bomb)


def test_an_array_that_lies_about_its_length_costs_nothing() -> None:
    fields = list(msgspec.msgpack.decode(SAMPLE[len(MAGIC) :]))
    head = msgspec.msgpack.encode(fields[:-1])[1:]
    with pytest.raises(Malformed, match="truncated"):
        decode(MAGIC + b"\x97" + head + b"\xdd\0\x0f\xff\xff")


# Unpacking.


@pytest.mark.parametrize("bit", range(8))
@pytest.mark.parametrize("strategy", [zlib.Z_FIXED, zlib.Z_DEFAULT_STRATEGY, zlib.Z_HUFFMAN_ONLY])
def test_a_block_can_begin_at_any_bit(bit: int, strategy: int) -> None:
    letters = bytes(byte & 0x3F for byte in range(256))  # so that no block is a stored one, which ends at a byte
    before, after = (gzips.text(40_000, seed).translate(letters) for seed in (1, 2))
    after += before[15_000:19_000]
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, 9, strategy, zdict=before[-MAX_WINDOW:])
    block = stream.compress(after) + stream.flush()
    shifted = (int.from_bytes(block, "little") << bit | (1 << bit) - 1).to_bytes(len(block) + 1, "little")
    decompressor = inflater(800 + bit, shifted[:1], before[-MAX_WINDOW:])
    assert decompressor.decompress(shifted[min(bit, 1) :]) == after
    assert decompressor.eof


DATA = gzips.text(200_000)


@pytest.mark.parametrize("pack", [gzips.member, gzips.zstd])
@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1, 0, 1, 1 << 40])
def test_units_of_another_length_are_malformed(pack: gzips.Packer, size: int) -> None:
    layer = pack(DATA)
    form = Form.GZIP if pack is gzips.member else Form.ZSTD
    pieces = unpack(table_for(layer, size, form=form), range(1), layer)
    given_up = b""
    with pytest.raises(Malformed, match="unpack to"):  # noqa: PT012
        while True:
            given_up += next(pieces)
    assert len(given_up) <= size
    assert DATA.startswith(given_up)


@pytest.mark.parametrize("pack", [gzips.member, gzips.zstd])
def test_units_that_are_cut_off_or_damaged_are_malformed(pack: gzips.Packer) -> None:
    layer = pack(DATA)
    form = Form.GZIP if pack is gzips.member else Form.ZSTD
    for wrong in (layer[:1000], layer[:1000] + bytes(len(layer) - 1000), b"", bytes(20), b"\xff" * 1000, layer[1:]):
        with pytest.raises(Malformed):
            list(unpack(table_for(wrong, len(DATA), form=form), range(1), wrong))


@pytest.mark.parametrize("form", Form)
def test_data_that_is_not_the_extent_is_refused(form: Form) -> None:
    table = table_of_points(form=form, size=200_000)
    for length in (0, 199_999, 200_001):
        with pytest.raises(Malformed, match="need 200000 compressed bytes"):
            list(unpack(table, range(1), bytes(length)))
    assert list(unpack(table, range(0), b"")) == []


@settings(max_examples=300)
@given(st.binary(max_size=2000), st.integers(0, 4000), st.integers(0, 7), st.sampled_from([Form.GZIP, Form.ZSTD]))
def test_arbitrary_data_gives_the_promised_length_or_malformed(data: bytes, size: int, bit: int, form: Form) -> None:
    head = {Form.GZIP: gzips.member(b"")[:10], Form.ZSTD: gzips.zstd(b"x" * 50)[:6]}[form]
    for blob in (data, head + data):
        points = [raw(8 + bit, 1, b"window" * 5)] if form is Form.GZIP and size > 1 and len(blob) > 2 else []
        table = table_for(blob, size, *points, form=form)
        for units in (range(table.count), range(table.count - 1, table.count)):
            at, length = table.compressed_extent(units)
            try:
                got = b"".join(unpack(table, units, blob[at : at + length]))
            except Malformed:
                continue
            assert len(got) == table.extent(units)[1]


WINDOWS = {
    "not zstd": b"\0" * 20,
    "cut off": packed(random.Random(1).randbytes(1000))[:-5],
    "larger than any": packed(bytes(MAX_WINDOW + 1)),
    "a bomb": packed(bytes(100 << 20)),
    "a lie about its size": b"\x28\xb5\x2f\xfd\xe0" + b"\xff" * 7 + b"\x3f" + b"\x01\0\0",
    "nothing": packed(b""),
}


@pytest.mark.parametrize("what", WINDOWS)
def test_windows_that_are_none_are_malformed(what: str) -> None:
    table = table_of_points(SeekPoint(1000, 4000, True, WINDOWS[what]))
    assert decode(encode(table)) == table
    _, length = table.compressed_extent(range(1, 2))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Malformed, match="dictionary of byte 4000"):
        list(unpack(table, range(1, 2), bytes(length)))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_a_window_of_32_kib_is_allowed() -> None:
    window = random.Random(1).randbytes(MAX_WINDOW)
    assert window_of(raw(8, 8, window)) == window


@pytest.mark.parametrize("pack", [gzips.member, gzips.zstd])
def test_a_bomb_comes_in_small_pieces(pack: gzips.Packer) -> None:
    bomb = pack(bytes(200 << 20))
    form = Form.GZIP if pack is gzips.member else Form.ZSTD
    table = table_for(bomb, 200 << 20, form=form)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    sizes = [len(piece) for piece in unpack(table, range(1), bomb)]
    assert max(sizes) <= PIECE
    assert sum(sizes) == 200 << 20
    with pytest.raises(Malformed, match="more than 5 bytes"):
        list(unpack(table_for(bomb, 5, form=form), range(1), bomb))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50 << 10


def test_a_plain_tar_is_its_own_units() -> None:
    tar = random.Random(3).randbytes(2 * PLAIN_UNIT + 1000)
    table = SeekTable(VERSION, Form.PLAIN, LAYER, LAYER, len(tar), table_of(tar, COMPRESSED_CHUNK), (FIRST,))
    assert decode(encode(table)) == table
    assert table.units(PLAIN_UNIT - 1, 2) == range(2)
    assert table.units(2 * PLAIN_UNIT, 10_000_000) == range(2, 3)
    for units in (range(1), range(1, 3), range(2, 3), range(3)):
        offset, length = table.compressed_extent(units)
        assert (offset, length) == table.extent(units)
        pieces = list(unpack(table, units, memoryview(tar)[offset : offset + length]))
        assert b"".join(pieces) == tar[offset : offset + length]
        assert max(map(len, pieces)) <= PIECE
