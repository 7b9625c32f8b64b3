"""EROFS metadata read back by a reader of its own: layout, sizes, devices, attributes, limits, determinism.

Longer than 400 lines: a property of the format after the other, all seen through one reader.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi.erofs import layout, writer
from dadi.erofs.writer import Metadata, write
from dadi.errors import Malformed, Unsupported
from dadi.index.layer import Entry, Extent, Kind, LayerIndex
from tests.lab.compare import PIECE, Facts, content_digest
from tests.lab.erofs_reader import Image, Inode, read
from tests.lab.layers import directory, file, hardlink, index_of, index_of_tar, tar_of, whiteout

BLOCK = 512


def open_image(metadata: Metadata, tars: Sequence[bytes] = ()) -> tuple[Image, dict[bytes, Facts]]:
    """Decode an image; `tars` are those of all layers."""
    image = Image(metadata.image, [tars[place] for place in metadata.devices])
    return image, image.read()


def inode_at(image: Image, path: bytes) -> Inode:
    inode = image.inode(image.superblock.root)
    for name in path.split(b"/") if path else ():
        inode = image.inode(dict(image.directory(inode))[name][0])
    return inode


def digest_of(content: bytes) -> str:
    return content_digest((at, content[at : at + PIECE]) for at in range(0, len(content), PIECE))


def entry(path: bytes, kind: Kind = Kind.FILE, **attributes: object) -> Entry:
    return Entry(path, kind, **{"mode": 0o644, **attributes})


def test_the_structs_have_the_sizes_of_the_kernels() -> None:
    sizes = {
        layout.SUPERBLOCK: 128,
        layout.DEVICE_SLOT: 128,
        layout.COMPACT: 32,
        layout.EXTENDED: 64,
        layout.XATTR_HEADER: 12,
        layout.XATTR_ENTRY: 4,
        layout.CHUNK_INDEX: 8,
        layout.DIRENT: 12,
    }
    assert {struct.format: struct.size for struct in sizes} == {s.format: size for s, size in sizes.items()}


def test_an_image_of_no_layers_is_an_empty_root() -> None:
    metadata = write([])
    assert metadata.devices == ()
    assert len(metadata.image) == 4096
    (root,) = read(metadata.image).values()
    assert (root.kind, root.mode, root.uid, root.gid, root.mtime, root.links) == ("directory", 0o755, 0, 0, 0, 2)


@pytest.mark.parametrize("size", [0, 1, 511, 512, 513, 4095, 4096, 4097, 65537, 1 << 20])
def test_a_file_without_holes_has_one_index_whatever_its_size(size: int) -> None:
    content = os.urandom(size)
    tar = tar_of(file(b"before", b"b"), file(b"f", content))
    image, facts = open_image(write([index_of_tar(tar)]), [tar])
    assert facts[b"f"].size == size
    assert facts[b"f"].content == digest_of(content)
    if size:
        assert len(image.indexes(inode_at(image, b"f"))[1]) == 1


def test_only_layers_whose_data_are_referred_to_are_devices_and_a_layer_used_twice_is_one() -> None:
    tars = [
        tar_of(file(b"replaced", b"1"), file(b"empty")),
        tar_of(directory(b"d")),
        tar_of(file(b"a", b"2"), file(b"gone", b"2")),
        tar_of(file(b"replaced", b"3")),
        tar_of(file(b"a", b"2"), file(b"gone", b"2")),
        tar_of(whiteout(b"gone")),
    ]
    layers = [index_of_tar(tar) for tar in tars]
    metadata = write(layers)
    assert metadata.devices == (2, 3)
    image, facts = open_image(metadata, tars)
    assert image.superblock.device_tags == [layers[n].diff_id.removeprefix("sha256:").encode() for n in (2, 3)]
    assert image.superblock.device_blocks == [-(-len(tars[n]) // 4096) * 8 for n in (2, 3)]
    assert facts[b"a"].content == digest_of(b"2")
    assert facts[b"replaced"].content == digest_of(b"3")
    assert image.indexes(inode_at(image, b"replaced"))[1][0][0] == 2


def test_the_same_layers_give_the_same_bytes_in_every_process() -> None:
    program = (
        "import hashlib; from tests.unit.test_erofs_writer import sample; from dadi.erofs.writer import write;"
        "print(hashlib.sha256(write(sample()).image).hexdigest())"
    )
    expected = hashlib.sha256(write(sample()).image).hexdigest()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        root = Path(__file__).parents[2]
        done = subprocess.run(
            [sys.executable, "-c", program], env=environment, cwd=root, stdout=subprocess.PIPE, check=True
        )
        assert done.stdout.decode().strip() == expected


def sample() -> list[LayerIndex]:
    xattrs = tuple((b"user.%d" % n, b"v") for n in range(20))
    entries = [entry(b"d%d/f%d" % (n % 7, n), mtime=n % 3, xattrs=xattrs[n % 5 :], uid=n) for n in range(300)]
    return [index_of(entries[:200], name="a"), index_of(entries[150:], name="b")]


def test_the_uuid_is_derived_from_the_diff_ids() -> None:
    def uuid(*names: str) -> bytes:
        return open_image(write([index_of([], name=name) for name in names]))[0].superblock.uuid

    assert uuid("a", "b") == uuid("a", "b")
    assert len({uuid(), uuid("a"), uuid("b"), uuid("a", "b"), uuid("b", "a")}) == 5


def test_inodes_are_compact_where_time_and_owner_allow_it() -> None:
    entries = [entry(b"%d" % n, mtime=5 * 10**9 + 7) for n in range(3)]
    entries += [
        entry(b"time", mtime=6),
        entry(b"owner", mtime=5 * 10**9 + 7, uid=70_000),
        entry(b"group", mtime=5 * 10**9 + 7, gid=70_000),
        entry(b"large", mtime=5 * 10**9 + 7, size=5 << 30, extents=()),
    ]
    image, facts = open_image(write([index_of(entries)]))
    assert image.superblock.build_time == 5 * 10**9 + 7
    compact = {path for path in facts if inode_at(image, path).compact}
    assert compact == {b"0", b"1", b"2"}
    assert facts[b"owner"].uid == facts[b"group"].gid == 70_000


@pytest.mark.parametrize("mtime", [0, 1, -1, -(10**9), 1 - 10**9, -(2**33) * 10**9 + 3, 2**33 * 10**9 + 999_999_999])
def test_times_are_exact_before_and_after_1970(mtime: int) -> None:
    _, facts = open_image(write([index_of([entry(b"f", mtime=mtime), entry(b"g", mtime=mtime), entry(b"h")])]))
    assert facts[b"f"].mtime == facts[b"g"].mtime == mtime
    assert facts[b"h"].mtime == 0


def test_owners_modes_and_device_numbers_reach_their_limits() -> None:
    entries = [
        entry(b"f", mode=0o7777, uid=2**32 - 2, gid=65_536),
        entry(b"c", Kind.CHARACTER, major=4095, minor=2**20 - 1),
        entry(b"b", Kind.BLOCK, major=8, minor=300),
        entry(b"p", Kind.FIFO, mode=0),
        entry(b"s", Kind.SYMLINK, target=b"t", mode=0),
    ]
    _, facts = open_image(write([index_of(entries)]))
    assert (facts[b"f"].mode, facts[b"f"].uid, facts[b"f"].gid) == (0o7777, 2**32 - 2, 65_536)
    assert (facts[b"c"].kind, facts[b"c"].device) == ("character device", (4095, 2**20 - 1))
    assert (facts[b"b"].kind, facts[b"b"].device) == ("block device", (8, 300))
    assert (facts[b"p"].kind, facts[b"p"].mode) == ("fifo", 0)
    assert (facts[b"s"].kind, facts[b"s"].mode, facts[b"s"].target) == ("symlink", 0o777, b"t")


def test_hard_links_are_one_inode_with_a_count() -> None:
    tar = tar_of(file(b"a", b"x"), hardlink(b"d/b", b"a"), hardlink(b"c", b"a"))
    image, facts = open_image(write([index_of_tar(tar)]), [tar])
    assert facts[b"a"] == facts[b"c"] == facts[b"d/b"]
    assert facts[b"a"].links == 3
    assert image.superblock.inodes == 3


@pytest.mark.parametrize("length", [1, 31, 32, 33, 200, 383, 384, 385, 447, 448, 449, 511, 512, 513, 4095])
@pytest.mark.parametrize("xattrs", [(), ((b"trusted.x", b"v" * 100),)])
def test_symlinks_are_inline_where_they_fit_into_one_block(
    length: int, xattrs: tuple[tuple[bytes, bytes], ...]
) -> None:
    many = [entry(b"%d" % n, Kind.SYMLINK, target=b"t" * length, mtime=n, xattrs=xattrs) for n in range(20)]
    image, facts = open_image(write([index_of(many)]))
    for n in range(20):
        assert facts[b"%d" % n].target == b"t" * length
        inode = inode_at(image, b"%d" % n)
        assert (inode.layout == 2) == (inode.behind - inode.nid * 32 + length <= BLOCK)


@pytest.mark.parametrize(
    "lengths", [[255] * 40, [1] * 255, [12 + 8 * n for n in range(30)], [244], [243, 244, 245] * 5]
)
def test_directory_blocks_are_cut_at_any_name_lengths(lengths: list[int]) -> None:
    names = [(b"%05d" % n * 51)[: max(length, 3)] for n, length in enumerate(lengths)]
    names = sorted(
        {(name + b"-%03d" % n)[-length:] for n, (name, length) in enumerate(zip(names, lengths, strict=True))}
    )
    _, facts = open_image(write([index_of([entry(b"d/" + name) for name in names])]))
    assert sorted(facts) == [b"", b"d", *(b"d/" + name for name in names)]


def test_a_directory_of_twenty_thousand_entries_reads_back() -> None:
    names = [b"%05d" % n for n in range(20_000)]
    _, facts = open_image(write([index_of([entry(name) for name in names[::-1]])]))
    assert list(facts) == [b"", *names]


def test_metadata_take_little_room() -> None:
    entries = [entry(b"d%d/a-file-of-usual-length-%d" % (n % 50, n), mtime=n, size=9, offset=512) for n in range(5000)]
    assert len(write([index_of(entries, size=1 << 20)]).image) / 5000 < 150


# -- extended attributes


def test_every_namespace_that_the_kernel_shows_is_kept_and_others_are_left_out() -> None:
    kept = [
        (b"user.a", b"1"),
        (b"trusted.b", b"\0\xff"),
        (b"security.capability", b"c" * 20),
        (b"security.ima", b""),
        (b"system.posix_acl_access", b"acl"),
        (b"system.posix_acl_default", b"acl"),
    ]
    dropped = [
        b"security.selinux",
        b"system.nfs4_acl",
        b"trusted.overlay.opaque",
        b"user.overlay.redirect",
        b"com.apple.quarantine",
        b"user.",
        b"system.other",
    ]
    xattrs = (*kept, *((name, b"x") for name in dropped))
    for kind in (Kind.FILE, Kind.DIRECTORY):
        _, facts = open_image(write([index_of([entry(b"x", kind, xattrs=xattrs)])]))
        assert facts[b"x"].xattrs == tuple(sorted((name.decode(), value) for name, value in kept))
    for kind in (Kind.FIFO, Kind.SYMLINK):
        _, facts = open_image(write([index_of([entry(b"x", kind, xattrs=xattrs, target=b"t")])]))
        assert [name for name, _ in facts[b"x"].xattrs] == sorted(n.decode() for n, _ in kept if n != b"user.a")


def test_an_inode_whose_xattrs_are_all_left_out_has_no_body() -> None:
    image, _ = open_image(write([index_of([entry(b"f", xattrs=((b"security.selinux", b"x"),))])]))
    inode = inode_at(image, b"f")
    assert inode.behind - inode.nid * 32 in (32, 64)


def test_of_two_values_for_one_xattr_the_last_counts() -> None:
    _, facts = open_image(write([index_of([entry(b"f", xattrs=((b"user.a", b"1"), (b"user.a", b"2")))])]))
    assert facts[b"f"].xattrs == (("user.a", b"2"),)


@pytest.mark.parametrize("kind", [Kind.FILE, Kind.DIRECTORY, Kind.SYMLINK, Kind.FIFO])
def test_xattr_bodies_may_be_larger_than_blocks(kind: Kind) -> None:
    xattrs = tuple((b"trusted.%d" % n, bytes([n]) * 65_535) for n in range(3))
    extents = {"size": 5000, "extents": ()} if kind is Kind.FILE else {}
    _, facts = open_image(write([index_of([entry(b"x", kind, xattrs=xattrs, target=b"t", **extents)])]))
    assert facts[b"x"].xattrs == tuple((name.decode(), value) for name, value in xattrs)


@pytest.mark.parametrize(
    ("xattrs", "kind"),
    [
        (((b"user.a", b"v" * 65_536),), Unsupported),
        (tuple((b"user.%d" % n, b"v" * 65_535) for n in range(5)), Unsupported),
        (((b"user." + b"n" * 251, b""),), Malformed),
        (((b"user.a\0b", b""),), Malformed),
    ],
)
def test_xattrs_that_cannot_be_held_are_refused_with_layer_and_path(
    xattrs: tuple[tuple[bytes, bytes], ...], kind: type[Exception]
) -> None:
    with pytest.raises(kind, match=r"layer 2 \(.*b'the/file'"):
        write([index_of([]), index_of([entry(b"the/file", xattrs=xattrs)])])


# -- sparse and large files


def sparse(size: int, *extents: tuple[int, int, int]) -> Entry:
    return entry(b"sparse", size=size, extents=tuple(Extent(*extent) for extent in extents))


@pytest.mark.parametrize(
    ("size", "extents", "chunk", "indexes"),
    [
        (10_000, [], 16_384, [None]),
        (6 << 30, [], 8 << 30, [None]),
        (8192, [(0, 512, 4096)], 4096, [512, None]),
        (8192, [(4096, 512, 4096)], 4096, [None, 512]),
        (8192, [(4096, 512, 4096), (8192, 99_999, 0)], 4096, [None, 512]),
        (8192, [(0, 512, 4096), (4096, 4608, 4096)], 8192, [512]),
        (8192, [(0, 4608, 4096), (4096, 512, 4096)], 4096, [4608, 512]),
        (4600, [(4096, 512, 504)], 4096, [None, 512]),
        (3072, [(1024, 512, 512)], 512, [None, None, 512, None, None, None]),
        (3072, [(1024, 512, 1024)], 1024, [None, 512, None]),
        (3 << 40, [(0, 1024, 3 << 40)], 1 << 40, [1024, 1024 + (1 << 40), 1024 + (2 << 40)]),
        ((1 << 40) + 1, [(0, 1024, (1 << 40) + 1)], 1 << 40, [1024, 1024 + (1 << 40)]),
    ],
)
def test_chunks_are_the_largest_that_can_hold_the_holes(
    size: int, extents: list[tuple[int, int, int]], chunk: int, indexes: list[int | None]
) -> None:
    layer = index_of([sparse(size, *extents)], size=min(4 << 40, writer.MAX_DEVICE))
    if size >= 3 << 40:
        with pytest.raises(Unsupported, match=r"b'sparse'.*beyond"):
            write([layer])
        return
    image, facts = Image(write([layer]).image), size
    found_chunk, found = image.indexes(inode_at(image, b"sparse"))
    assert inode_at(image, b"sparse").size == facts
    assert found_chunk == chunk
    assert [index and index[1] for index in found] == indexes


@pytest.mark.parametrize(
    ("size", "extents", "kind", "why"),
    [
        (8192, [(100, 512, 412)], Unsupported, "holes"),
        (8192, [(0, 512, 100)], Unsupported, "holes"),
        (8192, [(512, 700, 512)], Unsupported, "multiple of 512"),
        (8192, [(512, 512, 1024), (1024, 2048, 512)], Malformed, "overlap"),
        (8192, [(4096, 512, 512), (512, 1024, 512)], Malformed, "overlap"),
        (8192, [(8192, 512, 512)], Malformed, "overlap"),
        (1 << 40, [(512, 512, 512)], Unsupported, "indexes"),
        (2**63, [(1 << 40, 512, 1 << 40)], Unsupported, "indexes"),
    ],
)
def test_sparse_files_that_cannot_be_held_are_refused_with_the_path(
    size: int, extents: list[tuple[int, int, int]], kind: type[Exception], why: str
) -> None:
    with pytest.raises(kind, match=f"b'sparse'.*{why}"):
        write([index_of([sparse(size, *extents)], size=1 << 30)])


def test_a_file_whose_data_are_not_at_a_multiple_of_512_is_refused() -> None:
    with pytest.raises(Unsupported, match=r"b'f'.*multiple of 512"):
        write([index_of([entry(b"f", size=1, offset=700)], size=4096)])


def test_the_indexes_of_all_sparse_files_together_have_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_INDEXES", 10)
    five = [(512, 512, 512)]
    two = [Entry(b"%d" % n, Kind.FILE, size=2560, extents=sparse(2560, *five).extents) for n in range(2)]
    assert len(write([index_of(two, size=4096)]).devices) == 1
    with pytest.raises(Unsupported, match="more than 10"):
        write([index_of([*two, entry(b"more", size=1, offset=512)], size=4096)])


def test_layers_beyond_the_formats_limits_are_refused() -> None:
    one = [entry(b"f", size=1, offset=512)]
    assert write([index_of(one, size=writer.MAX_DEVICE)]).devices == (0,)
    with pytest.raises(Unsupported, match="more than"):
        write([index_of(one, size=writer.MAX_DEVICE + 1)])
    many = [index_of([entry(b"%d" % n, size=1, offset=512)], name=str(n)) for n in range(writer.MAX_DEVICES + 1)]
    assert Image(write(many[:-1]).image).superblock.root < 1 << 16
    with pytest.raises(Unsupported, match="more than"):
        write(many)


@given(st.lists(st.sampled_from(["data", "hole", "elsewhere"]), min_size=1, max_size=70), st.integers(1, BLOCK))
@settings(max_examples=200)
def test_any_pattern_of_holes_reads_back(blocks: list[str], last: int) -> None:
    tar, extents, content = bytearray(512), [], bytearray()
    for n, kind in enumerate(blocks):
        length = last if n == len(blocks) - 1 else BLOCK
        if kind == "elsewhere":
            tar += b"\xee" * BLOCK
        if kind != "hole":
            extents.append((n * BLOCK, len(tar), length))
            tar += bytes([n + 1]) * BLOCK
        content += bytes([n + 1 if kind != "hole" else 0]) * length
    layer = index_of([sparse(len(content), *extents)], size=len(tar))
    _, facts = open_image(write([layer]), [bytes(tar)])
    assert facts[b"sparse"].size == len(content)
    assert facts[b"sparse"].content == digest_of(bytes(content))


# -- random trees

NAMES = st.one_of(
    st.sampled_from([b"a", b"b", b"-", b"..a", b"~", b"\xff"]),
    st.binary(min_size=1, max_size=255).filter(lambda n: b"/" not in n and b"\0" not in n and n not in (b".", b"..")),
)
XATTRS = st.dictionaries(
    st.sampled_from([b"user.a", b"user.bc", b"trusted.t", b"security.capability", b"system.posix_acl_access"]),
    st.binary(max_size=700),
    max_size=3,
).map(lambda values: tuple(sorted(values.items())))
ATTRIBUTES = st.fixed_dictionaries(
    {
        "mode": st.integers(0, 0o7777),
        "uid": st.sampled_from([0, 1000, 65_535, 65_536, 2**32 - 2]),
        "gid": st.sampled_from([0, 65_535, 65_536]),
        "mtime": st.one_of(st.just(10**18), st.integers(-(2**62), 2**62)),
        "xattrs": XATTRS,
    }
)
KINDS = {
    Kind.FILE: "file",
    Kind.DIRECTORY: "directory",
    Kind.SYMLINK: "symlink",
    Kind.FIFO: "fifo",
    Kind.CHARACTER: "character device",
    Kind.BLOCK: "block device",
}
TREE = st.dictionaries(
    st.lists(NAMES, min_size=1, max_size=4).map(tuple),
    st.tuples(st.sampled_from(list(KINDS)), ATTRIBUTES, st.binary(max_size=1500), st.booleans()),
    max_size=40,
)


@given(TREE)
@settings(max_examples=150)
def test_random_trees_read_back_exactly(
    wanted: dict[tuple[bytes, ...], tuple[Kind, dict[str, object], bytes, bool]],
) -> None:
    entries: list[Entry] = []
    expected: dict[bytes, tuple[Entry, bytes]] = {}
    tar = bytearray()
    for parts, (kind, attributes, data, second) in sorted(wanted.items()):
        parents = [expected.get(b"/".join(parts[:n])) for n in range(1, len(parts))]
        if any(parent is not None and parent[0].kind is not Kind.DIRECTORY for parent in parents):
            continue
        path = b"/".join(parts)
        more: dict[str, object] = {}
        if kind is Kind.FILE:
            more = {"size": len(data), "offset": len(tar)}
            tar += data.ljust(-(-len(data) // BLOCK) * BLOCK, b"\0")
        elif kind is Kind.SYMLINK:
            more = {"target": data.replace(b"\0", b"-") or b"-"}
        elif kind is not Kind.DIRECTORY:
            more = {"major": len(data) % 4096, "minor": len(data) * 600}
        made = Entry(path, kind, **attributes, **more)
        entries.append(made)
        expected[path] = (made, data)
        if second and kind is not Kind.DIRECTORY:
            link = b"hard links/%d" % len(entries)
            entries.append(Entry(link, Kind.HARDLINK, target=path))
            expected[link] = (made, data)
    _, facts = open_image(write([index_of(entries, size=len(tar))]), [bytes(tar)])
    assert facts.keys() - {b""} >= expected.keys()
    for path, (made, data) in expected.items():
        check(facts[path], made, data)


def check(found: Facts, made: Entry, data: bytes) -> None:
    xattrs = [(name.decode(), value) for name, value in made.xattrs]
    if made.kind not in (Kind.FILE, Kind.DIRECTORY):
        xattrs = [pair for pair in xattrs if not pair[0].startswith("user.")]
    device = (made.major, made.minor) if made.kind in (Kind.CHARACTER, Kind.BLOCK) else (0, 0)
    assert found.kind == KINDS[made.kind]
    assert found.mode == (0o777 if made.kind is Kind.SYMLINK else made.mode)
    assert (found.uid, found.gid, found.mtime) == (made.uid, made.gid, made.mtime)
    assert found.xattrs == tuple(xattrs)
    assert found.device == device
    assert found.target == made.target
    if made.kind is Kind.FILE:
        assert (found.size, found.content) == (len(data), digest_of(data))
