"""The peer directory: whose child a node becomes, what comes back after a restart, who is believed.

A little longer than 400 lines: one rule of the directory after the other.
"""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import InvalidRequest, Unavailable
from dadi.peers.places import Fault, Heartbeat, Peer, Place, Told
from superpeer.directory import Directory, Settings

BLOB = "sha256:" + "ab" * 32
OTHER = "sha256:" + "cd" * 32


def peer(number: int, *, rack: str = "r1", zone: str = "z1", slots: int = 2) -> Peer:
    return Peer(f"n{number}", f"10.0.0.{number}:7071", zone, rack, slots)


def parent(place: Place) -> str:
    return place.parents[0].id if place.parents else ""


def beat(who: Peer, *places: tuple[str, Place], complete: bool = False, **more: object) -> Heartbeat:
    told = tuple(
        Told(blob, place.order, place.depth, tuple(p.id for p in place.parents), complete=complete)
        for blob, place in places
    )
    return Heartbeat(who, blobs=told, **more)


def parents_of(directory: Directory, blob: str = BLOB) -> dict[str, str]:
    return {row["id"]: row["parent"] for row in directory.tree(blob)}


def assert_no_cycles(parents: dict[str, str]) -> None:
    for start in parents:
        seen, at = set(), start
        while at:
            assert at not in seen
            seen.add(at)
            at = parents.get(at, "")


def test_the_first_of_a_rack_is_the_superpeers_child_and_the_others_come_below_it() -> None:
    directory = Directory()
    places = [directory.join(peer(n), BLOB, 1.0) for n in range(7)]
    assert [parent(place) for place in places] == ["", "n0", "n0", "n1", "n1", "n2", "n2"]
    assert [place.depth for place in places] == [1, 2, 2, 3, 3, 3, 3]


def test_orders_grow_with_each_join() -> None:
    directory = Directory()
    orders = [directory.join(peer(n), BLOB, 1.0).order for n in range(5)]
    assert orders == sorted(set(orders))


def test_a_node_is_told_its_parents_ancestors_as_stand_ins() -> None:
    directory = Directory(Settings(standbys=2))
    for n in range(4):
        place = directory.join(peer(n, slots=1), BLOB, 1.0)
    assert [p.id for p in place.parents] == ["n2", "n1", "n0"]
    assert place.parents[0].address == "10.0.0.2:7071"


def test_joining_again_gives_the_same_place() -> None:
    directory = Directory()
    directory.join(peer(0), BLOB, 1.0)
    first = directory.join(peer(1), BLOB, 1.0)
    directory.join(peer(2), BLOB, 1.0)
    assert directory.join(peer(1), BLOB, 2.0) == first
    assert directory.statistics()["joins"] == 3


def test_own_rack_before_a_nearer_place_elsewhere() -> None:
    directory = Directory(Settings(root_slots=1, far_slots=2))
    directory.join(peer(0, rack="r1"), BLOB, 1.0)
    assert parent(directory.join(peer(1, rack="r2"), BLOB, 1.0)) == "n0"
    for n in (2, 3, 4):
        place = directory.join(peer(n, rack="r2"), BLOB, 1.0)
    # n0, one below the root, still has a far slot; n2 in the own rack is three below.
    assert parent(place) == "n2"
    assert place.depth == 4


def test_own_zone_before_a_nearer_place_in_another() -> None:
    directory = Directory(Settings(root_slots=1, far_slots=1))
    directory.join(peer(0, zone="z1", rack="a"), BLOB, 1.0)
    directory.join(peer(1, zone="z2", rack="b"), BLOB, 1.0)  # of n0: another zone
    directory.join(peer(2, zone="z1", rack="a"), BLOB, 1.0)
    assert parent(directory.join(peer(3, zone="z2", rack="c"), BLOB, 1.0)) == "n1"
    assert parent(directory.join(peer(4, zone="z1", rack="d"), BLOB, 1.0)) == "n2"


def test_a_superpeer_in_a_zone_counts_as_near_there_only() -> None:
    directory = Directory(Settings(root_slots=4), zone="z1")
    directory.join(peer(0, zone="z2", rack="a"), BLOB, 1.0)
    assert parent(directory.join(peer(1, zone="z2", rack="b"), BLOB, 1.0)) == "n0"
    assert parent(directory.join(peer(2, zone="z1", rack="c"), BLOB, 1.0)) == ""
    assert parent(directory.join(peer(3, zone="z1", rack="d"), BLOB, 1.0)) == ""


def test_of_equal_depth_the_less_loaded() -> None:
    directory = Directory()
    for n in range(3):
        directory.join(peer(n), BLOB, 1.0)
    directory.heartbeat(Heartbeat(peer(1), load=0.9, blobs=(Told(BLOB, 1, 2, ("n0",)),)), 2.0)
    assert parent(directory.join(peer(3), BLOB, 3.0)) == "n2"


def test_children_of_other_racks_take_no_slot_from_the_own_rack() -> None:
    directory = Directory(Settings(root_slots=1, far_slots=1))
    directory.join(peer(0, rack="a", slots=1), BLOB, 1.0)
    assert parent(directory.join(peer(1, rack="b", slots=1), BLOB, 1.0)) == "n0"
    assert parent(directory.join(peer(2, rack="a", slots=1), BLOB, 1.0)) == "n0"


def test_each_rack_fetches_once_from_outside_however_nodes_arrive() -> None:
    directory = Directory()
    everybody = [peer(n, rack=f"r{n % 25}") for n in range(1000)]
    for who in everybody:
        directory.join(who, BLOB, 1.0)
    racks = {who.id: who.rack for who in everybody}
    above = parents_of(directory)
    from_outside = Counter(rack for name, rack in racks.items() if racks.get(above[name]) != rack)
    assert from_outside == {f"r{n}": 1 for n in range(25)}
    assert directory.statistics()["root_children"] == 2


def test_a_node_without_slots_gets_no_children() -> None:
    directory = Directory()
    directory.join(peer(0, slots=0), BLOB, 1.0)
    assert parent(directory.join(peer(1), BLOB, 1.0)) == ""
    assert parent(directory.join(peer(2), BLOB, 1.0)) == "n1"


def test_no_tree_grows_deeper_than_the_limit() -> None:
    directory = Directory(Settings(max_depth=5, root_slots=1))
    depths = [directory.join(peer(n, slots=1), BLOB, 1.0).depth for n in range(40)]
    assert max(depths) == 5
    assert directory.statistics()["overflows"] == 1  # the first 31 fill a tree of two children each


def test_a_node_never_gets_more_children_than_it_has_slots() -> None:
    directory = Directory(Settings(far_slots=1, max_depth=4))
    for n in range(300):
        directory.join(peer(n, rack=f"r{n % 3}", slots=2), BLOB, 1.0)
    assert max(row["children"] for row in directory.tree(BLOB)) == 3


def test_a_node_that_refuses_gets_no_more_children_and_keeps_those_it_has() -> None:
    directory = Directory()
    first, child = directory.join(peer(0), BLOB, 1.0), directory.join(peer(1), BLOB, 1.0)
    directory.heartbeat(beat(peer(0), (BLOB, first), refuses=True), 2.0)
    assert parent(directory.join(peer(2), BLOB, 2.0)) == "n1"
    assert directory.heartbeat(beat(peer(1), (BLOB, child)), 2.0) == {}
    directory.heartbeat(beat(peer(0), (BLOB, first)), 3.0)
    assert parent(directory.join(peer(3), BLOB, 3.0)) == "n0"


def test_a_node_with_the_whole_blob_is_as_good_as_the_root() -> None:
    directory = Directory(Settings(root_slots=1))
    for n in range(4):
        place = directory.join(peer(n, slots=1), BLOB, 1.0)
    directory.heartbeat(beat(peer(3, slots=1), (BLOB, place), complete=True), 2.0)
    assert directory.join(peer(4), BLOB, 3.0).depth == 1
    assert parents_of(directory)["n3"] == ""


def test_a_node_that_lost_a_whole_blob_comes_back_as_the_youngest() -> None:
    directory = Directory(Settings(root_slots=1))
    directory.join(peer(0), BLOB, 1.0)
    place = directory.join(peer(1), BLOB, 1.0)
    directory.heartbeat(beat(peer(1), (BLOB, place), complete=True), 2.0)
    older_child = directory.join(peer(0), BLOB, 2.0)
    below = directory.join(peer(2), BLOB, 3.0)
    moved = directory.heartbeat(beat(peer(1), (BLOB, place)), 4.0)[BLOB]
    assert moved.order > max(older_child.order, below.order)
    directory.heartbeat(beat(peer(2), (BLOB, below)), 5.0)
    assert_no_cycles(parents_of(directory))


# ── heartbeats, expiry, restarts ──────────────────────────────────────────────────────────────────────────────────────


def test_a_directory_that_was_restarted_knows_all_after_one_heartbeat_of_each() -> None:
    before = Directory(now=0.0)
    everybody = [peer(n, rack=f"r{n % 5}", zone=f"z{n % 2}") for n in range(100)]
    places = {who.id: (who, before.join(who, BLOB, 10.0), before.join(who, OTHER, 11.0)) for who in everybody}
    after = Directory(now=100.0)
    for who, one, two in reversed(places.values()):  # children before their parents
        assert after.heartbeat(beat(who, (BLOB, one), (OTHER, two)), 101.0) == {}
    for blob in (BLOB, OTHER):
        assert parents_of(after, blob) == parents_of(before, blob)
        children = [{row["id"]: row["children"] for row in d.tree(blob)} for d in (before, after)]
        assert children[0] == children[1]
    assert after.join(peer(1000), BLOB, 102.0).order > max(place.order for _, place, _ in places.values())


def test_joins_right_after_a_restart_are_younger_than_what_was_not_heard_yet() -> None:
    before = Directory()
    old = before.join(peer(0), BLOB, 1000.0)
    after = Directory(now=1001.0)
    new = after.join(peer(1), BLOB, 1001.0)
    assert new.order > old.order


def test_a_node_keeps_a_parent_that_is_not_heard_after_a_restart_until_it_must_be_dead() -> None:
    before = Directory()
    before.join(peer(0), BLOB, 1.0)
    place = before.join(peer(1), BLOB, 1.0)
    after = Directory(Settings(expiry=15.0), now=100.0)
    assert after.heartbeat(beat(peer(1), (BLOB, place)), 101.0) == {}
    assert after.join(peer(1), BLOB, 102.0).order == place.order
    assert parent(after.heartbeat(beat(peer(1), (BLOB, place)), 116.0)[BLOB]) == ""


def test_who_is_not_heard_is_forgotten_and_his_children_move() -> None:
    directory = Directory(Settings(expiry=15.0))
    places = [directory.join(peer(n), BLOB, 1.0) for n in range(4)]
    for n in (0, 2, 3):
        directory.heartbeat(beat(peer(n), (BLOB, places[n])), 10.0)
    assert directory.expire(16.5) == ["n1"]
    assert directory.vouches_for("n1") is None
    changed = directory.heartbeat(beat(peer(3), (BLOB, places[3])), 17.0)
    assert parent(changed[BLOB]) == "n0"
    assert directory.heartbeat(beat(peer(3), (BLOB, changed[BLOB])), 18.0) == {}
    assert directory.expire(16.5) == []


def test_what_a_heartbeat_does_not_name_has_ended_unless_it_was_joined_just_now() -> None:
    directory = Directory(Settings(heartbeat=5.0))
    directory.join(peer(0), BLOB, 10.0)
    directory.join(peer(0), OTHER, 14.0)
    directory.heartbeat(Heartbeat(peer(0)), 16.0)
    assert not directory.tree(BLOB)
    assert directory.tree(OTHER)
    directory.heartbeat(Heartbeat(peer(0)), 20.0)
    assert directory.statistics()["blobs"] == 0


def test_leaving_gives_the_slot_back() -> None:
    directory = Directory()
    for n in range(3):
        directory.join(peer(n), BLOB, 1.0)
    directory.leave("n1")
    directory.leave("n1")
    assert parent(directory.join(peer(3), BLOB, 2.0)) == "n0"
    directory.leave("n3", BLOB)
    assert directory.vouches_for("n3") is not None


def test_a_node_that_moved_to_another_rack_is_found_there() -> None:
    directory = Directory()
    directory.join(peer(0, rack="a"), BLOB, 1.0)
    directory.join(peer(0, rack="b"), BLOB, 2.0)
    assert parent(directory.join(peer(1, rack="b"), BLOB, 3.0)) == "n0"


# ── reports ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("fault", [Fault.FAILED, Fault.SLOW])
def test_a_failing_or_slow_peer_gets_no_children_for_a_while(fault: Fault) -> None:
    directory = Directory(Settings(suspended=10.0))
    places = [directory.join(peer(n), BLOB, 1.0) for n in range(3)]
    directory.report("n1", "n0", fault, 100.0)
    assert parent(directory.join(peer(1), BLOB, 100.0, without={"n0"})) == ""
    assert parent(directory.join(peer(3), BLOB, 100.0)) == "n1"
    directory.heartbeat(beat(peer(0), (BLOB, places[0])), 105.0)
    assert parent(directory.join(peer(4), BLOB, 105.0)) != "n0"
    directory.heartbeat(beat(peer(0), (BLOB, places[0])), 111.0)
    assert parent(directory.join(peer(5), BLOB, 111.0)) == "n0"


def test_who_is_reported_again_is_suspended_for_longer() -> None:
    directory = Directory(Settings(suspended=10.0))
    first = directory.join(peer(0), BLOB, 1.0)
    directory.join(peer(1), BLOB, 1.0)
    directory.report("n1", "n0", Fault.SLOW, 100.0)
    directory.heartbeat(beat(peer(0), (BLOB, first)), 111.0)
    directory.report("n1", "n0", Fault.SLOW, 112.0)
    directory.heartbeat(beat(peer(0), (BLOB, first)), 125.0)
    assert directory.statistics()["suspended"] == 1
    directory.heartbeat(beat(peer(0), (BLOB, first)), 133.0)
    assert directory.statistics()["suspended"] == 0


def test_a_liar_is_barred_for_good_when_two_say_so_and_its_children_move() -> None:
    directory = Directory(Settings(lied_to=2))
    places = [directory.join(peer(n), BLOB, 1.0) for n in range(3)]
    directory.report("n1", "n0", Fault.LIED, 2.0)
    directory.report("n1", "n0", Fault.LIED, 3.0)
    assert directory.statistics()["barred"] == 0
    directory.report("n2", "n0", Fault.LIED, 4.0)
    assert directory.statistics()["barred"] == 1
    assert directory.vouches_for("n0") is None
    assert parent(directory.heartbeat(beat(peer(1), (BLOB, places[1])), 5.0)[BLOB]) == ""
    directory.leave("n0")
    directory.join(peer(0), BLOB, 1e6)
    assert parent(directory.join(peer(9), BLOB, 1e6)) != "n0"


def test_a_single_accuser_costs_the_accused_its_children_for_a_while_only() -> None:
    directory = Directory(Settings(suspended_most=600.0))
    first = directory.join(peer(0), BLOB, 1.0)
    directory.join(peer(1), BLOB, 1.0)
    directory.report("n1", "n0", Fault.LIED, 2.0)
    assert parent(directory.join(peer(2), BLOB, 3.0)) == "n1"
    directory.heartbeat(beat(peer(0), (BLOB, first)), 700.0)
    assert directory.statistics()["suspended"] == 0


def test_who_accuses_everybody_is_not_believed() -> None:
    directory = Directory(Settings(accusations=3))
    for n in range(10):
        directory.join(peer(n), BLOB, 1.0)
    for n in range(9):
        directory.report("n9", f"n{n}", Fault.FAILED, 2.0)
    assert directory.statistics()["suspended"] == 3


def test_strangers_and_oneself_cannot_be_reported_and_strangers_report_nothing() -> None:
    directory = Directory()
    directory.join(peer(0), BLOB, 1.0)
    directory.report("stranger", "n0", Fault.LIED, 2.0)
    directory.report("n0", "stranger", Fault.LIED, 2.0)
    directory.report("n0", "n0", Fault.LIED, 2.0)
    assert directory.statistics()["suspended"] == 0


def test_liars_told_in_heartbeats_are_known_again_after_a_restart() -> None:
    directory = Directory(Settings(lied_to=2), now=100.0)
    directory.heartbeat(Heartbeat(peer(0)), 101.0)
    for n in (1, 2):
        directory.heartbeat(Heartbeat(peer(n), liars=("n0",)), 101.0)
    assert directory.statistics()["barred"] == 1


# ── limits ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_too_many_nodes_or_blobs_are_refused() -> None:
    directory = Directory(Settings(most_nodes=2, most_blobs=1))
    directory.join(peer(0), BLOB, 1.0)
    with pytest.raises(InvalidRequest):
        directory.join(peer(0), OTHER, 1.0)
    with pytest.raises(InvalidRequest):
        directory.heartbeat(Heartbeat(peer(0), blobs=(Told(BLOB, 1, 1), Told(OTHER, 1, 1))), 1.0)
    directory.join(peer(1), BLOB, 1.0)
    with pytest.raises(Unavailable):
        directory.join(peer(2), BLOB, 1.0)


_ACTS = st.lists(
    st.tuples(
        st.sampled_from("join without beat complete lose fail slow lie leave expire forget".split()),
        st.integers(0, 11), st.integers(0, 11),
    ), max_size=80,
)  # fmt: skip


@given(_ACTS)
def test_whatever_happens_there_is_no_cycle_and_every_slot_is_accounted_for(acts: list[tuple[str, int, int]]) -> None:
    directory = Directory(Settings(root_slots=1, expiry=20.0))
    everybody = [peer(n, rack=f"r{n % 3}", zone=f"z{n % 2}", slots=n % 3) for n in range(12)]
    places: dict[int, Place] = {}
    now = 1.0
    for what, n, other in acts:
        now += 1.0
        if what in ("join", "without"):
            places[n] = directory.join(everybody[n], BLOB, now, {f"n{other}"} if what == "without" else ())
        elif what in ("beat", "complete", "lose") and n in places:
            changed = directory.heartbeat(beat(everybody[n], (BLOB, places[n]), complete=what == "complete"), now)
            places[n] = changed.get(BLOB, places[n])
        elif what in ("fail", "slow", "lie"):
            fault = {"fail": Fault.FAILED, "slow": Fault.SLOW, "lie": Fault.LIED}[what]
            directory.report(f"n{n}", f"n{other}", fault, now)
        elif what == "leave":
            directory.leave(f"n{n}")
            places.pop(n, None)
        elif what == "expire":
            directory.expire(now)
        elif what == "forget":
            directory = Directory(Settings(root_slots=1, expiry=20.0), now=now)
        rows = directory.tree(BLOB)
        assert_no_cycles(parents_of(directory))
        here = {row["id"] for row in rows}
        fed = Counter(row["parent"] for row in rows if row["parent"] in here)
        assert {row["id"]: row["children"] for row in rows} == {name: fed[name] for name in here}


def test_an_order_of_the_future_is_not_believed_and_memberships_still_end() -> None:
    now = 1.7e9
    directory = Directory(now=now)
    directory.heartbeat(Heartbeat(peer(1), blobs=(Told(BLOB, (1 << 62) - 1, 1),)), now)
    place = directory.join(peer(2), OTHER, now)
    assert place.order < (now + 1) * 1e6
    directory.heartbeat(Heartbeat(peer(2)), now + 20)
    assert directory.tree(OTHER) == []


def test_many_ids_at_one_address_are_one_accuser() -> None:
    directory = Directory(Settings(lied_to=2, accusations=3))
    for n in range(8):
        directory.join(peer(n), BLOB, 1.0)
    for n in range(20):
        liar = Peer(f"id{n}", f"192.0.2.6:{7000 + n}", "z1", "r1", 2)
        directory.join(liar, BLOB, 1.0)
        directory.report(liar.id, "n0", Fault.LIED, 2.0)
        directory.report(liar.id, f"n{1 + n % 7}", Fault.FAILED, 2.0)
        directory.leave(liar.id)
    assert directory.vouches_for("n0") is not None, "not barred"
    assert directory.statistics()["suspended"] == 3
    directory.report("n1", "n0", Fault.LIED, 3.0)
    assert directory.vouches_for("n0") is None
