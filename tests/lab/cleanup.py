"""A lab: one directory and one token; everything that is started under them can be found and removed by looking.

What lives here: `Lab`, `sweep`, `leak_check`, `clean_lab`, `signals_as_exceptions`. What never does: what a lab is used
for.

Clean-up keeps no books, because an interrupt may come between an act and its entry in the book. It looks instead:

    kind         how it is recognised
    process      DADI_LAB=<token> in its environment (children inherit it)
    mount        its mount point lies below the lab's directory
    namespace    a mount, of type nsfs, of those (made by tests/lab/network.py)
    loop device  its backing file lies below the lab's directory
    directory    named dadi-lab-<token>-…

A token is `<pid>-<start time>` of the process that made the lab, so that what a killed process left behind is known
to be left over (`sweep`) even after its pid has been used again.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import os
import re
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType

from tests.lab import bytecode

PREFIX = "dadi-lab-"
ENVIRONMENT = "DADI_LAB"
_TOKEN = re.compile(re.escape(PREFIX) + r"(\d+-\d+)-")
_MNT_FORCE, _MNT_DETACH, _UMOUNT_NOFOLLOW = 1, 2, 8
_LOOP_CLR_FD = 0x4C01
_libc = ctypes.CDLL(None, use_errno=True)

_Mine = Callable[[dict[str, str]], bool]
"""Decides from a process's environment whether it belongs to the lab."""


class Interrupted(SystemExit):
    """SIGTERM or SIGHUP came; raised in the main thread so that `with` blocks end. Exit status 128 + signal."""


class Lab:
    """A directory and a token for one run of something; leaving it removes all that was started under it.

    `root` is made below `base` (default: the directory for temporary files). Daemons get `environment` and keep all
    of their files, sockets and mount points below `root`. A process that does not end by SIGTERM within `patience`
    seconds is killed.
    """

    def __init__(self, purpose: str, base: Path | None = None, *, patience: float = 5.0) -> None:
        self.purpose = purpose
        self.base = base
        self.token = own_token()
        self.root = Path()
        self.patience = patience
        self.children: list[subprocess.Popen[bytes]] = []
        """Started by this process: to be waited for when they have been ended, nothing else."""

    def __repr__(self) -> str:
        return f"<Lab {self.purpose} at {self.root}>"

    @property
    def environment(self) -> dict[str, str]:
        """The environment for everything that is started in this lab: ours and the mark that finds it again."""
        mark = {ENVIRONMENT: self.token, "DADI_LAB_ROOT": str(self.root)}
        return {**os.environ, **bytecode.environment(), **mark}

    def __enter__(self) -> Lab:
        if self.base is not None:
            self.base.mkdir(parents=True, exist_ok=True)
        atexit.register(self.close)
        self.root = Path(tempfile.mkdtemp(prefix=f"{PREFIX}{self.token}-{self.purpose}-", dir=self.base)).resolve()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Remove everything that belongs to this lab; harmless when called again. Further signals wait until done."""
        with _signals_ignored():
            if self.root != Path():
                mine = str(self.root)
                _clean([self.root], lambda environment: environment.get("DADI_LAB_ROOT") == mine, self.patience)
            for child in self.children:
                if child.poll() is None:
                    child.terminate()  # not found by its environment: nginx writes its title over it
                with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the kernel: leak_check will tell
                    child.wait(5)
            self.root = Path()
            atexit.unregister(self.close)


def own_token() -> str:
    return f"{os.getpid()}-{_start_time(os.getpid())}"


def sweep(*bases: Path, patience: float = 5.0) -> list[str]:
    """Remove what labs of dead processes left: in the directory for temporary files and in each of `bases`.

    Returns what was found, for people to read.
    """
    found: list[str] = []
    places = [Path(tempfile.gettempdir()), *bases]
    roots = [p.resolve() for place in places if place.is_dir() for p in place.iterdir() if _left_over(p.name)]
    found += [f"directory {root}" for root in roots]
    found += [f"process {pid}" for pid in _processes(lambda e: not _token_alive(e.get(ENVIRONMENT, "")))]
    if found:
        with _signals_ignored():
            _clean(roots, lambda environment: not _token_alive(environment.get(ENVIRONMENT, "")), patience)
    return found


@dataclass(frozen=True)
class _Snapshot:
    mounts: frozenset[str]
    loops: frozenset[str]
    processes: frozenset[str]
    directories: frozenset[str]

    def differences(self, before: _Snapshot) -> list[str]:
        return [
            *(f"process {process}" for process in sorted(self.processes - before.processes)),
            *(f"mount {mount}" for mount in sorted(self.mounts - before.mounts)),
            *(f"loop device {loop}" for loop in sorted(self.loops - before.loops)),
            *(f"directory {directory}" for directory in sorted(self.directories - before.directories)),
        ]


@dataclass
class Leaks:
    """What `leak_check` found; complete when its block has ended."""

    found: list[str] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.found)


@contextlib.contextmanager
def leak_check(*roots: Path, patience: float = 5.0) -> Iterator[Leaks]:
    """Compare mounts, loop devices, lab processes and lab directories before and after the block.

    With `roots`, only what lies below one of them counts, so that others may use the machine at the same time; lab
    processes count when the process that made their lab is this one or dead, too. What the kernel takes down
    asynchronously gets `patience` seconds to go away.
    """
    leaks = Leaks()
    before = _snapshot(roots)
    yield leaks
    deadline = time.monotonic() + patience
    while (found := _snapshot(roots).differences(before)) and time.monotonic() < deadline:
        time.sleep(0.05)
    leaks.found = found


@contextlib.contextmanager
def clean_lab(purpose: str) -> Iterator[Lab]:
    """A lab in a directory of its own, of a short path (that of a unix socket has 107 bytes at most).

    Raises AssertionError if anything of it is left after its end.
    """
    base = Path(tempfile.mkdtemp(prefix="d")).resolve()
    try:
        with leak_check(base) as leaks, Lab(purpose, base) as lab:
            yield lab
        if leaks:
            raise AssertionError(f"left behind: {'; '.join(leaks.found)}")
    finally:
        with contextlib.suppress(OSError):  # what is left is not to be deleted through a mount
            base.rmdir()


@contextlib.contextmanager
def signals_as_exceptions() -> Iterator[None]:
    """Let SIGTERM and SIGHUP end the main thread's `with` blocks as SIGINT does, instead of ending the process."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(128 + number)

    numbers = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, stop) for number in numbers]
    # A shell starts background jobs with SIGINT ignored: whoever uses this wants to be interruptible all the same.
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        for number, handler in zip((*numbers, signal.SIGINT), (*before, interrupt), strict=True):
            signal.signal(number, handler)


def mounts_below(root: Path) -> list[tuple[str, str]]:
    """Return (mount point, file system type) of every mount at or below `root`, last mounted first."""
    found = []
    for line in Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines():
        fields, _, rest = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), fields.split(" ")[4]).removesuffix("//deleted")
        if _below(point, [root]):
            found.append((point, rest.split(" ")[0]))
    return found[::-1]


def loops() -> dict[str, str]:
    """Return the path of the backing file of every attached loop device, by the device's path."""
    found = {}
    for entry in Path("/sys/block").glob("loop*/loop/backing_file"):
        with contextlib.suppress(OSError):
            found[f"/dev/{entry.parts[3]}"] = entry.read_text().strip().removesuffix(" (deleted)")
    return found


def _clean(roots: list[Path], mine: _Mine, patience: float) -> None:
    # 1. processes: asked first, then killed; a FUSE server that is gone lets go of whoever waits for it
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        _end(mine, number, seconds)
    # 2. mounts, the last one first, and loop devices, in turn: each may keep the other busy. Detaching what is busy
    # comes last, since the files on it cannot be recognised by their paths any more.
    for detach in (False, False, True):
        for root in roots:
            for point, kind in mounts_below(root):
                _unmount(point, kind, detach=detach)
        for device, backing in loops().items():
            if _below(backing, roots):
                with contextlib.suppress(OSError), open(device, "rb") as file:
                    fcntl.ioctl(file, _LOOP_CLR_FD)
    # 3. directories: never through a mount that could not be taken down
    for root in roots:
        if not mounts_below(root):
            shutil.rmtree(root, ignore_errors=True)


def _end(mine: _Mine, number: int, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    signalled: set[int] = set()
    while pids := _processes(mine):
        for pid in set(pids) - signalled:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
            signalled.add(pid)
        if time.monotonic() > deadline:
            return
        time.sleep(0.02)


def _processes(mine: _Mine) -> list[int]:
    """Return live processes other than this one whose environment has the lab's mark and satisfies `mine`."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            environment = _environment(entry)
            if ENVIRONMENT in environment and mine(environment):
                found.append(int(entry.name))
    return found


def _environment(process: Path) -> dict[str, str]:
    try:
        data = (process / "environ").read_bytes()  # empty for zombies and kernel threads
    except OSError:
        return {}
    if f"{ENVIRONMENT}=".encode() not in data:
        return {}
    pairs = (item.partition("=") for item in data.decode(errors="surrogateescape").split("\0"))
    return {name: value for name, _, value in pairs}


def _unmount(point: str, kind: str, *, detach: bool) -> None:
    flags = [_UMOUNT_NOFOLLOW]
    if kind.startswith("fuse"):
        flags.append(_UMOUNT_NOFOLLOW | _MNT_FORCE)
    if detach:
        flags.append(_UMOUNT_NOFOLLOW | _MNT_DETACH)
    for flag in flags:
        if _libc.umount2(os.fsencode(point), flag) == 0:
            return


def _snapshot(roots: tuple[Path, ...]) -> _Snapshot:
    places = [Path(os.path.realpath(root)) for root in roots]

    def counts(environment: dict[str, str]) -> bool:
        token = environment[ENVIRONMENT]
        return token == own_token() or not _token_alive(token) or _below(environment.get("DADI_LAB_ROOT", ""), places)

    return _Snapshot(
        mounts=frozenset(f"{point} ({kind})" for place in places or [Path("/")] for point, kind in mounts_below(place)),
        # a backing file that has no path any more may have been below a root
        loops=frozenset(
            f"{d} on {b}" for d, b in loops().items() if not places or _below(b, places) or not os.path.lexists(b)
        ),
        processes=frozenset(f"{pid} ({_command(pid)})" for pid in _processes(counts)),
        directories=frozenset(
            str(p)
            for place in places or [Path(tempfile.gettempdir())]
            if place.is_dir()
            for p in place.iterdir()
            if p.name.startswith(PREFIX if places else f"{PREFIX}{own_token()}-") or _left_over(p.name)
        ),
    )


def _command(pid: int) -> str:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")[:120].strip()
    return "gone"


def _below(path: str, roots: Iterable[Path]) -> bool:
    return any(path == str(root) or path.startswith(f"{str(root).rstrip('/')}/") for root in roots)


def _left_over(name: str) -> bool:
    match = _TOKEN.match(name)
    return match is not None and not _token_alive(match[1])


def _token_alive(token: str) -> bool:
    pid, _, start = token.partition("-")
    return pid.isdigit() and _start_time(int(pid)) == start


def _start_time(pid: int) -> str:
    """Return field 22 of /proc/PID/stat, in clock ticks since boot; "" when there is no such process (or a zombie)."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]


@contextlib.contextmanager
def _signals_ignored() -> Iterator[None]:
    """Drop SIGINT, SIGTERM and SIGHUP for the time of the block; in other threads Python never raises them anyway."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [(number, signal.signal(number, signal.SIG_IGN)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            signal.signal(number, handler)
