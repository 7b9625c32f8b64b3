"""Which images the superpeer knows: reference and platform → image index; kept on disk, a small JSON file each.

The image index, its layer indexes, seek tables and metadata are held in the store for as long as the record stands:
they are small and dear. Layers are not held: they can be had from the registry again.

A layer's index is *proven* if this superpeer has made it, or has checked it against the whole layer. Only proven ones
are used for another image: whoever may push an index into one repository must not speak for the layers of others.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from dadi.blobs.layout import write_durably
from dadi.blobs.store import BlobStore
from dadi.errors import DadiError, NotFound
from dadi.index import image as image_index
from dadi.index.image import ImageIndex, ImageLayer
from dadi.oci.reference import Reference

log = structlog.get_logger()


class ImageRecord(msgspec.Struct, frozen=True):
    """What `reference` was for `platform` when the registry was last asked (`resolved_at`, seconds since 1970).

    `top_digest` is what the reference itself leads to: the manifest, or the index of several platforms.
    """

    reference: str
    platform: str
    top_digest: str
    manifest_digest: str
    index_digest: str
    index_size: int
    resolved_at: float


class Catalog:
    """The records, in memory and under `directory`."""

    def __init__(
        self, directory: Path, store: BlobStore, *, most: int = 2000, clock: Callable[[], float] = time.time
    ) -> None:
        """`most`: records that are kept; the ones that were asked for least recently go first."""
        self._directory = directory
        self._store = store
        self._clock = clock
        self._most = most
        self._records: dict[tuple[str, str], ImageRecord] = {}
        self._images: dict[str, ImageIndex] = {}
        self._layers: dict[str, tuple[str, ImageLayer]] = {}
        """By diff ID: a reference in whose repository the layer is, and the layer."""
        self._proven: set[tuple[str, str]] = set()
        """Indexes from registries (`found_index`) that were checked against whole layers since the start."""
        self._held: dict[str, contextlib.ExitStack] = {}

    def __repr__(self) -> str:
        return f"Catalog({len(self._records)} references, {len(self._images)} images, {len(self._layers)} layers)"

    async def load(self) -> None:
        """Read the records; one that is damaged, or whose index is gone, is dropped: it is made again on demand."""
        await asyncio.to_thread(self._directory.mkdir, parents=True, exist_ok=True)
        for path in await asyncio.to_thread(lambda: sorted(self._directory.glob("*.json"))):
            try:
                raw = await asyncio.to_thread(path.read_bytes)
                await self._remember(msgspec.json.decode(raw, type=ImageRecord))
            except OSError as error:
                log.error("could not read what is known of an image", file=str(path), why=str(error))
            except (msgspec.MsgspecError, UnicodeDecodeError, DadiError) as error:
                log.warning("dropped what was known of an image", file=str(path), why=str(error))
                await asyncio.to_thread(path.unlink, missing_ok=True)

    def find(self, reference: str, platform: str) -> ImageRecord | None:
        """Return the record, however old."""
        return self._records.get((reference, platform))

    def age(self, record: ImageRecord) -> float:
        """Return the seconds since the registry was asked."""
        return max(0.0, self._clock() - record.resolved_at)

    def by_manifest(self, manifest_digest: str, repository: str) -> ImageRecord | None:
        """Return a record of this very image whose index may speak for it in `repository` (host and name)."""
        records = (r for r in self._records.values() if r.manifest_digest == manifest_digest)
        return next((record for record in records if self._may_speak(record, repository)), None)

    def _may_speak(self, record: ImageRecord, repository: str) -> bool:
        index = self._images[record.index_digest]
        here = Reference.parse(record.reference).name == repository
        return here or not index.artifact or all(map(self._is_proven, index.layers))

    def image(self, record: ImageRecord) -> ImageIndex:
        """Return the record's image index."""
        return self._images[record.index_digest]

    def layer_by_diff_id(self, diff_id: str) -> tuple[str, ImageLayer] | None:
        """Return a reference in whose repository this uncompressed layer can be found, and the layer."""
        return self._layers.get(diff_id)

    def proven_layer(self, layer_digest: str) -> ImageLayer | None:
        """Return a layer whose index is proven, in whatever image."""
        layers = (layer for _, layer in self._layers.values() if layer.layer_digest == layer_digest)
        return next((layer for layer in layers if self._is_proven(layer)), None)

    def _is_proven(self, layer: ImageLayer) -> bool:
        return not layer.seek_digest or layer.found_index in self._proven

    def prove(self, layer: ImageLayer) -> None:
        """Remember that all of a layer was checked against its index."""
        self._proven.add(layer.found_index)

    async def withdraw(self, layer: ImageLayer) -> list[tuple[ImageRecord, ImageIndex]]:
        """Forget the images that use a layer's index; return their records and indexes."""
        found = [
            (record, self._images[record.index_digest])
            for record in self._records.values()
            if any(_is_found(other, layer) for other in self._images[record.index_digest].layers)
        ]
        for record, _ in found:
            await self.forget(record)
        return found

    def records(self) -> list[ImageRecord]:
        """Return all, oldest first."""
        return list(self._records.values())

    async def add(
        self, reference: str, platform: str, top_digest: str, index: ImageIndex, encoded: bytes
    ) -> ImageRecord:
        """Store the image index and remember it under this reference, from now on and after a restart."""
        blob = await self._store.put(encoded)
        record = ImageRecord(
            reference, platform, top_digest, index.manifest_digest, blob.digest, blob.size, self._clock()
        )
        return await self._keep(record)

    async def confirm(self, record: ImageRecord, reference: str, platform: str, top_digest: str) -> ImageRecord:
        """Remember that the registry said so just now, be it of another reference or platform."""
        record = msgspec.structs.replace(
            record, reference=reference, platform=platform, top_digest=top_digest, resolved_at=self._clock()
        )
        return await self._keep(record)

    async def _keep(self, record: ImageRecord) -> ImageRecord:
        old = self._records.get((record.reference, record.platform))
        if old is not None and old.index_digest != record.index_digest:
            # The tag has moved. Nodes still run the old image: it stays known, by its digest.
            pinned = Reference.parse(old.reference).at(old.manifest_digest)
            old = msgspec.structs.replace(old, reference=str(pinned), top_digest=old.manifest_digest)
            await self._remember(old)
            await self._write(old)
        await self._remember(record)
        await self._write(record)
        while len(self._records) > self._most:
            await self.forget(min(self._records.values(), key=lambda r: r.resolved_at))
        return record

    async def _remember(self, record: ImageRecord) -> None:
        index = self._images.get(record.index_digest)
        if index is None:
            index = await asyncio.to_thread(image_index.decode, await self._store.get(record.index_digest))
            seeks = (layer.seek_digest for layer in index.layers if layer.seek_digest)
            layers = (layer.index_digest for layer in index.layers)
            needed = (record.index_digest, index.metadata.digest, *layers, *seeks)
            with contextlib.ExitStack() as holds:
                for digest in needed:
                    blob = self._store.find(digest)
                    if blob is None or not self._store.has(digest):
                        raise NotFound(f"{digest}, which {record.reference} needs, is no longer in the store")
                    holds.enter_context(self._store.hold(blob))
                self._held[record.index_digest] = holds.pop_all()
            self._images[record.index_digest] = index
        self._learn(record.reference, index)
        self._records[record.reference, record.platform] = record

    async def forget(self, record: ImageRecord) -> None:
        """Drop a record, unless it is gone or another one is there; with an image's last one let go of its index."""
        key = (record.reference, record.platform)
        if self._records.get(key) is not record:
            return
        del self._records[key]
        if not any(other.index_digest == record.index_digest for other in self._records.values()):
            self._let_go(record.index_digest)
        await asyncio.to_thread(self._file(record).unlink, missing_ok=True)

    def _let_go(self, index_digest: str) -> None:
        held = self._held.pop(index_digest, None)
        if held is not None:
            held.close()
        self._images.pop(index_digest, None)
        self._layers.clear()
        for other in self._records.values():
            self._learn(other.reference, self._images[other.index_digest])

    def _learn(self, reference: str, index: ImageIndex) -> None:
        for layer in index.layers:
            known = self._layers.get(layer.diff_id)
            # The first one stays: whoever comes later must not speak for the layers of others.
            if known is None or (self._is_proven(layer) and not self._is_proven(known[1])):
                self._layers[layer.diff_id] = (reference, layer)

    async def _write(self, record: ImageRecord) -> None:
        try:
            await asyncio.to_thread(write_durably, self._file(record), msgspec.json.encode(record))
        except OSError as error:
            # Known until the next restart: good enough to answer with.
            log.error("could not write what is known of an image", image=record.reference, why=str(error))

    def _file(self, record: ImageRecord) -> Path:
        key = hashlib.sha256(f"{record.reference}|{record.platform}".encode()).hexdigest()
        return self._directory / f"{key[:32]}.json"

    def close(self) -> None:
        """Let go of what is held."""
        for holds in self._held.values():
            holds.close()
        self._held.clear()


def _is_found(layer: ImageLayer, other: ImageLayer) -> bool:
    return bool(layer.seek_digest) and layer.found_index == other.found_index
