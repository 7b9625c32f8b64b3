"""Sparse tar members in all four formats."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from dadi.errors import Malformed, TooLarge, Unsupported
from dadi.index.layer import Extent
from dadi.index.tar import TarLimits
from tests.fakes.tars import (
    END,
    GNU,
    POSIX,
    base256,
    header,
    member,
    octal,
    one,
    parse,
    pax,
    sparse_00,
    sparse_01,
    sparse_10,
)


def test_old_gnu_sparse_with_extension_blocks() -> None:
    # 30 pieces of one block, each 4 KiB after the one before; 4 stand in the header, 21 and 5 in two more blocks.
    pairs = [octal(4096 * i, 12) + octal(512, 12) for i in range(30)] + [octal(200_000, 12) + octal(0, 12)]
    fields = {386: b"".join(pairs[:4]), 482: b"\1", 483: octal(200_000, 12)}
    head = header(b"s", b"S", 30 * 512, magic=GNU, fields=fields)
    more = b"".join(pairs[4:25]) + b"\1" + bytes(7)
    last = b"".join(pairs[25:]).ljust(504, b"\0") + bytes(8)
    sparse, behind = parse(head + more + last + bytes(30 * 512) + member(b"b") + END)
    assert sparse.size == 200_000
    assert sparse.extents == tuple(Extent(4096 * i, 1536 + 512 * i, 512) for i in range(30))
    assert behind.path == b"b"


Sparse = Callable[[list[tuple[int, int]], int], bytes]
SPARSE = [sparse_00, sparse_01, sparse_10]


@pytest.mark.parametrize("sparse", SPARSE)
def test_pax_sparse(sparse: Sparse) -> None:
    pairs = [(512, 1024), (4096, 512), (8192, 300), (8492, 0)]
    first, behind = parse(sparse(pairs, 8492) + member(b"b") + END)
    data = 1536 + (512 if sparse is sparse_10 else 0)
    assert (first.path, first.size, first.offset) == (b"s", 8492, 0)
    assert first.extents == (Extent(512, data, 1024), Extent(4096, data + 1024, 512), Extent(8192, data + 1536, 300))
    assert behind.path == b"b"


def test_a_pax_map_over_many_blocks() -> None:
    pairs = [(1024 * i, 512) for i in range(1000)]
    first, behind = parse(sparse_10(pairs, 1024_000) + member(b"b") + END, step=100)
    assert first.extents is not None
    assert [(e.file_offset, e.length) for e in first.extents] == pairs
    assert behind.path == b"b"


@pytest.mark.parametrize("sparse", SPARSE)
def test_a_sparse_file_that_is_one_hole_has_no_extents(sparse: Sparse) -> None:
    entry = one(sparse([(1 << 40, 0)], 1 << 40))
    assert (entry.size, entry.extents) == (1 << 40, ())


@pytest.mark.parametrize("sparse", SPARSE)
def test_a_sparse_file_without_holes_is_a_plain_one(sparse: Sparse) -> None:
    entry = one(sparse([(0, 512), (512, 600)], 1112))
    assert (entry.size, entry.extents) == (1112, None)
    assert entry.offset == (2048 if sparse is sparse_10 else 1536)


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize(
    ("pairs", "size"),
    [([(100, 512)], 4096), ([(0, 700), (1024, 512)], 4096), ([(0, 700)], 4096), ([(0, 512), (1023, 1)], 1024)],
)
def test_pieces_that_are_not_whole_blocks_are_unsupported(
    sparse: Sparse, pairs: list[tuple[int, int]], size: int
) -> None:
    with pytest.raises(Unsupported, match="ordinary"):
        parse(sparse(pairs, size) + END)


@pytest.mark.parametrize("sparse", SPARSE)
@pytest.mark.parametrize(
    ("pairs", "size"),
    [([(0, 1024), (512, 512)], 4096), ([(1024, 512), (0, 512)], 4096), ([(0, 1024)], 512), ([(512, 512)], 0)],
)
def test_maps_that_contradict_themselves_are_malformed(sparse: Sparse, pairs: list[tuple[int, int]], size: int) -> None:
    with pytest.raises(Malformed, match="sparse map"):
        parse(sparse(pairs, size) + END)


V1 = pax((b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"1"))


def old_sparse(pair: bytes, stored: int) -> bytes:
    return header(b"s", b"S", stored, magic=GNU, fields={386: pair, 483: octal(4096, 12)}) + bytes(stored)


@pytest.mark.parametrize(
    "data",
    [
        pax((b"GNU.sparse.size", b"4096"), (b"GNU.sparse.map", b"0,512,1024")) + member(b"s", bytes(512)),
        pax((b"GNU.sparse.size", b"4096"), (b"GNU.sparse.map", b"0,512")) + member(b"s", bytes(1024)),
        pax((b"GNU.sparse.size", b"4096"), (b"GNU.sparse.map", b"0,-512")) + member(b"s"),
        pax((b"GNU.sparse.map", b"0,512")) + member(b"s", bytes(512)),
        pax((b"GNU.sparse.numbytes", b"512"), (b"GNU.sparse.offset", b"0")) + member(b"s", bytes(512)),
        sparse_10([(0, 512)], 4096, count=1 << 61),
        sparse_10([(0, 512)], 4096, count=1000),
        V1 + member(b"s", b"x" * 512),
        V1 + member(b"s"),
        old_sparse(octal(0, 12) + b"rubbish-----", 512),
        old_sparse(base256(-512, 12) + octal(512, 12), 512),
        old_sparse(octal(0, 12) + base256(-512, 12), 0),
    ],
)  # fmt: skip
def test_broken_sparse_maps_are_malformed(data: bytes) -> None:
    with pytest.raises(Malformed, match=r"sparse|not a number"):
        parse(data + END)


def test_sparse_maps_have_a_limit() -> None:
    limits = TarLimits(max_header_size=4096)
    endless = header(b"s", b"S", 512, magic=GNU, fields={482: b"\1"}) + 20 * (bytes(504) + b"\1" + bytes(7))
    for data in (endless, sparse_10([(1024 * i, 512) for i in range(1000)], 1 << 20)):
        with pytest.raises(TooLarge, match="sparse map"):
            parse(data, limits=limits)


@pytest.mark.parametrize(
    "data",
    [
        pax((b"GNU.sparse.major", b"2"), (b"GNU.sparse.minor", b"0")) + member(),
        header(b"s", b"S", magic=POSIX),
        *(member(b"m", b"data", type) for type in (b"D", b"M", b"N", b"V", b"A", b"8", b"Z")),
    ],
)
def test_what_dadi_does_not_handle_is_unsupported(data: bytes) -> None:
    with pytest.raises(Unsupported, match=r"tar member b'[fsm]' at byte"):
        parse(data + END)
