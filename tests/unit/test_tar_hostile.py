"""Whatever the bytes, the tar parser gives entries or an error of ours; and the same ones in pieces of any size."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi.errors import DadiError, Malformed, TooLarge
from dadi.index.tar import TarLimits, TarParser
from tests.fakes.tars import (
    END,
    GNU,
    base256,
    header,
    member,
    octal,
    padded,
    parse,
    pax,
    sparse_00,
    sparse_01,
    sparse_10,
)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (header(b"../etc/passwd"), r"'\.\./etc/passwd' at byte 0: its name has a \"\.\.\""),
        (header(b"a/../b"), "component"),
        (header(b"a/.."), "component"),
        (header(b"/.."), "component"),
        (pax((b"path", b"..")) + member(), "component"),
        (header(b"l", b"1", link=b"../x"), "link target has"),
        (header(b"l", b"1", link=b""), "link target is empty"),
        (header(b"l", b"2", link=b""), "link target is b''"),
        (pax((b"linkpath", b"a\0b")) + header(b"l", b"2"), "link target"),
        (pax((b"linkpath", b"x" * 4096)) + header(b"l", b"2"), "4096 bytes"),
        (pax((b"path", b"a\0b")) + member(), "NUL"),
        (member(b"x", b"a\0b\0", b"L") + member(), "NUL"),
        (header(b""), "empty"),
        (header(b"./"), "root directory"),
        (header(b"n", checksum=b"0000000\0"), "checksum"),
        (header(b"n", fields={148: b"rubbish!"}, checksum=b"rubbish!"), "not a number"),
        (header(fields={124: b"0000000008\0\0"}), "not a number"),
        (header(fields={124: b"-0000000001\0"}), "not a number"),
        (header(fields={124: b"0_0000000_1\0"}), "not a number"),
        (header(fields={124: b"0o000000001\0"}), "not a number"),
        (header(fields={124: base256(-1, 12)}), "size is -1"),
        (header(fields={124: base256((1 << 62) + 1, 12)}), "its size"),
        (header(fields={124: b"\xff" * 12}), "size is -1"),
        (header(fields={108: base256(-1, 8)}), "owner"),
        (header(fields={108: base256((1 << 32) - 1, 8)}), "owner"),
        (header(b"d", b"3", fields={329: octal(4096, 8)}), "device 4096:0"),
        (header(b"d", b"4", fields={337: octal(1 << 20, 8)}), "device"),
        (pax((b"size", b"-1")) + member(), "size"),
        (pax((b"size", b"%d" % (1 << 63))) + member(), "size"),
        (pax((b"size", b"9" * 5000)) + member(), "size"),
        (pax((b"uid", b"0x10")) + member(), "uid"),
        (pax((b"mtime", b"yesterday")) + member(), "time"),
        (pax((b"mtime", b"1e9")) + member(), "time"),
        (pax((b"SCHILY.xattr.", b"v")) + member(), "attribute"),
        (pax((b"SCHILY.xattr.a\0b", b"v")) + member(), "attribute"),
        (pax((b"SCHILY.xattr." + b"n" * 256, b"v")) + member(), "attribute"),
        (pax((b"LIBARCHIVE.xattr.user.a", b"!!!!")) + member(), "base64"),
        (pax((b"LIBARCHIVE.xattr.user.a", b"A")) + member(), "base64"),
        (member(b"p", b"11 path=abc", b"x"), "pax header"),
        (member(b"p", b"9999 path=abc\n", b"x"), "pax header"),
        (member(b"p", b"5 path=abc\n", b"x"), "pax header"),
        (member(b"p", b"path=abc\n", b"x"), "pax header"),
        (member(b"p", b"-3 a=b\n", b"x"), "pax header"),
        (member(b"p", b"99999999999999999999999 a=b\n", b"x"), "pax header"),
        (member(b"p", b"8 a=b\n\0\0", b"x"), "pax header"),
        (header(b".wh."), "whiteout of no name"),
        (header(b"a/.wh.."), "whiteout of no name"),
        (header(b"a/.wh..."), "whiteout of no name"),
        (b"This is no tar at all. " * 100, "not a number|checksum"),
    ],
)  # fmt: skip
def test_hostile_members_are_malformed_and_named(data: bytes, why: str) -> None:
    with pytest.raises(Malformed, match=why) as caught:
        parse(data + END)
    assert str(caught.value).startswith(("tar member b'", "tar header"))
    assert "at byte" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "limits", "why"),
    [
        (pax((b"path", b"p/" * 2500)) + member(), {}, "Linux allows 4096"),
        (pax((b"path", b"p" * 256)) + member(), {}, "more than 255"),
        (pax((b"SCHILY.xattr.user.a", bytes(65536))) + member(), {}, "attributes are larger"),
        (pax((b"path", b"p" * 100)) + member(), {"max_header_size": 100}, "extended header"),
        (header(b"x", b"x", 1 << 40), {}, "extended header"),
        (member() * 4, {"max_entries": 3}, "more than 3 members"),
        (member(b"n" * 60) * 4, {"max_metadata_size": 200}, "larger than 200"),
        (pax((b"SCHILY.xattr.user.a", bytes(500))) + member(), {"max_metadata_size": 200}, "larger than 200"),
        (sparse_01([(1024 * i, 512) for i in range(9)], 1 << 20), {"max_metadata_size": 200}, "larger than 200"),
    ],
)
def test_what_costs_more_than_a_limit_is_too_large(data: bytes, limits: dict[str, int], why: str) -> None:
    with pytest.raises(TooLarge, match=why):
        parse(data + END, limits=TarLimits(**limits))
    if limits and b"PaxHeaders" not in data[:512]:
        with pytest.raises(TooLarge):
            parse(data + END, step=100, limits=TarLimits(**limits))


# ---- any bytes, in any pieces

FIELDS = {0: 100, 100: 8, 108: 8, 116: 8, 124: 12, 136: 12, 156: 1, 157: 100, 257: 8, 329: 8, 337: 8, 345: 155, 482: 1}
SAMPLE = (
    pax((b"path", b"long/" * 60 + b"name"), (b"mtime", b"1.5"), (b"SCHILY.xattr.user.a", b"\0\1"))
    + member(b"h", b"x" * 513)
    + member(b"L", b"g" * 200 + b"\0", b"L", magic=GNU) + header(b"g", b"2", link=b"t", magic=GNU)
    + sparse_10([(512 * 4 * i, 512) for i in range(70)], 1 << 20) + sparse_00([(512, 512)], 4096)
    + header(b"s", b"S", 512, magic=GNU, fields={386: 2 * octal(512, 12), 482: b"\1", 483: octal(4096, 12)})
    + bytes(512) + bytes(512) + member(b".wh.x") + header(b"d", b"5") + member(b"last", b"123")
)  # fmt: skip


def _only_dadi_errors(data: bytes, step: int) -> None:
    try:
        entries = parse(data, step)
    except DadiError as error:
        assert str(error)  # noqa: PT017 (nothing else may be raised)
    else:
        for entry in entries:
            assert 0 <= entry.offset <= len(data)
            assert all(extent.tar_offset + extent.length <= len(data) for extent in entry.extents or ())
            assert b".." not in entry.path.split(b"/")


@given(st.binary(max_size=2000), st.integers(1, 600))
def test_any_bytes_give_entries_or_an_error_of_ours(data: bytes, step: int) -> None:
    _only_dadi_errors(data, step)


@settings(deadline=None)
@given(
    st.lists(st.dictionaries(st.sampled_from(sorted(FIELDS)), st.binary(max_size=160), max_size=4), max_size=4),
    st.sampled_from([b"0", b"x", b"g", b"L", b"K", b"S", b"1", b"2", b"3", b"5"]),
    st.binary(max_size=1500),
)
def test_any_fields_under_a_right_checksum_give_entries_or_an_error_of_ours(
    blocks: list[dict[int, bytes]], type: bytes, body: bytes
) -> None:
    data = b""
    for fields in blocks:
        cut = {at: field[: FIELDS[at]] for at, field in fields.items()}
        data += header(b"n", type, len(body), fields=cut, magic=GNU) + padded(body)
    _only_dadi_errors(data, 512)


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(SAMPLE) - 1), st.integers(0, 255)), max_size=8), st.integers(1, 4096))
def test_a_damaged_tar_gives_entries_or_an_error_of_ours(damage: list[tuple[int, int]], step: int) -> None:
    data = bytearray(SAMPLE)
    for at, value in damage:
        data[at] = value
    _only_dadi_errors(bytes(data), step)


@settings(deadline=None)
@given(
    st.lists(st.binary(max_size=40) | st.sampled_from([b"path=", b"size=", b"GNU.sparse.map=", b"uid="]), max_size=8)
)
def test_any_pax_body_gives_entries_or_an_error_of_ours(parts: list[bytes]) -> None:
    body = b"".join(b"%d %s\n" % (len(part) + 3 + (len(part) > 6), part) for part in parts)
    _only_dadi_errors(member(b"p", body, b"x") + member(b"f", b"1") + END, 4096)


@settings(deadline=None)
@given(st.lists(st.integers(0, len(SAMPLE)), max_size=40))
def test_pieces_of_any_sizes_give_the_same_entries(cuts: list[int]) -> None:
    parser = TarParser()
    edges = [0, *sorted(cuts), len(SAMPLE)]
    for start, end in itertools.pairwise(edges):
        parser.feed(SAMPLE[start:end])
    whole = parse(SAMPLE)
    assert parser.finish() == whole
    assert len(whole) == 8


def test_bytewise_feeding_works_and_the_parser_tells_its_state() -> None:
    parser = TarParser()
    for at in range(len(SAMPLE)):
        parser.feed(SAMPLE[at : at + 1])
    assert parser.finish() == parse(SAMPLE)
    assert repr(parser) == f"TarParser({len(SAMPLE)} bytes fed, 8 entries)"
