"""One HTTP request to one URL: the connection pool, redirects, time-outs, and errors in our own words.

Answers are in `answer.py`. No retries and no authentication here (`auth.py` wraps this, `registry.py` wraps that); what
may be contacted is decided in `hosts.py`. Bodies are passed on as they come: nothing is decompressed, because digests
are of the bytes as they are stored, whatever Content-Encoding an object store may claim for them.

URLs after a redirect are never shown to anybody: their query strings are signed, which makes them credentials.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Mapping

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult
from yarl import URL

from dadi import __version__
from dadi.errors import ConfigError, DadiError, Malformed, RegistryNotAllowed, Unavailable
from dadi.oci.answer import Answer, Counters
from dadi.oci.config import RegistryConfig
from dadi.oci.hosts import Hosts, Origin, origin_of
from dadi.oci.outgoing import Body, Outgoing, SourceFailed
from dadi.oci.retry import Clock

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_REDIRECTS_AS_IT_IS = frozenset({307, 308})
"""After the others, method and body of anything but a GET or HEAD would change (RFC 9110, 15.4)."""
_BUFFER = 1 << 20
"""Bytes that a connection reads ahead of us; twice this is where it stops."""
_SETTLES_AT = 10 << 20
"""Bytes a second at which a registry puts away what it was sent, before it answers: some copy it once more."""
_ASSUMED = 1 << 30
"""Bytes of a body whose size nobody has said."""
_REACHABLE = "is it up, and reachable from here?"
_SMALL = 64 << 10
"""Bytes of an unread rest that are read so that the connection can be used again; above, it is closed."""


class Transport:
    """The connections to all registries. Opened by the first request; close with `close`."""

    def __init__(self, config: RegistryConfig, hosts: Hosts, clock: Clock) -> None:
        self._config = config
        self._hosts = hosts
        self._opening = asyncio.Lock()
        self._session: aiohttp.ClientSession | None = None
        self.clock = clock
        self.counters = Counters()

    @contextlib.asynccontextmanager
    async def open(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        *,
        authorization: str | None = None,
        home: Origin | None = None,
        form: Mapping[str, str] | None = None,
        body: Body | None = None,
        follow: bool = True,
    ) -> AsyncIterator[Answer]:
        """Send a request and give its answer, after redirects unless `follow` is False.

        `authorization` goes to `home` (the origin of `url` if it is None) and to no other. Raises Unavailable for
        everything that happens on the way, also while the answer is read inside the `async with`; ConfigError for
        certificates that are not trusted; RegistryNotAllowed and Malformed for redirects that are not followed;
        SourceFailed if `body` cannot be read.
        """
        home = home or origin_of(url)
        host = _shown(origin_of(url))
        hop = 0
        outgoing: Outgoing | None = None
        follows = _REDIRECTS if method in ("GET", "HEAD") else _REDIRECTS_AS_IT_IS
        try:
            while True:
                origin = origin_of(url)
                host = _shown(origin)
                sent = dict(headers)
                if authorization is not None and origin == home:
                    sent["Authorization"] = authorization
                outgoing = body.start() if body is not None else None
                response = await self._send(method, url, sent, form, outgoing)
                if not follow or response.status not in follows:
                    break
                hop += 1
                location = response.headers.get("Location")
                await _finish(response, outgoing)
                url = self._hosts.redirected(url, location, hop)
                self.counters.redirects += 1
            try:
                patience = self._config.read_timeout
                yield Answer(response, url, host, origin == home, self.counters, self.clock, patience)
                await _finish(response, outgoing)
            finally:
                response.close()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            if outgoing is not None and outgoing.failure is not None:
                raise SourceFailed(outgoing.failure) from outgoing.failure
            raise self._translated(error, host) from None
        finally:
            if outgoing is not None:
                await outgoing.close()

    async def close(self) -> None:
        """Close all connections. May be called twice; a request after it opens new ones."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _send(
        self,
        method: str,
        url: str,
        headers: dict[str, str],
        form: Mapping[str, str] | None,
        outgoing: Outgoing | None,
    ) -> aiohttp.ClientResponse:
        session = self._session or await self._open_session()
        target = URL(url, encoded=True)
        if (target.scheme, target.raw_host, target.port) != origin_of(url):
            raise Malformed("a URL that two parsers understand differently")
        self.counters.requests += 1
        if outgoing is None:
            return await session.request(method, target, headers=headers, data=form, allow_redirects=False)
        if outgoing.size is not None:
            headers["Content-Length"] = str(outgoing.size)
        loop, longest = asyncio.get_running_loop(), self._config.read_timeout
        try:
            # The session's time-outs begin when all is sent; until then it is the receiver that must not stall.
            async with asyncio.timeout(None) as patience:

                def watch(receivers_turn: bool) -> None:
                    if not patience.expired():
                        patience.reschedule(loop.time() + longest if receivers_turn else None)

                outgoing.watch = watch
                size = _ASSUMED if outgoing.size is None else outgoing.size
                timeout = self._timeout(size / _SETTLES_AT)
                return await session.request(
                    method, target, headers=headers, data=outgoing, timeout=timeout, allow_redirects=False
                )
        except TimeoutError:
            if patience.expired():
                raise Unavailable(f"{_shown(origin_of(url))} took nothing more for {longest:g} s") from None
            raise
        finally:
            outgoing.watch = None

    async def _open_session(self) -> aiohttp.ClientSession:
        async with self._opening:
            if self._session is None:
                context = await asyncio.to_thread(_tls, self._config.ca_file)
                connector = aiohttp.TCPConnector(limit=0, ssl=context, resolver=_GuardedResolver(self._hosts))
                self._session = aiohttp.ClientSession(
                    connector=connector,
                    timeout=self._timeout(),
                    cookie_jar=aiohttp.DummyCookieJar(),
                    headers={"User-Agent": f"dadi/{__version__}", "Accept-Encoding": "identity"},
                    auto_decompress=False,
                    read_bufsize=_BUFFER,
                    max_field_size=32 << 10,
                )
            return self._session

    def _timeout(self, longer: float = 0.0) -> aiohttp.ClientTimeout:
        """Return the time-outs of a request whose answer may take `longer` (seconds) than others."""
        config = self._config
        return aiohttp.ClientTimeout(
            total=None,
            connect=config.connect_timeout,
            sock_connect=config.connect_timeout,
            sock_read=config.read_timeout + longer,
        )

    def _translated(self, error: Exception, host: str) -> DadiError:
        config = self._config
        match error:
            case aiohttp.ClientConnectorCertificateError():
                reason = getattr(error.certificate_error, "verify_message", "") or "it is not trusted"
                return ConfigError(
                    f"the certificate of {host} is refused: {reason}",
                    hint="put the authority that signed it into registry.ca_file",
                )
            case aiohttp.ClientConnectorSSLError() if "WRONG_VERSION_NUMBER" in str(error.os_error):
                return ConfigError(
                    f"{host} does not speak TLS", hint="if plain HTTP is meant, name it in registry.plain_http"
                )
            case aiohttp.ConnectionTimeoutError():
                return Unavailable(f"no connection to {host} within {config.connect_timeout:g} s", hint=_REACHABLE)
            case TimeoutError():
                hint = "it is slow, or hangs; registry.read_timeout is how long it may"
                return Unavailable(f"{host} sent nothing for {config.read_timeout:g} s", hint=hint)
            case aiohttp.ClientConnectorDNSError():
                hint = "is the name right, and does the name service answer here?"
                return Unavailable(f"the name {host} cannot be looked up", hint=hint)
            case OSError():
                why = error.strerror or type(error).__name__
                return Unavailable(f"no connection to {host}: {why}", hint=_REACHABLE)
            case aiohttp.ClientPayloadError():
                return Unavailable(f"{host} cut its answer off")
            case aiohttp.ServerDisconnectedError():
                return Unavailable(f"{host} closed the connection")
            case aiohttp.ClientResponseError():
                hint = "is it a registry, and the port right?"
                return Unavailable(f"{host} does not speak HTTP as it should", hint=hint)
            case _:
                return Unavailable(f"the request to {host} failed: {type(error).__name__}")


class _GuardedResolver(AbstractResolver):
    """Looks names up as usual and refuses those that lead where no registry is (see `hosts.py`)."""

    def __init__(self, hosts: Hosts) -> None:
        self._hosts = hosts
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        results = await self._resolver.resolve(host, port, family)
        refused: RegistryNotAllowed | None = None
        kept = []
        for result in results:
            try:
                self._hosts.check_address(host, port, result["host"])
                kept.append(result)
            except RegistryNotAllowed as error:
                refused = error
        if refused is not None and not kept:
            raise refused
        return kept

    async def close(self) -> None:
        await self._resolver.close()


def _tls(ca_file: str) -> ssl.SSLContext:
    context = ssl.create_default_context()
    if ca_file:
        try:
            context.load_verify_locations(ca_file)
        except (OSError, ssl.SSLError) as error:
            raise ConfigError(f"registry.ca_file: {ca_file} cannot be used: {error.strerror or error}") from None
    return context


def _shown(origin: tuple[str, str, int]) -> str:
    scheme, name, port = origin
    name = f"[{name}]" if ":" in name else name
    return name if port == {"https": 443, "http": 80}[scheme] else f"{name}:{port}"


async def _finish(response: aiohttp.ClientResponse, outgoing: Outgoing | None) -> None:
    """Let the connection be used again if little of the body is left, close it otherwise."""
    if outgoing is not None and not outgoing.finished:
        response.close()  # answered before all was sent: nobody will read the rest
        return
    length = response.content_length
    if response.content.at_eof() or (length is not None and length <= _SMALL):
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, OSError):
            await response.read()
    response.close() if not response.content.at_eof() else response.release()
