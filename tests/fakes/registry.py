"""A registry that misbehaves on demand: an aiohttp server on a real loopback socket, and time that tests own.

What lives here: the pull side of the distribution protocol, three kinds of authentication, a script of faults. What
never does: assertions.

    registry.script("/blobs/", cut(100_000), status(503), method="GET")

means: the first GET of a path that contains "/blobs/" is cut after 100,000 bytes, the second is answered 503, and all
later ones are answered as they should be. `registry.seen` lists what was asked, with headers, in order.
"""

from __future__ import annotations

import asyncio
import base64
import dataclasses
import hashlib
import json
import re
import ssl
from collections.abc import Callable
from typing import Any

from aiohttp import web

from dadi.oci import media_types
from dadi.oci.retry import Clock


class FakeTime:
    """Time that passes only when somebody sleeps; `slept` lists for how long."""

    def __init__(self) -> None:
        self.now = 1_000_000.0
        self.slept: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def clock(self) -> Clock:
        return Clock(monotonic=lambda: self.now, wall=lambda: self.now, sleep=self.sleep, random=lambda: 0.0)


@dataclasses.dataclass(frozen=True)
class Seen:
    """One request. `authorization` is the header, None if there was none."""

    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    body: str

    @property
    def authorization(self) -> str | None:
        return self.headers.get("Authorization")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What is wrong with one answer; fields that are not set leave it right."""

    status: int | None = None
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    body: bytes | None = None
    cut_after: int | None = None
    """Bytes of the body after which the connection is torn down."""
    stall_after: int | None = None
    """Bytes of the body after which nothing comes any more."""
    flip: int | None = None
    """The byte of the body in which a bit is wrong."""
    ignore_range: bool = False
    chunked: bool = False
    """Without Content-Length."""
    drop: bool = False
    """The connection is closed before anything is answered."""
    after: Callable[[], object] | None = None
    """Called when all is sent that will be sent."""


def status(code: int, body: bytes = b"", **headers: str) -> Fault:
    return Fault(status=code, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def redirect(location: str, code: int = 307) -> Fault:
    return Fault(status=code, body=b"", headers={"Location": location})


def cut(after: int, then: Callable[[], object] | None = None, **more: Any) -> Fault:
    return Fault(cut_after=after, after=then, **more)


class FakeRegistry:
    """See the head of this file. Use it as an async context manager; `host` is then 127.0.0.1:PORT.

    `auth` is None, "basic" or "bearer"; `user` and `password` are what it wants to see (for "bearer": at the token
    endpoint; anybody gets a token if `user` is None). With `tls` it speaks HTTPS.
    """

    def __init__(
        self,
        *,
        auth: str | None = None,
        user: str | None = None,
        password: str = "",
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.auth, self.user, self.password, self._tls = auth, user, password, tls
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.seen: list[Seen] = []
        self.tokens: set[str] = set()
        self.issued = 0
        self.refresh_token: str | None = None
        """What a POST to the token endpoint must bring."""
        self.token_extra: dict[str, Any] = {"expires_in": 300}
        self.realm: str | None = None
        """The realm to announce instead of our own /token."""
        self.refuse_with = 401
        """What a token that is not valid (any more) is answered with."""
        self._script: list[tuple[str | None, str, Fault]] = []
        self._closing = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.host = ""

    async def __aenter__(self) -> FakeRegistry:
        application = web.Application()
        application.router.add_route("*", "/{path:.*}", self._handle)
        self._runner = web.AppRunner(application, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0, ssl_context=self._tls)
        await site.start()
        self.host = f"127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._runner is not None
        self._closing.set()
        await self._runner.cleanup()

    @property
    def base(self) -> str:
        return f"{'https' if self._tls else 'http'}://{self.host}"

    # ---- contents

    def add_blob(self, data: bytes) -> str:
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        self.blobs[digest] = data
        return digest

    def add_manifest(self, repository: str, tag: str | None, document: Any, media_type: str) -> tuple[str, int]:
        """Add a manifest (bytes, or something that becomes JSON); returns digest and size."""
        data = document if isinstance(document, bytes) else json.dumps(document).encode()
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        for name in (tag, digest):
            if name:
                self.manifests[repository, name] = (media_type, data)
        return digest, len(data)

    def add_image(
        self,
        repository: str,
        tag: str | None,
        layers: list[bytes],
        *,
        platform: str = "linux/amd64",
        docker: bool = False,
    ) -> dict[str, Any]:
        """Add an image of uncompressed layers; returns its descriptor, as JSON, with its platform."""
        os, architecture, *variant = platform.split("/")
        diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
        config = {"os": os, "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        data = json.dumps(config).encode()
        manifest_type = media_types.DOCKER_MANIFEST if docker else media_types.OCI_MANIFEST
        config_type = media_types.DOCKER_CONFIG if docker else media_types.OCI_CONFIG
        layer_type = media_types.DOCKER_LAYER if docker else media_types.OCI_LAYER
        document = {
            "schemaVersion": 2,
            "mediaType": manifest_type,
            "config": {"mediaType": config_type, "digest": self.add_blob(data), "size": len(data)},
            "layers": [
                {"mediaType": layer_type, "digest": self.add_blob(layer), "size": len(layer)} for layer in layers
            ],
        }
        digest, size = self.add_manifest(repository, tag, document, manifest_type)
        entry_platform = {"os": os, "architecture": architecture} | ({"variant": variant[0]} if variant else {})
        return {"mediaType": manifest_type, "digest": digest, "size": size, "platform": entry_platform}

    # ---- faults

    def script(self, path_part: str, *faults: Fault, method: str | None = None) -> None:
        """Answer the next requests whose path contains `path_part` wrongly, one fault each, in order."""
        self._script += [(method, path_part, fault) for fault in faults]

    def expire_tokens(self, refuse_with: int = 401) -> None:
        """Make all tokens that were given out invalid."""
        self.tokens.clear()
        self.refuse_with = refuse_with

    def asked(self, path_part: str, method: str | None = None) -> list[Seen]:
        """Return the requests whose path contains `path_part`."""
        return [seen for seen in self.seen if path_part in seen.path and method in (None, seen.method)]

    # ---- serving

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = (await request.read()).decode()
        self.seen.append(Seen(request.method, request.path, dict(request.query), dict(request.headers), body))
        fault = self._fault_for(request)
        if fault.drop:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        if fault.status is not None:
            return await self._send(request, fault.status, dict(fault.headers), fault.body or b"", fault)
        if request.path == "/token":
            return self._token(request, body)
        refused = self._refused(request)
        if refused is not None:
            return refused
        return await self._content(request, fault)

    def _fault_for(self, request: web.Request) -> Fault:
        for number, (method, path_part, fault) in enumerate(self._script):
            if path_part in request.path and method in (None, request.method):
                del self._script[number]
                return fault
        return Fault()

    async def _content(self, request: web.Request, fault: Fault) -> web.StreamResponse:
        blob = re.fullmatch(r"/v2/(?P<name>.+)/blobs/(?P<digest>[^/]+)|/cdn/(?P<cdn>.+)", request.path)
        if blob is not None:
            data = self.blobs.get(blob["digest"] or blob["cdn"])
            headers = {"Content-Type": "application/octet-stream"}
        else:
            manifest = re.fullmatch(r"/v2/(?P<name>.+)/manifests/(?P<ref>[^/]+)", request.path)
            found = self.manifests.get((manifest["name"], manifest["ref"])) if manifest else None
            data = found[1] if found else None
            headers = {"Content-Type": found[0] if found else ""}
            if data is not None:
                headers["Docker-Content-Digest"] = "sha256:" + hashlib.sha256(data).hexdigest()
        if data is None:
            unknown = {"errors": [{"code": "NAME_UNKNOWN", "message": "there is no such thing"}]}
            return web.json_response(unknown, status=404)
        headers |= fault.headers
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("Range", ""))
        if wanted is None or fault.ignore_range or blob is None:
            return await self._send(request, 200, headers, data, fault)
        start, end = int(wanted[1]), min(int(wanted[2] or len(data) - 1), len(data) - 1)
        headers.setdefault("Content-Range", f"bytes {start}-{end}/{len(data)}")
        return await self._send(request, 206, headers, data[start : end + 1], fault)

    async def _send(
        self, request: web.Request, code: int, headers: dict[str, str], data: bytes, fault: Fault
    ) -> web.StreamResponse:
        response = web.StreamResponse(status=code, headers=headers)
        if fault.chunked:
            response.enable_chunked_encoding()
        else:
            response.content_length = len(data)
        if fault.flip is not None:
            data = data[: fault.flip] + bytes([data[fault.flip] ^ 1]) + data[fault.flip + 1 :]
        await response.prepare(request)
        stop = fault.cut_after if fault.cut_after is not None else fault.stall_after
        if request.method != "HEAD":
            await response.write(data[:stop])
        if fault.after is not None:
            fault.after()
        if fault.stall_after is not None:
            await self._closing.wait()
        if fault.cut_after is not None and request.transport is not None:
            # Closed, not aborted: what was written still arrives, and then the end comes too soon.
            request.transport.close()
            return response
        await response.write_eof()
        return response

    # ---- authentication

    def _refused(self, request: web.Request) -> web.Response | None:
        shown = request.headers.get("Authorization", "")
        if self.auth is None or request.path.startswith("/cdn/"):
            return None
        if self.auth == "basic":
            if shown == self._basic():
                return None
            challenge = 'Basic realm="a \\"quoted\\", realm"'
            return web.Response(status=401 if not shown else self.refuse_with, headers={"WWW-Authenticate": challenge})
        if shown.removeprefix("Bearer ") in self.tokens:
            return None
        name = re.match(r"/v2/(.+)/(?:blobs|manifests)/", request.path)
        scope = f"repository:{name[1] if name else ''}:pull"
        challenge = f'Bearer realm="{self.realm or self.base + "/token"}",service="fake",scope="{scope}"'
        if shown and self.refuse_with == 403:
            return web.Response(status=403)
        return web.Response(status=401, headers={"WWW-Authenticate": challenge})

    def _basic(self) -> str:
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    def _token(self, request: web.Request, body: str) -> web.Response:
        if self.refresh_token is not None:
            if request.method != "POST" or f"refresh_token={self.refresh_token}" not in body:
                return web.Response(status=401)
        elif self.user is not None and request.headers.get("Authorization") != self._basic():
            return web.Response(status=401)
        self.issued += 1
        token = f"token-{self.issued}"
        self.tokens.add(token)
        name = "access_token" if request.method == "POST" else "token"
        return web.json_response({name: token, **self.token_extra})
