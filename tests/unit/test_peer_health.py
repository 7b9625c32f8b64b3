"""What a node has seen of its peers: the life cycle as a table, backing off, and how long an answer may take."""

from __future__ import annotations

import random

import pytest

from dadi.peers.health import OF_SUPERPEERS, TRANSITIONS, Event, Health, Settings, State
from dadi.peers.places import Fault

KIB, MIB = 1 << 10, 1 << 20
SETTINGS = Settings(dropped=1.0, dropped_most=300.0, margin=0.02, longest=0.1, slowest=4e6)


def in_state(state: State, *, trusted: bool = False) -> Health:
    health = Health(SETTINGS, trusted=["p"] if trusted else [])
    path = {
        State.GOOD: (),
        State.SUSPECT: (Event.LATE,),
        State.DROPPED: (Event.FAILED,),
        State.PROBING: (Event.FAILED,),
        State.BARRED: (Event.LIED,),
    }[state]
    for event in path:
        health.happened("p", event, -10.0 if state is State.PROBING else 0.0)
    assert health.state("p", 0.0) is state
    return health


@pytest.mark.parametrize("state", list(State))
@pytest.mark.parametrize("event", [event for event in Event if event is not Event.OVER])
def test_events_lead_where_the_table_says_and_all_others_change_nothing(state: State, event: Event) -> None:
    assert in_state(state).happened("p", event, 0.0) is TRANSITIONS.get((state, event), state)


@pytest.mark.parametrize("state", [State.GOOD, State.DROPPED, State.PROBING])
@pytest.mark.parametrize("event", [event for event in Event if event is not Event.OVER])
def test_superpeers_have_a_table_of_their_own(state: State, event: Event) -> None:
    health = in_state(state, trusted=True)
    assert health.happened("p", event, 0.0) is OF_SUPERPEERS.get((state, event), state)
    assert health.reports() == []
    assert health.unwanted(0.0) == frozenset()


def test_a_superpeer_is_only_ever_in_states_that_its_table_has() -> None:
    assert {state for state, _ in OF_SUPERPEERS} == set(OF_SUPERPEERS.values())


def test_the_table_is_complete_and_barred_is_final() -> None:
    assert {state for state, _ in TRANSITIONS} == set(State) - {State.BARRED}
    assert all(TRANSITIONS[state, Event.LIED] is State.BARRED for state in State if state is not State.BARRED)
    assert set(TRANSITIONS.values()) == set(State)


def test_a_peer_that_fails_is_dropped_for_a_while_and_then_probed_one_thing_at_a_time() -> None:
    health = Health(SETTINGS)
    health.happened("p", Event.FAILED, 100.0)
    assert not health.may_ask("p", 100.9)
    assert health.may_ask("p", 101.0)
    health.asked("p")
    assert not health.may_ask("p", 101.0)
    health.happened("p", Event.ANSWERED, 101.5)
    assert health.may_ask("p", 101.5)


def test_each_time_a_peer_is_dropped_it_is_dropped_for_twice_as_long() -> None:
    health, now, waits = Health(SETTINGS), 100.0, []
    for _ in range(10):
        health.happened("p", Event.FAILED, now)
        at = now
        while health.state("p", at) is State.DROPPED:
            at += 0.5
        waits.append(at - now)
        now = at
    assert waits == [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]


def test_many_failures_at_once_are_one() -> None:
    health = Health(SETTINGS)
    for _ in range(16):
        health.happened("p", Event.FAILED, 100.0)
    assert health.may_ask("p", 101.0)
    assert health.reports() == [("p", Fault.FAILED)]


def test_what_is_reported_is_reported_once_with_its_reason() -> None:
    health = Health(SETTINGS, trusted=["s"])
    health.happened("a", Event.LATE, 0.0)
    health.happened("a", Event.LATE, 0.0)
    health.happened("b", Event.LIED, 0.0)
    health.happened("b", Event.LIED, 0.0)
    health.happened("s", Event.FAILED, 0.0)
    assert health.reports() == [("a", Fault.SLOW), ("b", Fault.LIED)]
    assert health.reports() == []
    assert health.liars() == ["b"]
    assert health.unwanted(0.0) == {"a", "b"}


def test_a_superpeer_is_never_barred_and_never_late() -> None:
    health = Health(SETTINGS, trusted=["s"])
    assert health.happened("s", Event.LATE, 0.0) is State.GOOD
    assert health.happened("s", Event.LIED, 0.0) is State.DROPPED
    assert health.may_ask("s", 1.0)


def test_a_busy_peer_is_left_alone_for_as_long_as_it_asks_and_not_reported() -> None:
    health = Health(SETTINGS)
    health.busy("p", 5.0, 100.0)
    assert not health.may_ask("p", 104.9)
    assert health.may_ask("p", 105.0)
    assert health.reports() == []
    health.busy("p", 1e9, 200.0)
    assert health.may_ask("p", 500.0)


@pytest.mark.parametrize("trusted", [True, False])
def test_nothing_that_a_busy_one_answers_makes_it_good_before_its_time(trusted: bool) -> None:
    health = Health(SETTINGS, trusted=["p"] if trusted else [])
    health.busy("p", 5.0, 100.0)
    assert health.happened("p", Event.ANSWERED, 104.9) is State.DROPPED
    assert health.happened("p", Event.ANSWERED, 105.0) is State.GOOD
    assert health.drops == 0


def test_forgotten_are_those_that_are_well_and_idle() -> None:
    health = Health(SETTINGS)
    for peer in ("idle", "asked", "kept"):
        health.asked(peer)
    for peer in ("idle", "kept"):
        health.ended(peer)
    health.happened("bad", Event.FAILED, 0.0)
    health.forget(keep=["kept"])
    assert "bad" in repr(health)
    assert set(health._records) == {"asked", "kept", "bad"}


def test_before_anything_was_observed_patience_is_that_of_the_settings() -> None:
    assert Health(SETTINGS).patience(MIB) == pytest.approx(0.1 + MIB / 4e6)


def test_patience_is_the_95th_percentile_and_a_margin() -> None:
    health, chance = Health(SETTINGS), random.Random(5)
    for _ in range(400):
        health.took(MIB, chance.uniform(0.0, 0.1))
    assert health.patience(MIB) == pytest.approx(0.095 * 1.05 + 0.02, rel=0.07)


def test_patience_follows_the_network() -> None:
    health = Health(SETTINGS)
    for _ in range(1000):
        health.took(MIB, 0.002)
    fast = health.patience(MIB)
    for _ in range(2000):
        health.took(MIB, 0.1)
    assert fast < 0.023
    assert health.patience(MIB) > 0.1


def test_a_node_that_has_only_ever_seen_crawling_does_not_take_it_for_normal() -> None:
    health = Health(SETTINGS)
    for _ in range(100):
        health.took(MIB, 20.0)
    assert health.patience(MIB) == pytest.approx(0.1 + MIB / 4e6)


def test_a_size_that_was_not_seen_yet_is_judged_by_the_nearest() -> None:
    health = Health(Settings(longest=10.0, margin=0.0))
    for _ in range(100):
        health.took(256 * KIB, 0.01)
    assert health.patience(MIB) == pytest.approx(4 * health.patience(256 * KIB))
    assert health.patience(4 * KIB) == health.patience(256 * KIB)
