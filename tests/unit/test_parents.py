"""Asking, with upstreams that do what a test tells them and a clock that a test moves: who is asked, when, for what."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from dadi.blobs.source import Urgency
from dadi.errors import AccessDenied, DadiError, DigestMismatch, InvalidRequest, NotFound, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from dadi.peers.asking import Asking
from dadi.peers.frames import Frames
from dadi.peers.health import Health, State
from dadi.peers.health import Settings as HealthSettings
from dadi.peers.lanes import joined
from dadi.peers.line import Busy, Heard, RefusedAnew
from dadi.peers.places import Fault, Peer, Place
from tests.contracts.store import C, content, parts_of

DATA = content(600 * C)
BLOB = blob_of(DATA, C)
PARTS = parts_of(BLOB, DATA)
SUPERPEER = "http://superpeer"


class FakeLine:
    """An upstream. `script`: what each request gets, the last one for good."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.wire_bytes = 0
        self.scattered = False
        self.script: list[str | DadiError] = ["send"]
        self.asked: list[tuple[range, Urgency, int]] = []
        self.cancelled = 0
        self.gate = asyncio.Event()

    async def ask(self, blob: Blob, run: range, urgency: Urgency, hops: int, heard: Heard) -> bool:
        self.asked.append((run, urgency, hops))
        what = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if isinstance(what, DadiError):
            raise what
        try:
            if what == "silent":
                await self.gate.wait()
            if what == "wait":
                await asyncio.sleep(0)
                return False
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        heard.begins()
        for chunk in run[:1] if what == "first" else run:
            heard.chunk(chunk, PARTS[chunk], None)
        return True


class World:
    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: dict[str, FakeLine] = {}
        self.health = Health(HealthSettings(margin=0.1, longest=0.2), trusted=[SUPERPEER])
        self.fallbacks = Fallbacks()
        self.dropped: list[list[str]] = []
        self.lacking: list[tuple[str, str]] = []
        self.asking = Asking(
            lambda digest: [SUPERPEER], self.line, self.health, Frames(1 << 20), self.fallbacks,
            on_drops=self.dropped.append, on_lacks=lambda *both: self.lacking.append(both), clock=lambda: self.now,
        )  # fmt: skip

    def line(self, name: str) -> FakeLine:
        return self.lines.setdefault(name, FakeLine(self, name))

    def parents(self, *names: str) -> None:
        self.asking.learn(BLOB.digest, Place(1, 1, tuple(Peer(name, "host:1") for name in names)))
        for name in (*names, SUPERPEER):
            self.line(name)

    def want(self, *chunks: int, urgency: Urgency = Urgency.DEMAND, hops: int = 0) -> asyncio.Future[list[bytes]]:
        return asyncio.gather(*(asyncio.shield(self.asking.want(BLOB, chunk, urgency, hops)) for chunk in chunks))

    async def settle(self, seconds: float = 0.0) -> None:
        """Let `seconds` pass, and everything happen that follows."""
        self.now += seconds
        self.asking.look()
        for _ in range(20):
            await asyncio.sleep(0)
        if seconds:
            self.asking.look()
            for _ in range(20):
                await asyncio.sleep(0)


@pytest.fixture
async def world() -> AsyncIterator[World]:
    made = World()
    yield made
    await made.asking.close()


async def test_neighbours_wanted_in_one_moment_are_one_request(world: World) -> None:
    world.parents("p")
    assert await world.want(3, 4, 5, 9) == [PARTS[3], PARTS[4], PARTS[5], PARTS[9]]
    assert [run for run, _, _ in world.lines["p"].asked] == [range(3, 6), range(9, 10)]


async def test_a_request_is_for_a_mebibyte_at_most(world: World) -> None:
    world.parents("p")
    await world.want(*range(300))
    assert [run for run, _, _ in world.lines["p"].asked] == [range(256), range(256, 300)]


async def test_a_chunk_that_is_on_its_way_is_not_asked_for_again(world: World) -> None:
    world.parents("p")
    both = asyncio.gather(world.want(1), world.want(1, 2))
    assert await both == [[PARTS[1]], [PARTS[1], PARTS[2]]]
    assert [run for run, _, _ in world.lines["p"].asked] == [range(1, 3)]


async def test_a_shorter_answer_is_followed_by_a_request_for_the_rest(world: World) -> None:
    world.parents("p")
    world.line("p").script = ["first", "first", "send"]
    assert await world.want(0, 1, 2, 3) == PARTS[:4]
    assert [run for run, _, _ in world.lines["p"].asked] == [range(4), range(1, 4), range(2, 4)]


async def test_who_waits_is_asked_again_and_nobody_else(world: World) -> None:
    world.parents("p", "q")
    world.line("p").script = ["wait", "wait", "wait", "send"]
    assert await world.want(0) == [PARTS[0]]
    assert len(world.lines["p"].asked) == 4
    assert world.lines["q"].asked == []
    assert world.asking.counts["waits"] == 3


async def test_a_silent_parent_is_hedged_and_its_request_closed_when_the_other_wins(world: World) -> None:
    world.parents("p", "q")
    world.line("p").script = ["silent"]
    wanted = world.want(0, 1)
    await world.settle(0.1)
    assert world.lines["q"].asked == []
    await world.settle(0.15)
    assert [run for run, _, _ in world.lines["q"].asked] == [range(2)]
    assert await wanted == PARTS[:2]
    await world.settle()
    assert world.lines["p"].cancelled == 1
    assert world.asking.statistics()["hedges"] == 2
    assert world.health.state("p", world.now) is not State.GOOD


@pytest.mark.parametrize(
    ("error", "state", "fault"),
    [
        pytest.param(Unavailable("cut off"), State.DROPPED, Fault.FAILED, id="failed"),
        pytest.param(DigestMismatch("wrong bytes"), State.BARRED, Fault.LIED, id="lied"),
        pytest.param(Busy("full", retry_after=30.0), State.DROPPED, None, id="busy"),
        pytest.param(NotFound("not mounted"), State.GOOD, None, id="lacks it"),
        pytest.param(AccessDenied("no token"), State.GOOD, None, id="denied"),
        pytest.param(RefusedAnew("unknown key"), State.DROPPED, Fault.FAILED, id="refuses a fresh token"),
    ],
)
async def test_what_goes_wrong_has_its_own_consequence(
    world: World, error: DadiError, state: State, fault: Fault | None
) -> None:
    world.parents("p", "q")
    world.line("p").script = [error]
    assert await world.want(0, 1) == PARTS[:2]
    assert [run for run, _, _ in world.lines["q"].asked] == [range(2)], "the next, at once"
    assert world.health.state("p", world.now) is state
    assert ("p", fault) in world.health.reports() or fault is None
    assert bool(world.dropped) == (fault is not None)
    assert world.lacking[:1] == ([(BLOB.digest, "p")] if isinstance(error, NotFound) else [])


async def test_a_parent_that_denies_us_is_asked_last_from_then_on(world: World) -> None:
    world.parents("p", "q")
    world.line("p").script = [AccessDenied("your token does not name it")]
    assert await world.want(0, 1) == PARTS[:2]
    assert await world.want(2) == [PARTS[2]]
    assert len(world.lines["p"].asked) == 1
    assert world.asking.choosers[BLOB.digest].parents == ("q", "p")


async def test_a_read_does_not_fail_for_good_by_what_an_upstream_makes_no_sense_of(world: World) -> None:
    world.parents()
    world.line(SUPERPEER).script = [InvalidRequest("no such verb")]
    with pytest.raises(Unavailable, match="no such verb"):
        await world.want(0)


async def test_a_peer_that_a_busy_one_names_is_asked_next_if_it_is_a_parent(world: World) -> None:
    world.parents("p", "q", "r")
    world.line("p").script = [Busy("full", retry_after=5.0, instead="r")]
    assert await world.want(0) == [PARTS[0]]
    assert world.lines["r"].asked
    assert not world.lines["q"].asked
    world.line("r").script = [Busy("full", retry_after=5.0, instead="stranger")]
    assert await world.want(1) == [PARTS[1]]
    assert "stranger" not in world.lines


async def test_when_nobody_is_left_the_read_fails_and_the_next_one_asks_again(world: World) -> None:
    world.parents("p")
    world.line("p").script = [Unavailable("p is away")]
    world.line(SUPERPEER).script = [Unavailable("the superpeer is away"), "send"]
    with pytest.raises(Unavailable, match="away"):
        await world.want(0)
    assert world.asking.statistics()["in_flight"] == 0
    assert await world.want(0) == [PARTS[0]]


async def test_a_request_from_far_away_goes_to_the_superpeer(world: World) -> None:
    world.parents("p")
    assert await world.want(0, hops=64) == [PARTS[0]]
    assert world.lines["p"].asked == []
    assert [hops for _, _, hops in world.lines[SUPERPEER].asked] == [64]


async def test_two_requests_of_backfill_at_a_time_and_demand_past_them(world: World) -> None:
    world.parents("p")
    line = world.line("p")
    line.script = ["silent"]
    for at in range(0, 50, 10):
        world.want(at, urgency=Urgency.BACKFILL)
    await world.settle()
    assert [run.start for run, _, _ in line.asked] == [0, 10]
    world.want(99)
    await world.settle()
    assert [run.start for run, _, _ in line.asked] == [0, 10, 99]
    world.want(40)  # demand joins what waits in the queue
    await world.settle()
    assert line.asked[-1] == (range(40, 41), Urgency.DEMAND, 0)
    line.script = ["send"]
    line.gate.set()
    await world.settle()
    assert sorted(run.start for run, _, _ in line.asked) == [0, 10, 20, 30, 40, 99]


async def test_what_children_want_leaves_room_for_the_nodes_own_reads(world: World) -> None:
    world.parents("p")
    world.line("p").script = ["silent"]
    theirs = [world.want(chunk, hops=1) for chunk in range(0, 200, 2)]
    await world.settle()
    sent = len(world.lines["p"].asked)
    assert sent < len(theirs)
    own = world.want(301)
    await world.settle()
    assert [run for run, _, hops in world.lines["p"].asked[sent:]] == [range(301, 302)]
    world.line("p").gate.set()
    assert await own == [PARTS[301]]
    await asyncio.gather(*theirs)


async def test_what_comes_from_where_is_counted(world: World) -> None:
    world.parents("p")
    await world.want(0, 1)
    await world.want(2, hops=64)
    numbers = world.asking.statistics()
    assert (numbers["peer_bytes"], numbers["superpeer_bytes"]) == (2 * C, C)


async def test_closing_cancels_what_is_in_flight(world: World) -> None:
    world.parents("p")
    world.line("p").script = ["silent"]
    wanted = world.want(0)
    await world.settle()
    await world.asking.close()
    with pytest.raises(asyncio.CancelledError):
        await wanted
    assert world.lines["p"].cancelled == 1


async def test_upstreams_that_nobody_names_any_more_are_forgotten(world: World) -> None:
    world.parents("p")
    await world.want(0)
    world.parents("q")
    await world.asking.tidy({BLOB.digest})
    assert set(world.asking.pipes) == set()
    assert world.asking.gone["bytes"] == C
    await world.asking.tidy(set())
    assert world.asking.choosers == {}


def test_runs_are_of_neighbours_of_one_blob() -> None:
    other = blob_of(content(10, 3), C)
    chunks = [(BLOB, 1), (BLOB, 2), (BLOB, 4), (other, 0)]
    assert list(joined(chunks, 1 << 20)) == [(BLOB, range(1, 3)), (BLOB, range(4, 5)), (other, range(1))]
    assert list(joined(chunks[:2], 1)) == [(BLOB, range(1, 2)), (BLOB, range(2, 3))]


