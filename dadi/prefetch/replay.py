"""Fetch what a program is about to read, by its image's trace: in order, joined, several requests in flight.

    trace ──► the chunks that all groups have, then those of the likeliest group ──► windows of the next chunks, each
    longer than the last ──► what is not here, as runs of neighbours of at most `_RUN` bytes ──► the chain, STARTUP

Which group (entry point) it is shows in what is read meanwhile: from the first read on that only one of them explains,
that one is fetched. A read of the kernel goes its own way, as demand, and joins what is in flight for it already; the
window is never longer than what `_FLIGHTS` requests can hold, so that nothing waits behind a queue of ours.

All replays of a node share a rate, if there is one (`trace.rate`): a run waits until it may go. A read that comes to
it before it was asked for does not wait for that.

A trace may be wrong: chunks that the image does not have are left out, and what fails is left to who reads it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence

from dadi.blobs.chain import Chain
from dadi.blobs.single_flight import runs
from dadi.blobs.source import Urgency
from dadi.blobs.store import BlobStore
from dadi.errors import DadiError, StoreFull
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.prefetch.rate import Bucket
from dadi.prefetch.trace import Chunk, Report, StartGroup, Trace

_RUN = 1 << 20
_FLIGHTS = 16
"""Requests at a time."""
_FIRST_WINDOW, _LARGEST_WINDOW = 16, 256
"""Chunks that are looked at together: few at first, which are wanted first; then more, which can be joined better."""


class Replay:
    """One replay. `blobs`: those of the image, by digest; `seen`: what the container has read so far."""

    def __init__(self, trace: Trace, name: str, blobs: Mapping[str, Blob], store: BlobStore, chain: Chain,
                 fallbacks: Fallbacks, *, seen: Callable[[], Collection[Chunk]] = tuple, bucket: Bucket | None = None,
                 clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:  # fmt: skip
        """`bucket`: bytes a second, of `clock`."""
        self.name = name
        self._blobs = blobs
        self._store = store
        self._chain = chain
        self._fallbacks = fallbacks
        self._seen = seen
        self._bucket = bucket
        self._clock = clock
        self._sleep = sleep
        self._groups = [self._fitting(trace, group) for group in trace.groups]
        everywhere = set.intersection(*map(set, self._groups)) if self._groups else set()
        self._common = [chunk for chunk in self._groups[0] if chunk in everywhere] if self._groups else []
        self._own = [{chunk for chunk in group if chunk not in everywhere} for group in self._groups]
        self._slots = asyncio.Semaphore(_FLIGHTS)
        self._full = False
        self.taken: dict[Chunk, None] = {}
        """Chunks that were looked at, in order: fetched ahead, or here already."""
        self.fetched_chunks = 0
        self.bytes = 0

    def __repr__(self) -> str:
        return f"Replay({self.name}, {len(self.taken)} of {len(set().union(*self._groups))} chunks)"

    def _fitting(self, trace: Trace, group: StartGroup) -> list[Chunk]:
        sizes = dict(trace.blobs)
        return [
            (digest, chunk) for digest, chunk in trace.chunks(group)
            if (blob := self._blobs.get(digest)) and blob.table.chunk_size == sizes[digest] and chunk < blob.table.count
        ]  # fmt: skip

    async def run(self) -> None:
        """Fetch until the likeliest group is here. What cannot be fetched is noted, and left."""
        window = _FIRST_WINDOW
        async with asyncio.TaskGroup() as tasks:
            while not self._full and (following := self._next(window)):
                window = min(4 * window, _LARGEST_WINDOW)
                self.taken.update(dict.fromkeys(following))
                for blob, run in await self._missing(following):
                    await self._slots.acquire()
                    if self._bucket is not None and (wait := self._bucket.take(blob.table.span(run)[1], self._clock())):
                        await self._sleep(wait)
                    tasks.create_task(self._fetch(blob, run))

    def _next(self, most: int) -> list[Chunk]:
        if not self._groups:
            return []
        for chunks in (self._common, self._groups[self._likeliest()]):
            following = [chunk for chunk in chunks if chunk not in self.taken]
            if following:
                return following[:most]
        return []

    def _likeliest(self) -> int:
        """Return the place of the group that explains most of what only some groups explain; of equals the first."""
        if len(self._groups) == 1:
            return 0
        seen = self._seen()
        explained = [sum(chunk in own for chunk in seen) for own in self._own]
        return explained.index(max(explained))

    async def _missing(self, chunks: Sequence[Chunk]) -> list[tuple[Blob, range]]:
        """Return what is not here as runs of neighbours, those that begin with what is wanted first coming first."""
        by_blob: dict[str, list[int]] = {}
        for digest, chunk in chunks:
            by_blob.setdefault(digest, []).append(chunk)
        found: list[tuple[int, Blob, range]] = []
        ranks = {chunk: rank for rank, chunk in enumerate(chunks)}
        for digest, wanted in by_blob.items():
            blob = self._blobs[digest]
            if self._store.has(digest):
                continue
            most = max(1, _RUN // blob.table.chunk_size)
            try:
                wanted.sort()
                here = [chunk for run in runs(wanted) for chunk in await self._store.missing(blob, run)]
            except DadiError as error:
                self._fallbacks.note("startup trace not replayed", str(error))
                self._full = isinstance(error, StoreFull)
                continue
            for run in runs(here):
                for at in range(run.start, run.stop, most):
                    part = range(at, min(at + most, run.stop))
                    found.append((min(ranks[digest, chunk] for chunk in part), blob, part))
        found.sort(key=lambda each: each[0])
        return [(blob, run) for _, blob, run in found]

    async def _fetch(self, blob: Blob, run: range) -> None:
        try:
            parts = await self._chain.read(blob, run, Urgency.STARTUP)
        except DadiError as error:
            self._fallbacks.note("startup trace not replayed", f"{blob}: {error}")
        else:
            self.fetched_chunks += len(parts)
            self.bytes += sum(map(len, parts))
        finally:
            self._slots.release()

    def report(self, seen: Collection[Chunk], watched: Collection[str]) -> Report:
        """Return how good the trace was, by what was read of the blobs that were watched."""
        chunks = [chunk for chunk in self.taken if chunk[0] in watched]
        read = sum(chunk[0] in watched for chunk in seen)
        return Report(self.name, len(chunks), sum(chunk in seen for chunk in chunks), read)
