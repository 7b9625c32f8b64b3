"""The layer index's bytes: there and back, and nothing but our errors for any others."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import Malformed, TooLarge, Unsupported
from dadi.index.chunks import ChunkTable
from dadi.index.layer import (
    MAGIC,
    MAX_ENTRIES,
    MAX_METADATA,
    VERSION,
    DecodeRoom,
    Entry,
    Extent,
    Kind,
    LayerIndex,
    decode,
    encode,
)
from dadi.index.tar import TarLimits
from tests.contracts import formats
from tests.fakes import tars

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


@given(formats.strange(MAGIC))
def test_any_bytes_give_an_index_or_an_error_of_ours(data: bytes) -> None:
    formats.taken_or_refused(data, decode, encode)


@settings(max_examples=300)
@given(formats.damaged(SAMPLE))
def test_a_damaged_index_gives_an_index_or_an_error_of_ours(data: bytes) -> None:
    formats.taken_or_refused(data, decode, encode)


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


# ---- what it may cost


def of_wire(count: int, entry: bytes) -> bytes:
    """An index of that many times the same encoded entry; few bytes, once they are packed."""
    empty = encode(index_of())
    assert empty.endswith(b"\x90")
    return empty[:-1] + b"\xdd" + count.to_bytes(4, "big") + entry * count


SMALLEST = msgspec.msgpack.encode([b"a", int(Kind.DIRECTORY)])
XATTRS = msgspec.msgpack.encode(Entry(b"a", Kind.DIRECTORY, xattrs=((b"ab", b"cd"),) * 1000))
EXTENTS = msgspec.msgpack.encode(Entry(b"a", Kind.FILE, size=9, extents=(Extent(0, 0, 0),) * 1000))
NAME = msgspec.msgpack.encode(Entry(b"n" * 100_000, Kind.DIRECTORY))


def test_the_limits_are_those_of_the_tar_parser() -> None:
    assert TarLimits() == TarLimits(max_entries=MAX_ENTRIES, max_metadata_size=MAX_METADATA)
    assert (DecodeRoom().entries, DecodeRoom().metadata) == (MAX_ENTRIES, MAX_METADATA)


@pytest.mark.parametrize(
    ("count", "entry", "room"),
    [
        (MAX_ENTRIES + 1, SMALLEST, DecodeRoom()),
        (4 * MAX_ENTRIES, SMALLEST, DecodeRoom()),
        (100_000, SMALLEST, DecodeRoom(99_999)),
        (400, XATTRS, DecodeRoom(metadata=8 << 20)),
        (1000, EXTENTS, DecodeRoom(metadata=8 << 20)),
        (100, NAME, DecodeRoom(metadata=8 << 20)),
        (1, msgspec.msgpack.encode(Entry(b"a", Kind.FILE, size=9, extents=(Extent(0, 0, 0),) * 2_200_000)),
         DecodeRoom()),
        (1, msgspec.msgpack.encode(Entry(b"a", Kind.FIFO, xattrs=((b"ab", b"cd"),) * 1_200_000)), DecodeRoom()),
    ],
    ids=["entries", "many entries", "entries left", "xattrs", "extents", "names", "one's extents", "one's xattrs"],
)
def test_an_index_above_its_room_is_refused_before_its_memory_is_taken(
    count: int, entry: bytes, room: DecodeRoom
) -> None:
    data = of_wire(count, entry)
    tracemalloc.start()
    try:
        with pytest.raises(TooLarge):
            decode(data, room)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 << 20


@pytest.mark.parametrize(
    ("entry", "cost"),
    [(XATTRS, 68_001), (EXTENTS, 128_001), (NAME, 100_000), (SMALLEST, 210)],
    ids=["xattrs", "extents", "name", "smallest"],
)
def test_what_fits_costs_memory_in_proportion_to_the_room(entry: bytes, cost: int) -> None:
    room = DecodeRoom(40_000, 8 << 20)
    data = of_wire((8 << 20) // cost, entry)
    tracemalloc.start()
    try:
        index = decode(data, room)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(index.entries) > 60
    assert peak < 3 * (8 << 20)


def test_layers_share_a_room_and_a_refusal_says_what_is_left() -> None:
    room = DecodeRoom(5, 100)
    decode(encode(index_of(Entry(b"a" * 30, Kind.DIRECTORY), Entry(b"b" * 30, Kind.DIRECTORY))), room)
    assert (room.entries, room.metadata) == (3, 40)
    with pytest.raises(TooLarge, match="above 40 bytes"):
        decode(encode(index_of(Entry(b"c" * 41, Kind.DIRECTORY))), room)
    with pytest.raises(TooLarge, match="4 entries, where 3"):
        decode(encode(index_of(*[Entry(b"d", Kind.DIRECTORY)] * 4)), room)


MEMBERS = {
    "names": tars.member(b"n" * 90) + tars.member(b"l", type=b"2", link=b"t" * 70),
    "xattrs": tars.pax((b"SCHILY.xattr.user.a", b"v" * 50), (b"SCHILY.xattr.user.b", b"")) + tars.member(b"f"),
    "extents": tars.sparse_01([(0, 512), (1024, 512), (4096, 512)], 8192),
}


@pytest.mark.parametrize("kind", MEMBERS)
def test_whatever_the_tar_parser_takes_is_taken_and_no_more(kind: str) -> None:
    """The two count alike, byte for byte."""
    tar = MEMBERS[kind] + tars.END
    taken = fewest(lambda size: tars.parse(tar, limits=TarLimits(max_metadata_size=size)))
    data = encode(index_of(*tars.parse(tar)))
    assert fewest(lambda size: decode(data, DecodeRoom(metadata=size))) == taken > 50


def fewest(read: Callable[[int], object]) -> int:
    """Return the least size with which nothing is too large."""
    for size in range(2000):
        try:
            read(size)
        except TooLarge:
            continue
        return size
    raise AssertionError
