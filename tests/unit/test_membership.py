"""A node's part in the trees: what is joined, said and left, with a directory that does what a test tells it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence

import pytest

from dadi.errors import Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from dadi.peers.asking import Asking
from dadi.peers.frames import Frames
from dadi.peers.health import Event, Health
from dadi.peers.membership import Condition, Membership
from dadi.peers.places import Fault, Heartbeat, Peer, Place
from tests.contracts.store import C, content

A, B = blob_of(content(3 * C), C), blob_of(content(2 * C, 5), C)
ME = Peer("me", "host:1")
PARENT, OTHER = Peer("p", "10.0.0.1:7071"), Peer("q", "10.0.0.2:7071")


class Directory:
    heartbeat_every = 3600.0

    def __init__(self) -> None:
        self.waits: dict[str, float] = {}
        self.parents: tuple[Peer, ...] = (PARENT, OTHER)
        self.joins: list[tuple[list[str], list[str], list[tuple[str, Fault]]]] = []
        self.beats: list[Heartbeat] = []
        self.changed: dict[str, Place] = {}
        self.error: Exception | None = None
        self.left = 0
        self.refuses: set[str] = set()

    async def join(self, peer: Peer, blobs: Sequence[str], without: Iterable[str] = (),
                   reports: Iterable[tuple[str, Fault]] = ()) -> dict[str, Place]:  # fmt: skip
        self.joins.append((list(blobs), list(without), list(reports)))
        if self.error is not None:
            raise self.error
        return {blob: Place(7, 2, self.parents) for blob in blobs if blob not in self.refuses}

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Place]:
        self.beats.append(beat)
        return self.changed

    async def leave(self) -> None:
        self.left += 1


class World:
    def __init__(self) -> None:
        self.now = 1000.0
        self.used: list[Blob] = []
        self.directory = Directory()
        self.fallbacks = Fallbacks()
        self.health = Health()
        self.asking = Asking(lambda digest: ["http://s"], lambda name: None, self.health, Frames(0),
                             self.fallbacks, clock=lambda: self.now)  # fmt: skip
        self.membership = Membership(
            ME, self.directory, self.asking, self.fallbacks, in_use=lambda: self.used,
            present=lambda blob: (2, blob is B), condition=self.condition,
            clock=lambda: self.now,
        )  # fmt: skip

    async def condition(self) -> Condition:
        return Condition(0.25, refuses=True)

    async def settle(self) -> None:
        async with asyncio.timeout(5):
            while self.membership._to_join or self.membership._wake.is_set():
                await asyncio.sleep(0.005)
            for _ in range(5):
                await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    made.membership.start()
    yield made
    await made.membership.close()
    await made.asking.close()


async def test_the_blobs_of_an_image_are_joined_in_one_request(world: World) -> None:
    world.membership.expect([A, B])
    world.membership.expect([A])
    await world.membership.placed(A.digest)
    assert [blobs for blobs, _, _ in world.directory.joins] == [[A.digest, B.digest]]
    assert world.asking.choosers[A.digest].parents == ("p", "q")
    assert world.membership.addresses == {"p": PARENT.address, "q": OTHER.address}


async def test_a_heartbeat_says_all_that_the_directory_wants_to_know(world: World) -> None:
    world.used = [A, B]
    await world.membership.beat()
    await world.settle()
    world.health.happened("p", Event.LIED, world.now)
    await world.membership.beat()
    beat = world.directory.beats[-1]
    assert (beat.peer, beat.load, beat.refuses, beat.liars) == (ME, 0.25, True, ("p",))
    assert beat.reports == (("p", Fault.LIED),)
    assert [(t.blob, t.order, t.depth, t.parents, t.chunks, t.complete) for t in beat.blobs] == [
        (A.digest, 7, 2, ("p", "q"), 2, False), (B.digest, 7, 2, ("p", "q"), 2, True),
    ]  # fmt: skip
    await world.membership.beat()
    assert world.directory.beats[-1].reports == (), "reports are said once"
    assert world.directory.beats[-1].liars == ("p",), "liars again and again"


async def test_what_a_heartbeat_changes_is_taken(world: World) -> None:
    world.used = [A]
    await world.membership.beat()
    await world.settle()
    world.directory.changed = {A.digest: Place(9, 3, (OTHER,)), B.digest: Place(9, 3, (OTHER,))}
    await world.membership.beat()
    assert world.asking.choosers[A.digest].parents == ("q",)
    assert B.digest not in world.asking.choosers


async def test_a_blob_out_of_use_is_left_with_the_next_heartbeat_and_one_that_is_awaited_is_not(world: World) -> None:
    world.used = [A]
    await world.membership.beat()
    world.membership.expect([B])
    await world.settle()
    world.used = []
    await world.membership.beat()
    assert [told.blob for told in world.directory.beats[-1].blobs] == [B.digest]
    world.now += 61
    await world.membership.beat()
    assert world.directory.beats[-1].blobs == ()
    assert world.membership.blobs == {}


async def test_a_parent_that_lacks_the_blob_is_not_wanted_for_it_any_more(world: World) -> None:
    world.membership.expect([A])
    await world.settle()
    world.membership.lacks(A.digest, "p")
    await world.settle()
    assert world.directory.joins[-1] == ([A.digest], ["p"], [])
    assert world.asking.choosers[A.digest].parents == ("q",), "whatever the directory says"
    assert world.health.unwanted(world.now) == frozenset()


async def test_one_dead_parent_of_many_blobs_is_one_join_without_it(world: World) -> None:
    world.membership.expect([A, B])
    await world.settle()
    world.health.happened("p", Event.FAILED, world.now)
    world.membership.again([A.digest])
    world.membership.again([B.digest, "sha256:unknown"])
    await world.settle()
    while len(world.directory.joins) < 2:
        await asyncio.sleep(0.01)
    assert world.directory.joins[1:] == [([A.digest, B.digest], ["p"], [("p", Fault.FAILED)])]


async def test_a_join_that_fails_is_said_delays_nobody_and_is_tried_with_the_next_heartbeat(world: World) -> None:
    world.directory.error = Unavailable("nobody there")
    world.membership.expect([A])
    await world.membership.placed(A.digest)
    assert "join failed" in {row["kind"] for row in world.fallbacks.statistics()}
    world.directory.error = None
    await world.membership.beat()
    await world.settle()
    assert A.digest in world.membership.places


async def test_what_the_directory_puts_off_is_joined_when_it_said_and_not_sooner(world: World) -> None:
    world.directory.waits, world.directory.parents = {A.digest: 0.2}, ()
    world.directory.refuses = {A.digest}
    world.membership.expect([A, B])
    await world.membership.placed(A.digest)
    assert list(world.membership.places) == [B.digest]
    await world.membership.beat()
    await world.settle()
    assert len(world.directory.joins) == 1, "a heartbeat does not make it sooner"
    assert world.membership.statistics()["waiting"] == 1
    world.directory.waits, world.directory.refuses = {}, set()
    async with asyncio.timeout(5):
        while A.digest not in world.membership.places:
            await asyncio.sleep(0.01)
    assert [blobs for blobs, _, _ in world.directory.joins] == [[A.digest, B.digest], [A.digest]]


async def test_parents_stay_while_the_directory_puts_off_a_join_for_others(world: World) -> None:
    world.membership.expect([A])
    await world.membership.placed(A.digest)
    world.directory.waits, world.directory.refuses = {A.digest: 0.01}, {A.digest}
    world.membership.lacks(A.digest, "p")
    async with asyncio.timeout(5):
        while len(world.directory.joins) < 3:
            await asyncio.sleep(0.01)
    assert world.asking.choosers[A.digest].parents == ("p", "q")


async def test_nobody_waits_for_a_place_longer_than_a_moment(world: World) -> None:
    world.membership.expect([A])
    world.now += 2.01
    await world.membership.placed(A.digest)
    assert world.membership.late == 1
    await world.membership.placed("sha256:of-no-image")
    assert world.membership.late == 1


@pytest.mark.parametrize(
    "peer",
    [
        Peer("http://s", "10.0.0.1:1"),
        ME,
        Peer("x", ""),
        Peer("x", "10.0.0.1:1/v1/elsewhere?"),
        Peer("x", "user:secret@10.0.0.1:1"),
        Peer("x", "10.0.0.1"),
    ],
)
async def test_what_cannot_be_a_parent_is_none(world: World, peer: Peer) -> None:
    world.directory.parents = (peer, Peer("v6", "[fd00::1]:7071"))
    world.membership.expect([A])
    await world.settle()
    assert world.asking.choosers[A.digest].parents == ("v6",)


@pytest.mark.parametrize(
    ("own", "address", "taken"),
    [
        ("10.0.0.9:7071", "127.0.0.1:7072", False),
        ("10.0.0.9:7071", "[::1]:7072", False),
        ("10.0.0.9:7071", "localhost:7072", False),
        ("10.0.0.9:7071", "[::ffff:127.0.0.1]:7072", False),
        ("10.0.0.9:7071", "10.0.0.9:7071", False),
        ("10.0.0.9:7071", "0.0.0.0:7071", False),
        ("10.0.0.9:7071", "10.0.0.9:7072", True),
        ("0.0.0.0:7071", "127.0.0.1:7071", False),
        ("0.0.0.0:7071", "127.0.0.1:7072", True),
        ("127.0.0.1:7071", "127.0.0.1:7072", True),
    ],
)
async def test_nobody_is_a_parent_at_an_address_that_leads_to_the_node_itself(
    world: World, own: str, address: str, taken: bool
) -> None:
    world.membership.peer = Peer("me", own)
    world.directory.parents = (Peer("x", address), PARENT)
    world.membership.expect([A])
    await world.settle()
    assert world.asking.choosers[A.digest].parents == (("x", "p") if taken else ("p",))


async def test_leaving_is_said(world: World) -> None:
    await world.membership.close()
    assert world.directory.left == 1
