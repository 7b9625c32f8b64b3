"""One upstream asked for one run: its states as a table, and when it is late, is overdue, is stuck."""

from __future__ import annotations

import pytest

from dadi.peers.health import Health
from dadi.peers.health import Settings as HealthSettings
from dadi.peers.tries import ON_BEGINS, ON_WAITS, Ask, Lateness, Settings, Try, TryState

PATIENCE, WAITING, MOST = 0.5, 0.3, 5.0
ASKED, WAITS, SENDING = TryState.ASKED, TryState.WAITING, TryState.SENDING


def lateness() -> Lateness:
    health = Health(HealthSettings(longest=PATIENCE, slowest=1e18))
    return Lateness(health, Settings(waiting=WAITING, superpeer_silent=3.0, waiting_most=MOST))


def begun(made: Lateness, now: float = 10.0, upstream: str = "p") -> tuple[Ask, Try]:
    ask = Ask(range(1), 1, 0)
    made.begin(ask, upstream, now)
    return ask, ask.tries[0]


def in_state(made: Lateness, state: TryState, now: float = 10.0) -> tuple[Ask, Try]:
    ask, a_try = begun(made, now)
    for waiting in {ASKED: (), WAITS: (True,), SENDING: (True, False)}[state]:
        made.heard(ask, a_try, now, waiting=waiting)
    assert a_try.state is state
    return ask, a_try


@pytest.mark.parametrize("state", list(TryState))
@pytest.mark.parametrize("waiting", [True, False])
def test_what_is_heard_leads_where_the_table_says_and_else_changes_nothing(state: TryState, waiting: bool) -> None:
    made = lateness()
    ask, a_try = in_state(made, state)
    before = (a_try.state, a_try.since, a_try.due)
    made.heard(ask, a_try, 10.2, waiting=waiting)
    after = (ON_WAITS if waiting else ON_BEGINS).get(state)
    if after is None:
        assert (a_try.state, a_try.since, a_try.due) == before
    else:
        assert (a_try.state, a_try.since) == (after, 10.2)


def test_the_table_is_the_one_that_is_written_down() -> None:
    assert ON_WAITS == {ASKED: WAITS, WAITS: WAITS, SENDING: WAITS}
    assert ON_BEGINS == {WAITS: SENDING}


@pytest.mark.parametrize(("state", "late", "overdue"), [(ASKED, PATIENCE, 4 * PATIENCE),
                                                       (WAITS, WAITING + PATIENCE, WAITING + PATIENCE),
                                                       (SENDING, PATIENCE, 4 * PATIENCE)])  # fmt: skip
def test_when_a_try_is_late_and_when_it_is_overdue(state: TryState, late: float, overdue: float) -> None:
    made = lateness()
    ask, a_try = in_state(made, state)
    assert made.late_at(ask, a_try) == pytest.approx(10 + late)
    assert not made.is_overdue(ask, a_try, 10 + overdue - 0.01, superpeer=False)
    assert made.is_overdue(ask, a_try, 10 + overdue + 0.01, superpeer=False)


def test_a_superpeer_that_says_nothing_is_overdue_later() -> None:
    made = lateness()
    ask, a_try = begun(made)
    assert not made.is_overdue(ask, a_try, 10 + PATIENCE + 2.99, superpeer=True)
    assert made.is_overdue(ask, a_try, 10 + PATIENCE + 3.01, superpeer=True)


@pytest.mark.parametrize("state", list(TryState))
def test_whatever_comes_from_its_upstream_puts_off_when_it_is_late(state: TryState) -> None:
    made = lateness()
    ask, a_try = in_state(made, state)
    made._health.heard("p", 12.0)
    assert made.late_at(ask, a_try) == pytest.approx(12 + PATIENCE + (WAITING if state is WAITS else 0))


def test_until_when_one_may_wait_counts_from_the_last_chunk_of_the_blob() -> None:
    made = lateness()
    ask, a_try = in_state(made, WAITS)
    assert a_try.waits_until == pytest.approx(10 + MOST)
    made.came("p", 13.0)
    made.heard(ask, a_try, 13.1, waiting=True)
    assert a_try.waits_until == pytest.approx(13 + MOST)


def test_of_what_waits_one_run_is_asked_of_somebody_else_and_the_others_once_it_is_stuck() -> None:
    made = lateness()
    (first, its_try), (second, other) = in_state(made, WAITS), in_state(made, WAITS)
    assert made.may_hedge(first, 15.1)
    assert not made.may_hedge(second, 15.1)
    assert not made.outrun(first, its_try, 15.2, at_once=True)
    assert not made.may_hedge(second, 15.2 + PATIENCE - 0.01)
    assert made.may_hedge(second, 15.2 + PATIENCE + 0.01)
    assert not made.outrun(second, other, 15.2 + PATIENCE + 0.02, at_once=False)
    assert made.outrun(second, other, 15.2 + PATIENCE + 0.02, at_once=True)


def test_one_that_gives_something_is_not_stuck() -> None:
    made = lateness()
    (first, its_try), (second, _), (third, third_try) = (in_state(made, WAITS) for _ in range(3))
    assert made.may_hedge(first, 15.1)
    made.outrun(first, its_try, 15.2, at_once=True)
    made.won(third, third_try, 15.3, 0.0)
    assert not made.may_hedge(second, 16.0)


def test_what_is_no_parent_any_more_is_forgotten() -> None:
    made = lateness()
    ask, a_try = in_state(made, WAITS)
    made.came("p", 12.0)
    made.may_hedge(ask, 15.1)
    made.outrun(ask, a_try, 15.2, at_once=True)
    made.forget({"q"})
    made.heard(ask, a_try, 20.0, waiting=True)
    assert a_try.waits_until == pytest.approx(10 + MOST)
    assert made.may_hedge(in_state(made, WAITS, 20.0)[0], 25.1)
