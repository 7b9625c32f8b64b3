"""Order of service to one upstream: each class has its own few requests, and none waits behind a lower one."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from dadi.blobs.source import Urgency
from dadi.errors import DadiError
from dadi.index.chunks import blob_of
from dadi.peers.pipe import Pipe, Wish

SIZE = 4096
BLOB = blob_of(bytes(400 * SIZE), SIZE)


class Line:
    """Never answers; says what it was asked for."""

    wire_bytes = 0

    def __init__(self) -> None:
        self.asked: list[tuple[range, Urgency]] = []

    async def ask(self, blob: Any, run: range, urgency: Urgency, hops: int, heard: Any) -> bool:
        self.asked.append((run, urgency))
        await asyncio.Event().wait()
        return True


class Asker:
    def failed(self, wish: Wish, upstream: str, error: DadiError) -> None:
        raise AssertionError(error)


async def asked(*urgencies: Urgency) -> list[tuple[range, Urgency]]:
    line, asker = Line(), Asker()
    of_any: Any = line
    pipe = Pipe("up", of_any, asker)  # type: ignore[arg-type]
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
