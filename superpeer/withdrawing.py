"""Withdraws an index that lies: its images are forgotten and indexed anew, and what it had vouched for is removed.

    lied            an index from a registry: its artifact is never used again, or not for a while (`refused.py`)
    sibling_lied    an index, or a tar, that came from another superpeer: that one's index is not taken again

What was verified by a table that may lie goes; whole blobs were verified by their digests, and stay. Meanwhile the
layers' tars are away, and not unknown: `is_replacing`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Iterator

import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.errors import DadiError
from dadi.fallbacks import Fallbacks
from dadi.index.image import ImageLayer
from dadi.oci.reference import Reference
from superpeer.catalog import Catalog, ImageRecord
from superpeer.ranged import Lie
from superpeer.refused import Refused

log = structlog.get_logger()
_REMOVE_TRIES = 50


class Withdrawing:
    """See the head of this file.

    `drop` has a layer that is fetched by ranges closed, and its rest forgotten (`lazy_layers.py`); `anew` resolves and
    indexes an image: (reference, platform); `refuse_sibling` has a sibling's index not taken again.
    """

    def __init__(self, store: DiskBlobs, catalog: Catalog, refused: Refused, fallbacks: Fallbacks, *,
                 drop: Callable[[ImageLayer], Awaitable[None]], anew: Callable[[str, str], Awaitable[object]],
                 refuse_sibling: Callable[[str], None]) -> None:  # fmt: skip
        self._drop = drop
        self._refuse_sibling = refuse_sibling
        self._store = store
        self._catalog = catalog
        self._refused = refused
        self._fallbacks = fallbacks
        self._anew = anew
        self._healing: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._replacing: Counter[str] = Counter()
        """Diff IDs of layers whose images are being indexed anew."""

    def __repr__(self) -> str:
        return f"Withdrawing({len(self._healing)} under way)"

    def is_replacing(self, diff_id: str) -> bool:
        """Whether a layer's image is being indexed anew."""
        return diff_id in self._replacing

    async def lied(self, layer: ImageLayer, lie: Lie) -> None:
        """Withdraw a layer's index, and index the images that use it anew; once, whoever finds out at the same time."""
        await asyncio.shield(self.begin(layer, lie))

    def begin(self, layer: ImageLayer, lie: Lie) -> asyncio.Task[None]:
        """Begin (or join) to do as `lied`."""
        task = self._healing.get(layer.found_index)
        if task is None:
            task = self._healing[layer.found_index] = asyncio.create_task(self._replace(layer, lie))
            task.add_done_callback(lambda done: self._healed(layer, done))
        return task

    def _healed(self, layer: ImageLayer, task: asyncio.Task[None]) -> None:
        self._healing.pop(layer.found_index, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("could not replace a lying index", layer=layer.layer_digest, why=str(error))

    async def sibling_lied(self, layer: ImageLayer, lie: Lie) -> None:
        """A tar that came from a sibling, or its index, is not what it should be: index the images anew."""
        if layer.seek_digest:
            await self.lied(layer, lie)
            return
        self._fallbacks.note("lying index thrown away", f"layer {layer.layer_digest}, from a sibling: {lie.message}")
        wrong = self._catalog.using(layer)
        with self._being_replaced(each.diff_id for _, index in wrong for each in index.layers):
            for record, _ in wrong:
                self._refuse_sibling(record.index_digest)
                await self._catalog.forget(record)
            await self._throw_away(layer)
            for record, _ in wrong:
                await self._index_anew(record)

    @contextlib.contextmanager
    def _being_replaced(self, diff_ids: Iterable[str]) -> Iterator[None]:
        """Inside, layers that no image has any more are away, and not unknown."""
        layers = set(diff_ids)
        self._replacing.update(layers)
        try:
            yield
        finally:
            self._replacing.subtract(layers)
            self._replacing += Counter()  # drops the zeros

    async def _replace(self, layer: ImageLayer, lie: Lie) -> None:
        why = f"layer {layer.layer_digest}: {lie.message}"
        kind = "lying index thrown away" if lie.proven else "index doubted, not used for a while"
        self._fallbacks.note(kind, why)
        withdrawn = self._catalog.using(layer) if layer.seek_digest else []
        layers = {each.found_index: each for _, index in withdrawn for each in index.layers if each.seek_digest}
        layers[layer.found_index] = layer
        with self._being_replaced(each.diff_id for each in layers.values()):
            for record, _ in withdrawn:
                await self._catalog.forget(record)
            for record, index in withdrawn:
                log.error(kind, image=record.reference, artifact=index.artifact, manifest=record.manifest_digest,
                          why=why)  # fmt: skip
                if lie.proven:
                    await self._refused.add(index.artifact, why)
                else:
                    self._refused.doubt(index.artifact, why)
            for each in layers.values():
                await self._drop(each)
            await self._throw_away(layer)
            for record, _ in withdrawn:
                await self._index_anew(record)

    async def _index_anew(self, record: ImageRecord) -> None:
        # By its digest: the tag may have moved, and nodes run this image.
        pinned = Reference.parse(record.reference).at(record.manifest_digest)
        try:
            await self._anew(str(pinned), record.platform)
        except DadiError as error:
            # Whoever asks for the image next has it indexed then.
            log.error("could not index an image anew", image=record.reference, why=str(error))

    async def _throw_away(self, layer: ImageLayer) -> None:
        """Remove what was verified by tables that may lie; whole blobs were verified by their digests and stay."""
        for digest in (layer.diff_id, layer.layer_digest):
            for _ in range(_REMOVE_TRIES):
                if self._store.find(digest) is None or self._store.has(digest) or await self._store.remove(digest):
                    break
                await asyncio.sleep(0.1)  # somebody is being served from it

    async def close(self) -> None:
        """Break off what is under way."""
        tasks = list(self._healing.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
