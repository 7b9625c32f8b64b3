"""Layers packed as zstd, one frame a chunk: right, seekable at every frame, and always the same bytes."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import StoreFull
from dadi.index import seek
from dadi.index.chunks import DEFAULT_CHUNK_SIZE, table_of
from dadi.index.layer import VERSION, LayerIndex
from dadi.index.seek import COMPRESSED_CHUNK, Form, SeekTable
from dadi.publish.packed import PackedLayer, Packer

SIZES = [0, 1, DEFAULT_CHUNK_SIZE - 1, DEFAULT_CHUNK_SIZE, DEFAULT_CHUNK_SIZE + 1, 3 * DEFAULT_CHUNK_SIZE + 512]


def data_of(size: int, seed: int = 0) -> bytes:
    source = random.Random(seed)
    return b"".join(source.randbytes(256) + bytes(768) for _ in range(size // 1024 + 1))[:size]


def pack(path: Path, data: bytes, pieces: list[int], threads: int = 2) -> tuple[LayerIndex, SeekTable]:
    original = LayerIndex(VERSION, digests.of(b"gz"), 2, digests.of(data), table_of(data), ())
    with Packer(3, threads) as packer:
        layer = PackedLayer(packer, path)
        try:
            at = 0
            for size in [*pieces, len(data)]:
                layer.write(data[at : at + size])
                at += size
            return layer.finish(original)
        finally:
            layer.close()


@pytest.mark.parametrize("size", SIZES)
def test_any_zstd_unpacks_it_and_the_index_names_it(tmp_path: Path, size: int) -> None:
    data = data_of(size)
    index, table = pack(tmp_path / "layer", data, [1000])
    packed = (tmp_path / "layer").read_bytes()
    with zstandard.ZstdDecompressor().stream_reader(packed, read_across_frames=True) as reader:
        assert reader.read() == data
    assert (index.layer_digest, index.layer_size) == (digests.of(packed), len(packed))
    assert index.diff_id == digests.of(data)
    assert table.compressed == table_of(packed, COMPRESSED_CHUNK)
    assert seek.decode(seek.encode(table)) == table


def test_every_chunk_is_a_frame_with_its_size_and_without_a_checksum(tmp_path: Path) -> None:
    data = data_of(3 * DEFAULT_CHUNK_SIZE + 512)
    _, table = pack(tmp_path / "layer", data, [])
    packed = (tmp_path / "layer").read_bytes()
    assert table.form is Form.ZSTD
    assert [point.offset for point in table.points] == [n * DEFAULT_CHUNK_SIZE for n in range(4)]
    for number in range(table.count):
        units = range(number, number + 1)
        offset, length = table.compressed_extent(units)
        frame = packed[offset : offset + length]
        parameters = zstandard.get_frame_parameters(frame)
        begin, expected = table.extent(units)
        assert (parameters.content_size, parameters.has_checksum) == (expected, False)
        assert b"".join(seek.unpack(table, units, frame)) == data[begin : begin + expected]


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 5 * DEFAULT_CHUNK_SIZE), st.lists(st.integers(1, 2 * DEFAULT_CHUNK_SIZE), max_size=6),
    st.integers(1, 4),
)  # fmt: skip
def test_neither_pieces_nor_threads_change_a_byte(tmp_path: Path, size: int, pieces: list[int], threads: int) -> None:
    data = data_of(size, 1)
    assert pack(tmp_path / "a", data, pieces, threads) == pack(tmp_path / "b", data, [], 1)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    if not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    with pytest.raises(StoreFull, match="cannot be kept"):
        pack(Path("/dev/full"), random.Random(0).randbytes(1 << 20), [])
