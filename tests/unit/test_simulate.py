"""The simulation: small topologies against times worked out by hand, bounds that nothing beats, faults that end."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dadi.errors import ConfigError
from dadi.simulate.bounds import bounds, tree_time
from dadi.simulate.result import simulate
from dadi.simulate.settings import Settings
from dadi.simulate.world import World

MIB = 1 << 20
ENDLESS = 1e15
"""A rate at which nothing takes any time."""
SMALL = Settings(
    nodes=1, racks=1, image_size=10 * MIB, startup=1.0, chunk=MIB, join_chunks=1, nic=100e6, registry=50e6,
    latency=0.001, registry_latency=0.004, join_time=0.0, misses=0, window=64 * MIB, root_slots=1,
)  # fmt: skip
C, M = MIB, 10


def times(**changes: object) -> list[float]:
    return simulate(msgspec.structs.replace(SMALL, **changes)).times


def test_one_node_takes_the_join_the_requests_the_registrys_link_and_one_run_more() -> None:
    join = 2 * 0.001
    expected = join + 0.001 + 2 * 0.004 + M * C / 50e6 + C / 100e6 + 0.001
    assert times() == pytest.approx([expected])


def test_joins_are_served_one_after_the_other() -> None:
    without = times(nodes=3, root_slots=3, superpeer_nic=ENDLESS)
    late = times(nodes=3, root_slots=3, superpeer_nic=ENDLESS, join_time=1.0)
    assert late == pytest.approx([without[0] + n for n in (1.0, 2.0, 3.0)], abs=0.25)


def test_each_hop_of_a_chain_adds_one_run_and_one_latency() -> None:
    (one,) = times()
    assert times(nodes=4, slots=1, far_slots=0) == pytest.approx([one + n * (C / 100e6 + 0.001) for n in range(4)])


def test_a_parent_sends_to_its_children_in_turn() -> None:
    found = times(nodes=3, slots=2, superpeer_nic=ENDLESS, registry=ENDLESS)
    first = 2 * 0.001 + 0.001 + 2 * 0.004 + 0.001 + C / 100e6
    assert found[0] == pytest.approx(first + (M - 1) * C / 100e6)
    # From when the parent has the first run, its link is busy with two copies of each.
    assert found[2] == pytest.approx(first + 2 * M * C / 100e6 + 0.001)


def test_a_superpeer_that_serves_all_takes_as_many_times_as_long() -> None:
    found = times(nodes=8, racks=8, root_slots=8, registry=ENDLESS)
    begin = 2 * 0.001 + 0.001 + 2 * 0.004 + C / 100e6
    assert found[-1] == pytest.approx(begin + 8 * M * C / 100e6 + 0.001)


def test_dependent_reads_cost_a_round_trip_and_a_run_each() -> None:
    # The window is one run, so that reads are all there is; the superpeer asks the registry for each.
    found = simulate(msgspec.structs.replace(SMALL, bulk=False, think=0.01))
    one = 2 * 0.001 + C / 100e6 + 2 * 0.004 + C / 50e6
    assert found.last == pytest.approx(2 * 0.001 + M * one + (M - 1) * 0.01)
    assert found.program.most == found.last


def test_demand_overtakes_bulk_on_the_wire() -> None:
    # The program wants the last run first. It comes before what was asked for earlier.
    last_first = World(SMALL)
    last_first.reads = [M - 1]
    last_first.run()
    node = last_first.nodes[0]
    assert node.got[M - 1] < node.got[2]
    in_order = World(SMALL)
    in_order.run()
    assert node.bytes_at == pytest.approx(in_order.nodes[0].bytes_at)


def test_without_faults_each_rack_gets_one_copy_and_nothing_comes_twice() -> None:
    found = simulate(msgspec.structs.replace(SMALL, nodes=60, racks=6, zones=2, root_slots=2, misses=5, think=0.001))
    assert found.registry_copies == 1.0
    assert found.superpeer_copies == 2.0
    assert found.rack_copies.mean == found.rack_copies.most == 1.0
    assert found.wasted_copies == 0.0
    assert found.node_copies.mean == pytest.approx((60 - 2) / 60)


def test_more_than_one_layer_has_more_than_one_tree_and_owner() -> None:
    world = World(msgspec.structs.replace(SMALL, nodes=20, layers=5, superpeers=3))
    world.run()
    assert len({owners[0] for owners in world.owners}) > 1
    for blob, owners in zip(world.blobs, world.owners, strict=True):
        delegate = world.nodes[0].group.delegates(blob)[0]
        assert len(world.desks[delegate].tree(blob)) == 20
        assert len(world.directories[owners[0]].tree(blob)) == 1, "the rack's root"
    assert world.registry.sent_bytes == SMALL.startup_size


def test_a_large_peaks_joins_are_shared_out_among_racks() -> None:
    peak = msgspec.structs.replace(SMALL, nodes=200, racks=10, join_time=0.002, root_slots=2, slots=2)
    found = simulate(peak)
    assert found.outer == 10
    assert found.node_busy < 30 * 0.002, "twenty joins, and heartbeats"
    at_once = simulate(msgspec.structs.replace(peak, join_time=0.0))
    assert found.last < at_once.last + 0.1
    assert found.last < 200 * 0.002 + at_once.startup.p50, "one after the other it would take that"
    assert found.superpeer_copies == 2.0
    assert found.rack_copies.most == 1.0


def test_racks_whose_delegate_is_dead_join_all_the_same() -> None:
    world = World(msgspec.structs.replace(SMALL, nodes=40, racks=4, slots=2, join_time=0.001))
    dead = {node.group.delegates(world.blobs[0])[0] for node in world.nodes}
    for node in world.nodes:
        if node.name in dead:
            node.die()
            world.finished(node)
    world.run()
    assert all(node.program_at < 5 for node in world.nodes if node.name not in dead)
    assert len(dead) == 4
    assert world.registry.sent_bytes == SMALL.startup_size


_SETTINGS = st.builds(
    lambda **given: msgspec.structs.replace(SMALL, **given),
    nodes=st.integers(1, 24), racks=st.integers(1, 5), zones=st.integers(1, 2), layers=st.integers(1, 3),
    superpeers=st.integers(1, 3), image_size=st.integers(1, 12 * MIB), nic=st.sampled_from([12.5e6, 100e6, 3e9]),
    registry=st.sampled_from([12.5e6, 100e6, 3e9]), superpeer_nic=st.sampled_from([0.0, 12.5e6, 3e9]),
    slots=st.integers(1, 3), far_slots=st.integers(0, 2), root_slots=st.integers(1, 3),
    window=st.sampled_from([1, 4 * MIB]), misses=st.integers(0, 5), bulk=st.booleans(),
    latency=st.sampled_from([0.0, 0.0005]), seed=st.integers(0, 99),
    fail=st.sampled_from([0.0, 0.0, 0.2]), slow=st.sampled_from([0.0, 0.2]), lie=st.sampled_from([0.0, 0.2]),
)  # fmt: skip


@examples(max_examples=60, deadline=None)
@given(_SETTINGS)
def test_no_bound_is_ever_beaten_and_every_node_that_lives_gets_its_bytes(settings: Settings) -> None:
    found = simulate(settings)
    assert found.without == 0
    if found.times:
        reached = msgspec.structs.replace(settings, nodes=max(1, len(found.times)), fail=0.0)
        assert found.last >= bounds(reached).floor * (1 - 1e-9)
        assert found.registry_copies >= 1 - 1e-9


@pytest.mark.parametrize(
    "faults",
    [{"fail": 0.2}, {"slow": 0.2}, {"lie": 0.2}, {"fail": 0.1, "slow": 0.1, "lie": 0.1},
     {"superpeers": 2, "superpeer_dies_at": 0.05}, {"superpeers": 2, "superpeer_dies_at": 0.0, "fail": 0.2}],
    ids=str,
)  # fmt: skip
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_faults_leave_no_node_without_its_bytes(faults: dict[str, float], seed: int) -> None:
    peak = msgspec.structs.replace(SMALL, nodes=80, racks=4, slots=2, root_slots=2, seed=seed, misses=3)
    found = simulate(msgspec.structs.replace(peak, **faults))
    assert found.without == 0
    assert found.dead == round(80 * faults.get("fail", 0)) or found.dead < 80 * faults["fail"]
    if "superpeers" not in faults:
        assert found.registry_copies == pytest.approx(1.0)
    else:
        assert found.registry_copies <= 2.0


def test_crawling_peers_cost_little_more_than_dead_ones() -> None:
    peak = msgspec.structs.replace(SMALL, nodes=80, racks=4, slots=2, root_slots=2, image_size=50 * MIB)
    well, crawling = simulate(peak), simulate(msgspec.structs.replace(peak, slow=0.1, slow_to=0.01))
    assert crawling.last < 4 * well.last
    assert crawling.last < 0.2 * 50 * MIB / (100e6 * 0.01)  # what one copy from a crawling parent would take


def test_the_same_seed_gives_the_same_result_and_another_one_does_not() -> None:
    peak = msgspec.structs.replace(SMALL, nodes=40, racks=4, fail=0.1, slow=0.1, lie=0.1, misses=4)
    once, again = simulate(peak), simulate(peak)
    assert once == again
    assert simulate(msgspec.structs.replace(peak, seed=2)).times != once.times


def test_bounds_are_those_of_the_theory() -> None:
    # 10,000 nodes at 25 Gbit/s, 10 % of 1 GiB, registry at 10 Gbit/s, 512 KiB at a time.
    found = bounds(Settings(chunk=512 << 10, join_chunks=1, registry_latency=0.0))
    assert found.receiving == pytest.approx(0.0344, rel=0.01)
    assert found.relay == pytest.approx(0.0366, rel=0.02)
    assert found.registry == pytest.approx(0.0859, rel=0.01)
    assert found.floor == found.broadcast == pytest.approx(0.0885, rel=0.02)


def test_the_trees_formula_is_that_of_the_theory() -> None:
    assert tree_time(Settings(chunk=MIB, join_chunks=1), 2, 13) == pytest.approx(0.084, rel=0.02)


@pytest.mark.parametrize(
    "wrong",
    [{"nodes": 0}, {"startup": 0.0}, {"startup": 1.5}, {"fail": -0.1}, {"fail": 0.6, "slow": 0.6}, {"nic": 0.0},
     {"superpeer_dies_at": 1.0}, {"nodes": 10_000_000, "chunk": 1024}, {"think": -1.0}],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_simulated_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError):
        simulate(msgspec.structs.replace(SMALL, **wrong))


def test_a_simulation_that_takes_too_long_says_who_went_without() -> None:
    assert simulate(msgspec.structs.replace(SMALL, nodes=5, limit=0.1)).without == 5
