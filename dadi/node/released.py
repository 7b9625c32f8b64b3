"""Mount points that were freed while no dadi-node answered, and how the next one hears of it.

    RUN/released/NAME     NAME: SHA-256 of the mount point, 32 digits; the content is the mount point

What lives here: `free`, which is what `dadi umount --force` does then, and `Released`, which a node asks at its start:
it ends what was freed, and does not mount it again. What never does: a node that answers, which unmounts by itself.

A mount vanishes from the tree at once. Who reads it still waits for its bytes: nobody else has the other end of them.
The next process fails these reads, since nothing wants their devices any more (`Mounts.restore`).
"""

from __future__ import annotations

import hashlib
import os
import time
from pathlib import Path

from dadi.blobs.layout import write_durably
from dadi.errors import Conflict, DadiError, NotFound, Unavailable
from dadi.node import kernel, loop

_LONGEST = 30.0
"""Seconds until the mount must have vanished."""
_FREED, _NOT_FREED = 0, 1


class Released:
    """What was freed, below a node's RUN."""

    def __init__(self, run: Path) -> None:
        self._directory = run / "released"

    def __contains__(self, directory: str) -> bool:
        return self._file(directory).exists()

    def add(self, directory: str) -> None:
        """Write down that a mount point (a real path) was freed. Raises OSError."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        write_durably(self._file(directory), os.fsencode(directory))

    def forget(self, directory: str) -> None:
        """It is ended, or used again."""
        self._file(directory).unlink(missing_ok=True)

    def _file(self, directory: str) -> Path:
        return self._directory / hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]


def free(run: Path, directory: str) -> None:
    """Take an image's mount away though its node, whose RUN is given, does not answer.

    Raises NotFound if nothing is mounted there, Conflict if it is no image, Unavailable if the kernel does not let go,
    or, the mount being gone, if no word could be left for the next node.
    """
    path = os.path.join(os.path.realpath(os.path.dirname(directory)), os.path.basename(directory))
    there = kernel.mounted_at(path)
    if there is None:
        raise NotFound(f"nothing is mounted at {path}", hint="findmnt -t erofs lists the images that are")
    if there.kind != "erofs" or not _is_ours(run, loop.backing_file(there.source) or ""):
        hint = "umount(8) takes it away; another node's: name that one with --node-socket"
        raise Conflict(f"what is mounted at {path} is not this node's: {there.kind} of {there.source}", hint=hint)
    untold = ""
    try:
        Released(run).add(path)
    except OSError as error:  # a full disk must not keep a mount from being taken away
        untold = f"no word could be left in {run}: {error.strerror}"
    try:
        _detach(path, there.id)
    except DadiError:
        if not untold:
            Released(run).forget(path)
        raise
    if untold:
        hint = "`dadi umount` it once more when dadi-node runs: it will mount the image again"
        raise Unavailable(f"{path} was taken away, but the next dadi-node does not know: {untold}", hint=hint)


def _is_ours(run: Path, file: str) -> bool:
    """Say whether a device's file is a blob: in the node's FUSE mount, or in a store (the node knows which)."""
    return file.startswith(f"{run.resolve()}/fuse/") or "/store/blobs/" in file


def _detach(path: str, mount_id: int) -> None:
    """Detach in a process of its own: a last reference that ends waits in the kernel for pages that are being read."""
    child = os.fork()
    if child == 0:
        _in_child(path)
    deadline = time.monotonic() + _LONGEST
    status = None
    while any(mount.id == mount_id for mount in kernel.mounts()):
        if status is None:
            ended, status = os.waitpid(child, os.WNOHANG)
            status = status if ended else None
        if status or time.monotonic() > deadline:
            raise Unavailable(f"the kernel does not let go of {path}", hint="`dmesg` may say why")
        time.sleep(0.01)


def _in_child(path: str) -> None:
    status = _NOT_FREED
    try:
        os.setsid()
        nothing = os.open(os.devnull, os.O_RDWR)
        for descriptor in range(3):
            os.dup2(nothing, descriptor)  # who waits for our caller's output must not wait for us
        kernel.umount(path, detach=True)
        status = _FREED
    except (DadiError, OSError):
        pass
    finally:
        os._exit(status)
