"""Directory trees as layers: what a tree holds, and the layer that turns one tree into another.

What lives here: `scan`, and `write_difference`, which writes what has changed between two scans of the same tree as
an OCI layer (OCI image specification, "Image Layer Filesystem Changeset"). What never does: how trees come about.

    between the scans                       in the layer
    new, or other type, content, mode …     the member itself
    gone                                    .wh.NAME in its directory (once, for the topmost of what is gone)
    a directory, but another one            the directory, .wh..wh..opq inside it, and all it holds
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path

WHITEOUT = ".wh."
OPAQUE = ".wh..wh..opq"
STAMP = 1_735_689_600  # 2025-01-01


@dataclass(frozen=True)
class Item:
    """What lstat(2), readlink(2) and the extended attributes say about one path."""

    inode: int
    mode: int
    uid: int
    gid: int
    size: int
    mtime_ns: int
    links: int
    device: int
    target: str
    xattrs: tuple[tuple[str, bytes], ...]

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)

    def changed_from(self, other: Item) -> bool:
        """Whether a layer has to say it again; a link count follows from the links that the layer makes or removes."""
        return replace(self, links=0) != replace(other, links=0)


Tree = Mapping[str, Item]
"""Paths relative to the root, sorted so that a directory comes before what it holds; the root itself is not in it."""


def scan(root: Path) -> Tree:
    """Read a tree without following a symlink or leaving its file system."""
    device = root.lstat().st_dev

    def walk(directory: str) -> Iterator[tuple[str, Item]]:
        for entry in sorted(os.scandir(root / directory), key=lambda e: e.name):
            path = os.path.join(directory, entry.name)
            item = _item(entry.path)
            yield path, item
            if item.is_directory and os.lstat(entry.path).st_dev == device:
                yield from walk(path)

    return dict(walk(""))


def size_and_count(tree: Tree) -> tuple[int, int]:
    """Return the bytes in regular files (hard links once) and the number of paths."""
    files = {item.inode: item.size for item in tree.values() if stat.S_ISREG(item.mode)}
    return sum(files.values()), len(tree)


def write_difference(tar: tarfile.TarFile, root: Path, before: Tree, after: Tree, *, started: float) -> None:
    """Write the layer that turns `before` into `after`, whose files are at `root`.

    What is newer than `started` (seconds since 1970) was made by building the tree: it gets the time `STAMP`, so that
    building it again gives the same layer.
    """
    first_of_inode: dict[int, str] = {}
    opaque: set[str] = set()
    for path, item in sorted([*after.items(), *_gone(before, after)], key=lambda pair: pair[0].split("/")):
        name = os.path.basename(path)
        if item is None:
            tar.addfile(_whiteout(os.path.join(os.path.dirname(path), WHITEOUT + name)))
            continue
        old = before.get(path)
        inside_opaque = os.path.dirname(path) in opaque
        replaced = item.is_directory and old is not None and old.is_directory and old.inode != item.inode
        if inside_opaque and item.is_directory:
            opaque.add(path)
        if not inside_opaque and not replaced and old is not None and not item.changed_from(old):
            continue
        _add(tar, root, path, item, first_of_inode, started)
        if replaced and not inside_opaque:
            opaque.add(path)
            tar.addfile(_whiteout(os.path.join(path, OPAQUE)))


def _gone(before: Tree, after: Tree) -> Iterator[tuple[str, None]]:
    """Yield the topmost paths that a layer has to remove by name."""
    for path in before:
        parent = os.path.dirname(path)
        if path in after:
            continue
        if parent == "":
            yield path, None
        elif parent in after and after[parent].is_directory and before[parent].inode == after[parent].inode:
            yield path, None


def _add(
    tar: tarfile.TarFile, root: Path, path: str, item: Item, first_of_inode: dict[int, str], started: float
) -> None:
    info = tarfile.TarInfo(path)
    info.mode, info.uid, info.gid = stat.S_IMODE(item.mode), item.uid, item.gid
    seconds, nanoseconds = divmod(item.mtime_ns, 10**9)
    if seconds >= int(started):
        seconds, nanoseconds = STAMP, 0
    info.mtime = seconds
    pax: dict[str, str] = {}
    if nanoseconds:  # as a string: tarfile would write a float, which cannot hold nanoseconds
        pax["mtime"] = str(Decimal(seconds * 10**9 + nanoseconds).scaleb(-9))
    for name, value in item.xattrs:
        pax[f"SCHILY.xattr.{name}"] = value.decode("utf-8", "surrogateescape")
    info.pax_headers = pax
    kinds = {
        stat.S_IFDIR: tarfile.DIRTYPE,
        stat.S_IFLNK: tarfile.SYMTYPE,
        stat.S_IFCHR: tarfile.CHRTYPE,
        stat.S_IFBLK: tarfile.BLKTYPE,
        stat.S_IFIFO: tarfile.FIFOTYPE,
        stat.S_IFREG: tarfile.REGTYPE,
    }
    kind = kinds.get(stat.S_IFMT(item.mode))
    if kind is None:  # sockets: a layer cannot hold them
        return
    info.type = kind
    info.linkname = item.target
    info.devmajor, info.devminor = os.major(item.device), os.minor(item.device)
    if item.links > 1 and not item.is_directory:
        first = first_of_inode.setdefault(item.inode, path)
        if first != path:
            info.type, info.linkname = tarfile.LNKTYPE, first
    if info.type == tarfile.REGTYPE:
        info.size = item.size
        with (root / path).open("rb") as file:
            tar.addfile(info, file)
    else:
        tar.addfile(info)


def _whiteout(path: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(path)
    info.mode = 0o644
    return info


def _item(path: str) -> Item:
    status = os.lstat(path)
    link = stat.S_ISLNK(status.st_mode)
    names = sorted(os.listxattr(path, follow_symlinks=False))
    return Item(
        inode=status.st_ino,
        mode=status.st_mode,
        uid=status.st_uid,
        gid=status.st_gid,
        size=0 if stat.S_ISDIR(status.st_mode) else status.st_size,
        mtime_ns=status.st_mtime_ns,
        links=status.st_nlink,
        device=status.st_rdev if stat.S_ISCHR(status.st_mode) or stat.S_ISBLK(status.st_mode) else 0,
        target=os.readlink(path) if link else "",
        xattrs=tuple((name, os.getxattr(path, name, follow_symlinks=False)) for name in names),
    )
