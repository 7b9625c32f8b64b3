"""Taking over what a sibling knows of an image: its index, layer indexes, seek tables and metadata, all verified.

    the image index     by its digest; it must have the blob that was asked for, our chunk size, and be allowed by our
                        configuration (an artifact that was refused, or that no trusted key has signed, is not)
    layer indexes,      by the digests in the image index; then against each other and against the image index: layer
    seek tables         digest, diff ID, sizes, chunk tables
    metadata            chunk by chunk by the table in the image index; then as a whole by its digest
    layers              not here: see `siblings.py`

What a tag means is not taken from a sibling: the image is remembered by its manifest's digest, and by its tag only so
that something can be answered while the registry is away.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
from msgspec import Meta

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.joined import together
from dadi.blobs.kept import Kept
from dadi.blobs.source import Source, Urgency
from dadi.errors import DadiError, Malformed, TooLarge
from dadi.fallbacks import Fallbacks
from dadi.index import artifact as artifacts
from dadi.index import image as image_index
from dadi.index import layer as layer_index
from dadi.index import seek
from dadi.index.image import MAX_LAYERS, ImageIndex, ImageLayer
from dadi.index.layer import DecodeRoom
from dadi.oci import platforms
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.peers.places import Digest
from superpeer.catalog import Catalog, ImageRecord
from superpeer.shown_layers import Layer, Proof, ShownLayers

_MAX_IMAGE_INDEX = 512 << 20
_MAX_METADATA = 1 << 30
_MAX_INDEX = 512 << 20
_LARGE = 4 << 20
"""A blob that is larger is held in memory alone."""
_STEP = 4 << 20

Read = Callable[[str, int], Awaitable[bytes]]
"""(digest, size) → a whole small blob, verified."""


class SiblingOrigin(msgspec.Struct, frozen=True):
    """What a superpeer answers to `GET /v1/blobs/{digest}/origin`: an image that it knows the blob from.

    `whole`: all of the blob is in its store. `shown`: the places of the layers that the repository has shown, to it, to
    have (`shown_layers.py`).
    """

    reference: Annotated[str, Meta(max_length=800)]
    platform: Annotated[str, Meta(max_length=100)]
    top_digest: Digest
    manifest_digest: Digest
    index_digest: Digest
    index_size: Annotated[int, Meta(gt=0, le=_MAX_IMAGE_INDEX)]
    resolved_at: float
    whole: bool = False
    shown: Annotated[tuple[Annotated[int, Meta(ge=0)], ...], Meta(max_length=MAX_LAYERS)] = ()


def told_of(record: ImageRecord, index: ImageIndex, shown: ShownLayers, *, whole: bool) -> SiblingOrigin:
    """Return a record as it is told to siblings."""
    name = Reference.parse(record.reference).name
    layers = [Layer(name, layer.layer_digest, layer.diff_id) for layer in index.layers]
    places = tuple(place for place, layer in enumerate(layers) if shown.proof(layer) is Proof.HASHED)
    return SiblingOrigin(**msgspec.structs.asdict(record), whole=whole, shown=places)


def has_blob(index: ImageIndex, digest: str) -> bool:
    """Whether a blob, or the manifest, is one of an image's."""
    return digest in (index.manifest_digest, index.metadata.digest) or any(
        digest in (layer.diff_id, layer.layer_digest, layer.index_digest, layer.seek_digest) for layer in index.layers
    )


class Adopter:
    """Takes images over, a few at a time. `may_be_used` is our own configuration's word on an image index."""

    def __init__(self, store: DiskBlobs, catalog: Catalog, shown: ShownLayers, fallbacks: Fallbacks, *,
                 chunk_size: int, may_be_used: Callable[[ImageIndex], bool]) -> None:  # fmt: skip
        self._store = store
        self._catalog = catalog
        self._shown = shown
        self._fallbacks = fallbacks
        self._chunk_size = chunk_size
        self._may_be_used = may_be_used
        self._images = asyncio.Semaphore(2)
        self._large = asyncio.Lock()

    def knows(self, digest: str) -> bool:
        """Whether an image of ours has a blob."""
        return self._catalog.record_of(digest) is not None

    async def adopt(self, told: SiblingOrigin, digest: str, read: Read, chunks: Source) -> None:
        """Have the image that a sibling told of, because of `digest`, in the catalog. `chunks`: the sibling's store.

        Raises what reading raises; Malformed, TooLarge and the like if what it told makes no sense; StoreFull.
        """
        Reference.parse(told.reference)
        platforms.parse(told.platform)
        async with self._images:
            with contextlib.ExitStack() as holds:
                index = await self._index(told, digest, read, holds)
                room = DecodeRoom()
                layers = {layer.index_digest: layer for layer in index.layers}
                await together(self._layer(layer, read, room, holds) for layer in layers.values())
                await self._metadata(index, chunks, holds)
                record = ImageRecord(
                    told.reference, told.platform, told.top_digest, told.manifest_digest, told.index_digest,
                    told.index_size, told.resolved_at,
                )  # fmt: skip
                for layer in (index.layers[place] for place in told.shown if place < len(index.layers)):
                    reference = Reference.parse(told.reference)
                    self._shown.add(reference, layer.layer_digest, layer.diff_id, Proof.HASHED)
                await self._catalog.adopt(record)

    async def _index(self, told: SiblingOrigin, digest: str, read: Read, holds: contextlib.ExitStack) -> ImageIndex:
        raw = await self._whole(told.index_digest, told.index_size, read)
        index = await asyncio.to_thread(image_index.decode, raw)
        if (index.manifest_digest, index.platform) != (told.manifest_digest, told.platform) or not (
            digest == told.index_digest or has_blob(index, digest)
        ):
            raise Malformed(f"the image index {told.index_digest} is not what was told of it")
        if not self._may_be_used(index):
            raise Malformed(f"the index of {told.reference} comes from an artifact that is not trusted here")
        for layer in index.layers:
            if layer.table.chunk_size != self._chunk_size:
                hint = "all superpeers need the same indexing.chunk_size"
                raise Malformed(f"layer {layer.diff_id} has chunks of {layer.table.chunk_size} bytes", hint=hint)
            known = self._catalog.layer_by_diff_id(layer.diff_id)
            if known is not None and known[1].table != layer.table:
                raise Malformed(f"it contradicts the index that {known[0]} has of layer {layer.diff_id}")
        holds.enter_context(self._store.hold(await self._store.put(raw)))
        return index

    async def _layer(self, layer: ImageLayer, read: Read, room: DecodeRoom, holds: contextlib.ExitStack) -> None:
        large = layer.index_size + layer.seek_size > _LARGE
        async with self._large if large else contextlib.nullcontext():
            encoded = await self._whole(layer.index_digest, layer.index_size, read)
            raw = await self._whole(layer.seek_digest, layer.seek_size, read) if layer.seek_digest else b""
            await asyncio.to_thread(self._check_layer, layer, encoded, raw, room)
            for data in (encoded, raw):
                if data:
                    holds.enter_context(self._store.hold(await self._store.put(data)))

    def _check_layer(self, layer: ImageLayer, encoded: bytes, raw: bytes, room: DecodeRoom) -> None:
        index = layer_index.decode(encoded, room)
        wanted = (layer.layer_digest, layer.layer_size, layer.diff_id, layer.table)
        if (index.layer_digest, index.layer_size, index.diff_id, index.table) != wanted:
            raise Malformed(f"the index of layer {layer.layer_digest} is not the one that the image index means")
        if raw:
            descriptor = Descriptor(layer.media_type, layer.layer_digest, layer.layer_size)
            artifacts.check_layer(index, seek.decode(raw), descriptor, layer.diff_id, self._chunk_size)

    async def _metadata(self, index: ImageIndex, chunks: Source, holds: contextlib.ExitStack) -> None:
        blob = index.metadata
        if blob.size > _MAX_METADATA:
            raise TooLarge(f"metadata of {blob.size} bytes; the limit is {_MAX_METADATA}")
        await self._store.prepare(blob)
        holds.enter_context(self._store.hold(blob))
        source = Kept(self._store, chunks, self._fallbacks)
        step = max(1, _STEP // blob.table.chunk_size)
        for at in range(0, blob.table.count, step):
            await source.read(blob, range(at, min(at + step, blob.table.count)), Urgency.DEMAND)
        await self._store.finish(blob)

    async def _whole(self, digest: str, size: int, read: Read) -> bytes:
        if self._store.has(digest):
            return await self._store.get(digest)
        if not 0 < size <= _MAX_INDEX:
            raise TooLarge(f"{digest} is said to have {size} bytes; the limit is {_MAX_INDEX}")
        data = await read(digest, size)
        if len(data) != size:
            raise Malformed(f"{digest} has {len(data)} bytes, not the {size} that were told")
        return data


def decode_told(data: bytes | bytearray) -> SiblingOrigin:
    """Return what a sibling told; raise Malformed if it is nothing of the kind."""
    try:
        told = msgspec.json.decode(data, type=SiblingOrigin)
        digests.parse(told.index_digest)
        Reference.parse(told.reference)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, DadiError) as error:
        raise Malformed(f"a sibling told what cannot be used: {error}", hint="are the versions alike?") from None
    return told
