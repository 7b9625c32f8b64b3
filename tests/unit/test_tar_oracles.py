"""The tar parser against Python's tarfile and GNU tar: every attribute, and the bytes at every offset."""

from __future__ import annotations

import io
import os
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi.index.layer import Entry, Kind
from tests.fakes.tars import parse

_KINDS = {tarfile.REGTYPE: Kind.FILE, tarfile.DIRTYPE: Kind.DIRECTORY, tarfile.SYMTYPE: Kind.SYMLINK,
          tarfile.LNKTYPE: Kind.HARDLINK, tarfile.CHRTYPE: Kind.CHARACTER, tarfile.BLKTYPE: Kind.BLOCK,
          tarfile.FIFOTYPE: Kind.FIFO}  # fmt: skip
_names = st.lists(st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=30)
                  .filter(lambda part: part not in (".", "..") and len(part.encode()) < 200 and ".wh." not in part),
                  min_size=1, max_size=12).map("/".join)  # fmt: skip


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(_names, st.sampled_from(sorted(_KINDS)), st.integers(0, 0o7777), st.integers(0, 2**32 - 2),
                  st.integers(0, 2**40), st.binary(max_size=1500), _names),
        max_size=8,
    ),
    st.sampled_from([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT]),
)  # fmt: skip
def test_what_tarfile_writes_is_read(members: list[tuple[str, bytes, int, int, int, bytes, str]], form: int) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, type, mode, owner, mtime, data, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.mode, info.uid, info.gid, info.mtime = type, mode, owner, owner // 2, mtime % (2**33)
            info.linkname, info.devmajor, info.devminor = target, 7, owner % 1000
            info.size = len(data) if type == tarfile.REGTYPE else 0
            tar.addfile(info, io.BytesIO(data))
    raw = out.getvalue()
    entries = parse(raw)
    assert len(entries) == len(members)
    for entry, (name, type, mode, owner, mtime, data, target) in zip(entries, members, strict=True):
        kind = _KINDS[type]
        assert (entry.path, entry.kind, entry.mode) == (name.encode(), kind, mode)
        assert (entry.uid, entry.gid, entry.mtime) == (owner, owner // 2, mtime % (2**33) * 10**9)
        if kind is Kind.FILE:
            assert raw[entry.offset : entry.offset + entry.size] == data
        elif kind in (Kind.SYMLINK, Kind.HARDLINK):
            assert entry.target == target.encode()
        elif kind in (Kind.CHARACTER, Kind.BLOCK):
            assert (entry.major, entry.minor) == (7, owner % 1000)


def _tree(root: Path, form: str) -> None:
    """Make a tree with everything that the format can say."""
    (root / "empty").mkdir(mode=0o1777)
    (root / "dir" / ("d" * 60)).mkdir(parents=True)
    for size in (0, 1, 511, 512, 513, 4096, 100_000):
        (root / "dir" / f"size-{size}").write_bytes(os.urandom(size))
    os.link(root / "dir" / "size-513", root / "hard")
    os.symlink("../no where", root / "dir" / "symlink")
    (root / "dir" / "size-1").chmod(0o6755)
    (root / ".hidden").write_bytes(b"x")
    (root / os.fsdecode(b"latin-\xe9\xff")).write_bytes(b"not UTF-8")
    os.utime(root / ".hidden", ns=(0, 1_600_000_000_123_456_789 if form == "pax" else 1_600_000_000_000_000_000))
    if form != "v7":
        os.mkfifo(root / "fifo")
    if form in ("gnu", "pax"):
        long = root / ("l" * 200) / ("m" * 200)
        long.mkdir(parents=True)
        (long / "file").write_bytes(b"long")
        os.symlink("t" * 300, long / "link")
        os.link(long / "file", root / "dir" / "to-long")
        with open(root / "sparse", "wb") as sparse:
            for i in range(40):
                sparse.seek(i * 65536)
                sparse.write(os.urandom(4096 + i % 3))
            sparse.truncate(40 * 65536 + 5)
        with open(root / "hole", "wb") as sparse:
            sparse.truncate(5 << 30)
    if os.geteuid() == 0:
        if form != "v7":
            os.mknod(root / "block", 0o600 | stat.S_IFBLK, os.makedev(259, 70000))
            os.mknod(root / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        os.chown(root / "dir" / "size-511", 65536 + 7, 2_000_000_000 if form in ("gnu", "pax") else 8)
        if form == "pax":
            capability = bytes.fromhex("0100000200040000000000000000000000000000")
            os.setxattr(root / "dir" / "size-512", "security.capability", capability)
            os.setxattr(root / "dir", "trusted.overlay.opaque", b"y")
    if form == "pax":
        os.setxattr(root / ".hidden", "user.some", b"a\n=\0b")
    for directory, _, _ in os.walk(root):
        os.utime(directory, ns=(0, 1_500_000_000_000_000_000))


def _content(raw: memoryview, entry: Entry) -> bytes:
    if entry.extents is None:
        return bytes(raw[entry.offset : entry.offset + entry.size])
    data = bytearray(entry.size)
    for extent in entry.extents:
        data[extent.file_offset : extent.file_offset + extent.length] = raw[extent.tar_offset :][: extent.length]
    return bytes(data)


@pytest.mark.programs("tar")
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("v7", []),
        ("ustar", []),
        ("gnu", []),
        ("gnu", ["--sparse"]),
        ("pax", ["--xattrs", "--xattrs-include=*"]),
        ("pax", ["--sparse", "--sparse-version=0.0", "--xattrs", "--xattrs-include=*"]),
        ("pax", ["--sparse", "--sparse-version=0.1", "--xattrs", "--xattrs-include=*"]),
        ("pax", ["--sparse", "--sparse-version=1.0", "--xattrs", "--xattrs-include=*"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "".join(value[:2]),
)
def test_what_gnu_tar_writes_is_read(form: str, options: list[str], tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    _tree(root, form)
    if "--sparse" not in options:
        (root / "hole").unlink(missing_ok=True)
    archive = tmp_path / "layer.tar"
    subprocess.run(["tar", "-C", root, f"--format={form}", *options, "-cf", archive, "."], check=True)
    raw = memoryview(archive.read_bytes())
    entries = {entry.path: entry for entry in parse(bytes(raw), step=10_000)}

    expected = {os.fsencode(path.relative_to(root)) for path in root.rglob("*")} | {b""}
    assert {path or b"" for path in entries} == {path if path != b"." else b"" for path in expected}
    for path, entry in entries.items():
        file = os.path.join(os.fsencode(root), path)
        if entry.kind is Kind.HARDLINK:
            assert os.path.samefile(file, os.path.join(os.fsencode(root), entry.target))
            continue
        status = os.lstat(file)
        mtime = status.st_mtime_ns if form == "pax" else status.st_mtime_ns // 10**9 * 10**9
        assert (entry.mode, entry.uid, entry.gid) == (status.st_mode & 0o7777, status.st_uid, status.st_gid), path
        assert entry.mtime == mtime, path
        if stat.S_ISREG(status.st_mode):
            assert (entry.kind, entry.size) == (Kind.FILE, status.st_size)
            if entry.size < 1 << 30:
                assert _content(raw, entry) == Path(os.fsdecode(file)).read_bytes(), path
        elif stat.S_ISDIR(status.st_mode):
            assert entry.kind is Kind.DIRECTORY
        elif stat.S_ISLNK(status.st_mode):
            assert (entry.kind, entry.target, entry.size) == (Kind.SYMLINK, os.readlink(file), status.st_size)
        elif stat.S_ISFIFO(status.st_mode):
            assert entry.kind is Kind.FIFO
        else:
            assert entry.kind is (Kind.BLOCK if stat.S_ISBLK(status.st_mode) else Kind.CHARACTER)
            assert (entry.major, entry.minor) == (os.major(status.st_rdev), os.minor(status.st_rdev))
        if form == "pax" and not stat.S_ISLNK(status.st_mode):
            attributes = {os.fsencode(name): os.getxattr(file, name) for name in os.listxattr(file)}
            assert dict(entry.xattrs) == attributes, path
    if "--sparse" in options:
        assert len(entries[b"sparse"].extents or ()) == 40
        assert entries[b"hole"].extents == ()
