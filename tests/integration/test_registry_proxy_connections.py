"""Clients that hold connections and ask for little: the others are served, and it is said what was done."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from registry_proxy import connections
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab.proxies import RunningProxy, proxied

MANIFEST = "/v2/team/app/manifests/1"


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [b"layer"])
        yield fake


@contextlib.asynccontextmanager
async def connected(proxy: RunningProxy, sent: bytes = b"") -> AsyncIterator[asyncio.StreamReader]:
    host, port = proxy.host.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(sent)
        await writer.drain()
        yield reader
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


async def until(true: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.01)


def asked(path: str, *headers: str) -> bytes:
    return "\r\n".join((f"GET {path} HTTP/1.1", "Host: a", *headers, "\r\n")).encode()


async def test_who_holds_connections_and_asks_for_nothing_makes_room_for_who_asks(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with (
        proxied(tmp_path, registry.host, front={"most_connections": 3}) as proxy,
        contextlib.AsyncExitStack() as stack,
    ):
        half = asked(MANIFEST)[:-2]
        held = [await stack.enter_async_context(connected(proxy, half)) for _ in range(3)]
        assert (await proxy.get(MANIFEST))[0].status == 200
        assert await held[0].read() == b"", "the one that has waited longest"
        assert "idle connection closed for a new one" in proxy.fallbacks()


async def test_where_all_connections_are_busy_who_comes_is_told_so_and_nobody_is_cut_off(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    gate = asyncio.Event()
    registry.script("/manifests/1", Fault(gate=gate))
    async with (
        proxied(tmp_path, registry.host, front={"most_connections": 2}) as proxy,
        contextlib.AsyncExitStack() as stack,
    ):
        busy = [await stack.enter_async_context(connected(proxy, asked(MANIFEST))) for _ in range(2)]
        await until(lambda: proxy.proxy.front.statistics()["requests"]["manifests"] == 2)
        response, body = await proxy.get(MANIFEST)
        assert (response.status, json.loads(body)["errors"][0]["code"]) == (503, "UNAVAILABLE")
        assert response.headers["Retry-After"] == "1"
        assert "client refused: too many connections" in proxy.fallbacks()
        gate.set()
        for each in busy:
            assert (await each.readline()).startswith(b"HTTP/1.1 200")


async def test_who_sends_a_request_for_too_long_is_hung_up_on(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE", 0.2)
    async with proxied(tmp_path, registry.host) as proxy, asyncio.timeout(10):
        for sent in (b"", asked(MANIFEST)[:-2]):
            async with connected(proxy, sent) as reader:
                assert await reader.read() == b""


async def test_who_never_takes_what_he_asks_for_is_cut_off(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More is sent than sockets hold, so that an answer waits in the proxy; the kernel says when it is enough."""
    monkeypatch.setattr(connections, "IDLE", 0.5)
    large = {"schemaVersion": 2, "manifests": [], "annotations": {"a": "x" * (3 << 20)}}
    registry.add_manifest("team/app", "2", large, "application/vnd.oci.image.index.v1+json")
    async with proxied(tmp_path, registry.host, front={"most_connections": 1}) as proxy:
        async with connected(proxy, asked("/v2/team/app/manifests/2") * 16) as reader:
            reader._transport.pause_reading()  # type: ignore[attr-defined]
            await until(lambda: proxy.proxy.front.statistics()["requests"]["manifests"] >= 1)
            async with asyncio.timeout(20):
                while (await proxy.get("/v2/"))[0].status == 503:
                    await asyncio.sleep(0.1)
