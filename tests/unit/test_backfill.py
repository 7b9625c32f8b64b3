"""Backfill: after everybody else, at its rate, until each blob is whole; what fails is tried again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from dadi.blobs.chain import Chain
from dadi.blobs.source import Urgency
from dadi.errors import Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import blob_of
from dadi.node.backfill import Backfill
from dadi.node.config import BackfillConfig
from dadi.node.demand import Demand
from dadi.node.devices import DeviceState
from tests.contracts.store import content
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.sources import ScriptedSource

CHUNK = 256 << 10
DATA = content(9 * CHUNK + 5)
BLOB = blob_of(DATA, CHUNK)


class FakeDevice:
    def __init__(self) -> None:
        self.blob = BLOB
        self.state = DeviceState.LAZY
        self.users = 1


class World:
    """Everything around a backfill, and a clock that moves when somebody sleeps; `until` stops it."""

    def __init__(self, config: BackfillConfig) -> None:
        self.now = 0.0
        self.slept: list[float] = []
        self.fallbacks = Fallbacks(clock=lambda: self.now)
        self.source = ScriptedSource((BLOB, DATA))
        self.store = MemoryBlobs()
        self.demand = Demand(clock=lambda: self.now)
        self.device = FakeDevice()
        self.urgencies: set[Urgency] = set()
        chain = Chain(self.store, self, patience=0, fallbacks=self.fallbacks)
        devices: Any = self
        self.backfill = Backfill(
            config, self.store, chain, devices, self.demand, self.fallbacks, clock=lambda: self.now, sleep=self.sleep
        )

    async def read(self, blob: Any, chunks: range, urgency: Urgency) -> list[bytes]:
        self.urgencies.add(urgency)
        return await self.source.read(blob, chunks, urgency)

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)

    def lazy(self) -> list[FakeDevice]:
        return [self.device] if self.device.state is DeviceState.LAZY else []

    async def complete(self, device: FakeDevice) -> None:
        await self.store.finish(device.blob)
        device.state = DeviceState.LOCAL

    async def until_local(self) -> None:
        async with asyncio.timeout(10):
            while self.device.state is not DeviceState.LOCAL:
                await asyncio.sleep(0)


@pytest.fixture
async def worlds() -> AsyncIterator[Any]:
    made: list[World] = []

    def make(idle: float = 0.0, **options: Any) -> World:
        made.append(World(BackfillConfig(**options)))
        made[-1].now += idle
        made[-1].backfill.start()
        made[-1].backfill.wake()
        return made[-1]

    yield make
    for world in made:
        await world.backfill.close()


async def test_everything_is_fetched_in_joined_requests_of_a_low_class_and_completed(worlds: Any) -> None:
    world = worlds(quiet=0.0)
    await world.until_local()
    assert world.source.asked == [range(4), range(4, 8), range(8, 10)]
    assert world.urgencies == {Urgency.BACKFILL}
    assert world.backfill.statistics()["bytes"] == len(DATA)


async def test_what_is_here_is_not_fetched_again(worlds: Any) -> None:
    world = worlds(quiet=0.0)
    await world.store.keep(BLOB, 1, [DATA[CHUNK : 2 * CHUNK], DATA[2 * CHUNK : 3 * CHUNK]])
    await world.until_local()
    assert world.source.chunks_asked == [0, 3, 4, 5, 6, 7, 8, 9]


async def test_it_begins_after_the_quiet_period(worlds: Any) -> None:
    world = worlds(quiet=2.0)
    await world.until_local()
    assert 2.0 <= world.now < 3.0


async def test_the_quiet_before_a_mount_does_not_count(worlds: Any) -> None:
    world = worlds(quiet=2.0, idle=1000.0)
    await world.until_local()
    assert 1002.0 <= world.now < 1003.0


async def test_it_begins_in_the_end_even_if_it_never_gets_quiet(worlds: Any) -> None:
    world = worlds(quiet=2.0, longest_wait=30.0)
    while not world.source.asked:
        with world.demand.waiting():
            await asyncio.sleep(0)
        assert world.now < 31.0
    assert world.now >= 30.0


async def test_it_stands_aside_while_a_read_waits(worlds: Any) -> None:
    world = worlds(quiet=0.0)
    while not world.source.asked:
        await asyncio.sleep(0)
    with world.demand.waiting():
        for _ in range(200):
            await asyncio.sleep(0)
        assert len(world.source.asked) <= 2, "what was under way, and no more"
    await world.until_local()


async def test_it_keeps_to_its_rate(worlds: Any) -> None:
    world = worlds(quiet=0.0, rate=1 << 20)
    await world.until_local()
    assert world.now == pytest.approx(2.0, abs=0.3), "9 chunks of 256 KiB at 1 MiB/s; the last need not wait"


async def test_what_fails_is_said_and_tried_again_at_growing_intervals(worlds: Any) -> None:
    world = worlds(quiet=0.0)
    world.source.errors = [Unavailable("the superpeer is away")] * 4
    await world.until_local()
    assert world.slept[:4] == [1.0, 2.0, 4.0, 8.0]
    assert {row["kind"]: row["count"] for row in world.fallbacks.statistics()}["backfill failed"] == 4


async def test_a_store_that_keeps_nothing_does_not_make_it_run_in_circles(worlds: Any) -> None:
    world = worlds(quiet=0.0)
    world.store.limit = CHUNK
    for _ in range(3000):
        await asyncio.sleep(0)
        if world.now > 3600:
            break
    assert len(world.source.asked) < 80, "one request every now and then, not the whole image"
    assert "backfill paused: nothing is kept" in [row["kind"] for row in world.fallbacks.statistics()]


async def test_it_can_be_switched_off(worlds: Any) -> None:
    world = worlds(enabled=False)
    for _ in range(100):
        await asyncio.sleep(0)
    assert (world.source.asked, world.backfill.state) == ([], "disabled")
