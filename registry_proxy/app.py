"""The proxy's HTTP: the pull side of the OCI distribution API, and the one place where its error JSON is written.

    GET       /healthz, /metrics, /v1/status        as our other programs; numbers only, no name of an image or registry
    GET, HEAD /v2/…                                 see `paths.py`; `?ns=` names the registry
    others    /v2/…                                 405 UNSUPPORTED, or passed on to the registry (`uploads.py`)
    what is no request                              an error all the same (`connections.py`)

An error is {"errors": [{"code", "message", "detail"}]} with the specification's codes. The client's Authorization
header goes to the registry of this request and nowhere else; what the registry asks for (WWW-Authenticate) goes back
to the client, who then gets a token for that registry by himself.

A request that two programs could read differently is refused: a body where none belongs, a header given twice that
must be given once, a path that would have to be normalised. (OCI distribution specification 1.1, "Pull", "Error
Codes"; RFC 9110; RFC 9112, 11.2.)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any
from urllib.parse import urlencode

import structlog
from aiohttp import HttpVersion10, web

from dadi import digest as digests
from dadi import http, metrics
from dadi.errors import (
    AccessDenied,
    DadiError,
    DigestMismatch,
    InvalidRequest,
    LoginRequired,
    NotFound,
    StoreFull,
    Unavailable,
    Unsupported,
)
from dadi.fallbacks import Fallbacks
from dadi.oci.reference import Reference, parse_registry
from dadi.originals import caller as callers
from dadi.originals import serving
from dadi.originals.config import FrontConfig
from dadi.originals.documents import Document
from registry_proxy import paths
from registry_proxy.connections import Connections
from registry_proxy.paths import Kind, Route
from registry_proxy.upstream import ProxyUpstream

log = structlog.get_logger()
_VERSION = {"Docker-Distribution-API-Version": "registry/2.0"}
_ONCE = ("Authorization", "Host", "Range", "Content-Length", "Transfer-Encoding", "If-Range")
_MAX_TYPE = 255
_PUSHES = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE")
_PASSWORD = 'Basic realm="registries behind this mirror"'
_TOKEN_CLIENTS = ("docker/", "Go-http-client/")
_STALE = '299 - "the registry is away: this may be out of date"'
"""(Specification, "Warnings": clients show it to people.)"""

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Forward = Callable[[web.Request, Reference, Route], Awaitable[web.StreamResponse]]
"""Passes a request that is no pull on to the registry."""


class Front:
    """The handler of all requests; see the head of this file."""

    def __init__(self, config: FrontConfig, upstream: ProxyUpstream, forward: Forward) -> None:
        """Raises InvalidRequest if `config.upstream` is no registry."""
        self._config = config
        self._default = parse_registry(config.upstream)
        self._upstream = upstream
        self._forward = forward
        self.blobs: Counter[str] = Counter({"requests": 0, "bytes": 0, "cut": 0})
        self.requests: Counter[str] = Counter(dict.fromkeys(("manifests", "stale", "refused", "unauthorized"), 0))

    @property
    def most_connections(self) -> int:
        """See `FrontConfig`."""
        return self._config.most_connections

    def refusal(self, status: int, what: str) -> web.Response:
        """Return the answer to what is no request, or is none for us."""
        self.requests["refused"] += 1
        code = "UNAVAILABLE" if status == 503 else "UNSUPPORTED"
        return _errors(code, what, None, status, {"Retry-After": "1"} if status == 503 else None)

    def statistics(self) -> dict[str, Any]:
        """Return counts of requests, and of blobs that were served."""
        return {"requests": dict(self.requests), "served": dict(self.blobs)}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer any request below /v2."""
        route: Route | None = None
        try:
            path = request.raw_path.partition("?")[0]
            route = paths.split(path)
            _check_shape(request)
            return await self._answer(request, route)
        except DadiError as error:
            http.cut_if_begun(request, error)
            self.requests["unauthorized" if isinstance(error, LoginRequired) else "refused"] += 1
            return _problem(error, route, request.headers.get("Authorization", ""))
        except (web.HTTPException, ConnectionResetError):
            raise
        except Exception as error:
            if http.hung_up(request, error):
                raise ConnectionResetError("the client has gone") from None
            http.cut_if_begun(request, error)
            log.exception("a fault of ours", method=request.method, path=request.path)
            return _errors("UNKNOWN", "a fault of ours; the log has its trace", None, 500)

    async def _answer(self, request: web.Request, route: Route) -> web.StreamResponse:
        ns = _one(request, "ns")
        if route.kind is Kind.BASE:
            return await self._base(request, ns)
        repository = paths.repository(route.name, ns, self._default)
        if request.method not in ("GET", "HEAD") or route.kind is Kind.UPLOAD:
            if self._config.uploads == "pass" and request.method in _PUSHES:
                _check_identifier(repository, route)
                answer = await self._forward(request, repository, route)
                if route.kind is Kind.MANIFEST and request.method in ("PUT", "DELETE") and answer.status < 300:
                    await self._upstream.changed(paths.identified(repository, route.identifier))
                return answer
            return _errors("UNSUPPORTED", "this is a mirror: push to the registry itself", None, 405,
                           {"Allow": "GET, HEAD"})  # fmt: skip
        caller = callers.parse(request.headers.get("Authorization"))
        match route.kind:
            case Kind.MANIFEST:
                self.requests["manifests"] += 1
                ref = paths.identified(repository, route.identifier)
                return self._document(request, await self._upstream.manifest(ref, caller), named=True)
            case Kind.BLOB:
                digest = digests.parse(route.identifier)
                original = await self._upstream.blob(repository, digest, caller)
                headers = {**_VERSION, "Content-Type": "application/octet-stream"}
                return await serving.respond(request, digest, original, headers, self.blobs)
            case Kind.TAGS:
                parameters = _page(request)
                found = await self._upstream.tags(repository, parameters, caller)
                return self._document(request, found, link=_next(request, ns, found))
            case _:
                subject = repository.at(digests.parse(route.identifier))
                artifact_type = _one(request, "artifactType") or ""
                if len(artifact_type) > _MAX_TYPE or not artifact_type.isprintable():
                    raise InvalidRequest("artifactType is not a media type")
                found = await self._upstream.referrers(subject, artifact_type, caller)
                headers = {"OCI-Filters-Applied": "artifactType"} if artifact_type else {}
                return self._document(request, found, more=headers)

    async def _base(self, request: web.Request, ns: str | None) -> web.Response:
        if request.method not in ("GET", "HEAD"):
            return _errors("UNSUPPORTED", "nothing to be done here", None, 405, {"Allow": "GET, HEAD"})
        if self._config.login and "Authorization" not in request.headers:
            registry = parse_registry(ns) if ns is not None else self._default
            challenge = await self._upstream.challenge(registry)
            if challenge and ns is None and self._has_password_for_us(request):
                challenge = _PASSWORD
            if challenge:
                raise LoginRequired(f"{registry} wants to know who asks", hint="log in", challenge=challenge)
        return web.json_response({}, headers=_VERSION)

    def _has_password_for_us(self, request: web.Request) -> bool:
        """Whether who looks at the base may be asked for a password, which we show to the registry that is meant.

        The upstream's own challenge has clients show the password at the upstream's token server, whichever registry
        behind us it is for. Docker (and its registry, as a mirror of ours) has passwords for its upstream only, and
        shows them to token servers only. What is pushed goes with what the registry itself wants to see.
        """
        by_token = request.headers.get("User-Agent", "").startswith(_TOKEN_CLIENTS)
        return self._config.uploads != "pass" and not by_token

    def _document(self, request: web.Request, document: Document, *, named: bool = False, link: str = "",
                  more: dict[str, str] | None = None) -> web.Response:  # fmt: skip
        headers = {**_VERSION, "Content-Type": document.media_type, **(more or {})}
        if link:
            headers["Link"] = link
        if named:
            etag = f'"{document.digest}"'
            headers |= {"Docker-Content-Digest": document.digest, "ETag": etag}
        if document.stale is not None:
            self.requests["stale"] += 1
            headers |= {"Warning": _STALE, "Age": str(int(document.stale))}
        if named and etag in [tag.strip().removeprefix("W/") for tag in
                              request.headers.get("If-None-Match", "").split(",")]:  # fmt: skip
            del headers["Content-Type"]
            return web.Response(status=304, headers=headers)
        return web.Response(body=document.raw, headers=headers)


def create(front: Front, upstream: ProxyUpstream, fallbacks: Fallbacks) -> web.Application:
    """Return the application."""
    @web.middleware
    async def errors_as_json(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        except web.HTTPException as error:  # no route: `OPTIONS *`, CONNECT
            return front.refusal(error.status, error.reason)

    app = web.Application(client_max_size=1 << 20, middlewares=[errors_as_json])
    app[http.CONNECTIONS] = Connections(front.most_connections, front.refusal, fallbacks)
    app.on_response_prepare.append(http.mark_begun)

    def statistics() -> dict[str, Any]:
        return {**front.statistics(), **upstream.statistics(), "fallbacks": fallbacks.statistics()}

    async def healthz(request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def status(request: web.Request) -> web.Response:
        counts = statistics()
        rows = [{"kind": row["kind"], "count": row["count"]} for row in counts.pop("fallbacks")]
        return web.json_response({**_numbers(counts), "fallbacks": rows})

    app.router.add_get("/healthz", healthz)
    app.router.add_get("/v1/status", status)
    app.router.add_get("/metrics", metrics.handler("dadi_registry_proxy", statistics))
    app.router.add_route("*", "/{path:.*}", front.handle, expect_handler=_expect)
    return app


def _numbers(tree: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of a tree of counts: texts and lists name images and registries, and anybody may ask."""
    return {name: _numbers(value) if isinstance(value, dict) else value for name, value in tree.items()
            if isinstance(value, dict | bool | int | float)}  # fmt: skip


# ---- what is read of a request


async def _expect(request: web.Request) -> None:
    """Say nothing to `Expect: 100-continue`: who is refused need not send a body. `uploads.py` says it."""


def _check_shape(request: web.Request) -> None:
    """Raise InvalidRequest for what a program behind or before us could understand differently; Unsupported."""
    if request.version < HttpVersion10:
        raise InvalidRequest("a request of HTTP/0.9")
    coding = request.headers.get("Transfer-Encoding")
    if coding is not None and (request.version == HttpVersion10 or request.method in ("GET", "HEAD")):
        raise InvalidRequest(f"a {request.method} with a Transfer-Encoding, where none belongs")
    if coding is not None and coding.strip().lower() != "chunked":
        raise Unsupported("a Transfer-Encoding that is more than chunked")
    for name in _ONCE:
        if len(request.headers.getall(name, ())) > 1:
            raise InvalidRequest(f"the header {name} is given more than once")
    if request.method in ("GET", "HEAD") and request.can_read_body:
        raise InvalidRequest(f"a {request.method} with a body")


def _check_identifier(repository: Reference, route: Route) -> None:
    if route.kind is Kind.MANIFEST:
        paths.identified(repository, route.identifier)
    elif route.kind is Kind.BLOB:
        digests.parse(route.identifier)


def _one(request: web.Request, name: str) -> str | None:
    found = request.query.getall(name, [])
    if len(found) > 1:
        raise InvalidRequest(f"the parameter {name} is given more than once")
    return found[0] if found else None


def _page(request: web.Request) -> dict[str, str]:
    """Return the parameters n and last of a list (specification, "Listing Tags")."""
    parameters = {}
    n, last = _one(request, "n"), _one(request, "last")
    if n is not None:
        if not (n.isascii() and n.isdigit() and len(n) <= 9):
            raise InvalidRequest("n is not a number of tags")
        parameters["n"] = str(int(n))
    if last is not None:
        if len(last) > 128 or not last.isprintable():
            raise InvalidRequest("last is not a tag")
        parameters["last"] = last
    return parameters


def _next(request: web.Request, ns: str | None, found: Document) -> str:
    if not found.following:
        return ""
    query = urlencode({**found.following, **({"ns": ns} if ns is not None else {})})
    return f'<{request.raw_path.partition("?")[0]}?{query}>; rel="next"'


# ---- errors


_UNKNOWN = {Kind.MANIFEST: "MANIFEST_UNKNOWN", Kind.BLOB: "BLOB_UNKNOWN"}


def _problem(error: DadiError, route: Route | None, shown: str) -> web.Response:
    """Return what the specification has for an error (its "Error Codes"); clients go on to the next mirror by it."""
    headers: dict[str, str] = {}
    match error:
        case LoginRequired():
            code, status = "UNAUTHORIZED", 401
            if error.challenge:
                headers["WWW-Authenticate"] = _met(error.challenge, shown)
        case AccessDenied():
            code, status = "DENIED", 403
        case NotFound():
            code, status = _UNKNOWN.get(route.kind, "NAME_UNKNOWN") if route else "NAME_UNKNOWN", 404
        case InvalidRequest():
            code, status = _invalid(error, route), 400
        case Unsupported():
            code, status = "UNSUPPORTED", 501
        case Unavailable() | StoreFull():
            code, status = "UNAVAILABLE", 503
            if isinstance(error, Unavailable) and error.retry_after is not None:
                code, status = "TOOMANYREQUESTS", 429
                headers["Retry-After"] = str(int(error.retry_after + 1))
        case DigestMismatch():
            code, status = "DIGEST_INVALID", 502
        case _:
            code, status = "UNKNOWN", max(error.status, 500)
    return _errors(code, error.message, error.hint, status, headers)


def _met(challenge: str, authorization: str) -> str:
    """Return the challenge for who has shown a token that was refused.

    podman asks for tokens by what a repository is called here, REGISTRY/NAME, and once more by the scope that it hears
    of in this way. (RFC 6750, 3.1; containers/image.)
    """
    bearer = authorization[:7].lower() == challenge[:7].lower() == "bearer "
    if bearer and "scope=" in challenge and "error=" not in challenge:
        return f'{challenge},error="insufficient_scope"'
    return challenge


def _invalid(error: InvalidRequest, route: Route | None) -> str:
    if "digest" in error.message:
        return "DIGEST_INVALID"
    if "tag" in error.message and route is not None and route.kind is Kind.MANIFEST:
        return "MANIFEST_INVALID"
    return "NAME_INVALID" if route is not None and route.kind is not Kind.BASE else "UNSUPPORTED"


def _errors(code: str, message: str, detail: str | None, status: int, headers: dict[str, str] | None = None
            ) -> web.Response:  # fmt: skip
    body = {"errors": [{"code": code, "message": message, "detail": detail}]}
    return web.json_response(body, status=status, headers={**_VERSION, **(headers or {})})


