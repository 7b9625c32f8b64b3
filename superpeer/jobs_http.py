"""Prefetch jobs over HTTP. Only routes and translation; the messages are in `dadi/prefetch/messages.py`.

Who may: as for `/v1/images`, the registry must let the caller (`Dadi-Registry-Authorization`; nothing: anybody) read
the image's repository; to look at a job a token that names the image's manifest will do. Who begins, cancels or retries
one must be an operator besides (`jobs_operators.py`); a sibling shows a token for siblings instead. Who may not see a
job is told that there is none.
The list, and what nodes are told, has the jobs of images that anybody may have, and with `?registry=HOST`, for which
the credentials are then meant, those of that registry that the caller may have. The credentials are shown to the
registry for this question; those that come with a job are used for it until it is over (`jobs_secrets.py`), and not
kept. No address in any message is ever asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import cast, get_args

import msgspec
import structlog
from aiohttp import web

from dadi import http
from dadi.errors import DadiError, InvalidRequest, TokenRefused
from dadi.oci.credentials import Credentials
from dadi.oci.reference import Reference
from dadi.peers import shown
from dadi.peers.gate import AUTHORIZATION, Doorman, Gate
from dadi.prefetch.messages import (
    MOST_HELD,
    MOST_WISHES,
    Job,
    Request,
    Scope,
    Wishes,
    canonical,
    decode_report,
    decode_request,
)
from dadi.wire import Event
from superpeer.jobs import Prefetcher, no_such_job
from superpeer.who_may import WhoMay

log = structlog.get_logger()
_CHECKS = 8
"""Registries that are asked at a time whether a list may name their images."""


class PrefetchServer:
    """The handlers. Without `who_may` they are open to all."""

    def __init__(self, prefetcher: Prefetcher, who_may: WhoMay | None) -> None:
        self._prefetcher = prefetcher
        self._who_may = who_may
        self._own = Gate(who_may.keys) if who_may is not None else None

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add what `messages.py` lists."""
        router.add_post("/v1/prefetch", self._submit)
        router.add_get("/v1/prefetch", self._list)
        router.add_get("/v1/prefetch/verify", self._verify)
        router.add_get("/v1/prefetch/wanted", self._wanted)
        router.add_post("/v1/prefetch/{id}/nodes", self._heard)
        router.add_get("/v1/prefetch/{id}", self._one)
        router.add_post("/v1/prefetch/{id}/cancel", self._cancel)
        router.add_post("/v1/prefetch/{id}/retry", self._retry)

    async def _submit(self, request: web.Request) -> web.Response:
        wanted = decode_request(await request.read())
        if wanted.manifest and self._siblings is not None:
            if AUTHORIZATION not in request.headers:
                raise TokenRefused("only siblings say what an image is: leave the manifest out")
            await self._siblings.admit_sibling(request.headers)
            return _json(await self._prefetcher.submit(wanted))
        await self._check_operator(request)
        await self._check(request, wanted.reference, "")
        return _json(await self._prefetcher.submit(wanted, _given(request)))

    async def _list(self, request: web.Request) -> web.Response:
        allowed, _ = await self._allowed(request, self._prefetcher.jobs())
        return _json({"jobs": allowed})

    async def _wanted(self, request: web.Request) -> web.Response:
        """Tell which images are wanted or pinned, of those that anybody may have, or that are opened by what is shown.

        Of the others the registries are named, so that a node knows for which it may come again with credentials; not
        of those only that it says it has: their ids can be guessed.
        """
        query, nodes = request.query, self._prefetcher.nodes
        node = query.get("node", "")
        if not 0 < len(node) <= 128:
            raise InvalidRequest("a node must say who it is")
        have = set(query.get("have", "").split(",")[:MOST_HELD]) - {""}
        jobs = [job for job in self._prefetcher.jobs() if nodes.is_open(job) or nodes.is_pinned(job)]
        named: set[str] = set()
        if self._who_may is not None and AUTHORIZATION in request.headers:
            await self._who_may.gate.admit(request.headers)
            named = self._who_may.gate.named(request.headers, {digest for job in jobs for digest in _manifests(job)})
        others = [job for job in jobs if not named & _manifests(job)]
        allowed, unsure = await self._allowed(request, others)
        may = {job.id for job in allowed}
        told = [job for job in jobs if job.id in may or named & _manifests(job)]
        # Whose token is for what the tag was hears that this is pinned, not what the tag is by now.
        wanted = [job for job in told if job.id in may or job.manifest_digest in named]
        wishes = nodes.wishes(wanted, node, query.get("zone", ""), query.get("rack", ""), have)
        hidden = {Reference.parse(job.request.reference).registry for job in others if job.id not in may}
        registries = tuple(sorted(hidden - {query.get("registry", "")}))[:MOST_WISHES]
        return _json(Wishes(tuple(wishes), nodes.asked(node), nodes.pinned(told, have), registries, unsure=unsure))

    async def _heard(self, request: web.Request) -> web.Response:
        job = await self._found(request)
        self._prefetcher.nodes.hear(job, decode_report(await request.read()))
        return web.json_response({})

    async def _allowed(self, request: web.Request, jobs: list[Job]) -> tuple[list[Job], bool]:
        """Return the jobs of images that the caller may have, and whether of any that could not be said."""
        slots, unsure = asyncio.Semaphore(_CHECKS), False

        async def may(reference: str) -> bool:
            # What the caller shows is meant for one registry, and shown to no other.
            nonlocal unsure
            meant = Reference.parse(reference).registry == request.query.get("registry")
            try:
                async with slots:
                    await self._check(request, reference, "", shown.HEADER if meant else "")
            except DadiError as error:
                unsure = unsure or error.retryable
                return False
            return True

        names = {Reference.parse(job.request.reference).name: job.request.reference for job in jobs}
        allowed = dict(zip(names, await asyncio.gather(*map(may, names.values())), strict=True))
        return [job for job in jobs if allowed[Reference.parse(job.request.reference).name]], unsure

    async def _one(self, request: web.Request) -> web.StreamResponse:
        job = await self._found(request)
        if request.query.get("follow", "0") in ("", "0"):
            return _json(job)
        return await http.stream_events(request, self._events(job))

    async def _events(self, job: Job) -> AsyncGenerator[Event, None]:
        async for now in self._prefetcher.follow(job.id):
            yield {"event": "job", **msgspec.to_builtins(now)}

    async def _cancel(self, request: web.Request) -> web.Response:
        await self._check_operator(request)
        job = await self._found(request, changes=True)
        return _json(await self._prefetcher.cancel(job.id))

    async def _retry(self, request: web.Request) -> web.Response:
        await self._check_operator(request)
        job = await self._found(request, changes=True)
        return _json(await self._prefetcher.retry(job.id, _given(request)))

    async def _verify(self, request: web.Request) -> web.Response:
        query = request.query
        scope = cast("Scope", query.get("scope", "full"))
        if scope not in get_args(Scope):
            raise InvalidRequest(f"{scope[:20]!r} is no scope", hint=f"one of {', '.join(get_args(Scope))}")
        asked = canonical(Request(query.get("reference", ""), query.get("platform", "")))
        await self._check(request, asked.reference, "")
        readiness = await self._prefetcher.shares.readiness(asked.reference, asked.platform, scope)
        return _json(readiness)

    async def _found(self, request: web.Request, *, changes: bool = False) -> Job:
        """Return the job in the path, if the caller may have its image; a node's token `changes` nothing.

        Whoever names the image is told what its registry says of him, be there such a job or not. Else whom it does
        not let in, or who asks when it cannot say, is told that there is no such job: ids can be guessed.
        """
        name, reference = request.match_info["id"], request.query.get("reference", "")
        if reference and AUTHORIZATION not in request.headers:
            await self._check(request, reference, "")
            job = self._prefetcher.find(name)
            if job.request.reference != str(Reference.parse(reference)):
                raise no_such_job(name)
            return job
        job = self._prefetcher.find(name)
        try:
            await self._check(request, job.request.reference, "" if changes else job.manifest_digest)
        except DadiError as error:
            log.info("a prefetch job is not shown", job=job.id, to=request.remote, why=error.message)
            raise no_such_job(name) from None
        return job

    @property
    def _siblings(self) -> Doorman | None:
        """Who knows siblings by their tokens; None where whoever comes is believed."""
        if self._who_may is None:
            return None
        if self._who_may.asks:
            return self._who_may.gate
        # The network says who reads; who are operators is said all the same, and siblings sign with one key then.
        return self._own if self._prefetcher.operators.are_named else None

    async def _check_operator(self, request: web.Request) -> None:
        if self._who_may is not None:
            transport = request.transport
            certificate = transport.get_extra_info("peercert") if transport else None
            await self._prefetcher.operators.check(request.headers, request.remote or "", certificate)

    async def _check(
        self, request: web.Request, reference: str, manifest: str, header: str = shown.HEADER
    ) -> None:
        if self._who_may is None:
            return
        if AUTHORIZATION in request.headers and manifest:
            await self._who_may.gate.admit(request.headers, manifest)
            return
        await self._who_may.check(Reference.parse(reference), request.headers.get(header), request.remote or "")


def _manifests(job: Job) -> set[str]:
    """Return the images that a job is of: the one that it brings, and those that it keeps."""
    return {job.manifest_digest, *(pin.manifest for pin in job.pins)} - {""}


def _given(request: web.Request) -> Credentials | None:
    return shown.credentials(request.headers.get(shown.HEADER))


def _json(thing: object) -> web.Response:
    return web.Response(body=msgspec.json.encode(thing), content_type="application/json")
