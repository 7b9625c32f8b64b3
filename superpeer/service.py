"""What a superpeer does, without HTTP: resolve and index images, and be the source of their blobs.

`app.py` puts HTTP around it; a node without a superpeer embeds it as it is. The way of a request:

    resolve(reference, platform)   known and young enough → its record
                                   else ask the registry   → same manifest: confirm; new one: index it
                                   registry away           → the record, however old, said aloud; none: the error
    bring(blob, chunks)            in the store → nothing to do; a layer with seek points → the ranges that are needed
                                   (`lazy_layers.py`); one without, that was evicted → all of it again (`origin.py`)

An index from the registry that is found to lie is withdrawn: the images that use it are indexed anew on first sight,
and the artifact is never used again.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Urgency
from dadi.errors import ConfigError, DadiError, NotFound, StoreFull, Unavailable, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.index import build, image, signature
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex, ImageLayer
from dadi.oci import platforms
from dadi.oci.manifest import Descriptor
from dadi.oci.platforms import Platform
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient, ResolvedImage
from superpeer.catalog import Catalog, ImageRecord
from superpeer.config import SuperpeerConfig
from superpeer.indexing import Indexer, Progress
from superpeer.lazy_layers import LazyLayers
from superpeer.origin import Origin
from superpeer.ranged import Lie
from superpeer.referrers import Referrers
from superpeer.refused import Refused

log = structlog.get_logger()
_REMOVE_TRIES = 50
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
        self._refused = Refused(Path(config.state) / "refused-indexes.json")
        self._referrers = Referrers(
            store, self.registry, self._refused, chunk_size=config.indexing.chunk_size, fallbacks=fallbacks
        )
        self._indexer = Indexer(store, self.catalog, self.origin,
                                self._referrers if config.indexing.use_artifacts else None, fallbacks,
                                self._prove)  # fmt: skip
        self.lazy = LazyLayers(
            store, self.registry, parallel=config.indexing.parallel_ranges, rest_after=config.indexing.rest_after,
            fallbacks=fallbacks, on_lie=self._lied, on_proven=self.catalog.prove,
        )  # fmt: skip
        self._healing: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._replacing: Counter[str] = Counter()
        """Diff IDs of layers whose images are being indexed anew."""
        self._no_room: dict[str, tuple[float, StoreFull]] = {}
        """Manifests whose layers did not fit, until when that is believed, and what was said."""
        self._full_until = 0.0
        self._resolving: dict[tuple[str, str], Resolving] = {}

    def __repr__(self) -> str:
        return f"Superpeer({self.catalog!r}, {self.store!r})"

    async def start(self) -> None:
        """Read what earlier runs left. Raises ConfigError for keys that cannot be read."""
        self._referrers.keys = await asyncio.to_thread(_keys, self.config.indexing.trusted_keys)
        await self._refused.load()
        await self.catalog.load()
        for record in self.catalog.records():
            if not self._may_be_used(self.catalog.image(record)):
                self.fallbacks.note("index no longer trusted", f"{record.reference}: made anew when it is asked for")
                await self.catalog.forget(record)
        self.lazy.start()

    def _may_be_used(self, index: ImageIndex) -> bool:
        """Whether the configuration of today allows an index that was found in a registry earlier."""
        if not index.artifact:
            return True
        trusted = {signature.key_id(key) for key in self._referrers.keys}
        allowed = self.config.indexing.use_artifacts and not self._refused.has(index.artifact)
        return allowed and (not trusted or index.signer in trusted)

    async def _prove(self, reference: str, layer: ImageLayer) -> bool:
        try:
            return await self.lazy.prove(reference, layer)
        except Lie as lie:
            self._heal(layer, lie)  # not waited for: that resolves images, and so do we
            return False

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
                # It may have been withdrawn meanwhile.
                still = self.catalog.find(str(reference), str(platform)) is record
                if still and top.digest == record.top_digest:
                    return await self.catalog.confirm(record, str(reference), str(platform), top.digest)
            resolved = await self.registry.image(reference, platform)
        except Unavailable as error:
            if record is None or self.catalog.find(str(reference), str(platform)) is not record:
                raise
            self.fallbacks.note("registry away, answered from the cache", f"{reference}: {error.message}")
            return record
        top_digest = resolved.index_digest or resolved.descriptor.digest
        known = self.catalog.by_manifest(resolved.descriptor.digest, reference.name)
        if known is not None:
            return await self.catalog.confirm(known, str(reference), str(platform), top_digest)
        index = await self._index(reference, resolved, progress)
        return await self.catalog.add(str(reference), str(platform), top_digest, index, image.encode(index))

    async def _index(self, reference: Reference, resolved: ResolvedImage, progress: Progress) -> ImageIndex:
        loop = asyncio.get_running_loop()
        until, full = self._no_room.get(resolved.descriptor.digest, (0.0, None))
        if full is not None and loop.time() < until:
            raise full  # whoever waits asks again soon; to stream its layers each time would be a storm
        self._no_room.pop(resolved.descriptor.digest, None)
        try:
            index = await self._indexer.image(reference, resolved, progress)
            if index.artifact and self._refused.has(index.artifact):  # found out meanwhile
                index = await self._indexer.on_first_sight(reference, resolved, progress)
            return index
        except StoreFull as error:
            self._no_room[resolved.descriptor.digest] = (loop.time() + _FULL_FOR, error)
            raise

    # ---- blobs

    def find(self, digest: str) -> Blob:
        """Return a blob that is here, or a layer's uncompressed tar that can be brought.

        Raises NotFound for a digest that no known image has.
        """
        blob = self.store.find(digest)
        if blob is not None and self.store.has(digest):
            return blob
        return self._layer(digest)[1].blob

    def _layer(self, diff_id: str) -> tuple[str, ImageLayer]:
        found = self.catalog.layer_by_diff_id(diff_id)
        if found is not None:
            return found
        if diff_id in self._replacing:
            raise Unavailable(f"the image with the layer {diff_id} is being indexed anew", retry_after=1)
        hint = "ask for its image first"
        raise NotFound(f"no image that this superpeer knows has the blob {diff_id}", hint=hint)

    async def bring(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> None:
        """Bring chunks of what `find` returned into the store. Raises what the registry client raises; StoreFull."""
        if not await self.store.missing(blob, chunks):
            return
        found = self._layer(blob.digest)
        loop = asyncio.get_running_loop()
        if loop.time() < self._full_until:
            # Whoever waits asks again soon; to fetch it from the registry each time would be a storm.
            raise StoreFull(f"the store had no room for {blob.digest} a moment ago", hint="raise store.limit")
        try:
            await self._bring(*found, chunks, urgency)
        except StoreFull:
            self._full_until = loop.time() + _FULL_FOR
            raise

    async def _bring(self, reference: str, layer: ImageLayer, chunks: range, urgency: Urgency) -> None:
        if layer.seek_digest:
            try:
                await self.lazy.bring(reference, layer, chunks, urgency)
                return
            except Lie as lie:
                await self._lied(layer, lie)
            except Unsupported as error:
                self.fallbacks.note("no ranges, whole layer fetched", error.message)
        else:
            self.fallbacks.note("blob was evicted, fetched again", layer.diff_id)
        if not self.store.has(layer.diff_id):
            await self._bring_whole(reference, layer)

    async def _bring_whole(self, reference: str, layer: ImageLayer) -> None:
        descriptor = Descriptor(media_type=layer.media_type, digest=layer.layer_digest, size=layer.layer_size)
        _, made = await self.origin.bring(Reference.parse(reference), descriptor, layer.diff_id)
        if layer.seek_digest and made.digest != layer.index_digest:
            await self._lied(layer, Lie("its index is not the one that the whole layer gives"))

    async def _lied(self, layer: ImageLayer, lie: Lie) -> None:
        """Withdraw a layer's index, and index the images that use it anew; once, whoever finds out at the same time."""
        await asyncio.shield(self._heal(layer, lie))

    def _heal(self, layer: ImageLayer, lie: Lie) -> asyncio.Task[None]:
        task = self._healing.get(layer.found_index)
        if task is None:
            task = self._healing[layer.found_index] = asyncio.create_task(self._replace(layer, lie))
            task.add_done_callback(lambda done: self._healed(layer, done))
        return task

    def _healed(self, layer: ImageLayer, task: asyncio.Task[None]) -> None:
        self._healing.pop(layer.found_index, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("could not replace a lying index", layer=layer.layer_digest, why=str(error))

    async def _replace(self, layer: ImageLayer, lie: Lie) -> None:
        why = f"layer {layer.layer_digest}: {lie.message}"
        self.fallbacks.note("lying index thrown away", why)
        withdrawn = await self.catalog.withdraw(layer)
        layers = {each.found_index: each for _, index in withdrawn for each in index.layers if each.seek_digest}
        layers[layer.found_index] = layer
        self._replacing.update(each.diff_id for each in layers.values())
        try:
            for record, index in withdrawn:
                log.error("an index in the registry lies and is thrown away", image=record.reference,
                          artifact=index.artifact, manifest=record.manifest_digest, why=why)  # fmt: skip
                await self._refused.add(index.artifact, why)
            for each in layers.values():
                await self.lazy.drop(each)
            await self._throw_away(layer)
            for record, _ in withdrawn:
                await self._index_anew(record)
        finally:
            self._replacing.subtract(each.diff_id for each in layers.values())
            self._replacing += Counter()  # drops the zeros

    async def _index_anew(self, record: ImageRecord) -> None:
        # By its digest: the tag may have moved, and nodes run this image.
        pinned = Reference.parse(record.reference).at(record.manifest_digest)
        try:
            await asyncio.shield(self.resolve(str(pinned), record.platform).task)
        except DadiError as error:
            # Whoever asks for the image next has it indexed then.
            log.error("could not index an image anew", image=record.reference, why=str(error))

    async def _throw_away(self, layer: ImageLayer) -> None:
        """Remove what was verified by tables that may lie; whole blobs were verified by their digests and stay."""
        for digest in (layer.diff_id, layer.layer_digest):
            for _ in range(_REMOVE_TRIES):
                if self.store.find(digest) is None or self.store.has(digest) or await self.store.remove(digest):
                    break
                await asyncio.sleep(0.1)  # somebody is being served from it

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Be the source of an embedding node, whose own store has been asked already."""
        await self.bring(blob, chunks, urgency)
        return await self.store.read(blob, chunks, urgency)

    # ---- state

    def statistics(self) -> dict[str, Any]:
        """Return counts for `dadi status` and the metrics."""
        return {
            "images": len(self.catalog.records()),
            "resolving": len(self._resolving),
            "registry_layers": self.origin.layers,
            "registry_bytes": self.origin.bytes + self.lazy.statistics()["bytes"],
            "ranges": self.lazy.statistics(),
            "registry": self.registry.statistics(),
            "store": self.store.statistics(),
            "fallbacks": self.fallbacks.statistics(),
        }

    async def close(self) -> None:
        """Break off what is under way; the store is closed by who opened it."""
        await self.lazy.close()
        tasks = [*(resolving.task for resolving in self._resolving.values()), *self._healing.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.origin.close()
        await self.registry.close()
        self.catalog.close()


def _keys(paths: tuple[str, ...]) -> list[Ed25519PublicKey]:
    keys = []
    for path in paths:
        try:
            pem = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"indexing.trusted_keys: {path} cannot be read: {error.strerror}") from None
        keys.append(signature.public_key(pem, f"indexing.trusted_keys: {path}"))
    return keys
