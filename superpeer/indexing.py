"""The image index: from an index artifact in the registry, else made on first sight; metadata merged, all of it stored.

Steps: (1) each layer, several at a time: its index from the artifact if there is one (`referrers.py`); else from an
earlier image, if that index was proven; else the layer is streamed and indexed by `origin.bring`; (2) the merged EROFS
metadata, in a thread; (3) the image index. An artifact that turns out to be unusable on the way is passed over as a
whole: an image has either its artifact's indexes or ours.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import msgspec

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.files import RAISE_LIMIT
from dadi.erofs import writer as erofs
from dadi.errors import DadiError, Malformed, NotFound, StoreFull
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.index.image import FIRST_SIGHT, VERSION, ImageIndex, ImageLayer
from dadi.index.layer import LayerIndex
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import ResolvedImage
from superpeer.catalog import Catalog
from superpeer.origin import Origin
from superpeer.referrers import Accepted, ShippedIndexes, is_final

Prove = Callable[[str, ImageLayer], Awaitable[bool]]
"""Checks all of a layer (in whose repository, which) that is here against its index from a registry; False: not all."""

T = TypeVar("T")
_TRIES = 8
"""Artifacts of an image whose blobs are tried."""


class Progress(msgspec.Struct):
    """How far indexing is; `bytes` of `total` are compressed bytes of layers that must come from the registry."""

    layers: int = 0
    layers_done: int = 0
    bytes: int = 0
    total: int = 0
    stage: str = "resolving"


class Indexer:
    """Makes image indexes. `referrers` is None where the registry's are not to be used."""

    def __init__(self, store: DiskBlobs, catalog: Catalog, origin: Origin, referrers: ShippedIndexes | None,
                 fallbacks: Fallbacks, prove: Prove) -> None:  # fmt: skip
        self._prove = prove
        self._store = store
        self._catalog = catalog
        self._origin = origin
        self._referrers = referrers
        self._fallbacks = fallbacks

    async def image(self, reference: Reference, resolved: ResolvedImage, progress: Progress) -> ImageIndex:
        """Return the image's index; its layer indexes and metadata are in the store then.

        So are its layers, if they had to be indexed on first sight.
        """
        if self._referrers is not None:
            progress.stage = "looking for an index"
            useless: set[str] = set()
            for _ in range(_TRIES):  # an artifact whose blobs cannot be used must not hide one whose can
                accepted = await self._referrers.find(reference, resolved, without=useless)
                if accepted is None:
                    break
                try:
                    return await self._of_artifact(self._referrers, reference, resolved, accepted, progress)
                except DadiError as error:
                    if not is_final(error):
                        raise
                    why = f"{reference}, {accepted.digest}: {error.message}"
                    self._fallbacks.note("index in the registry not used", why)
                    useless.add(accepted.digest)
        return await self.on_first_sight(reference, resolved, progress)

    async def _of_artifact(self, referrers: ShippedIndexes, reference: Reference, resolved: ResolvedImage,
                           accepted: Accepted, progress: Progress) -> ImageIndex:  # fmt: skip
        progress.stage = "fetching the index"
        progress.layers = len(resolved.manifest.layers)
        # A layer may stand in an image several times.
        pairs = dict(zip(resolved.manifest.layers, resolved.diff_ids, strict=True))

        async def fetch(descriptor: Descriptor, diff_id: str) -> tuple[LayerIndex, ImageLayer]:
            found = await referrers.layer(reference, accepted, descriptor, diff_id)
            known = self._catalog.layer_by_diff_id(diff_id)
            if known is not None and known[1].table != found[1].table:
                # Blobs are asked for by their digest: there can be only one table for it, and one of these lies.
                raise Malformed(f"it contradicts the index that {known[0]} has of layer {descriptor.digest}")
            progress.layers_done += 1
            return found

        found = dict(zip(pairs, await _all([fetch(*pair) for pair in pairs.items()]), strict=True))
        layers = [found[descriptor] for descriptor in resolved.manifest.layers]
        index = await self._merged(resolved, progress, layers)
        return msgspec.structs.replace(
            index, origin=accepted.origin, artifact=accepted.digest, signer=accepted.signer
        )

    async def on_first_sight(self, reference: Reference, resolved: ResolvedImage, progress: Progress) -> ImageIndex:
        """Return the image's index as this superpeer makes it; its layers are in the store then."""
        progress.stage = "indexing layers"
        progress.layers_done = 0
        progress.layers = len(resolved.manifest.layers)
        pairs = list(zip(resolved.manifest.layers, resolved.diff_ids, strict=True))
        with contextlib.ExitStack() as holds:
            # Held until all are here: else, in a small store, the last layer would evict the first, and reading the
            # image would fetch whole layers over and over. As it is, StoreFull says that the image does not fit.
            work = [self._layer(reference, layer, diff_id, progress, holds) for layer, diff_id in pairs]
            return await self._merged(resolved, progress, await _all(work))

    async def _merged(
        self, resolved: ResolvedImage, progress: Progress, done: list[tuple[LayerIndex, ImageLayer]]
    ) -> ImageIndex:
        progress.stage = "writing metadata"
        metadata = await asyncio.to_thread(erofs.write, [index for index, _ in done])
        blob = await self._store.put(metadata.image)
        return ImageIndex(
            version=VERSION,
            manifest_digest=resolved.descriptor.digest,
            config_digest=resolved.manifest.config.digest,
            platform=str(resolved.platform),
            config=resolved.config,
            layers=tuple(layer for _, layer in done),
            metadata=blob,
            devices=metadata.devices,
            origin=FIRST_SIGHT,
        )

    async def _layer(self, reference: Reference, descriptor: Descriptor, diff_id: str,
                     progress: Progress, holds: contextlib.ExitStack) -> tuple[LayerIndex, ImageLayer]:  # fmt: skip
        here = self._catalog.layer_by_diff_id(diff_id)
        if here is not None and here[1].seek_digest and here[1].layer_digest == descriptor.digest:
            await self._prove(*here)  # if ranges have brought all of it, it need not be streamed again
        known = self._catalog.proven_layer(descriptor.digest)
        if known is not None and known.diff_id == diff_id and self._store.has(known.index_digest):
            index = await self._origin.known(known.index_digest)
            progress.layers_done += 1
            return index, msgspec.structs.replace(known, media_type=descriptor.media_type)
        progress.total += descriptor.size
        before = 0

        def advance(done: int) -> None:
            nonlocal before
            progress.bytes += done - before
            before = done

        index, blob = await self._origin.bring(reference, descriptor, diff_id, advance)
        try:
            holds.enter_context(self._store.hold(Blob(diff_id, index.table)))
        except NotFound:
            raise StoreFull(f"the layers of {reference} do not fit the store together", hint=RAISE_LIMIT) from None
        advance(descriptor.size)
        progress.layers_done += 1
        layer = ImageLayer(descriptor.digest, descriptor.size, descriptor.media_type, diff_id, index.table,
                           blob.digest, blob.size)  # fmt: skip
        return index, layer


async def _all(work: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Run all; when one fails the others are cancelled and its own error is raised (a TaskGroup would wrap it)."""
    tasks = [asyncio.ensure_future(item) for item in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
