"""The layer index's bytes: there and back, and nothing but our errors for any others."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import DadiError, Malformed, Unsupported
from dadi.index.chunks import ChunkTable
from dadi.index.layer import MAGIC, VERSION, Entry, Extent, Kind, LayerIndex, decode, encode

TABLE = ChunkTable(1 << 20, 4096, bytes(256 * 32))
DIGEST = digests.of(b"")


def index_of(*entries: Entry) -> LayerIndex:
    return LayerIndex(VERSION, DIGEST, 7, DIGEST, TABLE, entries)


names = st.binary(max_size=300)
small = st.integers(0, 1 << 19)
extents = st.builds(Extent, st.integers(0, 1 << 18), small, st.integers(0, 1 << 18))
entries = st.builds(
    Entry,
    path=names, kind=st.sampled_from(Kind), mode=st.integers(0, 0o7777), uid=st.integers(0, (1 << 32) - 1),
    gid=st.integers(0, (1 << 32) - 1), mtime=st.integers(-(1 << 63), (1 << 63) - 1), size=st.just(1 << 19),
    offset=small, target=names, major=st.integers(0, 4095), minor=st.integers(0, (1 << 20) - 1),
    xattrs=st.lists(st.tuples(names, names), max_size=3).map(tuple),
    extents=st.none() | st.lists(extents, max_size=3).map(tuple),
)  # fmt: skip


@given(st.lists(entries, max_size=5))
def test_there_and_back(found: list[Entry]) -> None:
    index = index_of(*found)
    data = encode(index)
    assert decode(data) == index
    assert encode(decode(data)) == data
    assert data.startswith(MAGIC)


SAMPLE = encode(
    index_of(
        Entry(b"\xff", Kind.FILE, 0o644, 1, 2, -1, 512, 512, xattrs=((b"user.a", b"\0"),)),
        Entry(b"s", Kind.FILE, size=1 << 30, extents=(Extent(512, 1024, 512),)),
        Entry(b"l", Kind.SYMLINK, target=b"\xff", size=1),
        Entry(b"gone", Kind.WHITEOUT),
    )
)


def _only_dadi_errors(data: bytes) -> None:
    try:
        index = decode(data)
    except DadiError as error:
        assert str(error)  # noqa: PT017 (nothing else may be raised)
    else:
        assert decode(encode(index)) == index


@given(st.binary(max_size=200), st.booleans())
def test_any_bytes_give_an_index_or_an_error_of_ours(data: bytes, with_magic: bool) -> None:
    _only_dadi_errors((MAGIC if with_magic else b"") + data)


@settings(deadline=None, max_examples=300)
@given(st.lists(st.tuples(st.integers(8, len(SAMPLE) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_a_damaged_index_gives_an_index_or_an_error_of_ours(damage: list[tuple[int, int]]) -> None:
    data = bytearray(SAMPLE)
    for at, value in damage:
        data[at] = value
    _only_dadi_errors(bytes(data))


def test_a_cut_index_is_malformed_wherever_the_cut_is() -> None:
    for cut in range(len(SAMPLE)):
        with pytest.raises(Malformed):
            decode(SAMPLE[:cut])


def test_bytes_behind_the_index_are_malformed() -> None:
    with pytest.raises(Malformed):
        decode(SAMPLE + b"\0")


def test_nesting_without_end_is_malformed() -> None:
    with pytest.raises(Malformed):
        decode(MAGIC + b"\x91" * 1_000_000)


def test_another_version_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="version 2"):
        decode(encode(msgspec.structs.replace(index_of(), version=2)))


@pytest.mark.parametrize(
    "entry",
    [
        Entry(b"f", Kind.FILE, size=-1),
        Entry(b"f", Kind.FILE, offset=-512),
        Entry(b"f", Kind.FILE, size=1 << 20, offset=512),
        Entry(b"f", Kind.FILE, size=1, offset=1 << 20),
        Entry(b"f", Kind.FILE, size=1 << 62, offset=0),
        Entry(b"f", Kind.FILE, size=512, extents=(Extent(0, 0, 513),)),
        Entry(b"f", Kind.FILE, size=512, extents=(Extent(512, 0, 1),)),
        Entry(b"f", Kind.FILE, size=512, extents=(Extent(0, 0, -1),)),
        Entry(b"f", Kind.FILE, size=512, extents=(Extent(-512, 0, 512),)),
        Entry(b"f", Kind.FILE, size=512, extents=(Extent(0, -512, 512),)),
        Entry(b"f", Kind.FILE, size=1 << 30, extents=(Extent(0, (1 << 20) - 512, 513),)),
    ],
)
def test_data_outside_of_the_layer_is_malformed(entry: Entry) -> None:
    with pytest.raises(Malformed, match="b'f'"):
        decode(encode(index_of(entry)))


def test_a_table_that_does_not_fit_is_malformed() -> None:
    with pytest.raises(Malformed):
        decode(encode(LayerIndex(VERSION, DIGEST, 7, DIGEST, ChunkTable(1, 4096, b""), ())))


def test_it_says_what_it_is() -> None:
    assert repr(index_of()) == f"LayerIndex({DIGEST[7:19]}, 1048576 bytes, 0 entries)"
