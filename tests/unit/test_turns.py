"""Without peers: what nobody waits for is fetched chunk by chunk, in turns: demand waits for one chunk at most."""

from __future__ import annotations

import asyncio

from dadi.blobs.chain import Chain
from dadi.blobs.source import Urgency
from dadi.blobs.turns import PARALLEL, Turns
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from tests.contracts.store import C, content, parts_of
from tests.fakes.memory_blobs import MemoryBlobs

DATA = content(64 * C)
BLOB = blob_of(DATA, C)
PARTS = parts_of(BLOB, DATA)


class Gated:
    """A source each of whose reads waits until it is let through."""

    def __init__(self) -> None:
        self.asked: list[tuple[range, Urgency]] = []
        self._gates: dict[range, asyncio.Event] = {}

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        self.asked.append((chunks, urgency))
        await self._gates.setdefault(chunks, asyncio.Event()).wait()
        return PARTS[chunks.start : chunks.stop]

    def let(self, *runs: range) -> None:
        for run in runs:
            self._gates.setdefault(run, asyncio.Event()).set()


def chunk(number: int) -> range:
    return range(number, number + 1)


async def quiet() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_read_that_comes_to_a_replayed_run_waits_for_its_own_chunk_only() -> None:
    source = Gated()
    chain = Chain(MemoryBlobs(), source, patience=0, fallbacks=Fallbacks(), in_turns=True)
    replay = asyncio.create_task(chain.read(BLOB, range(4), Urgency.STARTUP))
    await quiet()
    demand = asyncio.create_task(chain.read(BLOB, chunk(2)))
    source.let(chunk(2))
    assert await asyncio.wait_for(demand, 5) == PARTS[2:3]
    assert not replay.done()
    source.let(*map(chunk, range(4)))
    assert await replay == PARTS[:4]
    assert len(source.asked) == 4, "nothing twice"
    await chain.close()


async def test_what_a_program_reads_is_one_request() -> None:
    source = Gated()
    chain = Chain(MemoryBlobs(), source, patience=0, fallbacks=Fallbacks(), in_turns=True)
    source.let(range(4))
    assert await chain.read(BLOB, range(4)) == PARTS[:4]
    assert source.asked == [(range(4), Urgency.DEMAND)]


async def test_demand_gets_past_everything_that_stands_in_the_queue() -> None:
    source = Gated()
    chain = Chain(MemoryBlobs(), source, patience=0, fallbacks=Fallbacks(), in_turns=True)
    backfill = asyncio.create_task(chain.read(BLOB, range(48), Urgency.BACKFILL))
    await quiet()
    assert len(source.asked) == PARALLEL
    new = asyncio.create_task(chain.read(BLOB, chunk(50)))
    queued = asyncio.create_task(chain.read(BLOB, chunk(47)))
    await quiet()
    assert source.asked[PARALLEL:] == [(chunk(47), Urgency.DEMAND), (chunk(50), Urgency.DEMAND)] or (
        source.asked[PARALLEL:] == [(chunk(50), Urgency.DEMAND), (chunk(47), Urgency.DEMAND)]
    )
    source.let(chunk(50), chunk(47))
    assert await new + await queued == [PARTS[50], PARTS[47]]
    source.let(*map(chunk, range(48)))
    await backfill
    await chain.close()


async def test_the_more_urgent_go_first_and_who_leaves_passes_his_turn_on() -> None:
    source = Gated()
    turns = Turns(source, parallel=1)
    first = asyncio.create_task(turns.read(BLOB, chunk(0), Urgency.BACKFILL))
    await quiet()
    others = {
        urgency: asyncio.create_task(turns.read(BLOB, chunk(number), urgency))
        for number, urgency in enumerate((Urgency.BACKFILL, Urgency.PREFETCH, Urgency.STARTUP), 1)
    }
    await quiet()
    source.let(chunk(0))
    await first
    await quiet()
    assert source.asked[-1] == (chunk(3), Urgency.STARTUP)
    others[Urgency.STARTUP].cancel()
    others[Urgency.PREFETCH].cancel()
    source.let(chunk(1))
    assert await asyncio.wait_for(others[Urgency.BACKFILL], 5) == PARTS[1:2]
    assert await asyncio.gather(*others.values(), return_exceptions=True)
    source.let(chunk(5))
    assert await asyncio.wait_for(turns.read(BLOB, chunk(5), Urgency.BACKFILL), 5) == PARTS[5:6]
