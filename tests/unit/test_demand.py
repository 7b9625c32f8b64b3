"""Quiet and idle: when backfill may begin and when it must stand aside; and how it cuts what is missing."""

from __future__ import annotations

import asyncio

from dadi.index.chunks import Blob, ChunkTable
from dadi.node.backfill import pieces
from dadi.node.demand import Demand


async def test_it_is_not_quiet_while_a_read_waits_nor_right_after() -> None:
    now = 0.0
    demand = Demand(clock=lambda: now)
    now = 10.0
    assert demand.quiet_for() == 10.0
    with demand.waiting():
        now = 20.0
        assert demand.quiet_for() == 0.0
        with demand.waiting():
            pass
        assert demand.quiet_for() == 0.0
    assert demand.quiet_for() == 0.0
    now = 23.0
    assert (demand.quiet_for(), demand.pending, demand.total) == (3.0, 0, 2)


async def test_idle_waits_for_the_last_reader() -> None:
    demand = Demand(clock=lambda: 0.0)
    await demand.idle()
    with demand.waiting():
        waiter = asyncio.create_task(demand.idle())
        await asyncio.sleep(0)
        assert not waiter.done()
    await waiter


def test_what_is_missing_is_cut_into_runs_of_a_megabyte() -> None:
    chunk = 256 << 10
    blob = Blob("sha256:" + "0" * 64, ChunkTable(20 * chunk, chunk, bytes(20 * 32)))
    assert pieces(blob, [0, 1, 2, 3, 4, 5, 9, 11, 12]) == [range(4), range(4, 6), range(9, 10), range(11, 13)]
    large = Blob("sha256:" + "0" * 64, ChunkTable(4 << 22, 1 << 22, bytes(4 * 32)))
    assert pieces(large, [0, 1, 3]) == [range(1), range(1, 2), range(3, 4)]
