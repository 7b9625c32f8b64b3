"""Two superpeers of one datacenter, over loopback: one copy from the registry, whoever is asked and whoever dies."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web

from dadi import digest as digests
from dadi import http
from dadi.errors import DadiError, NotFound, Unavailable
from dadi.index import image as image_index
from dadi.index.image import ImageIndex
from dadi.peers.owners import owners
from tests.contracts.store import content
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry
from tests.lab.datacenter import a_node, beside, copies, datacenter, layers_owned_by_both
from tests.lab.services import Running, running, tar_of


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


@pytest.mark.parametrize("authorization", ["open", "registry"])
async def test_an_image_that_one_has_indexed_is_read_from_all_at_one_copy(
    tmp_path: Path, registry: FakeRegistry, authorization: str
) -> None:
    async with datacenter(tmp_path, registry.host, authorization=authorization) as dc:
        tars = layers_owned_by_both(dc.urls)
        registry.add_image("team/app", "1", tars)
        index = await dc.index(f"{registry.host}/team/app:1")
        await dc.small(index)
        assert await dc.read(index) == tars
        assert copies(registry, [layer.layer_digest for layer in index.layers]) == [1] * 4
        assert sorted(dc.siblings("bytes")) == [0, sum(map(len, tars)) // 2], "the other's half came from the first"
        assert sorted(dc.siblings("adopted")) == [0, 1]
        for run in dc.running.values():
            assert await served(run) > sum(map(len, tars)) // 2 - 1
            kinds = {row["kind"] for row in run.superpeer.fallbacks.statistics() if "sibling" in row["kind"]}
            assert kinds <= {"did not catch up with a sibling"}, "the first one started before there was another"
        async with asyncio.timeout(10):  # what came from a sibling is checked as a whole
            other = next(run for run in dc.running.values() if run.superpeer.siblings.chunks.bytes)
            mine = [layer.diff_id for layer in index.layers if owners(layer.diff_id, dc.urls)[0] == other.url]
            while not all(other.superpeer.store.has(digest) for digest in mine):
                await asyncio.sleep(0.01)
        assert dc.fallbacks.statistics() == []


async def test_who_shows_no_token_learns_nothing_from_siblings_servers(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with datacenter(tmp_path, registry.host, authorization="registry") as dc, aiohttp.ClientSession() as session:
        registry.add_image("team/app", "1", [tar_of(a=b"a")])
        index = await dc.index(f"{registry.host}/team/app:1")
        asked = dc.siblings("asked")
        for url in dc.urls:
            for path in (f"/v1/blobs/{index.manifest_digest}/origin", f"/sibling/v1/blobs/{index.metadata.digest}",
                         f"/v1/blobs/sha256:{'8' * 64}", f"/v1/peers?blob={index.metadata.digest}"):  # fmt: skip
                async with session.get(url + path) as response:
                    assert response.status == 401, path
            async with session.post(f"{url}/v1/peers/leave", json={"id": "x"}) as response:
                assert response.status == 401
        assert dc.siblings("asked") == asked


async def test_twenty_nodes_at_once_cost_the_registry_and_the_sibling_one_copy(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        tars = layers_owned_by_both(dc.urls)
        registry.add_image("team/app", "1", tars)

        async def node() -> None:
            index = await dc.index(f"{registry.host}/team/app:1")
            await dc.small(index)
            assert await dc.read(index) == tars

        await asyncio.gather(*(node() for _ in range(20)))
        index = await dc.index(f"{registry.host}/team/app:1")
        assert copies(registry, [layer.layer_digest for layer in index.layers]) == [1] * 4
        assert sorted(dc.siblings("bytes")) == [0, sum(map(len, tars)) // 2]


async def test_layers_with_seek_points_are_fetched_by_ranges_by_their_owners(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        tars = layers_owned_by_both(dc.urls)
        made = await indexed.add(registry, "team/app", tars, tmp_path)
        index = await dc.index(made.reference)
        assert all(layer.seek_digest for layer in index.layers)
        await dc.small(index)
        assert await dc.read(index) == tars
        assert dc.siblings("bytes") == [0, 0]
        ranges = [run.superpeer.lazy.statistics()["bytes"] for run in dc.running.values()]
        assert all(ranges), "each has fetched its own"
        assert sum(ranges) <= sum(map(len, made.layers)), "no byte twice"


async def test_a_superpeer_that_dies_is_stood_in_for_and_takes_over_again(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with datacenter(tmp_path, registry.host, tag_ttl=0.0) as dc:
        tars = layers_owned_by_both(dc.urls)
        registry.add_image("team/app", "1", tars)
        reference = f"{registry.host}/team/app:1"
        index = await dc.index(reference)
        await dc.know(index.manifest_digest)
        first = owners(reference, dc.urls)[0]
        await dc.client.source.read(index.layers[0].blob, range(2))
        await dc.kill(first)
        assert await dc.read(index) == tars, "no read has failed"
        await dc.small(index)
        assert await dc.index(reference) == index
        kinds = {row["kind"]: row["count"] for row in dc.fallbacks.statistics()}
        assert kinds["superpeer passed over"] <= 2, "who is away is not asked each time"
        assert kinds["superpeer away, its stand-in asked"] >= 3
        run = await dc.start(first)
        async with asyncio.timeout(20):
            while not run.superpeer.catalog.records() or not await served(run):
                assert await dc.read(index) == tars
                await asyncio.sleep(0.2)
        assert dc.client.superpeers.state(first) == "good"


async def served(run: Running) -> int:
    async with aiohttp.ClientSession() as session, session.get(f"{run.url}/v1/status") as response:
        return int((await response.json())["served"]["bytes"])


async def test_one_that_comes_back_empty_learns_from_the_other_and_asks_for_no_second_copy(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        tars = layers_owned_by_both(dc.urls)
        registry.add_image("team/app", "1", tars)
        reference = f"{registry.host}/team/app:1"
        first, second = owners(reference, dc.urls)
        await dc.kill(first)
        index = await dc.index(reference)
        assert await dc.read(index) == tars
        await dc.start(first)
        async with a_node(first, second) as node:
            assert await node.index(reference) == index, "the image is resolved by who has never seen it"
            assert await node.read(index) == tars
        assert copies(registry, [layer.layer_digest for layer in index.layers]) == [1] * 4
        assert dc.running[first].superpeer.siblings.chunks.bytes == sum(map(len, tars)) // 2


async def test_one_that_was_away_catches_up_and_can_go_on_alone(tmp_path: Path, registry: FakeRegistry) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        tars = layers_owned_by_both(dc.urls)
        registry.add_image("team/app", "1", tars)
        reference = f"{registry.host}/team/app:1"
        first, second = owners(reference, dc.urls)
        await dc.kill(second)
        index = await dc.index(reference)
        await dc.start(second)
        await dc.know(index.manifest_digest)
        await dc.kill(first)
        async with a_node(first, second) as node:
            assert await node.read(index) == tars
            await node.small(index)


async def test_a_sibling_that_dies_in_the_middle_of_a_layer_leaves_the_registry(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        tars = layers_owned_by_both(dc.urls)
        registry.add_image("team/app", "1", tars)
        reference = f"{registry.host}/team/app:1"
        index = await dc.index(reference)
        await dc.know(index.manifest_digest)
        first, second = owners(reference, dc.urls)
        theirs = [layer for layer in index.layers if owners(layer.diff_id, dc.urls)[0] == second]
        await dc.client.source.read(theirs[0].blob, range(3))
        assert dc.running[second].superpeer.siblings.chunks.bytes
        await dc.kill(first)
        assert await dc.read(index) == tars
        kinds = {row["kind"] for row in dc.running[second].superpeer.fallbacks.statistics()}
        assert {"sibling passed over", "no chunks from siblings, registry asked"} <= kinds


async def test_what_nobody_knows_is_said_at_once_and_is_no_storm(tmp_path: Path, registry: FakeRegistry) -> None:
    async with datacenter(tmp_path, registry.host, 3) as dc:
        digest = "sha256:" + "7" * 64
        loop = asyncio.get_running_loop()
        began = loop.time()

        async def ask() -> None:
            with pytest.raises(NotFound):
                await dc.client.whole(digest, 100)

        await asyncio.gather(*(ask() for _ in range(50)))
        assert loop.time() - began < 3
        assert dc.siblings("asked") == [1, 1, 1], "each has asked the others once, and nobody because he was asked"
        await ask()
        assert dc.siblings("asked") == [1, 1, 1], "it is remembered"
        assert registry.seen == []


async def test_too_many_unknown_blobs_at_once_are_put_off(tmp_path: Path, registry: FakeRegistry) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        run = dc.running[dc.urls[0]]
        unknown = ["sha256:" + f"{number:064x}" for number in range(300)]
        results = await asyncio.gather(*map(run.superpeer.learn, unknown), return_exceptions=True)
        assert {type(result) for result in results} == {NotFound, Unavailable}
        put_off = [result for result in results if isinstance(result, Unavailable)]
        assert len(put_off) == 300 - 64
        assert all(error.retry_after == 1 for error in put_off)


class Liar:
    """A superpeer that answers its siblings with what a test says. `told` may be bytes, or changes to the truth."""

    def __init__(self, told: Any, blobs: dict[str, bytes]) -> None:
        self.told = told
        self.blobs = blobs

    async def serve(self, port: int) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/v1/blobs/{digest}/origin", self._origin)
        app.router.add_get("/sibling/v1/blobs/{digest}", self._blob)
        runner, _ = await http.serve_tcp(app, f"127.0.0.1:{port}")
        return runner

    async def _origin(self, request: web.Request) -> web.Response:
        return web.Response(body=self.told)

    async def _blob(self, request: web.Request) -> web.StreamResponse:
        data = self.blobs.get(request.match_info["digest"])
        if data is None:
            raise web.HTTPNotFound
        wanted = request.http_range
        if wanted.stop is None:
            return web.Response(body=data)
        first, last = wanted.start, wanted.stop - 1
        headers = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        return web.Response(status=206, body=data[first : last + 1], headers=headers)


@pytest.fixture
async def truth(tmp_path: Path, registry: FakeRegistry) -> dict[str, Any]:
    """What an honest superpeer would tell of an image, and its blobs."""
    tar = tar_of(a=content(100_000, 1))
    registry.add_image("team/app", "1", [tar])
    async with running(tmp_path / "honest", registry.host, authorization="open") as run:
        index = await run.index(f"{registry.host}/team/app:1")
        record = run.superpeer.catalog.record_of(index.manifest_digest)
        assert record is not None
        layer = index.layers[0]
        names = (record.index_digest, index.metadata.digest, layer.index_digest, layer.diff_id)
        store = run.superpeer.store
        return {"told": {**msgspec.structs.asdict(record), "whole": True}, "index": index,
                "blobs": {name: await store.get(name) for name in names}}  # fmt: skip


LIES: list[Any] = [
    b"", b"{}", b"\xff\xfe", b"[" * 5000, b" " * (1 << 20),
    {"index_digest": "sha256:" + "9" * 64}, {"index_digest": "no"}, {"index_size": 10}, {"index_size": 1 << 40},
    {"manifest_digest": "sha256:" + "9" * 64}, {"reference": "HTTP://evil/../x"}, {"platform": "plan9/pdp11"},
]  # fmt: skip


async def test_what_a_sibling_tells_that_makes_no_sense_is_an_error_and_not_believed(
    tmp_path: Path, registry: FakeRegistry, truth: dict[str, Any]
) -> None:
    liar = Liar(b"", truth["blobs"])
    asked = len(registry.seen)
    async with beside(tmp_path / "us", registry.host, liar) as run:
        for number, lie in enumerate(LIES):
            told = lie if isinstance(lie, bytes) else {**truth["told"], **lie}
            liar.told = told if isinstance(told, bytes) else msgspec.json.encode(told)
            digest = "sha256:" + f"{number:064x}"
            with pytest.raises(Unavailable):
                await run.superpeer.learn(digest)
            assert run.superpeer.catalog.records() == [], lie
        assert run.superpeer.statistics()["store"]["held"] == 0
    assert len(registry.seen) == asked, "nothing a message names is ever asked"


@pytest.mark.parametrize("which", ["image index", "metadata", "layer index"])
async def test_small_blobs_of_a_sibling_are_verified(
    tmp_path: Path, registry: FakeRegistry, truth: dict[str, Any], which: str
) -> None:
    index: ImageIndex = truth["index"]
    name = {"image index": truth["told"]["index_digest"], "metadata": index.metadata.digest,
            "layer index": index.layers[0].index_digest}[which]  # fmt: skip
    right = truth["blobs"][name]
    for wrong in (indexed.flipped(right, 20), right[:-1], right + b"x", b""):
        liar = Liar(msgspec.json.encode(truth["told"]), {**truth["blobs"], name: wrong})
        async with beside(tmp_path / f"us-{len(wrong)}-{wrong[20:21].hex()}", registry.host, liar) as run:
            with pytest.raises(DadiError):
                await run.superpeer.learn(index.layers[0].diff_id)
            assert run.superpeer.catalog.records() == []


async def test_chunks_of_a_sibling_are_verified_and_the_registry_has_the_right_ones(
    tmp_path: Path, registry: FakeRegistry, truth: dict[str, Any]
) -> None:
    index: ImageIndex = truth["index"]
    layer = index.layers[0]
    tar = truth["blobs"][layer.diff_id]
    liar = Liar(msgspec.json.encode(truth["told"]), {**truth["blobs"], layer.diff_id: indexed.flipped(tar, 40_000)})
    async with beside(tmp_path / "us", registry.host, liar) as run:
        got = await run.client.source.read(layer.blob, range(layer.table.count))
        assert b"".join(got) == tar
        assert run.superpeer.siblings.statistics()["wrong"] >= 1
        assert "no chunks from siblings, registry asked" in {r["kind"] for r in run.superpeer.fallbacks.statistics()}


async def test_a_table_that_lies_is_found_out_when_the_tar_is_whole(
    tmp_path: Path, registry: FakeRegistry, truth: dict[str, Any]
) -> None:
    # All agree with each other, and none with the diff ID.
    from dadi.index import layer as layer_index
    from dadi.index.chunks import table_of

    index: ImageIndex = truth["index"]
    layer = index.layers[0]
    tar = truth["blobs"][layer.diff_id]
    false = indexed.flipped(tar, 40_000)
    table = table_of(false, layer.table.chunk_size)
    encoded = layer_index.encode(
        msgspec.structs.replace(layer_index.decode(truth["blobs"][layer.index_digest]), table=table)
    )
    wrong = msgspec.structs.replace(layer, table=table, index_digest=digests.of(encoded), index_size=len(encoded))
    image = image_index.encode(msgspec.structs.replace(index, layers=(wrong,)))
    told = {**truth["told"], "index_digest": digests.of(image), "index_size": len(image)}
    blobs = {**truth["blobs"], layer.diff_id: false, wrong.index_digest: encoded, told["index_digest"]: image}
    async with beside(tmp_path / "us", registry.host, Liar(msgspec.json.encode(told), blobs)) as run:
        with contextlib.suppress(DadiError):
            await run.client.source.read(wrong.blob, range(table.count))
        async with asyncio.timeout(10):
            while not run.superpeer.store.has(layer.diff_id):
                await asyncio.sleep(0.01)
        got = await run.client.source.read(layer.blob, range(layer.table.count))
        assert b"".join(got) == tar
        assert "lying index thrown away" in {row["kind"] for row in run.superpeer.fallbacks.statistics()}


async def test_superpeers_by_a_dns_name_are_found_again_where_they_have_moved(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    tar = tar_of(a=content(50_000, 1))
    registry.add_image("team/app", "1", [tar])
    addresses = ["127.0.0.3"]

    async def resolver(host: str, port: int) -> list[str]:
        assert host == "superpeers.dadi"
        return addresses

    async with running(tmp_path, registry.host, authorization="open") as run:
        name = f"dns+http://superpeers.dadi:{run.url.rpartition(':')[2]}"
        async with a_node(name, resolver=resolver) as node:
            with pytest.raises(Unavailable):
                await node.index(f"{registry.host}/team/app:1")
            addresses[:] = ["127.0.0.1"]
            await node.client.superpeers.ask_names()
            index = await node.index(f"{registry.host}/team/app:1")
            assert await node.read(index) == [tar]
