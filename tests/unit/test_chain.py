"""The links of the read chain, each alone and all together: verified, single flight, first of, kept, patient."""

from __future__ import annotations

import asyncio

import pytest

from dadi.blobs.chain import Chain
from dadi.blobs.first_of import FirstOf
from dadi.blobs.kept import Kept
from dadi.blobs.patient import Patient
from dadi.blobs.single_flight import SingleFlight, runs
from dadi.blobs.source import Urgency
from dadi.blobs.verified import Verified
from dadi.errors import AccessDenied, DigestMismatch, InvalidRequest, NotFound, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from tests.contracts.store import C, content, parts_of
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.sources import ScriptedSource

DATA = content(8 * C + 5)
BLOB = blob_of(DATA, C)
PARTS = parts_of(BLOB, DATA)


@pytest.fixture
def source() -> ScriptedSource:
    return ScriptedSource((BLOB, DATA))


@pytest.fixture
def fallbacks() -> Fallbacks:
    return Fallbacks(clock=lambda: 0.0)


def kinds(fallbacks: Fallbacks) -> dict[str, int]:
    return {row["kind"]: row["count"] for row in fallbacks.statistics()}


class Clock:
    """Time that passes only when somebody sleeps."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds
        await asyncio.sleep(0)


class TestVerified:
    async def test_right_bytes_pass_and_are_counted(self, source: ScriptedSource) -> None:
        verified = Verified("peer", source)
        assert await verified.read(BLOB, range(9)) == PARTS
        assert (verified.chunks, verified.bytes, verified.wrong) == (9, len(DATA), 0)

    @pytest.mark.parametrize(
        "change",
        [lambda part: bytes(len(part)), lambda part: part[:-1], lambda part: part + b"x", lambda part: b""],
        ids=["zeros", "short", "long", "empty"],
    )
    async def test_wrong_bytes_are_an_error_that_names_the_source(self, source: ScriptedSource, change) -> None:
        source.change = change
        verified = Verified("peer 7", source)
        with pytest.raises(DigestMismatch, match="peer 7") as error:
            await verified.read(BLOB, range(2, 4))
        assert error.value.source == "peer 7"
        assert verified.wrong == 1

    async def test_too_few_chunks_are_an_error(self, source: ScriptedSource) -> None:
        class Short:
            async def read(self, *args):
                return (await source.read(*args))[1:]

        with pytest.raises(DigestMismatch, match="2 chunks"):
            await Verified("peer", Short()).read(BLOB, range(3))


class TestSingleFlight:
    async def test_a_thousand_readers_cause_one_fetch(self, source: ScriptedSource) -> None:
        source.gate = asyncio.Event()
        flight = SingleFlight(source)
        readers = [asyncio.create_task(flight.read(BLOB, range(3))) for _ in range(1000)]
        await asyncio.sleep(0)
        source.gate.set()
        assert all(parts == PARTS[:3] for parts in await asyncio.gather(*readers))
        assert source.asked == [range(3)]

    async def test_overlapping_runs_fetch_only_what_is_not_on_its_way(self, source: ScriptedSource) -> None:
        source.gate = asyncio.Event()
        flight = SingleFlight(source)
        first = asyncio.create_task(flight.read(BLOB, range(2, 4)))
        await asyncio.sleep(0)
        second = asyncio.create_task(flight.read(BLOB, range(6)))
        await asyncio.sleep(0)
        source.gate.set()
        assert await second == PARTS[:6]
        assert await first == PARTS[2:4]
        assert source.asked == [range(2, 4), range(2), range(4, 6)]

    async def test_a_cancelled_reader_does_not_cancel_the_fetch_that_others_wait_for(
        self, source: ScriptedSource
    ) -> None:
        source.gate = asyncio.Event()
        flight = SingleFlight(source)
        first = asyncio.create_task(flight.read(BLOB, range(1)))
        await asyncio.sleep(0)
        second = asyncio.create_task(flight.read(BLOB, range(1)))
        await asyncio.sleep(0)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        source.gate.set()
        assert await second == PARTS[:1]
        assert (len(source.asked), source.cancelled) == (1, 0)

    async def test_an_error_reaches_every_reader_and_is_forgotten(self, source: ScriptedSource) -> None:
        source.gate = asyncio.Event()
        source.errors = [Unavailable("away")]
        flight = SingleFlight(source)
        readers = [asyncio.create_task(flight.read(BLOB, range(1))) for _ in range(3)]
        await asyncio.sleep(0)
        source.gate.set()
        errors = await asyncio.gather(*readers, return_exceptions=True)
        assert [type(error) for error in errors] == [Unavailable] * 3
        assert await flight.read(BLOB, range(1)) == PARTS[:1]

    async def test_chunks_of_another_size_are_other_chunks(self, source: ScriptedSource) -> None:
        source.gate = asyncio.Event()
        flight = SingleFlight(source)
        larger = blob_of(DATA, 2 * C)
        first = asyncio.create_task(flight.read(BLOB, range(1, 2)))
        second = asyncio.create_task(flight.read(larger, range(1, 2)))
        await asyncio.sleep(0)
        source.gate.set()
        assert await first == PARTS[1:2]
        assert await second == [DATA[2 * C : 4 * C]]

    async def test_closing_cancels_what_is_in_flight(self, source: ScriptedSource) -> None:
        source.gate = asyncio.Event()
        flight = SingleFlight(source)
        reader = asyncio.create_task(flight.read(BLOB, range(1)))
        while not source.asked:
            await asyncio.sleep(0)
        early = asyncio.create_task(flight.read(BLOB, range(5, 6)))
        await asyncio.sleep(0)  # `early` has asked, its fetch has not begun
        await flight.close()
        with pytest.raises(asyncio.CancelledError):
            await early
        with pytest.raises(asyncio.CancelledError):
            await reader
        assert source.cancelled == 1

    def test_runs(self) -> None:
        assert runs([]) == []
        assert runs([1, 2, 5, 7, 8, 9]) == [range(1, 3), range(5, 6), range(7, 10)]


class TestFirstOf:
    async def test_the_nearest_answers_and_the_others_are_not_asked(self, fallbacks: Fallbacks) -> None:
        near, far = ScriptedSource((BLOB, DATA)), ScriptedSource((BLOB, DATA))
        assert await FirstOf([near, far], fallbacks).read(BLOB, range(1)) == PARTS[:1]
        assert (len(near.asked), len(far.asked)) == (1, 0)
        assert kinds(fallbacks) == {}

    async def test_a_liar_fails_alone(self, fallbacks: Fallbacks) -> None:
        liar, honest = ScriptedSource((BLOB, DATA)), ScriptedSource((BLOB, DATA))
        liar.change = lambda part: bytes(len(part))
        first = FirstOf([Verified("liar", liar), Verified("honest", honest)], fallbacks)
        assert await first.read(BLOB, range(9)) == PARTS
        assert kinds(fallbacks) == {"source passed over": 1}

    async def test_of_all_errors_the_one_that_time_may_heal_is_raised(self, fallbacks: Fallbacks) -> None:
        away, denied = ScriptedSource((BLOB, DATA)), ScriptedSource((BLOB, DATA))
        away.errors, denied.errors = [Unavailable("away")], [AccessDenied("no")]
        with pytest.raises(Unavailable):
            await FirstOf([away, denied], fallbacks).read(BLOB, range(1))

    async def test_nobody_to_ask_is_said(self, fallbacks: Fallbacks) -> None:
        with pytest.raises(Unavailable, match="nobody"):
            await FirstOf([], fallbacks).read(BLOB, range(1))


class TestKept:
    async def test_what_was_fetched_once_is_not_fetched_again(
        self, source: ScriptedSource, fallbacks: Fallbacks
    ) -> None:
        kept = Kept(MemoryBlobs(), source, fallbacks)
        assert await kept.read(BLOB, range(4)) == PARTS[:4]
        assert await kept.read(BLOB, range(9)) == PARTS
        assert source.asked == [range(4), range(4, 9)]
        assert (kept.fetched_bytes, kept.local_bytes) == (len(DATA), 4 * C)

    async def test_a_run_with_holes_asks_for_the_holes_only(
        self, source: ScriptedSource, fallbacks: Fallbacks
    ) -> None:
        store = MemoryBlobs()
        await store.keep(BLOB, 2, PARTS[2:3])
        await store.keep(BLOB, 5, PARTS[5:7])
        assert await Kept(store, source, fallbacks).read(BLOB, range(1, 8)) == PARTS[1:8]
        assert source.asked == [range(1, 2), range(3, 5), range(7, 8)]

    async def test_a_full_store_loses_the_keeping_and_not_the_read(
        self, source: ScriptedSource, fallbacks: Fallbacks
    ) -> None:
        kept = Kept(MemoryBlobs(limit=C), source, fallbacks)
        assert await kept.read(BLOB, range(3)) == PARTS[:3]
        assert await kept.read(BLOB, range(3)) == PARTS[:3]
        assert kinds(fallbacks) == {"not kept: store full": 2}

    async def test_a_store_that_cannot_be_read_is_passed_over(
        self, source: ScriptedSource, fallbacks: Fallbacks
    ) -> None:
        class Broken(MemoryBlobs):
            async def read(self, *args):
                raise Unavailable("I/O error")

        store = Broken()
        await store.keep(BLOB, 0, PARTS[:1])
        assert await Kept(store, source, fallbacks).read(BLOB, range(1)) == PARTS[:1]
        assert kinds(fallbacks) == {"local chunk not readable": 1}


class TestPatient:
    async def test_a_read_waits_until_upstream_is_back(self, source: ScriptedSource, fallbacks: Fallbacks) -> None:
        clock = Clock()
        source.errors = [Unavailable("away")] * 5
        patient = Patient(source, 60.0, fallbacks, clock=clock, sleep=clock.sleep)
        assert await patient.read(BLOB, range(1)) == PARTS[:1]
        assert len(clock.slept) == 5
        assert clock.slept == sorted(clock.slept) or max(clock.slept) <= 5.0
        assert kinds(fallbacks) == {"read waits for upstream": 5}
        assert patient.waiting == 0

    async def test_patience_ends_with_an_error_that_says_how_long_and_why(
        self, source: ScriptedSource, fallbacks: Fallbacks
    ) -> None:
        clock = Clock()
        source.errors = [Unavailable("the superpeer is away")] * 1000
        with pytest.raises(Unavailable, match=r"after 60 s: the superpeer is away"):
            await Patient(source, 60.0, fallbacks, clock=clock, sleep=clock.sleep).read(BLOB, range(1))
        assert clock.now == pytest.approx(60.0)

    async def test_it_waits_as_long_as_upstream_asked(self, source: ScriptedSource, fallbacks: Fallbacks) -> None:
        clock = Clock()
        source.errors = [Unavailable("busy", retry_after=7.5)]
        await Patient(source, 60.0, fallbacks, clock=clock, sleep=clock.sleep).read(BLOB, range(1))
        assert clock.slept == [7.5]

    @pytest.mark.parametrize(
        "error", [DigestMismatch("wrong"), NotFound("gone"), AccessDenied("not yet"), StoreFull("over there")]
    )
    async def test_what_may_heal_is_asked_for_again(
        self, source: ScriptedSource, fallbacks: Fallbacks, error: Exception
    ) -> None:
        clock = Clock()
        source.errors = [error]
        patient = Patient(source, 60.0, fallbacks, clock=clock, sleep=clock.sleep)
        assert await patient.read(BLOB, range(1)) == PARTS[:1]

    async def test_what_makes_no_sense_is_raised_at_once(self, source: ScriptedSource, fallbacks: Fallbacks) -> None:
        clock = Clock()
        source.errors = [InvalidRequest("no")]
        with pytest.raises(InvalidRequest):
            await Patient(source, 60.0, fallbacks, clock=clock, sleep=clock.sleep).read(BLOB, range(1))
        assert clock.slept == []


class TestChain:
    async def test_its_order_is_what_the_design_says(self, source: ScriptedSource, fallbacks: Fallbacks) -> None:
        chain = Chain(MemoryBlobs(), Verified("superpeer", source), patience=300, fallbacks=fallbacks)
        text = repr(chain)
        assert text.startswith("SingleFlight(Kept(MemoryBlobs(0 blobs), Patient(Verified(")
        assert text.endswith("300 s)))")

    async def test_wrong_bytes_are_neither_kept_nor_read(self, source: ScriptedSource, fallbacks: Fallbacks) -> None:
        store = MemoryBlobs()
        lies = iter([True, True, False])
        source.change = lambda part: bytes(len(part)) if next(lies) else part
        chain = Chain(store, Verified("superpeer", source), patience=300, fallbacks=fallbacks)
        assert await chain.read(BLOB, range(1)) == PARTS[:1]
        assert await store.read(BLOB, range(1)) == PARTS[:1]
        assert len(source.asked) == 3

    async def test_many_readers_of_a_cold_chunk_cost_one_fetch_and_one_write(
        self, source: ScriptedSource, fallbacks: Fallbacks
    ) -> None:
        writes = []

        class Counting(MemoryBlobs):
            async def keep(self, blob, first, parts):
                writes.append(first)
                await super().keep(blob, first, parts)

        chain = Chain(Counting(), Verified("superpeer", source), patience=300, fallbacks=fallbacks)
        await asyncio.gather(*(chain.read(BLOB, range(2, 3)) for _ in range(100)))
        assert (source.asked, writes) == ([range(2, 3)], [2])


class TestUrgency:
    """Who joins a read that is under way, and is more urgent, is not kept waiting as long as nobody is."""

    @pytest.mark.parametrize("joins", [Urgency.DEMAND, Urgency.STARTUP])
    async def test_a_retry_is_as_urgent_as_whoever_has_joined_the_read(self, joins: Urgency) -> None:
        asked: list[Urgency] = []
        away, waits = True, asyncio.Event()

        class Upstream:
            async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
                asked.append(urgency)
                if away:
                    waits.set()
                    raise Unavailable("away")
                return [PARTS[chunk] for chunk in chunks]

        chain = Chain(MemoryBlobs(), Upstream(), patience=10, fallbacks=Fallbacks(), hurry=lambda *wish: None)
        backfill = asyncio.create_task(chain.read(BLOB, range(2), Urgency.BACKFILL))
        await waits.wait()
        joining = asyncio.create_task(chain.read(BLOB, range(1), joins))
        await asyncio.sleep(0)
        away = False
        assert await joining == PARTS[:1]
        assert await backfill == PARTS[:2]
        assert sorted(asked[2:]) == [joins, Urgency.BACKFILL], "and the other chunk as before"
        assert not chain._urgency
        await chain.close()
