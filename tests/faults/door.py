"""The door before a registry: passes everything on, until it is told what to do wrong.

What lives here: an HTTP server in a thread of its own, and the faults of registries. What never does: deciding when.

    door.fault = Fault()      from now on; None: as it should be. `door.hurt` counts answers that a fault has spoilt.

Blobs pass in pieces, so that a fault can come in the middle of a body.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
import struct
import threading
import time

import aiohttp
from aiohttp import web

_PIECE = 64 << 10
_QUIET = logging.getLogger("tests.faults.door")
_QUIET.disabled = True  # connections that break are what it is for
_HOP = {"transfer-encoding", "connection", "keep-alive"}


class Fault:
    """One thing that a registry does wrong; what is not overridden it does right."""

    async def before(self, door: Door, request: web.Request) -> web.StreamResponse | None:
        """Return another answer than the registry's; None: ask it."""
        return None

    def request_headers(self, headers: dict[str, str]) -> dict[str, str]:
        """Return the headers that the registry sees."""
        return headers

    async def body(self, door: Door, request: web.Request, answer: web.StreamResponse, data: bytes) -> None:
        """Write the body of a blob, `answer` being prepared."""
        for at in range(0, len(data), _PIECE):
            await answer.write(data[at : at + _PIECE])


class Door:
    """See the head of this file; a context manager. `host`: ADDRESS:PORT, known once it is entered."""

    def __init__(self, target: str, port: int = 0) -> None:
        self._target, self._port = target, port
        self.fault: Fault | None = None
        self.hurt = 0
        self.asked = 0
        self.host = ""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="door", daemon=True)

    def __enter__(self) -> Door:
        self._thread.start()
        if not self._ready.wait(10) or not self.host:
            raise RuntimeError("the door before the registry does not open")
        return self

    def __exit__(self, *exception: object) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, access_log=None, logger=_QUIET, shutdown_timeout=0.1)
        async with aiohttp.ClientSession(auto_decompress=False) as self._session:
            await runner.setup()
            try:
                await web.TCPSite(runner, "127.0.0.1", self._port).start()
                self.host = f"127.0.0.1:{runner.addresses[0][1]}"
                self._ready.set()
                await self._stop.wait()
            finally:
                self._ready.set()
                await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        fault = self.fault or Fault()
        self.asked += 1
        instead = await fault.before(self, request)
        if instead is not None:
            return instead
        headers = {k: v for k, v in request.headers.items() if k.lower() not in _HOP | {"host"}}
        url = f"http://{self._target}{request.path_qs}"
        async with self._session.request(request.method, url, headers=fault.request_headers(headers),
                                         data=await request.read(), allow_redirects=False) as theirs:  # fmt: skip
            kept = {k: v for k, v in theirs.headers.items() if k.lower() not in _HOP}
            answer = web.StreamResponse(status=theirs.status, headers=kept)
            data = await theirs.read()
            await answer.prepare(request)
            if request.method == "GET" and theirs.status in (200, 206) and "/blobs/" in request.path:
                await fault.body(self, request, answer, data)
            elif request.method != "HEAD":
                await answer.write(data)
            await answer.write_eof()
            return answer


def reset(request: web.Request) -> None:
    """Let the peer see "connection reset", not an end."""
    transport = request.transport
    if transport is not None:
        sock = transport.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        transport.abort()


class Status(Fault):
    """Every request is answered with this status."""

    def __init__(self, status: int, headers: dict[str, str] | None = None) -> None:
        self._status, self._headers = status, headers or {}

    async def before(self, door: Door, request: web.Request) -> web.StreamResponse | None:
        door.hurt += 1
        return web.Response(status=self._status, headers=self._headers, text="{}")


class _Now(Fault):
    """A fault of some answers, as chance has it."""

    def __init__(self, seed: int, share: float = 0.5) -> None:
        self._chance, self._share = random.Random(seed), share

    def strikes(self) -> bool:
        return self._chance.random() < self._share


class Reset(_Now):
    """Connections are reset: before the answer, or in its body."""

    async def before(self, door: Door, request: web.Request) -> web.StreamResponse | None:
        if not self.strikes() or self._chance.random() < 0.5:
            return None
        door.hurt += 1
        reset(request)
        raise ConnectionResetError

    async def body(self, door: Door, request: web.Request, answer: web.StreamResponse, data: bytes) -> None:
        if self.strikes():
            await answer.write(data[: self._chance.randrange(len(data) + 1)])
            door.hurt += 1
            reset(request)
            raise ConnectionResetError
        await super().body(door, request, answer, data)


class Short(_Now):
    """Bodies end before their announced length."""

    async def body(self, door: Door, request: web.Request, answer: web.StreamResponse, data: bytes) -> None:
        if self.strikes() and data:
            await answer.write(data[: self._chance.randrange(len(data))])
            door.hurt += 1
            assert request.transport is not None
            request.transport.close()
            raise ConnectionResetError
        await super().body(door, request, answer, data)


class Flipped(_Now):
    """One bit of a body is wrong."""

    async def body(self, door: Door, request: web.Request, answer: web.StreamResponse, data: bytes) -> None:
        if self.strikes() and data:
            place, spoilt = self._chance.randrange(len(data)), bytearray(data)
            spoilt[place] ^= 1 << self._chance.randrange(8)
            door.hurt, data = door.hurt + 1, bytes(spoilt)
        await super().body(door, request, answer, data)


class NoRanges(Fault):
    """A request for a range is answered with 200 and the whole blob."""

    def __init__(self, door: Door) -> None:
        self._door = door

    def request_headers(self, headers: dict[str, str]) -> dict[str, str]:
        self._door.hurt += "Range" in headers
        return {name: value for name, value in headers.items() if name != "Range"}


class RedirectLoop(Fault):
    """Every GET is sent to where it came from."""

    async def before(self, door: Door, request: web.Request) -> web.StreamResponse | None:
        door.hurt += 1
        return web.Response(status=307, headers={"Location": request.path_qs})


class Tokens(Fault):
    """Bearer tokens that are good for `lifetime` seconds, and say that it is five minutes."""

    def __init__(self, lifetime: float) -> None:
        self._lifetime = lifetime
        self._until: dict[str, float] = {}

    async def before(self, door: Door, request: web.Request) -> web.StreamResponse | None:
        if request.path == "/token":
            token = f"t{len(self._until)}"
            self._until[token] = time.monotonic() + self._lifetime
            return web.json_response({"token": token, "expires_in": 300})
        shown = request.headers.get("Authorization", "").removeprefix("Bearer ")
        if self._until.get(shown, 0.0) > time.monotonic():
            return None
        door.hurt += shown in self._until
        challenge = f'Bearer realm="http://{door.host}/token",service="door"'
        return web.json_response({"errors": []}, status=401, headers={"WWW-Authenticate": challenge})


class Trickle(Fault):
    """Bodies come one byte a second: those that were begun under it for ever, later ones as they should."""

    async def body(self, door: Door, request: web.Request, answer: web.StreamResponse, data: bytes) -> None:
        door.hurt += 1
        for at in range(len(data)):
            await answer.write(data[at : at + 1])
            await asyncio.sleep(1)
