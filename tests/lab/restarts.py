"""A node that comes and goes under load, as processes: readers that never stop, and who holds /dev/fuse meanwhile.

What lives here: `Readers`, which compare every byte with what they know it to be, without the page cache's help;
`Machine`, a node that is killed and started again; and finding keepers. What never does: assertions, but that a reader
ends.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from functools import partial
from pathlib import Path

from tests.lab.cleanup import Lab
from tests.lab.mounting import in_thread
from tests.lab.processes import Node
from tests.lab.services import CHUNK


class Readers:
    """Threads that read files at random places and compare; `failed` and `wrong` say where."""

    def __init__(self, files: dict[Path, bytes], threads: int) -> None:
        self.reads, self.longest = 0, 0.0
        self.failed: list[str] = []
        self.wrong: list[str] = []
        self._stop = threading.Event()
        self._files = list(files.items())
        self._threads = [threading.Thread(target=self._run, args=(n,), daemon=True) for n in range(threads)]

    async def __aenter__(self) -> Readers:
        for thread in self._threads:
            thread.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            await in_thread(partial(thread.join, 60))  # the superpeer is in this process, and may have to answer yet
        assert not any(thread.is_alive() for thread in self._threads), "a read waits for ever"

    def _run(self, seed: int) -> None:
        chance = random.Random(seed)
        while not self._stop.is_set():
            path, content = chance.choice(self._files)
            offset, length = chance.randrange(len(content)), chance.choice((10, 5000, 3 * CHUNK))
            began = time.monotonic()
            try:
                fd = os.open(path, os.O_RDONLY)
                try:
                    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
                    data = os.pread(fd, length, offset)
                finally:
                    os.close(fd)
            except OSError as error:
                self.failed.append(f"{path} at {offset}: {error}")
                continue
            if data != content[offset : offset + length]:
                self.wrong.append(f"{path} at {offset}")
            self.reads += 1
            self.longest = max(self.longest, time.monotonic() - began)
            time.sleep(0.03)  # the processors are for the node, too


class Machine:
    """A node that can be killed and started again."""

    def __init__(self, lab: Lab, url: str) -> None:
        self._lab, self._url = lab, url
        self.node = self._node()

    def _node(self) -> Node:
        # No options: a restart that harms no read must not need to be asked for.
        return Node(self._lab, None, [self._url], sections="[backfill]\nenabled = false\n"
                    "[read]\npatience = 60\n[snapshotter]\nenabled = false\n[peers]\nenabled = false\n")  # fmt: skip

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.node.popen.pid, signal.SIGKILL)

    def start(self) -> None:
        self.node = self._node()

    def told(self) -> dict[str, int]:
        """Return how often the log has an event."""
        counts: dict[str, int] = {}
        for event in self.node.events():
            counts[event.get("event", "")] = counts.get(event.get("event", ""), 0) + 1
        return counts


def keepers(root: Path) -> list[int]:
    """Return the keepers below a directory."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit():
                command = (entry / "cmdline").read_bytes().split(b"\0")
                if any(part.endswith(b"keeper/process.py") for part in command):
                    found += [int(entry.name)] * any(part.startswith(os.fsencode(root)) for part in command)
    return found
