"""The body of a registry's answer: what trickles is given up, what is merely slow is not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import pytest

from dadi.errors import Unavailable
from dadi.oci.answer import Answer, Counters
from dadi.oci.retry import Clock


class Trickle:
    """A body that comes piece by piece, `seconds` apart."""

    def __init__(self, piece: bytes, count: int, seconds: float) -> None:
        self.now, self._pieces, self._seconds = 0.0, [piece] * count, seconds

    async def readany(self) -> bytes:
        self.now += self._seconds
        return self._pieces.pop() if self._pieces else b""

    def answer(self, patience: float) -> Answer:
        response: Any = SimpleNamespace(content=self, status=200, headers={}, content_length=None)
        clock = Clock(monotonic=lambda: self.now)
        return Answer(cast(Any, response), "http://r/", "r", True, Counters(), clock, patience)


async def test_a_byte_a_second_is_given_up_after_the_read_timeout() -> None:
    trickle = Trickle(b"x", 1000, 1.0)
    with pytest.raises(Unavailable, match="sent 30 bytes in 30 s"):
        await trickle.answer(30.0).body(1 << 20, "a blob")
    assert trickle.now == 30.0


async def test_a_slow_line_is_not() -> None:
    assert len(await Trickle(bytes(2048), 100, 1.0).answer(30.0).body(1 << 20, "a blob")) == 100 * 2048


async def test_a_reader_that_takes_its_time_does_not_count_against_the_registry() -> None:
    trickle = Trickle(b"x", 100, 0.1)
    answer = trickle.answer(30.0)
    for _ in range(100):
        assert await answer.piece() == b"x"
        trickle.now += 60.0
    assert await answer.piece() == b""


async def test_a_body_that_ends_after_a_long_wait_has_ended() -> None:
    assert await Trickle(b"x", 1, 29.0).answer(30.0).body(10, "a blob") == b"x"
