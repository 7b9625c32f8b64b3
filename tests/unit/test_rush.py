"""Ten thousand joins in one second: all get their turn, and no more at once than the process can bear."""

from __future__ import annotations

import heapq
import itertools

import pytest

from superpeer.rush import BURST, LONGEST, SHARE, Rush

EACH = 0.001


@pytest.mark.parametrize("nodes", [10, 1000, 10_000])
def test_all_are_taken_at_the_rate_that_the_process_can_bear_and_none_is_asked_to_come_for_nothing_often(
    nodes: int,
) -> None:
    rush = Rush(cost=EACH)
    coming = [(n / nodes, n, 0) for n in range(nodes)]  # (when, who, tries)
    taken: list[float] = []
    most_tries = 0
    while coming:
        now, who, tries = heapq.heappop(coming)
        wait = rush.wait(now)
        if wait:
            # As the header tells it: whole seconds, rounded up; and a part of a second that the node draws itself.
            heapq.heappush(coming, (now + int(wait + 1) + (who * 0.618) % 1, who, tries + 1))
        else:
            taken.append(now)
            most_tries = max(most_tries, tries)
    assert len(taken) == nodes
    within = max(sum(at <= other < at + 1 for other in taken) for at in taken[:: max(1, nodes // 100)])
    assert within <= (1 + BURST) * SHARE / EACH + 1
    assert max(taken) < 1.3 * nodes * EACH / SHARE + 3
    assert most_tries <= 6


def test_turns_are_spread_and_bounded() -> None:
    rush = Rush(cost=EACH)
    waits = [wait for _ in range(100_000) if (wait := rush.wait(0.0))]
    assert rush.put_off == len(waits)
    assert all(earlier < later for earlier, later in itertools.pairwise(waits[:40_001]))
    assert max(waits) <= LONGEST + 1
    late = waits[-1000:]
    assert max(late) - min(late) > LONGEST / 4, "who comes too late for a turn does not come with all the others"


def test_what_joins_cost_is_learnt() -> None:
    rush = Rush(cost=EACH)
    for _ in range(200):
        rush.took(0.1)
    taken = 0
    while not rush.wait(0.0):
        taken += 1
    assert taken <= BURST * SHARE / 0.1 + 1


def test_a_quiet_hour_is_not_saved_up() -> None:
    rush = Rush(cost=EACH)
    taken = sum(not rush.wait(3600.0) for _ in range(10_000))
    assert taken <= BURST * SHARE / EACH + 2
