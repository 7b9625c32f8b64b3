"""What a superpeer does, without HTTP: resolve and index images, and be the source of their blobs.

`app.py` puts HTTP around it; a node without a superpeer embeds it as it is. The way of a request:

    resolve(reference, platform)   known and young enough → its record
                                   else ask the registry   → same manifest: confirm; new one: index it
                                   registry away           → the record, however old, said aloud; none: the error
    read(blob, chunks)             in the store → its bytes; evicted → the layer is brought again, then its bytes
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import msgspec

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Urgency
from dadi.errors import NotFound, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index import build, image
from dadi.index.chunks import Blob
from dadi.index.image import ImageLayer
from dadi.oci import platforms
from dadi.oci.manifest import Descriptor
from dadi.oci.platforms import Platform
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from superpeer.catalog import Catalog, ImageRecord
from superpeer.config import SuperpeerConfig
from superpeer.indexing import Indexer, Progress
from superpeer.origin import Origin

_FULL_FOR = 10.0
"""Seconds that a full store is believed to stay full."""


class Resolving(msgspec.Struct):
    """An image that is being resolved for whoever asks meanwhile."""

    task: asyncio.Task[ImageRecord]
    progress: Progress


class Superpeer:
    """See the head of this file. `store` may be shared with an embedding node; then that one closes it."""

    def __init__(self, config: SuperpeerConfig, store: DiskBlobs, fallbacks: Fallbacks) -> None:
        self.config = config
        self.store = store
        self.fallbacks = fallbacks
        self.registry = RegistryClient(config.registry)
        self.catalog = Catalog(Path(config.state) / "images", store, most=config.most_images)
        self.origin = Origin(
            store,
            self.registry,
            fallbacks=fallbacks,
            chunk_size=config.indexing.chunk_size,
            parallel=config.indexing.parallel_layers,
            limits=build.Limits(max_uncompressed_size=config.indexing.max_layer_size),
        )
        self._indexer = Indexer(store, self.catalog, self.origin)
        self._full_until = 0.0
        self._resolving: dict[tuple[str, str], Resolving] = {}

    def __repr__(self) -> str:
        return f"Superpeer({self.catalog!r}, {self.store!r})"

    async def start(self) -> None:
        """Read what earlier runs left."""
        await self.catalog.load()

    # ---- images

    def resolve(self, reference: str, platform: str) -> Resolving:
        """Begin (or join) finding out what `reference` is for `platform`, with its index in the store at the end.

        Raises InvalidRequest for a malformed reference at once; the task raises the rest.
        """
        ref, wanted = Reference.parse(reference), platforms.parse(platform)
        key = (str(ref), str(wanted))
        resolving = self._resolving.get(key)
        if resolving is None:
            progress = Progress()
            task = asyncio.create_task(self._resolve(ref, wanted, progress))
            resolving = self._resolving[key] = Resolving(task, progress)
            task.add_done_callback(lambda done: self._resolved(key, done))
        return resolving

    def _resolved(self, key: tuple[str, str], task: asyncio.Task[ImageRecord]) -> None:
        del self._resolving[key]
        if not task.cancelled():
            task.exception()  # looked at: every asker may have gone

    async def _resolve(self, reference: Reference, platform: Platform, progress: Progress) -> ImageRecord:
        record = self.catalog.find(str(reference), str(platform))
        if record and (reference.digest or self.catalog.age(record) <= self.config.tag_ttl):
            return record
        try:
            if record:
                # A HEAD: most of the time nothing has changed.
                top = await self.registry.resolve(reference)
                if top.digest == record.top_digest:
                    return await self.catalog.confirm(record, str(reference), str(platform), top.digest)
            resolved = await self.registry.image(reference, platform)
        except Unavailable as error:
            if record is None:
                raise
            self.fallbacks.note("registry away, answered from the cache", f"{reference}: {error.message}")
            return record
        top_digest = resolved.index_digest or resolved.descriptor.digest
        known = self.catalog.by_manifest(resolved.descriptor.digest)
        if known is not None:
            return await self.catalog.confirm(known, str(reference), str(platform), top_digest)
        index = await self._indexer.image(reference, resolved, progress)
        return await self.catalog.add(str(reference), str(platform), top_digest, index, image.encode(index))

    # ---- blobs

    async def bring(self, digest: str) -> Blob:
        """Bring a layer's uncompressed tar that was evicted; return it when it is in the store.

        Raises NotFound for a digest that no known image has.
        """
        found = self.catalog.layer_by_diff_id(digest)
        if found is None:
            hint = "ask for its image first"
            raise NotFound(f"no image that this superpeer knows has the blob {digest}", hint=hint)
        reference, layer = found
        if not self.store.has(digest):
            await self._bring_again(reference, layer, digest)
        return layer.blob

    async def _bring_again(self, reference: str, layer: ImageLayer, digest: str) -> None:
        loop = asyncio.get_running_loop()
        if loop.time() < self._full_until:
            # Whoever waits asks again soon; to stream a layer from the registry for each time would be a storm.
            raise StoreFull(f"the store had no room for {digest} a moment ago", hint="raise store.limit")
        self.fallbacks.note("blob was evicted, fetched again", digest)
        descriptor = Descriptor(media_type=layer.media_type, digest=layer.layer_digest, size=layer.layer_size)
        try:
            await self.origin.bring(Reference.parse(reference), descriptor, digest)
        except StoreFull:
            self._full_until = loop.time() + _FULL_FOR
            raise

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Be the source of an embedding node, whose own store has been asked already."""
        await self.bring(blob.digest)
        return await self.store.read(blob, chunks, urgency)

    # ---- state

    def statistics(self) -> dict[str, Any]:
        """Return counts for `dadi status` and the metrics."""
        return {
            "images": len(self.catalog.records()),
            "resolving": len(self._resolving),
            "registry_layers": self.origin.layers,
            "registry_bytes": self.origin.bytes,
            "registry": self.registry.statistics(),
            "store": self.store.statistics(),
            "fallbacks": self.fallbacks.statistics(),
        }

    async def close(self) -> None:
        """Break off what is under way; the store is closed by who opened it."""
        tasks = [resolving.task for resolving in self._resolving.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.origin.close()
        await self.registry.close()
        self.catalog.close()
