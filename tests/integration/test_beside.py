"""Layers that are indexed on first sight and pulled plainly, before, meanwhile or afterwards: one copy, if it fits."""

from __future__ import annotations

import asyncio
import gzip
import json
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from random import Random

import aiohttp
import pytest

from dadi import digest as digests
from dadi.errors import Malformed, NotFound
from dadi.oci.credentials import Credentials
from dadi.prefetch.life import State
from dadi.prefetch.messages import Request, canonical
from superpeer.config import IndexingConfig
from superpeer.shown_layers import Layer
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, Fault, status
from tests.lab.proxies import proxied
from tests.lab.services import CHUNK, PLATFORM, Running, running, tar_of

TAR = tar_of(a=Random(3).randbytes(600_000), zeros=bytes(600_000))
LAYER = gzip.compress(TAR, mtime=0)
DIGEST, DIFF_ID = digests.of(LAYER), digests.of(TAR)
PATH = f"/v2/team/first/blobs/{DIGEST}"
LIMIT = 6 * len(LAYER)
NOT_KEPT = "compressed layer not kept, no room"


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        indexed._add_image(fake, "team/first", [LAYER], [DIFF_ID])
        yield fake


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


def sent(registry: FakeRegistry) -> int:
    """Return how many times the registry was asked for the layer's bytes."""
    return len(registry.asked(f"/blobs/{DIGEST}", "GET"))


def kinds(run: Running) -> list[str]:
    return [row["kind"] for row in run.superpeer.fallbacks.statistics()]


def incoming(run: Running) -> list[Path]:
    return list((run.superpeer.store.root / "incoming").iterdir())


def image(registry: FakeRegistry) -> str:
    return f"{registry.host}/team/first:1"


async def hold_back(registry: FakeRegistry, run: Running) -> tuple[asyncio.Event, asyncio.Task[object]]:
    """Begin to index; return what lets the registry go on, and the index that is to come."""
    gate = asyncio.Event()
    registry.script(f"/blobs/{DIGEST}", Fault(gate=gate), method="GET")
    index = asyncio.create_task(run.index(image(registry)))
    await until(lambda: sent(registry))
    return gate, index


async def fill(run: Running, size: int, seed: int) -> str:
    return (await run.superpeer.store.put(Random(seed).randbytes(size))).digest


async def test_a_plain_pull_after_the_index_was_made_costs_the_registry_nothing(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "s", registry.host) as run:
        await run.index(image(registry))
        await until(lambda: run.superpeer.store.has(DIGEST))
        assert (run.superpeer.origin.bytes, run.superpeer.originals.intake.bytes) == (len(LAYER), 0), "counted once"
        async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as proxy:
            assert (await proxy.get(PATH))[1] == LAYER
        assert sent(registry) == 1
        assert kinds(run) == []
    async with running(tmp_path / "s", registry.host) as run:
        assert await run.superpeer.store.get(DIGEST) == LAYER
        assert incoming(run) == []


async def test_plain_pulls_while_the_index_is_made_get_the_same_bytes_and_it_is_kept_for_them(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "s", registry.host, limit=LIMIT) as run:
        old = [await fill(run, 700_000, seed) for seed in range(4)]
        gate, index = await hold_back(registry, run)
        async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as one:
            async with proxied(tmp_path / "q", registry.host, superpeers=(run.url,)) as other:
                pulls = [asyncio.create_task(proxy.get(PATH)) for proxy in (one, other)]
                await until(lambda: run.superpeer.originals.intake.statistics()["readers"] >= 2)
                gate.set()
                assert [(await pull)[1] for pull in pulls] == [LAYER, LAYER]
        await index
        assert sent(registry) == 1
        assert run.superpeer.store.has(DIFF_ID)
        assert run.superpeer.store.has(DIGEST)
        assert not all(run.superpeer.store.has(digest) for digest in old)


async def test_what_nobody_asked_for_takes_nobodys_place(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host, limit=LIMIT) as run:
        old = await fill(run, LIMIT - len(TAR) - 200_000, 1)
        gate, index = await hold_back(registry, run)
        assert run.superpeer.originals.intake.arriving(DIGEST) is not None, "it does come by"
        gate.set()
        await index
        await until(lambda: not run.superpeer.originals.intake.busy)
        assert run.superpeer.store.has(DIFF_ID)
        assert run.superpeer.store.has(old)
        assert not run.superpeer.store.has(DIGEST)
        assert incoming(run) == []
        assert kinds(run) == []
        async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as proxy:
            assert (await proxy.get(PATH))[1] == LAYER, "and it is not taken for one that has no room"
        assert sent(registry) == 2
        assert kinds(run) == []


async def test_what_nobody_asked_for_is_the_first_to_go(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host, limit=LIMIT) as run:
        old = await fill(run, LIMIT - len(TAR) - len(LAYER) - 200_000, 1)
        await run.index(image(registry))
        await until(lambda: run.superpeer.store.has(DIGEST))
    async with running(tmp_path / "s", registry.host, limit=LIMIT) as run:
        assert run.superpeer.store.has(DIGEST)
        await fill(run, 300_000, 2)
        assert [run.superpeer.store.has(each) for each in (DIGEST, old, DIFF_ID)] == [False, True, True]


async def test_without_the_option_only_the_tar_is_kept(tmp_path: Path, registry: FakeRegistry) -> None:
    indexing = IndexingConfig(chunk_size=CHUNK, keep_compressed=False)
    async with running(tmp_path / "s", registry.host, indexing=indexing) as run:
        await run.index(image(registry))
        assert not run.superpeer.originals.intake.busy
        assert not run.superpeer.store.has(DIGEST)


async def test_a_layer_that_cannot_be_indexed_is_given_to_plain_pulls_all_the_same(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    layer = gzip.compress(b"no tar" * 10_000, mtime=0)
    digest = digests.of(layer)
    indexed._add_image(registry, "team/bad", [layer], [digests.of(b"no tar" * 10_000)])
    async with running(tmp_path / "s", registry.host) as run:
        with pytest.raises(Malformed):
            await run.index(f"{registry.host}/team/bad:1")
        async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as proxy:
            assert (await proxy.get(f"/v2/team/bad/blobs/{digest}"))[1] == layer


async def test_wrong_bytes_are_given_to_nobody_and_fetched_again(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run:
        gate = asyncio.Event()
        registry.script(f"/blobs/{DIGEST}", Fault(gate=gate, flip=1000), method="GET")
        index = asyncio.create_task(run.index(image(registry)))
        await until(lambda: sent(registry))
        async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as proxy:
            pull = asyncio.create_task(proxy.get(PATH))
            await until(lambda: run.superpeer.originals.intake.statistics()["readers"] >= 2)
            gate.set()
            (got,) = await asyncio.gather(pull, return_exceptions=True)
            assert isinstance(got, aiohttp.ClientPayloadError) or got[1] == LAYER, "cut, or right"
            assert (await proxy.get(PATH))[1] == LAYER
        await index
        assert await run.superpeer.store.get(DIFF_ID) == TAR
        assert "wrong layer, asked the registry itself again" in kinds(run)


async def test_a_job_that_takes_its_time_hurries_when_somebody_pulls_its_layer(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        request = canonical(Request(image(registry), PLATFORM, scope="all", rate=1000.0))
        job = await run.superpeer.prefetch.submit(request)
        await until(lambda: sent(registry))
        async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as proxy:
            async with asyncio.timeout(30):  # it would take ten minutes
                assert (await proxy.get(PATH))[1] == LAYER
                await until(lambda: run.superpeer.store.has(DIFF_ID))
        assert sent(registry) == 1
        assert job.state is not State.FAILED


@pytest.mark.parametrize("pulled", [False, True])
async def test_a_job_that_is_cancelled_leaves_nothing_unless_somebody_pulls_the_layer(
    tmp_path: Path, registry: FakeRegistry, pulled: bool
) -> None:
    gate = asyncio.Event()
    registry.script(f"/blobs/{DIGEST}", Fault(gate=gate), method="GET")
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        job = await run.superpeer.prefetch.submit(canonical(Request(image(registry), PLATFORM, scope="all")))
        await until(lambda: sent(registry))
        async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as proxy:
            pull = asyncio.create_task(proxy.get(PATH))
            if pulled:
                await until(lambda: run.superpeer.originals.intake.statistics()["readers"] >= 2)
            else:
                pull.cancel()
            await run.superpeer.prefetch.cancel(job.id)
            if pulled:
                gate.set()
                assert (await pull)[1] == LAYER
                assert sent(registry) == 1
            else:
                await until(lambda: not run.superpeer.originals.intake.busy)
                assert incoming(run) == []


async def test_a_stop_in_the_middle_breaks_it_off(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run:
        _, index = await hold_back(registry, run)
        index.cancel()
    assert list((tmp_path / "s" / "store" / "incoming").iterdir()) == []


async def test_who_may_not_read_the_repository_gets_nothing_of_what_comes_by(tmp_path: Path) -> None:
    async with FakeRegistry(auth="basic", user="me", password="secret") as registry:
        indexed._add_image(registry, "team/first", [LAYER], [DIFF_ID])
        basic = Credentials("me", "secret").basic
        own = tmp_path / "config.json"
        own.write_text(json.dumps({"auths": {registry.host: {"auth": basic.removeprefix("Basic ")}}}))
        gate = asyncio.Event()
        registry.script(f"/blobs/{DIGEST}", Fault(gate=gate), method="GET")
        async with running(tmp_path / "s", registry.host, docker_config=own) as run:
            made = run.superpeer.resolve(image(registry), PLATFORM).task
            await until(lambda: sent(registry))
            async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as proxy:
                assert (await proxy.get(PATH))[0].status == 401
                assert (await proxy.get(PATH, headers={"Authorization": "Basic bm9ib2R5Ong="}))[0].status == 401
                pull = asyncio.create_task(proxy.get(PATH, headers={"Authorization": basic}))
                await until(lambda: run.superpeer.originals.intake.statistics()["readers"] >= 2)
                gate.set()
                assert (await pull)[1] == LAYER
                await made
                assert (await proxy.get(PATH))[0].status == 401
        assert sent(registry) == 1


@pytest.mark.parametrize("other", ["first", "other"])
async def test_what_was_gone_on_with_for_a_plain_pull_is_no_proof_of_the_images_repository(
    tmp_path: Path, other: str
) -> None:
    async with FakeRegistry(auth="bearer", user="me", password="secret") as registry:
        for name in ("first", "other"):
            indexed._add_image(registry, f"team/{name}", [LAYER], [DIFF_ID])
        registry.tokens.add("a")
        own = tmp_path / "config.json"
        basic = Credentials("me", "secret").basic.removeprefix("Basic ")
        own.write_text(json.dumps({"auths": {registry.host: {"auth": basic}}}))
        gate = asyncio.Event()
        # The superpeer's own credentials are refused, twice: the token may have run out.
        registry.script(f"team/first/blobs/{DIGEST}", Fault(gate=gate, status=403), Fault(status=403), method="GET")
        async with running(tmp_path / "s", registry.host, docker_config=own) as run:
            made = run.superpeer.resolve(image(registry), PLATFORM).task
            await until(lambda: registry.asked(f"team/first/blobs/{DIGEST}", "GET"))
            async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as proxy:
                path = f"/v2/team/{other}/blobs/{DIGEST}"
                pull = asyncio.create_task(proxy.get(path, headers={"Authorization": "Bearer a"}))
                await until(lambda: run.superpeer.originals.intake.statistics()["readers"] >= 2)
                gate.set()
                assert (await pull)[1] == LAYER
            await made
            proof = run.superpeer.shown.proof(Layer(f"{registry.host}/team/first", DIGEST, DIFF_ID))
            assert (proof is not None) == (other == "first")


async def test_a_layer_that_is_here_is_indexed_only_for_a_repository_that_has_it(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    """Whoever knows a digest can name it in an image of his own."""
    indexed._add_image(registry, "team/other", [LAYER], [DIFF_ID])
    async with running(tmp_path / "s", registry.host) as run:
        async with proxied(tmp_path / "p", registry.host, superpeers=(run.url,)) as proxy:
            assert (await proxy.get(f"/v2/team/other/blobs/{DIGEST}"))[1] == LAYER
        registry.script(f"team/first/blobs/{DIGEST}", *[status(404)] * 5)
        with pytest.raises(NotFound):
            await run.index(image(registry))
        assert run.superpeer.catalog.records() == []
        assert not run.superpeer.store.has(DIFF_ID)
    assert registry.asked(f"team/first/blobs/{DIGEST}", "GET") == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    directory.mkdir()
    size = (len(TAR) + len(LAYER) // 2) // 4096 * 4096
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.root
async def test_a_disk_that_has_no_room_for_both_forms_has_the_index_made_all_the_same(
    small_disk: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superpeer.beside._UNPACKED", 1)  # so that it is found out in the middle only
    async with running(small_disk / "s", registry.host) as run:
        await run.index(image(registry))
        assert await run.superpeer.store.get(DIFF_ID) == TAR
        assert not run.superpeer.store.has(DIGEST)
        assert NOT_KEPT in kinds(run)
