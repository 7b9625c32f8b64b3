"""A superpeer that hangs is left in seconds, one that has much to do is waited for."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from dadi import http
from dadi.errors import Unreachable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import blob_of
from dadi.peers import hanging
from dadi.peers.hanging import Hanging
from dadi.peers.owners import owners
from dadi.peers.superpeer import SuperpeerClient
from tests.fakes.registry import FakeRegistry
from tests.lab.services import CHUNK, running, tar_of


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hanging, "SILENT", 0.02)
    monkeypatch.setattr(hanging, "PATIENCE", 0.5)


@contextlib.asynccontextmanager
async def stopped() -> AsyncIterator[str]:
    """Listen as the kernel does for a process that is stopped."""
    gone = asyncio.Event()

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        gone.set()
        server.close()
        await server.wait_closed()


async def test_a_read_goes_to_the_stand_in_when_the_superpeer_hangs(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, running(tmp_path / "superpeer", registry.host) as run, stopped() as hangs:
        tars = (tar_of(a=bytes([n]) * 50_000) for n in range(256))
        tar = next(tar for tar in tars if owners(blob_of(tar, CHUNK).digest, [run.url, hangs])[0] == hangs)
        blob = blob_of(tar, CHUNK)
        registry.add_image("team/app", "1", [tar])
        await run.index(f"{registry.host}/team/app:1")
        client = SuperpeerClient([run.url, hangs], Fallbacks(), connect=3, read=600, tokens=run.client.tokens)
        try:
            async with asyncio.timeout(20):
                assert b"".join(await client.source.read(blob, range(2))) == tar[: 2 * CHUNK]
            assert client.superpeers.state(hangs) != "good"
        finally:
            await client.close()


async def test_an_image_is_resolved_by_the_stand_in_when_the_superpeer_hangs(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, running(tmp_path / "superpeer", registry.host) as run, stopped() as hangs:
        names = (f"{registry.host}/team/app:{n}" for n in range(256))
        name = next(name for name in names if owners(name, [run.url, hangs])[0] == hangs)
        registry.add_image("team/app", name.rpartition(":")[2], [tar_of(a=b"an image")])
        client = SuperpeerClient([run.url, hangs], Fallbacks(), connect=3, read=600)
        try:
            async with asyncio.timeout(20):
                events = [event async for event in client.resolve(name, "linux/amd64")]
            assert events[-1]["event"] == "image"
            assert client.superpeers.state(hangs) != "good"
        finally:
            await client.close()


async def test_a_superpeer_that_is_well_is_waited_for_however_long_a_request_takes() -> None:
    looks, enough = 0, asyncio.Event()

    async def healthz(request: web.Request) -> web.Response:
        nonlocal looks
        looks += 1
        if looks == 5:
            enough.set()
        return web.Response(text="ok" if looks % 2 else "much to do", status=200 if looks % 2 else 503)

    app = http.application()
    app.router.add_get("/healthz", healthz)
    runner, address = await http.serve_tcp(app, "127.0.0.1:0")
    watch = Hanging()
    try:
        async with asyncio.timeout(20), watch.watched(f"http://{address}"):
            await enough.wait()
    finally:
        await watch.close()
        await runner.cleanup()
    assert looks >= 5, "it was looked at, and never given up"


async def test_all_who_wait_for_one_that_hangs_are_told_and_other_time_outs_stay_what_they_are() -> None:
    async def one(url: str) -> None:
        async with watch.watched(url):
            await asyncio.Event().wait()

    watch = Hanging()
    try:
        async with stopped() as hangs, asyncio.timeout(20):
            told = await asyncio.gather(*(one(hangs) for _ in range(100)), return_exceptions=True)
        assert {type(error) for error in told} == {Unreachable}
        assert len(told) == 100
        with pytest.raises(TimeoutError):
            async with watch.watched(hangs):
                raise TimeoutError
    finally:
        await watch.close()
