"""Whom a node asks, and whom next: hedging, liars, loops; a peer that crawls is left as fast as a dead one."""

from __future__ import annotations

import pytest

from dadi.peers.choose import MAX_HOPS, Chooser
from dadi.peers.health import Event, Health, Settings, State
from dadi.peers.places import Peer, Place
from dadi.peers.tries import Ask

RUN, SIZE = range(0, 4), 1 << 20
PATIENCE = 0.1 + SIZE / 4e6


def chooser(*parents: str, superpeers: tuple[str, ...] = ("s1", "s2")) -> Chooser:
    made = Chooser(Health(Settings(margin=0.02, longest=0.1, slowest=4e6), trusted=superpeers), superpeers)
    made.learn(Place(7, 3, tuple(Peer(name) for name in parents)))
    return made


def asked(ask: Ask) -> list[str]:
    return [a_try.upstream for a_try in ask.tries]


def test_parents_come_before_superpeers() -> None:
    assert chooser("p", "q").order(0.0) == ["p", "q", "s1"]
    assert asked(chooser().begin(RUN, SIZE, 0.0)) == ["s1"]


def test_who_takes_too_long_is_hedged_by_the_next_parent_then_the_superpeer() -> None:
    c = chooser("p", "q")
    ask = c.begin(RUN, SIZE, 10.0)
    assert asked(ask) == ["p"]
    assert c.wake_at() == pytest.approx(10 + PATIENCE)
    assert c.due(10 + PATIENCE - 0.001) == []
    assert c.due(10 + PATIENCE) == [(ask, "q")]
    assert c.due(10 + 2 * PATIENCE + 0.001) == [(ask, "s1")]
    assert c.due(10 + 3 * PATIENCE + 0.001) == []  # no stand-in of a superpeer that is only slow
    assert c.hedges == 2


def test_the_first_to_come_wins_and_the_others_are_to_be_cancelled() -> None:
    c = chooser("p", "q")
    ask = c.begin(RUN, SIZE, 10.0)
    c.due(10 + PATIENCE)
    assert c.arrived(ask, "q", 10 + PATIENCE + 0.01) == ["p"]
    assert c.health.state("p", 11.0) is State.SUSPECT
    assert c.health.state("q", 11.0) is State.GOOD
    assert c.wake_at() is None


def test_a_hedge_that_loses_is_nobodys_fault() -> None:
    c = chooser("p", "q")
    ask = c.begin(RUN, SIZE, 10.0)
    c.due(10 + PATIENCE)
    assert c.arrived(ask, "p", 10 + PATIENCE + 0.01) == ["q"]
    assert c.health.state("q", 11.0) is State.GOOD
    assert c.health.reports() == []


@pytest.mark.parametrize("happens", ["failed", "lied", "busy"])
def test_after_a_failure_the_next_is_asked_at_once(happens: str) -> None:
    c = chooser("p", "q")
    ask = c.begin(RUN, SIZE, 0.0)
    following = c.busy(ask, "p", 0.1, 5.0) if happens == "busy" else getattr(c, happens)(ask, "p", 0.1)
    assert following == "q"
    assert asked(ask) == ["q"]
    assert c.order(0.1) == ["q", "s1"]
    assert c.hedges == 0


def test_while_somebody_else_is_being_asked_a_failure_asks_nobody() -> None:
    c = chooser("p", "q")
    ask = c.begin(RUN, SIZE, 0.0)
    c.due(PATIENCE)
    assert c.failed(ask, "p", 0.5) is None
    assert asked(ask) == ["q"]


def test_when_all_have_failed_there_is_nobody_left_and_a_new_ask_tries_the_superpeer_again() -> None:
    c = chooser("p")
    ask = c.begin(RUN, SIZE, 0.0)
    assert [c.failed(ask, who, 0.1) for who in ("p", "s1", "s2")] == ["s1", "s2", None]
    assert asked(ask) == []
    assert asked(c.begin(RUN, SIZE, 0.2)) == ["s1"]


def test_a_superpeer_that_is_away_is_replaced_by_the_next_in_order() -> None:
    c = chooser()
    ask = c.begin(RUN, SIZE, 0.0)
    assert c.failed(ask, "s1", 0.1) == "s2"
    assert asked(c.begin(RUN, SIZE, 0.2)) == ["s2"]
    assert asked(c.begin(RUN, SIZE, 2.0)) == ["s1"]


def test_a_silent_superpeer_is_taken_for_dead_after_a_second_and_not_before() -> None:
    c = chooser()
    ask = c.begin(RUN, SIZE, 0.0)
    assert c.due(PATIENCE + 0.01) == []
    now = PATIENCE
    while not (found := c.due(now)):
        now += 0.05
        assert now < 3.0
    assert found == [(ask, "s2")]
    assert now > 1.0


def test_where_all_superpeers_are_dropped_one_that_hangs_is_not_waited_for() -> None:
    c = chooser()
    for at in (0.0, 1.5, 4.0, 8.5):  # dropped for twice as long each time: until 16.5
        for superpeer in c.superpeers:
            c.health.happened(superpeer, Event.FAILED, at)
    ask = c.begin(RUN, SIZE, 9.0)
    assert asked(ask) == ["s1"]
    now, found = 9.0, []
    while not found:
        now += 0.01  # looked at all the time: other asks have their times, too
        assert now < 12.0
        found = c.due(now)
    assert found == [(ask, "s2")]
    assert now > 10.0, "not both at once: each would fetch it"


def test_a_superpeer_that_answers_however_late_is_well_again_unless_it_has_much_to_do() -> None:
    c = chooser()
    ask, other = c.begin(RUN, SIZE, 0.0), c.begin(RUN, SIZE, 0.0)
    now = 3.0
    c.due(now)
    assert c.health.state("s1", now) is State.DROPPED
    assert c.arrived(ask, "s1", now) == ["s2"]
    assert c.health.state("s1", now) is State.GOOD
    c.health.busy("s1", 60.0, now)
    c.arrived(other, "s1", now + 1)
    assert c.order(now + 2) == ["s2"]
    assert c.order(now + 61) == ["s1"]


def test_a_liar_is_never_asked_again_and_a_failing_peer_is() -> None:
    c = chooser("liar", "weak")
    ask = c.begin(RUN, SIZE, 0.0)
    c.lied(ask, "liar", 0.1)
    c.failed(ask, "weak", 0.1)
    assert c.order(0.2) == ["s1"]
    assert c.order(1e6) == ["weak", "s1"]


def left_after(c: Chooser, answers_at: float | None) -> float:
    """Ask for a run every 10 ms; "p" answers each `answers_at` seconds after the last, if ever; "q" within 1 ms.

    Returns when "p" is no longer asked for new runs.
    """
    waiting: list[Ask] = []
    helped: list[tuple[float, Ask]] = []
    last, now = 0.0, 0.0
    while now < 60.0:
        if c.order(now)[0] != "p":
            return now
        if len(waiting) < 8:
            waiting.append(c.begin(RUN, SIZE, now))
        if answers_at is not None and waiting and now >= last + answers_at:
            last = now
            c.arrived(waiting.pop(0), "p", now)
        helped += [(now + 0.001, ask) for ask, upstream in c.due(now) if upstream == "q"]
        for at, ask in helped:
            if now >= at and ask in waiting:
                c.arrived(ask, "q", now)
                waiting.remove(ask)
        now = round(now + 0.01, 2)
    raise AssertionError("never left")


@pytest.mark.parametrize("every", [0.8, 3.0, 30.0])
def test_a_peer_that_crawls_is_left_as_fast_as_a_dead_one(every: float) -> None:
    dead = left_after(chooser("p", "q"), None)
    assert dead < 2 * PATIENCE
    assert left_after(chooser("p", "q"), every) <= dead + 0.05


def test_a_peer_that_crawls_only_now_is_left_within_the_time_that_answers_take() -> None:
    c = chooser("p", "q")
    for n in range(100):
        c.arrived(c.begin(RUN, SIZE, n * 0.01), "p", n * 0.01 + 0.002)
    assert c.health.patience(SIZE) < 0.025
    asks = [c.begin(RUN, SIZE, 2.0) for _ in range(4)]
    moved = c.due(2.03)
    assert [upstream for _, upstream in moved] == ["q"] * 4
    c.arrived(asks[0], "q", 2.04)
    c.arrived(asks[1], "q", 2.04)
    assert c.order(2.04)[0] == "q"


def test_when_a_peer_is_dropped_all_that_it_was_asked_for_is_asked_of_the_next_without_waiting() -> None:
    c = chooser("p", "q")
    first, *others = [c.begin(RUN, SIZE, 0.0) for _ in range(40)]
    c.failed(first, "p", 0.01)
    assert c.wake_at() == 0.0
    assert c.due(0.01) == [(ask, "q") for ask in others]
    assert c.hedges == 0


def test_what_stands_in_a_queue_that_moves_is_not_late() -> None:
    c = chooser("p", "q")
    asks = [c.begin(RUN, SIZE, 0.0) for _ in range(20)]
    for n, ask in enumerate(asks):
        now = (n + 1) * 0.3
        assert c.due(now) == []
        c.arrived(ask, "p", now)
    assert c.health.state("p", 10.0) is State.GOOD


def test_a_peer_that_says_it_waits_is_not_hedged() -> None:
    c = chooser("p", "q")
    ask = c.begin(RUN, SIZE, 0.0)
    for tenth in range(1, 40):
        c.heard(ask, "p", tenth / 10, waiting=True)
        assert c.due(tenth / 10 + 0.05) == []
    c.heard(ask, "p", 4.0, waiting=False)
    assert c.due(4.0 + PATIENCE - 0.01) == []
    assert c.due(4.0 + PATIENCE) == [(ask, "q")]


def test_a_peer_that_waits_and_falls_silent_has_failed() -> None:
    c = chooser("p", "q")
    ask = c.begin(RUN, SIZE, 0.0)
    c.heard(ask, "p", 0.1, waiting=True)
    c.heard(ask, "p", 0.2, waiting=True)
    assert c.due(0.2 + 0.1 + PATIENCE + 0.01) == [(ask, "q")]
    assert c.health.state("p", 0.7) is State.DROPPED


def test_nobody_may_wait_for_ever() -> None:
    c = chooser("p", "q")
    ask = c.begin(RUN, SIZE, 0.0)
    for tenth in range(1, 51):
        c.heard(ask, "p", tenth / 10, waiting=True)
    c.heard(ask, "p", 5.15, waiting=True)
    assert c.due(5.16) == [(ask, "q")]


def test_who_waits_in_a_queue_that_moves_is_not_late() -> None:
    c = chooser("p", "q")
    ask = c.begin(RUN, SIZE, 0.0)
    for tenth in range(1, 81):
        c.heard(ask, "p", tenth / 10, waiting=True)
        if tenth in (20, 40):  # slow links, or a trace of many chunks: others before it have come
            c.arrived(c.begin(range(tenth, tenth + 4), SIZE, tenth / 10 - 0.01), "p", tenth / 10)
        assert c.due(tenth / 10 + 0.01) == []
    for tenth in range(81, 92):
        c.heard(ask, "p", tenth / 10, waiting=True)
    assert c.due(9.11) == [(ask, "q")]


def waited_out(c: Chooser, begin: float, *, others_take: float = 0.01, hops: int = 0) -> float:
    """Ask for a run of which "p" says every tenth of a second that it waits; return how long it took in the end."""
    ask = c.begin(RUN, SIZE, begin, hops)
    coming: list[tuple[float, str]] = []
    now = begin
    while not any(at <= now for at, _ in coming):
        now = round(now + 0.1, 3)
        if "p" in asked(ask):
            c.heard(ask, "p", now, waiting=True)
        coming += [(now + others_take, upstream) for _, upstream in c.due(now)]
        coming += [(now, t.upstream) for t in ask.tries if t.upstream != "p" and now == round(begin + 0.1, 3)]
    at, upstream = min(coming)
    c.arrived(ask, upstream, at)
    return now - begin


def test_who_waits_for_ever_for_what_others_have_is_left_after_three_of_that() -> None:
    c = chooser("p")
    times = [waited_out(c, 10.0 * n) for n in range(1, 4)]
    assert times[0] > 5.0
    assert times[1] > 5.0  # the first of all may have come to others a moment before it came to "p"
    assert times[2] < 1.0
    assert c.health.state("p", 30.7) is State.DROPPED
    assert c.order(30.7) == ["s1"]
    assert [peer for peer, _ in c.health.reports()] == ["p"]
    assert waited_out(c, 50.0) < 1.0  # it is tried again, and costs little
    assert c.health.state("p", 51.0) is State.DROPPED


def waiting(c: Chooser, asks: int, seconds: float) -> list[Ask]:
    """Begin so many asks of which "p" says every tenth of a second that it waits; all have waited for so long."""
    begun = [c.begin(range(n, n + 1), SIZE, 0.0) for n in range(asks)]
    for tenth in range(1, round(seconds * 10) + 1):
        for ask in begun:
            c.heard(ask, "p", tenth / 10, waiting=True)
    return begun


def test_when_everybody_waits_for_everything_somebody_else_is_asked_for_one_thing_first() -> None:
    c = chooser("p", "q")
    asks = waiting(c, 8, 5.1)
    assert c.due(5.11) == [(asks[0], "q")]
    for ask in asks:
        c.heard(ask, "p", 5.2, waiting=True)
    assert c.due(5.21) == []
    # It comes, in the end, to all of them: nobody is to blame, nobody else is asked.
    c.arrived(asks[0], "q", 5.25)
    for ask in asks[1:]:
        assert c.due(5.26) == []
        c.arrived(ask, "p", 5.26)
    assert c.health.state("p", 5.3) is State.GOOD
    assert c.hedges == 1


def test_if_that_came_from_elsewhere_and_the_others_not_they_follow() -> None:
    c = chooser("p", "q")
    asks = waiting(c, 8, 5.1)
    assert c.due(5.11) == [(asks[0], "q")]
    c.arrived(asks[0], "q", 5.12)
    later = 5.12 + PATIENCE + 0.01
    for ask in asks[1:]:
        c.heard(ask, "p", later, waiting=True)
    assert c.due(later + 0.01) == [(ask, "q") for ask in asks[1:]]
    c.arrived(asks[1], "q", later + 0.02)
    assert c.health.state("p", later + 0.02) is State.SUSPECT
    c.arrived(asks[2], "q", later + 0.03)
    assert c.health.state("p", later + 0.03) is State.DROPPED


def test_a_probe_that_ends_makes_room_for_another() -> None:
    c = chooser("p", "q")
    asks = waiting(c, 2, 5.1)
    assert c.due(5.11) == [(asks[0], "q")]
    c.cancelled(asks[0])
    c.heard(asks[1], "p", 5.2, waiting=True)
    assert c.due(5.21 + PATIENCE) == [(asks[1], "q")]


def test_who_waits_for_what_nobody_has_is_not_blamed() -> None:
    c = chooser("p", "q")
    for n in range(1, 4):
        waited_out(c, 10.0 * n, others_take=PATIENCE + 0.01)
    assert c.health.state("p", 60.0) is State.GOOD


def test_the_nearer_to_where_it_is_stuck_the_sooner_somebody_else_is_asked() -> None:
    took = [waited_out(chooser("p", "q"), 0.0, hops=hops) for hops in range(4)]
    assert took == sorted(took, reverse=True)
    assert took[3] < took[0] - 0.5


def test_waiting_does_not_count_into_how_long_answers_take() -> None:
    c = chooser("p")
    for n in range(32):
        ask = c.begin(RUN, SIZE, float(n))
        c.heard(ask, "p", n + 0.001, waiting=True)
        c.heard(ask, "p", n + 0.9, waiting=False)
        c.arrived(ask, "p", n + 0.902)
    assert c.health.patience(SIZE) < 0.025


def test_hedges_are_limited_where_everything_is_late() -> None:
    c = chooser("p", "q")
    for _ in range(1000):
        c.begin(RUN, SIZE, 0.0)
    assert len(c.due(PATIENCE)) <= 16
    assert c.refused_hedges > 900


def test_a_request_that_came_through_too_many_nodes_goes_to_the_superpeer() -> None:
    c = chooser("p", "q")
    assert asked(c.begin(RUN, SIZE, 0.0, hops=MAX_HOPS - 1)) == ["p"]
    assert asked(c.begin(RUN, SIZE, 0.0, hops=MAX_HOPS)) == ["s1"]


def test_a_superpeer_whose_queue_moves_is_not_late_because_other_parents_were_learnt() -> None:
    c = chooser()
    asks = [c.begin(RUN, SIZE, 0.0) for _ in range(8)]
    for n, ask in enumerate(asks):
        c.learn(Place(7, 3, (Peer(f"p{n}"),)))
        c.arrived(ask, "s1", 0.01 * (n + 1))
    for n in range(8, 32):
        c.arrived(c.begin(RUN, SIZE, 1.0 + n, hops=MAX_HOPS), "s1", 1.01 + n)
    assert c.health.patience(SIZE) < 0.035  # 0.01 s each, not the time since they were asked for


def test_a_probed_peer_is_asked_for_one_thing_only() -> None:
    c = chooser("p", "q")
    c.health.happened("p", Event.FAILED, 0.0)
    assert [asked(c.begin(RUN, SIZE, 2.0)) for _ in range(3)] == [["p"], ["q"], ["q"]]


def test_a_run_that_nobody_wants_any_more_is_no_longer_hedged() -> None:
    c = chooser("p", "q")
    ask = c.begin(RUN, SIZE, 0.0)
    assert c.cancelled(ask) == ["p"]
    assert c.due(100.0) == []
    assert c.wake_at() is None
