"""Proxies through a superpeer: one copy from the registry, for plain and lazy pulls together; chunks where it can."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import msgspec
import pytest

from dadi import digest as digests
from dadi.blobs.source import Urgency
from dadi.blobs.verified import Verified
from dadi.index.chunks import Blob
from dadi.index.seek import SeekTable
from dadi.oci.hosts import Hosts
from superpeer.config import IndexingConfig
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, Fault, cut, status
from tests.lab.proxies import RunningProxy, proxied
from tests.lab.services import CHUNK, Running, running, tar_of

LAYER = Random(1).randbytes(3 << 20)
DIGEST = digests.of(LAYER)
BLOB = f"/v2/team/app/blobs/{DIGEST}"
MANIFEST = "/v2/team/app/manifests/1"
QUIET = IndexingConfig(chunk_size=CHUNK, rest_after=1e6)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [LAYER])
        yield fake


@contextlib.asynccontextmanager
async def proxies(directory: Path, registry: FakeRegistry, run: Running, count: int = 1, **options: object
                  ) -> AsyncIterator[list[RunningProxy]]:  # fmt: skip
    """Proxies that have nothing but a superpeer: they may not contact the registry."""
    async with contextlib.AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(
                proxied(directory / f"proxy-{n}", registry.host, superpeers=(run.url,), **options)
            )
            for n in range(count)
        ]
        yield made


def gets(registry: FakeRegistry, digest: str = DIGEST) -> int:
    return len(registry.asked(f"/blobs/{digest}", "GET"))


async def kept(where: Running | RunningProxy) -> None:
    """Wait until what was passed on has been put away: from then on there is a chunk table."""
    store = where.superpeer.store if isinstance(where, Running) else where.store
    async with asyncio.timeout(20):
        while not store.has(DIGEST):
            await asyncio.sleep(0.005)


def bytes_of(registry: FakeRegistry, digest: str, size: int) -> int:
    """Return how many bytes of a blob the registry was asked for."""
    total = 0
    for seen in registry.asked(f"/blobs/{digest}", "GET"):
        first, _, last = seen.headers.get("Range", f"bytes=0-{size - 1}").removeprefix("bytes=").partition("-")
        total += int(last) - int(first) + 1
    return total


async def test_twenty_proxies_cost_the_registry_one_copy(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run, 20) as made:
        manifests = await asyncio.gather(*(proxy.get(MANIFEST) for proxy in made))
        assert len({body for _, body in manifests}) == 1
        blobs = await asyncio.gather(*(proxy.get(BLOB) for proxy in made))
        assert {body for _, body in blobs} == {LAYER}
    assert gets(registry) == 1
    assert len(registry.asked("/manifests/", "GET")) == 1


async def test_what_a_superpeer_has_whole_comes_chunk_by_chunk_and_is_kept(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run, 2) as (one, two):
        await one.get(BLOB)
        await kept(run)
        _, part = await two.get(BLOB, headers={"Range": "bytes=1000000-1000099"})
        assert part == LAYER[1_000_000:1_000_100]
        async with asyncio.timeout(10):
            while not (here := two.store.statistics()["bytes"]):
                await asyncio.sleep(0.01)
        assert here < len(LAYER), "only what was asked for"
        assert (await two.get(BLOB))[1] == LAYER
        assert two.store.has(DIGEST)
        fetched = run.superpeer.originals.statistics()["bytes"]
        assert fetched == len(LAYER)
    assert gets(registry) == 1


async def test_chunks_come_from_another_node_where_one_is_given_as_the_source(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run) as (one,):
        await one.get(BLOB)
        await kept(run)
        await kept(one)
        sent = (await one.session.get(f"{run.url}/v1/status"), "sent_to_proxies")
        before = (await sent[0].json())[sent[1]]["bytes"]
        peer = Verified("peer", one.store)
        async with proxied(tmp_path / "two", registry.host, superpeers=(run.url,), source=peer) as two:
            assert (await two.get(BLOB))[1] == LAYER
        after = await one.session.get(f"{run.url}/v1/status")
        assert (await after.json())["sent_to_proxies"]["bytes"] == before
        assert peer.bytes == len(LAYER)


async def test_a_node_that_lies_fails_alone(tmp_path: Path, registry: FakeRegistry) -> None:
    class Liar:
        async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
            return [bytes(blob.table.extent(chunk)[1]) for chunk in chunks]

    async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run) as (one,):
        await one.get(BLOB)
        await kept(run)
        liar = Verified("liar", Liar())
        async with proxied(tmp_path / "two", registry.host, superpeers=(run.url,), source=liar) as two:
            assert (await two.get(BLOB))[1] == LAYER
        assert liar.wrong


async def test_a_wrong_chunk_from_a_superpeer_is_never_passed_on(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run, 2) as (one, two):
        await one.get(BLOB)
        await kept(run)
        blob = run.superpeer.store.find(DIGEST)
        assert blob is not None
        path = run.superpeer.store.data_path(blob)
        data = bytearray(path.read_bytes())
        data[5] ^= 1
        path.write_bytes(data)
        response, body = await two.get(BLOB)
        assert response.status == 502
        assert LAYER[:100] not in body
        assert not two.store.has(DIGEST)


async def test_wrong_bytes_at_the_registry_are_cut_off_at_the_proxy_too(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.script("/blobs/", *[Fault(flip=7)] * 9, method="GET")
    async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run) as (proxy,):
        with pytest.raises(aiohttp.ClientError):
            await proxy.get(BLOB)
        assert not proxy.store.has(DIGEST)
        assert not run.superpeer.store.has(DIGEST)


async def test_private_images_need_the_clients_credentials_which_reach_the_registry(tmp_path: Path) -> None:
    good = {"Authorization": "Basic " + base64.b64encode(b"u:p").decode()}
    async with FakeRegistry(auth="basic", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run) as (proxy,):
            response, _ = await proxy.get(MANIFEST)
            assert (response.status, response.headers["WWW-Authenticate"][:5]) == (401, "Basic")
            assert (await proxy.get(MANIFEST, headers=good))[0].status == 200
            assert (await proxy.get(BLOB, headers=good))[1] == LAYER
            assert (await proxy.get(BLOB))[0].status == 401, "though it is in the proxy's own store"


async def test_stale_documents_are_marked_through_the_superpeer(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run) as (proxy,):
        run.superpeer.originals.documents._config = type(run.superpeer.config.originals)(tag_ttl=0.0, patience=0.5)
        await proxy.get(MANIFEST)
        registry.script("/v2/", *[status(503)] * 99)
        response, _ = await proxy.get(MANIFEST)
        assert (response.status, response.headers["Warning"][:3]) == (200, "299")


async def test_a_superpeer_that_breaks_off_is_asked_for_the_rest(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.script("/blobs/", cut(1 << 20), method="GET")
    async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run) as (proxy,):
        assert (await proxy.get(BLOB))[1] == LAYER


async def test_without_its_superpeer_the_proxy_says_so_and_clients_go_elsewhere(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with proxied(tmp_path, registry.host, superpeers=("http://127.0.0.1:9",)) as proxy:
        for path in (MANIFEST, BLOB):
            assert (await proxy.get(path))[0].status == 503
    assert not registry.seen


async def test_tags_and_referrers_come_through_the_superpeer(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run) as (proxy,):
        registry.script("/tags/list", status(200, b'{"name":"team/app","tags":["1","2"]}',
                                             Link='</v2/team/app/tags/list?n=2&last=2>; rel="next"'))  # fmt: skip
        response, body = await proxy.get(f"/v2/team/app/tags/list?n=2&ns={registry.host}")
        assert (response.status, body) == (200, b'{"name":"team/app","tags":["1","2"]}')
        assert 'n=2&last=2&ns=127.0.0.1' in response.headers["Link"]
        response, body = await proxy.get(f"/v2/team/app/referrers/{DIGEST}")
        assert (response.status, b'"manifests":[]' in body) == (200, True)


# ---- lazy and plain together


@pytest.fixture
def tars() -> list[bytes]:
    return [tar_of(**{f"f{n}": Random(n).randbytes(60_000) for n in range(30)})]


async def test_lazy_then_plain_fetches_only_the_rest(tmp_path: Path, registry: FakeRegistry, tars: list[bytes]) -> None:
    image = await indexed.add(registry, "team/lazy", tars, tmp_path)
    size, digest = len(image.layers[0]), digests.of(image.layers[0])
    async with (
        running(tmp_path / "s", registry.host, indexing=QUIET) as run,
        proxies(tmp_path, registry, run) as (proxy,),
    ):
        index = await run.index(image.reference)
        layer = index.layers[0]
        await run.superpeer.bring(layer.blob, range(20, 40))
        before = bytes_of(registry, digest, size)
        assert 0 < before < size
        _, body = await proxy.get(f"/v2/team/lazy/blobs/{digest}")
        assert body == image.layers[0]
        assert bytes_of(registry, digest, size) == size, "one copy together"
        await run.superpeer.bring(layer.blob, range(layer.table.count))
        assert bytes_of(registry, digest, size) == size, "and the lazy rest comes from what is here"


async def test_lazy_reads_and_plain_pulls_at_the_same_time_cost_one_copy(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/lazy", tars, tmp_path)
    size, digest = len(image.layers[0]), digests.of(image.layers[0])
    async with (
        running(tmp_path / "s", registry.host, indexing=QUIET) as run,
        proxies(tmp_path, registry, run, 3) as made,
    ):
        layer = (await run.index(image.reference)).layers[0]
        pulls = [proxy.get(f"/v2/team/lazy/blobs/{digest}") for proxy in made]
        lazy = [run.superpeer.bring(layer.blob, range(at, at + 5), Urgency.DEMAND) for at in range(0, 100, 10)]
        answers, _ = await asyncio.gather(asyncio.gather(*pulls), asyncio.gather(*lazy))
        assert {body for _, body in answers} == {image.layers[0]}
    assert bytes_of(registry, digest, size) == size


async def test_plain_then_lazy_fetches_nothing_more(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/lazy", tars, tmp_path)
    size, digest = len(image.layers[0]), digests.of(image.layers[0])
    async with (
        running(tmp_path / "s", registry.host, indexing=QUIET) as run,
        proxies(tmp_path, registry, run) as (proxy,),
    ):
        await proxy.get(f"/v2/team/lazy/blobs/{digest}")
        layer = (await run.index(image.reference)).layers[0]
        await run.superpeer.bring(layer.blob, range(layer.table.count))
        assert bytes_of(registry, digest, size) == size


async def test_plain_then_first_sight_indexes_what_is_here(tmp_path: Path, registry: FakeRegistry) -> None:
    layer = gzip.compress(tar_of(a=Random(3).randbytes(500_000)), mtime=0)
    registry.add_image("team/first", "1", [])
    image = indexed._add_image(registry, "team/first", [layer], [digests.of(gzip.decompress(layer))])
    assert image.digest
    async with running(tmp_path / "s", registry.host) as run, proxies(tmp_path, registry, run) as (proxy,):
        await proxy.get(f"/v2/team/first/blobs/{digests.of(layer)}")
        await run.index(f"{registry.host}/team/first:1")
        assert gets(registry, digests.of(layer)) == 1
        assert run.superpeer.statistics()["registry_bytes"] == 0, "first sight took nothing itself"


async def test_a_layer_that_is_here_as_a_tar_only_is_fetched_in_original_form_once_and_both_count(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    tar = tar_of(a=Random(3).randbytes(500_000))
    layer = gzip.compress(tar, mtime=0)
    indexed._add_image(registry, "team/first", [layer], [digests.of(tar)])
    indexing = IndexingConfig(chunk_size=CHUNK, keep_compressed=False)
    async with (
        running(tmp_path / "s", registry.host, indexing=indexing) as run,
        proxies(tmp_path, registry, run, 5) as made,
    ):
        await run.index(f"{registry.host}/team/first:1")
        before, held = gets(registry, digests.of(layer)), run.superpeer.store.statistics()["bytes"]
        answers = await asyncio.gather(*(proxy.get(f"/v2/team/first/blobs/{digests.of(layer)}") for proxy in made))
        assert {body for _, body in answers} == {layer}
        assert gets(registry, digests.of(layer)) - before == 1
        async with asyncio.timeout(20):
            while run.superpeer.store.statistics()["bytes"] - held < len(layer):  # once it is kept
                await asyncio.sleep(0.005)


async def test_a_registry_without_ranges_is_streamed_instead(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/lazy", tars, tmp_path)
    digest = digests.of(image.layers[0])
    async with (
        running(tmp_path / "s", registry.host, indexing=QUIET) as run,
        proxies(tmp_path, registry, run) as (proxy,),
    ):
        layer = (await run.index(image.reference)).layers[0]
        await run.superpeer.bring(layer.blob, range(50, 51))  # else the first request is for the whole
        registry.script(f"/blobs/{digest}", *[Fault(ignore_range=True)] * 20, method="GET")
        _, body = await proxy.get(f"/v2/team/lazy/blobs/{digest}")
        assert body == image.layers[0]
        assert "blob not assembled, fetched whole" in [row["kind"] for row in run.superpeer.fallbacks.statistics()]


async def test_a_seek_table_that_lies_cuts_the_pull_off_and_is_withdrawn(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    def lie(table: SeekTable) -> SeekTable:
        wrong = msgspec.structs.replace(table.compressed, digests=indexed.flipped(table.compressed.digests, 3))
        return msgspec.structs.replace(table, compressed=wrong)

    image = await indexed.add(registry, "team/lazy", tars, tmp_path, change_table=lie)
    digest = digests.of(image.layers[0])
    async with (
        running(tmp_path / "s", registry.host, indexing=QUIET) as run,
        proxies(tmp_path, registry, run) as (proxy,),
    ):
        await run.index(image.reference)
        with contextlib.suppress(aiohttp.ClientError):
            response, body = await proxy.get(f"/v2/team/lazy/blobs/{digest}")
            assert response.status != 200 or body == image.layers[0]
        _, body = await proxy.get(f"/v2/team/lazy/blobs/{digest}")
        assert body == image.layers[0], "the index was withdrawn: the layer is streamed"
        assert "index doubted, not used for a while" in [row["kind"] for row in run.superpeer.fallbacks.statistics()]


async def test_another_registrys_word_opens_nothing_through_a_superpeer(tmp_path: Path) -> None:
    good = {"Authorization": "Basic " + base64.b64encode(b"u:p").decode()}
    async with FakeRegistry(auth="basic", user="u", password="p") as private, FakeRegistry() as evil:
        private.add_image("team/secret", "1", [LAYER])
        evil.script("/blobs/", *[Fault(status=200, body=b"x" * len(LAYER))] * 20)
        async with running(tmp_path / "s", private.host) as run, proxies(tmp_path, private, run) as (proxy,):
            run.superpeer.registry._hosts._plain.append(("127.0.0.1", int(evil.host.rpartition(":")[2])))
            run.superpeer.registry._hosts._patterns += Hosts([evil.host])._patterns
            path = f"/v2/team/secret/blobs/{DIGEST}"
            assert (await proxy.get(path, headers=good))[1] == LAYER
            async with proxy.session.get(f"{proxy.url}/v2/evil/app/blobs/{DIGEST}?ns={evil.host}") as response:
                assert response.status == 200
                with pytest.raises(aiohttp.ClientError):
                    await response.content.readexactly(len(LAYER) + 1)
