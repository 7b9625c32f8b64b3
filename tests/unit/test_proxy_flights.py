"""Work that is shared: whose credentials it shows, how long anybody waits, and how long credentials are kept."""

from __future__ import annotations

import asyncio
import gc

import pytest

from dadi.errors import AccessDenied, Unavailable
from dadi.oci.reference import Reference
from dadi.originals.asked import KEEP, Asked, AskedFor
from dadi.originals.away import Away, CallerFlights
from dadi.originals.caller import ANYBODY, Caller
from dadi.originals.challenges import Challenges
from dadi.originals.config import OriginalsConfig
from dadi.originals.remembered import Remembered

REF = Reference.parse("reg.example/team/app:1")
ANNE, BOB = Caller("Bearer anne"), Caller("Bearer bob")
DIGEST = "sha256:" + "a" * 64


class Time:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Work:
    """Work that waits for `gate`, then is refused to those whose names are not in `good`."""

    def __init__(self, *good: str) -> None:
        self.good = good
        self.done: list[str] = []
        self.gate = asyncio.Event()

    async def __call__(self, name: str) -> str:
        await self.gate.wait()
        self.done.append(name)
        if name not in self.good:
            raise AccessDenied(f"not {name}")
        return name


async def results(work: Work, *names: str) -> list[object]:
    flights = CallerFlights()
    joined = [asyncio.create_task(flights.join("key", lambda name=name: work(name), who=name)) for name in names]
    await asyncio.sleep(0)
    work.gate.set()
    return [found if isinstance(found, str) else type(found)
            for found in await asyncio.gather(*joined, return_exceptions=True)]  # fmt: skip


async def test_bad_credentials_fail_their_own_caller_only() -> None:
    work = Work("good", "also good")
    assert await results(work, "bad", "good", "bad", "also good") == [AccessDenied, "good", AccessDenied, "good"]
    assert work.done == ["bad", "good"]


async def test_a_crowd_with_the_same_bad_credentials_costs_one_request() -> None:
    work = Work()
    assert await results(work, *["bad"] * 100) == [AccessDenied] * 100
    assert work.done == ["bad"]


async def test_another_error_is_everybodys() -> None:
    async def fails() -> str:
        await asyncio.sleep(0)
        raise Unavailable("away")

    flights = CallerFlights()
    found = await asyncio.gather(*(flights.join("key", fails, who=name) for name in "abc"), return_exceptions=True)
    assert {type(one) for one in found} == {Unavailable}


async def test_patience_is_for_all_attempts_together() -> None:
    work, flights = Work(), CallerFlights()
    with pytest.raises(TimeoutError):
        await flights.join("key", lambda: work("any"), 0.01, who="any")
    await flights.close()


def test_how_long_a_registry_is_waited_for() -> None:
    time = Time()
    away = Away(patience=2.0, clock=time)
    assert away.limit("reg.example", old=True) == 2.0
    before = away.limit("reg.example", old=False)
    away.failed("reg.example")
    assert 2.0 < away.limit("reg.example", old=False) < before <= 20.0
    time.now += 11
    assert away.limit("reg.example", old=False) == before


# ---- challenges


class Site:
    def __init__(self) -> None:
        self.time = Time()
        self.away = Away(patience=0.01, clock=self.time)
        self.challenges = Challenges(OriginalsConfig(access_ttl=60.0, stale=600.0), self.away, self.time)
        self.asked = 0
        self.fails = False
        self.says: str | None = "Basic realm=x"

    async def _ask(self) -> str | None:
        self.asked += 1
        await asyncio.sleep(0)
        if self.fails:
            raise Unavailable("away")
        return self.says

    async def get(self) -> str | None:
        return await self.challenges.get("reg.example", "reg.example", self._ask)


@pytest.mark.parametrize("says", ["Basic realm=x", None])
async def test_a_challenge_is_asked_for_once_in_its_time(says: str | None) -> None:
    site = Site()
    site.says = says
    assert set(await asyncio.gather(*(site.get() for _ in range(1000)))) == {says}
    assert site.asked == 1
    site.time.now += 61
    await site.get()
    assert site.asked == 2


async def test_an_old_challenge_is_given_while_the_registry_is_away() -> None:
    site = Site()
    await site.get()
    site.time.now += 61
    site.fails = True
    assert [await site.get() for _ in range(5)] == [site.says] * 5
    assert site.asked == 2, "it is not asked again a moment later"
    site.time.now += 600
    with pytest.raises(Unavailable):
        await site.get()


# ---- what is kept for a while


async def test_a_value_goes_when_its_time_is_over_though_nobody_asks() -> None:
    gone: list[str] = []
    values: Remembered[str, str] = Remembered(0.02, 10, asyncio.get_running_loop().time, gone=gone.append)
    values.put("a", "secret")
    async with asyncio.timeout(10):
        while not gone:
            await asyncio.sleep(0.005)
    assert gone == ["secret"]
    assert values._timer is None, "nothing is left to wait for"


async def test_use_keeps_a_value_and_too_many_push_it_out() -> None:
    time = Time()
    values: Remembered[str, str] = Remembered(10.0, 2, time)
    values.put("a", "1")
    time.now += 9
    assert values.get("a") == "1"
    time.now += 9
    assert values.peek("a") == "1"
    time.now += 2
    assert values.peek("a") is None
    for name in "bcd":
        values.put(name, name)
    assert values.values() == ["c", "d"]
    values.close()
    assert len(values) == 0


async def test_credentials_of_who_asked_for_a_blob_are_forgotten_and_anonymous_callers_are_not() -> None:
    time = Time()
    asked = Asked(time)
    asked.add(DIGEST, REF, ANYBODY)
    asked.add(DIGEST, REF, ANNE)
    assert [one.caller for one in asked.of(DIGEST)] == [ANNE, ANYBODY]
    time.now += KEEP + 1
    asked._blobs.purge()
    assert [one.caller for one in asked.of(DIGEST)] == [ANYBODY]
    held = [one for one in gc.get_objects() if isinstance(one, AskedFor) and one.caller == ANNE]
    assert held == [], "nobody has them any more"
    asked.close()


async def test_credentials_stay_while_their_caller_reads_and_go_when_they_are_refused() -> None:
    time = Time()
    asked = Asked(time)
    anne, bob = asked.add(DIGEST, REF, ANNE), asked.add(DIGEST, REF, BOB)
    with asked.reading(anne):
        time.now += 3 * KEEP
        assert asked.of(DIGEST) == [anne]
        asked.drop(DIGEST, anne)
        assert asked.of(DIGEST) == []
    assert asked.add(DIGEST, REF, BOB) is not bob
    assert "bob" not in repr(asked) + repr(asked.of(DIGEST))
    asked.close()


async def test_of_each_blob_the_last_few_who_asked_are_known() -> None:
    asked = Asked()
    for number in range(20):
        asked.add(DIGEST, REF, Caller(f"Bearer {number}"))
    assert [one.caller.authorization for one in asked.of(DIGEST)][:2] == ["Bearer 19", "Bearer 18"]
    assert len(asked.of(DIGEST)) == 8
    asked.close()
