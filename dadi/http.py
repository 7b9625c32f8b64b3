"""HTTP between our own programs: one client set-up, one server set-up, and errors as JSON on the way.

    an error     status of its class, with a body as in `dadi/wire.py`; `Retry-After` where it is known
    events       long work answers 200 with the events of `dadi/wire.py`, a line each (NDJSON)

The registry client has its own set-up (`dadi/oci`), since it talks to strangers.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Collection
from functools import partial
from typing import Any, cast

import aiohttp
import msgspec
import structlog
from aiohttp import web

from dadi.errors import ConfigError, Conflict, DadiError, InvalidRequest, LoginRequired, Unavailable, Unreachable
from dadi.tls import Tls, refusal
from dadi.wire import Event, EventReader, error_fields, error_in

log = structlog.get_logger()
MakeConnection = Callable[[web.Server], asyncio.Protocol]
CONNECTIONS: web.AppKey[Any] = web.AppKey("connections")
"""Of an application whose server has connections of its own kind: makes one; for strangers' (`registry_proxy`)."""
_READ_BUFFER = 1 << 20
_MAX_ERROR_BODY = 64 << 10
_HUNG_UP = "if it wants a certificate: its tls.client_ca must have signed our tls.certificate; its log says more"


# ---- client


class _TlsConnector(aiohttp.TCPConnector):
    """Speaks TLS and nothing else: what is meant to be secret must not go out in the clear by a slip in a URL."""

    allowed_protocol_schema_set = frozenset({"https"})


def client(
    *, connect: float = 3.0, read: float = 30.0, unix_socket: str | None = None, tls: Tls | None = None
) -> aiohttp.ClientSession:
    """Return a session for our own programs. `connect`, `read` (without a byte): seconds.

    With `tls` it asks https:// and nothing else, and shows our certificate. `server_hostname` as an option of a request
    gives the name that the other side's certificate must have where that is not the URL's host.
    """
    connector: aiohttp.BaseConnector
    if unix_socket:
        connector = aiohttp.UnixConnector(unix_socket)
    elif tls:
        connector = _TlsConnector(limit=0, limit_per_host=64, ssl=tls.client)
    else:
        connector = aiohttp.TCPConnector(limit=0, limit_per_host=64)
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect, sock_read=read)
    return aiohttp.ClientSession(
        connector=connector,
        timeout=timeout,
        read_bufsize=_READ_BUFFER,
        auto_decompress=False,
        cookie_jar=aiohttp.DummyCookieJar(),
    )


@contextlib.asynccontextmanager
async def request(
    session: aiohttp.ClientSession, method: str, url: str, what: str, *, accept: Collection[int] = (), **options: Any
) -> AsyncIterator[aiohttp.ClientResponse]:
    """Make a request and give its response (status below 300 or in `accept`); raise the error that the other side sent.

    Whatever breaks on the way, also inside of the block, becomes Unreachable, saying that `what` failed.
    """
    try:
        async with session.request(method, url, allow_redirects=False, **options) as response:
            if response.status >= 300 and response.status not in accept:
                raise await _error_of(response, what)
            yield response
    except TimeoutError:
        raise Unreachable(f"{what}: {url} did not answer in time", hint="is it up, and reachable from here?") from None
    except aiohttp.NonHttpUrlClientError:
        hint = "write its URL with https://"
        raise ConfigError(f"{what}: {url} is not encrypted, while tls is configured", hint=hint) from None
    except aiohttp.ClientConnectorError as error:
        _raise_refusal(error, what, url)
        hint = "is it running? is the address right?"
        raise Unreachable(f"{what}: cannot connect to {url}: {error.os_error.strerror or error}", hint=hint) from None
    except (aiohttp.ClientError, asyncio.IncompleteReadError, OSError) as error:
        _raise_refusal(error, what, url)
        hung_up = isinstance(error, aiohttp.ServerDisconnectedError | ConnectionResetError)
        # asyncio hangs up on a client whose certificate it refuses, without TLS's alert that would say so.
        told = _HUNG_UP if hung_up and url.startswith("https:") else "has it been stopped? its log says more"
        raise Unreachable(f"{what}: {url}: {str(error) or type(error).__name__}", hint=told) from None


def _raise_refusal(error: BaseException, what: str, url: str) -> None:
    """Raise Unreachable if it was TLS: certificates are replaced while programs run, so it is worth another try."""
    # aiohttp wraps what the handshake raised; a listener's alert may come with the first read only.
    for cause in (error.__cause__, getattr(error, "certificate_error", None), getattr(error, "os_error", None), error):
        told = refusal(cause) if cause is not None else None
        if told is not None:
            raise Unreachable(f"{what}: {url}: {told[0]}", hint=told[1]) from None


def asked_to_wait(response: aiohttp.ClientResponse) -> float | None:
    """Return the seconds of Retry-After, as our programs say them; None for none, or what is no such number."""
    asked = response.headers.get("Retry-After", "")
    return float(asked) if asked.isascii() and asked.isdigit() and len(asked) < 6 else None


async def _error_of(response: aiohttp.ClientResponse, what: str) -> DadiError:
    error = error_in(await response.content.read(_MAX_ERROR_BODY))
    retry_after = asked_to_wait(response)
    if error is None:
        text = f"{what}: {response.url} answered {response.status} {response.reason}"
    elif isinstance(error, Unavailable) or type(error) is DadiError:
        # "A fault of ours" over there is somebody who cannot answer now, seen from here.
        text = f"{what}: {response.url.origin()}: {error.message}"
    else:
        if isinstance(error, LoginRequired):
            error.challenge = response.headers.get("WWW-Authenticate", "")
        return error
    if response.status == 413:
        return InvalidRequest(text)
    # Without our JSON it is another program, or a version that has not what was asked for: both may heal.
    unknown = None if response.status >= 500 else "is it dadi that listens there? are the versions alike?"
    return Unavailable(text, retry_after=retry_after, hint=error.hint if error else unknown)


async def events(response: aiohttp.ClientResponse) -> AsyncGenerator[Event, None]:
    """Yield the events of long work up to and with "done"; raise its error, or Unavailable if it ends without."""
    reader = EventReader(str(response.url))
    async for piece in response.content.iter_any():
        for event in reader.feed(piece):
            yield event
            if reader.done:
                return
    reader.end()


# ---- server

_BEGUN = web.RequestKey("begun", bool)


@web.middleware
async def errors_as_json(
    request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
) -> web.StreamResponse:
    """Translate the error tree; anything else is a fault of ours: logged with its trace, told as such."""
    try:
        return await handler(request)
    except DadiError as error:
        cut_if_begun(request, error)
        headers = {}
        if isinstance(error, Unavailable) and error.retry_after is not None:
            headers["Retry-After"] = str(int(error.retry_after + 1))
        if isinstance(error, LoginRequired) and error.challenge:
            headers["WWW-Authenticate"] = error.challenge
        return web.json_response(error_fields(error), status=error.status, headers=headers)
    except (web.HTTPException, asyncio.CancelledError):
        raise
    except Exception as error:
        if hung_up(request, error):
            raise ConnectionResetError("the reader has gone") from None
        cut_if_begun(request, error)
        log.exception("a fault of ours", method=request.method, path=request.path)
        fields = {"error": "internal", "message": "a fault of ours; the log has its trace", "hint": None}
        return web.json_response(fields, status=500)


async def mark_begun(request: web.Request, response: web.StreamResponse) -> None:
    """Remember that an answer has begun; for `on_response_prepare` of every application of ours."""
    request[_BEGUN] = True


def cut_if_begun(request: web.Request, error: BaseException) -> None:
    """Cut the connection if an answer has begun: what is sent now would be taken for the rest of its body.

    Raises ConnectionResetError then.
    """
    if _BEGUN in request:
        log.error("cut an answer off", path=request.path, why=repr(error))
        if request.transport is not None:
            request.transport.abort()
        raise ConnectionResetError("an answer failed in the middle") from None


def hung_up(request: web.Request, error: BaseException) -> bool:
    """Say whether an error is that who asked has gone. A write that was waiting then raises a bare ConnectionError."""
    gone = request.transport is None or request.transport.is_closing()
    return isinstance(error, ConnectionResetError) or (isinstance(error, ConnectionError) and gone)


async def stream_events(request: web.Request, work: AsyncGenerator[Event, None]) -> web.StreamResponse:
    """Answer with the events of `work`, then "done" or its error; to HEAD without any, and without the work."""
    response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
    await response.prepare(request)
    if request.method == "HEAD":  # events would be read as the next answer's head
        await work.aclose()
        return response
    async with contextlib.aclosing(work):
        try:
            async for event in work:
                await response.write(msgspec.json.encode(event) + b"\n")
            last: Event = {"event": "done"}
        except DadiError as error:
            last = {"event": "error", **error_fields(error)}
        except asyncio.CancelledError:
            raise
        except Exception as error:
            if hung_up(request, error):
                raise
            log.exception("a fault of ours", path=request.path)
            last = {"event": "error", "error": "internal", "message": "a fault of ours; the log has its trace"}
    await response.write(msgspec.json.encode(last) + b"\n")
    return response


def application() -> web.Application:
    """Return an application with our error translation and small request bodies."""
    app = web.Application(middlewares=[errors_as_json], client_max_size=1 << 20)
    app.on_response_prepare.append(mark_begun)
    return app


async def serve_tcp(app: web.Application, listen: str, tls: Tls | None = None) -> tuple[web.AppRunner, str]:
    """Serve on "host:port" (port 0: any); return the runner (`cleanup()` stops it) and the address in fact.

    With `tls` nothing but TLS is spoken there. Raises Conflict if the port is taken; ConfigError if `tls` has no
    certificate, or the address cannot be listened on.
    """
    host, port = parse_listen(listen)
    context = tls.server if tls else None
    runner = _runner(app)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=1024, ssl_context=context).start()
    except OSError as error:
        await runner.cleanup()
        if error.errno == errno.EADDRINUSE:
            hint = "another dadi, or another program, has it; `listen` in the configuration chooses the address"
            raise Conflict(f"cannot listen on {listen}: {error.strerror}", hint=hint) from None
        hint = "is it an address of this machine, and a port that we may use? `listen` in the configuration chooses it"
        raise ConfigError(f"cannot listen on {listen}: {error.strerror or error}", hint=hint) from None
    address = runner.addresses[0]
    return runner, f"[{address[0]}]:{address[1]}" if ":" in address[0] else f"{address[0]}:{address[1]}"


async def serve_unix(app: web.Application, path: str) -> web.AppRunner:
    """Serve on a unix socket that only our own user may use. Raises Conflict if somebody else listens there."""
    try:
        _, writer = await asyncio.open_unix_connection(path)
    except FileNotFoundError:
        pass
    except OSError:
        os.unlink(path)  # left behind by a process that is gone
    else:
        writer.close()
        raise Conflict(f"another process listens on {path}", hint="`run` in the configuration chooses the place")
    runner = _runner(app)
    await runner.setup()
    await web.UnixSite(runner, path).start()
    os.chmod(path, 0o600)
    return runner


class _Runner(web.AppRunner):
    @property
    def server(self) -> web.Server | None:
        """What the loop calls for each new connection."""
        made = super().server
        connections: MakeConnection | None = self.app.get(CONNECTIONS)
        if made is None or connections is None:
            return made
        return cast(web.Server, partial(connections, made))


def _runner(app: web.Application) -> web.AppRunner:
    return _Runner(app, access_log=None, shutdown_timeout=1.0, handle_signals=False)


def parse_listen(listen: str) -> tuple[str, int]:
    """Return (host, port) of "host:port", "[v6]:port" or ":port"."""
    host, _, port = listen.rpartition(":")
    if not (port.isascii() and port.isdigit() and len(port) < 6 and int(port) < 1 << 16):
        raise InvalidRequest(f"{listen[:100]!r} is not host:port", hint="`listen` is HOST:PORT, [IPv6]:PORT or :PORT")
    return host.strip("[]") or "0.0.0.0", int(port)
