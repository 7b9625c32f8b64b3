"""What a node gives away, and when it stops to: rate, children, demand first, pressure; hops; the link's rate."""

from __future__ import annotations

import asyncio
import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import Unavailable
from dadi.peers import link
from dadi.peers.hops import hops_of
from dadi.peers.pressure import Pressure, share_stalled
from dadi.peers.upload import Upload, child_of


class Clock:
    def __init__(self) -> None:
        self.now = 100.0
        self.slept: list[float] = []

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.now += seconds


def upload(clock: Clock, rate: int = 0, children: int = 0) -> Upload:
    return Upload(rate=rate, children=children, clock=clock, sleep=clock.sleep)


async def test_what_is_sent_keeps_to_the_rate() -> None:
    clock = Clock()
    sent = upload(clock, rate=1000)
    for _ in range(20):
        async with sent.sending(500, True):
            pass
    assert sent.bytes == 10_000
    assert clock.now - 100.0 == pytest.approx(9.4, abs=0.2)
    assert sent.load(0) == pytest.approx(1.0, abs=0.1)
    assert sent.load(0) == 0.0


async def test_who_would_have_to_wait_too_long_is_sent_away_with_the_time_to_wait() -> None:
    clock = Clock()
    sent = upload(clock, rate=1000)
    async with sent.sending(5000, True):
        pass
    with pytest.raises(Unavailable) as refused:
        async with sent.sending(1, True):
            pass
    assert refused.value.retry_after == pytest.approx(4.9, abs=0.2)
    assert sent.refused == 1
    assert clock.slept == []


def test_so_many_children_and_no_more_until_one_has_gone() -> None:
    clock = Clock()
    sent = upload(clock, children=2)
    sent.admit("a")
    clock.now += 6
    sent.admit("b")
    sent.admit("a")
    assert sent.full
    with pytest.raises(Unavailable):
        sent.admit("c")
    clock.now += 11
    sent.admit("c")
    assert sent.children() == ["c"]


def test_children_are_counted_by_their_addresses_and_not_by_the_names_that_they_give() -> None:
    clock = Clock()
    sent = upload(clock, children=2)
    for n in range(64):
        sent.admit(child_of("10.0.0.9", f"made up {n}"), f"made up {n}")
    assert sent.children() == ["made up 63"]
    sent.admit(child_of("10.0.0.1", "an honest child"))
    assert sent.full


@pytest.mark.parametrize(
    ("remote", "child"),
    [
        ("10.0.0.9", "10.0.0.9"),
        ("::ffff:10.0.0.9", "10.0.0.9"),
        ("fd00::1:2", "fd00::/64"),
        ("127.0.0.1", "name"),
        ("::1", "name"),
        (None, "name"),
    ],
)
def test_what_a_child_is_counted_by(remote: str | None, child: str) -> None:
    assert child_of(remote, "name") == child


def test_children_that_have_gone_are_forgotten_also_where_any_number_may_come() -> None:
    clock = Clock()
    sent = upload(clock, children=0)
    for n in range(1000):
        clock.now += 1
        sent.admit(str(n))
        assert not sent.full
    assert len(sent._children) < 20


def test_so_many_bytes_are_under_way_to_one_child_and_to_all() -> None:
    sent = upload(Clock())
    with contextlib.ExitStack() as under_way:
        for _ in range(16):
            under_way.enter_context(sent.asked("a", 8 << 20))
        with pytest.raises(Unavailable) as refused, sent.asked("a", 1):
            pass
        assert refused.value.retry_after == 1.0
        ends = [sent.fetched(name, 8 << 20) for name in "abcd" for _ in range(16)]
        with pytest.raises(Unavailable):
            sent.fetched("e", 1)
        with sent.asked("b", 8 << 20):
            pass
        for end in ends:
            end()
        sent.fetched("a", 200 << 20)()  # one alone may be as large as it is
    with sent.asked("a", 8 << 20):
        pass
    assert sent.refused == 2
    assert not sent._asked
    assert not sent._fetched


async def test_backfill_stands_aside_while_demand_is_being_sent_and_not_for_ever() -> None:
    sent = Upload(rate=0, children=0)
    order = []

    async def bulk() -> None:
        async with sent.sending(1, False):
            order.append("bulk")

    async with sent.sending(1, True):
        task = asyncio.create_task(bulk())
        await asyncio.sleep(0.01)
        order.append("demand")
    await task
    assert order == ["demand", "bulk"]
    async with sent.sending(1, True):
        await asyncio.wait_for(bulk(), 5)
    assert order == ["demand", "bulk", "bulk"]


# ---- pressure


def test_the_share_of_the_last_ten_seconds_is_read() -> None:
    text = b"some avg10=12.50 avg60=1.00 avg300=0.00 total=1\nfull avg10=99.00 avg60=0.00 avg300=0.00 total=0\n"
    assert share_stalled(text) == 0.125


@given(st.binary(max_size=200))
def test_whatever_the_kernel_says_is_a_share(text: bytes) -> None:
    assert share_stalled(b"some avg10=" + text) >= 0


async def test_pressure_is_looked_at_once_a_second_and_names_what_is_short(tmp_path: Path) -> None:
    clock = Clock()
    (tmp_path / "memory").write_text("some avg10=30.00 avg60=0.00 avg300=0.00 total=0\n")
    pressure = Pressure(memory=0.2, cpu=0.2, root=tmp_path, clock=clock)
    assert pressure.seen() is None
    assert await pressure.why() == "memory"
    (tmp_path / "memory").write_text("some avg10=0.00 avg60=0.00 avg300=0.00 total=0\n")
    assert await pressure.why() == "memory"
    clock.now += 1.1
    assert await pressure.why() is None


async def test_without_the_files_there_is_no_pressure(tmp_path: Path) -> None:
    assert await Pressure(memory=0.01, cpu=0.01, root=tmp_path / "none").why() is None


# ---- hops


@pytest.mark.parametrize(
    ("text", "hops"),
    [(None, 0), ("0", 0), ("7", 7), ("99999", 1000), ("-1", 1000), ("x", 1000), ("", 1000), ("١", 1000)],
)
def test_a_count_of_hops_that_makes_no_sense_is_as_far_away_as_can_be(text: str | None, hops: int) -> None:
    assert hops_of(text) == hops


# ---- link


def interface(root: Path, name: str, speed: str, state: str = "up", *, real: bool = False) -> None:
    (root / name).mkdir(parents=True)
    (root / name / "speed").write_text(speed)
    (root / name / "operstate").write_text(state)
    if real:
        (root / name / "device").mkdir()


def test_the_fastest_real_interface_that_is_up_counts(tmp_path: Path) -> None:
    interface(tmp_path, "veth0", "10000")
    assert link.rate(tmp_path) == link.FAST
    interface(tmp_path, "eth0", "1000\n", real=True)
    interface(tmp_path, "eth1", "25000\n", "down", real=True)
    interface(tmp_path, "eth2", "-1\n", real=True)
    assert link.rate(tmp_path) == 125_000_000
    assert link.rate(tmp_path / "none") == 0
