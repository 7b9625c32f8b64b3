"""What is pushed, passed on to the registry: an adapter and nothing else; nothing of it is kept, nothing tried again.

The client's own request goes to the registry, with its credentials and as it comes; the answer comes back, whole or not
at all. A Location within the registry leads to us again, so that the rest of the upload comes the same way; one that
leads elsewhere is passed on as it is, and the client goes there by itself: we follow nobody. Connections are those of
`dadi/oci/transport.py`, with its rules for hosts, addresses and certificates. (OCI distribution specification, "Push".)
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit

from aiohttp import HttpVersion10, web

from dadi.errors import DadiError, InvalidRequest, Malformed
from dadi.oci.config import RegistryConfig
from dadi.oci.hosts import Hosts, origin_of
from dadi.oci.outgoing import Body, SourceFailed
from dadi.oci.reference import Reference
from dadi.oci.retry import Clock
from dadi.oci.transport import Transport
from registry_proxy import paths
from registry_proxy.paths import Kind, Route

_TO_REGISTRY = ("Content-Type", "Content-Encoding", "Content-Range", "If-Match", "Accept")
_TO_CLIENT = ("Content-Type", "Range", "Docker-Content-Digest", "Docker-Upload-UUID", "OCI-Subject", "WWW-Authenticate",
              "OCI-Chunk-Min-Length", "Retry-After", "ETag")  # fmt: skip
_MAX_ANSWER = 1 << 20


class Uploads:
    """A `Forward` for `Front`. `config` says which registries may be contacted, and how. Raises ConfigError."""

    def __init__(self, config: RegistryConfig) -> None:
        self._hosts = Hosts(config.allowed, config.plain_http, config.mirrors)
        self._transport = Transport(config, self._hosts, Clock())

    async def __call__(self, request: web.Request, repository: Reference, route: Route) -> web.StreamResponse:
        """Pass a request on. Raises RegistryNotAllowed, Unavailable, Malformed; InvalidRequest for half a body."""
        self._hosts.check_registry(repository.registry)
        base = self._hosts.base_url(repository.registry)
        url = f"{base}/v2/{repository.repository}/{_rest(route)}"
        query = _query(request, repository)
        url += f"?{urlencode(query)}" if query else ""
        headers = {name: request.headers[name] for name in _TO_REGISTRY if name in request.headers}
        try:
            async with self._transport.open(
                request.method, url, headers, authorization=request.headers.get("Authorization"),
                body=_body_of(request), follow=False,
            ) as answer:  # fmt: skip
                said = {name: answer.headers.get(name, "") for name in _TO_CLIENT}
                # Bytes that are no text could not be sent on.
                found = {name: text for name, text in said.items() if text and text.isprintable()}
                if location := answer.headers.get("Location"):
                    found["Location"] = self._location(location, url, base, request, repository)
                raw = b""
                if request.method != "HEAD":
                    raw = await answer.body(_MAX_ANSWER, f"what {repository.registry} says of what was pushed")
                return web.Response(status=answer.status, body=raw, headers=found)
        except SourceFailed as failed:
            if isinstance(failed.error, DadiError):
                raise failed.error from None
            what = f"what is pushed was cut off: {type(failed.error).__name__}"
            raise InvalidRequest(what, hint="push again") from None

    def _location(self, location: str, url: str, base: str, request: web.Request, repository: Reference) -> str:
        try:
            target = urljoin(url, location)
            parts = urlsplit(target)
        except ValueError:
            raise Malformed(f"{repository.registry} sends a Location that is no URL") from None
        if len(target) > 16 << 10 or not target.isascii() or not target.isprintable():
            raise Malformed(f"{repository.registry} sends a Location that is no URL")
        own = f"/v2/{repository.repository}/"
        if origin_of(target) != origin_of(base) or not parts.path.startswith(own):
            return target
        asked = request.raw_path.partition("?")[0]
        name = asked[: asked.rfind("/blobs/uploads") if "/blobs/uploads" in asked else asked.rfind("/manifests/")]
        query = parse_qsl(parts.query, keep_blank_values=True)
        query += [("ns", request.query["ns"])] if "ns" in request.query else []
        return f"{name}/{parts.path.removeprefix(own)}" + (f"?{urlencode(query)}" if query else "")

    async def close(self) -> None:
        """Close connections."""
        await self._transport.close()


def _body_of(request: web.Request) -> Body | None:
    if not request.can_read_body:
        return Body(0, b"") if request.method in ("POST", "PUT", "PATCH") else None

    async def pieces() -> AsyncIterator[bytes]:
        if request.headers.get("Expect", "").lower() == "100-continue" and request.version > HttpVersion10:
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            request.writer.output_size = 0  # none of the answer yet
        async for piece in request.content.iter_any():
            yield piece

    return Body(request.content_length, pieces)


def _query(request: web.Request, repository: Reference) -> list[tuple[str, str]]:
    """Return what the registry is asked with. `from` names a repository as the client knows it, as the path does.

    A blob of another registry is not there to be mounted, whatever is called the same: then it is pushed. (OCI
    distribution specification, "Mounting a blob from another repository".)
    """
    query = [(name, value) for name, value in request.query.items() if name != "ns"]
    known_as = request.query.get("from")
    if known_as is None:
        return query
    source = paths.repository(known_as, request.query.get("ns"), repository.registry)
    if source.registry != repository.registry:
        return [(name, value) for name, value in query if name not in ("from", "mount")]
    return [(name, source.repository if name == "from" else value) for name, value in query]


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
