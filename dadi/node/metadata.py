"""What a mount needs before EROFS is mounted: the image's index and its metadata, whole, here, and held.

EROFS must never wait for its metadata: a mount of which that is missing would hang in the kernel. Nothing here mounts.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable

import msgspec

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.erofs import writer as erofs
from dadi.errors import DadiError, Malformed, StoreFull, TooLarge
from dadi.fallbacks import Fallbacks
from dadi.index import image as image_index
from dadi.index import layer as layer_index
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex
from dadi.node.backfill import pieces
from dadi.peers.superpeer import MAX_SMALL_BLOB, ImageAnswer, Upstream


class ImageMetadata:
    """See the head of this file."""

    def __init__(self, store: DiskBlobs, upstream: Upstream, fallbacks: Fallbacks,
                 on_index: Callable[[ImageIndex], None]) -> None:  # fmt: skip
        """`on_index`: told of an image whose blobs are about to be read."""
        self._store = store
        self._upstream = upstream
        self._fallbacks = fallbacks
        self.on_index = on_index
        self._one = asyncio.Lock()

    def __repr__(self) -> str:
        return f"ImageMetadata({self._upstream!r})"

    async def index(self, answer: ImageAnswer) -> ImageIndex:
        """Return the image's index, from the store or else from upstream."""
        index = image_index.decode(await self._small(answer.index_digest, answer.index_size))
        if index.manifest_digest != answer.manifest_digest:
            hint = "are superpeer and node of the same version? the superpeer's log says where the index is from"
            raise Malformed(f"the index {answer.index_digest} is not of the image {answer.manifest_digest}", hint=hint)
        return index

    async def _small(self, digest: str, size: int) -> bytes:
        """Return a small blob, hashed just now: from the store, or else from upstream."""
        if self._store.has(digest):
            data, why = b"", f"the index {digest}"
            try:
                data = await self._store.get(digest)
            except DadiError as error:
                why = str(error)
            if await asyncio.to_thread(digests.of, data) == digest:
                return data
            self._fallbacks.note("our own disk spoilt bytes, fetched again", why)
            await self._store.remove(digest)
        data = await self._upstream.whole(digest, size)
        try:
            await self._store.put(data)
        except DadiError as error:
            kind = "not kept: store full" if isinstance(error, StoreFull) else "not kept: disk failed"
            self._fallbacks.note(kind, str(error))
        return data

    async def hold(self, answer: ImageAnswer, index: ImageIndex, holds: contextlib.ExitStack) -> None:
        """Have the metadata here, all of it, and hold it and the image index."""
        self.on_index(index)
        for digest in (answer.index_digest, index.metadata.digest):
            blob = self._store.find(digest)
            if blob is not None:
                holds.enter_context(self._store.hold(blob))
        async with self._one:
            await self._whole(index.metadata, holds)
        whole = self._store.find(index.metadata.digest)
        if whole is not None:  # it may have come by another call's hands
            holds.enter_context(self._store.hold(whole))

    async def hold_layer_indexes(self, index: ImageIndex, holds: contextlib.ExitStack) -> None:
        """Have the layer indexes here, and hold them: what a mount of fewer layers is made from."""
        for layer in index.layers:
            if not self._store.has(layer.index_digest):
                await self._store.put(await self._upstream.whole(layer.index_digest, layer.index_size))
            held = self._store.find(layer.index_digest)
            if held is not None:
                holds.enter_context(self._store.hold(held))

    async def prefix(self, index: ImageIndex, layers: int, holds: contextlib.ExitStack) -> ImageIndex:
        """Return the index of an image that is only the lowest layers of another; its metadata is made here."""
        index = msgspec.structs.replace(index, layers=index.layers[:layers], devices=())
        await self.hold_layer_indexes(index, holds)
        indexes = []
        for layer in index.layers:
            data = await self._small(layer.index_digest, layer.index_size)
            indexes.append(await asyncio.to_thread(layer_index.decode, data))
        metadata = await asyncio.to_thread(erofs.write, indexes)
        blob = await self._store.put(metadata.image)
        return msgspec.structs.replace(index, metadata=blob, devices=metadata.devices)

    async def _whole(self, blob: Blob, holds: contextlib.ExitStack) -> None:
        """Have all of a blob here, or raise; does not wait for an upstream that is away."""
        if blob.size > MAX_SMALL_BLOB:
            raise TooLarge(f"the metadata of an image has {blob.size} bytes; the limit is {MAX_SMALL_BLOB}",
                           hint="too many files for one image: split it")  # fmt: skip
        if self._store.has(blob.digest):
            return
        await self._store.prepare(blob)
        holds.enter_context(self._store.hold(blob))
        for run in pieces(blob, await self._store.missing(blob)):
            parts = await self._upstream.source.read(blob, run)
            await self._store.keep(blob, run.start, parts)
        await self._store.finish(blob)
