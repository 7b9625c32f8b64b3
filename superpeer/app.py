"""The superpeer's HTTP. Only routes and translation: what a superpeer does is in `service.py`.

    GET  /healthz                                   200 "ok"
    GET  /metrics                                   Prometheus
    GET  /v1/status                                 JSON, see `Superpeer.statistics`; reasons with a token only
    GET  /v1/images?reference=R&platform=os/arch    events: {"event": "progress", layers, layers_done, bytes, total,
                                                    stage} …, {"event": "image", reference, platform, manifest_digest,
                                                    index_digest, index_size, resolved_at, age}, {"event": "done"}
                                                    the event "image" has "tokens" and "renewals" too, lists of texts
    GET  /v1/token?reference=R&platform=os/arch     {"tokens": […], "renewals": […]}, see `dadi/peers/access.py`
    GET  /v1/keys                                   the keys that tokens are checked with, see `dadi/peers/keys.py`
    /v1/peers, /v1/peers/…                          the directory of nodes, see `peers.py`
    /v1/blobs/{digest}/origin, /sibling/…           for other superpeers, see `sibling_serving.py`
    GET, HEAD /v1/blobs/{digest}                    the bytes; Range gives 206 (see `dadi/blobs/serving.py`)
    /v1/traces                                      what containers read first, see `traces_http.py`
    /v1/prefetch, /v1/prefetch/…                    jobs that bring images before they are wanted, see `jobs_http.py`
    /v1/manifests, /v1/original/{digest}, …         for registry proxies, see `original.py`

Who may is said in `who_may.py`: images and tokens ask for registry credentials, blobs for a token.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial
from typing import Any

import msgspec
from aiohttp import web

from dadi import http, metrics
from dadi.blobs.serving import BlobServer, Compressor
from dadi.errors import AccessDenied, InvalidRequest, RegistryNotAllowed, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index import build
from dadi.index.image import ImageIndex
from dadi.oci.reference import Reference
from dadi.peers import shown
from dadi.peers.gate import AUTHORIZATION, OPEN, Doorman
from dadi.peers.keys import Keys
from dadi.wire import Event
from superpeer.catalog import ImageRecord
from superpeer.indexing import Progress
from superpeer.jobs_http import PrefetchServer
from superpeer.original import OriginalServer
from superpeer.peers import Peers
from superpeer.service import Superpeer
from superpeer.shared_layers import SharedLayers
from superpeer.sibling_serving import SiblingServer
from superpeer.siblings import Siblings
from superpeer.traces_http import TraceServer
from superpeer.who_may import WhoMay

_PROGRESS_EVERY = 0.25


def create(superpeer: Superpeer, who_may: WhoMay | None = None) -> web.Application:
    """Return the application for a superpeer that has been started; without `who_may` it is open to all."""
    app = http.application()
    gate = who_may.gate if who_may else OPEN
    shared = _shared_layers(superpeer, who_may) if who_may else None
    if who_may:
        superpeer.connect(who_may)
    if shared:
        app.on_cleanup.append(lambda app: shared.close())
    if superpeer.siblings:
        app.cleanup_ctx.append(partial(_catching_up, superpeer.siblings))
        if who_may and gate is not OPEN:
            app.cleanup_ctx.append(partial(_keys_of_siblings, superpeer.siblings, who_may, superpeer.fallbacks))
    blobs = BlobServer(superpeer, Compressor(cache=superpeer.config.compressed_cache), gate, learn=superpeer.learn)
    peers = Peers(superpeer.config.peers, gate=gate)
    originals = OriginalServer(superpeer.originals, who_may)
    nearer = superpeer.sibling_originals
    siblings = SiblingServer(superpeer.store, superpeer.catalog, superpeer.shown, superpeer.originals, superpeer.lazy,
                             gate, on_asked=nearer.forget if nearer else lambda digest: None)  # fmt: skip

    def statistics() -> dict[str, Any]:
        access = {"access": who_may.statistics()} if who_may else {}
        sent = {"served": blobs.statistics(), "sent_to_siblings": siblings.statistics(),
                "sent_to_proxies": originals.statistics()}  # fmt: skip
        return {**superpeer.statistics(), **sent, "peers": peers.statistics(), **access}

    app.router.add_get("/v1/blobs/{digest}", blobs.handle)
    for part in (ImageServer(superpeer, who_may, shared), siblings, originals, peers,
                 PrefetchServer(superpeer.prefetch, who_may), TraceServer(superpeer, gate)):  # fmt: skip
        part.add_routes(app.router)
    app.cleanup_ctx.append(peers.running)
    _add_status(app.router, gate, statistics)
    return app


def _add_status(router: web.UrlDispatcher, gate: Doorman, statistics: Callable[[], dict[str, Any]]) -> None:
    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def status(request: web.Request) -> web.Response:
        numbers = statistics()
        try:
            await gate.admit(request.headers)
        except AccessDenied:  # reasons name images
            numbers["fallbacks"] = [{**row, "why": ""} for row in numbers["fallbacks"]]
        return web.json_response(numbers)

    router.add_get("/healthz", healthz)
    router.add_get("/v1/status", status)
    router.add_get("/metrics", metrics.handler("dadi_superpeer", statistics))


class ImageServer:
    """The handlers of images, and of the tokens for their blobs. Without `who_may`, and `shared`, open to all."""

    def __init__(self, superpeer: Superpeer, who_may: WhoMay | None, shared: SharedLayers | None) -> None:
        self._superpeer = superpeer
        self._who_may = who_may
        self._shared = shared

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add what the head of this file lists."""
        router.add_get("/v1/images", self._images)
        router.add_get("/v1/token", self._token)
        router.add_get("/v1/keys", self._keys)

    async def _images(self, request: web.Request) -> web.StreamResponse:
        reference, platform = _asked(request)
        if self._who_may is None or self._shared is None:
            return await http.stream_events(request, resolving(self._superpeer, reference, platform))
        credential = request.headers.get(shown.HEADER)
        address = request.remote or ""
        events = resolving_for(self._superpeer, self._who_may, self._shared, credential, reference, platform, address)
        return await http.stream_events(request, events)

    async def _token(self, request: web.Request) -> web.Response:
        superpeer, who_may, shared = self._superpeer, self._who_may, self._shared
        reference, platform = _asked(request)
        if who_may is None or shared is None:
            raise InvalidRequest("this superpeer gives no tokens")
        credential, address = request.headers.get(shown.HEADER), request.remote or ""
        if AUTHORIZATION in request.headers:
            renewed = await who_may.renew(request.headers, credential, address=address, check=shared.check_renewal)
            superpeer.catalog.touch(reference.rpartition("@")[2])
            return web.json_response(renewed)
        ref = Reference.parse(reference)
        grant = await who_may.check(ref, credential, address)
        # Known by its manifest, and here, it needs no registry: it may be away, and the image run all the same.
        record = superpeer.catalog.by_manifest(ref.digest, ref.name, same=True) if ref.digest else None
        if record is None:
            record = await asyncio.shield(superpeer.resolve(reference, platform).task)
        image = superpeer.catalog.image(record)
        firm = await _checked(superpeer, shared, ref, credential, record, image)
        return web.json_response(who_may.tokens(_pinned(ref, record), image, record.index_digest, grant, firm=firm,
                                                address=address))  # fmt: skip

    async def _keys(self, request: web.Request) -> web.Response:
        if self._who_may is None:
            raise InvalidRequest("this superpeer has no keys")
        return web.Response(body=msgspec.json.encode(self._who_may.public()), content_type="application/json")


async def resolving(superpeer: Superpeer, reference: str, platform: str) -> AsyncGenerator[Event, None]:
    """Yield the events of resolving an image, up to and with "image"; raise what it raises."""
    found = superpeer.resolve(reference, platform)
    while not found.task.done():
        await asyncio.wait([found.task], timeout=_PROGRESS_EVERY)
        if not found.task.done():
            yield {"event": "progress", **msgspec.structs.asdict(found.progress)}
    record = await asyncio.shield(found.task)
    yield {"event": "image", **msgspec.structs.asdict(record), "age": superpeer.catalog.age(record)}


async def resolving_for(
    superpeer: Superpeer, who_may: WhoMay, shared: SharedLayers, credential: str | None, reference: str,
    platform: str, address: str = "",
) -> AsyncGenerator[Event, None]:  # fmt: skip
    """Do as `resolving`, if the registry accepts the caller's credential; the event "image" then has tokens."""
    ref = Reference.parse(reference)
    grant = await who_may.check(ref, credential, address)
    async for event in resolving(superpeer, reference, platform):
        if event["event"] == "image":
            record = superpeer.catalog.find(event["reference"], event["platform"])
            if record is None or record.index_digest != event["index_digest"]:
                raise Unavailable(f"{reference} was indexed anew just now", retry_after=1)
            image = superpeer.catalog.image(record)
            checking = asyncio.ensure_future(_checked(superpeer, shared, ref, credential, record, image))
            try:
                while not checking.done():
                    await asyncio.wait([checking], timeout=_PROGRESS_EVERY)
                    if not checking.done():
                        yield {"event": "progress", **msgspec.structs.asdict(Progress(stage="checking access"))}
                firm = await checking
            finally:  # who asked may have gone
                checking.cancel()
            event = {**event, **who_may.tokens(_pinned(ref, record), image, record.index_digest, grant, firm=firm,
                                               address=address)}  # fmt: skip
        yield event


def _shared_layers(superpeer: Superpeer, who_may: WhoMay) -> SharedLayers:
    limits = build.Limits(max_uncompressed_size=superpeer.config.indexing.max_layer_size)
    return SharedLayers(who_may, superpeer.catalog, superpeer.shown, superpeer.registry, superpeer.learn, limits=limits)


async def _checked(
    superpeer: Superpeer, shared: SharedLayers, reference: Reference, credential: str | None, record: ImageRecord,
    image: ImageIndex,
) -> bool:  # fmt: skip
    """Return whether tokens for an image are firm; have nothing left of one that is refused. Raises as `check` does."""
    try:
        return await shared.check(reference, credential, image)
    except AccessDenied as error:
        if not isinstance(error, RegistryNotAllowed):
            for other in superpeer.catalog.records():
                is_same = other.index_digest == record.index_digest
                if is_same and Reference.parse(other.reference).name == reference.name:
                    await superpeer.catalog.forget(other)
        raise


async def _catching_up(siblings: Siblings, app: web.Application) -> AsyncIterator[None]:
    siblings.catch_up()
    yield


async def _keys_of_siblings(
    siblings: Siblings, who_may: WhoMay, fallbacks: Fallbacks, app: web.Application
) -> AsyncIterator[None]:
    """While the application runs, accept what siblings have signed."""
    keys = Keys(siblings.others, siblings.fetch_keys, fallbacks, own=who_may.keys, file=who_may.siblings_keys,
                keep=who_may.keep)  # fmt: skip
    keys.start()
    who_may.trust(keys)
    yield
    await keys.close()


def _asked(request: web.Request) -> tuple[str, str]:
    reference, platform = request.query.get("reference"), request.query.get("platform")
    if not reference or not platform:
        raise InvalidRequest("reference and platform must be given")
    return reference, platform


def _pinned(reference: Reference, record: ImageRecord) -> str:
    return str(reference.at(record.manifest_digest))
