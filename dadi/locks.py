"""One process at a time in a directory, also when the one before is dead but cannot end yet.

A killed process keeps its descriptors, and so its locks, until its last thread has left the kernel. A thread that
waits there for a read of a lazy image leaves only when the read is answered: by the process that wants the lock. So
`lock.holder` names the holder (a link to "PID-START", start in clock ticks since boot, which takes no room on a full
disk); where that process is *dying* (its first thread has ended, none of its code will run again), another file is
locked and put in the place of `lock`. The file of the one that is dying stays, as `lock.dying-N`, until somebody finds
that it is gone: several may be dying at once, where each successor was killed too.

Whoever looks at the lock's file or replaces it holds the lock on the directory meanwhile: never for long.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from pathlib import Path

from dadi.errors import Conflict


class Lock:
    """A lock that we hold. `dying`: open locks of processes before us that may still have calls in the kernel."""

    def __init__(self, fd: int, dying: list[int]) -> None:
        self._fd = fd
        self._dying = dying

    @property
    def predecessor_is_dying(self) -> bool:
        """Whether one before us was dead, and not yet gone, when we looked last; this looks again."""
        for fd in list(self._dying):
            if _locked(fd):
                os.close(fd)
                self._dying.remove(fd)
        return bool(self._dying)

    def release(self) -> None:
        """Let another process have it. Idempotent."""
        for fd in (*self._dying, self._fd):
            if fd >= 0:
                os.close(fd)
        self._fd = -1
        self._dying.clear()


def take(directory: Path, hint: str) -> Lock:
    """Return the lock on a directory (its file is `lock`); raise Conflict if a process that lives has it. Blocks."""
    path, holder = directory / "lock", directory / "lock.holder"
    both = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(both, fcntl.LOCK_EX)
        fd, dying = _open(path), []
        try:
            if not _locked(fd):
                if not _is_dying(holder):
                    raise Conflict(f"{directory} is used by another process, whose PID {holder} links to", hint=hint)
                dying.append(fd)
                fd = -1
                new = path.with_name("lock.new")
                new.unlink(missing_ok=True)
                fd = _open(new)
                _locked(fd)
                with suppress(OSError):  # a full disk: then the one after us does not know of it
                    os.link(path, path.with_name(f"lock.dying-{os.fstat(dying[0]).st_ino}"))
                os.rename(new, path)
            dying += _of_the_dying(directory, {os.fstat(each).st_ino for each in dying})
            with suppress(OSError):  # then the next one waits until we are gone
                holder.with_name("holder.new").unlink(missing_ok=True)
                os.symlink(f"{os.getpid()}-{_stat(os.getpid())[1]}", holder.with_name("holder.new"))
                os.rename(holder.with_name("holder.new"), holder)
        except BaseException:
            Lock(fd, dying).release()
            raise
        return Lock(fd, dying)
    finally:
        os.close(both)


def _of_the_dying(directory: Path, known: set[int]) -> list[int]:
    """Return the locks of those that are still dying, but for `known` inodes; throw away those of who is gone."""
    dying = []
    for path in directory.glob("lock.dying-*"):
        fd = _open(path)
        if _locked(fd):
            path.unlink(missing_ok=True)
        elif os.fstat(fd).st_ino not in known:
            dying.append(fd)
            continue
        os.close(fd)
    return dying


def _locked(fd: int) -> bool:
    """Lock, or say that somebody else has it locked."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)


def _is_dying(holder: Path) -> bool:
    """Say whether a lock's holder has ended but for threads that are stuck in the kernel."""
    try:
        pid, _, start = os.readlink(holder).partition("-")
    except OSError:
        return False
    return pid.isdigit() and start != "" and _stat(int(pid)) == ("Z", start)


def _stat(pid: int) -> tuple[str, str]:
    """Return state and start time (clock ticks since boot) of a process; see proc_pid_stat(5)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "", ""
    return fields[0], fields[19]
