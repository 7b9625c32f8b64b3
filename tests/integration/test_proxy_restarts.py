"""The only superpeer is gone for a moment while a proxy's client has part of a body: it gets the rest, not a cut."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import pytest

from dadi import digest as digests
from dadi.originals import restart
from dadi.originals.restart import GONE
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab.network import free_ports
from tests.lab.proxies import RunningProxy, proxied
from tests.lab.services import Running, running

LAYER = Random(1).randbytes(40 << 20)
DIGEST = digests.of(LAYER)
PATH = f"/v2/team/app/blobs/{DIGEST}"


class Site:
    """A registry, one superpeer that can be stopped and started, and a proxy."""

    def __init__(self, directory: Path, registry: FakeRegistry) -> None:
        self.directory, self.registry = directory, registry
        (self.port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{self.port}"
        self._stack = contextlib.AsyncExitStack()

    async def start(self) -> Running:
        self._stack = contextlib.AsyncExitStack()
        return await self._stack.enter_async_context(
            running(self.directory / "superpeer", self.registry.host, port=self.port)
        )

    async def stop(self) -> None:
        await self._stack.aclose()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with FakeRegistry() as registry:
        registry.add_image("team/app", "1", [LAYER])
        made = Site(tmp_path, registry)
        await made.start()
        yield made
        await made.stop()


@contextlib.asynccontextmanager
async def begun(site: Site, proxy: RunningProxy) -> AsyncIterator[tuple[bytes, aiohttp.ClientResponse]]:
    """A client that has the first part of the layer, and does not take the rest yet."""
    async with proxy.session.get(proxy.url + PATH) as response:
        assert response.status == 200
        yield await response.content.readexactly(500_000), response


async def noted(proxy: RunningProxy) -> None:
    async with asyncio.timeout(20):
        while GONE not in proxy.fallbacks():
            await asyncio.sleep(0.01)


async def test_what_the_superpeer_was_still_fetching_comes_when_it_is_back(tmp_path: Path, site: Site) -> None:
    site.registry.script(f"/blobs/{DIGEST}", Fault(stall_after=1 << 20), method="GET")
    async with proxied(tmp_path / "p", site.registry.host, superpeers=(site.url,)) as proxy:
        async with begun(site, proxy) as (first, response):
            await site.stop()
            await noted(proxy)
            await site.start()
            assert first + await response.read() == LAYER


async def test_what_comes_chunk_by_chunk_goes_on_when_it_is_back(tmp_path: Path, site: Site) -> None:
    async with proxied(tmp_path / "warm", site.registry.host, superpeers=(site.url,)) as proxy:
        assert (await proxy.get(PATH))[1] == LAYER
    asked = len(site.registry.asked(f"/blobs/{DIGEST}", "GET"))
    async with proxied(tmp_path / "p", site.registry.host, superpeers=(site.url,)) as proxy:
        async with begun(site, proxy) as (first, response):
            await site.stop()
            rest = asyncio.create_task(response.read())
            await noted(proxy)
            await site.start()
            assert first + await rest == LAYER
    assert len(site.registry.asked(f"/blobs/{DIGEST}", "GET")) == asked


@pytest.mark.parametrize("warm", [False, True])
async def test_one_that_does_not_come_back_is_not_waited_for_for_ever(
    tmp_path: Path, site: Site, monkeypatch: pytest.MonkeyPatch, warm: bool
) -> None:
    monkeypatch.setattr(restart, "PATIENCE", 1.0)
    if warm:
        async with proxied(tmp_path / "warm", site.registry.host, superpeers=(site.url,)) as proxy:
            await proxy.get(PATH)
    else:
        site.registry.script(f"/blobs/{DIGEST}", Fault(stall_after=1 << 20), method="GET")
    async with proxied(tmp_path / "p", site.registry.host, superpeers=(site.url,)) as proxy:
        async with begun(site, proxy) as (_, response):
            await site.stop()
            with pytest.raises(aiohttp.ClientPayloadError):
                await response.read()
    await site.start()


async def test_who_has_nothing_yet_is_told_at_once(tmp_path: Path, site: Site) -> None:
    async with proxied(tmp_path / "p", site.registry.host, superpeers=(site.url,)) as proxy:
        await site.stop()
        async with asyncio.timeout(restart.PATIENCE / 2):
            assert (await proxy.get(PATH))[0].status == 503
        assert GONE not in proxy.fallbacks()
    await site.start()
