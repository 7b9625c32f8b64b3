"""Startup traces that were pushed beside images (`dadi trace export --push`): looked for, and borrowed for a while.

    when     an image is new here, or a node asks for a trace that there is not: once, then not for `_AGAIN` seconds
             (`_AWAY`, where the registry could not say). Not where one was learnt, cleared, or dropped for being wrong
    who      each superpeer for itself: whoever is asked has it then
    waiting  a node that asks waits for at most `_PATIENCE`, containers and mounts for nothing; a prefetch job waits

What comes is checked (`referrers.py`, `Traces.borrow`), and is as harmless as what any node may tell: it names chunks.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable

from dadi.errors import DadiError
from dadi.fallbacks import Fallbacks
from dadi.oci.reference import Reference
from superpeer.catalog import Catalog, ImageRecord
from superpeer.referrers import ShippedIndexes
from superpeer.traces import Traces

_PATIENCE = 2.0
_AGAIN, _AWAY = 3600.0, 300.0
_LONGEST = 30.0
_MOST = 4096
"""Images that are remembered to have been looked for."""


class ShippedTraces:
    """See the head of this file. `referrers` is None where the registry's are not to be used."""

    def __init__(self, traces: Traces, catalog: Catalog, referrers: ShippedIndexes | None, fallbacks: Fallbacks,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._traces = traces
        self._catalog = catalog
        self._referrers = referrers
        self._fallbacks = fallbacks
        self._clock = clock
        self._not_before: OrderedDict[str, float] = OrderedDict()
        self._looking: dict[str, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"ShippedTraces({len(self._looking)} being looked for)"

    def begin(self, record: ImageRecord) -> asyncio.Task[None] | None:
        """Look for the trace of an image that is here now, if it is time to; return the look that is under way."""
        manifest = record.manifest_digest
        if self._referrers is None or self._traces.has(manifest):
            return None
        task = self._looking.get(manifest)
        if task is None and self._clock() >= self._not_before.get(manifest, float("-inf")):
            self._remember(manifest, _AGAIN)
            task = self._looking[manifest] = asyncio.create_task(self._look(self._referrers, record))
            task.add_done_callback(lambda done: self._looking.pop(manifest))
        return task

    async def wait(self, record: ImageRecord) -> None:
        """Look for the trace of an image, and wait for the end of it."""
        if (task := self.begin(record)) is not None:
            await asyncio.wait([task])

    async def asked(self, manifest: str) -> None:
        """Look for the trace of an image by its manifest, and wait for a moment: a node asks for it."""
        record = self._catalog.record_of(manifest)
        if record is not None and (task := self.begin(record)) is not None:
            await asyncio.wait([task], timeout=_PATIENCE)

    def never(self, manifest: str) -> None:
        """An operator wants this image's trace to be learnt anew."""
        self._remember(manifest, float("inf"))

    def _remember(self, manifest: str, seconds: float) -> None:
        self._not_before[manifest] = self._clock() + seconds
        self._not_before.move_to_end(manifest)
        if len(self._not_before) > _MOST:
            self._not_before.popitem(last=False)

    async def _look(self, referrers: ShippedIndexes, record: ImageRecord) -> None:
        manifest = record.manifest_digest
        try:
            kept = await self._traces.kept(manifest)
            if kept.recordings or kept.dropped:
                return
            async with asyncio.timeout(_LONGEST):
                found = await referrers.trace(Reference.parse(record.reference), manifest)
            if found is not None and not self._traces.has(manifest):
                await self._traces.borrow(found, self._catalog.image(record))
        except TimeoutError:
            self._remember(manifest, _AWAY)
            self._fallbacks.note("startup traces in the registry not looked for", f"{record.reference}: no answer")
        except DadiError as error:
            if error.retryable:
                self._remember(manifest, _AWAY)
            why = f"{record.reference}: {error.message}"
            self._fallbacks.note("startup traces in the registry not looked for", why)

    async def close(self) -> None:
        """Break off what is under way."""
        tasks = list(self._looking.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
