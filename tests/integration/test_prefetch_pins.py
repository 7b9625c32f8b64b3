"""Pinned images: nothing that their start needs is evicted until the time has come, whatever happens meanwhile."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dadi.errors import Conflict
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Request, canonical
from superpeer.jobs_ready import small
from tests.contracts.store import content
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab.datacenter import a_node
from tests.lab.services import PLATFORM, Running, running, tar_of

TARS = [tar_of(**{f"file-{seed}": content(100_000, seed)}) for seed in range(2)]
AWAY = [Fault(drop=True)] * 5000
LATER = 1e10


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


async def prefetched(run: Running, reference: str, **fields: Any) -> Job:
    """Return the job, when it is over."""
    job = await run.superpeer.prefetch.submit(canonical(Request(reference, PLATFORM, **fields)))
    async for _ in run.superpeer.prefetch.follow(job.id):
        pass
    return job


def evict_all(run: Running) -> None:
    """Have the store throw away whatever nobody holds."""
    while run.superpeer.store._space.evict_one() is not None:
        pass


async def starts_without_the_registry(run: Running, reference: str) -> list[bytes]:
    async with a_node(run.url) as node:
        index = await node.index(reference)
        await node.small(index)
        return await node.read(index)


async def test_a_pinned_image_outlives_a_moved_tag_and_a_restart(tmp_path: Path, registry: FakeRegistry) -> None:
    old = await indexed.add(registry, "team/app", TARS[:1], tmp_path)
    async with running(tmp_path / "s", registry.host, authorization="open", tag_ttl=0.0) as run:
        job = await prefetched(run, old.reference, pin_until=LATER)
        assert job.state is State.READY
        pinned = str(job.pinned)
        registry.add_image("team/app", "1", TARS[1:])
        await run.index(old.reference)  # the tag has moved, and the superpeer knows
        assert run.superpeer.catalog.find(old.reference, PLATFORM).manifest_digest != job.manifest_digest
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        assert run.superpeer.prefetch.statistics()["pinned"] == 1
        evict_all(run)
        registry.script("", *AWAY)
        assert await starts_without_the_registry(run, pinned) == TARS[:1]


@pytest.mark.parametrize("after", ["ready again", "failed", "moved"])
async def test_who_asks_again_without_a_time_leaves_the_pin(
    tmp_path: Path, registry: FakeRegistry, after: str
) -> None:
    made = await indexed.add(registry, "team/app", TARS[:1], tmp_path)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        first = await prefetched(run, made.reference, pin_until=LATER)
        pinned, first_manifest = str(first.pinned), first.manifest_digest
        if after == "failed":
            registry.script("/manifests/1", *[Fault(status=404)] * 100)
        if after == "moved":
            registry.add_image("team/app", "1", TARS[1:])
        again = await prefetched(run, made.reference)
        assert again.state is (State.FAILED if after == "failed" else State.READY)
        assert [pin.manifest for pin in again.pins] == [first_manifest], "what it is now nobody asked to pin"
        evict_all(run)
        registry.script("", *AWAY)
        assert await starts_without_the_registry(run, pinned) == TARS[:1]


async def test_all_that_a_start_needs_is_kept_and_the_compressed_forms_too(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        job = await prefetched(run, made.reference, pin_until=LATER)
        record = run.superpeer.catalog.find(made.reference, PLATFORM)
        index = run.superpeer.catalog.image(record)
        packed = [layer.layer_digest for layer in index.layers]
        wanted = {*small(record, index), *(layer.diff_id for layer in index.layers), *packed}
        for each in run.superpeer.catalog.records():
            await run.superpeer.catalog.forget(each)  # what the catalog holds it lets go of
        evict_all(run)
        assert wanted <= set(run.superpeer.store.digests())
        run.superpeer.prefetch.pins.drop(job)
        async with asyncio.timeout(20):
            while run.superpeer.store.digests():  # a layer that is being completed just now is in use till then
                evict_all(run)
                await asyncio.sleep(0.01)


async def test_the_record_of_a_pinned_image_is_not_pushed_out_by_those_of_others(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    made = await indexed.add(registry, "team/app", TARS[:1], tmp_path)
    others = [f"{registry.host}/team/other:{number}" for number in range(4)]
    for number in range(4):
        registry.add_image("team/other", str(number), [tar_of(name=content(1000, number))])
    async with running(tmp_path / "s", registry.host, authorization="open", most_images=2) as run:
        await prefetched(run, made.reference, pin_until=LATER)
        for other in others:
            await run.index(other)
        records = [record.reference for record in run.superpeer.catalog.records()]
        assert made.reference in records
        assert others[-1] in records
        assert len(records) == 3, "the pinned one stands there by its tag and by its digest"
        registry.script("", *AWAY)
        assert await starts_without_the_registry(run, made.reference) == TARS[:1]


async def test_a_pin_ends_by_itself_and_by_cancel(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS[:1], tmp_path)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        prefetch = run.superpeer.prefetch
        clock = prefetch.clock
        job = await prefetched(run, made.reference, pin_until=clock() + 1000)
        prefetch.sweep()
        assert prefetch.statistics()["pinned"] == 1
        cancelled = await prefetch.cancel(job.id)
        assert (cancelled.state, cancelled.pins, cancelled.request.pin_until) == (State.READY, [], 0.0)
        assert prefetch.statistics()["pinned"] == 0
        with pytest.raises(Conflict):
            await prefetch.cancel(job.id)
        job = await prefetched(run, made.reference, pin_until=clock() + 1000)
        prefetch.clock = lambda: clock() + 2000
        prefetch.sweep()
        assert prefetch.statistics()["pinned"] == 0
        assert job.pins == []


async def test_cancelling_a_run_that_waits_leaves_what_was_pinned_before(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    made = await indexed.add(registry, "team/app", TARS[:1], tmp_path)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        prefetch = run.superpeer.prefetch
        job = await prefetched(run, made.reference, pin_until=LATER)
        await prefetch.submit(canonical(Request(made.reference, PLATFORM, at=LATER)))
        cancelled = await prefetch.cancel(job.id)
        assert cancelled.state is State.CANCELLED
        assert (len(cancelled.pins), prefetch.statistics()["pinned"]) == (1, 1)
        await prefetch.cancel(job.id)
        assert prefetch.statistics()["pinned"] == 0


async def test_a_pin_that_is_over_before_the_job_is_said(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS[:1], tmp_path)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        job = await prefetched(run, made.reference, pin_until=1.0)
        assert (job.state, job.pins) == (State.READY, [])
        assert job.notes == ["its pin was over before it was ready: it is not kept"]
