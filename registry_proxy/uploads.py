"""What is pushed, passed on to the registry: an adapter and nothing else; nothing of it is kept, nothing tried again.

The client's own request goes to the registry, with its credentials and as it comes; the answer comes back. A Location
within the registry leads to us again, so that the rest of the upload comes the same way; one that leads elsewhere is
passed on as it is, and the client goes there by itself. (OCI distribution specification, "Push".)
"""

from __future__ import annotations

import asyncio
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

import aiohttp
from aiohttp import web
from yarl import URL

from dadi import __version__
from dadi.errors import Malformed, Unavailable
from dadi.oci.hosts import Hosts, origin_of
from dadi.oci.reference import Reference
from registry_proxy.paths import Kind, Route

_TO_REGISTRY = ("Authorization", "Content-Type", "Content-Range", "If-Match", "Accept")
_TO_CLIENT = ("Content-Type", "Range", "Docker-Content-Digest", "Docker-Upload-UUID", "OCI-Subject", "WWW-Authenticate",
              "OCI-Chunk-Min-Length", "Retry-After", "ETag")  # fmt: skip
_MAX_ANSWER = 1 << 20
_STALLED = 60.0


class Uploads:
    """A `Forward` for `Front`. `hosts` says which registries may be contacted, and how."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._session: aiohttp.ClientSession | None = None

    async def __call__(self, request: web.Request, repository: Reference, route: Route) -> web.StreamResponse:
        """Pass a request on. Raises RegistryNotAllowed, Unavailable, Malformed."""
        self._hosts.check_registry(repository.registry)
        base = self._hosts.base_url(repository.registry)
        url = f"{base}/v2/{repository.repository}/{_rest(route)}"
        query = [(name, value) for name, value in request.query.items() if name != "ns"]
        url += f"?{urlencode(query)}" if query else ""
        headers = {name: request.headers[name] for name in _TO_REGISTRY if name in request.headers}
        body = None
        if request.can_read_body:
            body = request.content
            if request.content_length is not None:
                headers["Content-Length"] = str(request.content_length)
        elif request.method in ("POST", "PUT", "PATCH"):
            headers["Content-Length"] = "0"
        try:
            async with self._open().request(request.method, URL(url, encoded=True), headers=headers, data=body,
                                            allow_redirects=False) as response:  # fmt: skip
                raw = await response.content.read(_MAX_ANSWER)
                found = {name: response.headers[name] for name in _TO_CLIENT if name in response.headers}
                if location := response.headers.get("Location"):
                    found["Location"] = self._location(location, url, base, request, repository)
                return web.Response(status=response.status, body=raw, headers=found)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"{repository.registry} did not take it: {type(error).__name__}") from None

    def _location(self, location: str, url: str, base: str, request: web.Request, repository: Reference) -> str:
        target = urljoin(url, location)
        if len(target) > 16 << 10 or not target.isascii() or not target.isprintable():
            raise Malformed(f"{repository.registry} sends a Location that is no URL")
        parts = urlsplit(target)
        own = f"/v2/{repository.repository}/"
        if origin_of(target) != origin_of(base) or not parts.path.startswith(own):
            return target
        asked = request.raw_path.partition("?")[0]
        name = asked[: asked.rfind("/blobs/uploads") if "/blobs/uploads" in asked else asked.rfind("/manifests/")]
        query = parse_qsl(parts.query, keep_blank_values=True)
        query += [("ns", request.query["ns"])] if "ns" in request.query else []
        return f"{name}/{parts.path.removeprefix(own)}" + (f"?{urlencode(query)}" if query else "")

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=5.0, sock_read=_STALLED)
            self._session = aiohttp.ClientSession(
                timeout=timeout, cookie_jar=aiohttp.DummyCookieJar(), auto_decompress=False,
                headers={"User-Agent": f"dadi/{__version__}"},
            )  # fmt: skip
        return self._session

    async def close(self) -> None:
        """Close connections."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()
            await asyncio.sleep(0)


def _rest(route: Route) -> str:
    match route.kind:
        case Kind.UPLOAD:
            return f"blobs/uploads/{route.identifier}"
        case Kind.MANIFEST:
            return f"manifests/{route.identifier}"
        case Kind.BLOB:
            return f"blobs/{route.identifier}"
        case _:
            raise Malformed("nothing can be pushed there")
