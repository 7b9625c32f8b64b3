"""Seek points of real layers: from every one of them, in every form, come the right bytes."""

from __future__ import annotations

import io
import random
import shutil
import struct
import zlib
from pathlib import Path

import indexed_gzip
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import Malformed
from dadi.index import seek_build
from dadi.index.chunks import table_of
from dadi.index.decompress import uncompressed
from dadi.index.layer import VERSION, LayerIndex
from dadi.index.seek import COMPRESSED_CHUNK, FIRST, MAX_WINDOW, Form, SeekTable, decode, encode, unpack, window_of
from dadi.index.seek_build import build
from tests.fakes import gzips

DATA = gzips.text(300_000)
SPACING = 64 << 10


def index_of(layer: bytes, tar: bytes) -> LayerIndex:
    return LayerIndex(VERSION, digests.of(layer), len(layer), digests.of(tar), table_of(tar), ())


def table_for(path: Path, layer: bytes, tar: bytes, spacing: int = SPACING) -> SeekTable:
    path.write_bytes(layer)
    return build(path, index_of(layer, tar), spacing=spacing)


def unpacked(table: SeekTable, units: range, layer: bytes) -> bytes:
    offset, length = table.compressed_extent(units)
    return b"".join(unpack(table, units, layer[offset : offset + length]))


def check(table: SeekTable, layer: bytes, tar: bytes) -> None:
    """Every unit alone, runs of units, and all of them."""
    assert decode(encode(table)) == table
    assert table.compressed == table_of(layer, COMPRESSED_CHUNK)
    assert table.size == len(tar)
    runs = [range(unit, unit + 1) for unit in range(table.count)]
    runs += [range(unit, min(unit + 3, table.count)) for unit in range(0, table.count, 2)]
    for units in [*runs, range(table.count)]:
        offset, length = table.extent(units)
        assert unpacked(table, units, layer) == tar[offset : offset + length]


@pytest.mark.parametrize("form", gzips.GZIP)
@pytest.mark.parametrize("size", [len(DATA), 5000, 0])
def test_every_unit_of_every_gzip_unpacks_to_its_bytes(form: str, size: int, tmp_path: Path) -> None:
    layer = gzips.GZIP[form](DATA[:size])
    table = table_for(tmp_path / "layer", layer, DATA[:size])
    assert table.form is Form.GZIP
    check(table, layer, DATA[:size])
    if size == len(DATA):
        assert table.count > 1


@pytest.mark.parametrize("form", gzips.PROGRAMS)
def test_every_unit_of_what_programs_write_unpacks_to_its_bytes(form: str, tmp_path: Path) -> None:
    if not shutil.which(form.split()[0]):
        pytest.skip(f"{form.split()[0]} is not installed")
    layer = gzips.PROGRAMS[form](DATA)
    table = table_for(tmp_path / "layer", layer, DATA)
    assert table.count > 2
    check(table, layer, DATA)


@pytest.mark.parametrize("form", gzips.ZSTD)
@pytest.mark.parametrize("size", [len(DATA), 5000, 0])
def test_every_unit_of_every_zstd_unpacks_to_its_bytes(form: str, size: int, tmp_path: Path) -> None:
    layer = gzips.ZSTD[form](DATA[:size])
    tar = bytes(200_000) * (form == "repeated blocks") + DATA[:size]
    table = table_for(tmp_path / "layer", layer, tar)
    assert table.form is Form.ZSTD
    check(table, layer, tar)
    if size == len(DATA) and form != "one frame":
        assert table.count > 1


@pytest.mark.parametrize("size", [3 << 20, 5000, 0])
def test_a_plain_tar_needs_no_points(size: int, tmp_path: Path) -> None:
    tar = gzips.text(100_000) * 32
    table = table_for(tmp_path / "layer", tar[:size], tar[:size])
    assert table.form is Form.PLAIN
    assert table.points == (FIRST,)
    check(table, tar[:size], tar[:size])


packers = st.sampled_from([*gzips.GZIP.values(), *gzips.ZSTD.values()][:-1])


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 1 << 32), size=st.integers(0, 250_000), zeros=st.integers(0, 200_000), pack=packers,
       spacing=st.sampled_from([1000, SPACING, 3 * SPACING]))  # fmt: skip
def test_there_and_back(seed: int, size: int, zeros: int, pack: gzips.Packer, spacing: int, tmp_path: Path) -> None:
    generator = random.Random(seed)
    tar = gzips.text(size // 2, seed) + bytes(zeros) + generator.randbytes(size // 4) + gzips.text(size // 2, seed)
    layer = pack(tar)
    assert b"".join(uncompressed(io.BytesIO(layer), max_size=1 << 30)) == tar
    check(table_for(tmp_path / "layer", layer, tar, spacing), layer, tar)


@pytest.mark.parametrize("form", ["one member", "a member a file", "members"])
def test_the_same_layer_gives_the_same_bytes(form: str, tmp_path: Path) -> None:
    layer = gzips.GZIP[form](DATA)
    tables = [table_for(tmp_path / name, layer, DATA) for name in ("one", "other")]
    assert encode(tables[0]) == encode(tables[1])


def test_points_with_a_dictionary_stand_as_far_apart_as_asked(tmp_path: Path) -> None:
    layer = gzips.deflated(gzips.text(2_000_000), flush=zlib.Z_SYNC_FLUSH, step=10_000)
    table = table_for(tmp_path / "layer", layer, gzips.text(2_000_000), 200_000)
    gaps = [two.offset - one.offset for one, two in zip(table.points, table.points[1:], strict=False)]
    assert len(gaps) >= 8
    assert all(200_000 <= gap <= 220_000 for gap in gaps)
    assert all(point.raw and point.window for point in table.points[1:])


def test_a_dictionary_has_only_what_something_refers_to(tmp_path: Path) -> None:
    front = gzips.text(90_000)
    tar = front + front[-3000:-2000] + random.Random(6).randbytes(100_000)
    layer = gzips.deflated(front, flush=zlib.Z_SYNC_FLUSH, step=90_000)[:-10]  # without the last block and the trailer
    stream = zlib.compressobj(9, zlib.DEFLATED, -15, zdict=front[-MAX_WINDOW:])
    layer += stream.compress(tar[90_000:]) + stream.flush() + struct.pack("<II", zlib.crc32(tar), len(tar))
    table = table_for(tmp_path / "layer", layer, tar, 90_000)
    check(table, layer, tar)
    window = window_of(next(point for point in table.points if point.offset == 90_000))
    assert 900 < len(window) - window.count(0) <= 1000
    assert len(window) == 3000


def test_points_without_a_dictionary_are_joined_up_to_their_spacing(tmp_path: Path) -> None:
    layer = gzips.members(DATA, 3000)
    table = table_for(tmp_path / "layer", layer, DATA, 10_000)
    assert {point.window for point in table.points} == {b""}
    gaps = [two.offset - one.offset for one, two in zip(table.points, table.points[1:], strict=False)]
    assert set(gaps) == {9000}


def test_frames_of_a_chunk_each_are_units_of_their_own(tmp_path: Path) -> None:
    layer = gzips.members(DATA, 16_384, gzips.zstd)
    table = table_for(tmp_path / "layer", layer, DATA, 16_384)
    assert [point.offset for point in table.points] == list(range(0, len(DATA), 16_384))


def test_a_layer_too_odd_for_the_library_has_its_first_point(tmp_path: Path) -> None:
    layer = gzips.with_header(DATA, 3 << 20)
    table = table_for(tmp_path / "layer", layer, DATA)
    assert table.points == (FIRST,)


def test_a_layer_of_too_many_members_has_its_first_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = gzips.members(DATA, 3000)
    monkeypatch.setattr(seek_build, "MAX_POINTS", 99)
    assert table_for(tmp_path / "layer", layer, DATA).points == (FIRST,)


def test_the_library_not_agreeing_with_the_index_leaves_the_first_point(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(indexed_gzip.IndexedGzipFile, "read", lambda _, size: b"", raising=False)
    assert table_for(tmp_path / "layer", gzips.member(DATA), DATA).points == (FIRST,)


@pytest.mark.parametrize("layer", [gzips.member(DATA), gzips.zstd(DATA), DATA], ids=["gzip", "zstd", "plain"])
def test_a_file_that_is_not_the_layer_is_refused(layer: bytes, tmp_path: Path) -> None:
    (tmp_path / "layer").write_bytes(layer[:-1])
    with pytest.raises(Malformed, match="bytes, its file"):
        build(tmp_path / "layer", index_of(layer, DATA))


@pytest.mark.parametrize("cut", [3, 8, 12, 1000])
def test_zstd_frames_that_break_off_are_malformed(cut: int, tmp_path: Path) -> None:
    layer = (gzips.zstd(DATA[:1000]) + gzips.zstd(DATA))[:cut] if cut < 1000 else gzips.zstd(DATA)[:cut]
    try:
        table = table_for(tmp_path / "layer", layer, DATA)
    except Malformed:
        return
    with pytest.raises(Malformed):
        unpacked(table, range(table.count), layer)
