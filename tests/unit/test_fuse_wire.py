"""The FUSE protocol's bytes, checked against the structures of linux/fuse.h written down a second time, as in C."""

from __future__ import annotations

import ctypes
import stat
import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import Malformed
from fuse import wire

U16, U32, I32, U64 = ctypes.c_uint16, ctypes.c_uint32, ctypes.c_int32, ctypes.c_uint64


def structure(*fields: tuple[str, Any]) -> type[ctypes.Structure]:
    return type("S", (ctypes.Structure,), {"_fields_": list(fields)})


def fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    return [(name, kind) for name in names.split()]


InHeader = structure(*fields(U32, "len opcode"), *fields(U64, "unique nodeid"), *fields(U32, "uid gid pid"),
                     *fields(U16, "total_extlen padding"))  # fmt: skip
OutHeader = structure(("len", U32), ("error", I32), ("unique", U64))
ReadIn = structure(*fields(U64, "fh offset"), *fields(U32, "size read_flags"), ("lock_owner", U64),
                   *fields(U32, "flags padding"))  # fmt: skip
OpenIn = structure(*fields(U32, "flags open_flags"))
InterruptIn = structure(("unique", U64))
InitIn = structure(*fields(U32, "major minor max_readahead flags flags2"), ("unused", U32 * 11))
Attr = structure(*fields(U64, "ino size blocks atime mtime ctime"),
                 *fields(U32, "atimensec mtimensec ctimensec mode nlink uid gid rdev blksize flags"))  # fmt: skip
EntryOut = structure(*fields(U64, "nodeid generation entry_valid attr_valid"),
                     *fields(U32, "entry_valid_nsec attr_valid_nsec"), ("attr", Attr))  # fmt: skip
AttrOut = structure(("attr_valid", U64), *fields(U32, "attr_valid_nsec dummy"), ("attr", Attr))
OpenOut = structure(("fh", U64), ("open_flags", U32), ("backing_id", I32))
StatfsOut = structure(*fields(U64, "blocks bfree bavail files ffree"), *fields(U32, "bsize namelen frsize padding"),
                      ("spare", U32 * 6))  # fmt: skip
InitOut = structure(*fields(U32, "major minor max_readahead flags"), *fields(U16, "max_background congestion"),
                    *fields(U32, "max_write time_gran"), *fields(U16, "max_pages map_alignment"),
                    *fields(U32, "flags2 max_stack_depth"), ("unused", U32 * 6))  # fmt: skip
Dirent = structure(*fields(U64, "ino off"), *fields(U32, "namelen type"))
InvalEntryOut = structure(("parent", U64), *fields(U32, "namelen flags"))

u32, u64 = st.integers(0, 2**32 - 1), st.integers(0, 2**64 - 1)
names = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=80)


def request(opcode: int, body: bytes, unique: int = 7, node: int = 1) -> bytes:
    return bytes(InHeader(40 + len(body), opcode, unique, node, 0, 0, 0, 0, 0)) + body


def offered(flags: int, *, minor: int = 45, readahead: int = 1 << 20) -> wire.Init:
    return wire.Init(7, minor, readahead, flags)


@pytest.mark.parametrize(
    "parse",
    [wire.parse_request, wire.parse_name, wire.parse_read, wire.parse_open, wire.parse_interrupt, wire.parse_init],
)
@given(data=st.binary(max_size=120))
def test_whatever_bytes_come_they_are_understood_or_malformed(parse: Callable[[bytes], Any], data: bytes) -> None:
    try:
        result = parse(data)
    except Malformed:
        return
    assert result is not None


@given(opcode=u32, unique=u64, node=u64, body=st.binary(max_size=100))
def test_a_request_gives_its_header_and_its_body(opcode: int, unique: int, node: int, body: bytes) -> None:
    parsed = wire.parse_request(request(opcode, body, unique, node))
    assert (parsed.opcode, parsed.unique, parsed.node, bytes(parsed.body)) == (opcode, unique, node, body)


@given(body=st.binary(max_size=60), change=st.integers(-100, 100).filter(bool))
def test_a_request_whose_length_is_a_lie_is_malformed(body: bytes, change: int) -> None:
    message = request(wire.READ, body)
    wrong = max(0, len(message) + change).to_bytes(4, "little") + message[4:]
    with pytest.raises(Malformed):
        wire.parse_request(wrong)


@given(unique=u64, node=u64, offset=u64, size=u32)
def test_a_read_is_understood_the_same_on_the_hot_path_and_off_it(
    unique: int, node: int, offset: int, size: int
) -> None:
    message = request(wire.READ, bytes(ReadIn(3, offset, size, 0, 0, 0, 0)), unique, node)
    assert len(message) == wire.READ_REQUEST_SIZE
    assert wire.READ_REQUEST.unpack(message.ljust(wire.READ_REQUEST.size)[: wire.READ_REQUEST.size]) == (
        wire.READ_REQUEST_SIZE, wire.READ, unique, node, offset, size,
    )  # fmt: skip
    assert wire.parse_read(wire.parse_request(message).body) == (offset, size)


@pytest.mark.parametrize("body", [b"", b"\0", b"name", b"a/b\0", b"a\0b\0", b"a\0\0"])
def test_a_lookup_of_something_that_is_no_name_is_malformed(body: bytes) -> None:
    with pytest.raises(Malformed):
        wire.parse_name(body)


@given(name=st.binary(min_size=1, max_size=255).filter(lambda raw: not set(raw) & {0, 0x2F}))
def test_a_name_of_any_bytes_survives(name: bytes) -> None:
    assert wire.parse_name(name + b"\0").encode("utf-8", "surrogateescape") == name


@given(flags=u32, unique=u64)
def test_open_and_interrupt_are_understood(flags: int, unique: int) -> None:
    assert wire.parse_open(bytes(OpenIn(flags, 0))) == flags
    assert wire.parse_interrupt(bytes(InterruptIn(unique))) == unique


@given(minor=u32, readahead=u32, flags=u32, flags2=u32)
def test_the_flags_of_init_are_64_bits_only_if_the_kernel_says_so(
    minor: int, readahead: int, flags: int, flags2: int
) -> None:
    body = bytes(InitIn(7, minor, readahead, flags, flags2))
    extended = flags | flags2 << 32 if flags & wire.INIT_EXT else flags
    assert wire.parse_init(body) == (7, minor, readahead, extended)
    assert wire.parse_init(body[:16]) == (7, minor, readahead, flags), "before 7.36 there was no more"


def test_init_agrees_only_to_flags_that_the_kernel_offers() -> None:
    wanted = wire.ASYNC_DIO | wire.HAS_RESEND | wire.MAX_PAGES
    raw = wire.init_reply(
        offered(wire.ASYNC_DIO | wire.HAS_RESEND | 1 << 5), flags=wanted, max_readahead=1 << 17, max_read=1 << 20,
        background=4096,
    )  # fmt: skip
    assert len(raw) == ctypes.sizeof(InitOut) == 64
    reply = InitOut.from_buffer_copy(raw)
    assert (reply.major, reply.minor, reply.max_readahead) == (7, wire.MINOR, 1 << 17)
    assert reply.flags | reply.flags2 << 32 == wire.ASYNC_DIO | wire.HAS_RESEND
    assert (reply.max_pages, reply.max_background, reply.congestion) == (256, 4096, 4096)
    assert (reply.max_write, reply.time_gran, reply.map_alignment, reply.max_stack_depth) == (4096, 1, 0, 0)
    assert list(reply.unused) == [0] * 6


def test_init_never_claims_a_newer_version_than_the_kernels() -> None:
    raw = wire.init_reply(offered(0, minor=36), flags=0, max_readahead=0, max_read=4096, background=1)
    assert InitOut.from_buffer_copy(raw).minor == 36
    assert InitOut.from_buffer_copy(wire.major_reply()).major == 7


@given(unique=u64, payload=st.binary(max_size=100), errno=st.integers(1, 133))
def test_replies_begin_with_their_length_and_carry_the_error_as_a_negative_number(
    unique: int, payload: bytes, errno: int
) -> None:
    raw = wire.reply(unique, payload)
    head = OutHeader.from_buffer_copy(raw)
    assert (head.len, head.error, head.unique, raw[16:]) == (len(raw), 0, unique, payload)
    head = OutHeader.from_buffer_copy(wire.error_reply(unique, errno))
    assert (head.len, head.error, head.unique) == (16, -errno, unique)


@given(node=u64, size=st.integers(0, 2**62), directory=st.booleans(), valid=u32)
def test_attributes_are_where_the_kernel_looks_for_them(node: int, size: int, directory: bool, valid: int) -> None:
    attr = wire.Attr(node, size, directory)
    entry = EntryOut.from_buffer_copy(wire.entry(attr, valid))
    got = AttrOut.from_buffer_copy(wire.attributes(attr, valid))
    assert len(wire.entry(attr, valid)) == ctypes.sizeof(EntryOut) == 128
    assert len(wire.attributes(attr, valid)) == ctypes.sizeof(AttrOut) == 104
    assert (entry.nodeid, entry.entry_valid, entry.attr_valid, got.attr_valid) == (node, valid, valid, valid)
    for found in (entry.attr, got.attr):
        assert (found.ino, found.size, found.blocks) == (node, size, -(-size // 512))
        assert found.mode == (stat.S_IFDIR | 0o500 if directory else stat.S_IFREG | 0o400)
        assert (found.nlink, found.uid, found.gid, found.mtime) == (2 if directory else 1, 0, 0, 0)


def test_open_and_statfs_are_where_the_kernel_looks_for_them() -> None:
    opened = OpenOut.from_buffer_copy(wire.opened(wire.FOPEN_DIRECT_IO))
    assert (opened.fh, opened.open_flags, opened.backing_id) == (0, 1, 0)
    raw = wire.statfs(3, 10_000)
    assert len(raw) == ctypes.sizeof(StatfsOut) == 80
    found = StatfsOut.from_buffer_copy(raw)
    assert (found.blocks, found.bfree, found.files, found.bsize, found.frsize, found.namelen) == (
        3, 0, 3, 4096, 4096, 255,
    )  # fmt: skip


def listed(raw: bytes) -> list[tuple[int, int, str, bool]]:
    """Return the entries in a READDIR's answer, read as the kernel does."""
    found, at = [], 0
    while at < len(raw):
        head = Dirent.from_buffer_copy(raw, at)
        name = raw[at + 24 : at + 24 + head.namelen].decode()
        found.append((head.off, head.ino, name, head.type == stat.S_IFDIR >> 12))
        assert head.type in (stat.S_IFDIR >> 12, stat.S_IFREG >> 12)
        at += 24 + (head.namelen + 7 & ~7)
    assert at == len(raw)
    return found


@given(entries=st.lists(st.tuples(u64, names, st.booleans()), max_size=20), size=st.integers(400, 3000))
def test_a_directory_read_in_pieces_has_every_entry_once(entries: list[tuple[int, str, bool]], size: int) -> None:
    everything = [(cookie, node, name, kind) for cookie, (node, name, kind) in enumerate(entries, 1)]
    found: list[tuple[int, int, str, bool]] = []
    while True:
        after = found[-1][0] if found else 0
        raw = wire.directory((entry for entry in everything if entry[0] > after), size)
        assert len(raw) <= size
        if not raw:
            break
        found += listed(raw)
    assert found == everything


@given(name=names)
def test_the_notification_that_a_name_is_gone_is_one_the_kernel_takes(name: str) -> None:
    raw = wire.invalidate_entry(wire.ROOT, name)
    head = OutHeader.from_buffer_copy(raw)
    body = InvalEntryOut.from_buffer_copy(raw, 16)
    assert (head.len, head.error, head.unique) == (len(raw), 3, 0)
    assert (body.parent, body.namelen, body.flags) == (1, len(name.encode()), 0)
    assert raw[32:] == name.encode() + b"\0"


def test_the_constants_are_those_of_the_header() -> None:
    assert struct.calcsize("P") == 8, "these tables are those of 64-bit machines"
    assert (wire.READ, wire.INTERRUPT, wire.READDIR, wire.BATCH_FORGET) == (15, 36, 28, 42)
