"""What a prefetch job waits for: its next try, and the others of its batch before it says whether they fit
and come in time."""

from __future__ import annotations

import asyncio

import pytest

from dadi.errors import InvalidRequest, Unavailable
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Request, batch_of, canonical, job_id, joined, together
from superpeer.jobs_room import Needs, summed
from superpeer.jobs_together import Sums, Together, left
from superpeer.jobs_tries import Tries

AWAY = Unavailable("the registry is away")


def job(name: str, *, registry: int = 0, state: State = State.RESOLVING, **fields: object) -> Job:
    request = canonical(Request(name, "linux/amd64", **fields))
    return Job(id=job_id(request), request=request, registry=registry, state=state)


class TestTries:
    @pytest.fixture
    def tries(self) -> Tries:
        self.gate = asyncio.Event()
        self.now = 1000.0

        async def sleep(seconds: float) -> None:
            await self.gate.wait()

        return Tries(lambda: self.now, sleep, keep_trying=600.0)

    async def resting(self, tries: Tries, one: Job) -> asyncio.Task[None]:
        pause = tries.failed(one, AWAY)
        task = asyncio.create_task(tries.rest(one, pause, AWAY))
        await asyncio.sleep(0)
        return task

    async def test_a_job_that_waits_for_its_next_try_is_woken_and_begins_as_if_it_had_never_failed(
        self, tries: Tries
    ) -> None:
        one = job("nginx")
        task = await self.resting(tries, one)
        assert one.stage.startswith("try 2 in 2 s, until ")
        self.now += 500
        assert tries.wake(one)
        await asyncio.wait_for(task, 5)
        assert not tries.wake(one)
        assert tries.failed(one, AWAY) == 2.0, "as after the first failure"
        assert one.patience == self.now + 600

    async def test_who_asks_just_before_it_rests_wakes_it_too(self, tries: Tries) -> None:
        one = job("nginx")
        pause = tries.failed(one, AWAY)
        assert tries.wake(one)  # while its state is being written
        await asyncio.wait_for(tries.rest(one, pause, AWAY), 5)

    async def test_who_asks_while_a_try_is_under_way_has_the_pauses_begin_anew(self, tries: Tries) -> None:
        one = job("nginx")
        assert [tries.failed(one, AWAY) for _ in range(3)] == [2.0, 4.0, 8.0]
        tries.forget(one)
        assert not tries.wake(one)
        assert [tries.failed(one, AWAY) for _ in range(2)] == [2.0, 4.0]
        tries.forget(one)
        assert tries.failed(one, AWAY) == 8.0

    async def test_nobody_is_woken_by_another_job_and_time_ends_the_wait_too(self, tries: Tries) -> None:
        task = await self.resting(tries, job("nginx"))
        assert not tries.wake(job("redis"))
        assert not task.done()
        self.gate.set()
        await asyncio.wait_for(task, 5)

    async def test_a_wait_that_is_cancelled_leaves_nothing(self, tries: Tries) -> None:
        task = await self.resting(tries, job("nginx"))
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert repr(tries) == "Tries(0 wait)"


async def looks_at(together: Together, job: Job, **layers: int) -> Sums:
    """Do as a job that was resolved does; return what it saw."""
    async with together.looking(job, Needs(layers, job.registry, frozenset(layers))) as sums:
        together.check_deadline(job.request, sums.registry)
        return sums


class TestTogether:
    NOW = 1000.0

    def looks(self, jobs: list[Job], rate: float = 0.0) -> Together:
        return Together(lambda: jobs, lambda: self.NOW, rate)

    def batch(self, count: int, size: int, **fields: object) -> list[Job]:
        names = [f"team/{number}" for number in range(count)]
        requests = [canonical(Request(name, "linux/amd64")) for name in names]
        return [job(name, registry=size, batch=batch_of("b", requests), **fields) for name in names]

    async def all_look(self, together: Together, jobs: list[Job]) -> None:
        await asyncio.gather(*(looks_at(together, each) for each in jobs))

    async def test_each_alone_would_do_and_not_all_and_all_are_told_the_rate_that_would(self) -> None:
        jobs = self.batch(3, 600, rate=100.0, deadline=self.NOW + 10)
        known: list[Job] = []
        together = self.looks(known)
        tasks = []
        for each in jobs:  # they come one after the other, and none knows of those that come later
            known.append(each)
            tasks.append(asyncio.create_task(looks_at(together, each)))
            await asyncio.sleep(0)
        errors = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(error, InvalidRequest) for error in errors)
        assert {str(error) for error in errors} == {
            "1800 bytes take 18 s at 100B, and there are 10 s until the deadline, all images together "
            "(--rate 1.52kbit would do)"
        }
        assert repr(together) == "Together(0 batches)"
        for each in jobs:
            each.request = canonical(Request(each.request.reference, "linux/amd64", rate=180.0,
                                             deadline=self.NOW + 10, batch=each.request.batch))  # fmt: skip
        await self.all_look(together, jobs)

    async def test_without_a_rate_of_its_own_the_superpeers_counts(self) -> None:
        jobs = self.batch(2, 600, deadline=self.NOW + 10)
        await self.all_look(self.looks(jobs), jobs)
        with pytest.raises(InvalidRequest, match="1200 bytes"):
            await self.all_look(self.looks(jobs, 100.0), jobs)

    async def test_one_that_has_ended_or_whose_registry_is_away_is_not_waited_for(self) -> None:
        failed, away, one = self.batch(3, 600, rate=100.0, deadline=self.NOW + 10)
        failed.state, away.state, away.tries, away.registry = State.FAILED, State.QUEUED, 1, 0
        await asyncio.wait_for(looks_at(self.looks([failed, away, one]), one), 5)

    async def test_one_that_is_resolved_later_counts_what_the_others_still_lack(self) -> None:
        warm, one = self.batch(2, 600, rate=100.0, deadline=self.NOW + 10)
        warm.state, warm.total, warm.done = State.WARMING, 1000, 200
        with pytest.raises(InvalidRequest, match="1080 bytes"):
            await looks_at(self.looks([warm, one]), one)
        warm.done = 900
        await looks_at(self.looks([warm, one]), one)

    async def test_one_that_never_comes_is_waited_for_a_while_only(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("superpeer.jobs_together._PATIENCE", 0.1)
        one, _ = self.batch(2, 600, rate=100.0, deadline=self.NOW + 10)
        await asyncio.wait_for(looks_at(self.looks([one]), one), 5)
        one.registry = 1200
        with pytest.raises(InvalidRequest):
            await looks_at(self.looks([one]), one)

    async def test_the_room_is_for_all_together_and_a_layer_of_several_images_counts_once(self) -> None:
        jobs = self.batch(3, 600)
        together = self.looks(jobs)
        layers = [{"base": 500, "a": 10}, {"base": 490, "b": 20}, {"c": 30}]
        seen = await asyncio.gather(*(looks_at(together, each, **its) for each, its in zip(jobs, layers, strict=True)))
        for sums, its in zip(seen, layers, strict=True):
            assert sums.images[0].layers == its, "its own first"
            assert summed(sums.images) == (560, {"base", "a", "b", "c"})

    async def test_who_is_resolved_later_counts_what_the_others_still_need_and_evicts_nothing_of_theirs(self) -> None:
        ready, warm, failed, one = jobs = self.batch(4, 600)
        together = self.looks(jobs)
        for each, name in zip(jobs, ("ready", "warm", "failed"), strict=False):
            together.knows(each, Needs({name: 100}, 600, frozenset({name})))
        ready.state, warm.state, failed.state = State.READY, State.WARMING, State.FAILED
        warm.total, warm.done = 1000, 700
        assert summed((await looks_at(together, one, one=7)).images) == (37, {"ready", "warm", "one"})
        one.state = warm.state = State.READY
        together.ended()
        assert together._needs == {}
        assert summed((await looks_at(together, job("alone"), alone=1)).images) == (1, {"alone"})

    def test_what_was_here_before_is_not_taken_off_what_a_warming_image_needs(self) -> None:
        warm, one = self.batch(2, 600)
        together = self.looks([warm, one])
        warm.state, warm.total, warm.done = State.WARMING, 1000, 900
        together.knows(warm, Needs({"warm": 100}, 600))  # the tenth that is not here
        assert summed(together.knows(one, Needs({"one": 7}, 600)))[0] == 107
        warm.done = 950
        assert summed(together.knows(one, Needs({"one": 7}, 600)))[0] == 57

    def test_nothing_is_remembered_of_a_job_that_left_its_batch(self) -> None:
        gone, one = self.batch(2, 600)
        jobs = [gone, one]
        together = self.looks(jobs)
        for each in jobs:
            together.knows(each, Needs({}, 600))
        jobs.remove(gone)
        one.state = State.READY
        together.ended()
        assert together._needs == {}

    async def test_a_mate_that_never_comes_is_waited_for_less_without_a_deadline(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("superpeer.jobs_together._PATIENCE", 60.0)
        monkeypatch.setattr("superpeer.jobs_together._PATIENCE_FOR_ROOM", 0.1)
        one, _ = self.batch(2, 600)
        async with asyncio.timeout(30):
            assert len((await looks_at(self.looks([one]), one)).images) == 1

    def test_a_job_under_way_that_is_given_a_rate_is_told_at_once_that_it_does_not_do(self) -> None:
        one = job("nginx", registry=1000, state=State.WARMING)
        one.total, one.done = 2000, 1000
        together = self.looks([one])
        new = joined(one.request, Request("nginx", "linux/amd64", rate=10.0, deadline=self.NOW + 10))
        with pytest.raises(InvalidRequest, match="500 bytes take 50 s"):
            together.check_joined(one, new)
        together.check_joined(one, joined(new, Request("nginx", "linux/amd64", rate=50.0)))
        one.state = State.RESOLVING  # it looks itself, in a moment
        together.check_joined(one, new)

    def test_what_is_left_is_what_is_not_there(self) -> None:
        assert left(job("nginx", registry=100)) == 100
        one = job("nginx", registry=100, state=State.WARMING)
        one.total, one.done = 400, 300
        assert left(one) == 25


def test_a_batch_says_how_many_jobs_it_has_each_once() -> None:
    names = ("nginx", "docker.io/library/nginx:latest", "redis")
    requests = [canonical(Request(name, "linux/amd64")) for name in names]
    assert batch_of("b", requests[:2]) == ""
    assert batch_of("b", requests) == "b.2"
    assert [together(batch) for batch in ("b.2", "b", "", "b.", "b.x", "b.²")] == [2, 0, 0, 0, 0, 0]


def test_a_job_joins_the_batch_that_has_a_rate_and_no_other() -> None:
    old = Request("nginx", "linux/amd64", rate=5.0, batch="old")
    assert joined(old, Request("nginx", "linux/amd64", rate=9.0, batch="new.2")).batch == "new.2"
    assert joined(old, Request("nginx", "linux/amd64", rate=9.0)).batch == "old"
    assert joined(old, Request("nginx", "linux/amd64", batch="new.2")).batch == "old"
    without = Request("nginx", "linux/amd64", batch="old")
    assert joined(without, Request("nginx", "linux/amd64", batch="new.2")).batch == "new.2"
