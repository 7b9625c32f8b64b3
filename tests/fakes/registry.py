"""A registry that misbehaves on demand: an aiohttp server on a real loopback socket, and time that tests own.

What lives here: the distribution protocol for pulling and pushing, referrers, three kinds of authentication, a script
of faults. What never does: assertions. Longer than 400 lines, because a script of faults reaches into all of it.

    registry.script("/blobs/", cut(100_000), status(503), method="GET")

means: the first GET of a path that contains "/blobs/" is cut after 100,000 bytes, the second is answered 503, and all
later ones are answered as they should be. `registry.seen` lists what was asked, with headers, in order. Blobs belong to
all repositories at once.
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
from urllib.parse import parse_qs

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
    takes: int | None = None
    """Bytes of the request's body that are read before it is answered (or dropped)."""
    stuck: bool = False
    """After `takes` bytes of the request's body, nothing is read and nothing is answered any more."""
    gate: asyncio.Event | None = None
    """What is waited for before anything is answered."""
    lost: bool = False
    """What was asked is done, and the connection is closed before it is answered."""


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
        referrers: bool = False,
    ) -> None:
        self.auth, self.user, self.password, self._tls = auth, user, password, tls
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.seen: list[Seen] = []
        self.tokens: set[str] = set()
        self.token_scopes: dict[str, str] = {}
        self.issued = 0
        self.refresh_token: str | None = None
        """What a POST to the token endpoint must bring."""
        self.token_extra: dict[str, Any] = {"expires_in": 300}
        self.realm: str | None = None
        """The realm to announce instead of our own /token."""
        self.refuse_with = 401
        """What a token that is not valid (any more) is answered with."""
        self.referrers_api = referrers
        self.page_size: int | None = None
        """Referrers on one page; None: all of them."""
        self.read_only: int | None = None
        """What everything that writes is answered with."""
        self.immutable_tags: int | None = None
        """What a push to a tag that exists is answered with."""
        self.may_push = True
        """Whether tokens are given for pushing."""
        self.mounts = True
        self.etags = False
        """Whether manifests have ETags, and If-Match is looked at."""
        self.uploads: dict[str, str] = {}
        """Upload sessions that are open, by ID, with their repository."""
        self.upload_location: Callable[[str], str] = lambda path: path + "?_state=a%2Fb%3D&n=1"
        """Makes the Location of an upload session from its path."""
        self.pushed: list[str] = []
        """Digests of blobs and manifests that were pushed, in order."""
        self._sessions = 0
        self._script: list[tuple[str | None, str, Fault]] = []
        self._closing = asyncio.Event()
        self._runner: web.AppRunner | None = None
        self.host = ""

    async def __aenter__(self) -> FakeRegistry:
        application = web.Application(client_max_size=1 << 30)
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
        fault = self._fault_for(request)
        data = await (request.read() if fault.takes is None else request.content.readexactly(fault.takes))
        body = data.decode(errors="replace")
        self.seen.append(Seen(request.method, request.path, dict(request.query), dict(request.headers), body))
        if fault.stuck:
            await self._closing.wait()
        if fault.gate is not None:
            await fault.gate.wait()
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
        if request.method not in ("GET", "HEAD"):
            answer = self._write(request, data)
            if fault.lost:
                assert request.transport is not None
                request.transport.abort()
            return answer
        if request.path.endswith("/tags/list"):
            name = request.path.removeprefix("/v2/").removesuffix("/tags/list")
            tags = [tag for repository, tag in self.manifests if repository == name and ":" not in tag]
            return web.json_response({"name": name, "tags": tags}) if tags else _problem(404, "NAME_UNKNOWN")
        if self.referrers_api and "/referrers/" in request.path:
            return self._referrers(request)
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
                if self.etags:
                    headers["ETag"] = f'"{headers["Docker-Content-Digest"]}"'
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

    # ---- pushing

    def _write(self, request: web.Request, data: bytes) -> web.Response:
        path = request.path
        if self.read_only is not None:
            return _problem(self.read_only, {403: "DENIED", 405: "UNSUPPORTED"}[self.read_only])
        if (begin := re.fullmatch(r"/v2/(?P<name>.+)/blobs/uploads/", path)) and request.method == "POST":
            return self._begin_upload(request, begin["name"])
        if session := re.fullmatch(r"(?:/v2/.+/blobs/uploads|/upload)/(?P<id>[^/]+)", path):
            return self._end_upload(request, session["id"], data)
        if (manifest := re.fullmatch(r"/v2/(?P<name>.+)/manifests/(?P<ref>[^/]+)", path)) and request.method == "PUT":
            return self._take_manifest(request, manifest["name"], manifest["ref"], data)
        return _problem(405, "UNSUPPORTED")

    def _begin_upload(self, request: web.Request, name: str) -> web.Response:
        digest = request.query.get("mount")
        if digest in self.blobs and self.mounts:
            return web.Response(status=201, headers={"Location": f"/v2/{name}/blobs/{digest}"})
        self._sessions += 1
        session = f"session-{self._sessions}"
        self.uploads[session] = name
        location = self.upload_location(f"/v2/{name}/blobs/uploads/{session}")
        return web.Response(status=202, headers={"Location": location})

    def _end_upload(self, request: web.Request, session: str, data: bytes) -> web.Response:
        if self.uploads.pop(session, None) is None:
            return _problem(404, "BLOB_UPLOAD_UNKNOWN")
        if request.method == "DELETE":
            return web.Response(status=204)
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if request.query.get("digest") != digest:
            return _problem(400, "DIGEST_INVALID")
        self.blobs[digest] = data
        self.pushed.append(digest)
        return web.Response(status=201, headers={"Docker-Content-Digest": digest})

    def _take_manifest(self, request: web.Request, name: str, ref: str, data: bytes) -> web.Response:
        document = json.loads(data)
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        there = self.manifests.get((name, ref))
        if ref.startswith("sha256:") and ref != digest:
            return _problem(400, "DIGEST_INVALID")
        if self.immutable_tags and not ref.startswith("sha256:") and there:
            return _problem(self.immutable_tags, "TAG_INVALID", "the tag is immutable")
        expected = request.headers.get("If-Match")
        if self.etags and expected is not None:
            etag = f'"sha256:{hashlib.sha256(there[1]).hexdigest()}"' if there else ""
            if expected != etag:
                return _problem(412, "PRECONDITION_FAILED")
        for part in [*document.get("layers", ()), *([document["config"]] if "config" in document else ())]:
            if part["digest"] not in self.blobs:
                return _problem(404, "MANIFEST_BLOB_UNKNOWN")
        self.add_manifest(name, ref, data, request.headers["Content-Type"])
        self.pushed.append(digest)
        headers = {"Docker-Content-Digest": digest, "Location": f"/v2/{name}/manifests/{digest}"}
        if self.referrers_api and "subject" in document:
            headers["OCI-Subject"] = document["subject"]["digest"]
        return web.Response(status=201, headers=headers)

    def _referrers(self, request: web.Request) -> web.Response:
        match = re.fullmatch(r"/v2/(?P<name>.+)/referrers/(?P<digest>[^/]+)", request.path)
        assert match is not None
        entries = []
        for (name, ref), (media_type, data) in self.manifests.items():
            document = json.loads(data)
            if name != match["name"] or not ref.startswith("sha256:") or "subject" not in document:
                continue
            kind = document.get("artifactType") or document.get("config", {}).get("mediaType")
            if document["subject"]["digest"] == match["digest"] and request.query.get("artifactType") in (None, kind):
                entries.append(
                    {"mediaType": media_type, "digest": ref, "size": len(data), "artifactType": kind}
                    | ({"annotations": document["annotations"]} if "annotations" in document else {})
                )
        start = int(request.query.get("start", 0))
        end = len(entries) if self.page_size is None else start + self.page_size
        headers = {"Link": f'<{request.path}?start={end}>; rel="next"'} if end < len(entries) else {}
        index = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": entries[start:end]}
        return web.json_response(index, headers=headers, content_type=media_types.OCI_INDEX)

    # ---- authentication

    def _refused(self, request: web.Request) -> web.Response | None:
        shown = request.headers.get("Authorization", "")
        if self.auth is None or request.path.startswith(("/cdn/", "/upload/")):
            return None
        if self.auth == "basic":
            if shown == self._basic():
                return None
            challenge = 'Basic realm="a \\"quoted\\", realm"'
            return web.Response(status=401 if not shown else self.refuse_with, headers={"WWW-Authenticate": challenge})
        token = shown.removeprefix("Bearer ")
        writes = request.method not in ("GET", "HEAD")
        if token in self.tokens and not (writes and "push" not in self.token_scopes.get(token, "")):
            return None
        name = re.match(r"/v2/(.+)/(?:blobs|manifests|referrers)/", request.path)
        scope = f"repository:{name[1] if name else ''}:{'pull,push' if writes else 'pull'}"
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
        scope = " ".join(parse_qs(body).get("scope", ())) if request.method == "POST" else ""
        scope = scope or " ".join(request.query.getall("scope", ()))
        self.token_scopes[token] = scope if self.may_push else scope.replace(",push", "")
        name = "access_token" if request.method == "POST" else "token"
        return web.json_response({name: token, **self.token_extra})


def _problem(code: int, said: str, message: str = "no") -> web.Response:
    return web.json_response({"errors": [{"code": said, "message": message}]}, status=code)
