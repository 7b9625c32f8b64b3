"""The registry proxy inside a `dadi-node`: with an embedded superpeer, with superpeers, with a port that is taken."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from dadi import digest as digests
from dadi import metrics
from dadi.node.config import BackfillConfig, NodeConfig, PeersConfig, ProxyConfig
from dadi.node.node import Node
from dadi.node.proxying import PlainPulls
from dadi.oci.config import RegistryConfig
from tests.fakes.registry import FakeRegistry
from tests.lab.services import running, tar_of
from tests.lab.waiting import until

pytestmark = pytest.mark.root

LAYER = tar_of(big=bytes(range(256)) * (5 << 10))
DIGEST = digests.of(LAYER)
BLOB, MANIFEST = f"/v2/team/app/blobs/{DIGEST}", "/v2/team/app/manifests/1"


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [LAYER])
        yield fake


@contextlib.asynccontextmanager
async def proxied(directory: Path, registry: FakeRegistry, *superpeers: str, listen: str = "127.0.0.1:0",
                  peers: PeersConfig | None = None) -> AsyncIterator[tuple[Node, PlainPulls]]:  # fmt: skip
    config = NodeConfig(
        state=str(directory / "state"), run=str(directory / "run"), superpeers=superpeers, platform="linux/amd64",
        unmount_on_stop=True, backfill=BackfillConfig(enabled=False),
        peers=peers or PeersConfig(listen="127.0.0.1:0"),
        proxy=ProxyConfig(enabled=True, listen=listen, upstream=registry.host),
        registry=RegistryConfig(allowed=(registry.host,), plain_http=(registry.host,), backoff=0.001),
    )  # fmt: skip
    node = await Node.start(config)
    try:
        node.proxying = await PlainPulls.start(node)
        yield node, node.proxying
    finally:
        await node.close()


async def get(proxying: PlainPulls, path: str) -> bytes:
    async with aiohttp.ClientSession() as session, session.get(f"http://{proxying.address}{path}") as response:
        assert response.status == 200, await response.text()
        return await response.read()


def gets(registry: FakeRegistry) -> int:
    return len(registry.asked(f"/blobs/{DIGEST}", "GET"))


async def mounted(node: Node, registry: FakeRegistry, target: Path) -> None:
    target.mkdir()
    async for _ in node.mounts.mount(f"{registry.host}/team/app:1", str(target), node.platform):
        pass


async def test_plain_and_lazy_pulls_of_an_embedded_superpeer_cost_one_copy(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with proxied(tmp_path, registry) as (node, proxying):
        assert await get(proxying, MANIFEST)
        assert await get(proxying, BLOB) == LAYER
        await mounted(node, registry, tmp_path / "mnt")
        assert await asyncio.to_thread((tmp_path / "mnt" / "big").read_bytes) == bytes(range(256)) * (5 << 10)
        assert node.store.has(DIGEST), "it is in the node's own store"
        found = node.statistics()["proxy"]
        assert found["served"]["bytes"] == len(LAYER)
        assert found["requests"]["manifests"] == 1
        names = {metric.name for metric in metrics.StatisticsCollector("dadi_node", node.statistics).collect()}
        assert "dadi_node_proxy_served_bytes" in names
    assert gets(registry) == 1


async def test_nodes_give_each_other_what_plain_pulls_bring(tmp_path: Path, registry: FakeRegistry) -> None:
    async with (
        running(tmp_path / "s", registry.host) as run,
        proxied(tmp_path / "a", registry, run.url) as (one, first),
        proxied(tmp_path / "b", registry, run.url) as (two, second),
    ):
        assert await get(first, BLOB) == LAYER
        assert await get(second, BLOB) == LAYER
        assert [blob.digest for blob in one.originals()] == [DIGEST]
        assert two.peering is not None
        assert two.peering.parents.asking.counts["peer"] >= len(LAYER) / 2, "from the first"
        assert two.tokens.text(DIGEST), "shown to the first"
        await one.store.remove(DIGEST)
        assert one.originals() == [], "what is gone is not named in a heartbeat"
    assert gets(registry) == 1


async def test_a_private_blob_goes_from_node_to_node_and_to_nobody_whom_the_registry_refuses(tmp_path: Path) -> None:
    async with FakeRegistry(auth="basic", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        mine = {"Authorization": aiohttp.encode_basic_auth("u", "p")}
        async with (
            running(tmp_path / "s", registry.host) as run,
            proxied(tmp_path / "a", registry, run.url) as (_, first),
            proxied(tmp_path / "b", registry, run.url) as (two, second),
            aiohttp.ClientSession() as session,
        ):
            for where in (first, second):
                async with session.get(f"http://{where.address}{BLOB}", headers=mine) as response:
                    assert await response.read() == LAYER
            assert two.peering is not None
            assert two.peering.parents.asking.counts["peer"] > 0
            async with session.get(f"http://{second.address}{BLOB}") as response:
                assert response.status == 401
            async with session.get(f"http://{two.peering.parents.peer.address}/v1/blobs/{DIGEST}") as response:
                assert response.status == 401
        assert gets(registry) == 1


async def test_a_token_that_has_run_out_is_replaced_by_asking_for_the_table_again(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with (
        running(tmp_path / "s", registry.host) as run,
        proxied(tmp_path / "a", registry, run.url) as (node, proxying),
    ):
        assert await get(proxying, BLOB) == LAYER
        old = node.tokens.text(DIGEST)
        run.who_may._shared.clear()
        assert await node.tokens.renewed(DIGEST, old)
        assert node.tokens.text(DIGEST) != old


async def test_without_peers_blobs_come_from_the_superpeer(tmp_path: Path, registry: FakeRegistry) -> None:
    alone = PeersConfig(enabled=False)
    async with (
        running(tmp_path / "s", registry.host) as run,
        proxied(tmp_path / "a", registry, run.url, peers=alone) as (node, proxying),
    ):
        assert await get(proxying, BLOB) == LAYER
        assert node.originals() == []
    assert gets(registry) == 1


async def test_superpeers_may_be_a_name(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run:
        url = run.url.replace("http://127.0.0.1", "dns+http://localhost")
        async with proxied(tmp_path / "a", registry, url) as (_, proxying):
            assert await get(proxying, BLOB) == LAYER


async def test_a_port_that_is_taken_keeps_nobody_from_his_mounts(tmp_path: Path, registry: FakeRegistry) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        async with proxied(tmp_path, registry, listen=listen) as (node, proxying):
            assert [row["kind"] for row in node.fallbacks.statistics()] == ["not serving plain pulls yet"]
            taken.close()
            await until(lambda: proxying.address)
            assert await get(proxying, BLOB) == LAYER


def test_the_section_is_off_unless_it_is_switched_on() -> None:
    assert not msgspec.convert({}, NodeConfig).proxy.enabled
