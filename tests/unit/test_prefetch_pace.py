"""What jobs on a superpeer share: rates of a command, slots, work that others join or leave; who are operators."""

from __future__ import annotations

import asyncio
import hashlib
from pathlib import Path

import pytest

from dadi.errors import AccessDenied, ConfigError, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.oci.credentials import Credentials, FixedCredentials
from dadi.oci.reference import Reference
from dadi.prefetch.messages import OPERATOR, Job, Request, canonical, job_id, joined, patience
from superpeer.jobs_operators import Operators, names_in, parse
from superpeer.jobs_pace import PACE, Pace, Slots, turn
from superpeer.jobs_rates import Rates
from superpeer.jobs_secrets import JobSecrets

TOKEN = "an-operator's-token-of-some-length"
HASHED = hashlib.sha256(TOKEN.encode()).hexdigest()


def job(name: str, rate: float = 100.0, batch: str = "") -> Job:
    request = canonical(Request(name, "linux/amd64", rate=rate, batch=batch))
    return Job(id=job_id(request), request=request)


class TestRates:
    def test_a_job_is_indexed_at_the_whole_rate_and_then_divides_it(self) -> None:
        rates = Rates(lambda: 0.0)
        one = job("a")
        bucket = rates.begin(one, 4)
        assert bucket.rate == 100.0
        rates.divide(one, 4)
        assert bucket.rate == 25.0

    def test_who_asks_again_for_a_job_that_runs_does_not_undo_its_division(self) -> None:
        rates = Rates(lambda: 0.0)
        one = job("a")
        bucket = rates.begin(one, 4)
        rates.divide(one, 4)
        one.request = joined(one.request, canonical(Request("a", "linux/amd64")))
        rates.changed(one)
        assert bucket.rate == 25.0
        one.request = joined(one.request, canonical(Request("a", "linux/amd64", rate=200.0)))
        rates.changed(one)
        assert bucket.rate == 50.0

    def test_an_attempt_anew_takes_from_the_bucket_of_the_earlier_one(self) -> None:
        rates = Rates(lambda: 0.0)
        one = job("a")
        bucket = rates.begin(one, 4)
        rates.divide(one, 4)
        assert rates.begin(one, 4) is bucket
        assert bucket.rate == 100.0, "it is indexed again"
        one.request = joined(one.request, canonical(Request("a", "linux/amd64", rate=10.0)))
        rates.changed(one)
        assert bucket.rate == 10.0

    def test_a_batch_keeps_the_rate_that_was_said_last_of_any_of_its_images(self) -> None:
        rates = Rates(lambda: 0.0)
        one, other = job("a", batch="b"), job("b", batch="b")
        bucket = rates.begin(one, 1)
        rates.begin(other, 1)
        one.request = joined(one.request, canonical(Request("a", "linux/amd64", rate=10.0)))
        rates.changed(one)
        rates.divide(other, 1)
        assert bucket.rate == rates.of(other) == 10.0
        rates.begin(job("c", batch="b"), 2)
        assert bucket.rate == 5.0

    def test_a_job_that_runs_takes_from_the_rate_of_those_that_it_is_asked_for_with(self) -> None:
        rates = Rates(lambda: 0.0)
        one, other, mate = job("a", rate=0.0), job("b", rate=60.0, batch="new.2"), job("c", batch="old")
        for each in (one, other):
            rates.begin(each, 2)
        rates.divide(one, 2)
        taken = rates.taken_by(one)
        assert taken.take(1000, 0.0) == 0.0
        for batch in ("old", "new.2"):  # the second time out of a batch in which another job goes on
            rates.begin(mate, 2)
            one.request = joined(one.request, canonical(Request("a", "linux/amd64", rate=60.0, batch=batch)))
            rates.changed(one)
            assert taken.bucket is rates._buckets[batch]
            assert taken.rate == 30.0, "of two superpeers"
        taken.take(15, 0.0)
        assert rates.taken_by(other).take(30, 0.0) == 1.0, "what one has taken the other waits for"
        assert set(rates._buckets) == {"old", "new.2"}
        for each in (one, other, mate):
            rates.end(each)
        assert (rates._buckets, rates._taken, rates._superpeers, rates._divided) == ({}, {}, {}, set())

    def test_images_of_one_command_share_its_rate(self) -> None:
        rates = Rates(lambda: 0.0)
        jobs = [job(name, batch="b") for name in ("a", "b", "c")]
        buckets = [rates.begin(each, 2) for each in jobs]
        assert buckets[0] is buckets[1] is buckets[2]
        assert buckets[0].rate == 50.0, "this superpeer's part: the others work on the same images"
        assert rates.begin(job("d"), 2) is not buckets[0]
        for each in jobs:
            rates.end(each)
        assert rates.begin(jobs[0], 2).rate == 100.0
        assert len(rates._buckets) == 2


async def test_a_job_with_a_rate_takes_no_slot_that_others_wait_for() -> None:
    patient, order = Slots(1), []
    slots = asyncio.Semaphore(1)
    entered, going = asyncio.Event(), asyncio.Event()

    async def one(name: str, pace: Pace, hold: asyncio.Event | None = None) -> None:
        PACE.set(pace)
        async with turn(slots, patient):
            order.append(name)
            if hold:
                entered.set()
                await hold.wait()

    slow = Pace(clock=lambda: 0.0, alone=Slots(1))
    first = asyncio.create_task(one("slow", slow.part(), going))
    await entered.wait()
    second = asyncio.create_task(one("slow's second", slow.part()))
    await asyncio.wait_for(one("other", Pace(clock=lambda: 0.0).part()), 5)
    assert order == ["slow", "other"]
    going.set()
    await asyncio.gather(first, second)
    assert order == ["slow", "other", "slow's second"]


async def test_layers_of_a_higher_priority_go_first() -> None:
    patient, order, slots = Slots(1), [], asyncio.Semaphore(1)

    async def one(priority: int) -> None:
        PACE.set(Pace(clock=lambda: 0.0, priority=priority).part())
        async with turn(slots, patient):
            order.append(priority)

    await patient.acquire(5)
    tasks = [asyncio.create_task(one(priority)) for priority in (1, 9, 5)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    patient.release()
    await asyncio.gather(*tasks)
    assert order == [9, 5, 1]


class TestLeaving:
    async def begun(self, pace: Pace) -> asyncio.Task[None]:
        began = asyncio.Event()

        async def work() -> None:
            with pace.working():
                began.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await began.wait()
        return task

    async def test_what_only_this_job_wants_is_broken_off(self) -> None:
        whole = Pace(clock=lambda: 0.0)
        task = await self.begun(whole.part().part())
        whole.leave()
        with pytest.raises(Unavailable, match="broken off"):
            await task
        assert task.cancelling() == 0
        with pytest.raises(Unavailable), whole.part().working():
            pass

    async def test_what_another_job_or_a_node_wants_goes_on(self) -> None:
        one, other = Pace(clock=lambda: 0.0), Pace(clock=lambda: 0.0)
        shared, lifted = one.part(), one.part()
        shared.also(other)
        lifted.lift()
        tasks = [await self.begun(shared), await self.begun(lifted)]
        one.leave()
        await asyncio.sleep(0)
        assert [task.done() for task in tasks] == [False, False]
        other.leave()
        with pytest.raises(Unavailable):
            await tasks[0]
        tasks[1].cancel()
        with pytest.raises(asyncio.CancelledError):
            await tasks[1]


def test_a_job_is_tried_until_its_deadline_and_without_one_for_a_while_from_its_beginning() -> None:
    base = canonical(Request("a", "linux/amd64"))
    now = 1000.0
    assert patience(base, now, 60.0) == 1060.0
    assert patience(canonical(Request("a", "linux/amd64", at=5000.0)), now, 60.0) == 5060.0
    assert patience(canonical(Request("a", "linux/amd64", deadline=9000.0)), now, 60.0) == 9000.0


class TestOperators:
    async def test_without_a_file_who_comes_over_loopback_is_one(self) -> None:
        operators = Operators("", Fallbacks(), open_to_all=False)
        for address in ("127.0.0.1", "127.3.2.1", "::1", "::ffff:127.0.0.1"):
            await operators.check({}, address, None)
        for address in ("10.0.0.1", "", "localhost.example", "::ffff:10.0.0.1"):
            with pytest.raises(AccessDenied, match="operators"):
                await operators.check({OPERATOR: TOKEN}, address, None)
        await Operators("", Fallbacks(), open_to_all=True).check({}, "10.0.0.1", None)

    async def test_with_one_it_is_who_it_names_from_wherever_he_comes(self, tmp_path: Path) -> None:
        file = tmp_path / "operators"
        await asyncio.to_thread(file.write_text, f"# ours\n\ntoken sha256:{HASHED} alice\nclient Ops.example\n")
        operators = Operators(str(file), Fallbacks(), open_to_all=True)
        await operators.load()
        await operators.check({OPERATOR: TOKEN}, "10.0.0.1", None)
        await operators.check({}, "10.0.0.1", {"subjectAltName": (("DNS", "ops.example"),)})
        for headers, certificate in (
            ({}, None),
            ({OPERATOR: TOKEN + "x"}, None),
            ({OPERATOR: HASHED}, None),
            ({}, {"subjectAltName": (("DNS", "node.example"),), "subject": ((("commonName", "ops.example"),),)}),
        ):
            with pytest.raises(AccessDenied) as refused:
                await operators.check(headers, "127.0.0.1", certificate)
            assert TOKEN not in str(refused.value)

    async def test_a_file_that_changes_is_read_again_and_a_wrong_one_changes_nothing(self, tmp_path: Path) -> None:
        file, fallbacks = tmp_path / "operators", Fallbacks()
        await asyncio.to_thread(file.write_text, f"token sha256:{HASHED}\n")
        operators = Operators(str(file), fallbacks, open_to_all=False)
        await operators.load()
        await asyncio.to_thread(file.write_text, "token sha256:short")
        await operators.check({OPERATOR: TOKEN}, "10.0.0.1", None)
        assert [row["kind"] for row in fallbacks.statistics()] == ["operators as they were"]
        await asyncio.to_thread(file.write_text, "client other.example\n")
        with pytest.raises(AccessDenied):
            await operators.check({OPERATOR: TOKEN}, "10.0.0.1", None)

    async def test_one_that_cannot_be_used_at_the_start_is_said(self, tmp_path: Path) -> None:
        for text in ("token abc", "client", "somebody", f"token sha256:{HASHED.upper()}"):
            with pytest.raises(ConfigError, match="line 1"):
                parse(text, "file")
        with pytest.raises(ConfigError, match="cannot be read"):
            await Operators(str(tmp_path / "none"), Fallbacks(), open_to_all=False).load()

    def test_names_are_those_that_tls_goes_by(self) -> None:
        common = {"subject": ((("organizationName", "x"),), (("commonName", "Ops"),))}
        assert names_in(common) == {"ops"}
        both = {**common, "subjectAltName": (("DNS", "a.example"), ("IP Address", "10.0.0.1"))}
        assert names_in(both) == {"a.example"}


class TestSecrets:
    REFERENCE = Reference.parse("registry.example/team/app:1")
    MINE, OWN = Credentials("me", "s3cret"), Credentials("superpeer", "other")

    async def test_they_are_for_their_repository_while_their_job_runs(self) -> None:
        forgotten: list[Reference] = []
        secrets = JobSecrets(FixedCredentials({"registry.example": self.OWN}), forgotten.append)
        secrets.remember("job", self.REFERENCE, self.MINE)
        assert await secrets.get("registry.example", "team/app") == self.MINE
        assert await secrets.get("registry.example", "team/other") == self.OWN
        assert await secrets.get("other.example", "team/app") is None
        assert "s3cret" not in f"{secrets!r}{secrets._jobs!r}"
        secrets.forget("job")
        assert await secrets.get("registry.example", "team/app") == self.OWN
        assert forgotten == [self.REFERENCE] * 2, "what a client made of them goes, too"

    async def test_those_that_are_refused_make_room_for_the_superpeers_own(self) -> None:
        secrets = JobSecrets(FixedCredentials({"registry.example": self.OWN}), lambda reference: None)
        secrets.remember("job", self.REFERENCE, self.MINE)
        assert secrets.rejected("registry.example", "team/app", self.MINE)
        assert await secrets.get("registry.example", "team/app") == self.OWN
        assert secrets.rejected("registry.example", "team/app", self.OWN), "the job's once more: one refusal is a whim"
        assert await secrets.get("registry.example", "team/app") == self.MINE
        assert not secrets.rejected("registry.example", "team/app", self.MINE)
        assert not secrets.rejected("registry.example", "team/app", self.OWN), "and not over and over"
        alone = JobSecrets(FixedCredentials(), lambda reference: None)
        alone.remember("job", self.REFERENCE, self.MINE)
        assert alone.rejected("registry.example", "team/app", self.MINE)
        assert await alone.get("registry.example", "team/app") == self.MINE, "for want of better"
        assert not alone.rejected("registry.example", "team/app", self.MINE), "and not over and over"
