"""Clients' connections: what one may take of us before a request is there, and what is said to no request at all.

    more than `most` at once      one on which nothing is asked is closed for the new one; all busy: 503, and closed.
                                  `most` is never more than half of our descriptors
    nothing whole in IDLE         closed: nobody asks, or somebody asks very slowly
    a head above MOST_HEAD        431, and closed; a request line above MOST_LINE: 414
    no HTTP, or ambiguous         400, and closed
    an answer that nobody takes   closed, by the kernel, after IDLE without a byte

The parser is aiohttp's, and so is all that follows it. Its refusals are not logged: they quote what was sent, which may
be credentials, and anybody may send it. Connections that TLS has not let in yet are not counted: they have a minute.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
from collections.abc import Callable
from http import HTTPStatus
from itertools import islice
from typing import Any

from aiohttp import web
from aiohttp.http_exceptions import LineTooLong

from dadi.fallbacks import Fallbacks

IDLE = 120.0
"""Seconds; more than the 90 after which Go's clients close a connection by themselves: so that ours is not the race."""
MOST_LINE = 8 << 10
MOST_FIELD = 32 << 10
"""Bytes of one header: tokens of some registries have more than the 8 KiB that are usual."""
MOST_HEAD = 64 << 10
"""Bytes of a head that is not whole yet. The parser's own limits are for each header, and would add up to megabytes."""
_LOOKED_AT = 64
_CLOSED_AT_ONCE = 4

Refusal = Callable[[int, str], web.Response]
"""Makes the answer to what never became a request, of a status and what is wrong."""


class Connections:
    """Makes the connections of one application (`http.CONNECTIONS`)."""

    def __init__(self, most: int, refusal: Refusal, fallbacks: Fallbacks) -> None:
        self.refusal = refusal
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = most if descriptors == resource.RLIM_INFINITY else min(most, descriptors // 2)
        self._fallbacks = fallbacks
        self.there: dict[Connection, None] = {}
        """Who is connected, in the order in which they are looked at for one that may go."""

    def __repr__(self) -> str:
        return f"Connections({len(self.there)} of {self._most})"

    def __call__(self, server: web.Server) -> asyncio.Protocol:
        """Return what speaks on a new connection."""
        if len(self.there) >= self._most and not self._room_made():
            self._fallbacks.note("client refused: too many connections", f"{len(self.there)}, and they are busy")
            return _Refused(_bytes(self.refusal(503, "too many connections")))
        return Connection(self, server)

    def _room_made(self) -> bool:
        """Close who asks for nothing. Looks at few, since a thousand may come at once; the busy are looked at last."""
        # Those of one burst are not there yet when the next is looked at, so that there may be more than one too many.
        free = min(len(self.there) - self._most + 1, _CLOSED_AT_ONCE)
        closed = 0
        for one in list(islice(self.there, _LOOKED_AT)):
            del self.there[one]
            if not one.is_idle:
                self.there[one] = None
                continue
            self._fallbacks.note("idle connection closed for a new one", f"there are {len(self.there)} others")
            one.force_close()
            closed += 1
            if closed == free:
                break
        return closed > 0


class Connection(web.RequestHandler):
    """One of them."""

    __slots__ = ("_head", "_made_by")

    def __init__(self, made_by: Connections, server: web.Server) -> None:
        options: dict[str, Any] = {"access_log": None}
        # What is pushed is passed on as it came, so that its digest is still right.
        super().__init__(server, loop=asyncio.get_running_loop(), keepalive_timeout=IDLE, max_line_size=MOST_LINE,
                         max_field_size=MOST_FIELD, auto_decompress=False, **options)  # fmt: skip
        self._made_by = made_by
        self._head = 0

    @property
    def is_idle(self) -> bool:
        """Whether no whole request is here."""
        return self._waiter is not None and not self._waiter.done()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """See `asyncio.Protocol`."""
        super().connection_made(transport)
        self._made_by.there[self] = None
        with contextlib.suppress(OSError):  # it has gone already
            connected = transport.get_extra_info("socket")
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(IDLE * 1000))

    def connection_lost(self, exc: BaseException | None) -> None:
        """See `asyncio.Protocol`."""
        self._made_by.there.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See `asyncio.Protocol`."""
        super().data_received(data)
        self._head = self._head + len(data) if self.is_idle else 0
        if self._head > MOST_HEAD and self.transport is not None:
            self.transport.write(_bytes(self._made_by.refusal(431, "the headers are too large")))
            self.force_close()

    def handle_error(self, request: web.BaseRequest, status: int = 500, exc: BaseException | None = None,
                     message: str | None = None) -> web.StreamResponse:  # fmt: skip
        """Answer what the parser refuses; what fails of ours is aiohttp's to tell and log."""
        if status >= 500:
            return super().handle_error(request, status, exc, message)
        # What follows the colon is what was sent.
        what = (message or "").partition("\n")[0].partition(":")[0] or "no request of HTTP/1.1"
        if isinstance(exc, LineTooLong):
            status, what = (414, "the path is too long") if MOST_LINE in exc.args else (431, "a header is too large")
        elif what.startswith("Too many headers"):
            status = 431
        response = self._made_by.refusal(status, what)
        response.force_close()
        return response


class _Refused(asyncio.Protocol):
    """Says one thing and hangs up."""

    def __init__(self, answer: bytes) -> None:
        self._answer = answer

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._answer)
        transport.close()


def _bytes(response: web.Response) -> bytes:
    body = response.body
    assert isinstance(body, bytes)
    lines = [f"HTTP/1.1 {response.status} {HTTPStatus(response.status).phrase}", "Connection: close",
             f"Content-Length: {len(body)}"]  # fmt: skip
    lines += [f"{name}: {value}" for name, value in response.headers.items() if name.lower() != "content-length"]
    return "\r\n".join((*lines, "\r\n")).encode("latin-1") + body
