"""The superpeer's HTTP. Only routes and translation: what a superpeer does is in `service.py`.

    GET  /healthz                                   200 "ok"
    GET  /metrics                                   Prometheus
    GET  /v1/status                                 JSON, see `Superpeer.statistics`
    GET  /v1/images?reference=R&platform=os/arch    events: {"event": "progress", layers, layers_done, bytes, total,
                                                    stage} …, {"event": "image", reference, platform, manifest_digest,
                                                    index_digest, index_size, resolved_at, age}, {"event": "done"}
    GET, HEAD /v1/blobs/{digest}                    the bytes; Range gives 206 (see `dadi/blobs/serving.py`)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import msgspec
from aiohttp import web

from dadi import http, metrics
from dadi.blobs.serving import BlobServer, Compressor
from dadi.errors import InvalidRequest
from dadi.wire import Event
from superpeer.service import Superpeer

_PROGRESS_EVERY = 0.25


def create(superpeer: Superpeer) -> web.Application:
    """Return the application for a superpeer that has been started."""
    app = http.application()
    blobs = BlobServer(superpeer, Compressor(cache=superpeer.config.compressed_cache))

    def statistics() -> dict[str, Any]:
        return {**superpeer.statistics(), "served": blobs.statistics()}

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def status(request: web.Request) -> web.Response:
        return web.json_response(statistics())

    async def images(request: web.Request) -> web.StreamResponse:
        reference, platform = request.query.get("reference"), request.query.get("platform")
        if not reference or not platform:
            raise InvalidRequest("reference and platform must be given")
        return await http.stream_events(request, resolving(superpeer, reference, platform))

    app.router.add_get("/healthz", healthz)
    app.router.add_get("/v1/status", status)
    app.router.add_get("/v1/images", images)
    app.router.add_get("/v1/blobs/{digest}", blobs.handle)
    app.router.add_get("/metrics", metrics.handler("dadi_superpeer", statistics))
    return app


async def resolving(superpeer: Superpeer, reference: str, platform: str) -> AsyncIterator[Event]:
    """Yield the events of resolving an image, up to and with "image"; raise what it raises."""
    found = superpeer.resolve(reference, platform)
    while not found.task.done():
        await asyncio.wait([found.task], timeout=_PROGRESS_EVERY)
        if not found.task.done():
            yield {"event": "progress", **msgspec.structs.asdict(found.progress)}
    record = await asyncio.shield(found.task)
    yield {"event": "image", **msgspec.structs.asdict(record), "age": superpeer.catalog.age(record)}
