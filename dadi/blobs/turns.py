"""Reads that nobody waits for, in turns: so few at a time that who waits has little to get past.

For an upstream that is asked for runs and takes what comes (superpeers, where there are no peers: with peers
`dadi/peers/pipe.py` does this). A demand never waits here. What is less urgent has at most `parallel` reads under way,
the more urgent first, then who came first; what somebody comes to wait for while it stands in the queue goes at once
(`hurry`). With reads of one chunk each, which `Chain` makes of what is not demand, what a demand may have to wait for
is one chunk's transfer.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools

from dadi.blobs.source import Source, Urgency
from dadi.index.chunks import Blob

PARALLEL = 24
"""Chunks under way: 6 MiB, enough for 10 Gbit/s at 5 ms; fewer than the connections to a superpeer."""
_Waiting = tuple[int, int, Blob, range, "asyncio.Future[bool]"]


class Turns:
    """A source around `source`; see the head of this file."""

    def __init__(self, source: Source, parallel: int = PARALLEL) -> None:
        self.source = source
        self._free = parallel
        self._queue: list[_Waiting] = []
        self._numbers = itertools.count()

    def __repr__(self) -> str:
        return f"Turns({self.source!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run."""
        if urgency == Urgency.DEMAND or not await self._turn(blob, chunks, urgency):
            return await self.source.read(blob, chunks, Urgency.DEMAND)
        try:
            return await self.source.read(blob, chunks, urgency)
        finally:
            self._pass_on()

    async def _turn(self, blob: Blob, chunks: range, urgency: Urgency) -> bool:
        """Wait for a turn, which is to be passed on; return False for who has become urgent, and needs none."""
        if self._free:
            self._free -= 1
            return True
        turn: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._queue, (int(urgency), next(self._numbers), blob, chunks, turn))
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.result():
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        while self._queue:
            turn = heapq.heappop(self._queue)[-1]
            if not turn.done():
                turn.set_result(True)
                return
        self._free += 1

    def hurry(self, blob: Blob, chunks: range) -> None:
        """Somebody waits for these chunks by now."""
        for _, _, other, run, turn in self._queue:
            if other == blob and not turn.done() and run.start < chunks.stop and chunks.start < run.stop:
                turn.set_result(False)
