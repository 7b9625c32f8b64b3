"""Neighbours in one request, the most urgent first, each chunk once."""

import asyncio

import pytest

from dadi.blobs.joined import Joined, together
from dadi.blobs.source import Urgency
from dadi.errors import Unavailable
from dadi.index.chunks import Blob, blob_of

CHUNK = 4096
DATA = b"".join(bytes([number]) * CHUNK for number in range(32))
BLOB = blob_of(DATA, CHUNK)


class Gated:
    """A source each of whose reads waits until the test lets it go."""

    def __init__(self) -> None:
        self.reads: list[range] = []
        self.gates: list[asyncio.Future[None]] = []

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        gate = asyncio.get_running_loop().create_future()
        self.reads.append(chunks)
        self.gates.append(gate)
        await gate
        return [DATA[chunk * CHUNK : (chunk + 1) * CHUNK] for chunk in chunks]

    async def let_go(self, number: int) -> None:
        self.gates[number].set_result(None)
        await turn()


async def turn() -> None:
    """Let every task do what it can."""
    for _ in range(20):
        await asyncio.sleep(0)


def ask(joined: Joined, chunks: range, urgency: Urgency = Urgency.DEMAND) -> asyncio.Task[list[bytes]]:
    return asyncio.create_task(joined.read(BLOB, chunks, urgency))


async def test_what_waits_beside_each_other_becomes_one_read() -> None:
    source = Gated()
    joined = Joined(source, parallel=1, largest=100 * CHUNK)
    tasks = [ask(joined, range(0, 2))]
    await turn()
    tasks += [ask(joined, range(at, at + 2)) for at in (10, 14, 12, 20)]
    await turn()
    await source.let_go(0)
    await source.let_go(1)
    await source.let_go(2)
    assert source.reads == [range(0, 2), range(10, 16), range(20, 22)]
    assert [await task for task in tasks][3] == [DATA[12 * CHUNK : 13 * CHUNK], DATA[13 * CHUNK : 14 * CHUNK]]


async def test_a_read_is_never_larger_than_allowed() -> None:
    source = Gated()
    joined = Joined(source, parallel=1, largest=4 * CHUNK)
    task = ask(joined, range(0, 10))
    for number in range(3):
        await turn()
        await source.let_go(number)
    assert [len(run) for run in source.reads] == [4, 4, 2]
    assert b"".join(await task) == DATA[: 10 * CHUNK]


async def test_demand_overtakes_what_nobody_waits_for() -> None:
    source = Gated()
    joined = Joined(source, parallel=1, largest=2 * CHUNK)
    rest = ask(joined, range(0, 6), Urgency.BACKFILL)
    await turn()
    demand = ask(joined, range(20, 22))
    await turn()
    for number in range(4):
        await source.let_go(number)
    assert source.reads == [range(0, 2), range(20, 22), range(2, 4), range(4, 6)]
    await asyncio.gather(rest, demand)


async def test_demand_for_a_chunk_that_waits_patiently_moves_it_up_and_leaves_its_neighbours() -> None:
    source = Gated()
    joined = Joined(source, parallel=1, largest=8 * CHUNK)
    rest = ask(joined, range(0, 1), Urgency.BACKFILL)
    await turn()
    more = ask(joined, range(2, 8), Urgency.BACKFILL)
    await turn()
    demand = ask(joined, range(5, 6))
    await turn()
    await source.let_go(0)
    assert source.reads[1] == range(5, 6)
    await source.let_go(1)
    assert await demand == [DATA[5 * CHUNK : 6 * CHUNK]]
    await source.let_go(2)
    await source.let_go(3)
    await asyncio.gather(rest, more)
    assert joined.joined == 1


async def test_demand_finds_a_way_free_while_the_rest_is_fetched() -> None:
    source = Gated()
    joined = Joined(source, parallel=4, largest=CHUNK)
    rest = ask(joined, range(0, 8), Urgency.BACKFILL)
    await turn()
    assert len(source.reads) == 2
    demand = ask(joined, range(20, 21))
    await turn()
    assert source.reads[2] == range(20, 21)
    for number in range(9):
        await source.let_go(number)
    await asyncio.gather(rest, demand)


async def test_a_demand_waits_with_a_read_that_is_under_way_for_nobody() -> None:
    source = Gated()
    joined = Joined(source, parallel=4, largest=8 * CHUNK)
    rest = ask(joined, range(0, 4), Urgency.BACKFILL)
    await turn()
    demand = ask(joined, range(2, 3))
    await turn()
    await source.let_go(0)
    await asyncio.gather(rest, demand)
    assert source.reads == [range(0, 4)]


async def test_a_read_for_nobody_is_smaller_so_that_a_demand_does_not_wait_long_with_it() -> None:
    source = Gated()
    joined = Joined(source, parallel=4, largest=8 * CHUNK, patient=2 * CHUNK)
    rest, demand = ask(joined, range(0, 6), Urgency.BACKFILL), ask(joined, range(10, 18))
    for number in range(4):
        await turn()
        await source.let_go(number)
    await asyncio.gather(rest, demand)
    assert sorted(map(len, source.reads)) == [2, 2, 2, 8]


async def test_a_demand_overtakes_a_read_for_nobody_where_that_is_cheap() -> None:
    source = Gated()
    joined = Joined(source, parallel=4, largest=8 * CHUNK, overtake=True)
    rest = ask(joined, range(0, 4), Urgency.BACKFILL)
    demand = ask(joined, range(2, 3))  # at once: the read for nobody has not even begun
    more = ask(joined, range(2, 3))
    await turn()
    assert source.reads == [range(0, 4), range(2, 3)]
    await source.let_go(1)
    assert await demand == await more == [DATA[2 * CHUNK : 3 * CHUNK]]
    assert not rest.done()
    await source.let_go(0)
    assert b"".join(await rest) == DATA[: 4 * CHUNK]
    again = ask(joined, range(2, 3))
    await turn()
    await source.let_go(2)
    assert await again == [DATA[2 * CHUNK : 3 * CHUNK]]


async def test_a_read_for_nobody_that_lands_first_leaves_the_demand_its_own() -> None:
    source = Gated()
    joined = Joined(source, parallel=4, largest=8 * CHUNK, overtake=True)
    rest = ask(joined, range(0, 4), Urgency.BACKFILL)
    await turn()
    demand = ask(joined, range(2, 3))
    await turn()
    await source.let_go(0)
    await source.let_go(1)
    assert [len(parts) for parts in await asyncio.gather(rest, demand)] == [4, 1]


async def test_a_reader_who_goes_away_harms_nobody() -> None:
    source = Gated()
    joined = Joined(source, parallel=1, largest=8 * CHUNK)
    first, second = ask(joined, range(0, 4)), ask(joined, range(2, 4))
    await turn()
    first.cancel()
    await source.let_go(0)
    assert await second == [DATA[2 * CHUNK : 3 * CHUNK], DATA[3 * CHUNK : 4 * CHUNK]]
    assert source.reads == [range(0, 4)]


async def test_closing_fails_every_reader_and_leaves_nothing_waiting() -> None:
    source = Gated()
    joined = Joined(source, parallel=1, largest=2 * CHUNK)
    tasks = [ask(joined, range(0, 2)), ask(joined, range(8, 10))]
    await turn()
    await joined.close()
    for task in tasks:
        with pytest.raises(Unavailable, match="broken off"):
            await task
    with pytest.raises(Unavailable, match="broken off"):
        await joined.read(BLOB, range(1))
    assert len(source.reads) == 1


async def test_an_error_reaches_every_reader_and_the_next_one_asks_anew() -> None:
    source = Gated()
    joined = Joined(source, parallel=1, largest=2 * CHUNK)
    tasks = [ask(joined, range(0, 2)), ask(joined, range(1, 2))]
    await turn()
    source.gates[0].set_exception(Unavailable("away"))
    for task in tasks:
        with pytest.raises(Unavailable, match="away"):
            await task
    again = ask(joined, range(0, 2))
    await turn()
    await source.let_go(1)
    assert len(await again) == 2


async def test_together_cancels_the_others_and_raises_the_error_itself() -> None:
    ended: list[str] = []

    async def waits() -> None:
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            ended.append("waits")

    async def fails() -> None:
        raise Unavailable("away")

    with pytest.raises(Unavailable, match="away"):
        await together([waits(), fails()])
    assert ended == ["waits"]


async def test_each_class_goes_before_the_next_and_leaves_a_read_free_for_those_before_it() -> None:
    source = Gated()
    joined = Joined(source, parallel=4, largest=CHUNK)
    tasks = [ask(joined, range(at, at + 4), urgency)
             for at, urgency in ((0, Urgency.BACKFILL), (10, Urgency.PREFETCH), (20, Urgency.STARTUP))]  # fmt: skip
    await turn()
    assert source.reads == [range(0, 1), range(1, 2), range(20, 21)], "half for nobody; what starts soon finds one free"
    tasks.append(ask(joined, range(30, 31)))
    await turn()
    assert source.reads[3:] == [range(30, 31)], "and one that is always there for demand"
    for number in range(13):
        await source.let_go(number)
    await asyncio.gather(*tasks)
    order = [run.start // 10 for run in source.reads if run.start < 30]
    assert order == [0, 0] + [2] * 4 + [1] * 4 + [0, 0]
