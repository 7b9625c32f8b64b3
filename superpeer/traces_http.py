"""Startup traces over HTTP. Only routes and translation; the formats are in `dadi/prefetch/trace.py`.

    GET    /v1/traces?manifest=D      the trace; an empty body if there is none
    POST   /v1/traces                 a Message: a recording, a report                       204
           Dadi-Recordings: enough    in both answers: no recording is wanted now, or this one was not taken
    DELETE /v1/traces?manifest=D[&forwarded=1]      forget what was learnt of an image       204

D is the digest of the image's manifest; who shows a token that names it may do all this. What a node tells is passed on
to the siblings, so that each of them can warm its share of the image (`jobs_ready.py`) and stand in for this one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

import aiohttp
import msgspec
from aiohttp import web

from dadi import digest as digests
from dadi import http
from dadi.errors import DadiError, InvalidRequest, Malformed, NotFound, Unavailable
from dadi.index.image import ImageIndex
from dadi.peers.gate import OPEN, Doorman
from dadi.prefetch import trace
from dadi.prefetch.client import ENOUGH, RECORDINGS
from dadi.prefetch.trace import Message

if TYPE_CHECKING:
    from superpeer.service import Superpeer

_BODY_TIME = 20.0
_PASSING_ON = aiohttp.ClientTimeout(total=10.0, sock_connect=1.0)


class TraceServer:
    """The handlers. `gate` says who may."""

    def __init__(self, superpeer: Superpeer, gate: Doorman = OPEN) -> None:
        self._superpeer = superpeer
        self._gate = gate

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add what the head of this file lists."""
        router.add_get("/v1/traces", self._get)
        router.add_post("/v1/traces", self._post)
        router.add_delete("/v1/traces", self._delete)

    async def _get(self, request: web.Request) -> web.Response:
        manifest = await self._asked(request)
        data, wanted = await self._superpeer.traces.asked(manifest)
        return web.Response(body=data, content_type="application/octet-stream", headers=_told(wanted))

    async def _post(self, request: web.Request) -> web.Response:
        try:
            async with asyncio.timeout(_BODY_TIME):
                message = trace.decode(await request.read(), Message)
        except TimeoutError:
            raise InvalidRequest("the body did not come in time") from None
        except Malformed as error:
            raise InvalidRequest(error.message, hint="are the versions alike?") from None
        await self._gate.admit(request.headers, digests.parse(message.manifest))
        taken = await self._superpeer.traces.learn(message, await self._index(message.manifest))
        if not message.forwarded and (taken or message.report is not None):
            on = msgspec.structs.replace(message, forwarded=True, recording=message.recording if taken else None)
            self._pass_on("POST", message.manifest, trace.encode(on))
        return web.Response(status=204, headers=_told(taken))

    async def _delete(self, request: web.Request) -> web.Response:
        manifest = await self._asked(request)
        await self._superpeer.traces.clear(manifest)
        if request.query.get("forwarded") != "1":
            self._pass_on("DELETE", manifest, b"", {"manifest": manifest, "forwarded": "1"})
        return web.Response(status=204)

    async def _asked(self, request: web.Request) -> str:
        manifest = digests.parse(request.query.get("manifest", ""))
        await self._gate.admit(request.headers, manifest)
        return manifest

    async def _index(self, manifest: str) -> ImageIndex:
        catalog = self._superpeer.catalog
        record = catalog.record_of(manifest)
        if record is None:
            await self._superpeer.learn(manifest)
            record = catalog.record_of(manifest)
        if record is None:
            raise NotFound(f"no image that this superpeer knows has the manifest {manifest}")
        return catalog.image(record)

    def _pass_on(self, method: str, manifest: str, body: bytes, parameters: Mapping[str, str] | None = None) -> None:
        siblings = self._superpeer.siblings
        if siblings is None:
            return

        async def everybody() -> None:
            try:
                await siblings.superpeers.ready()
            except Unavailable:
                return  # noted where the names are asked for
            await asyncio.gather(*map(to_one, siblings.others()))

        async def to_one(url: str) -> None:
            try:
                async with http.request(
                    siblings.session, method, f"{url}/v1/traces", "passing on a startup trace", data=body,
                    params=parameters, headers=siblings.headers(manifest), timeout=_PASSING_ON,
                ):  # fmt: skip
                    return
            except DadiError as error:
                self._superpeer.fallbacks.note("startup trace not passed on", f"{url}: {error}")

        siblings.spawn(everybody())


def _told(wanted: bool) -> dict[str, str]:
    return {} if wanted else {RECORDINGS: ENOUGH}
