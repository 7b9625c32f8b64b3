"""All layers that are fetched by ranges: demand passed on at once, the rest when it is quiet.

A layer is opened by the first demand for it (its seek table is read from the store then). Open layers are kept for as
long as their tables fit in memory together, the last used ones; what is known of a layer's rest stays:

    all of its tar is here                        both forms are completed and checked, whoever asks for what else
    nobody has asked for anything for a while     the rest is fetched, of the layer that was opened first, from front to
    (`rest_after`)                                back, a part at a time
    evicted later, and asked for again,           only what is asked for
    or larger than the store
    it fails                                      put off, for longer each time, and the others go on
    its index or image is gone, no ranges         forgotten: whoever asks for it again finds out by himself

A demand that takes long (a registry that hangs) does not count for ever: quiet is when nobody *begins or ends* asking.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable

import msgspec
import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.files import RAISE_LIMIT
from dadi.blobs.source import Source, Urgency
from dadi.errors import DadiError, NotFound, StoreFull, Unavailable, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.index.image import ImageLayer
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from superpeer.ranged import Lie, RangedLayer, decoded, packed_blob, prove_tar
from superpeer.ranges import PackedLayer, RegistryRanges

log = structlog.get_logger()
_PAUSE, _LONGEST_PAUSE = 10.0, 3600.0
"""Seconds without a layer's rest after it has failed (registry away, store full); doubled each time."""
_PATIENCE = 60.0
"""Seconds that a part of the rest may take before other layers have their turn (a registry that hangs)."""
_NO_RANGES = 600.0
"""Seconds that a registry is believed to do no ranges after it has answered one with the whole."""
_OPEN_TABLES = 256 << 20
"""Bytes of the seek tables of open layers, as they are in the store; in memory they take some times that."""
_REMEMBERED = 10_000
"""Layers of which it is known that their rest was fetched."""

OnLie = Callable[[ImageLayer, Lie], Awaitable[None]]
OnProven = Callable[[ImageLayer], None]


class _Rest(msgspec.Struct, eq=False):
    """A layer that is not complete. `fetch`: what nobody asks for too. Not looked at `before` that time (loop's)."""

    reference: str
    layer: ImageLayer
    fetch: bool
    pause: float
    before: float = 0.0


class LazyLayers:
    """See the head of this file. `on_lie` and `on_proven` are told what completing a layer has shown."""

    def __init__(self, store: DiskBlobs, registry: RegistryClient, *, parallel: int, rest_after: float,
                 fallbacks: Fallbacks, on_lie: OnLie, on_proven: OnProven,
                 may_use: Callable[[Reference, str], bool], on_came: Callable[[Blob, str], None],
                 nearer: Callable[[Reference], Source] | None = None) -> None:  # fmt: skip
        """`nearer`: who may have chunks of compressed layers of a repository; NotFound from it is no fault.

        `may_use`: whether a compressed layer that is here as a whole may be read for a repository; `on_came` is told
        of one that is whole now, all of which has come from a repository (with its registry).
        """
        self._store = store
        self._registry = registry
        self._parallel = parallel
        self._rest_after = rest_after
        self._fallbacks = fallbacks
        self._on_lie = on_lie
        self._on_proven = on_proven
        self._may_use = may_use
        self._on_came = on_came
        self._nearer = nearer
        self._layers: dict[tuple[str, str], RangedLayer] = {}
        """The open ones, least recently used first."""
        self._packed: dict[Blob, PackedLayer] = {}
        """Compressed blobs of open layers: two indexes of one layer fetch its bytes once."""
        self._rests: dict[tuple[str, str], _Rest] = {}
        self._fetched: dict[tuple[str, str], None] = {}
        self._no_ranges: dict[str, float] = {}
        """Registries that do no ranges, and until when that is believed."""
        self._opening = asyncio.Lock()
        self._last_demand = 0.0
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._closed_requests = 0
        self._closed_bytes = 0
        self.completed = 0

    def __repr__(self) -> str:
        return f"LazyLayers({len(self._layers)} open, {len(self._rests)} not complete)"

    def start(self) -> None:
        """Begin to watch for quiet times."""
        self._last_demand = asyncio.get_running_loop().time()
        self._task = asyncio.create_task(self._run())

    async def bring(self, reference: str, layer: ImageLayer, chunks: range, urgency: Urgency) -> None:
        """Bring chunks of a layer's tar into the store. Raises as `RangedLayer.bring` does.

        Raises Unsupported where it cannot be brought by ranges: too few seek points, or a registry without ranges.
        """
        loop = asyncio.get_running_loop()
        registry = Reference.parse(reference).registry
        if loop.time() < self._no_ranges.get(registry, 0.0):
            raise Unsupported(f"{registry} did not do ranges a while ago")
        if urgency < Urgency.BACKFILL:
            self._last_demand = loop.time()
        ranged = await self._open(reference, layer)
        try:
            await ranged.bring(chunks, urgency)
        except Unsupported:
            self._no_ranges[registry] = loop.time() + _NO_RANGES
            if not ranged.waiting():  # the others are about to be told the same
                await self.drop(layer)
            raise
        finally:
            if urgency < Urgency.BACKFILL:
                self._last_demand = loop.time()
            if self._is_whole(layer):
                self._wake.set()

    @contextlib.asynccontextmanager
    async def packed(self, reference: str, layer: ImageLayer) -> AsyncIterator[PackedLayer]:
        """Give a layer's compressed blob, open for as long as it is used. Raises as `bring` does."""
        if asyncio.get_running_loop().time() < self._no_ranges.get(Reference.parse(reference).registry, 0.0):
            raise Unsupported(f"the registry of {reference} did not do ranges a while ago")
        packed = (await self._open(reference, layer)).packed
        packed.users += 1
        try:
            yield packed
        finally:
            self._note_came(packed)
            await self._let_go(packed)

    def open_blob(self, digest: str) -> Blob | None:
        """Return a compressed layer that is open just now, by its digest."""
        return next((blob for blob in self._packed if blob.digest == digest), None)

    async def bring_packed(self, blob: Blob, chunks: range, urgency: Urgency) -> None:
        """Bring chunks of a compressed layer that is open. Raises NotFound if it is not, and as `bring` does."""
        packed = self._packed.get(blob)
        if packed is None:
            raise NotFound(f"{blob} is not fetched by ranges here")
        packed.users += 1
        try:
            await packed.chunks.read(blob, chunks, urgency)
        finally:
            await self._let_go(packed)

    def has_no_ranges(self, reference: str) -> None:
        """Remember that the registry of an image has answered a request for a range with the whole."""
        self._no_ranges[Reference.parse(reference).registry] = asyncio.get_running_loop().time() + _NO_RANGES

    async def prove(self, reference: str, layer: ImageLayer) -> bool:
        """Check all of a layer's tar against its index now; return False if it is not all here. Raises Lie."""
        if await self._store.missing(layer.blob):
            return False
        try:
            await prove_tar(self._store, layer)
        except Lie:
            raise
        except DadiError as error:
            self._fallbacks.note("layer could not be checked", f"{reference}: {error}")
            return False
        self._on_proven(layer)
        return True

    # ---- opening and closing

    async def _open(self, reference: str, layer: ImageLayer) -> RangedLayer:
        key = layer.found_index
        while (ranged := self._layers.pop(key, None)) is None:
            async with self._opening:
                if key not in self._layers:
                    self._layers[key] = await self._opened(reference, layer)
                    self._note_rest(reference, layer)
                    await self._close_idle()
        self._layers[key] = ranged  # the last used one last
        return ranged

    async def _opened(self, reference: str, layer: ImageLayer) -> RangedLayer:
        raw = await self._store.get(layer.seek_digest)
        table, largest = await asyncio.to_thread(decoded, raw, layer)
        blob = packed_blob(layer, table)
        if self._store.has(blob.digest) and not self._may_use(Reference.parse(reference), blob.digest):
            why = f"{blob.digest} is here from elsewhere; the registry of {reference} has to send it, too, to show it"
            raise Unsupported(why)
        packed = self._packed.get(blob)
        if packed is None:
            descriptor = Descriptor(layer.media_type, layer.layer_digest, layer.layer_size)
            ref = Reference.parse(reference)
            ranges, nearer = RegistryRanges(self._registry, ref, descriptor), self._nearer and self._nearer(ref)
            packed = self._packed[blob] = PackedLayer(self._store, blob, ranges, parallel=self._parallel,
                                                      fallbacks=self._fallbacks, nearer=nearer)  # fmt: skip
        packed.users += 1
        log.info("layer opened by ranges", layer=layer.layer_digest, points=layer.seek_points)
        return RangedLayer(self._store, layer, table, packed, largest=largest, fallbacks=self._fallbacks)

    def _note_rest(self, reference: str, layer: ImageLayer) -> None:
        key = layer.found_index
        if key in self._rests:
            return
        # What was evicted would be again, or something else for it: what a store has no room for is not fetched for
        # nobody, over and over.
        needed = layer.table.size + (layer.layer_size if layer.layer_digest != layer.diff_id else 0)
        fits = not self._store.limit or needed <= self._store.limit
        self._rests[key] = _Rest(reference, layer, fits and key not in self._fetched, _PAUSE)
        self._wake.set()

    async def _close_idle(self) -> None:
        """Close those that were not used for longest, while there are too many; never the last one."""
        for ranged in list(self._layers.values())[:-1]:
            if sum(each.layer.seek_size for each in self._layers.values()) <= _OPEN_TABLES:
                break
            if ranged.waiting():
                continue
            rest = self._rests.get(ranged.layer.found_index)
            if rest is not None and not rest.fetch:
                del self._rests[ranged.layer.found_index]
            await self._close(ranged.layer)

    async def drop(self, layer: ImageLayer) -> None:
        """Close a layer, whatever is under way, and forget its rest."""
        self._rests.pop(layer.found_index, None)
        await self._close(layer)

    async def _close(self, layer: ImageLayer) -> None:
        ranged = self._layers.pop(layer.found_index, None)
        if ranged is None:
            return
        await ranged.close()
        await self._let_go(ranged.packed)

    def _note_came(self, packed: PackedLayer) -> None:
        if packed.sent.all and self._store.has(packed.blob.digest):
            self._on_came(packed.blob, packed.ranges.name)

    async def _let_go(self, packed: PackedLayer) -> None:
        packed.users -= 1
        if not packed.users:
            del self._packed[packed.blob]
            self._closed_requests += packed.ranges.requests
            self._closed_bytes += packed.ranges.bytes
            await packed.close()

    # ---- the rest

    async def _run(self) -> None:
        while True:
            rest = await self._next()
            try:
                await self._advance(rest)
                rest.pause = _PAUSE
            except (NotFound, Unsupported) as error:
                self._fallbacks.note("rest of a layer given up", str(error))
                await self.drop(rest.layer)
            except DadiError as error:
                # Nobody waits for the rest: whoever wants something finds out by himself what is wrong.
                self._put_off(rest, str(error))
            except Exception as error:  # a mistake of ours must not end it for all layers
                self._put_off(rest, repr(error))
                # In a thread: to show a traceback is to read files.
                await asyncio.to_thread(log.error, "the rest of a layer failed", exc_info=error)

    def _put_off(self, rest: _Rest, why: str) -> None:
        self._fallbacks.note("rest of a layer put off", why)
        rest.before = asyncio.get_running_loop().time() + rest.pause
        rest.pause = min(2 * rest.pause, _LONGEST_PAUSE)

    async def _next(self) -> _Rest:
        """Wait until something is to be done for a layer, and return it."""
        loop = asyncio.get_running_loop()
        while True:
            self._wake.clear()
            now = loop.time()
            due = [rest for rest in self._rests.values() if self._due(rest) <= now]
            if due:
                return min(due, key=lambda rest: not self._is_whole(rest.layer))
            soonest = min(map(self._due, self._rests.values()), default=math.inf)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout_at(None if soonest == math.inf else soonest):
                    await self._wake.wait()

    def _due(self, rest: _Rest) -> float:
        """Return from when on something is to be done for a layer (loop's time); inf if nothing is."""
        if self._is_whole(rest.layer):
            return rest.before
        return max(rest.before, self._last_demand + self._rest_after) if rest.fetch else math.inf

    def _is_whole(self, layer: ImageLayer) -> bool:
        """Whether all of a layer's tar is here, or claimed to be."""
        return self._store.present_bytes(layer.blob) == layer.table.size

    async def _advance(self, rest: _Rest) -> None:
        """Fetch the next part of a layer, or complete it."""
        layer = rest.layer
        ranged = await self._open(rest.reference, layer)
        part = await ranged.ahead()
        try:
            if part:
                async with asyncio.timeout(_PATIENCE):
                    await self.bring(rest.reference, layer, part, Urgency.BACKFILL)
                if await self._store.missing(layer.blob, part):
                    raise StoreFull(f"the store does not keep {layer.blob}", hint=RAISE_LIMIT)
                return
            await ranged.complete()
            self._note_came(ranged.packed)
        except TimeoutError:
            hint = "is its registry slow? it is tried again"
            raise Unavailable(f"{layer.blob} did not come in {_PATIENCE:.0f} s", hint=hint) from None
        except Lie as lie:
            await self._on_lie(layer, lie)
            await self.drop(layer)
            return
        self.completed += 1
        self._on_proven(layer)
        log.info("layer complete", layer=layer.layer_digest, requests=ranged.packed.ranges.requests)
        self._fetched[layer.found_index] = None
        if len(self._fetched) > _REMEMBERED:
            del self._fetched[next(iter(self._fetched))]
        await self.drop(layer)

    def waiting(self) -> int:
        """Return how many runs of chunks somebody waits for."""
        return sum(layer.waiting() for layer in self._layers.values())

    def statistics(self) -> dict[str, int]:
        """Return open layers, layers completed, requests to registries and bytes that came, reads that wait."""
        ranges = [packed.ranges for packed in self._packed.values()]
        return {
            "open": len(self._layers),
            "completed": self.completed,
            "waiting": self.waiting(),
            "requests": self._closed_requests + sum(one.requests for one in ranges),
            "bytes": self._closed_bytes + sum(one.bytes for one in ranges),
        }

    async def close(self) -> None:
        """Break off what is under way."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        for ranged in list(self._layers.values()):
            await self.drop(ranged.layer)
