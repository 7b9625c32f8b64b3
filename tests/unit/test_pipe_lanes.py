"""Order of service to one upstream: each class has its own few requests, and none waits behind a lower one."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from dadi.blobs.source import Urgency
from dadi.errors import DadiError
from dadi.index.chunks import Blob, ChunkTable, blob_of
from dadi.peers.lanes import Wish
from dadi.peers.pipe import Pipe

SIZE = 4096
BLOB = blob_of(bytes(400 * SIZE), SIZE)


class Line:
    """Never answers; says what it was asked for."""

    wire_bytes = 0

    def __init__(self, *, scattered: bool = False) -> None:
        self.scattered = scattered
        self.asked: list[tuple[Any, Urgency]] = []
        self.heard: list[Any] = []

    async def ask(self, blob: Any, run: Any, urgency: Urgency, hops: int, heard: Any) -> bool:
        self.asked.append((run, urgency))
        self.heard.append(heard)
        await asyncio.Event().wait()
        return True


class Asker:
    def __init__(self) -> None:
        self.told: dict[int, str] = {}

    def waits(self, wish: Wish, upstream: str) -> None:
        self.told[wish.chunk] = "waits"

    def begins(self, wish: Wish, upstream: str) -> None:
        self.told[wish.chunk] = "begins"

    def failed(self, wish: Wish, upstream: str, error: DadiError) -> None:
        raise AssertionError(error)


async def asked(*urgencies: Urgency) -> list[tuple[range, Urgency]]:
    line, asker = Line(), Asker()
    of_any: Any = line
    pipe = Pipe("up", of_any, asker)
    try:
        for place, urgency in enumerate(urgencies):
            for number in range(40):  # scattered: nothing can be joined
                pipe.want(Wish(BLOB, 8 * number + 2 * place, urgency, 0))
        for _ in range(5):
            await asyncio.sleep(0)
        return line.asked
    finally:
        await pipe.close()


async def test_each_class_has_its_share_and_higher_ones_are_sent_first() -> None:
    found = [urgency for _, urgency in await asked(*reversed(Urgency))]
    assert Counter(found) == {Urgency.DEMAND: 32, Urgency.STARTUP: 6, Urgency.PREFETCH: 2}
    assert found == sorted(found)


@pytest.mark.parametrize(("urgency", "most"), [(Urgency.STARTUP, 6), (Urgency.PREFETCH, 2), (Urgency.BACKFILL, 2)])
async def test_what_nobody_waits_for_leaves_room(urgency: Urgency, most: int) -> None:
    assert len(await asked(urgency)) == most


async def scattered(chunks: int, chunk: int, urgency: Urgency) -> tuple[Line, Asker, Pipe]:
    """Want every other one of `chunks` of `chunk` bytes, from an upstream that takes what is scattered."""
    line, asker = Line(scattered=True), Asker()
    of_any: Any = line
    pipe = Pipe("up", of_any, asker)
    blob = Blob(BLOB.digest, ChunkTable(2 * chunks * chunk, chunk, bytes(64 * chunks)))
    for number in range(chunks):
        pipe.want(Wish(blob, 2 * number, urgency, 0))
    for _ in range(5):
        await asyncio.sleep(0)
    return line, asker, pipe


@pytest.mark.parametrize(("urgency", "sizes"), [(Urgency.STARTUP, [12, 12]), (Urgency.DEMAND, [4] * 10),
                                                (Urgency.BACKFILL, [4, 4])])  # fmt: skip
async def test_what_is_scattered_goes_into_few_requests_where_that_is_understood(
    urgency: Urgency, sizes: list[int]
) -> None:
    line, _, pipe = await scattered(40, 256 << 10, urgency)
    try:
        assert [len(run) for run, _ in line.asked] == sizes
        assert [chunk for run, _ in line.asked for chunk in run] == list(range(0, 2 * sum(sizes), 2))
    finally:
        await pipe.close()


async def test_what_stands_behind_a_request_that_waits_is_said_to_wait_until_something_comes() -> None:
    line, asker, pipe = await scattered(40, 256 << 10, Urgency.STARTUP)
    try:
        line.heard[0].waits()
        assert {chunk for chunk, told in asker.told.items() if told == "waits"} == {*range(0, 24, 2), *range(48, 80, 2)}
        line.heard[0].begins(0)
        assert {chunk for chunk, told in asker.told.items() if told == "begins"} == {0, *range(48, 80, 2)}
    finally:
        await pipe.close()
