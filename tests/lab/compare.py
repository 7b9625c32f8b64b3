"""Directory trees as values that can be compared: what stat(2), readlink(2), xattrs and the content say.

What lives here: `Facts` of one path, `snapshot_of` a directory, `differences` between two snapshots, and `unpacked`,
the ordinary unpack that ours are compared with. What never does: how other trees came about. The device and inode
numbers, sizes of directories, numbers of blocks, atime and ctime are left out: they belong to the file system, not to
the tree.
"""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Container, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple

from tests.lab.oci_layout import Image

PIECE = 64 << 10


class Facts(NamedTuple):
    """What is at one path. Sizes in bytes (0 unless it is a file or a symlink), `mtime` in ns since 1970."""

    kind: str
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    links: int
    first_link: bytes
    """The first, in sorting order, of the paths in the tree that are links to the same inode."""
    target: bytes
    device: tuple[int, int]
    xattrs: tuple[tuple[str, bytes], ...]
    content: str
    """`content_digest` of a file; "" for everything else."""


Snapshot = Mapping[bytes, Facts]
"""By path relative to the root, b"" for the root itself."""

KINDS = {
    stat.S_IFREG: "file",
    stat.S_IFDIR: "directory",
    stat.S_IFLNK: "symlink",
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "fifo",
    stat.S_IFSOCK: "socket",
}


def snapshot_of(root: Path | str) -> dict[bytes, Facts]:
    """Read a whole tree, without following symlinks and without leaving its file system."""
    top = os.fsencode(root)
    device = os.lstat(top).st_dev
    found: dict[bytes, Facts] = {}
    first_link: dict[int, bytes] = {}
    todo = [b""]
    while todo:
        path = todo.pop()
        full = os.path.join(top, path) if path else top
        status = os.lstat(full)
        if stat.S_ISDIR(status.st_mode) and status.st_dev == device:
            todo += [os.path.join(path, name) for name in os.listdir(full)]
        elif status.st_nlink > 1:
            first_link[status.st_ino] = min(path, first_link.get(status.st_ino, path))
        found[path] = _facts(full, status)
    return {
        path: facts if facts.first_link == b"" else facts._replace(first_link=first_link[int(facts.first_link)])
        for path, facts in sorted(found.items())
    }


def differences(ours: Snapshot, theirs: Snapshot, *, untimed: Container[bytes] = ()) -> list[str]:
    """Return a sentence for each path and attribute in which two trees differ.

    The mtime of the paths in `untimed` is not compared: for directories that an unpacker made by itself, and so has
    given the time of day.
    """
    found = [f"{path!r}: only in the first ({ours[path].kind})" for path in sorted(ours.keys() - theirs.keys())]
    found += [f"{path!r}: only in the second ({theirs[path].kind})" for path in sorted(theirs.keys() - ours.keys())]
    for path in sorted(ours.keys() & theirs.keys()):
        for name, mine, other in zip(Facts._fields, ours[path], theirs[path], strict=True):
            if mine != other and not (name == "mtime" and path in untimed):
                show = (oct(mine), oct(other)) if name == "mode" else (repr(mine), repr(other))
                found.append(f"{path!r}: {name}: {show[0][:200]} against {show[1][:200]}")
    return found


def content_digest(pieces: Iterable[tuple[int, bytes]]) -> str:
    """Return a digest of a file's content that does not depend on where its holes are.

    `pieces` are (offset, bytes) in order, offsets being multiples of PIECE and all but the last PIECE long; those that
    are all zeros may be left out.
    """
    digest = hashlib.sha256()
    for offset, piece in pieces:
        if piece.count(0) != len(piece):
            digest.update(offset.to_bytes(8, "little") + piece)
    return digest.hexdigest()


def _facts(path: bytes, status: os.stat_result) -> Facts:
    kind = KINDS[stat.S_IFMT(status.st_mode)]
    shared = kind != "directory" and status.st_nlink > 1
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return Facts(
        kind=kind,
        mode=stat.S_IMODE(status.st_mode),
        uid=status.st_uid,
        gid=status.st_gid,
        size=status.st_size if kind in ("file", "symlink") else 0,
        mtime=status.st_mtime_ns,
        links=status.st_nlink,
        first_link=str(status.st_ino).encode() if shared else b"",  # `snapshot_of` puts the path in
        target=os.readlink(path) if kind == "symlink" else b"",
        device=(os.major(status.st_rdev), os.minor(status.st_rdev)) if kind.endswith("device") else (0, 0),
        xattrs=tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names),
        content=content_digest(_pieces(path, status.st_size)) if kind == "file" else "",
    )


def _pieces(path: bytes, size: int) -> Iterable[tuple[int, bytes]]:
    file = os.open(path, os.O_RDONLY)
    try:
        at = 0
        while at < size:
            try:
                at = os.lseek(file, at, os.SEEK_DATA) // PIECE * PIECE
            except OSError:  # ENXIO: nothing but a hole from here on
                return
            yield at, os.pread(file, PIECE, at)
            at += PIECE
    finally:
        os.close(file)


def unpacked(image: Image, bundle: Path) -> Path:
    """Unpack an image by umoci, which knows no zstd, into a new directory; return its root directory.

    Raises subprocess.CalledProcessError.
    """
    subprocess.run(["umoci", "unpack", "--image", f"{image.layout}:{image.tag}", bundle], check=True,
                   capture_output=True)  # fmt: skip
    return bundle / "rootfs"
