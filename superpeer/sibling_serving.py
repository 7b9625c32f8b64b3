"""What a superpeer answers to its siblings, from what it has: no sibling and no registry is asked on their behalf.

    GET /v1/blobs/{digest}/origin            an image that has the blob, as `SiblingOrigin` (`adopting.py`); else 404
    GET /sibling/v1/images                   {"images": [digest of an image index …]}, the youngest first, 256 at most
    GET /sibling/v1/blobs/{digest}           the bytes, if they are here (see `dadi/blobs/serving.py`); else 404
"""

from __future__ import annotations

import msgspec
from aiohttp import web

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.serving import BlobServer, Compressor
from dadi.blobs.source import Urgency
from dadi.errors import NotFound
from dadi.index.chunks import Blob
from dadi.peers.gate import OPEN, Doorman
from superpeer.adopting import told_of
from superpeer.catalog import Catalog
from superpeer.shown_layers import ShownLayers

MOST_TOLD = 256


class _Here:
    """What is in the store (see `Shelf`)."""

    def __init__(self, store: DiskBlobs) -> None:
        self.store = store

    def find(self, digest: str) -> Blob:
        """Return a blob that is here in whole or in part: chunks that are missing are NotFound when they are read."""
        blob = self.store.find(digest)
        if blob is None:
            raise NotFound(f"{digest} is not here")
        return blob

    async def bring(self, blob: Blob, chunks: range, urgency: Urgency) -> None:
        """Bring nothing."""


class SiblingServer:
    """The handlers. `gate` says who may: siblings show tokens of their own. The list is for no node's token."""

    def __init__(self, store: DiskBlobs, catalog: Catalog, shown: ShownLayers, gate: Doorman = OPEN) -> None:
        self._store = store
        self._catalog = catalog
        self._shown = shown
        self._gate = gate
        self._blobs = BlobServer(_Here(store), Compressor(cache=0), gate)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add what the head of this file lists."""
        router.add_get("/v1/blobs/{digest}/origin", self._origin)
        router.add_get("/sibling/v1/images", self._images)
        router.add_get("/sibling/v1/blobs/{digest}", self._blobs.handle)

    def statistics(self) -> dict[str, int]:
        """Return what siblings were sent."""
        return self._blobs.statistics()

    async def _origin(self, request: web.Request) -> web.Response:
        digest = digests.parse(request.match_info["digest"])
        await self._gate.admit(request.headers, digest)
        record = self._catalog.record_of(digest)
        if record is None:
            raise NotFound(f"no image that this superpeer knows has the blob {digest}")
        told = told_of(record, self._catalog.image(record), self._shown, whole=self._store.has(digest))
        return web.Response(body=msgspec.json.encode(told), content_type="application/json")

    async def _images(self, request: web.Request) -> web.Response:
        await self._gate.admit_sibling(request.headers)
        records = sorted(self._catalog.records(), key=lambda record: -record.resolved_at)
        digests_of = list(dict.fromkeys(record.index_digest for record in records))[:MOST_TOLD]
        return web.Response(body=msgspec.json.encode({"images": digests_of}), content_type="application/json")
