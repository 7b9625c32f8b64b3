"""Superpeers that hang, and registries that lie, seen by a proxy behind superpeers: whom it asks, and for how long."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from dadi.blobs.disk import DiskBlobs
from dadi.errors import DigestMismatch, Unreachable
from dadi.fallbacks import Fallbacks
from dadi.oci.reference import Reference
from dadi.originals.caller import Caller
from dadi.originals.client import FromSuperpeers
from dadi.originals.original import whole_of
from dadi.peers import hanging
from dadi.peers.owners import owners
from tests.fakes.registry import FakeRegistry
from tests.lab.services import running

DATA = hashlib.shake_256(b"plain").digest(700_000)


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hanging, "SILENT", 0.02)
    monkeypatch.setattr(hanging, "PATIENCE", 0.5)


@contextlib.asynccontextmanager
async def stopped(begun: bytes = b"") -> AsyncIterator[str]:
    """Listen as the kernel does for a process that is stopped; or that has begun to answer the first who asked."""
    gone, said = asyncio.Event(), [begun]

    async def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        if said and b"/v1/original/" in asked and b"/table" not in asked:
            writer.write(said.pop())
        await gone.wait()
        writer.close()

    server = await asyncio.start_server(take, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        gone.set()
        server.close()
        await server.wait_closed()


@contextlib.asynccontextmanager
async def proxy(directory: Path, *urls: str) -> AsyncIterator[FromSuperpeers]:
    store = DiskBlobs(directory)
    upstream = FromSuperpeers(urls, store, Fallbacks(), connect=3, read=600)
    try:
        yield upstream
    finally:
        await upstream.close()
        await store.close()


def owned_by(url: str, urls: list[str], registry: FakeRegistry) -> str:
    """Put a blob into the registry that this superpeer is responsible for; return its digest."""
    for number in range(1000):
        data = DATA + number.to_bytes(2, "big")
        digest = "sha256:" + hashlib.sha256(data).hexdigest()
        if owners(digest, urls)[0] == url:
            return registry.add_blob(data)
    raise AssertionError("none")


async def everything(upstream: FromSuperpeers, ref: Reference, digest: str) -> bytes:
    original = await upstream.blob(ref, digest, Caller())
    return b"".join([piece async for piece in whole_of(original)])


async def test_a_blob_comes_from_the_stand_in_when_its_superpeer_hangs(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, running(tmp_path / "superpeer", registry.host) as run, stopped() as hangs:
        digest = owned_by(hangs, [run.url, hangs], registry)
        ref = Reference.parse(f"{registry.host}/team/app:1")
        async with proxy(tmp_path / "proxy", run.url, hangs) as upstream, asyncio.timeout(20):
            assert len(await everything(upstream, ref, digest)) == len(DATA) + 2


async def test_a_blob_goes_on_from_the_stand_in_when_its_superpeer_hangs_in_the_middle(tmp_path: Path) -> None:
    async with FakeRegistry() as registry, running(tmp_path / "superpeer", registry.host) as run:
        head = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {len(DATA) + 2}\r\n" \
               f"Content-Range: bytes 0-{len(DATA) + 1}/{len(DATA) + 2}\r\n\r\n"
        async with stopped(head.encode() + DATA[:100_000]) as hangs:
            digest = owned_by(hangs, [run.url, hangs], registry)
            ref = Reference.parse(f"{registry.host}/team/app:1")
            async with proxy(tmp_path / "proxy", run.url, hangs) as upstream, asyncio.timeout(20):
                stream = upstream._stream(digest, len(DATA) + 2, upstream._asked.add(digest, ref, Caller()))
                found = b"".join([piece async for piece in stream])
                assert found[: len(DATA)] == DATA
                assert upstream._known.state(hangs) != "good"


async def test_an_engine_is_told_soon_when_all_superpeers_hang(tmp_path: Path) -> None:
    async with stopped() as one, stopped() as other, proxy(tmp_path / "proxy", one, other) as upstream:
        async with asyncio.timeout(20):
            with pytest.raises(Unreachable, match="hangs"):
                await upstream.manifest(Reference.parse("registry.example/team/app:1"), Caller())


async def test_a_superpeer_that_has_much_to_do_is_waited_for(tmp_path: Path) -> None:
    """It says that it is well, and answers in its own time."""
    free = asyncio.Event()

    async def manifest(request: web.Request) -> web.Response:
        await free.wait()
        digest = "sha256:" + hashlib.sha256(b"{}").hexdigest()
        return web.Response(body=b"{}", headers={"Docker-Content-Digest": digest})

    looks = 0

    async def healthz(request: web.Request) -> web.Response:
        nonlocal looks
        looks += 1
        if looks == 10:
            free.set()
        return web.Response()

    app = web.Application()
    app.router.add_get("/v1/manifests", manifest)
    app.router.add_get("/healthz", healthz)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    url = f"http://127.0.0.1:{runner.addresses[0][1]}"
    try:
        async with proxy(tmp_path / "proxy", url) as upstream, asyncio.timeout(20):
            assert (await upstream.manifest(Reference.parse("registry.example/team/app:1"), Caller())).raw == b"{}"
    finally:
        await runner.cleanup()


@pytest.mark.parametrize("size", [10_000, 700_000])
async def test_a_registry_that_lies_does_not_make_its_superpeer_one_that_is_away(tmp_path: Path, size: int) -> None:
    """Else what is there would be asked of the stand-in, which would have to ask the same registry for it."""
    async with FakeRegistry() as registry, running(tmp_path / "superpeer", registry.host) as run:
        digest = registry.add_blob(DATA[:size])
        registry.blobs[digest] = DATA[: size - 1] + b"?"
        ref = Reference.parse(f"{registry.host}/team/app:1")
        async with proxy(tmp_path / "proxy", run.url) as upstream, asyncio.timeout(30):
            with pytest.raises((DigestMismatch, Unreachable)):
                await everything(upstream, ref, digest)
            assert upstream._known.state(run.url) == "good"
