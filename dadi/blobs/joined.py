"""One fetch per chunk, the most urgent first, neighbours in one request.

For a source where each request is dear (a registry): at most `parallel` reads of it are under way. What else is wanted
waits in a queue. When a read ends, the most urgent chunk that waits is taken, those that waited longest first, together
with all its neighbours that wait with the same urgency, up to `largest` bytes. Who asks for a chunk that others wait
for waits with them; if he is in a greater hurry, the chunk moves up (and so it does further down, see `hurry`).

Work that nobody waits for has at most half of the reads, so that demand always finds the way free.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from functools import partial

import msgspec

from dadi.blobs.source import Source, Urgency, hurry
from dadi.errors import Unavailable
from dadi.index.chunks import Blob

_Key = tuple[str, int, int]
"""Digest, chunk size, chunk."""


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
    """A source around `source`; see the head of this file."""

    def __init__(self, source: Source, *, parallel: int, largest: int) -> None:
        self.source = source
        self.reads = 0
        """How often `source` was asked."""
        self.joined = 0
        """Chunks that were waited for instead of fetched a second time."""
        self._parallel = parallel
        self._largest = largest
        self._wanted: dict[_Key, _Wanted] = {}
        self._queue: list[tuple[int, int, _Key]] = []
        self._numbers = itertools.count()
        self._tasks: dict[asyncio.Task[list[bytes]], Urgency] = {}

    def __repr__(self) -> str:
        return f"Joined({self.source!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run."""
        waiting = [self._want(blob, chunk, urgency) for chunk in chunks]
        self._dispatch()
        return list(await asyncio.gather(*map(asyncio.shield, waiting)))

    def hurry(self, blob: Blob, chunks: range, urgency: Urgency) -> None:
        """Somebody in a greater hurry waits for these chunks too: move up those that are wanted."""
        for chunk in chunks:
            wanted = self._wanted.get((blob.digest, blob.table.chunk_size, chunk))
            if wanted is None or urgency >= wanted.urgency:
                continue
            wanted.urgency = urgency
            if not wanted.under_way:
                self._enqueue(wanted)
            else:
                hurry(self.source, blob, range(chunk, chunk + 1), urgency)

    def _want(self, blob: Blob, chunk: int, urgency: Urgency) -> asyncio.Future[bytes]:
        key = (blob.digest, blob.table.chunk_size, chunk)
        wanted = self._wanted.get(key)
        if wanted is None:
            landed = asyncio.get_running_loop().create_future()
            wanted = self._wanted[key] = _Wanted(blob, chunk, urgency, landed)
            self._enqueue(wanted)
        else:
            self.joined += 1
            self.hurry(blob, range(chunk, chunk + 1), urgency)
        return wanted.landed

    def _enqueue(self, wanted: _Wanted) -> None:
        heapq.heappush(self._queue, (int(wanted.urgency), next(self._numbers), wanted.key))

    def _dispatch(self) -> None:
        while len(self._tasks) < self._parallel and (wanted := self._next()) is not None:
            run = self._run_around(wanted)
            task = asyncio.create_task(self._read(wanted.blob, run, wanted.urgency))
            self._tasks[task] = wanted.urgency
            task.add_done_callback(partial(self._landed, wanted.blob, run))

    def _next(self) -> _Wanted | None:
        """Return what is to be read next; None if nothing may."""
        while self._queue:
            urgency, _, key = self._queue[0]
            wanted = self._wanted.get(key)
            if wanted is None or wanted.under_way or wanted.urgency != urgency:
                heapq.heappop(self._queue)  # it was read, or moved up, meanwhile
                continue
            patient = sum(1 for other in self._tasks.values() if other != Urgency.DEMAND)
            if urgency != Urgency.DEMAND and patient >= max(1, self._parallel // 2):
                return None  # whatever waits behind it is not more urgent
            return wanted
        return None

    def _run_around(self, first: _Wanted) -> range:
        blob, table = first.blob, first.blob.table
        start, stop = first.chunk, first.chunk + 1
        most = max(1, self._largest // table.chunk_size)
        while stop - start < most and self._waits(blob, stop, first.urgency):
            stop += 1
        while stop - start < most and self._waits(blob, start - 1, first.urgency):
            start -= 1
        for chunk in range(start, stop):
            self._wanted[blob.digest, table.chunk_size, chunk].under_way = True
        return range(start, stop)

    def _waits(self, blob: Blob, chunk: int, urgency: Urgency) -> bool:
        wanted = self._wanted.get((blob.digest, blob.table.chunk_size, chunk))
        return wanted is not None and not wanted.under_way and wanted.urgency == urgency and wanted.blob == blob

    async def _read(self, blob: Blob, run: range, urgency: Urgency) -> list[bytes]:
        self.reads += 1
        return await self.source.read(blob, run, urgency)

    def _landed(self, blob: Blob, run: range, task: asyncio.Task[list[bytes]]) -> None:
        del self._tasks[task]
        for place, chunk in enumerate(run):
            landed = self._wanted.pop((blob.digest, blob.table.chunk_size, chunk)).landed
            if task.cancelled():
                _break_off(landed)
            elif error := task.exception():
                landed.set_exception(error)
                landed.exception()  # looked at: it is no fault if every reader has gone
            else:
                landed.set_result(task.result()[place])
        self._dispatch()

    async def close(self) -> None:
        """Cancel what is under way and what waits; the readers get Unavailable."""
        self._queue.clear()
        for wanted in list(self._wanted.values()):
            if not wanted.under_way:
                _break_off(wanted.landed)
                del self._wanted[wanted.key]
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _break_off(landed: asyncio.Future[bytes]) -> None:
    landed.set_exception(Unavailable("the fetch was broken off", hint="ask again"))
    landed.exception()  # looked at: it is no fault if every reader has gone
