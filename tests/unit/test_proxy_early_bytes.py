"""The first bytes of a blob that a superpeer is still getting: given at once, compared later, and never the last."""

from __future__ import annotations

import os
from collections.abc import AsyncGenerator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dadi.errors import DigestMismatch, Unavailable, Unreachable
from dadi.fallbacks import Fallbacks
from dadi.originals import waiting
from dadi.originals.messages import HEAD, OriginalAnswer
from dadi.originals.original import Original, OriginalPart
from dadi.originals.restart import GONE
from dadi.originals.waiting import Waiting

DATA = bytes(range(256)) * 200


class Given:
    """An original that comes in pieces, from memory and from a file by turns."""

    def __init__(self, file: Path, data: bytes, piece: int) -> None:
        file.write_bytes(data)
        self._file, self._data, self._piece = file, data, piece
        self.size = len(data)

    async def parts(self, offset: int, length: int) -> AsyncGenerator[OriginalPart, None]:
        fd = os.open(self._file, os.O_RDONLY)
        try:
            for number, at in enumerate(range(offset, offset + length, self._piece)):
                count = min(self._piece, offset + length - at)
                yield OriginalPart(fd, at, count, self._data[at : at + count] if number % 2 else None)
        finally:
            os.close(fd)


class Superpeer:
    """Has `arrived` bytes more at each question, and all at the last of `questions`."""

    def __init__(self, data: bytes, arrived: int, questions: int) -> None:
        self.data, self.arrived, self.questions = data, arrived, questions
        self.asked: list[tuple[int, int]] = []

    async def __call__(self, wait: int, start: int) -> OriginalAnswer:
        self.asked.append((wait, start))
        if len(self.asked) >= self.questions:
            return OriginalAnswer(len(self.data))
        here = min(self.arrived * len(self.asked), len(self.data) - 1)
        return OriginalAnswer(len(self.data), coming=True, head=self.data[start : min(here, start + HEAD)])


def waiting_for(superpeer: Superpeer, original: Original) -> Waiting:
    return Waiting(original.size, 10, superpeer, lambda said: original, Fallbacks())


async def read(original: Original, offset: int, length: int) -> list[bytes]:
    return [
        part.data if part.data is not None else os.pread(part.fd, part.length, part.offset)
        async for part in original.parts(offset, length)
    ]


async def test_the_first_bytes_come_before_the_blob_is_there(tmp_path: Path) -> None:
    superpeer = Superpeer(DATA, 1000, 4)
    parts = await read(waiting_for(superpeer, Given(tmp_path / "blob", DATA, 7000)), 0, len(DATA))
    assert [len(part) for part in parts[:3]] == [1000, 1000, 1000]
    assert b"".join(parts) == DATA
    assert superpeer.asked == [(1, 0), (10, 1000), (10, 2000), (10, 3000)], "soon at first, by long poll then"


async def test_bytes_that_were_wrong_end_the_answer_before_anything_else_is_given(tmp_path: Path) -> None:
    superpeer = Superpeer(b"x" + DATA[1:], 1000, 2)
    parts = waiting_for(superpeer, Given(tmp_path / "blob", DATA, 7000)).parts(0, len(DATA))
    assert (await anext(parts)).length == 1000
    with pytest.raises(DigestMismatch):
        await anext(parts)


async def test_an_error_of_the_superpeer_is_the_readers(tmp_path: Path) -> None:
    async def ask(wait: int, start: int) -> OriginalAnswer:
        raise Unavailable("gone")

    with pytest.raises(Unavailable, match="gone"):
        await read(Waiting(10, 10, ask, lambda said: Given(tmp_path / "x", DATA, 1), Fallbacks()), 0, 10)


@pytest.mark.parametrize(("gone_at", "waits"), [(0, False), (2, True)])
async def test_a_superpeer_that_is_gone_for_a_moment_is_waited_for_by_who_has_been_given_something(
    tmp_path: Path, gone_at: int, waits: bool
) -> None:
    superpeer, fallbacks, failures = Superpeer(DATA, 1000, 4), Fallbacks(), 0

    async def ask(wait: int, start: int) -> OriginalAnswer:
        nonlocal failures
        if len(superpeer.asked) == gone_at and failures < 2:
            failures += 1
            raise Unreachable("restarted just now")
        return await superpeer(wait, start)

    original = Given(tmp_path / "blob", DATA, 7000)
    blob = Waiting(len(DATA), 10, ask, lambda said: original, fallbacks)
    if waits:
        assert b"".join(await read(blob, 0, len(DATA))) == DATA
        assert [row["kind"] for row in fallbacks.statistics()] == [GONE]
    else:
        with pytest.raises(Unreachable):
            await read(blob, 0, len(DATA))


async def test_who_hears_nothing_for_too_long_takes_what_there_is_and_who_gets_bytes_goes_on_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "PATIENCE", 0.0)
    silent, slow = Superpeer(DATA, 0, 1000), Superpeer(DATA, 10, 1000)
    for superpeer, questions in ((silent, 1), (slow, 1)):
        blob = Given(tmp_path / "blob", DATA, 7000)
        assert b"".join(await read(waiting_for(superpeer, blob), 0, len(DATA))) == DATA
        assert len(superpeer.asked) == questions
    last = Superpeer(DATA, 10, 20)
    assert await read(waiting_for(last, blob), 5, 1) == [DATA[5:6]]
    assert len(last.asked) == 20, "no stream brings the last byte before the whole is there"
    monkeypatch.setattr(waiting, "PATIENCE", 3600.0)
    slow = Superpeer(DATA, 10, 300)
    assert b"".join(await read(waiting_for(slow, blob), 0, len(DATA))) == DATA
    assert len(slow.asked) == 300


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(1, 3000), st.integers(1, 900), st.integers(0, 700), st.integers(1, 6), st.data())
async def test_any_range_is_exactly_its_bytes_and_the_last_is_never_early(
    tmp_path: Path, size: int, piece: int, arrived: int, questions: int, draw: st.DataObject
) -> None:
    offset = draw.draw(st.integers(0, size - 1))
    length = draw.draw(st.integers(1, size - offset))
    superpeer = Superpeer(DATA[:size], arrived, questions)
    parts = await read(waiting_for(superpeer, Given(tmp_path / "blob", DATA[:size], piece)), offset, length)
    assert b"".join(parts) == DATA[offset : offset + length]
    assert all(start < offset + length for _, start in superpeer.asked)
