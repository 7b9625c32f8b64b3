"""Who is waiting now: lets backfill begin after a quiet period and stand aside for programs.

A replay of a startup trace is no quiet: what it fetches is about to be waited for.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dadi.index.chunks import Blob


class Demand:
    """Reads by the kernel that wait for chunks; all times in seconds of a monotonic clock."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._idle = asyncio.Event()
        self._idle.set()
        self.pending = 0
        self.total = 0
        self.last = clock()
        self.replays = 0
        self.on_miss: Callable[[Blob, range], None] = lambda blob, chunks: None
        """Told which chunks a read waits for."""

    @contextmanager
    def replaying(self) -> Iterator[None]:
        """A startup trace is replayed inside of this."""
        self.replays += 1
        try:
            yield
        finally:
            self.replays -= 1
            self.last = self._clock()

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """A read waits inside of this."""
        self.pending += 1
        self.total += 1
        self.last = self._clock()
        self._idle.clear()
        try:
            yield
        finally:
            self.pending -= 1
            self.last = self._clock()
            if not self.pending:
                self._idle.set()

    def quiet_for(self) -> float:
        """Return the seconds since a read last waited, or a replay ended; 0 while there is one."""
        return 0.0 if self.pending or self.replays else self._clock() - self.last

    async def idle(self) -> None:
        """Return when no read waits."""
        await self._idle.wait()
