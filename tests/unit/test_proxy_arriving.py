"""A blob on its way in: readers at any pace, wrong bytes, breaking off; nothing is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.ingest import DiskIngest
from dadi.errors import DadiError, DigestMismatch, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, table_of
from dadi.originals.arriving import Arriving
from dadi.originals.intake import Intake
from dadi.originals.original import Original, Passing

DATA = Random(1).randbytes(1_000_000)
DIGEST = digests.of(DATA)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DiskBlobs]:
    store = DiskBlobs(tmp_path)
    yield store
    await store.close()


class Stream:
    """Pieces that come when the test says so. `error` is raised at the end."""

    def __init__(self, pieces: list[bytes], error: DadiError | None = None) -> None:
        self.pieces = pieces
        self.error = error
        self.allowed = asyncio.Semaphore(0)
        self.closed = False

    def go(self, pieces: int = 10_000) -> None:
        for _ in range(pieces):
            self.allowed.release()

    async def __call__(self) -> AsyncGenerator[bytes, None]:
        try:
            for piece in self.pieces:
                await self.allowed.acquire()
                yield piece
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


def pieces_of(data: bytes, size: int = 100_000) -> list[bytes]:
    return [data[at : at + size] for at in range(0, len(data), size)]


def arriving(store: DiskBlobs, stream: Stream, size: int = len(DATA)) -> tuple[Arriving, asyncio.Event]:
    ended = asyncio.Event()
    return Arriving(store, DIGEST, size, stream, Fallbacks(), lambda _: ended.set()), ended


async def read(original: Original, offset: int = 0, length: int = len(DATA)) -> bytes:
    got = b""
    async for part in original.parts(offset, length):
        got += part.data if part.data is not None else os.pread(part.fd, part.length, part.offset)
    return got


async def test_readers_of_any_range_get_their_bytes_and_it_is_kept_with_a_table(store: DiskBlobs) -> None:
    stream = Stream(pieces_of(DATA))
    blob, ended = arriving(store, stream)
    readers = [asyncio.create_task(read(blob, at, 50_000)) for at in range(0, 950_000, 70_000)]
    stream.go(3)
    while blob.here < 300_000:
        await asyncio.sleep(0)
    late = asyncio.create_task(read(blob))
    stream.go()
    assert await late == DATA
    assert [await reader for reader in readers] == [DATA[at : at + 50_000] for at in range(0, 950_000, 70_000)]
    await ended.wait()
    found = store.find(DIGEST)
    assert found is not None
    assert found.table == table_of(DATA)


async def test_nobody_gets_the_last_byte_before_the_whole_is_verified(store: DiskBlobs) -> None:
    stream = Stream(pieces_of(DATA))
    blob, ended = arriving(store, stream)
    parts = blob.parts(0, 1000)
    stream.go(9)
    part = await anext(parts)
    assert part.length == 999
    stream.go()
    assert (await anext(parts)).length == 1
    await parts.aclose()
    await ended.wait()


async def test_wrong_bytes_reach_nobody_whole_and_are_not_kept(store: DiskBlobs, tmp_path: Path) -> None:
    wrong = DATA[:-1] + bytes([DATA[-1] ^ 1])
    stream = Stream(pieces_of(wrong))
    blob, ended = arriving(store, stream)
    stream.go()
    for offset, length in ((0, len(DATA)), (0, 10), (len(DATA) - 1, 1)):
        with pytest.raises(DigestMismatch):
            await read(blob, offset, length)
    await ended.wait()
    await blob.close()
    assert not store.has(DIGEST)
    assert not list((tmp_path / "incoming").iterdir())


async def test_breaking_off_is_told_to_readers_and_leaves_nothing(store: DiskBlobs, tmp_path: Path) -> None:
    stream = Stream(pieces_of(DATA))
    blob, ended = arriving(store, stream)
    reader = asyncio.create_task(read(blob))
    stream.go(2)
    while not blob.here:
        await asyncio.sleep(0)
    await blob.close()
    with pytest.raises(Unavailable):
        await reader
    await ended.wait()
    assert stream.closed
    assert not list((tmp_path / "incoming").iterdir())


async def test_an_error_of_the_stream_is_the_readers_error(store: DiskBlobs) -> None:
    stream = Stream(pieces_of(DATA[:500_000]), Unavailable("the registry has gone"))
    blob, ended = arriving(store, stream)
    stream.go()
    with pytest.raises(Unavailable, match="has gone"):
        await read(blob)
    await ended.wait()


async def test_one_that_is_closed_before_it_began_leaves_nothing(store: DiskBlobs, tmp_path: Path) -> None:
    blob, ended = arriving(store, Stream([]))
    await blob.close()
    await ended.wait()
    assert isinstance(blob.error, Unavailable)
    assert not list((tmp_path / "incoming").iterdir())


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=5000), st.integers(1, 700), st.data())
def test_what_passes_by_is_exactly_the_range(data: bytes, size: int, draw: st.DataObject) -> None:
    async def once() -> None:
        stream = Stream(pieces_of(data, size))
        stream.go()
        offset = draw.draw(st.integers(0, max(0, len(data) - 1)))
        length = draw.draw(st.integers(1, max(1, len(data) - offset)))
        if data:
            assert await read(Passing(digests.of(data), len(data), stream), offset, length) == data[offset:][:length]
        again = Stream(pieces_of(data + b"x", size))
        again.go()
        with pytest.raises(DigestMismatch):
            await read(Passing(digests.of(data), len(data), again), 0, max(1, len(data)))

    asyncio.run(once())


async def test_who_comes_when_nobody_reads_it_any_more_reads_what_was_kept(store: DiskBlobs) -> None:
    stream = Stream(pieces_of(DATA))
    blob, ended = arriving(store, stream)
    stream.go()
    await ended.wait()
    await blob.settled()
    while blob._fd >= 0:
        await asyncio.sleep(0)
    assert await read(blob, 7, 100_000) == DATA[7:100_007]


async def test_who_comes_when_it_was_not_kept_is_told_so(store: DiskBlobs) -> None:
    stream = Stream(pieces_of(DATA[:500_000]), Unavailable("the registry has gone"))
    blob, ended = arriving(store, stream)
    stream.go()
    await ended.wait()
    await blob.close()
    with pytest.raises(Unavailable, match="has gone"):
        await read(blob)


async def test_what_is_here_can_be_looked_at_but_not_its_last_byte(store: DiskBlobs) -> None:
    stream = Stream(pieces_of(DATA))
    blob, ended = arriving(store, stream)
    assert await blob.head(0, 100) == b""
    stream.go(2)
    while blob.here < 200_000:
        await asyncio.sleep(0)
    assert await blob.head(199_990, 100) == DATA[199_990:200_000]
    assert await blob.head(300_000, 100) == b""
    stream.go()
    while blob.here < len(DATA):
        await asyncio.sleep(0)
    assert await blob.head(len(DATA) - 5, 100) in (DATA[-5:-1], b"")
    await ended.wait()
    assert await blob.head(0, 100) == b"", "nobody needs it any more"


async def test_a_second_arrival_of_the_same_blob_joins_the_first(store: DiskBlobs) -> None:
    streams = [Stream(pieces_of(DATA)), Stream(pieces_of(DATA))]
    intake = Intake(store, Fallbacks(), lambda: 1000.0)
    first = intake.begin(DIGEST, len(DATA), lambda distrust: streams[0]())
    second = intake.begin(DIGEST, len(DATA), lambda distrust: streams[1]())
    readers = [asyncio.create_task(read(blob)) for blob in (first, second)]
    for stream in streams:
        stream.go()
    async with asyncio.timeout(10):
        assert [await reader for reader in readers] == [DATA, DATA]
    async with asyncio.timeout(10):
        while intake.busy:
            await asyncio.sleep(0.005)
    assert (intake.blobs, streams[1].closed) == (1, False)
    await intake.close()


async def test_who_finds_a_blob_in_the_store_may_rely_on_its_having_been_told_of(
    store: DiskBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    really, seen = store.commit, asyncio.Event()

    async def commit(ingest: object, blob: Blob, *, asked: bool) -> None:
        assert told == ["verified"], "before anybody can find it"
        await really(ingest, blob, asked=asked)
        assert store.has(DIGEST)
        seen.set()

    monkeypatch.setattr(store, "commit", commit)
    stream = Stream([DATA])
    stream.go()
    intake = Intake(store, Fallbacks(), lambda: 0.0)
    original = intake.begin(DIGEST, len(DATA), lambda _: stream(), lambda: told.append("verified"))
    assert isinstance(original, Arriving)
    await original.settled()
    assert seen.is_set()
    assert told == ["verified"], "once"
    await intake.close()


@pytest.mark.parametrize("again", ["the same", "other bytes"])
async def test_readers_go_on_with_streams_of_their_own_when_the_disk_is_full_in_the_middle(
    store: DiskBlobs, monkeypatch: pytest.MonkeyPatch, again: str
) -> None:
    """And are cut off if what they have been given, unverified, is not what those begin with."""
    first = DATA if again == "the same" else b"?" + DATA[1:]
    streams = iter([Stream(pieces_of(first)), Stream(pieces_of(DATA)), Stream(pieces_of(DATA))])
    begun: list[Stream] = []

    def stream() -> AsyncGenerator[bytes, None]:
        begun.append(next(streams))
        begun[-1].go(3 if len(begun) == 1 else 10)
        return begun[-1]()

    write, room = DiskIngest.write, asyncio.Event()

    def full(ingest: DiskIngest, data: bytes) -> None:
        if room.is_set():
            raise StoreFull("no space left")
        write(ingest, data)

    monkeypatch.setattr(DiskIngest, "write", full)
    blob = Arriving(store, DIGEST, len(DATA), stream, Fallbacks(), lambda _: None)
    readers = [asyncio.create_task(read(blob)), asyncio.create_task(read(blob, 250_000, 500_000))]
    while blob.here < 300_000:
        await asyncio.sleep(0)
    room.set()
    begun[0].go()
    found = await asyncio.gather(*readers, return_exceptions=True)
    if again == "the same":
        assert found == [DATA, DATA[250_000:750_000]]
    else:
        assert isinstance(found[0], DigestMismatch)
    assert all(one.closed for one in begun)
    assert not list((store.root / "incoming").iterdir())
