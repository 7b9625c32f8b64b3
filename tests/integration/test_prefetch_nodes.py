"""Nodes that are asked to bring an image: they come for it, bring it in the background, and tell."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.fallbacks import Fallbacks
from dadi.index.image import ImageIndex
from dadi.node.demand import Demand
from dadi.node.warm import Warmer
from dadi.peers.superpeer import SuperpeerClient
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, NodeReport, Pin, Request, canonical, job_id
from superpeer.config import PrefetchConfig
from superpeer.jobs_nodes import JobNodes
from tests.contracts.store import content
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab.services import PLATFORM, Running, running, tar_of

TARS = [tar_of(**{f"file-{seed}": content(200_000, seed)}) for seed in range(2)]


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


class WarmNode:
    """A node without mounts."""

    def __init__(self, directory: Path, url: str, name: str, zone: str, limit: int, **of_client: Any) -> None:
        self.fallbacks = Fallbacks()
        self.client = SuperpeerClient([url], self.fallbacks, connect=1, read=10, **of_client)
        self.store = DiskBlobs(directory / name, limit=limit)
        self.chain = Chain(self.store, self.client.source, patience=5.0, fallbacks=self.fallbacks)
        self.expected: list[ImageIndex] = []
        self.warmer = Warmer(self.client, self.client, self.store, self.chain, Demand(), self.fallbacks,
                             place=lambda: (name, zone, ""), platform=PLATFORM,
                             expect=self.expected.append)  # fmt: skip

    async def close(self) -> None:
        await self.warmer.close()
        await self.chain.close()
        await self.client.close()
        await self.store.close()


@contextlib.asynccontextmanager
async def node(
    directory: Path, url: str, name: str, zone: str = "a", limit: int = 0, **of_client: Any
) -> AsyncIterator[WarmNode]:
    made = WarmNode(directory, url, name, zone, limit, **of_client)
    try:
        yield made
    finally:
        await made.close()


async def prefetched(run: Running, reference: str, **fields: Any) -> Job:
    prefetcher = run.superpeer.prefetch
    job = await prefetcher.submit(canonical(Request(reference, PLATFORM, **fields)))
    async for _ in prefetcher.follow(job.id):
        pass
    assert job.state is State.READY
    return job


@pytest.mark.parametrize("authorization", ["open", "registry"])
async def test_chosen_nodes_bring_the_image_once_and_without_the_registry(
    tmp_path: Path, registry: FakeRegistry, authorization: str
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with (
        running(tmp_path / "s", registry.host, authorization=authorization) as run,
        node(tmp_path, run.url, "one") as one,
        node(tmp_path, run.url, "other", "b") as other,
    ):
        await one.warmer.once()
        assert one.warmer.statistics() == {"warmed": 0, "bytes": 0, "pinned": 0}
        job = await prefetched(run, made.reference, nodes="zone=a")
        await run.who_may.check(job.pinned, None) if authorization == "registry" else None
        registry.script("", *[Fault(drop=True)] * 5000)
        await one.warmer.once()
        await other.warmer.once()
        (index,) = one.expected
        assert [blob for blob in (index.metadata, *index.device_blobs()) if await one.store.missing(blob)] == []
        assert other.expected == []
        assert job.nodes == {"ready": 1}
        before = one.warmer.statistics()["bytes"]
        await one.warmer.once()
        assert one.warmer.statistics() == {"warmed": 1, "bytes": before, "pinned": 0}


async def test_of_the_startup_scope_nodes_bring_what_the_trace_names(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with (
        running(tmp_path / "s", registry.host, authorization="open") as run,
        node(tmp_path, run.url, "one") as one,
    ):
        blob = (await run.index(made.reference)).layers[0].blob
        run.superpeer.prefetch.shares.startup_chunks = lambda record: {blob: [range(2, 4)]}
        await prefetched(run, made.reference, nodes="all", scope="startup")
        await one.warmer.once()
        (index,) = one.expected
        assert sorted(set(range(blob.table.count)) - set(await one.store.missing(blob))) == [2, 3]
        assert await one.store.missing(index.metadata) == []
        assert one.store.present_bytes(index.layers[1].blob) == 0


async def test_a_node_without_room_says_so(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with (
        running(tmp_path / "s", registry.host, authorization="open") as run,
        node(tmp_path, run.url, "small", limit=100_000) as small,
    ):
        job = await prefetched(run, made.reference, nodes="all")
        await small.warmer.once()
        assert job.nodes == {"failed": 1}
        assert [row["kind"] for row in small.fallbacks.statistics()] == ["prefetch failed"]
        assert small.warmer.statistics()["bytes"] == 0


async def test_who_has_no_token_hears_of_public_images_only(tmp_path: Path) -> None:
    async with (
        FakeRegistry(auth="basic", user="u", password="p") as private,
        running(tmp_path / "s", private.host, authorization="registry") as run,
        node(tmp_path, run.url, "one") as one,
    ):
        private.add_image("team/app", "1", TARS[:1])
        request = canonical(Request(f"{private.host}/team/app:1", PLATFORM, nodes="all"))
        job = await run.superpeer.prefetch.submit(request)
        job.state = State.READY
        assert await one.warmer._wanted() == []


def test_the_more_nodes_ask_the_later_they_are_to_come_again() -> None:
    now = 0.0
    asked = JobNodes(None, lambda: now)
    for _ in range(3):
        pauses = [asked.asked(f"node-{n}") for n in range(10_000)]
        now += pauses[-1]
    assert pauses[-1] == 200.0, "10,000 nodes, 50 questions a second"
    now += 10_000
    asked.asked("node-1")
    assert asked.asked("node-1") == 15.0


@pytest.mark.parametrize("state", [State.QUEUED, State.WARMING, State.FAILED])
def test_a_job_that_is_asked_for_again_keeps_its_pin_on_nodes(state: State) -> None:
    asked = JobNodes(None, lambda: 1000.0)
    request = canonical(Request("nginx", PLATFORM, nodes="all"))
    job = Job(id=job_id(request), request=request, state=state, pins=[Pin("sha256:" + "0" * 64, 2000.0)])
    assert asked.pinned([job], {job.id}) == (job.id,)
    job.pins = [Pin("sha256:" + "0" * 64, 999.0)]
    assert asked.pinned([job], {job.id}) == ()


async def test_what_is_pinned_is_kept_on_nodes_too_until_its_time_or_until_it_is_cancelled(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)

    def held(one: WarmNode) -> int:
        while one.store._space.evict_one() is not None:
            pass
        return len(one.store.digests())

    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        job = await prefetched(run, made.reference, nodes="all", pin_until=1e10)
        for _ in range(2):  # the second time as after a restart, which the superpeer has heard nothing of
            async with node(tmp_path, run.url, "one") as one:
                for _ in range(2):
                    await one.warmer.once()
                    assert one.warmer.statistics()["pinned"] == 1
                (index,) = one.expected
                assert held(one) == 1 + len(index.device_blobs())
                assert one.warmer.statistics()["warmed"] == 1, "what it says that it has it is not asked for again"
                now = one.warmer._clock
                one.warmer._clock = lambda: 2e10
                one.warmer._unpin([name for name, (until, _) in one.warmer._pins.items() if until <= 2e10])
                assert held(one) == 0
                one.warmer._clock = now
        async with node(tmp_path, run.url, "one") as one:
            await one.warmer.once()
            await run.superpeer.prefetch.cancel(job.id)
            await one.warmer.once()
            assert one.warmer.statistics()["pinned"] == 0
            assert held(one) == 0


async def test_nodes_keep_to_a_rate_of_their_own(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    now = 1e9

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    async with (
        running(tmp_path / "s", registry.host, authorization="open") as run,
        node(tmp_path, run.url, "one") as one,
    ):
        await prefetched(run, made.reference, nodes="all", node_rate=1000.0)
        one.warmer._clock, one.warmer._sleep = lambda: now, sleep
        await one.warmer.once()
        size = one.warmer.statistics()["bytes"]
        assert size >= sum(map(len, TARS))
        assert now - 1e9 >= size / 1000 - 2


async def test_without_a_trace_nodes_bring_all_of_an_image(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with (
        running(tmp_path / "s", registry.host, authorization="open") as run,
        node(tmp_path, run.url, "one") as one,
    ):
        await prefetched(run, made.reference, nodes="all", scope="startup")
        await one.warmer.once()
        (index,) = one.expected
        assert [blob for blob in (index.metadata, *index.device_blobs()) if await one.store.missing(blob)] == []


async def test_nodes_are_told_of_the_image_that_was_brought_though_the_tag_has_moved(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with running(tmp_path / "s", registry.host, authorization="open", tag_ttl=0.0) as run:
        blob = (await run.index(made.reference)).layers[0].blob
        looked: list[str] = []

        def chunks(record: Any) -> Any:
            looked.append(record.manifest_digest)
            return {blob: [range(2, 4)]}

        run.superpeer.prefetch.shares.startup_chunks = chunks
        job = await prefetched(run, made.reference, nodes="all", scope="startup")
        registry.add_image("team/app", "1", TARS[1:])
        await run.index(made.reference)
        looked.clear()
        nodes = run.superpeer.prefetch.nodes
        for _ in range(100):
            (wish,) = nodes.wishes([job], "one", "", "")
        assert wish.chunks == {blob.digest: ((2, 4),)}
        assert looked == [job.manifest_digest], "once, however many nodes ask"


async def test_what_nodes_and_siblings_were_told_of_jobs_is_forgotten_with_them(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    images = [await indexed.add(registry, f"team/app{number}", TARS[:1], tmp_path) for number in range(4)]
    config = PrefetchConfig(most_jobs=2)
    async with running(tmp_path / "s", registry.host, authorization="open", prefetch=config) as run:
        prefetch = run.superpeer.prefetch
        for made in images:
            job = await prefetched(run, made.reference, nodes="all")
            prefetch.nodes.hear(job, NodeReport("one", "ready"))
            prefetch.nodes.wishes([job], "two", "", "")
        left = {each.id for each in prefetch.jobs()}
        assert len(left) == 2
        assert set(prefetch.nodes._told) == set(prefetch.nodes._wishes) == left
        clock = prefetch.clock
        prefetch.clock = lambda: clock() + 2 * 86400
        prefetch.sweep()
        assert (prefetch.nodes._told, prefetch.nodes._wishes, prefetch.telling._tasks) == ({}, {}, {})
        assert job.nodes == {"ready": 1}, "the count stays"
