"""Which images the superpeer knows: reference and platform → image index; kept on disk, a small JSON file each.

The image index, its layer indexes, seek tables and metadata are held in the store for as long as the record stands:
they are small and dear. Layers are not held: they can be had from the registry again.

When there are too many, the record that was used least recently goes: used is what is resolved, and for one record of
an image (the last that was) also what is read of it or renewed. So whoever asks for many tags pushes out idle images
before those that run. A node whose image was forgotten all the same has it resolved again (`known_again.py` there).

A layer's index is *proven* if this superpeer has made it, or has checked it against the whole layer. Only proven ones
are used for another image: whoever may push an index into one repository must not speak for the layers of others.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from dadi.blobs.layout import remove_or_log, write_durably
from dadi.blobs.store import BlobStore
from dadi.errors import DadiError, NotFound
from dadi.index import image as image_index
from dadi.index.image import ImageIndex, ImageLayer
from dadi.oci.reference import Reference
from superpeer.shown_layers import Layer, place

log = structlog.get_logger()
_ADOPTED_AGE = 30 * 86400.0
"""Seconds: older than any tag is believed without asking."""


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
    """The records, in memory and under `directory`.

    `most`: records that are kept; the ones that were asked for least recently go first, except those that are pinned.
    `has_shown`: whether a repository has shown that it has a layer (`shown_layers.py`); `is_pinned`: whether a record
    stays, however long nobody has used it (`jobs_pins.py`); `on_adopted` is told of each layer of an image that was
    taken over from a sibling.
    """

    def __init__(self, directory: Path, store: BlobStore, *, most: int, has_shown: Callable[[Layer], bool],
                 is_pinned: Callable[[ImageRecord], bool], on_adopted: Callable[[Layer], None],
                 clock: Callable[[], float] = time.time) -> None:  # fmt: skip
        self._directory = directory
        self._store = store
        self._clock = clock
        self._most = most
        self._records: dict[tuple[str, str], ImageRecord] = {}
        self._images: dict[str, ImageIndex] = {}
        self._layers: dict[str, tuple[str, ImageLayer]] = {}
        """By diff ID: a reference in whose repository the layer is, and the layer."""
        self._claims: dict[str, Counter[Layer]] = {}
        """By blob: which repositories say that they have it, and how many records of each."""
        self._has_shown = has_shown
        self._is_pinned = is_pinned
        self._on_adopted = on_adopted
        self._proven: set[tuple[str, str]] = set()
        """Indexes from registries (`found_index`) that were checked against whole layers since the start."""
        self._held: dict[str, contextlib.ExitStack] = {}
        self._parts: dict[str, set[str]] = {}
        """Digests of blobs and manifests, and the image indexes in which each stands."""
        self._of_index: dict[str, dict[tuple[str, str], ImageRecord]] = {}
        """The records of each image index."""
        self._count = itertools.count(1)
        self._asked: dict[tuple[str, str], int] = {}
        self._read: dict[str, int] = {}
        """When a record was asked for, and when an image index was used, as numbers of `_count`."""

    def __repr__(self) -> str:
        return f"Catalog({len(self._records)} references, {len(self._images)} images, {len(self._layers)} layers)"

    async def load(self) -> None:
        """Read the records; one that is damaged, or whose index is gone, is dropped: it is made again on demand."""
        await asyncio.to_thread(self._directory.mkdir, parents=True, exist_ok=True)
        for path in await asyncio.to_thread(self._oldest_first):
            try:
                raw = await asyncio.to_thread(path.read_bytes)
                await self._remember(msgspec.json.decode(raw, type=ImageRecord))
            except OSError as error:
                log.error("could not read what is known of an image", file=str(path), why=str(error))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, DadiError) as error:
                log.warning("dropped what was known of an image", file=str(path), why=str(error))
                await asyncio.to_thread(remove_or_log, path)

    def _oldest_first(self) -> list[Path]:
        def written(path: Path) -> float:
            try:
                return path.stat().st_mtime
            except OSError:
                return 0.0

        return sorted(self._directory.glob("*.json"), key=written)

    def find(self, reference: str, platform: str) -> ImageRecord | None:
        """Return the record, however old; that is a use of it."""
        record = self._records.get((reference, platform))
        if record is not None:
            self._asked[reference, platform] = next(self._count)
        return record

    def touch(self, digest: str) -> None:
        """Remember that a blob, or an image by its manifest, is in use; what several images have says nothing."""
        indexes = self._parts.get(digest, ())
        if len(indexes) == 1:
            (index_digest,) = indexes
            self._read[index_digest] = next(self._count)

    def age(self, record: ImageRecord) -> float:
        """Return the seconds since the registry was asked."""
        return max(0.0, self._clock() - record.resolved_at)

    def by_manifest(self, manifest_digest: str, repository: str, *, same: bool = False) -> ImageRecord | None:
        """Return a record of this very image whose index may speak for it in `repository` (host and name).

        `same`: a record of that repository only: it has shown that it has the manifest.
        """
        records = (r for r in self._records.values() if r.manifest_digest == manifest_digest)
        return next((record for record in records if self._may_speak(record, repository, same)), None)

    def _may_speak(self, record: ImageRecord, repository: str, same: bool) -> bool:
        index = self._images[record.index_digest]
        here = Reference.parse(record.reference).name == repository
        return here or (not same and (not index.artifact or all(map(self._is_proven, index.layers))))

    def image(self, record: ImageRecord) -> ImageIndex:
        """Return the record's image index."""
        return self._images[record.index_digest]

    def layer_by_diff_id(self, diff_id: str) -> tuple[str, ImageLayer] | None:
        """Return a reference in whose repository this uncompressed layer can be found, and the layer."""
        return self._layers.get(diff_id)

    def claims(self, blob: str) -> list[Layer]:
        """Return the layers that are this blob, in one form or the other, in images of whatever repository.

        Who names a layer has not shown that he has it. `blob`: its digest, or as much of it as a token names.
        """
        return list(self._claims.get(place(blob), ()))

    def repositories_of(self, layer_digest: str) -> set[str]:
        """Return the repositories, with their registries, of which ranges of a layer of this digest are fetched.

        Who names a layer has not shown that he has it: what is here of it need not have come from there.
        """
        found = (reference for reference, layer in self._layers.values() if layer.layer_digest == layer_digest)
        return {Reference.parse(reference).name for reference in found}

    def seekable_layer(self, layer_digest: str, may_be: Callable[[str], bool]) -> tuple[str, ImageLayer] | None:
        """Return a layer of this digest, as the registry has it, that has seek points, and a reference to it.

        `may_be`: which repositories (with their registries) it may be of.
        """
        found = (pair for pair in self._layers.values() if pair[1].layer_digest == layer_digest and pair[1].seek_digest)
        return next((pair for pair in found if may_be(Reference.parse(pair[0]).name)), None)

    def proven_layer(self, layer_digest: str) -> ImageLayer | None:
        """Return a layer whose index is proven, in whatever image."""
        layers = (layer for _, layer in self._layers.values() if layer.layer_digest == layer_digest)
        return next((layer for layer in layers if self._is_proven(layer)), None)

    def _is_proven(self, layer: ImageLayer) -> bool:
        return not layer.seek_digest or layer.found_index in self._proven

    def prove(self, layer: ImageLayer) -> None:
        """Remember that all of a layer was checked against its index."""
        self._proven.add(layer.found_index)

    def using(self, layer: ImageLayer) -> list[tuple[ImageRecord, ImageIndex]]:
        """Return the images that use a layer's index: their records and indexes."""
        pairs = [(record, self._images[record.index_digest]) for record in self._records.values()]
        return [pair for pair in pairs if any(_is_same_index(other, layer) for other in pair[1].layers)]

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

    def record_of(self, digest: str) -> ImageRecord | None:
        """Return a record of an image that has a blob, or whose manifest it is."""
        records = (record for name in self._parts.get(digest, ()) for record in self._of_index.get(name, {}).values())
        return max(records, key=lambda record: record.resolved_at, default=None)

    async def adopt(self, record: ImageRecord) -> None:
        """Remember what another superpeer knows, whose index and all that it needs are in the store.

        By its manifest's digest; and by its reference too if nothing is known of that, as something that the registry
        has to be asked about.
        """
        long_ago = min(record.resolved_at, self._clock() - _ADOPTED_AGE)
        record = msgspec.structs.replace(record, resolved_at=max(0.0, long_ago))
        pinned = str(Reference.parse(record.reference).at(record.manifest_digest))
        await self._keep(msgspec.structs.replace(record, reference=pinned, top_digest=record.manifest_digest))
        if (record.reference, record.platform) not in self._records:
            await self._keep(record)
        if (index := self._images.get(record.index_digest)) is not None:
            for layer in index.layers:
                self._on_adopted(_claimed(record.reference, layer))

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
            least = self._least_used()
            if least is None or least is record:  # all others are pinned
                break
            await self.forget(least)
        return record

    def _least_used(self) -> ImageRecord | None:
        def used(key: tuple[str, str]) -> int:
            return self._asked.get(key, 0)

        uses = {key: used(key) for key in self._records}
        for index_digest, records in self._of_index.items():
            last = max(records, key=used)
            uses[last] = max(uses[last], self._read.get(index_digest, 0))
        loose = [key for key in uses if not self._is_pinned(self._records[key])]
        return self._records[min(loose, key=uses.__getitem__)] if loose else None

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
            self._know_parts(record.index_digest, index)
        self._learn(record.reference, index)
        key = (record.reference, record.platform)
        before = self._records.get(key)
        self._claim(record.reference, index, 1)
        if before is not None:
            self._claim(before.reference, self._images[before.index_digest], -1)
        self._records[key] = record
        self._of_index.setdefault(record.index_digest, {})[key] = record
        self._asked[key] = next(self._count)
        if before is not None and before.index_digest != record.index_digest:
            self._without_record(key, before.index_digest)

    def _claim(self, reference: str, index: ImageIndex, count: int) -> None:
        for layer in set(index.layers):
            claimed = _claimed(reference, layer)
            for blob in claimed.blobs:
                claims = self._claims.setdefault(place(blob), Counter())
                claims[claimed] += count
                if claims[claimed] <= 0:
                    del claims[claimed]
                if not claims:
                    del self._claims[place(blob)]

    def _without_record(self, key: tuple[str, str], index_digest: str) -> None:
        left = self._of_index[index_digest]
        del left[key]
        if not left:
            del self._of_index[index_digest]
            self._let_go(index_digest)

    async def forget(self, record: ImageRecord) -> None:
        """Drop a record, unless it is gone or another one is there; with an image's last one let go of its index."""
        key = (record.reference, record.platform)
        if self._records.get(key) is not record:
            return
        del self._records[key]
        self._claim(record.reference, self._images[record.index_digest], -1)
        self._asked.pop(key, None)
        self._without_record(key, record.index_digest)
        if any(reference == record.reference for reference, _ in self._layers.values()):
            self._relearn()  # who has no image here any more is not asked for layers of others'
        await asyncio.to_thread(remove_or_log, self._file(record))

    def _let_go(self, index_digest: str) -> None:
        held = self._held.pop(index_digest, None)
        if held is not None:
            held.close()
        self._images.pop(index_digest, None)
        self._read.pop(index_digest, None)
        self._parts.clear()
        for digest, image in self._images.items():
            self._know_parts(digest, image)
        self._relearn()

    def _relearn(self) -> None:
        self._layers.clear()
        for other in self._records.values():
            self._learn(other.reference, self._images[other.index_digest])

    def _know_parts(self, index_digest: str, index: ImageIndex) -> None:
        layers = [(each.diff_id, each.layer_digest, each.index_digest, each.seek_digest) for each in index.layers]
        for digest in (index_digest, index.manifest_digest, index.metadata.digest, *itertools.chain(*layers)):
            self._parts.setdefault(digest, set()).add(index_digest)
        self._parts.pop("", None)

    def _learn(self, reference: str, index: ImageIndex) -> None:
        for layer in index.layers:
            known = self._layers.get(layer.diff_id)
            # The first one stays: whoever comes later must not speak for the layers of others. But who has not shown
            # that he has the layer must not stand before who has.
            if known is None or self._rank(reference, layer) > self._rank(*known):
                self._layers[layer.diff_id] = (reference, layer)

    def _rank(self, reference: str, layer: ImageLayer) -> tuple[bool, bool]:
        return self._is_proven(layer), self._has_shown(_claimed(reference, layer))

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


def _claimed(reference: str, layer: ImageLayer) -> Layer:
    return Layer(Reference.parse(reference).name, layer.layer_digest, layer.diff_id)


def _is_same_index(layer: ImageLayer, other: ImageLayer) -> bool:
    return layer.found_index == other.found_index
