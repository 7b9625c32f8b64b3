"""`dadi-node` on a machine that fails it, where the kernel has nothing that would: below `os`, `fcntl` and `time`.

`DIRECTORY/injury` (JSON, beside the configuration) says what is wrong at the moment; without it nothing is.

    {"errno": "EIO", "share": 0.3, "calls": ["pread", …]}   so many of these calls on files of the state fail
    {"clock": seconds}                                      time.time() is so far off (the monotonic clock never jumps)
    {"loops": 0}                                            no loop device is free
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dadi.node import main as node
from dadi.node.loop import LOOP_CTL_GET_FREE

READS = ("pread", "preadv", "sendfile")
WRITES = ("pwrite", "ftruncate", "fsync", "fdatasync", "rename", "mkdir")
LOOKED_AT_EVERY = 0.02


class _Injury:
    """What the file says now."""

    def __init__(self, directory: Path) -> None:
        self._file, self._state = directory / "injury", f"{directory / 'state'}/"
        self._looked, self._now = 0.0, {}  # type: float, dict[str, Any]
        self._monotonic = time.monotonic
        self._looking = threading.Lock()

    def now(self) -> dict[str, Any]:
        with self._looking:  # else a thread that was held up between reading and telling would tell of an old injury
            if self._monotonic() - self._looked > LOOKED_AT_EVERY:
                self._looked = self._monotonic()
                try:
                    self._now = json.loads(self._file.read_bytes())
                except (OSError, ValueError):
                    self._now = {}
            return self._now

    def hits(self, call: str, what: object) -> bool:
        now = self.now()
        if call not in now.get("calls", ()) or random.random() >= now["share"]:
            return False
        try:
            path = os.readlink(f"/proc/self/fd/{what}") if isinstance(what, int) else os.fspath(what)
        except OSError:
            return False
        return str(path).startswith(self._state)


def _failing(injury: _Injury, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
    file = 1 if name == "sendfile" else 0  # sendfile(to, from, …)

    def instead(*arguments: Any, **options: Any) -> Any:
        if injury.hits(name, arguments[file]):
            number = getattr(errno, injury.now()["errno"])
            raise OSError(number, os.strerror(number))
        return call(*arguments, **options)

    return instead


def main(arguments: list[str]) -> None:
    """As dadi.node.main."""
    injury = _Injury(Path(arguments[arguments.index("--config") + 1]).parent)
    for name in (*READS, *WRITES):
        setattr(os, name, _failing(injury, name, getattr(os, name)))
    clock, ioctl = time.time, fcntl.ioctl

    def free(fd: Any, request: int, *more: Any) -> Any:
        if request == LOOP_CTL_GET_FREE and injury.now().get("loops") == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return ioctl(fd, request, *more)

    time.time = lambda: clock() + injury.now().get("clock", 0.0)
    fcntl.ioctl = free
    node.main(arguments)
