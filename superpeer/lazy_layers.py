"""All layers that are fetched by ranges: demand passed on at once, the rest when it is quiet.

A layer is opened by the first demand for it (its seek table is read from the store then) and closed when both of its
forms are complete. When nobody has asked for anything for `rest_after` seconds, the rest of the open layers is fetched,
the one that was opened first from front to back, a step at a time; a demand ends that until it is quiet again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Urgency
from dadi.errors import DadiError
from dadi.fallbacks import Fallbacks
from dadi.index import seek
from dadi.index.image import ImageLayer
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from superpeer.ranged import Lie, RangedLayer
from superpeer.ranges import RegistryRanges

log = structlog.get_logger()
_PAUSE = 10.0
"""Seconds without the rest after it has failed (registry away, store full)."""
_STEPS = 2
"""Steps of the rest at a time: while one is unpacked, the next is on the wire."""

OnLie = Callable[[ImageLayer, Lie], Awaitable[None]]
OnProven = Callable[[ImageLayer], None]


class LazyLayers:
    """See the head of this file. `on_lie` and `on_proven` are told what completing a layer has shown."""

    def __init__(self, store: DiskBlobs, registry: RegistryClient, *, parallel: int, rest_after: float,
                 fallbacks: Fallbacks, on_lie: OnLie, on_proven: OnProven) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._parallel = parallel
        self._rest_after = rest_after
        self._fallbacks = fallbacks
        self._on_lie = on_lie
        self._on_proven = on_proven
        self._layers: dict[tuple[str, str], RangedLayer] = {}
        self._opening = asyncio.Lock()
        self._demands = 0
        self._no_demand = asyncio.Event()
        self._no_demand.set()
        self._last_demand = float("-inf")
        self._wake = asyncio.Event()
        self._rest: asyncio.Task[None] | None = None
        self._closed_requests = 0
        self._closed_bytes = 0
        self.completed = 0

    def __repr__(self) -> str:
        return f"LazyLayers({len(self._layers)} open)"

    def start(self) -> None:
        """Begin to watch for quiet times."""
        self._rest = asyncio.create_task(self._run())

    async def bring(self, reference: str, layer: ImageLayer, chunks: range, urgency: Urgency) -> None:
        """Bring chunks of a layer's tar into the store. Raises as `RangedLayer.bring` does."""
        loop = asyncio.get_running_loop()
        ranged = await self._open(reference, layer)
        self._wake.set()
        if urgency != Urgency.DEMAND:
            await ranged.bring(chunks, urgency)
            return
        self._demands += 1
        self._no_demand.clear()
        try:
            await ranged.bring(chunks, urgency)
        finally:
            self._last_demand = loop.time()
            self._demands -= 1
            if not self._demands:
                self._no_demand.set()

    async def _open(self, reference: str, layer: ImageLayer) -> RangedLayer:
        async with self._opening:
            ranged = self._layers.get(layer.found_index)
            if ranged is None:
                raw = await self._store.get(layer.seek_digest)
                table = await asyncio.to_thread(seek.decode, raw)
                descriptor = Descriptor(layer.media_type, layer.layer_digest, layer.layer_size)
                source = RegistryRanges(self._registry, Reference.parse(reference), descriptor)
                ranged = RangedLayer(self._store, layer, table, source, parallel=self._parallel,
                                     fallbacks=self._fallbacks)  # fmt: skip
                self._layers[layer.found_index] = ranged
                log.info("layer opened by ranges", layer=layer.layer_digest, points=layer.seek_points)
            return ranged

    async def drop(self, layer: ImageLayer) -> None:
        """Close a layer, whatever is under way."""
        ranged = self._layers.pop(layer.found_index, None)
        if ranged is not None:
            self._closed_requests += ranged.source.requests
            self._closed_bytes += ranged.source.bytes
            await ranged.close()

    # ---- the rest

    async def _run(self) -> None:
        while True:
            await self._quiet()
            ranged = next(iter(self._layers.values()), None)
            if ranged is None:
                self._wake.clear()
                await self._wake.wait()
                continue
            try:
                await self._advance(ranged)
            except Lie as lie:
                await self._on_lie(ranged.layer, lie)
            except DadiError as error:
                # Nobody waits for the rest: whoever wants something finds out by himself what is wrong.
                self._fallbacks.note("rest of a layer put off", error.message)
                key = ranged.layer.found_index
                if self._layers.pop(key, None) is not None:
                    self._layers[key] = ranged  # the others first
                await asyncio.sleep(_PAUSE)

    async def _quiet(self) -> None:
        """Wait until nobody has asked for anything for a while."""
        loop = asyncio.get_running_loop()
        while True:
            await self._no_demand.wait()
            left = self._last_demand + self._rest_after - loop.time()
            if left <= 0:
                return
            await asyncio.sleep(left)

    async def _advance(self, ranged: RangedLayer) -> None:
        """Fetch the next steps of a layer, or complete it."""
        steps = await ranged.missing_steps(_STEPS)
        if steps:
            await asyncio.gather(*(ranged.bring(step, Urgency.BACKFILL) for step in steps))
            return
        await ranged.complete()
        self.completed += 1
        self._on_proven(ranged.layer)
        log.info("layer complete", layer=ranged.layer.layer_digest, requests=ranged.source.requests)
        await self.drop(ranged.layer)

    def waiting(self) -> int:
        """Return how many runs of chunks somebody waits for."""
        return sum(layer.waiting() for layer in self._layers.values())

    def statistics(self) -> dict[str, int]:
        """Return open layers, layers completed, requests to registries and bytes that came, reads that wait."""
        layers = self._layers.values()
        return {
            "open": len(layers),
            "completed": self.completed,
            "waiting": self.waiting(),
            "requests": self._closed_requests + sum(layer.source.requests for layer in layers),
            "bytes": self._closed_bytes + sum(layer.source.bytes for layer in layers),
        }

    async def close(self) -> None:
        """Break off what is under way."""
        if self._rest is not None:
            self._rest.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._rest
        for ranged in list(self._layers.values()):
            await self.drop(ranged.layer)
