"""One fetch per chunk per process; the fetch outlives the reader that started it.

A run is split: chunks that somebody is fetching already are waited for, the others are fetched as runs, by tasks that
belong to this object and not to the reader. So a reader may be cancelled without harm to those who wait for the same
chunk. Sits *outside* of what keeps chunks: else N readers would write N times.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from itertools import groupby

from dadi.blobs.source import Source, Urgency
from dadi.index.chunks import Blob

_Key = tuple[str, int, int]
"""Digest, chunk size, chunk: a number means other bytes where chunks have another size."""


class SingleFlight:
    """A source around `source`; see the head of this file.

    `by_chunk`: each chunk is fetched, and kept, by itself; who waits for the first of a run has it before the last one
    has come. That is what lets a node pass on to others what it is still getting; whoever is asked joins them again.
    """

    def __init__(self, source: Source, *, by_chunk: bool = False, demand_joined: bool = False) -> None:
        """`demand_joined`: with `by_chunk`, that what somebody waits for is fetched as runs all the same."""
        self.source = source
        self._by_chunk = by_chunk
        self._demand_joined = demand_joined
        self.joined = 0
        """Chunks that were waited for instead of fetched a second time."""
        self._in_flight: dict[_Key, asyncio.Future[bytes]] = {}
        self._urgency: dict[_Key, Urgency] = {}
        """Of what is in flight: that of whoever waits most urgently."""
        self._tasks: set[asyncio.Task[list[bytes]]] = set()

    def __repr__(self) -> str:
        return f"SingleFlight({self.source!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run, each of its chunks fetched by whoever was first to ask."""
        return list(await asyncio.gather(*map(asyncio.shield, self.begin(blob, chunks, urgency))))

    def begin(self, blob: Blob, chunks: range, urgency: Urgency) -> list[asyncio.Future[bytes]]:
        """Have what is not in flight fetched; return a future for each chunk, which is not to be cancelled."""
        keys = [_key(blob, chunk) for chunk in chunks]
        new = [chunk for chunk, key in zip(chunks, keys, strict=True) if key not in self._in_flight]
        self.joined += len(chunks) - len(new)
        for key in keys:
            self._urgency[key] = min(urgency, self._urgency.get(key, urgency))
        apart = self._by_chunk and not (self._demand_joined and urgency == Urgency.DEMAND)
        for run in [range(chunk, chunk + 1) for chunk in new] if apart else runs(new):
            self._take_off(blob, run, urgency)
        return [self._in_flight[key] for key in keys]

    def wanted(self, blob: Blob, chunks: range, urgency: Urgency) -> Urgency:
        """Return how urgently chunks in flight are wanted by now."""
        return min((self._urgency.get(_key(blob, chunk), urgency) for chunk in chunks), default=urgency)

    def _take_off(self, blob: Blob, run: range, urgency: Urgency) -> None:
        loop = asyncio.get_running_loop()
        for chunk in run:
            self._in_flight[_key(blob, chunk)] = loop.create_future()
        task = loop.create_task(self._source_read(blob, run, urgency))
        self._tasks.add(task)
        # A callback and not code of the task: it runs also for a task that was cancelled before it began.
        task.add_done_callback(partial(self._landed, blob, run))

    async def _source_read(self, blob: Blob, run: range, urgency: Urgency) -> list[bytes]:
        return await self.source.read(blob, run, urgency)

    def _landed(self, blob: Blob, run: range, task: asyncio.Task[list[bytes]]) -> None:
        self._tasks.discard(task)
        for place, chunk in enumerate(run):
            future = self._in_flight.pop(_key(blob, chunk))
            self._urgency.pop(_key(blob, chunk), None)
            if task.cancelled():
                future.cancel()
            elif error := task.exception():
                future.set_exception(error)
                future.exception()  # looked at: it is no fault if every reader has gone
            else:
                future.set_result(task.result()[place])

    async def close(self) -> None:
        """Cancel what is in flight; its readers get CancelledError."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _key(blob: Blob, chunk: int) -> _Key:
    return blob.digest, blob.table.chunk_size, chunk


def runs(chunks: Sequence[int]) -> list[range]:
    """Return ascending numbers as runs of neighbours: [1, 2, 5] gives [range(1, 3), range(5, 6)]."""
    if isinstance(chunks, range):
        return [chunks] if chunks else []
    found = []
    for _, group in groupby(enumerate(chunks), lambda pair: pair[1] - pair[0]):
        members = [chunk for _, chunk in group]
        found.append(range(members[0], members[-1] + 1))
    return found
