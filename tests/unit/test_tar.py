"""What the tar parser makes of well-formed members: headers, extended headers, names, and the end."""

from __future__ import annotations

import base64

import pytest

from dadi.errors import Malformed
from dadi.index.layer import Entry, Kind
from dadi.index.tar import TarParser
from tests.fakes.tars import END, GNU, POSIX, base256, header, member, octal, one, parse, pax, sparse_10

# ---- headers


def test_a_file_has_all_attributes_and_the_place_of_its_data() -> None:
    assert one(member(b"usr/bin/true", b"x" * 700)) == Entry(
        b"usr/bin/true", Kind.FILE, 0o644, 1, 2, 3_000_000_000, 700, 512
    )


def test_offsets_are_absolute_and_data_that_looks_like_a_header_is_not_read() -> None:
    first, second = parse(member(b"a", member(b"evil")) + member(b"b", b"12") + END)
    assert (first.offset, first.size) == (512, 512)
    assert (second.path, second.offset, second.size) == (b"b", 1536, 2)


@pytest.mark.parametrize(
    ("type", "kind"),
    [(b"0", Kind.FILE), (b"\0", Kind.FILE), (b"7", Kind.FILE), (b"2", Kind.SYMLINK), (b"1", Kind.HARDLINK),
     (b"3", Kind.CHARACTER), (b"4", Kind.BLOCK), (b"5", Kind.DIRECTORY), (b"6", Kind.FIFO)],
)  # fmt: skip
def test_every_type_is_recognised(type: bytes, kind: Kind) -> None:
    entry = one(header(b"dir/name", type, link=b"to", fields={329: octal(8, 8), 337: octal(259, 8)}))
    assert (entry.path, entry.kind) == (b"dir/name", kind)
    assert entry.target == (b"to" if kind in (Kind.SYMLINK, Kind.HARDLINK) else b"")
    assert (entry.major, entry.minor) == ((8, 259) if kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0))


def test_only_the_oldest_type_of_file_becomes_a_directory_by_a_final_slash() -> None:
    assert one(header(b"d/", b"\0")).kind is Kind.DIRECTORY
    assert one(header(b"d/", b"0")).kind is Kind.FILE
    assert one(header(b"d/", b"5")).path == b"d"


@pytest.mark.parametrize("type", [b"1", b"2", b"3", b"4", b"5", b"6"])
def test_what_has_no_data_takes_no_room_whatever_size_it_claims(type: bytes) -> None:
    first, second = parse(header(b"a", type, 5000, link=b"t") + member(b"b") + END)
    assert first.size == (1 if type == b"2" else 0)
    assert first.offset == 0
    assert second.path == b"b"


def test_a_symlinks_size_is_that_of_its_target_and_the_target_stays_as_it_is() -> None:
    entry = one(header(b"l", b"2", link=b"/..//x/./"))
    assert (entry.target, entry.size) == (b"/..//x/./", 9)


def test_a_hard_links_target_is_normalised_like_a_name() -> None:
    assert one(header(b"l", b"1", link=b"./usr//bin/true")).target == b"usr/bin/true"


@pytest.mark.parametrize(
    ("magic", "fields", "name"),
    [
        (POSIX, {345: b"some/prefix"}, b"some/prefix/f"),
        (POSIX, {345: b"p" * 155}, b"p" * 155 + b"/f"),
        (POSIX, {345: b"p" * 131 + b"00000000001", 508: b"tar\0"}, b"p" * 131 + b"/f"),
        (GNU, {345: octal(1, 12), 357: octal(2, 12)}, b"f"),
        (GNU, {345: b"go/before/1.8"}, b"go/before/1.8/f"),
        (b"", {345: b"not a prefix in v7"}, b"f"),
    ],
)
def test_the_prefix_belongs_to_the_name_where_the_format_has_one(
    magic: bytes, fields: dict[int, bytes], name: bytes
) -> None:
    assert one(header(magic=magic, fields=fields)).path == name


def test_names_that_fill_their_field_have_no_nul() -> None:
    entry = one(header(b"n" * 100, b"2", link=b"t" * 100))
    assert (entry.path, entry.target) == (b"n" * 100, b"t" * 100)


def test_names_are_bytes() -> None:
    assert one(member(b"\xff\xfe/\xe9")).path == b"\xff\xfe/\xe9"


@pytest.mark.parametrize(
    ("field", "uid"),
    [(b"0000017\0", 15), (b"     17 ", 15), (b"17\0\0\0\0\0\0", 15), (b"0000017 ", 15), (b"\0\0\0\0\0\0\0\0", 0),
     (b"        ", 0), (b"\0 17\0\0\0\0", 15), (b"17\0junk!", 15), (base256(4_000_000_000, 8), 4_000_000_000)],
)  # fmt: skip
def test_numbers_come_in_many_dresses(field: bytes, uid: int) -> None:
    assert one(header(fields={108: field})).uid == uid


def test_only_the_permission_bits_of_the_mode_are_kept() -> None:
    assert one(header(fields={100: b"0104755\0"})).mode == 0o4755


@pytest.mark.parametrize("seconds", [-1, -86400 * 365 * 30, 2**34])
def test_times_before_1970_and_far_ahead_in_base_256(seconds: int) -> None:
    nanoseconds = min(seconds * 10**9, 2**63 - 1)
    assert one(header(fields={136: base256(seconds, 12)})).mtime == nanoseconds


def test_a_checksum_of_signed_bytes_is_accepted_too() -> None:
    block = bytearray(header(b"\xff" * 50))
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(memoryview(bytes(block)).cast("b"))
    assert one(bytes(block)).path == b"\xff" * 50


def test_files_above_8_gib_are_skipped_by_arithmetic() -> None:
    size = (9 << 30) + 1
    parser = TarParser()
    parser.feed(header(b"big", fields={124: base256(size, 12)}))
    piece = bytes(64 << 20)
    for _ in range(9 * 16):
        parser.feed(piece)
    parser.feed(bytes(512) + member(b"behind", b"x") + END)
    big, behind = parser.finish()
    assert big.size == size
    assert behind.offset == 512 + (9 << 30) + 512 + 512


# ---- paths and whiteouts


@pytest.mark.parametrize(
    ("name", "path"),
    [(b"./a", b"a"), (b"/a", b"a"), (b"//a//b/", b"a/b"), (b"./.", b""), (b"./", b""), (b"/", b""), (b".", b""),
     (b"a/./b", b"a/b"), (b"././/./a", b"a"), (b".a/..b/...", b".a/..b/..."), (b".//a", b"a"), (b"a/.", b"a")],
)  # fmt: skip
def test_paths_are_normalised(name: bytes, path: bytes) -> None:
    assert one(header(name, b"5")).path == path


@pytest.mark.parametrize(
    ("name", "kind", "path"),
    [
        (b"a/.wh.b", Kind.WHITEOUT, b"a/b"),
        (b".wh.b", Kind.WHITEOUT, b"b"),
        (b"./.wh..b", Kind.WHITEOUT, b".b"),
        (b".wh..wh..opq", Kind.OPAQUE, b""),
        (b"a/b/.wh..wh..opq", Kind.OPAQUE, b"a/b"),
        (b"a.wh.b", Kind.FILE, b"a.wh.b"),
        (b"a/.wh", Kind.FILE, b"a/.wh"),
    ],
)
def test_whiteouts_are_recognised_by_name(name: bytes, kind: Kind, path: bytes) -> None:
    entry = one(member(name, b"data"))
    assert (entry.path, entry.kind) == (path, kind)
    if kind is not Kind.FILE:
        assert entry == Entry(path, kind)


@pytest.mark.parametrize(
    "name", [b".wh..wh.plnk", b".wh..wh.aufs", b".wh..wh.orph/x", b".wh..wh.plnk/12.34", b"a/.wh..wh.x"]
)
def test_the_bookkeeping_of_aufs_is_ignored(name: bytes) -> None:
    (entry,) = parse(member(name, b"12345") + member(b"b") + END)
    assert (entry.path, entry.offset) == (b"b", 1536)


# ---- GNU and pax headers


def test_gnu_long_name_and_link() -> None:
    name, link = b"n" * 200 + b"/" + b"m" * 200, b"l" * 3000
    data = member(b"@LongLink", name + b"\0", b"L", magic=GNU) + member(b"@LongLink", link + b"\0", b"K", magic=GNU)
    entry = one(data + header(b"cut", b"2", link=b"cut", magic=GNU))
    assert (entry.path, entry.target, entry.size) == (name, link, 3000)


def test_a_gnu_long_name_wins_over_pax_and_both_over_the_header() -> None:
    assert one(pax((b"path", b"pax")) + member(b"x", b"gnu\0", b"L") + member(b"h")).path == b"gnu"
    assert one(pax((b"path", b"pax")) + member(b"h")).path == b"pax"


def test_extended_headers_hold_for_one_member_only() -> None:
    _, second = parse(pax((b"path", b"p"), (b"uid", b"77"), (b"SCHILY.xattr.user.a", b"1")) + member() + member() + END)
    assert second == Entry(b"f", Kind.FILE, 0o644, 1, 2, 3_000_000_000, 0, 2048)


def test_pax_attributes_replace_those_of_the_header() -> None:
    records = [(b"path", b"a\nb=c"), (b"uid", b"3000000000"), (b"gid", b"65536"), (b"mtime", b"1700000000.000000001")]
    entry = one(pax(*records) + member(b"h"))
    assert (entry.path, entry.uid, entry.gid) == (b"a\nb=c", 3_000_000_000, 65536)
    assert entry.mtime == 1_700_000_000_000_000_001


def test_pax_link_path_and_device_numbers() -> None:
    assert one(pax((b"linkpath", b"\xff" * 300)) + header(b"l", b"2", link=b"h")).target == b"\xff" * 300
    device = one(pax((b"SCHILY.devmajor", b"4095"), (b"SCHILY.devminor", b"1048575")) + header(b"d", b"4"))
    assert (device.major, device.minor) == (4095, 1048575)


def test_pax_size_replaces_that_of_the_header_for_skipping_too() -> None:
    first, second = parse(pax((b"size", b"1000")) + header(b"a", b"0", 0) + bytes(1024) + member(b"b") + END)
    assert (first.size, second.path) == (1000, b"b")


@pytest.mark.parametrize(
    ("value", "nanoseconds"),
    [(b"0", 0), (b"1.5", 1_500_000_000), (b"-1.5", -1_500_000_000), (b"1.", 10**9), (b"2.0000000019", 2_000_000_001),
     (b"9007199254.740993123", 9007199254_740993123), (b"99999999999999999999", 2**63 - 1), (b"-0.1", -100_000_000)],
)  # fmt: skip
def test_pax_times_are_exact(value: bytes, nanoseconds: int) -> None:
    assert one(pax((b"mtime", value)) + member()).mtime == nanoseconds


def test_an_empty_pax_value_leaves_the_headers() -> None:
    entry = one(pax((b"path", b""), (b"uid", b"")) + member())
    assert (entry.path, entry.uid) == (b"f", 1)


def test_global_records_hold_until_a_local_one_differs() -> None:
    data = pax((b"uid", b"7"), (b"mtime", b"8"), (b"comment", b"x"), type=b"g")
    data += member(b"a") + pax((b"uid", b"9")) + member(b"b") + pax((b"uid", b"")) + member(b"c") + END
    assert [(entry.path, entry.uid) for entry in parse(data)] == [(b"a", 7), (b"b", 9), (b"c", 1)]
    assert {entry.mtime for entry in parse(data)} == {8 * 10**9}


def test_xattrs_keep_any_bytes() -> None:
    capability = bytes.fromhex("0100000200040000000000000000000000000000")
    entry = one(pax((b"SCHILY.xattr.security.capability", capability), (b"SCHILY.xattr.user.=\n", b"=\n\0"),
                    (b"SCHILY.xattr.user.empty", b"")) + member())  # fmt: skip
    assert entry.xattrs == ((b"security.capability", capability), (b"user.", b"\n=" + b"=\n\0"), (b"user.empty", b""))


def test_libarchive_xattrs_are_decoded_and_the_plain_form_wins() -> None:
    value = base64.b64encode(b"\0\xff\xfe\xfd").rstrip(b"=")
    entry = one(pax((b"LIBARCHIVE.xattr.user.a%20b", value), (b"SCHILY.xattr.user.c", b"plain"),
                    (b"LIBARCHIVE.xattr.user.c", value)) + member())  # fmt: skip
    assert entry.xattrs == ((b"user.a b", b"\0\xff\xfe\xfd"), (b"user.c", b"plain"))


# ---- the end


def test_an_empty_tar_and_an_empty_file_are_empty_layers() -> None:
    assert parse(b"") == parse(END) == parse(bytes(10240)) == ()


@pytest.mark.parametrize("end", [b"", bytes(512), END, bytes(10240), END + b"padding, no tar", END + member(b"more")])
def test_endings_that_builders_write(end: bytes) -> None:
    assert [entry.path for entry in parse(member(b"a", b"x") + end)] == [b"a"]


def test_a_lone_block_of_zeros_inside_is_malformed() -> None:
    with pytest.raises(Malformed, match="block of zeros"):
        parse(member(b"a") + bytes(512) + member(b"b") + END)


@pytest.mark.parametrize(
    "data",
    [member(b"a", b"x" * 600), pax((b"path", b"p/" * 300)) + member(), member(b"L", b"n/" * 300, b"L") + member(),
     sparse_10([(1024 * i, 512) for i in range(100)], 1 << 20),
     header(b"s", b"S", 0, magic=GNU, fields={482: b"\1", 483: octal(0, 12)}) + bytes(512)],
)  # fmt: skip
def test_a_tar_that_breaks_off_inside_of_a_member_is_malformed(data: bytes) -> None:
    assert len(parse(data)) == 1
    for cut in [*range(1, len(data), 97), *range(512, len(data), 512), len(data.rstrip(b"\0")) - 1]:
        if data[:cut].rstrip(b"\0") == data.rstrip(b"\0"):
            continue  # nothing is missing but padding: see below
        with pytest.raises(Malformed, match="breaks off"):
            parse(data[:cut])


@pytest.mark.parametrize("left", [0, 1, 423, 424])
def test_the_zeros_behind_the_last_data_may_be_missing(left: int) -> None:
    data = member(b"first", b"y" * 100) + member(b"a", b"x" * 600)
    entries = parse(data[: len(data) - 424 + left])
    assert [(entry.path, entry.size) for entry in entries] == [(b"first", 100), (b"a", 600)]


def test_data_that_are_missing_are_no_padding() -> None:
    data = member(b"a", b"x" * 600)
    with pytest.raises(Malformed, match="breaks off at byte 1111"):
        parse(data[: len(data) - 425])
