"""Read what is here, fetch the rest from upstream, keep it. A full disk loses the keeping, never the read."""

from __future__ import annotations

import asyncio

from dadi.blobs.single_flight import runs
from dadi.blobs.source import Source, Urgency
from dadi.blobs.store import BlobStore
from dadi.errors import DadiError, StoreFull
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob


class Kept:
    """A source that answers from `store`, and from `upstream` (whose bytes must be verified) what the store lacks."""

    def __init__(self, store: BlobStore, upstream: Source, fallbacks: Fallbacks) -> None:
        self.store = store
        self.upstream = upstream
        self._fallbacks = fallbacks
        self.fetched_bytes = 0
        self.local_bytes = 0

    def __repr__(self) -> str:
        return f"Kept({self.store!r}, {self.upstream!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run."""
        missing = await self.store.missing(blob, chunks)
        if not missing:
            return await self._local(blob, chunks, urgency)
        if len(missing) == len(chunks):  # the way of nearly all: no tasks for it
            return await self._fetch(blob, chunks, urgency)
        found: dict[int, bytes] = {}
        gone = set(missing)
        here = runs([chunk for chunk in chunks if chunk not in gone])
        reads = [self._local(blob, run, urgency) for run in here]
        fetches = [self._fetch(blob, run, urgency) for run in runs(missing)]
        results = await asyncio.gather(*reads, *fetches)
        for run, parts in zip([*here, *runs(missing)], results, strict=True):
            found.update(zip(run, parts, strict=True))
        return [found[chunk] for chunk in chunks]

    async def _local(self, blob: Blob, run: range, urgency: Urgency) -> list[bytes]:
        try:
            parts = await self.store.read(blob, run)
        except DadiError as error:
            # Evicted, or the disk broke, between the look and the read.
            self._fallbacks.note("local chunk not readable", str(error))
            return await self._fetch(blob, run, urgency)
        self.local_bytes += sum(map(len, parts))
        return parts

    async def _fetch(self, blob: Blob, run: range, urgency: Urgency) -> list[bytes]:
        parts = await self.upstream.read(blob, run, urgency)
        self.fetched_bytes += sum(map(len, parts))
        try:
            await self.store.keep(blob, run.start, parts)
        except StoreFull as error:
            self._fallbacks.note("not kept: store full", str(error))
        except DadiError as error:
            self._fallbacks.note("not kept: disk failed", str(error))
        return parts
