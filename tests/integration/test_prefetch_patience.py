"""A job whose registry is away: tried again until its deadline, which it says; and what a restart does to it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dadi.errors import Unavailable
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Request, canonical
from superpeer.config import PrefetchConfig
from tests.contracts.store import content
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab.datacenter import datacenter, layers_owned_by_both
from tests.lab.prefetch_command import dadi
from tests.lab.services import PLATFORM, Running, running, tar_of

TARS = [tar_of(**{f"file-{seed}": content(100_000, seed)}) for seed in range(2)]


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


class Time:
    """A superpeer's time: passes when a job sleeps, and no sooner than `until`."""

    def __init__(self, run: Running) -> None:
        self.now = 1e9
        self.slept: list[float] = []
        self.on_sleep = lambda: None
        run.superpeer.prefetch.clock, run.superpeer.prefetch.sleep = lambda: self.now, self.sleep

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        self.on_sleep()
        await asyncio.sleep(0)


async def over(run: Running, reference: str, **fields: Any) -> Job:
    job = await run.superpeer.prefetch.submit(canonical(Request(reference, PLATFORM, **fields)))
    async with asyncio.timeout(30):
        while not job.state.is_over:
            await asyncio.sleep(0.01)
    return job


async def test_it_is_tried_until_its_deadline_at_growing_intervals_and_says_so(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    registry.script("", *[Fault(drop=True)] * 5000)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        time, said = Time(run), []
        time.on_sleep = lambda: said.extend(job.stage for job in run.superpeer.prefetch.jobs())
        job = await over(run, made.reference, deadline=time.now + 3600)
        assert job.state is State.FAILED
        assert isinstance(job.failure(), Unavailable)
        assert time.now == pytest.approx(1e9 + 3600, abs=1)
        assert time.slept[:4] == [2, 4, 8, 16]
        assert max(time.slept) == 300
        assert said[0].startswith("try 2 in 2 s, until ")


@pytest.mark.parametrize("kind", ["at", "keep_trying"])
async def test_without_a_deadline_for_so_long_from_its_beginning(
    tmp_path: Path, registry: FakeRegistry, kind: str
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    registry.script("", *[Fault(drop=True)] * 5000)
    config = PrefetchConfig(keep_trying=600.0)
    async with running(tmp_path / "s", registry.host, authorization="open", prefetch=config) as run:
        time = Time(run)
        at = time.now + 7200 if kind == "at" else 0.0
        job = await over(run, made.reference, at=at)
        assert job.state is State.FAILED
        assert time.now == pytest.approx(max(at, 1e9) + 600, abs=1)


async def test_a_registry_that_is_back_in_time_is_enough(tmp_path: Path, registry: FakeRegistry) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    registry.script("", *[Fault(drop=True)] * 5000)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        time = Time(run)
        time.on_sleep = lambda: registry._script.clear() if time.now > 1e9 + 3000 else None
        job = await over(run, made.reference, deadline=time.now + 7200)
        assert (job.state, job.error) == (State.READY, None)
        assert job.tries > 8


async def test_a_deadline_that_cannot_be_met_when_the_registry_is_back_is_said_and_it_is_brought_all_the_same(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    registry.script("", *[Fault(drop=True)] * 5000)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        time = Time(run)
        time.on_sleep = lambda: registry._script.clear() if time.now > 1e9 + 3000 else None
        job = await over(run, made.reference, deadline=time.now + 3600, rate=sum(map(len, made.layers)) / 1000)
        assert (job.state, job.error) == (State.READY, None)
        said, late = job.notes
        assert "until the deadline (--rate " in said
        assert late == "done after its deadline"


@pytest.mark.parametrize("how", ["asked for again", "retried"])
async def test_a_job_that_waits_for_its_next_try_is_tried_at_once_when_somebody_asks(
    tmp_path: Path, registry: FakeRegistry, how: str
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    registry.script("", *[Fault(drop=True)] * 5000)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        prefetch = run.superpeer.prefetch
        never = asyncio.Event()

        async def sleep(seconds: float) -> None:
            await never.wait()

        prefetch.sleep = sleep
        request = canonical(Request(made.reference, PLATFORM))
        job = await prefetch.submit(request)
        async with asyncio.timeout(30):
            while not job.stage.startswith("try 2 in"):
                await asyncio.sleep(0.01)
        registry._script.clear()
        told = msgspec.structs.replace(request, manifest=f"sha256:{'0' * 64}")
        await prefetch.submit(told)  # by a sibling
        assert repr(prefetch.tries) == "Tries(1 wait)"
        about = (made.reference, "--platform", PLATFORM, "--superpeer", run.url)
        again = await dadi(*about) if how == "asked for again" else await dadi("retry", *about)
        assert again.exit_code == 0, again.output
        async with asyncio.timeout(20):
            while job.state is not State.READY:
                await asyncio.sleep(0.01)


async def test_who_does_not_wait_is_told_that_it_is_tried_again(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.script("", *[Fault(drop=True)] * 5000)
    async with running(tmp_path / "s", registry.host, authorization="open") as run:
        about = (f"{registry.host}/team/app:1", "--platform", PLATFORM, "--superpeer", run.url)
        detached = await dadi(*about, "--detach")
        assert detached.exit_code == 0, detached.output
        shown = await dadi("status", *about)
        assert "try 2 in 2 s, until " in shown.output
        assert (await dadi("cancel", *about)).exit_code == 0


async def test_a_datacenter_keeps_the_rate_and_who_asks_again_does_not_undo_it(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        made = await indexed.add(registry, "team/app", layers_owned_by_both(dc.urls), tmp_path)
        jobs: dict[str, Job] = {}
        request = canonical(Request(made.reference, PLATFORM, rate=100.0))
        for url in dc.urls:
            jobs[url] = await dc.running[url].superpeer.prefetch.submit(request)
        async with asyncio.timeout(20):
            while any(job.state is not State.WARMING for job in jobs.values()):
                await asyncio.sleep(0.01)
        rates = [run.superpeer.prefetch.rates for run in dc.running.values()]

        def taken() -> float:
            return sum(bucket.rate for each in rates for bucket in each._buckets.values())

        assert taken() == 100.0
        for url in dc.urls:
            await dc.running[url].superpeer.prefetch.submit(request)
        assert taken() == 100.0
        other = await indexed.add(registry, "team/other", layers_owned_by_both(dc.urls), tmp_path)
        for name in (made, other):
            batch = canonical(Request(name.reference, PLATFORM, scope="startup", rate=60.0, batch="together"))
            for url in dc.urls:
                await dc.running[url].superpeer.prefetch.submit(batch)
        async with asyncio.timeout(20):
            while taken() != 160.0:  # two images, and one rate for both
                await asyncio.sleep(0.01)
        # The first is under way at both; it is asked for with another at one of them, and joins it everywhere.
        for name in (made, other):
            batch = canonical(Request(name.reference, PLATFORM, rate=20.0, batch="joined.2"))
            await dc.running[dc.urls[0]].superpeer.prefetch.submit(batch)
        async with asyncio.timeout(20):
            while taken() != 80.0 or any(len(each._jobs.get("joined.2", {})) != 2 for each in rates):
                await asyncio.sleep(0.01)
        assert jobs[dc.urls[1]].request.batch == "joined.2"
