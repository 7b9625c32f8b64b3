"""The superpeer's upstream: whole layers from the registry, each streamed once, whoever asks and however many.

One pass over a layer brings its uncompressed tar into the store and gives its index (`dadi/index/build.py`). Callers
who want a layer that is on its way wait for the same pass; the pass belongs to the origin, not to the first caller.
Plain pulls of the layer get the same bytes (`beside.py`).

A prefetch job's pass takes its time: `bring` finds the job's pace in `PACE` (`jobs_pace.py`), set by `jobs.py`, and
gives the pass a part of it. It is lifted as soon as somebody without a pace wants the same layer.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Container

import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.errors import DigestMismatch, NotFound, StoreFull
from dadi.fallbacks import Fallbacks
from dadi.index import build, layer
from dadi.index.chunks import Blob
from dadi.index.layer import LayerIndex
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.originals.fetching import Fetch
from dadi.originals.original import whole_of
from dadi.originals.service import Originals
from superpeer.beside import Beside
from superpeer.jobs_pace import PACE, Pace, Slots, paced, turn

log = structlog.get_logger()
OnProgress = Callable[[int], None]
"""Called with the compressed bytes that have come so far."""


class Origin:
    """Brings layers into `store`, `parallel` at a time. `mirrored`: registries that have mirrors.

    `originals` has compressed layers that are here, or arriving; and those that come, too, with `keep_compressed`.
    `on_shown` is told of each layer (reference, its digest, diff ID) all of whose bytes came from the registry itself,
    and were right, before it is kept.
    """

    def __init__(self, store: DiskBlobs, registry: RegistryClient, *, fallbacks: Fallbacks, chunk_size: int,
                 parallel: int, limits: build.Limits, mirrored: Container[str], originals: Originals,
                 keep_compressed: bool, on_shown: Callable[[Reference, str, str], None]) -> None:  # fmt: skip
        self._store = store
        self._registry = registry
        self._fallbacks = fallbacks
        self._chunk_size = chunk_size
        self._limits = limits
        self._slots = asyncio.Semaphore(parallel)
        self._patient = Slots(max(1, parallel // 2))
        self._paces: dict[tuple[str, str], Pace] = {}
        """Passes that nobody is waiting for so far: they take their time, and slots of their own."""
        self._passes: dict[tuple[str, str], asyncio.Task[tuple[LayerIndex, Blob]]] = {}
        self._watchers: dict[tuple[str, str], list[OnProgress]] = {}
        self._mirrored = mirrored
        self._originals = originals
        self._keep_compressed = keep_compressed
        self._on_shown = on_shown
        self.layers = 0
        self.bytes = 0
        """Compressed bytes that came from registries."""

    def __repr__(self) -> str:
        return f"Origin({self.layers} layers, {self.bytes} bytes, {len(self._passes)} under way)"

    async def bring(self, reference: Reference, descriptor: Descriptor, diff_id: str,
                    on_progress: OnProgress | None = None) -> tuple[LayerIndex, Blob]:  # fmt: skip
        """Return the layer's index and the blob that the encoded index is; then the layer is in the store.

        Raises what the registry client and the builder raise; StoreFull.
        """
        # With the diff ID: an image whose config lies about a layer must not get what an honest one is fetching.
        key = (descriptor.digest, diff_id)
        if on_progress:
            self._watchers.setdefault(key, []).append(on_progress)
        task = self._passes.get(key)
        pace = PACE.get()
        if pace is None:
            self._hurry(key)
        if pace is not None and key in self._paces:
            self._paces[key].also(pace)
        if task is None:
            context = None
            if pace is not None:
                part = self._paces[key] = pace.part()
                context = part.begins()
            work = self._pass(reference, descriptor, diff_id)
            task = self._passes[key] = asyncio.create_task(work, context=context)
            task.add_done_callback(lambda done: self._landed(key, done))
        return await asyncio.shield(task)

    def _hurry(self, key: tuple[str, str]) -> None:
        if key in self._paces:
            self._paces.pop(key).lift()

    def _landed(self, key: tuple[str, str], task: asyncio.Task[tuple[LayerIndex, Blob]]) -> None:
        del self._passes[key]
        self._paces.pop(key, None)
        self._watchers.pop(key, None)
        if not task.cancelled() and task.exception():
            log.warning("a layer could not be brought", layer=key[0], why=str(task.exception()))

    async def _pass(self, reference: Reference, descriptor: Descriptor, diff_id: str) -> tuple[LayerIndex, Blob]:
        async with turn(self._slots, self._patient):
            try:
                index = await self._shared(reference, descriptor, diff_id)
            except DigestMismatch as error:
                self._fallbacks.note("wrong layer, asked the registry itself again", str(error))
                index = await self._alone(reference, descriptor, diff_id, distrust=True)
            blob = await self._store.put(await asyncio.to_thread(layer.encode, index))
            self.layers += 1
            log.info("brought a layer", layer=descriptor.digest, bytes=descriptor.size, unpacked=index.table.size,
                     entries=len(index.entries))  # fmt: skip
            return index, blob

    async def _shared(self, reference: Reference, descriptor: Descriptor, diff_id: str) -> LayerIndex:
        """Make the index of bytes that plain pulls get, too, wherever that can be."""
        digest = descriptor.digest
        beside = Beside(self._store, digest, descriptor.size, lambda: self._hurry((digest, diff_id)))
        may_come = self._keep_compressed and await beside.fits()
        pieces = self._originals.local(reference, digest)
        if pieces is not None:
            return await self._stream(reference, descriptor, diff_id, pieces)
        coming = self._originals.coming
        begun = coming.begin_unasked(reference, descriptor, self._registry, paced, beside) if may_come else None
        if begun is None:
            return await self._alone(reference, descriptor, diff_id)
        fetch, arriving = begun
        try:
            return await self._stream(reference, descriptor, diff_id, whole_of(arriving), fetch, verified=True)
        except BaseException as error:
            beside.over()
            if beside.asked:
                raise
            await arriving.close()  # what it took is free then
            if not isinstance(error, StoreFull):
                raise
            self._fallbacks.note("compressed layer not kept, no room", f"{digest}: {error}")
        finally:
            beside.over()
        return await self._alone(reference, descriptor, diff_id)

    async def _alone(
        self, reference: Reference, descriptor: Descriptor, diff_id: str, *, distrust: bool = False
    ) -> LayerIndex:
        """Make the index of bytes that come for nothing else; `distrust`: from the registry itself."""
        fetch = self._originals.coming.fetch(reference, descriptor, self._registry)
        pieces = paced(fetch.stream(distrust))
        return await self._stream(reference, descriptor, diff_id, pieces, fetch, mirrors=not distrust)

    async def _stream(self, reference: Reference, descriptor: Descriptor, diff_id: str,
                      pieces: AsyncGenerator[bytes, None], fetch: Fetch | None = None, *,
                      mirrors: bool = True, verified: bool = False) -> LayerIndex:  # fmt: skip
        """`fetch`: where the pieces come from, if they were not here. `verified`: see `build`."""
        source = build.LayerSource(descriptor.digest, descriptor.size, descriptor.media_type, diff_id)
        ingest = self._store.ingest()

        def progress(done: int) -> None:
            for watch in self._watchers.get((descriptor.digest, diff_id), ()):
                watch(done)

        try:
            async with contextlib.aclosing(pieces):
                index = await build.build(pieces, source, ingest, chunk_size=self._chunk_size, limits=self._limits,
                                          on_progress=progress, verified=verified)  # fmt: skip
            # A mirror may give anybody what it fetched as itself; for a plain pull it may have gone on as for another.
            by_mirror = mirrors and reference.registry in self._mirrored
            own = fetch is not None and not fetch.nearer_bytes and fetch.name == reference.name
            if not own:
                # Its bytes were here, or at a sibling: that the image names it does not say that its repository has it.
                await self._registry.blob_size(reference, descriptor.digest)
            elif not by_mirror:
                self._on_shown(reference, descriptor.digest, diff_id)
            await self._store.commit(ingest, Blob(index.diff_id, index.table))
        finally:
            await asyncio.to_thread(ingest.abort)
        if fetch is not None:
            self.bytes += descriptor.size - fetch.nearer_bytes
        return index

    async def known(self, index_digest: str) -> LayerIndex:
        """Return the index of a layer that was brought before, from the store; raise NotFound if it is gone."""
        if not self._store.has(index_digest):
            raise NotFound(f"the layer index {index_digest} is not here")
        return await asyncio.to_thread(layer.decode, await self._store.get(index_digest))

    async def close(self) -> None:
        """Break off what is under way."""
        for task in list(self._passes.values()):
            task.cancel()
        await asyncio.gather(*self._passes.values(), return_exceptions=True)
