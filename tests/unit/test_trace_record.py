"""Recording of starts: what misses and hits tell, windows, their end; in a time of the test's own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dadi.index.chunks import Blob, blob_of
from dadi.prefetch.record import MOST_WINDOWS, Recorder

SIZE = 4096
A, B = (blob_of(bytes([letter]) * (20 * SIZE), SIZE) for letter in b"ab")


class World:
    """Marks of devices, and a clock that moves when somebody sleeps (and calls `then` each time)."""

    def __init__(self) -> None:
        self.now = 100.0
        self.marks = {blob.digest: bytearray(20) for blob in (A, B)}
        self.then = lambda: None
        self.recorder = Recorder(self.marks.get, clock=lambda: self.now, sleep=self.sleep)

    async def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.then()
        await asyncio.sleep(0)

    def hit(self, blob: Blob, *chunks: int) -> None:
        for chunk in chunks:
            self.marks[blob.digest][chunk] = 1

    def miss(self, blob: Blob, first: int, count: int = 1) -> None:
        self.recorder.missed(blob, range(first, first + count))


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.recorder.close()


async def test_misses_and_hits_are_recorded_in_order_with_times(world: World) -> None:
    window = world.recorder.open([A, B])
    assert window is not None
    world.miss(A, 7)
    world.now += 0.01
    world.miss(B, 2, 2)
    world.hit(A, 3)
    world.now += 0.01
    world.recorder.look()
    world.miss(A, 7)
    world.hit(A, 3, 9)
    world.recorder.look()
    found = window.recording("n")
    order = [(A.digest, 7), (B.digest, 2), (B.digest, 3), (A.digest, 3), (A.digest, 9)]
    assert found.chunks() == order
    assert [at for *_, at in found.steps] == [0, 10, 10, 20, 20]
    assert {digest for digest, _ in found.blobs} == {A.digest, B.digest}


async def test_a_layer_that_becomes_local_in_the_middle_was_watched_in_part(world: World) -> None:
    local = set()
    recorder = Recorder(world.marks.get, is_local=local.__contains__, clock=lambda: world.now, sleep=world.sleep)
    window = recorder.open([A, B])
    assert window is not None
    world.hit(A, 3)
    recorder.look()
    del world.marks[A.digest]
    local.add(A.digest)
    world.hit(B, 4)
    recorder.look()
    found = window.recording("n")
    assert [found.blobs[place][0] for place in found.partial] == [A.digest]
    assert found.watched() == window.watched == {B.digest}
    assert found.chunks() == [(A.digest, 3), (B.digest, 4)]
    del world.marks[B.digest]
    recorder.look()
    assert window.closed.is_set()
    assert window.watched == {B.digest}, "it was unmounted: there was nothing more to see"
    await recorder.close()


async def test_a_window_ends_when_it_is_quiet(world: World) -> None:
    window = world.recorder.open([A])
    assert window is not None
    world.miss(A, 1)
    began = world.now
    await window.closed.wait()
    assert 2.0 <= world.now - began < 2.1


async def test_a_window_ends_after_thirty_seconds_of_reading(world: World) -> None:
    window = world.recorder.open([A])
    assert window is not None
    world.miss(A, 0)
    began = world.now
    world.then = lambda: world.miss(A, min(19, int(world.now - began)))
    world.then = lambda: world.hit(A, int((world.now - began) / 1.6) % 20)
    await window.closed.wait()
    assert 30.0 <= world.now - began < 30.1


async def test_a_container_that_is_started_minutes_after_the_mount_is_recorded(world: World) -> None:
    window = world.recorder.open([A])
    assert window is not None
    began = world.now
    world.then = lambda: world.hit(A, 4) if world.now - began > 300 else None
    await window.closed.wait()
    assert window.recording("n").steps == ((0, 4, 0),)
    assert world.recorder.looks < 1600, "it is looked at seldom while nothing is read"


async def test_a_window_in_which_nothing_is_ever_read_is_given_up(world: World) -> None:
    window = world.recorder.open([A])
    assert window is not None
    await window.closed.wait()
    assert window.chunks == {}


async def test_reads_of_before_do_not_count(world: World) -> None:
    world.hit(A, 5)
    window = world.recorder.open([A])
    assert window is not None
    world.miss(A, 1)
    world.recorder.look()
    assert [chunk for _, chunk in window.chunks] == [1]


async def test_an_unmounted_image_is_watched_no_longer(world: World) -> None:
    window = world.recorder.open([A])
    assert window is not None
    world.miss(A, 1)
    world.recorder.look()
    del world.marks[A.digest]
    world.recorder.look()
    assert window.closed.is_set()
    world.miss(A, 2)
    assert len(window.chunks) == 1


async def test_two_images_that_share_a_layer_both_see_its_reads(world: World) -> None:
    one, other = world.recorder.open([A]), world.recorder.open([A, B])
    assert one is not None
    assert other is not None
    world.hit(A, 5)
    world.recorder.look()
    world.miss(B, 1)
    assert list(one.chunks) == [(A.digest, 5)]
    assert list(other.chunks) == [(A.digest, 5), (B.digest, 1)]


async def test_windows_are_bounded(world: World) -> None:
    assert all(world.recorder.open([A]) for _ in range(MOST_WINDOWS))
    assert world.recorder.open([A]) is None
