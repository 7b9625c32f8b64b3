"""What a superpeer answers to its siblings, from what it has: no sibling is asked on their behalf.

No registry either, but one: chunks of a compressed layer that is fetched by ranges here anyhow.

    GET /v1/blobs/{digest}/origin            an image that has the blob, as `SiblingOrigin` (`adopting.py`); else 404
    GET /sibling/v1/images                   {"images": [digest of an image index …]}, the youngest first, 256 at most
    GET /sibling/v1/blobs/{digest}           the bytes, if they are here (see `dadi/blobs/serving.py`); else 404
    GET /sibling/v1/originals/{digest}       what is here of a compressed layer, as `OriginalHere`
    GET /sibling/v1/originals/{digest}/bytes all of it, also while it arrives; Range; else 404
    GET /sibling/packed/v1/blobs/{digest}    as /sibling/v1/blobs, of a layer that is open here by ranges: the rest is
                                             fetched; else 404
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Annotated

import msgspec
from aiohttp import web

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.serving import BlobServer, Compressor
from dadi.blobs.source import Urgency
from dadi.errors import Malformed, NotFound
from dadi.index.chunks import Blob
from dadi.originals import serving
from dadi.originals.fetching import Fetch
from dadi.originals.service import Originals
from dadi.peers.gate import OPEN, Doorman
from superpeer.adopting import told_of
from superpeer.catalog import Catalog
from superpeer.lazy_layers import LazyLayers
from superpeer.shown_layers import ShownLayers

MOST_TOLD = 256
_MOST_SOURCES = 64
_Name = Annotated[str, msgspec.Meta(max_length=800)]


class OriginalHere(msgspec.Struct, frozen=True):
    """What is here of a compressed layer. `arriving`: the bytes that have come, if it does, all of it, from its start.

    `fetching`: from the registry, which has been asked. `part`: chunks of it are here; `ranges`: more of them can be
    fetched. `sources`: repositories, with their registries, that it came from, or comes from.
    """

    whole: bool = False
    arriving: Annotated[int, msgspec.Meta(ge=0)] | None = None
    fetching: bool = False
    part: bool = False
    ranges: bool = False
    sources: Annotated[tuple[_Name, ...], msgspec.Meta(max_length=_MOST_SOURCES)] = ()


_decoder = msgspec.json.Decoder(OriginalHere)


def decode_here(data: bytes | bytearray) -> OriginalHere:
    """Return what a sibling says of an original; raise Malformed."""
    try:
        return _decoder.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"a sibling told what cannot be used: {error}", hint="are the versions alike?") from None


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


class _Packed:
    """Compressed layers that are open by ranges (see `Shelf`)."""

    def __init__(self, store: DiskBlobs, lazy: LazyLayers) -> None:
        self.store = store
        self._lazy = lazy

    def find(self, digest: str) -> Blob:
        """Return one's blob."""
        blob = self._lazy.open_blob(digest)
        if blob is None:
            raise NotFound(f"{digest} is not fetched by ranges here")
        return blob

    async def bring(self, blob: Blob, chunks: range, urgency: Urgency) -> None:
        """Fetch what is missing, once for all who want it."""
        await self._lazy.bring_packed(blob, chunks, urgency)


class SiblingServer:
    """The handlers. `gate` says who may: siblings show tokens of their own. The list is for no node's token, and what
    is told of originals neither. `on_asked` is told of each digest of which that is asked."""

    def __init__(self, store: DiskBlobs, catalog: Catalog, shown: ShownLayers, originals: Originals, lazy: LazyLayers,
                 gate: Doorman = OPEN, *, on_asked: Callable[[str], None] = lambda digest: None) -> None:  # fmt: skip
        self._originals = originals
        self._lazy = lazy
        self._on_asked = on_asked
        self._packed = BlobServer(_Packed(store, lazy), Compressor(cache=0), gate)
        self._sent: Counter[str] = Counter({"requests": 0, "bytes": 0, "cut": 0})
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
        router.add_get("/sibling/v1/originals/{digest}", self._original)
        router.add_get("/sibling/v1/originals/{digest}/bytes", self._bytes)
        router.add_get("/sibling/packed/v1/blobs/{digest}", self._packed.handle)

    def statistics(self) -> dict[str, int]:
        """Return what siblings were sent; `originals`: bytes of compressed layers among it."""
        blobs, packed = self._blobs.statistics(), self._packed.statistics()
        both = {name: blobs[name] + packed[name] for name in blobs}
        sent = self._sent
        return {"requests": both["requests"] + sent["requests"], "bytes": both["bytes"] + sent["bytes"],
                "wire_bytes": both["wire_bytes"] + sent["bytes"],
                "originals": sent["bytes"] + packed["bytes"], "cut": sent["cut"]}  # fmt: skip

    async def _original(self, request: web.Request) -> web.Response:
        await self._gate.admit_sibling(request.headers)
        digest = digests.parse(request.match_info["digest"])
        self._on_asked(digest)
        coming, stored = self._originals.coming, self._store.find(digest)
        arriving, whole = coming.intake.arriving(digest), self._store.has(digest)
        sources = coming.sources(digest)
        if not whole:
            sources += self._catalog.repositories_of(digest)
        fetch = arriving.origin if arriving is not None else None
        told = OriginalHere(
            whole=whole,
            arriving=arriving.here if arriving is not None and arriving.error is None else None,
            fetching=isinstance(fetch, Fetch) and fetch.at_registry,
            part=stored is not None and self._store.present_bytes(stored) > 0,
            ranges=self._lazy.open_blob(digest) is not None,
            sources=tuple(sources[:_MOST_SOURCES]),
        )
        return web.Response(body=msgspec.json.encode(told), content_type="application/json")

    async def _bytes(self, request: web.Request) -> web.StreamResponse:
        await self._gate.admit_sibling(request.headers)
        digest = digests.parse(request.match_info["digest"])
        intake = self._originals.coming.intake
        arriving = intake.arriving(digest)
        if arriving is not None:
            arriving.want()
        original = intake.find(digest)
        if original is None:
            raise NotFound(f"{digest} is not here")
        return await serving.respond(request, digest, original, {}, self._sent)

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
