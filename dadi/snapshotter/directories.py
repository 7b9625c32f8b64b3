"""What ordinary snapshots have on disk: directories, made, measured and deleted. Blocking; no database, no policy.

    ROOT/snapshots/ID/fs      a layer's files: what overlayfs takes as upper or lower directory
    ROOT/snapshots/ID/work    overlayfs' own, only where something is or was written

Nothing outside of an ID's directory is followed, changed or deleted.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import structlog

from dadi.blobs.files import full_or_broken
from dadi.errors import ConfigError
from dadi.node import kernel
from dadi.snapshotter.model import Usage

log = structlog.get_logger()
_INITIAL_USERS = ("0", "0", "4294967295")


class Directories:
    """The directories below ROOT/snapshots. Raises ConfigError where overlayfs could not take its path."""

    def __init__(self, root: Path) -> None:
        self.path = root / "snapshots"
        if any(character in str(self.path) for character in ':,\\"'):
            raise ConfigError(f"{self.path} cannot be in a mount's options", hint="a path without : , \\ and quotes")

    def __repr__(self) -> str:
        return f"Directories({self.path})"

    def prepare(self) -> None:
        """Make the directory for them all."""
        with self._told(self.path):
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)

    def upper(self, number: int) -> str:
        """Return the path of a snapshot's files."""
        return str(self.path / str(number) / "fs")

    def work(self, number: int) -> str:
        """Return the path of a snapshot's work directory."""
        return str(self.path / str(number) / "work")

    def make(self, number: int, *, work: bool) -> None:
        """Make a snapshot's directories, the root of its files for everybody to read. Raises StoreFull, Unavailable."""
        own = self.path / str(number)
        with self._told(own):
            own.mkdir(mode=0o700)
            os.mkdir(own / "fs")
            os.chmod(own / "fs", 0o755)  # whatever our umask is: it is the container's "/"
            if work:
                os.mkdir(own / "work", 0o711)

    def take_owner(self, number: int, like: str) -> None:
        """Give the root of a snapshot's files the owner of the directory `like`: that of its parent's root."""
        with self._told(self.path / str(number)):
            status = os.stat(like)
            if (status.st_uid, status.st_gid) != (os.geteuid(), os.getegid()):
                os.chown(self.upper(number), status.st_uid, status.st_gid)

    def usage(self, number: int) -> Usage:
        """Return what a snapshot's files take: allocated blocks, a file with several names once."""
        size = inodes = 0
        linked: set[tuple[int, int]] = set()
        for status in _walk(self.upper(number)):
            if status.st_nlink > 1 and (status.st_mode & 0o170000) != 0o040000:
                if (status.st_dev, status.st_ino) in linked:
                    continue
                linked.add((status.st_dev, status.st_ino))
            size += status.st_blocks * 512
            inodes += 1
        return Usage(size, inodes)

    def present(self) -> set[int]:
        """Return the ids whose directories are there."""
        with self._told(self.path):
            return {int(name) for name in os.listdir(self.path) if name.isdecimal() and name.isascii()}

    def delete(self, number: int) -> bool:
        """Delete a snapshot's directories; what cannot be is logged, and tried again at the next sweep."""
        failures: list[str] = []

        def failed(_: Any, path: str, info: Any) -> None:
            if not isinstance(info[1], FileNotFoundError):
                failures.append(f"{path}: {info[1]}")

        shutil.rmtree(self.path / str(number), onerror=failed)
        if failures:
            log.warning("could not delete a snapshot's files", snapshot=number, why=failures[0], times=len(failures))
        return not failures

    @contextlib.contextmanager
    def _told(self, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise full_or_broken(path, error) from None


def _walk(top: str) -> Iterator[os.stat_result]:
    """Yield the status of a directory and of all below it; what vanishes meanwhile is left out."""
    with contextlib.suppress(FileNotFoundError):
        yield os.lstat(top)
    waiting = [top]
    while waiting:
        try:
            entries = os.scandir(waiting.pop())
        except OSError as error:
            if error.errno in (errno.ENOENT, errno.EACCES, errno.ENOTDIR):
                continue
            raise
        with entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    yield entry.stat(follow_symlinks=False)
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(entry.path)


def overlay_options(root: Path, system: Path = Path("/")) -> tuple[str, ...]:
    """Return the options that every overlay of ours needs on this kernel.

    `userxattr` in a user namespace (trusted.* attributes cannot be set there; tmpfs has no user.* ones), and
    `index=off` where the kernel knows an index: one lower directory is shared by many mounts.
    """
    options = []
    users = (system / "proc/self/uid_map").read_text().split()
    if tuple(users) != _INITIAL_USERS and not _on_tmpfs(root, system / "proc/self/mountinfo"):
        options.append("userxattr")
    if (system / "sys/module/overlay/parameters/index").exists():
        options.append("index=off")
    return tuple(options)


def _on_tmpfs(path: Path, table: Path) -> bool:
    below = [mount for mount in kernel.mounts(table) if path.is_relative_to(mount.target)]
    return bool(below) and max(below, key=lambda mount: len(mount.target)).kind == "tmpfs"
