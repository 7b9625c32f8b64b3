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
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Urgency
from dadi.errors import NotFound, StoreFull, Unavailable, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.index import build, image, signature
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex, ImageLayer
from dadi.oci import platforms
from dadi.oci.credentials import CredentialSource, DockerCredentials
from dadi.oci.manifest import Descriptor
from dadi.oci.platforms import Platform
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient, ResolvedImage
from dadi.tls import Tls
from superpeer.adopting import Adopter
from superpeer.catalog import Catalog, ImageRecord
from superpeer.config import SuperpeerConfig
from superpeer.indexing import Indexer, Progress
from superpeer.jobs import Prefetcher
from superpeer.jobs_pace import PACE, Pace
from superpeer.jobs_secrets import JobSecrets
from superpeer.lazy_layers import LazyLayers
from superpeer.origin import Origin
from superpeer.original import originals_of
from superpeer.ranged import Lie
from superpeer.referrers import ShippedIndexes, trusted_keys
from superpeer.refused import Refused
from superpeer.shown_layers import Proof, ShownLayers
from superpeer.siblings import Siblings
from superpeer.traces import Traces
from superpeer.traces_shipped import ShippedTraces
from superpeer.withdrawing import Withdrawing

log = structlog.get_logger()
_PATIENCE, _REST = 5.0, 10.0
"""Seconds that a registry may take where an older answer would do; and for which it is then not asked again."""
_FULL_FOR = 10.0
"""Seconds that a full store is believed to stay full."""


class Resolving(msgspec.Struct):
    """An image that is being resolved for whoever asks meanwhile."""

    task: asyncio.Task[ImageRecord]
    progress: Progress
    pace: Pace | None = None
    """A job's, until somebody else comes to wait for it."""


class Superpeer:
    """See the head of this file. `store` may be shared with an embedding node; then that one closes it."""

    def __init__(self, config: SuperpeerConfig, store: DiskBlobs, fallbacks: Fallbacks,
                 credentials: CredentialSource | None = None) -> None:  # fmt: skip
        """`credentials`: what an embedding node shows to registries; None: what the Docker configuration has."""
        self.config = config
        self.store = store
        self.fallbacks = fallbacks
        self.tls = Tls.of(config.tls, fallbacks)
        self.job_secrets = JobSecrets(credentials or DockerCredentials(
            config.registry.docker_config, helper_timeout=config.registry.helper_timeout))  # fmt: skip
        self.registry = RegistryClient(config.registry, credentials=self.job_secrets)
        self.job_secrets.forget_grants = self.registry.forget
        self.catalog = Catalog(Path(config.state) / "images", store, most=config.most_images)
        self.shown = ShownLayers(Path(config.state) / "shown-layers.json", fallbacks)
        self.catalog.has_shown = lambda layer: self.shown.proof(layer) is not None
        self.origin = Origin(
            store, self.registry, fallbacks=fallbacks, chunk_size=config.indexing.chunk_size,
            parallel=config.indexing.parallel_layers,
            limits=build.Limits(max_uncompressed_size=config.indexing.max_layer_size),
        )  # fmt: skip
        self.origin.mirrored = config.registry.mirrors
        self.origin.on_shown = partial(self.shown.add, proof=Proof.HASHED)
        self._refused = Refused(Path(config.state) / "refused-indexes.json")
        self._referrers = ShippedIndexes(
            store, self.registry, self._refused, chunk_size=config.indexing.chunk_size, fallbacks=fallbacks
        )
        self._indexer = Indexer(store, self.catalog, self.origin,
                                self._referrers if config.indexing.use_artifacts else None, fallbacks,
                                self._prove)  # fmt: skip
        self.withdrawing = Withdrawing(store, self.catalog, self._refused, fallbacks, self._resolve_anew)
        self.lazy = LazyLayers(
            store, self.registry, parallel=config.indexing.parallel_ranges, rest_after=config.indexing.rest_after,
            fallbacks=fallbacks, on_lie=self.withdrawing.lied, on_proven=self.catalog.prove,
        )  # fmt: skip
        self.withdrawing.lazy = self.lazy
        self.originals = originals_of(config, store, self.registry, fallbacks, self.catalog, self.lazy,
                                      self.withdrawing.lied)  # fmt: skip
        self.origin.local = self.originals.local
        self.siblings: Siblings | None = None
        if config.siblings:
            adopter = Adopter(store, self.catalog, self.shown, fallbacks, chunk_size=config.indexing.chunk_size,
                              may_be_used=self._may_be_used)  # fmt: skip
            self.siblings = Siblings(config, store, adopter, fallbacks, on_lie=self.withdrawing.sibling_lied,
                                     tls=self.tls)  # fmt: skip
            self.withdrawing.refuse_sibling = self.siblings.refuse
        self._no_room: dict[str, tuple[float, StoreFull]] = {}
        """Manifests whose layers did not fit, until when that is believed, and what was said."""
        self._full_until = 0.0
        self._hangs: dict[str, float] = {}
        """Registries that let us wait, and until when they are not asked where an older answer would do."""
        self.demands = 0
        """Reads that somebody waits for, of what is not here."""
        self.prefetch = Prefetcher(self)
        self.traces = Traces(Path(config.state) / "traces", config.traces, self.catalog, fallbacks)
        self.prefetch.shares.startup_chunks = self.traces.startup_chunks
        self.shipped = ShippedTraces(self.traces, self.catalog,
                                     self._referrers if config.indexing.use_artifacts else None, fallbacks)  # fmt: skip
        self._resolving: dict[tuple[str, str], Resolving] = {}

    def __repr__(self) -> str:
        return f"Superpeer({self.catalog!r}, {self.store!r})"

    async def start(self) -> None:
        """Read what earlier runs left. Raises ConfigError for keys and certificates that cannot be read."""
        if self.tls:
            self.tls.check_urls("siblings", self.config.siblings)
            await self.tls.start()
        self._referrers.keys = await asyncio.to_thread(trusted_keys, self.config.indexing.trusted_keys)
        await self._refused.load()
        await self.originals.start()
        await self.shown.load()
        await self.catalog.load()
        for record in self.catalog.records():
            if not self._may_be_used(self.catalog.image(record)):
                self.fallbacks.note("index no longer trusted", f"{record.reference}: made anew when it is asked for")
                await self.catalog.forget(record)
        self.lazy.start()
        await self.traces.load()
        await self.prefetch.start()

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
            self.withdrawing.begin(layer, lie)  # not waited for: that resolves images, and so do we
            return False

    # ---- images

    def resolve(self, reference: str, platform: str) -> Resolving:
        """Begin (or join) finding out what `reference` is for `platform`, with its index in the store at the end.

        Raises InvalidRequest for a malformed reference at once; the task raises the rest.
        """
        ref, wanted = Reference.parse(reference), platforms.parse(platform)
        key = (str(ref), str(wanted))
        resolving = self._resolving.get(key)
        pace = PACE.get()
        if resolving is not None and resolving.pace is not None:
            if pace is None:
                resolving.pace.lift()
            else:
                resolving.pace.also(pace)
        if resolving is None:
            progress = Progress()
            part = pace.part() if pace else None
            work = self._resolve(ref, wanted, progress)
            task = asyncio.create_task(work, context=part.begins() if part else None)
            resolving = self._resolving[key] = Resolving(task, progress, part)
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
                top = await self._look_again(reference)
                # It may have been withdrawn meanwhile.
                still = self.catalog.find(str(reference), str(platform)) is record
                if still and top.digest == record.top_digest:
                    return await self.catalog.confirm(record, str(reference), str(platform), top.digest)
            resolved = await self.registry.image(reference, platform)
        except Unavailable as error:
            if record is None or self.catalog.find(str(reference), str(platform)) is not record:
                raise
            self.fallbacks.note("registry away, answered from the cache", f"{reference}: {error}")
            return record
        top_digest = resolved.index_digest or resolved.descriptor.digest
        known = self.catalog.by_manifest(resolved.descriptor.digest, reference.name)
        if known is None and self.siblings is not None and await self.siblings.knows(resolved.descriptor.digest):
            known = self.catalog.by_manifest(resolved.descriptor.digest, reference.name)
        if known is not None:
            known = await self.catalog.confirm(known, str(reference), str(platform), top_digest)
            await self._look_for_trace(known)
            return known
        index = await self._index(reference, resolved, progress)
        record = await self.catalog.add(str(reference), str(platform), top_digest, index, image.encode(index))
        if self.siblings is not None:
            self.siblings.announce(record.index_digest)
        await self._look_for_trace(record)
        return record

    async def _look_for_trace(self, record: ImageRecord) -> None:
        """Have a startup trace looked for beside an image that is new here; a prefetch job needs to know at once."""
        if PACE.get() is not None:
            await self.shipped.wait(record)
        else:
            self.shipped.begin(record)

    async def _look_again(self, reference: Reference) -> Descriptor:
        """Return what a reference leads to now, if the registry says so soon: there is an older answer. Unavailable."""
        loop, registry = asyncio.get_running_loop(), reference.registry
        if loop.time() < self._hangs.get(registry, 0.0):
            raise Unavailable(f"{registry} did not answer a moment ago")
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self.registry.resolve(reference)
        except TimeoutError:
            self._hangs[registry] = loop.time() + _REST
            raise Unavailable(f"{registry} did not answer in {_PATIENCE:.0f} s") from None

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

    async def learn(self, digest: str) -> None:
        """Have siblings asked about a blob that is not known here, before `find`. Raises as `Siblings.learn` does."""
        if self.siblings is None or self.store.has(digest) or self.catalog.record_of(digest) is not None:
            return
        if not self.withdrawing.is_replacing(digest):
            await self.siblings.learn(digest)

    def find(self, digest: str) -> Blob:
        """Return a blob that is here, or a layer's uncompressed tar that can be brought.

        Raises NotFound for a digest that no known image has.
        """
        self.catalog.touch(digest)
        blob = self.store.find(digest)
        if blob is not None and self.store.has(digest):
            return blob
        return self._layer(digest)[1].blob

    def _layer(self, diff_id: str) -> tuple[str, ImageLayer]:
        found = self.catalog.layer_by_diff_id(diff_id)
        if found is not None:
            return found
        if self.withdrawing.is_replacing(diff_id):
            raise Unavailable(f"the image with the layer {diff_id} is being indexed anew", retry_after=1)
        hint = "ask for its image first"
        raise NotFound(f"no image that this superpeer knows has the blob {diff_id}", hint=hint)

    async def bring(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> None:
        """Bring chunks of what `find` returned into the store. Raises what the registry client raises; StoreFull."""
        if not await self.store.missing(blob, chunks):
            return
        found = self._layer(blob.digest)
        self.catalog.touch(blob.digest)
        loop = asyncio.get_running_loop()
        if loop.time() < self._full_until:
            # Whoever waits asks again soon; to fetch it from the registry each time would be a storm.
            raise StoreFull(f"the store had no room for {blob.digest} a moment ago", hint="raise store.limit")
        self.demands += urgency < Urgency.PREFETCH
        try:
            await self._bring(*found, chunks, urgency)
        except StoreFull:
            if urgency < Urgency.PREFETCH:  # else who is waited for finds out by himself: what he wants may fit
                self._full_until = loop.time() + _FULL_FOR
            raise
        finally:
            self.demands -= urgency < Urgency.PREFETCH

    async def _bring(self, reference: str, layer: ImageLayer, chunks: range, urgency: Urgency) -> None:
        if self.siblings is not None and await self.siblings.chunks.bring(layer, chunks, urgency):
            return
        if layer.seek_digest:
            try:
                await self.lazy.bring(reference, layer, chunks, urgency)
                return
            except Lie as lie:
                await self.withdrawing.lied(layer, lie)
            except Unsupported as error:
                self.fallbacks.note("no ranges, whole layer fetched", str(error))
        else:
            self.fallbacks.note("blob was evicted, fetched again", layer.diff_id)
        if not self.store.has(layer.diff_id):
            await self._bring_whole(reference, layer)

    async def _bring_whole(self, reference: str, layer: ImageLayer) -> None:
        descriptor = Descriptor(media_type=layer.media_type, digest=layer.layer_digest, size=layer.layer_size)
        _, made = await self.origin.bring(Reference.parse(reference), descriptor, layer.diff_id)
        if layer.seek_digest and made.digest != layer.index_digest:
            await self.withdrawing.lied(layer, Lie("its index is not the one that the whole layer gives"))

    async def _resolve_anew(self, reference: str, platform: str) -> None:
        await asyncio.shield(self.resolve(reference, platform).task)

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
            "originals": self.originals.statistics(),
            "registry": self.registry.statistics(),
            "store": self.store.statistics(),
            "siblings": self.siblings.statistics() if self.siblings else None,
            "prefetch": self.prefetch.statistics(),
            "traces": self.traces.statistics(),
            "tls": self.tls.statistics() if self.tls else None,
            "fallbacks": self.fallbacks.statistics(),
        }

    async def close(self) -> None:
        """Break off what is under way; the store is closed by who opened it."""
        await self.prefetch.close()
        await self.shipped.close()
        await self.traces.close()
        await self.lazy.close()
        if self.siblings is not None:
            await self.siblings.close()
        tasks = [resolving.task for resolving in self._resolving.values()]
        for task in tasks:
            task.cancel()
        await self.withdrawing.close()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.originals.close()
        await self.origin.close()
        await self.registry.close()
        await self.shown.close()
        self.catalog.close()
        if self.tls:
            await self.tls.close()
