"""`Remote` against servers that do not keep to the protocol: never a wrong or missing byte."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import aiohttp
import pytest
import zstandard
from aiohttp import web

from dadi import http
from dadi.blobs.remote import Remote
from dadi.errors import AccessDenied, ConfigError, Conflict, DadiError, DigestMismatch, NotFound, Unavailable
from dadi.index.chunks import blob_of
from tests.contracts.store import C, content, parts_of

DATA = content(6 * C + 9)
BLOB = blob_of(DATA, C)
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handler], Awaitable[Remote]]]:
    runners, sessions = [], []

    async def start(handler: Handler) -> Remote:
        app = http.application()
        app.router.add_get("/v1/blobs/{digest}", handler)
        runner, address = await http.serve_tcp(app, "127.0.0.1:0")
        session = http.client(connect=1, read=0.5)
        runners.append(runner)
        sessions.append(session)
        return Remote(f"http://{address}/", session)

    yield start
    for session in sessions:
        await session.close()
    for runner in runners:
        await runner.cleanup()


def answer(body: bytes, said: str, status: int = 206, **headers: str) -> Handler:
    async def handle(request: web.Request) -> web.Response:
        return web.Response(status=status, body=body, headers={"Content-Range": said, **headers} if said else headers)

    return handle


SAID = f"bytes {C}-{3 * C - 1}/{len(DATA)}"
RIGHT = DATA[C : 3 * C]


async def test_a_run_is_one_request_and_comes_as_chunks(serve) -> None:
    asked = []

    async def handle(request: web.Request) -> web.Response:
        asked.append(request.headers["Range"])
        return web.Response(status=206, body=RIGHT, headers={"Content-Range": SAID})

    remote = await serve(handle)
    assert await remote.read(BLOB, range(1, 3)) == parts_of(BLOB, DATA)[1:3]
    assert asked == [f"bytes={C}-{3 * C - 1}"]
    assert await remote.read(BLOB, range(0)) == []


@pytest.mark.parametrize(
    ("handler", "error"),
    [
        pytest.param(answer(DATA, "", status=200), DigestMismatch, id="a 200 to a range request"),
        pytest.param(answer(RIGHT, "", status=206), DigestMismatch, id="no Content-Range"),
        pytest.param(answer(RIGHT, f"bytes 0-{2 * C - 1}/{len(DATA)}"), DigestMismatch, id="another range"),
        pytest.param(answer(RIGHT, f"bytes {C}-{3 * C - 1}/999999"), DigestMismatch, id="a blob of another size"),
        pytest.param(answer(RIGHT[:-1], SAID), Unavailable, id="a short body"),
        pytest.param(answer(b"", SAID), Unavailable, id="no body"),
        pytest.param(answer(RIGHT + b"x", SAID), DigestMismatch, id="a long body"),
        pytest.param(answer(b"", "", status=302, Location="http://127.0.0.1:1/"), DadiError, id="a redirect"),
        pytest.param(answer(b"oops", "", status=500), Unavailable, id="a fault without our JSON"),
        pytest.param(answer(b'{"error":"not-found","message":"m"}', "", status=404), NotFound, id="not found"),
        pytest.param(answer(b'{"error":"denied","message":"m"}', "", status=403), AccessDenied, id="denied"),
        pytest.param(answer(b'{"error":"from-the-future"}', "", status=500), DadiError, id="an unknown error"),
        pytest.param(answer(b'["not", "an object"]', "", status=503), Unavailable, id="strange JSON"),
    ],
)
async def test_whatever_is_not_exactly_the_run_is_an_error(serve, handler: Handler, error: type[DadiError]) -> None:
    remote = await serve(handler)
    with pytest.raises(error):
        await remote.read(BLOB, range(1, 3))


async def test_a_server_that_stops_in_the_middle_is_an_error_in_time(serve) -> None:
    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(status=206, headers={"Content-Range": SAID, "Content-Length": str(2 * C)})
        await response.prepare(request)
        await response.write(RIGHT[:C])
        try:
            await request.content.read()  # the client goes, in the end
            await asyncio.get_running_loop().create_future()
        except (ConnectionResetError, asyncio.CancelledError):
            pass
        return response

    remote = await serve(handle)
    with pytest.raises(Unavailable, match="in time"):
        await remote.read(BLOB, range(1, 3))


@pytest.mark.parametrize("status", [302, 403, 404, 418])
async def test_another_program_at_the_port_is_somebody_who_is_away(serve, status: int) -> None:
    remote = await serve(answer(b"it works", "", status, Location="/index.html"))
    with pytest.raises(Unavailable, match=str(status)) as caught:
        await remote.read(BLOB, range(1, 3))
    assert "is it dadi" in (caught.value.hint or "")


async def test_a_server_says_an_address_at_which_it_can_be_asked_also_for_ipv6() -> None:
    app = http.application()
    app.router.add_get("/v1/blobs/{digest}", answer(RIGHT, SAID))
    try:
        runner, address = await http.serve_tcp(app, "[::1]:0")
    except (ConfigError, Conflict):
        pytest.skip("no IPv6 here")
    session = http.client(connect=1, read=0.5)
    try:
        assert await Remote(f"http://{address}", session).read(BLOB, range(1, 3)) == [RIGHT[:C], RIGHT[C:]]
    finally:
        await session.close()
        await runner.cleanup()


async def test_nobody_there_is_said_with_the_address() -> None:
    async with http.client(connect=1, read=1) as session:
        with pytest.raises(Unavailable, match=r"cannot connect to http://127\.0\.0\.1:1/"):
            await Remote("http://127.0.0.1:1", session).read(BLOB, range(1))
    assert isinstance(session, aiohttp.ClientSession)


# ---- compressed

TEXT = b"".join(b"line %d of a text that compresses\n" % n for n in range(2000))[: 6 * C + 9]
TEXT_BLOB = blob_of(TEXT, C)


def frames(*parts: bytes) -> bytes:
    return b"".join(zstandard.ZstdCompressor().compress(part) for part in parts)


async def test_a_run_comes_compressed_if_the_other_side_likes(serve) -> None:
    accepted = []

    async def handle(request: web.Request) -> web.Response:
        accepted.append(request.headers["Accept-Encoding"])
        body = frames(TEXT[C : 2 * C], TEXT[2 * C : 3 * C])
        return web.Response(status=206, body=body, headers={"Content-Range": SAID, "Content-Encoding": "zstd"})

    remote = await serve(handle)
    assert await remote.read(TEXT_BLOB, range(1, 3)) == parts_of(TEXT_BLOB, TEXT)[1:3]
    assert accepted == ["zstd"]
    assert 0 < remote.wire_bytes < C


BOMB = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 26))


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"not zstd at all", id="no zstd"),
        pytest.param(frames(TEXT[C : 2 * C]), id="too few frames"),
        pytest.param(frames(TEXT[C : 2 * C], TEXT[2 * C : 3 * C], b"x"), id="too many frames"),
        pytest.param(frames(TEXT[C : 3 * C])[:-20], id="a frame cut short"),
        pytest.param(BOMB, id="a bomb"),
        pytest.param(b"x" * (3 * C), id="more than it stands for"),
    ],
)
async def test_compressed_bytes_that_are_not_the_run_are_an_error(serve, body: bytes) -> None:
    remote = await serve(answer(body, SAID, **{"Content-Encoding": "zstd"}))
    with pytest.raises(DigestMismatch):
        await remote.read(TEXT_BLOB, range(1, 3))
