"""What a superpeer is, without HTTP: all its parts, put together, and the source of its images' blobs.

`app.py` puts HTTP around it; a node without a superpeer embeds it as it is. The way of a request:

    resolve(reference, platform)   what the image is, with its index in the store: `resolving.py`
    bring(blob, chunks)            in the store → nothing to do; a sibling has it (`sibling_chunks.py`) → from there;
                                   a layer with seek points → the ranges that are needed (`lazy_layers.py`);
                                   one without, that was evicted → all of it again (`origin.py`)

An index from the registry that is found to lie is withdrawn: the images that use it are indexed anew on first sight,
and the artifact is never used again.
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Source, Urgency
from dadi.errors import NotFound, StoreFull, Unavailable, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.index import build
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex, ImageLayer
from dadi.oci.credentials import CredentialSource, DockerCredentials
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.tls import Tls
from superpeer.adopting import Adopter
from superpeer.catalog import Catalog
from superpeer.config import SuperpeerConfig
from superpeer.indexing import Indexer
from superpeer.jobs import Prefetcher
from superpeer.jobs_secrets import JobSecrets
from superpeer.lazy_layers import LazyLayers
from superpeer.origin import Origin
from superpeer.original import originals_of
from superpeer.ranged import Lie
from superpeer.referrers import ShippedIndexes
from superpeer.refused import Refused
from superpeer.resolving import FULL_FOR, Resolver, Resolving
from superpeer.shown_layers import Layer, Proof, ShownLayers
from superpeer.sibling_originals import SiblingOriginals
from superpeer.siblings import Siblings
from superpeer.traces import Traces
from superpeer.traces_shipped import ShippedTraces
from superpeer.who_may import WhoMay
from superpeer.withdrawing import Withdrawing


class Superpeer:
    """See the head of this file. `store` may be shared with an embedding node; then that one closes it."""

    def __init__(self, config: SuperpeerConfig, store: DiskBlobs, fallbacks: Fallbacks,
                 credentials: CredentialSource | None = None) -> None:  # fmt: skip
        """`credentials`: what an embedding node shows to registries; None: what the Docker configuration has."""
        self.config = config
        self.store = store
        self.fallbacks = fallbacks
        self.tls = Tls.of(config.tls, fallbacks)
        self._who_may: WhoMay | None = None
        self._full_until = 0.0
        self.demands = 0
        """Reads that somebody waits for, of what is not here."""
        self._put_together(credentials or DockerCredentials(
            config.registry.docker_config, helper_timeout=config.registry.helper_timeout))  # fmt: skip

    def _put_together(self, credentials: CredentialSource) -> None:
        """Make the parts, each with all that it needs; a function of this class stands for a part that is made later.

        Only `connect` comes after that: the keys are read when all of this has been started.
        """
        config, store, fallbacks, state = self.config, self.store, self.fallbacks, Path(self.config.state)
        indexing = config.indexing
        # ---- where bytes and manifests come from
        self.job_secrets = JobSecrets(credentials, lambda reference: self.registry.forget(reference))
        self.registry = RegistryClient(config.registry, credentials=self.job_secrets)
        # ---- what is known of images
        self.shown = ShownLayers(state / "shown-layers.json", fallbacks, self._revoke_loose)
        self.catalog = Catalog(state / "images", store, most=config.most_images, on_adopted=self._revoke_loose,
                               has_shown=lambda layer: self.shown.proof(layer) is not None,
                               is_pinned=lambda record: self.prefetch.pins.is_pinned(record))  # fmt: skip
        self._refused = Refused(state / "refused-indexes.json")
        self._referrers = ShippedIndexes(store, self.registry, self._refused, chunk_size=indexing.chunk_size,
                                         fallbacks=fallbacks)  # fmt: skip
        self.withdrawing = Withdrawing(store, self.catalog, self._refused, fallbacks, anew=self._resolve_anew,
                                       drop=lambda layer: self.lazy.drop(layer),
                                       refuse_sibling=self._refuse_sibling)  # fmt: skip
        # ---- layers: from siblings, by ranges, as they are, whole
        self.siblings: Siblings | None = None
        self.sibling_originals: SiblingOriginals | None = None
        if config.siblings:
            adopter = Adopter(store, self.catalog, self.shown, fallbacks, chunk_size=indexing.chunk_size,
                              may_be_used=self._may_be_used)  # fmt: skip
            self.siblings = Siblings(config, store, adopter, fallbacks, on_lie=self.withdrawing.sibling_lied,
                                     tls=self.tls)  # fmt: skip
            self.sibling_originals = SiblingOriginals(self.siblings, fallbacks)
        self.lazy = LazyLayers(store, self.registry, parallel=indexing.parallel_ranges, rest_after=indexing.rest_after,
                               fallbacks=fallbacks, on_lie=self.withdrawing.lied,
                               on_proven=self.catalog.prove,
                               may_use=lambda ref, digest: self.originals.is_proven(ref, digest),
                               on_came=lambda blob, name: self.originals.coming.came(blob.digest, blob.size, name),
                               nearer=self._nearer if self.siblings else None)  # fmt: skip
        self.originals = originals_of(config, store, self.registry, fallbacks, self.catalog, self.shown, self.lazy,
                                      self.withdrawing.lied, self.sibling_originals)  # fmt: skip
        self.origin = Origin(store, self.registry, fallbacks=fallbacks, chunk_size=indexing.chunk_size,
                             parallel=indexing.parallel_layers, mirrored=config.registry.mirrors,
                             limits=build.Limits(max_uncompressed_size=indexing.max_layer_size),
                             originals=self.originals, keep_compressed=indexing.keep_compressed,
                             on_shown=partial(self.shown.add, proof=Proof.HASHED))  # fmt: skip
        self._indexer = Indexer(store, self.catalog, self.origin, self._shipped_indexes, fallbacks, self._prove)
        # ---- before they are wanted
        self.traces = Traces(state / "traces", config.traces, self.catalog, fallbacks,
                             look=lambda manifest: self.shipped.asked(manifest),
                             never_look=lambda manifest: self.shipped.never(manifest))  # fmt: skip
        self.shipped = ShippedTraces(self.traces, self.catalog, self._shipped_indexes, fallbacks)
        self.prefetch = Prefetcher(self, self.traces.startup_chunks)
        self.resolver = Resolver(self.catalog, self.registry, self._indexer, self._refused, self.siblings, self.shipped,
                                 fallbacks, tag_ttl=config.tag_ttl)  # fmt: skip

    def connect(self, who_may: WhoMay) -> None:
        """Show siblings what it signs, and revoke what it gave of layers that turn out to be another's."""
        self._who_may = who_may
        if self.siblings is not None:
            self.siblings.connect(who_may)

    @property
    def _shipped_indexes(self) -> ShippedIndexes | None:
        return self._referrers if self.config.indexing.use_artifacts else None

    def _nearer(self, ref: Reference) -> Source:
        """Return what siblings have of compressed layers, for who may read a repository."""
        assert self.sibling_originals is not None
        has = partial(self.registry.blob_size, ref)
        return self.sibling_originals.chunks(partial(self.originals.proven.shares, ref.registry), has)

    def _revoke_loose(self, layer: Layer) -> None:
        if self._who_may is not None:
            self._who_may.revoke_loose(layer)

    def _refuse_sibling(self, index_digest: str) -> None:
        if self.siblings is not None:
            self.siblings.refuse(index_digest)

    def __repr__(self) -> str:
        return f"Superpeer({self.catalog!r}, {self.store!r})"

    async def start(self) -> None:
        """Read what earlier runs left. Raises ConfigError for keys and certificates that cannot be read."""
        if self.tls:
            self.tls.check_urls("siblings", self.config.siblings)
            await self.tls.start()
        await self._referrers.load(self.config.indexing.trusted_keys)
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
        allowed = self.config.indexing.use_artifacts and not self._refused.has(index.artifact)
        return allowed and self._referrers.trusts(index.signer)

    async def _prove(self, reference: str, layer: ImageLayer) -> bool:
        try:
            return await self.lazy.prove(reference, layer)
        except Lie as lie:
            self.withdrawing.begin(layer, lie)  # not waited for: that resolves images, and so do we
            return False

    def resolve(self, reference: str, platform: str) -> Resolving:
        """See `Resolver`."""
        return self.resolver.resolve(reference, platform)

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
                self._full_until = loop.time() + FULL_FOR
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
            "resolving": len(self.resolver),
            "registry_layers": self.origin.layers,
            "registry_bytes": self.origin.bytes + self.lazy.statistics()["bytes"],
            "ranges": self.lazy.statistics(),
            "originals": self.originals.statistics(),
            "registry": self.registry.statistics(),
            "store": self.store.statistics(),
            "siblings": self._of_siblings(),
            "prefetch": self.prefetch.statistics(),
            "traces": self.traces.statistics(),
            "tls": self.tls.statistics() if self.tls else None,
            "fallbacks": self.fallbacks.statistics(),
        }

    def _of_siblings(self) -> dict[str, Any] | None:
        if self.siblings is None or self.sibling_originals is None:
            return None
        return {**self.siblings.statistics(), "original_bytes": self.sibling_originals.bytes}

    async def close(self) -> None:
        """Break off what is under way; the store is closed by who opened it."""
        await self.prefetch.close()
        await self.shipped.close()
        await self.traces.close()
        await self.lazy.close()
        if self.siblings is not None:
            await self.siblings.close()
        resolving = self.resolver.stop()
        await self.withdrawing.close()
        await asyncio.gather(*resolving, return_exceptions=True)
        await self.origin.close()  # before those whose blobs it reads, and which wait for it
        await self.originals.close()
        await self.registry.close()
        await self.shown.close()
        self.catalog.close()
        if self.tls:
            await self.tls.close()
