"""One fetch per chunk, the most urgent first, neighbours in one request.

For a source where each request is dear (a registry): at most `parallel` reads of it are under way. What else is wanted
waits in a queue. When a read ends, the most urgent chunk that waits is taken, those that waited longest first, together
with all its neighbours that wait with the same urgency, up to `largest` bytes. Who asks for a chunk that others wait
for waits with them; if he is in a greater hurry, a chunk that is still in the queue moves up.

Work that nobody waits for has at most half of the reads, and what a starting program will want at most three quarters,
so that demand always finds the way free. What may happen to a
demand whose chunk is being read for nobody: it waits for the whole of that read, which is why such a read has at most
`patient` bytes; or, with `overtake`, it is read once more, alone. That is for a source that has a queue of its own,
below, in which the first read waits, and which fetches nothing twice.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Coroutine, Iterable
from functools import partial
from typing import Any

import msgspec

from dadi.blobs.source import Source, Urgency
from dadi.errors import Unavailable
from dadi.index.chunks import Blob

_Key = tuple[str, int, int]
"""Digest, chunk size, chunk."""
_QUARTERS = {Urgency.STARTUP: 3, Urgency.PREFETCH: 2, Urgency.BACKFILL: 2}
"""How much of the reads that are not demand may be under way for one more of this class to begin."""


class _Wanted(msgspec.Struct, eq=False):
    """One chunk that somebody waits for."""

    blob: Blob
    chunk: int
    urgency: Urgency
    landed: asyncio.Future[bytes]
    under_way: bool = False

    @property
    def key(self) -> _Key:
        return self.blob.digest, self.blob.table.chunk_size, self.chunk


class Joined:
    """A source around `source`; see the head of this file. `patient` of 0 means `largest`."""

    def __init__(
        self, source: Source, *, parallel: int, largest: int, patient: int = 0, overtake: bool = False
    ) -> None:
        self.source = source
        self.reads = 0
        """How often `source` was asked."""
        self.joined = 0
        """Chunks that were waited for instead of fetched a second time."""
        self._parallel = parallel
        self._largest = largest
        self._patient = patient or largest
        self._overtake = overtake
        self._wanted: dict[_Key, _Wanted] = {}
        self._queue: list[tuple[int, int, _Key]] = []
        self._numbers = itertools.count()
        self._tasks: dict[asyncio.Task[list[bytes]], Urgency] = {}
        self._closed = False

    def __repr__(self) -> str:
        return f"Joined({self.source!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run. Raises Unavailable once it is closed."""
        if self._closed:
            raise _broken_off()
        waiting = [self._want(blob, chunk, urgency) for chunk in chunks]
        self._dispatch()
        return list(await asyncio.gather(*map(asyncio.shield, waiting)))

    def _want(self, blob: Blob, chunk: int, urgency: Urgency) -> asyncio.Future[bytes]:
        key = (blob.digest, blob.table.chunk_size, chunk)
        wanted = self._wanted.get(key)
        hastier = wanted is not None and urgency < wanted.urgency
        if wanted is None or (hastier and wanted.under_way and self._overtake):
            landed = asyncio.get_running_loop().create_future()
            wanted = self._wanted[key] = _Wanted(blob, chunk, urgency, landed)
            self._enqueue(wanted)
            return wanted.landed
        self.joined += 1
        if hastier and not wanted.under_way:
            wanted.urgency = urgency
            self._enqueue(wanted)
        return wanted.landed

    def _enqueue(self, wanted: _Wanted) -> None:
        heapq.heappush(self._queue, (int(wanted.urgency), next(self._numbers), wanted.key))

    def _dispatch(self) -> None:
        while len(self._tasks) < self._parallel and (wanted := self._next()) is not None:
            run = self._run_around(wanted)
            task = asyncio.create_task(self._read(wanted.blob, run, wanted.urgency))
            self._tasks[task] = wanted.urgency
            task.add_done_callback(partial(self._landed, run))

    def _next(self) -> _Wanted | None:
        """Return what is to be read next; None if nothing may."""
        while self._queue:
            urgency, _, key = self._queue[0]
            wanted = self._wanted.get(key)
            if wanted is None or wanted.under_way or wanted.urgency != urgency:
                heapq.heappop(self._queue)  # it was read, or moved up, meanwhile
                continue
            patient = sum(1 for other in self._tasks.values() if other != Urgency.DEMAND)
            if urgency != Urgency.DEMAND and patient >= max(1, self._parallel * _QUARTERS[wanted.urgency] // 4):
                return None  # whatever waits behind it is not more urgent
            return wanted
        return None

    def _run_around(self, first: _Wanted) -> list[_Wanted]:
        blob, size = first.blob, first.blob.table.chunk_size
        start, stop = first.chunk, first.chunk + 1
        most = max(1, (self._largest if first.urgency == Urgency.DEMAND else self._patient) // size)
        while stop - start < most and self._waits(blob, stop, first.urgency):
            stop += 1
        while stop - start < most and self._waits(blob, start - 1, first.urgency):
            start -= 1
        run = [self._wanted[blob.digest, size, chunk] for chunk in range(start, stop)]
        for wanted in run:
            wanted.under_way = True
        return run

    def _waits(self, blob: Blob, chunk: int, urgency: Urgency) -> bool:
        wanted = self._wanted.get((blob.digest, blob.table.chunk_size, chunk))
        return wanted is not None and not wanted.under_way and wanted.urgency == urgency and wanted.blob == blob

    async def _read(self, blob: Blob, run: list[_Wanted], urgency: Urgency) -> list[bytes]:
        self.reads += 1
        return await self.source.read(blob, range(run[0].chunk, run[-1].chunk + 1), urgency)

    def _landed(self, run: list[_Wanted], task: asyncio.Task[list[bytes]]) -> None:
        del self._tasks[task]
        for place, wanted in enumerate(run):
            if self._wanted.get(wanted.key) is wanted:  # else it was overtaken
                del self._wanted[wanted.key]
            if task.cancelled():
                _fail(wanted.landed, _broken_off())
            elif error := task.exception():
                _fail(wanted.landed, error)
            else:
                wanted.landed.set_result(task.result()[place])
        self._dispatch()

    async def close(self) -> None:
        """Cancel what is under way and what waits; the readers get Unavailable, and so does who asks later."""
        self._closed = True
        self._queue.clear()
        for wanted in list(self._wanted.values()):
            if not wanted.under_way:
                _fail(wanted.landed, _broken_off())
                del self._wanted[wanted.key]
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _fail(landed: asyncio.Future[bytes], error: BaseException) -> None:
    landed.set_exception(error)
    landed.exception()  # looked at: it is no fault if every reader has gone


def _broken_off() -> Unavailable:
    return Unavailable("the fetch was broken off", hint="ask again")


async def together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Run all; when one fails, the others are cancelled and waited for, and its own error is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            for item in work:
                group.create_task(item)
    except ExceptionGroup as failed:
        raise failed.exceptions[0] from None
