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
from dadi.prefetch.messages import Job, Request, canonical
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

    def __init__(self, directory: Path, url: str, name: str, zone: str, limit: int) -> None:
        self.fallbacks = Fallbacks()
        self.client = SuperpeerClient([url], self.fallbacks, connect=1, read=10)
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
async def node(directory: Path, url: str, name: str, zone: str = "a", limit: int = 0) -> AsyncIterator[WarmNode]:
    made = WarmNode(directory, url, name, zone, limit)
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
        assert one.warmer.statistics() == {"warmed": 0, "bytes": 0}
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
        assert one.warmer.statistics() == {"warmed": 1, "bytes": before}


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
    asked = JobNodes(None, lambda: now)  # type: ignore[arg-type]
    for _ in range(3):
        pauses = [asked.asked(f"node-{n}") for n in range(10_000)]
        now += pauses[-1]
    assert pauses[-1] == 200.0, "10,000 nodes, 50 questions a second"
    now += 10_000
    asked.asked("node-1")
    assert asked.asked("node-1") == 15.0
