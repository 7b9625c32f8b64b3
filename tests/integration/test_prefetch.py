"""Prefetch jobs of superpeers over loopback: warmed before the peak, whatever is restarted or away meanwhile.

Longer than 400 lines: the life of a job from its beginning to its verification.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from dadi import digest as digests
from dadi import http
from dadi.errors import Conflict, DadiError, NotFound
from dadi.peers.owners import owners
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Readiness, Request, canonical, job_id
from superpeer.config import IndexingConfig
from tests.contracts.store import content
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab.datacenter import a_node, copies, datacenter, layers_owned_by_both
from tests.lab.services import CHUNK, PLATFORM, Running, running, tar_of
from tests.lab.waiting import until

AWAY = [Fault(drop=True)] * 5000


class Operator:
    """What `dadi prefetch` says to superpeers."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self.session = session

    async def ask(self, method: str, url: str, kind: Any, **options: Any) -> Any:
        async with http.request(self.session, method, url, "asking", **options) as response:
            return msgspec.json.decode(await response.read(), type=kind)

    async def begin(self, url: str, reference: str, **fields: Any) -> Job:
        request = Request(reference, fields.pop("platform", PLATFORM), **fields)
        return await self.ask("POST", f"{url}/v1/prefetch", Job, data=msgspec.json.encode(request))

    async def job(self, url: str, job: str) -> Job:
        return await self.ask("GET", f"{url}/v1/prefetch/{job}", Job)

    async def over(self, url: str, job: str) -> list[dict[str, Any]]:
        """Follow a job to its end; return the events."""
        async with (
            asyncio.timeout(30),
            http.request(self.session, "GET", f"{url}/v1/prefetch/{job}?follow=1", "following") as answer,
        ):
            return [event async for event in http.events(answer)]

    async def end(self, url: str, job: str) -> Job:
        await self.over(url, job)
        return await self.job(url, job)

    async def verify(self, url: str, reference: str, scope: str = "full") -> Readiness:
        parameters = {"reference": reference, "platform": PLATFORM, "scope": scope}
        return await self.ask("GET", f"{url}/v1/prefetch/verify", Readiness, params=parameters)


@pytest.fixture
async def operator() -> AsyncIterator[Operator]:
    async with http.client() as session:
        yield Operator(session)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


TARS = [tar_of(**{f"file-{seed}": content(200_000, seed)}) for seed in range(3)]


def a_superpeer(
    directory: Path, registry: FakeRegistry, **options: Any
) -> contextlib.AbstractAsyncContextManager[Running]:
    return running(directory, registry.host, **{"authorization": "open", **options})


@pytest.mark.parametrize("kind", ["indexed", "on first sight"])
async def test_what_verify_calls_ready_is_read_without_the_registry(
    tmp_path: Path, registry: FakeRegistry, operator: Operator, kind: str
) -> None:
    if kind == "indexed":
        made = await indexed.add(registry, "team/app", TARS, tmp_path)
        reference, packed = made.reference, sum(map(len, made.layers))
    else:
        registry.add_image("team/app", "1", TARS)
        reference, packed = f"{registry.host}/team/app:1", 0
    async with a_superpeer(tmp_path / "s", registry) as run:
        before = await operator.verify(run.url, reference)
        assert not before.ready
        assert [each.what for each in before.lacking] == ["tag"]
        job = await operator.begin(run.url, reference)
        ended = await operator.end(run.url, job.id)
        assert (ended.state, ended.error) == (State.READY, None)
        assert ended.done == ended.total == sum(map(len, TARS))
        if packed:
            assert run.superpeer.lazy.statistics()["bytes"] <= packed, "no byte twice"
        told = await operator.verify(run.url, reference)
        assert (told.ready, told.registry_requests, told.lacking) == (True, 0, ())
        assert told.size == sum(map(len, TARS))
        registry.script("", *AWAY)
        async with a_node(run.url) as node:
            index = await node.index(reference)
            await node.small(index)
            assert await node.read(index) == TARS
        assert (await operator.verify(run.url, reference)).ready


async def test_the_same_job_is_asked_for_twice_and_run_once(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with a_superpeer(tmp_path / "s", registry) as run:
        jobs = await asyncio.gather(*(operator.begin(run.url, made.reference, priority=n) for n in (5, 7, 2)))
        assert len({job.id for job in jobs}) == 1
        assert (await operator.end(run.url, jobs[0].id)).state is State.READY
        assert run.superpeer.lazy.statistics()["bytes"] <= sum(map(len, made.layers))
        (kept,) = run.superpeer.prefetch.jobs()
        assert kept.request.priority == 7
        manifests = len(registry.asked("/manifests/1"))
        again = await operator.begin(run.url, made.reference)
        assert (await operator.end(run.url, again.id)).state is State.READY
        assert len(registry.asked("/manifests/1")) == manifests + 1, "a new round looks at the tag again"


async def test_a_superpeer_that_is_killed_goes_on_with_its_job_and_fetches_nothing_twice(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    gate = asyncio.Event()
    ids = _layer_digests(made)
    registry.script(f"/blobs/{ids[-1]}", Fault(gate=gate), method="GET")
    async with a_superpeer(tmp_path / "s", registry) as run:
        job = await operator.begin(run.url, made.reference)
        async with asyncio.timeout(20):
            while not run.superpeer.lazy.statistics()["bytes"] or not registry.asked(f"/blobs/{ids[-1]}", "GET"):
                await asyncio.sleep(0.01)
            while (await operator.job(run.url, job.id)).done == 0:
                await asyncio.sleep(0.01)
        first = run.superpeer.lazy.statistics()["bytes"]
    gate.set()
    async with a_superpeer(tmp_path / "s", registry) as run:
        ended = await operator.end(run.url, job.id)
        assert ended.state is State.READY
        assert ended.request.reference == canonical(Request(made.reference, PLATFORM)).reference
        second = run.superpeer.lazy.statistics()["bytes"]
        assert first > 0
        assert second > 0
        assert first + second <= sum(map(len, made.layers)), "what was there is not fetched again"
        assert (await operator.verify(run.url, made.reference)).ready


def _layer_digests(made: indexed.Indexed) -> list[str]:
    return [digests.of(layer) for layer in made.layers]


async def test_a_cancelled_job_stops_and_can_be_tried_again(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    gate = asyncio.Event()
    for digest in _layer_digests(made):
        registry.script(f"/blobs/{digest}", Fault(gate=gate), method="GET")
    async with a_superpeer(tmp_path / "s", registry) as run:
        job = await operator.begin(run.url, made.reference)
        async with asyncio.timeout(20):
            while (await operator.job(run.url, job.id)).state is not State.WARMING:
                await asyncio.sleep(0.01)
        with pytest.raises(Conflict):
            await operator.ask("POST", f"{run.url}/v1/prefetch/{job.id}/retry", Job)
        cancelled = await operator.ask("POST", f"{run.url}/v1/prefetch/{job.id}/cancel", Job)
        assert cancelled.state is State.CANCELLED
        assert run.superpeer.prefetch.statistics()["pinned"] == 0
        with pytest.raises(Conflict):
            await operator.ask("POST", f"{run.url}/v1/prefetch/{job.id}/cancel", Job)
        gate.set()
        await operator.ask("POST", f"{run.url}/v1/prefetch/{job.id}/retry", Job)
        assert (await operator.end(run.url, job.id)).state is State.READY


async def test_an_unknown_image_fails_at_once_and_says_so(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    async with a_superpeer(tmp_path / "s", registry) as run:
        job = await operator.begin(run.url, f"{registry.host}/team/nothing:1")
        ended = await operator.end(run.url, job.id)
        assert ended.state is State.FAILED
        assert isinstance(ended.failure(), NotFound)
        with pytest.raises(NotFound):
            await operator.job(run.url, "0123456789ab")


async def test_an_image_that_does_not_fit_fails_before_anything_is_fetched(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with a_superpeer(tmp_path / "s", registry, limit=400_000) as run:
        await run.index(made.reference)
        job = await operator.begin(run.url, made.reference)
        ended = await operator.end(run.url, job.id)
        assert ended.state is State.FAILED
        assert ended.error is not None
        assert ended.error["error"] == "store-full"
        assert "needs" in ended.error["message"]
        assert "are free" in ended.error["message"]
        assert run.superpeer.lazy.statistics()["bytes"] == 0


async def test_what_would_be_evicted_is_said_and_a_pinned_image_is_not(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    old = await indexed.add(registry, "team/old", [TARS[0]], tmp_path)
    new = await indexed.add(registry, "team/new", TARS[1:], tmp_path)
    async with a_superpeer(tmp_path / "s", registry, limit=1_000_000) as run:
        clock = run.superpeer.prefetch.clock
        ended = await operator.end(run.url, (await operator.begin(run.url, old.reference, pin_until=clock() + 1000)).id)
        assert ended.state is State.READY
        refused = await operator.end(run.url, (await operator.begin(run.url, new.reference)).id)
        assert refused.error is not None
        assert refused.error["error"] == "store-full"
        assert (await operator.verify(run.url, old.reference)).ready
    async with a_superpeer(tmp_path / "s", registry, limit=1_000_000) as run:
        prefetch = run.superpeer.prefetch
        assert prefetch.statistics()["pinned"] == 1, "also after a restart"
        prefetch.clock = lambda: clock() + 2000
        prefetch.sweep()
        assert prefetch.statistics()["pinned"] == 0
        ended = await operator.end(run.url, (await operator.begin(run.url, new.reference)).id)
        assert ended.state is State.READY
        assert any("evicted" in note for note in ended.notes)
        assert not (await operator.verify(run.url, old.reference)).ready


async def test_a_deadline_that_cannot_be_met_is_said_before_it_begins(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with a_superpeer(tmp_path / "s", registry) as run:
        now = run.superpeer.prefetch.clock()
        job = await operator.begin(run.url, made.reference, rate=1000.0, at=now + 3600, deadline=now + 3660)
        ended = await operator.end(run.url, job.id)
        assert ended.state is State.FAILED
        assert ended.error is not None
        assert "bit would do" in ended.error["hint"]
        assert run.superpeer.lazy.statistics()["bytes"] == 0


async def test_a_rate_is_kept_by_the_clock(tmp_path: Path, registry: FakeRegistry, operator: Operator) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    packed = sum(map(len, made.layers))
    async with a_superpeer(tmp_path / "s", registry) as run:
        prefetch = run.superpeer.prefetch
        now = 1e9

        async def sleep(seconds: float) -> None:
            nonlocal now
            until = now + seconds  # who sleeps at the same time sleeps through the same time
            await asyncio.sleep(0)
            now = max(now, until)

        prefetch.clock, prefetch.sleep = lambda: now, sleep
        begin = now
        job = await operator.begin(run.url, made.reference, rate=packed / 100)
        assert (await operator.end(run.url, job.id)).state is State.READY
        assert 90 <= now - begin <= 115


async def test_a_job_begins_when_it_is_to(tmp_path: Path, registry: FakeRegistry, operator: Operator) -> None:
    made = await indexed.add(registry, "team/app", TARS[:1], tmp_path)
    async with a_superpeer(tmp_path / "s", registry) as run:
        prefetch = run.superpeer.prefetch
        due = asyncio.Event()
        now = 1e9

        async def sleep(seconds: float) -> None:
            nonlocal now
            await due.wait()
            now += seconds

        prefetch.clock, prefetch.sleep = lambda: now, sleep
        job = await operator.begin(run.url, made.reference, at=now + 30)
        async with asyncio.timeout(20):
            while (await operator.job(run.url, job.id)).state is not State.WAITING:
                await asyncio.sleep(0.01)
        assert run.superpeer.catalog.records() == []
        due.set()
        assert (await operator.end(run.url, job.id)).state is State.READY
        assert now >= 1e9 + 30


async def test_the_startup_scope_brings_what_a_trace_names(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with a_superpeer(tmp_path / "s", registry, indexing=_never_the_rest()) as run:
        index = await run.index(made.reference)
        wanted = {index.layers[0].blob: [range(2, 4)], index.layers[2].blob: [range(1), range(3, 100_000)]}
        run.superpeer.prefetch.shares.startup_chunks = lambda record: wanted
        assert (await operator.verify(run.url, made.reference, "startup")).registry_requests == 3
        ended = await operator.end(run.url, (await operator.begin(run.url, made.reference, scope="startup")).id)
        assert (ended.state, ended.proven) == (State.READY, "startup")
        told = await operator.verify(run.url, made.reference, "startup")
        assert (told.ready, told.proven, told.note) == (True, "startup", "")
        full = await operator.verify(run.url, made.reference)
        assert not full.ready


async def test_the_startup_scope_of_an_image_without_a_trace_is_all_of_it_and_that_is_said(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with a_superpeer(tmp_path / "s", registry, indexing=_never_the_rest()) as run:
        await run.index(made.reference)
        before = await operator.verify(run.url, made.reference, "startup")
        assert (before.ready, before.proven) == (False, "full"), "metadata alone starts nothing"
        ended = await operator.end(run.url, (await operator.begin(run.url, made.reference, scope="startup")).id)
        assert (ended.state, ended.proven, ended.total) == (State.READY, "full", sum(map(len, TARS)))
        assert any("no startup trace" in note for note in ended.notes)
        assert (await operator.verify(run.url, made.reference)).ready, "all of it"
        assert "no startup trace" in (await operator.verify(run.url, made.reference, "startup")).note


async def test_a_trace_that_is_learnt_while_a_job_runs_makes_it_begin_anew_and_not_fail(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with a_superpeer(tmp_path / "s", registry, indexing=_never_the_rest()) as run:
        index = await run.index(made.reference)
        # Asked for the room, twice, for what to warm; then for the proof.
        answers = [{index.layers[0].blob: [range(1)]}] * 3 + [{index.layers[1].blob: [range(5)]}]
        shares = run.superpeer.prefetch.shares
        shares.startup_chunks = lambda record: answers.pop(0) if len(answers) > 1 else answers[0]
        ended = await operator.end(run.url, (await operator.begin(run.url, made.reference, scope="startup")).id)
        assert (ended.state, ended.tries) == (State.READY, 1)
        assert (await operator.verify(run.url, made.reference, "startup")).ready


def _never_the_rest() -> Any:
    return IndexingConfig(chunk_size=CHUNK, rest_after=3600)


# ---- several superpeers


@pytest.mark.parametrize("kind", ["indexed", "on first sight"])
@pytest.mark.parametrize("authorization", ["open", "registry"])
async def test_one_superpeer_is_asked_and_owner_and_stand_in_are_warm_at_one_copy(
    tmp_path: Path, registry: FakeRegistry, operator: Operator, kind: str, authorization: str
) -> None:
    async with datacenter(tmp_path, registry.host, authorization=authorization) as dc:
        tars = layers_owned_by_both(dc.urls)
        if kind == "indexed":
            made = await indexed.add(registry, "team/app", tars, tmp_path)
            reference = made.reference
        else:
            registry.add_image("team/app", "1", tars)
            reference = f"{registry.host}/team/app:1"
        job = await operator.begin(dc.urls[0], reference)
        ended = await operator.end(dc.urls[0], job.id)
        assert (ended.state, ended.error) == (State.READY, None)
        await until(lambda: job.id in {each.id for each in dc.running[dc.urls[1]].superpeer.prefetch.jobs()})
        other = await operator.end(dc.urls[1], job.id)
        assert (other.state, other.error) == (State.READY, None)
        for url in dc.urls:
            told = await operator.verify(url, reference)
            assert (told.ready, told.url, set(told.superpeers)) == (True, url, set(dc.urls))
            assert told.size == sum(map(len, tars))
        if kind == "indexed":
            assert sum(run.superpeer.lazy.statistics()["bytes"] for run in dc.running.values()) <= sum(
                map(len, made.layers)
            )
        else:
            index = await dc.index(reference)
            assert copies(registry, [layer.layer_digest for layer in index.layers]) == [1] * 4
        registry.script("", *AWAY)
        await dc.kill(dc.urls[0])
        async with a_node(*dc.urls) as node:
            index = await node.index(reference)
            await node.small(index)
            assert await node.read(index) == tars


async def test_a_superpeer_that_is_away_is_done_without_and_hears_of_the_job_when_it_is_back(
    tmp_path: Path, registry: FakeRegistry, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superpeer.jobs_warm.PATIENCE", 1.0)
    async with datacenter(tmp_path, registry.host) as dc:
        tars = layers_owned_by_both(dc.urls)
        made = await indexed.add(registry, "team/app", tars, tmp_path)
        away = owners(canonical(Request(made.reference, PLATFORM)).reference, dc.urls)[0]
        (here,) = [url for url in dc.urls if url != away]
        await dc.kill(away)
        job = await operator.begin(here, made.reference)
        ended = await operator.end(here, job.id)
        assert (ended.state, ended.error) == (State.READY, None)
        assert any(away in note for note in ended.notes)
        assert (await operator.verify(here, made.reference)).ready
        run = await dc.start(away)
        await until(run.superpeer.prefetch.jobs)
        other = await operator.end(away, job.id)
        assert (other.state, other.error) == (State.READY, None)
        assert run.superpeer.lazy.statistics()["bytes"] == 0, "the stand-in had it all"


async def test_who_may_not_have_the_image_may_not_prefetch_it_and_is_told_of_no_job(
    tmp_path: Path, operator: Operator
) -> None:
    async with (
        FakeRegistry(auth="basic", user="u", password="p") as private,
        a_superpeer(tmp_path / "s", private, authorization="registry") as run,
    ):
        reference = f"{private.host}/team/app:1"
        private.add_image("team/app", "1", TARS[:1])
        with pytest.raises(DadiError):
            await operator.begin(run.url, reference)
        with pytest.raises(DadiError):
            await operator.verify(run.url, reference)
        request = canonical(Request(reference, PLATFORM))
        await run.superpeer.prefetch.submit(request)
        with pytest.raises(DadiError):
            await operator.job(run.url, job_id(request))
        with pytest.raises(DadiError):
            await operator.ask("POST", f"{run.url}/v1/prefetch/{job_id(request)}/cancel", Job)
        assert await operator.ask("GET", f"{run.url}/v1/prefetch", dict) == {"jobs": []}
        manifest = "sha256:" + "1" * 64
        with pytest.raises(DadiError):
            await operator.begin(run.url, reference, manifest=manifest)


async def test_of_three_superpeers_two_have_each_layer_and_any_one_may_die(
    tmp_path: Path, registry: FakeRegistry, operator: Operator
) -> None:
    async with datacenter(tmp_path, registry.host, count=3) as dc:
        tars = [tar_of(**{f"file-{seed}": content(100_000, seed)}) for seed in range(9)]
        made = await indexed.add(registry, "team/app", tars, tmp_path)
        jobs = [await operator.begin(url, made.reference) for url in dc.urls]  # as the command line does
        ended = [await operator.end(url, jobs[0].id) for url in dc.urls]
        assert [(job.state, job.error) for job in ended] == [(State.READY, None)] * 3
        told = [await operator.verify(url, made.reference) for url in dc.urls]
        assert [each.registry_requests for each in told] == [0, 0, 0]
        assert sum(each.size for each in told) == 2 * sum(map(len, tars))
        fetched = sum(run.superpeer.lazy.statistics()["bytes"] for run in dc.running.values())
        assert fetched <= sum(map(len, made.layers)), "one copy from the registry"
        registry.script("", *AWAY)
        for url in dc.urls:
            await dc.kill(url)
            async with a_node(*dc.urls) as node:
                index = await node.index(made.reference)
                await node.small(index)
                assert await node.read(index) == tars
            await dc.start(url)
            assert (await operator.verify(url, made.reference)).ready


async def test_a_registry_that_hangs_delays_a_start_that_needs_nothing_of_it_once_and_not_long(
    tmp_path: Path, registry: FakeRegistry, operator: Operator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superpeer.resolving._PATIENCE", 0.3)
    made = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with a_superpeer(tmp_path / "s", registry, tag_ttl=0.0) as run:
        ended = await operator.end(run.url, (await operator.begin(run.url, made.reference)).id)
        assert ended.state is State.READY
        registry.script("", *[Fault(gate=asyncio.Event())] * 100)
        asked = len(registry.seen)
        async with asyncio.timeout(10), a_node(run.url) as node:  # a connection to a registry may take 30 s
            for _ in range(5):
                index = await node.index(made.reference)
            assert await node.read(index) == TARS
        assert len(registry.seen) == asked + 1
        kinds = {row["kind"]: row["count"] for row in run.superpeer.fallbacks.statistics()}
        assert kinds["registry away, answered from the cache"] == 5
