"""Images in original form from this superpeer: `dadi/originals` over its store, and the HTTP of it for proxies.

    GET  /v1/manifests?reference=R                    the document; Docker-Content-Digest; Dadi-Stale where it is stale
    GET  /v1/tags?reference=R[&n=…&last=…]            JSON; Dadi-Next: parameters of the next page
    GET  /v1/referrers?reference=R@D[&artifact_type=] an index
    GET, HEAD /v1/original/{digest}?reference=R       the blob, also while it arrives; Range
    GET  /v1/original/{digest}/table?reference=R      MessagePack of `OriginalAnswer`: size; chunk table if known, and a
        [&table=no][&wait=S][&from=N]                 token for /v1/blobs, here and at peers. `wait`: have it
                                                      fetched, answer when it is whole, after S seconds at most, and
                                                      then with a few bytes from N on of what has come, unverified
    GET  /v1/challenge?registry=H                     {"challenge": WWW-Authenticate of the registry, or null}
    POST /v1/changed?reference=R                      R was pushed or deleted: what the registry has said of its
                                                      repository's tags is not believed, but asked anew; for anybody,
                                                      since it costs one question. 204

`Dadi-Registry-Authorization` is what the proxy's client meant for the registry; 401 comes with the registry's
WWW-Authenticate. The reference says in which repository the blob is.

What is shared with lazy loading: a layer whose seek table is known is assembled from the chunks of its compressed blob
that are here, and from ranges for the rest, by the same queue in which lazy reads wait (`PackedLayer`): each byte comes
once, whoever asked first. A layer that is known only as its tar is fetched in original form, once, and kept beside it.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeGuard
from urllib.parse import urlencode

import msgspec
from aiohttp import web

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Source, Urgency
from dadi.errors import DadiError, DigestMismatch, InvalidRequest, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.index.image import ImageLayer
from dadi.oci.reference import Reference, parse_registry
from dadi.oci.registry import RegistryClient
from dadi.originals import caller as callers
from dadi.originals import serving
from dadi.originals.documents import Document
from dadi.originals.fetching import Elsewhere, Shares
from dadi.originals.messages import HEAD, MOST_WAIT, NEXT, SMALL, STALE, OriginalAnswer
from dadi.originals.original import Chunked
from dadi.originals.service import Originals
from dadi.peers.shown import HEADER
from superpeer.catalog import Catalog
from superpeer.config import SuperpeerConfig
from superpeer.lazy_layers import LazyLayers
from superpeer.ranged import Lie, lie_of
from superpeer.shown_layers import ShownLayers
from superpeer.who_may import WhoMay

OnLie = Callable[[ImageLayer, Lie], Awaitable[None]]


def originals_of(config: SuperpeerConfig, store: DiskBlobs, registry: RegistryClient, fallbacks: Fallbacks,
                 catalog: Catalog, shown: ShownLayers, lazy: LazyLayers, on_lie: OnLie,
                 elsewhere: Elsewhere | None) -> Originals:  # fmt: skip
    """Return a superpeer's originals. One that is open to all shows registries its own credentials for all."""

    def known(digest: str) -> set[str]:
        return {each.repository for each in shown.hashed(digest) if each.layer_digest == digest}

    return Originals(
        config.originals, Path(config.state), store, registry, fallbacks,
        packed=Assembly(store, catalog, lazy, fallbacks, on_lie), known=known,
        lend=config.originals.lend_credentials or config.authorization == "open", elsewhere=elsewhere,
    )  # fmt: skip


class Assembly:
    """Finds layers that can be assembled; a `Packed` for `Originals`. `on_lie` is told when a table proves wrong."""

    def __init__(self, store: DiskBlobs, catalog: Catalog, lazy: LazyLayers, fallbacks: Fallbacks,
                 on_lie: OnLie) -> None:  # fmt: skip
        self._store = store
        self._catalog = catalog
        self._lazy = lazy
        self._fallbacks = fallbacks
        self._on_lie = on_lie

    async def __call__(self, digest: str, shares: Shares) -> Chunked | None:
        """Return how a layer's compressed blob is assembled; None if that cannot be done by ranges."""
        found = self._catalog.seekable_layer(digest, shares)
        if found is None:
            return None
        try:
            async with self._lazy.packed(*found) as layer:
                blob = layer.blob
        except DadiError as error:
            self._fallbacks.note("layer not assembled from ranges", f"{digest}: {error}")
            return None
        return Chunked(self._store, blob, partial(self._opened, *found), self._fallbacks)

    @contextlib.asynccontextmanager
    async def _opened(self, reference: str, layer: ImageLayer) -> AsyncIterator[Source]:
        try:
            async with self._lazy.packed(reference, layer) as packed:
                yield _Ranges(packed.chunks, self._lazy, reference)
        except DigestMismatch as error:
            await self._on_lie(layer, lie_of(error))
            raise


class _Ranges:
    """`source`; remembers a registry that does no ranges."""

    def __init__(self, source: Source, lazy: LazyLayers, reference: str) -> None:
        self.source = source
        self._lazy = lazy
        self._reference = reference

    def __repr__(self) -> str:
        return f"_Ranges({self.source!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        try:
            return await self.source.read(blob, chunks, urgency)
        except Unsupported:
            self._lazy.has_no_ranges(self._reference)
            raise


class OriginalServer:
    """The routes at the head of this file."""

    def __init__(self, originals: Originals, who_may: WhoMay | None = None) -> None:
        """`who_may` signs tokens; without it there are none."""
        self._originals = originals
        self._who_may = who_may
        self._served: Counter[str] = Counter({"requests": 0, "bytes": 0, "cut": 0})

    def statistics(self) -> dict[str, Any]:
        """Return what was sent to proxies."""
        return dict(self._served)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add the routes."""
        router.add_get("/v1/manifests", self._manifest)
        router.add_get("/v1/tags", self._tags)
        router.add_get("/v1/referrers", self._referrers)
        router.add_get("/v1/original/{digest}", self._blob)
        router.add_get("/v1/original/{digest}/table", self._table)
        router.add_get("/v1/challenge", self._challenge)
        router.add_post("/v1/changed", self._changed)

    async def _manifest(self, request: web.Request) -> web.Response:
        return _answered(await self._originals.manifest(_reference(request), _caller(request)))

    async def _tags(self, request: web.Request) -> web.Response:
        parameters = {name: request.query[name] for name in ("n", "last") if name in request.query}
        if not _is_number(parameters.get("n", "0")):
            raise InvalidRequest("n is not a number of tags")
        return _answered(await self._originals.tags(_reference(request), parameters, _caller(request)))

    async def _referrers(self, request: web.Request) -> web.Response:
        ref = _reference(request)
        if ref.digest is None:
            raise InvalidRequest("referrers are of a digest")
        artifact_type = request.query.get("artifact_type", "")
        return _answered(await self._originals.referrers(ref, artifact_type, _caller(request)))

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        digest = digests.parse(request.match_info["digest"])
        original = await self._originals.blob(_reference(request), digest, _caller(request))
        headers = {"Content-Type": "application/octet-stream"}
        return await serving.respond(request, digest, original, headers, self._served)

    async def _table(self, request: web.Request) -> web.Response:
        digest = digests.parse(request.match_info["digest"])
        ref, caller, originals = _reference(request), _caller(request), self._originals
        size = await originals.size(ref, digest, caller)
        blob, coming, wait = originals.table(ref, digest), False, _seconds(request.query.get("wait"))
        if blob is None and wait and size > SMALL:
            coming = not await originals.make_whole(ref, digest, caller, wait)
            blob = originals.table(ref, digest)
        start = request.query.get("from")
        head = await originals.head(ref, digest, int(start), HEAD) if coming and _is_number(start) else b""
        token = self._who_may.read_token(digest) if blob is not None and self._who_may else ""
        wanted = request.query.get("table") != "no"
        answer = OriginalAnswer(size, blob if wanted else None, originals.is_proven(ref, digest), token, coming, head)
        return web.Response(body=msgspec.msgpack.encode(answer), content_type="application/msgpack")

    async def _changed(self, request: web.Request) -> web.Response:
        self._originals.changed(_reference(request))
        return web.Response(status=204)

    async def _challenge(self, request: web.Request) -> web.Response:
        registry = parse_registry(request.query.get("registry", ""))
        return web.json_response({"challenge": await self._originals.challenge(registry)})


def _is_number(text: str | None) -> TypeGuard[str]:
    return text is not None and text.isascii() and text.isdigit() and len(text) < 20


def _seconds(text: str | None) -> float:
    return min(float(text), MOST_WAIT) if _is_number(text) else 0.0


def _reference(request: web.Request) -> Reference:
    return Reference.parse(request.query.get("reference", ""))


def _caller(request: web.Request) -> callers.Caller:
    return callers.parse(request.headers.get(HEADER))


def _answered(document: Document) -> web.Response:
    headers = {"Content-Type": document.media_type, "Docker-Content-Digest": document.digest}
    if document.stale is not None:
        headers[STALE] = str(int(document.stale))
    if document.following:
        headers[NEXT] = urlencode(document.following)
    return web.Response(body=document.raw, headers=headers)
