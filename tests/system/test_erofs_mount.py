"""The kernel mounts our EROFS metadata over the layers' tars, and what it shows is what other unpackers make.

Two oracles unpack the same layers onto the disk: GNU tar, layer by layer, with the whiteouts applied by `_gnu_tar`
below, and `umoci unpack` of an OCI image. Every attribute of every path is compared (`tests/lab/compare.py`).

What the oracles do differently from each other and from us, and how it is dealt with:

- A directory that no layer has an entry for, but that some path leads through: both give it the time of day, we give
  it time 0. Its mtime, and nothing else, is left out of the comparison; the tests name those directories.
- The directory in which umoci makes such a directory by itself: umoci gives it the time of day too.
- A directory of an earlier layer into which a later layer puts something without an entry for the directory itself:
  umoci and we keep its mtime, GNU tar does not; `_gnu_tar` puts it back.
- A directory that a later layer has again: GNU tar adds the entry's xattrs to those it has, umoci and we replace them;
  `_gnu_tar` takes the old ones away.
- GNU tar knows no whiteouts: `_gnu_tar` applies them to what the layers below have made, before it unpacks a layer.
- GNU tar follows absolute symlinks among the parents out of the directory it unpacks into: such a layer is for umoci
  only.
- umoci writes the holes of sparse files as zeros: large sparse files are for GNU tar only.
- umoci, being written in Go, takes an xattr without a value for a deleted pax record: there are none in these layers.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import shutil
import struct
import subprocess
import sysconfig
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from dadi.erofs.writer import write
from dadi.index.layer import Entry, Kind, LayerIndex
from tests.lab.cleanup import Lab
from tests.lab.compare import differences, snapshot_of
from tests.lab.layers import (
    Member,
    device,
    directory,
    fifo,
    file,
    hardlink,
    index_of,
    index_of_tar,
    opaque,
    symlink,
    tar_of,
    whiteout,
)
from tests.lab.oci_layout import Layout

LOOP_CTL_GET_FREE, LOOP_CONFIGURE = 0x4C82, 0x4C0A
LOOP_READ_ONLY, LOOP_AUTOCLEAR = 1, 4
MS_RDONLY, UMOUNT_NOFOLLOW = 1, 8
NANO = 10**9
libc = ctypes.CDLL(None, use_errno=True)


def _missing() -> str:
    if os.geteuid() != 0:
        return "mounting needs root"
    if "\terofs\n" not in Path("/proc/filesystems").read_text():
        return "the kernel has no EROFS"
    if [int(part) for part in os.uname().release.split(".")[:2]] < [6, 4]:
        return "EROFS with blocks of 512 bytes needs Linux 6.4"
    if not Path("/dev/loop-control").exists():
        return "there are no loop devices"
    programs = [program for program in ("tar", "umoci") if shutil.which(program) is None]
    return f"not installed: {programs}" if programs else ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing() or "present")


@pytest.fixture
def lab() -> Iterator[Path]:
    with Lab("erofs") as lab:
        yield lab.root


@contextlib.contextmanager
def _loop(backing: Path) -> Iterator[str]:
    """Attach a file, padded to whole pages, to a loop device that the kernel frees when the last user is gone."""
    size = backing.stat().st_size
    os.truncate(backing, -(-size // 4096) * 4096)
    control = os.open("/dev/loop-control", os.O_RDWR)
    source = os.open(backing, os.O_RDONLY)
    try:
        while True:
            path = f"/dev/loop{fcntl.ioctl(control, LOOP_CTL_GET_FREE)}"
            loop = os.open(path, os.O_RDONLY)
            info = struct.pack("<5Q4I", 0, 0, 0, 0, 0, 0, 0, 0, LOOP_READ_ONLY | LOOP_AUTOCLEAR).ljust(232, b"\0")
            try:
                fcntl.ioctl(loop, LOOP_CONFIGURE, struct.pack("<2I", source, 512) + info + bytes(64))
                break
            except OSError:  # EBUSY: somebody else has taken it
                os.close(loop)
    finally:
        os.close(source)
        os.close(control)
    try:
        yield path
    finally:
        os.close(loop)


@contextlib.contextmanager
def _mounted(lab: Path, indexes: Sequence[LayerIndex], tars: Sequence[Path]) -> Iterator[Path]:
    """Write the metadata of `indexes` and mount it; `tars` are the layers' tars in the same order."""
    metadata = write(indexes)
    image, point = lab / "metadata", lab / "mounted"
    image.write_bytes(metadata.image)
    point.mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:
        source = stack.enter_context(_loop(image))
        devices = [stack.enter_context(_loop(tars[place])) for place in metadata.devices]
        options = ",".join(f"device={device}" for device in devices)
        if libc.mount(source.encode(), os.fsencode(point), b"erofs", MS_RDONLY, options.encode() or None) != 0:
            raise OSError(ctypes.get_errno(), "mount failed; see the kernel's log", str(point))
        stack.callback(libc.umount2, os.fsencode(point), UMOUNT_NOFOLLOW)
        yield point


def _write_tars(lab: Path, layers: Sequence[bytes]) -> list[Path]:
    paths = [lab / f"layer-{n}.tar" for n in range(len(layers))]
    for path, data in zip(paths, layers, strict=True):
        path.write_bytes(data)
    return paths


def _gnu_tar(tars: Sequence[Path], root: Path) -> Path:
    root.mkdir()
    top = os.fsencode(root)
    options = ["--same-owner", "--same-permissions", "--numeric-owner", "--xattrs", "--xattrs-include=*"]
    options += ["--delay-directory-restore", "--exclude=.wh.*", "--warning=none"]
    for path in tars:
        with tarfile.open(path, encoding="utf-8", errors="surrogateescape") as tar:
            members = {os.path.join(top, _name(info)).rstrip(b"/"): info.isdir() for info in tar}
        times = {base: os.lstat(base) for base, _, _ in os.walk(top)}
        for member, is_directory in members.items():
            head, base = os.path.split(member)
            if base == b".wh..wh..opq" and os.path.isdir(head):
                for inside in os.listdir(head):
                    _remove(os.path.join(head, inside))
            elif base.startswith(b".wh."):
                _remove(os.path.join(head, base[4:]))
            elif not (is_directory and os.path.isdir(member) and not os.path.islink(member)):
                _remove(member)
            else:
                for name in os.listxattr(member):
                    os.removexattr(member, name)
        subprocess.run(["tar", "-x", "-f", path, "-C", root, *options], check=True)
        for base, status in times.items():
            if not members.get(base) and os.path.isdir(base) and not os.path.islink(base):
                os.utime(base, ns=(status.st_atime_ns, status.st_mtime_ns))
    return root


def _name(info: tarfile.TarInfo) -> bytes:
    return os.fsencode(info.name).removeprefix(b"./").removeprefix(b".")


def _remove(path: bytes) -> None:
    if os.path.isdir(path) and not os.path.islink(path):
        shutil.rmtree(path)
    elif os.path.lexists(path):
        os.unlink(path)


def _umoci(tars: Sequence[Path], lab: Path) -> Path:
    layout = Layout(lab / "layout")
    layers = []
    for path in tars:
        with layout.layer("none") as layer:
            layer.write_raw(path.read_bytes())
        layers.append(layer.result)
    layout.add_image("test", layers, command=["true"], environment={}, unpacked_size=0, files=0)
    subprocess.run(["umoci", "unpack", "--image", f"{lab / 'layout'}:test", lab / "bundle"], check=True)
    return lab / "bundle" / "rootfs"


ACL_ACCESS = struct.pack("<I", 2) + b"".join(
    struct.pack("<HHI", *entry)
    for entry in [(1, 6, 2**32 - 1), (2, 4, 70000), (4, 4, 2**32 - 1), (16, 4, 2**32 - 1), (32, 0, 2**32 - 1)]
)
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
SIZES = [0, 1, 511, 512, 513, 4095, 4096, 4097, 65536, 262145, (1 << 20) + 3]


def _content(size: int) -> bytes:
    return (b"%016x" % (size * 0x9E3779B97F4A7C15 % 2**64) * (size // 16 + 1))[:size]


def _everything() -> list[bytes]:
    """Three layers with one of everything."""
    base: list[Member] = [directory(b"./", mtime=1_600_000_000 * NANO + 5)]
    base += [directory(b"sizes"), *(file(b"sizes/%d" % size, _content(size)) for size in SIZES)]
    base += [directory(b"names"), *(file(b"names/" + bytes([c]) * 255, b"x") for c in b"abc")]
    base += [
        file(b"names/" + name) for name in (b"!before", b"-", b"\xff\xfe not utf-8", b"new\nline", b"..more", b"zz")
    ]
    base += [symlink(b"names/link-%d" % n, b"t" * n) for n in (1, 31, 32, 33, 383, 384, 385, 448, 449, 512, 4095)]
    base += [directory(b"deep/" + b"/".join([b"d"] * n)) for n in range(60)]
    base += [file(b"deep/" + b"d/" * 59 + b"end", b"bottom")]
    base += [directory(b"many", 0o1777), *(file(b"many/entry-%05d" % n) for n in range(300))]
    base += [directory(b"kinds"), fifo(b"kinds/fifo", mode=0o600), device(b"kinds/null", "c", 1, 3, mode=0o666)]
    base += [device(b"kinds/disk", "b", 259, 70_000), device(b"kinds/most", "c", 4095, 2**20 - 1)]
    base += [file(b"kinds/setuid", b"#!", mode=0o4755), file(b"kinds/setgid", b"#!", mode=0o2711, owner=(0, 70_000))]
    base += [file(b"kinds/nothing", b"n", mode=0), directory(b"kinds/sticky", 0o3770, owner=(2**32 - 2, 12))]
    base += [file(b"kinds/owner", b"o", owner=(2_000_000, 2**31)), symlink(b"kinds/far", b"/", owner=(5, 6), mtime=7)]
    base += [directory(b"times", mtime=-1)]
    base += [
        file(b"times/%d" % n, mtime=time)
        for n, time in enumerate(
            [0, 1, -1, 999_999_999, NANO, -NANO, -NANO - 1, -(2**30) * NANO, 2**33 * NANO + 123_456_789]
        )
    ]
    base += [directory(b"links"), file(b"links/one", b"linked", mode=0o640), hardlink(b"links/two", b"links/one")]
    base += [directory(b"links/in"), hardlink(b"links/in/three", b"links/two"), symlink(b"links/sym", b"one")]
    base += [hardlink(b"links/sym2", b"links/sym"), hardlink(b"kinds/null2", b"kinds/null")]
    base += [file(b"links/kept", b"stays"), hardlink(b"kept", b"links/kept"), file(b"links/alone", b"both names go")]
    base += [directory(b"xattrs", xattrs={"user.directory": b"yes", "system.posix_acl_default": ACL_ACCESS})]
    base += [file(b"xattrs/capable", b"c", xattrs={"security.capability": CAPABILITY}, mode=0o755)]
    base += [file(b"xattrs/acl", b"c", xattrs={"system.posix_acl_access": ACL_ACCESS, "user.a": b"1"}, mode=0o640)]
    base += [file(b"xattrs/large", b"c", xattrs={"user.large": bytes(range(256)) * 11, "trusted.t": b"\0\xff"})]
    base += [file(b"xattrs/several", xattrs={f"user.{n}": b"v" * n for n in range(1, 40)})]
    base += [symlink(b"xattrs/link", b"s" * 200, xattrs={"trusted.on-a-link": b"q" * 300})]
    base += [directory(b"swap"), file(b"swap/file", b"f"), directory(b"swap/directory"), symlink(b"swap/link", b"file")]
    base += [file(b"swap/directory/inside", b"i"), symlink(b"swap/link2", b"directory"), file(b"swap/fifo", b"f")]
    base += [directory(b"hide"), file(b"hide/a", b"a"), directory(b"hide/b"), file(b"hide/b/c", b"c"), file(b"hide/d")]
    base += [directory(b"opaque", 0o700), file(b"opaque/old"), directory(b"opaque/sub"), file(b"opaque/sub/old", b"o")]
    base += [directory(b"usr"), directory(b"usr/lib"), symlink(b"lib", b"usr/lib"), file(b"usr/lib/below", b"b")]
    base += [directory(b"made"), file(b"made/parents/of/this", b"i")]
    second = [
        directory(b"swap/file", 0o711), file(b"swap/file/now", b"a directory"), file(b"swap/directory", b"now a file"),
        directory(b"swap/link", 0o711), symlink(b"swap/link2", b"file"), fifo(b"swap/fifo"),
        whiteout(b"hide/a"), whiteout(b"hide/b"), directory(b"hide", 0o500, mtime=3 * NANO),
        file(b"hide/d", b"new content"), whiteout(b"not/there"), whiteout(b"links/kept"), whiteout(b"links/alone"),
        directory(b"opaque", 0o711), file(b"opaque/new", b"n"), opaque(b"opaque"), directory(b"opaque/sub"),
        directory(b"times", 0o777, mtime=5), file(b"many/another", b"without an entry for its directory"),
        file(b"lib/through-the-link", b"l"), file(b"links/two", b"no longer a link"),
    ]  # fmt: skip
    third = [
        whiteout(b"links/one"), file(b"hide/b", b"back again"), whiteout(b"many/entry-00000"),
        file(b"made/fresh/file", b"f"),
        directory(b"xattrs", xattrs={"user.other": b"1"}), hardlink(b"again", b"kept"), directory(b"empty"),
        whiteout(b"lib/below"), file(b"usr/lib/above", b"a"),
    ]  # fmt: skip
    return [tar_of(*base), tar_of(*second), tar_of(*third)]


IMPLICIT = {b"made/parents", b"made/parents/of", b"made/fresh"}


def test_one_of_everything_reads_back_as_gnu_tar_and_umoci_unpack_it(lab: Path) -> None:
    tars = _write_tars(lab, _everything())
    indexes = [index_of_tar(path) for path in tars]
    with _mounted(lab, indexes, tars) as root:
        ours = snapshot_of(root)
    by_tar = snapshot_of(_gnu_tar(tars, lab / "unpacked"))
    by_umoci = snapshot_of(_umoci(tars, lab))
    assert len(ours) > 450
    assert differences(ours, by_tar, untimed=IMPLICIT) == []
    assert differences(ours, by_umoci, untimed=IMPLICIT | {b"made"}) == []
    assert {ours[path].mtime for path in IMPLICIT} == {0}


def test_a_real_python_installation_reads_back_as_gnu_tar_unpacks_it(lab: Path) -> None:
    source = Path(sysconfig.get_path("stdlib"))
    base, change = lab / "base.tar", lab / "change.tar"
    exclude = ["--exclude=site-packages", "--exclude=test", "--exclude=__pycache__", "--exclude=config-*"]
    subprocess.run(["tar", "-c", "--format=pax", *exclude, "-f", base, "-C", source.parent, source.name], check=True)
    name = os.fsencode(source.name)
    change.write_bytes(
        tar_of(
            whiteout(name + b"/asyncio"),
            directory(name + b"/email"),
            opaque(name + b"/email"),
            file(name + b"/email/__init__.py", b"raise ImportError"),
            file(name + b"/json", b"once a package"),
            directory(name + b"/os.py"),
        )
    )
    tars = [base, change]
    with _mounted(lab, [index_of_tar(path) for path in tars], tars) as root:
        ours = snapshot_of(root)
    assert len(ours) > 500
    # no layer has an entry for the root, so GNU tar leaves it as it was made
    assert differences(ours, snapshot_of(_gnu_tar(tars, lab / "unpacked")), untimed={b""}) == []
    assert ours[b""].mtime == 0


def test_a_hundred_layers_read_back_as_umoci_unpacks_them(lab: Path) -> None:
    layers = []
    for n in range(100):
        members = [directory(b"./", mtime=n * NANO), directory(b"all", mtime=n), file(b"all/%d" % n, b"layer %d" % n)]
        members += [file(b"last", b"%d" % n, mtime=n * NANO), hardlink(b"all/last-%d" % n, b"last")]
        if n >= 10:
            members.append(whiteout(b"all/%d" % (n - 10)))
        layers.append(tar_of(*members))
    layers.append(layers[50])  # the same layer twice is one device
    tars = _write_tars(lab, layers)
    with _mounted(lab, [index_of_tar(path) for path in tars], tars) as root:
        ours = snapshot_of(root)
    assert differences(ours, snapshot_of(_umoci(tars, lab))) == []
    assert ours[b"all/99"].kind == "file"
    assert ours[b"all/last-3"].links == 1


def test_parents_that_are_symlinks_are_followed_inside_the_image_as_umoci_does(lab: Path) -> None:
    base = [directory(b"./"), directory(b"usr"), directory(b"usr/lib"), symlink(b"lib", b"/usr/lib")]
    base += [symlink(b"up", b"../../../../usr"), symlink(b"usr/again", b"/lib/../../usr/./lib"), file(b"usr/lib/old")]
    base += [symlink(b"usr/nowhere", b"made/here"), directory(b"usr/made"), symlink(b"through", b"usr/again")]
    change = [file(b"lib/a", b"a"), file(b"up/b", b"b"), file(b"usr/again/c", b"c"), file(b"through/d", b"d")]
    change += [whiteout(b"lib/old"), file(b"usr/nowhere/e", b"e"), hardlink(b"up/a2", b"lib/a")]
    tars = _write_tars(lab, [tar_of(*base), tar_of(*change)])
    with _mounted(lab, [index_of_tar(path) for path in tars], tars) as root:
        ours = snapshot_of(root)
    assert differences(ours, snapshot_of(_umoci(tars, lab)), untimed={b"usr/made", b"usr/made/here"}) == []
    assert {b"usr/lib/a", b"usr/b", b"usr/lib/c", b"usr/lib/d", b"usr/made/here/e", b"usr/a2"} <= ours.keys()


@pytest.mark.parametrize("length", [6, 255])
def test_directories_of_twenty_thousand_entries_can_be_listed_and_looked_up(lab: Path, length: int) -> None:
    names = [b"%06d" % n + b"x" * (length - 6) for n in range(20_000)]
    entries = [Entry(b"many/" + name, Kind.FILE, mode=0o644, mtime=n) for n, name in enumerate(names)]
    with _mounted(lab, [index_of(entries)], []) as root:
        assert sorted(os.listdir(os.fsencode(root / "many"))) == names
        for n in (*range(0, 20_000, 37), 19_999):
            assert os.lstat(os.path.join(os.fsencode(root), b"many", names[n])).st_mtime_ns == n
        for name in (b"!", b"000000", b"0000005", b"019999x", b"~", b"010000" + b"y" * 249):
            assert os.path.lexists(os.path.join(os.fsencode(root), b"many", name)) == (name in names)


def test_sparse_files_above_four_gibibytes_read_back_as_gnu_tar_unpacks_them(lab: Path) -> None:
    source, tar = lab / "source", lab / "sparse.tar"
    source.mkdir()
    for name, size, data in [
        ("fine", (4 << 30) + 12345, [0, 1 << 20, (1 << 20) + 4096, (3 << 30) + 8192, 4 << 30]),
        ("coarse", 9 << 30, [2 << 30, 8 << 30]),
        ("hole", (5 << 30) + 1, []),
        ("small", 20_000, [8192]),
    ]:
        with (source / name).open("wb") as out:
            for offset in data:
                out.seek(offset)
                out.write(_content(4096 if name != "coarse" else 1 << 16))
            out.truncate(size)
    subprocess.run(["tar", "-c", "--sparse", "--format=pax", "-f", tar, "-C", source, "."], check=True)
    index = index_of_tar(tar)
    assert tar.stat().st_size < 1 << 20
    assert sum(entry.extents is not None for entry in index.entries) == 4
    with _mounted(lab, [index], [tar]) as root:
        ours = snapshot_of(root)
        with (root / "fine").open("rb") as fine:  # holes that SEEK_DATA passes over read as zeros
            for offset in (4096, (1 << 20) - 1, (2 << 30) + 77, (4 << 30) + 12344):
                assert os.pread(fine.fileno(), 1, offset) == b"\0"
    assert differences(ours, snapshot_of(_gnu_tar([tar], lab / "unpacked"))) == []


def test_a_file_above_four_gibibytes_that_has_no_holes_is_one_chunk(lab: Path) -> None:
    size, tar = (5 << 30) + 777, lab / "large.tar"
    with tar.open("wb") as out:  # zeros that are holes of the tar's own file only
        for offset in (512, 512 + (4 << 30) - 3, 512 + size - 8):
            out.seek(offset)
            out.write(b"a marker")
        out.truncate(512 + -(-size // 512) * 512 + 1024)
    index = index_of([Entry(b"large", Kind.FILE, mode=0o644, size=size, offset=512)], size=tar.stat().st_size)
    assert len(write([index]).image) == 4096
    with _mounted(lab, [index], [tar]) as root, (root / "large").open("rb") as large:
        assert os.fstat(large.fileno()).st_size == size
        for offset in (0, (4 << 30) - 3, size - 8):
            assert os.pread(large.fileno(), 8, offset) == b"a marker"
        assert os.pread(large.fileno(), 100, size - 8) == b"a marker"


@pytest.mark.parametrize("mtime", [-1, -1_500_000_000, -(10**18), 0, 10**18 + 1, 2**62])
def test_times_of_compact_and_extended_inodes_are_exact_before_and_after_1970(lab: Path, mtime: int) -> None:
    entries = [Entry(b"%d" % n, Kind.FILE, mode=0o644, mtime=mtime) for n in range(3)]
    entries.append(Entry(b"owner", Kind.FILE, mode=0o644, mtime=mtime, uid=70_000))
    with _mounted(lab, [index_of(entries)], []) as root:
        assert {os.lstat(root / name).st_mtime_ns for name in os.listdir(root)} == {mtime}


def test_extended_attributes_larger_than_pages_read_back(lab: Path) -> None:
    xattrs = {b"user.%d" % n: bytes([n]) * size for n, size in enumerate([1, 511, 512, 4096, 20_000, 65_535])}
    entry = Entry(b"file", Kind.FILE, mode=0o644, xattrs=tuple(xattrs.items()))
    with _mounted(lab, [index_of([entry])], []) as root:
        path = root / "file"
        assert {os.fsencode(name): os.getxattr(path, name) for name in os.listxattr(path)} == xattrs


def test_reads_at_odd_offsets_and_direct_reads_give_the_tars_bytes(lab: Path) -> None:
    content = _content(300_000)
    tars = _write_tars(lab, [tar_of(file(b"pad", b"p"), file(b"file", content))])
    with _mounted(lab, [index_of_tar(tars[0])], tars) as root, (root / "file").open("rb") as opened:
        for offset, length in [(1, 1), (510, 5), (4095, 4098), (131_071, 65_537), (299_999, 10), (300_000, 1)]:
            assert os.pread(opened.fileno(), length, offset) == content[offset : offset + length]
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
            assert mapped[:] == content
        direct = os.open(root / "file", os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, 8192) as buffer:
            assert os.preadv(direct, [buffer], 1024) == 8192
            assert buffer[:] == content[1024 : 1024 + 8192]
        os.close(direct)
