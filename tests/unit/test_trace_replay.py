"""Replay of startup traces: in order, joined, behind demand, only what is not here; wrong traces do no harm."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from random import Random

import pytest

from dadi.blobs.chain import Chain
from dadi.blobs.source import Urgency
from dadi.errors import Unavailable, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from dadi.prefetch.rate import Bucket
from dadi.prefetch.replay import Replay
from dadi.prefetch.trace import Chunk, StartGroup, Trace
from tests.fakes.memory_blobs import MemoryBlobs

SIZE = 256 << 10
MANIFEST = "sha256:" + "ab" * 32
DATA = [Random(n).randbytes(40 * SIZE + 5) for n in range(2)]
A, B = (blob_of(data, SIZE) for data in DATA)
BLOBS = {blob.digest: blob for blob in (A, B)}


class Upstream:
    """Answers from DATA when `open` is set, and says what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[tuple[Blob, range, Urgency]] = []
        self.open = asyncio.Event()
        self.open.set()
        self.error: Exception | None = None
        self.most = self._now = 0

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        self.asked.append((blob, chunks, urgency))
        self._now += 1
        self.most = max(self.most, self._now)
        try:
            if urgency is not Urgency.DEMAND:
                await self.open.wait()
            if self.error:
                raise self.error
        finally:
            self._now -= 1
        data = DATA[0] if blob is A else DATA[1]
        return [data[chunk * SIZE : (chunk + 1) * SIZE] for chunk in chunks]

    def chunks(self) -> list[Chunk]:
        return [(blob.digest, chunk) for blob, run, _ in self.asked for chunk in run]


class World:
    def __init__(self) -> None:
        self.upstream = Upstream()
        self.store = MemoryBlobs()
        self.fallbacks = Fallbacks()
        self.chain = Chain(self.store, self.upstream, patience=0, fallbacks=self.fallbacks)
        self.seen: Collection[Chunk] = ()

    def replay(self, *groups: list[tuple[Blob, int]], size: int = SIZE) -> Replay:
        blobs = ((A.digest, size), (B.digest, SIZE), ("sha256:" + "0" * 64, SIZE))
        places = {A: 0, B: 1}
        steps = [StartGroup(1, tuple((places[blob], chunk, 0) for blob, chunk in group)) for group in groups]
        return Replay(Trace(MANIFEST, blobs, tuple(steps)), "t", BLOBS, self.store, self.chain, self.fallbacks,
                      seen=lambda: self.seen)  # fmt: skip


@pytest.fixture
async def world() -> World:
    return World()


async def test_what_is_wanted_first_is_asked_for_first_and_neighbours_together(world: World) -> None:
    replay = world.replay([(B, 7), (A, 0), (B, 8), (A, 2), (A, 1), (B, 30)])
    await replay.run()
    assert [(blob, run) for blob, run, _ in world.upstream.asked] == [
        (B, range(7, 9)), (A, range(3)), (B, range(30, 31)),
    ]  # fmt: skip
    assert {urgency for *_, urgency in world.upstream.asked} == {Urgency.STARTUP}
    assert await world.store.missing(A, range(3)) == []
    assert (replay.fetched_chunks, replay.bytes) == (6, 6 * SIZE)


async def test_requests_have_a_mebibyte_at_most_and_many_are_in_flight(world: World) -> None:
    world.upstream.open.clear()
    replay = world.replay([(blob, chunk) for blob in (A, B) for chunk in range(40)])
    running = asyncio.create_task(replay.run())
    for _ in range(200):
        await asyncio.sleep(0)
    assert 8 <= world.upstream.most <= 16
    world.upstream.open.set()
    await running
    assert max(len(run) for _, run, _ in world.upstream.asked) == 4
    assert sorted(world.upstream.chunks()) == sorted((blob.digest, chunk) for blob in (A, B) for chunk in range(40))


async def test_a_rate_is_kept_by_all_replays_together_and_a_read_does_not_wait_for_it(world: World) -> None:
    now = 0.0
    at: list[float] = []
    held = asyncio.Event()
    held.set()

    async def sleep(seconds: float) -> None:
        nonlocal now
        await held.wait()
        now += seconds
        at.append(now)

    bucket = Bucket(SIZE, now)
    first, second = ([(blob, chunk) for chunk in range(0, 20, 2)] for blob in (A, B))
    for order in (first, second):
        replay = world.replay(order)
        replay._bucket, replay._clock, replay._sleep = bucket, lambda: now, sleep
        await replay.run()
    assert len(world.upstream.asked) == 20
    assert now == pytest.approx(19.5), "twenty chunks at one a second, and half a second's worth at once"
    held.clear()
    replay = world.replay([(A, 31)])
    replay._bucket, replay._clock, replay._sleep = bucket, lambda: now, sleep
    running = asyncio.create_task(replay.run())
    await world.chain.read(A, range(31, 32))
    assert world.upstream.asked[-1] == (A, range(31, 32), Urgency.DEMAND)
    held.set()
    await running


async def test_chunks_that_are_here_are_skipped(world: World) -> None:
    await world.store.keep(A, 1, [DATA[0][SIZE : 2 * SIZE]])
    replay = world.replay([(A, 0), (A, 1), (A, 2)])
    await replay.run()
    assert world.upstream.chunks() == [(A.digest, 0), (A.digest, 2)]
    assert replay.report({(A.digest, 1), (A.digest, 9)}, {A.digest}).used == 1


async def test_a_read_that_overtakes_the_replay_goes_first(world: World) -> None:
    world.upstream.open.clear()
    running = asyncio.create_task(world.replay([(A, chunk) for chunk in range(0, 40, 2)] * 1).run())
    for _ in range(100):
        await asyncio.sleep(0)
    held = len(world.upstream.asked)
    async with asyncio.timeout(5):
        (data,) = await world.chain.read(A, range(38, 39))
    assert data == DATA[0][38 * SIZE : 39 * SIZE]
    assert (A, range(38, 39), Urgency.DEMAND) in world.upstream.asked[held:]
    world.upstream.open.set()
    await running
    assert world.upstream.chunks().count((A.digest, 38)) == 1, "and the replay does not fetch it again"


async def test_chunks_and_blobs_that_the_image_does_not_have_are_left_out(world: World) -> None:
    replay = world.replay([(A, 40), (A, 41), (A, 1 << 31), (B, 1)])
    await replay.run()
    assert world.upstream.chunks() == [(A.digest, 40), (B.digest, 1)]
    world.upstream.asked.clear()
    await world.replay([(A, 3), (B, 2)], size=2 * SIZE).run()
    assert world.upstream.chunks() == [(B.digest, 2)], "of a layer in chunks of another size nothing is taken"


async def test_what_cannot_be_fetched_is_noted_and_left_to_who_reads_it(world: World) -> None:
    world.upstream.error = Unsupported("not now")
    replay = world.replay([(A, 1), (A, 5)])
    await replay.run()
    assert replay.fetched_chunks == 0
    assert "startup trace not replayed" in [row["kind"] for row in world.fallbacks.statistics()]
    world.upstream.error = Unavailable("away")
    await world.replay([(A, 1)]).run()


async def test_what_all_entry_points_read_comes_first_then_the_likeliest_one(world: World) -> None:
    common = [(A, 1), (A, 3)]
    server, worker = [(A, 0), *common, (A, 20)], [*common, (B, 5), (B, 9)]
    replay = world.replay(server, worker)
    await replay.run()
    assert world.upstream.chunks() == [(A.digest, n) for n in (1, 3, 0, 20)], "the most frequent one"
    world.upstream.asked.clear()
    world.seen = [(A.digest, 1), (B.digest, 5)]
    other = World()
    other.seen = world.seen
    await other.replay(server, worker).run()
    assert other.upstream.chunks() == [(A.digest, 1), (A.digest, 3), (B.digest, 5), (B.digest, 9)]


async def test_a_report_is_of_what_was_taken_from_the_blobs_that_were_watched(world: World) -> None:
    replay = world.replay([(A, 1), (A, 2), (B, 1), (B, 2)])
    await replay.run()
    seen = {(A.digest, 1), (A.digest, 30), (B.digest, 2)}
    report = replay.report(seen, {A.digest, B.digest})
    assert (report.trace, report.chunks, report.used, report.read) == ("t", 4, 2, 3)
    assert replay.report(seen, {A.digest}).chunks == 2


async def test_an_empty_trace_does_nothing(world: World) -> None:
    replay = world.replay()
    await replay.run()
    assert world.upstream.asked == []
    assert repr(replay)
