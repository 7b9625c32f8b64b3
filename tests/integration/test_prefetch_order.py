"""Who goes first: a prefetch job makes way for programs that wait, in the queue, at its rate, and for its slots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi import digest as digests
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Request, canonical
from dadi.prefetch.rate import Bucket
from superpeer.jobs_pace import Pace, Slots
from tests.contracts.store import content
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab.datacenter import a_node
from tests.lab.services import PLATFORM, Running, running, tar_of


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


def a_tar(seed: int, size: int = 600_000) -> bytes:
    return tar_of(**{f"file-{seed}": content(size, seed)})


async def begin(run: Running, reference: str, **fields: float) -> Job:
    return await run.superpeer.prefetch.submit(canonical(Request(reference, PLATFORM, **fields)))


async def until(job: Job, state: State) -> None:
    async with asyncio.timeout(20):
        while job.state is not state:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("named", ["by tag", "by digest"])
async def test_who_starts_an_image_that_is_streamed_slowly_for_a_job_has_it_at_full_speed(
    tmp_path: Path, registry: FakeRegistry, named: str
) -> None:
    tars = [a_tar(1), a_tar(2)]
    registry.add_image("team/app", "1", tars)
    reference = f"{registry.host}/team/app:1"
    async with running(tmp_path, registry.host, authorization="open") as run:
        job = await begin(run, reference, rate=2000.0)
        await until(job, State.INDEXING)
        async with asyncio.timeout(20):
            while not registry.asked("/blobs/", "GET"):
                await asyncio.sleep(0.01)
        async with asyncio.timeout(20), a_node(run.url) as node:  # at the job's pace it would be 10 minutes
            index = await node.index(reference if named == "by tag" else str(job.pinned))
            assert await node.read(index) == tars
        assert [len(registry.asked(f"/blobs/{layer.layer_digest}", "GET")) for layer in index.layers] == [1, 1]
        await until(job, State.READY)


async def test_layers_of_jobs_take_no_slot_that_a_program_waits_for(tmp_path: Path, registry: FakeRegistry) -> None:
    for number in range(3):
        registry.add_image(f"team/job{number}", "1", [a_tar(10 + number), a_tar(20 + number)])
    registry.add_image("team/app", "1", [a_tar(1)])
    async with running(tmp_path, registry.host, authorization="open") as run:
        jobs = [await begin(run, f"{registry.host}/team/job{number}:1", rate=1000.0) for number in range(3)]
        for job in jobs:
            await until(job, State.INDEXING)
        async with asyncio.timeout(20), a_node(run.url) as node:
            index = await node.index(f"{registry.host}/team/app:1")
            assert await node.read(index) == [a_tar(1)]
        assert {job.state for job in jobs} == {State.INDEXING}


async def test_a_read_finds_its_way_past_a_job_that_fetches_ranges(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", [a_tar(1)], tmp_path)
    other = await indexed.add(registry, "team/other", [a_tar(2)], tmp_path)
    async with running(tmp_path, registry.host, authorization="open") as run:
        job = await begin(run, made.reference, rate=10.0)
        await until(job, State.WARMING)
        for reference in (made.reference, other.reference):
            async with asyncio.timeout(20), a_node(run.url) as node:
                index = await node.index(reference)
                assert await node.read(index) == [a_tar(1 if reference == made.reference else 2)]
        assert run.superpeer.demands == 0


async def test_a_job_that_streams_slowly_holds_up_no_other(tmp_path: Path, registry: FakeRegistry) -> None:
    for number in range(6):
        registry.add_image(f"team/slow{number}", "1", [a_tar(10 + number), a_tar(20 + number)])
    registry.add_image("team/app", "1", [a_tar(1)])
    made = await indexed.add(registry, "team/indexed", [a_tar(2)], tmp_path)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        slow = [await begin(run, f"{registry.host}/team/slow{number}:1", rate=1000.0) for number in range(6)]
        for job in slow:
            await until(job, State.INDEXING)
        await until(await begin(run, f"{registry.host}/team/app:1"), State.READY)
        await until(await begin(run, made.reference), State.READY)
        assert {job.state for job in slow} == {State.INDEXING}


async def under_way(registry: FakeRegistry, run: Running) -> None:
    async with asyncio.timeout(20):
        while not registry.asked("/blobs/", "GET") or not run.superpeer.origin._passes:
            await asyncio.sleep(0.01)


async def idle(run: Running) -> None:
    """Wait until nothing is streamed any more."""
    async with asyncio.timeout(20):
        while run.superpeer.origin._passes or run.superpeer.resolver._under_way:
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("how", ["paced", "hanging"])
async def test_what_a_cancelled_job_streams_is_broken_off(tmp_path: Path, registry: FakeRegistry, how: str) -> None:
    registry.add_image("team/app", "1", [a_tar(1), a_tar(2)])
    if how == "hanging":
        for seed in (1, 2):
            layer = f"/blobs/{digests.of(a_tar(seed))}"
            registry.script(layer, *[Fault(stall_after=100_000)] * 20, method="GET")
    async with running(tmp_path, registry.host, authorization="open") as run:
        job = await begin(run, f"{registry.host}/team/app:1", rate=2000.0 if how == "paced" else 0.0)
        await until(job, State.INDEXING)
        await under_way(registry, run)
        await run.superpeer.prefetch.cancel(job.id)
        await idle(run)
        assert run.superpeer.origin.layers == 0


@pytest.mark.parametrize("who", ["a node", "another job"])
async def test_what_somebody_else_wants_too_goes_on(tmp_path: Path, registry: FakeRegistry, who: str) -> None:
    tar, gate = a_tar(1), asyncio.Event()
    registry.add_image("team/app", "1", [tar])
    layer = f"/blobs/{digests.of(tar)}"
    registry.script(layer, Fault(gate=gate), method="GET")
    reference = f"{registry.host}/team/app:1"
    async with running(tmp_path, registry.host, authorization="open") as run:
        job = await begin(run, reference)
        await until(job, State.INDEXING)
        async with asyncio.timeout(20):
            while not registry.asked(layer, "GET"):
                await asyncio.sleep(0.01)
        (resolving,) = run.superpeer.resolver._under_way.values()
        assert resolving.pace is not None
        if who == "a node":
            other: asyncio.Task[object] = asyncio.create_task(run.index(reference))
        else:
            request = canonical(Request(reference, PLATFORM, scope="startup"))
            other = asyncio.create_task(until(await run.superpeer.prefetch.submit(request), State.READY))
        async with asyncio.timeout(20):
            while len(resolving.pace._of) < 2 and run.superpeer.origin._paces:
                await asyncio.sleep(0.01)
        await run.superpeer.prefetch.cancel(job.id)
        gate.set()
        await asyncio.wait_for(other, 20)
        assert len(registry.asked(layer, "GET")) == 1


async def test_jobs_of_a_higher_priority_go_first() -> None:
    slots = Slots(1)
    order: list[str] = []

    async def one(name: str, priority: int) -> None:
        async with slots.held(priority):
            order.append(name)
            await asyncio.sleep(0)

    async with slots.held(5):
        wanted = (("a", 5), ("b", 9), ("c", 0), ("d", 9))
        tasks = [asyncio.create_task(one(name, priority)) for name, priority in wanted]
        await asyncio.sleep(0)
        gone = asyncio.create_task(one("gone", 9))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert order == ["b", "d", "a", "c"]
    async with asyncio.timeout(1), slots.held(0):
        pass


async def test_what_lifts_a_part_of_a_job_leaves_the_rest_its_pace() -> None:
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    whole = Pace([Bucket(10.0, 0.0)], clock=lambda: now, sleep=sleep)
    part = whole.part()
    part.lift()
    await part.take(1000)
    assert now == 0.0
    await whole.take(105)
    assert now == pytest.approx(10.0)
    whole.lift()
    await whole.part().take(10_000)
    assert now == pytest.approx(10.0)


async def test_who_waits_at_a_rate_that_is_raised_waits_no_longer_than_at_that(tmp_path: Path) -> None:
    now, bucket = 0.0, Bucket(10.0, 0.0, burst=0.0)

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if now == 1.0:
            bucket.change(1000.0, now)

    await Pace([bucket], clock=lambda: now, sleep=sleep).take(10_010)
    assert now == pytest.approx(11.0)


async def test_a_step_makes_way_for_reads_that_somebody_waits_for_and_not_for_ever() -> None:
    slept: list[float] = []
    busy = [True] * 3

    async def sleep(seconds: float) -> None:
        slept.append(seconds)
        if busy:
            busy.pop()

    pace = Pace(clock=lambda: 0.0, sleep=sleep, busy=lambda: bool(busy))
    await pace.take(1)
    assert len(slept) == 3
    slept.clear()
    await Pace(clock=lambda: 0.0, sleep=sleep, busy=lambda: True).take(1)
    assert sum(slept) == pytest.approx(1.0, abs=0.1)
