"""Groups: which nodes of a rack are one, whom they ask for their places, and what they believe."""

from __future__ import annotations

from collections import Counter

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from dadi.peers import group as groups
from dadi.peers.directory import Directory, Settings
from dadi.peers.group import SUPERPEER, Group
from dadi.peers.places import Heartbeat, Peer, Place, Told
from superpeer.groups import Groups

BLOB, OTHER = "sha256:" + "ab" * 32, "sha256:" + "cd" * 32


def peer(number: int, rack: str = "r1", **more: object) -> Peer:
    made = Peer(f"n{number}", f"10.0.{number >> 8}.{number & 255}:7071", "z1", rack, 2)
    return msgspec.structs.replace(made, **more)


def introduced(count: int, size: int = 48, racks: int = 1) -> tuple[Groups, list[Peer]]:
    made, peers = Groups(size=size), [peer(n, f"r{1 + n % racks}") for n in range(count)]
    for each in peers:
        made.introduce(each, 0, 1.0)
    return made, peers


def standing(count: int) -> tuple[list[Group], list[Peer]]:
    """Return the groups as the nodes of one rack know them."""
    made, peers = introduced(count)
    known = []
    for each in peers:
        group = Group()
        group.learn(*made.introduce(each, 0, 2.0))
        known.append(group)
    return known, peers


def test_the_nodes_of_a_rack_are_one_group_and_a_large_rack_is_several() -> None:
    made, peers = introduced(100, size=48, racks=2)
    mates = made.introduce(peers[0], 0, 2.0)[1]
    assert mates is not None
    assert {mate.id for mate in mates} == {each.id for each in peers[:96:2]}
    assert made.count == 4
    late = made.introduce(peers[98], 0, 2.0)[1]
    assert late is not None
    assert {mate.id for mate in late} == {"n96", "n98"}


def test_who_knows_the_version_is_told_nothing_until_it_changes() -> None:
    made, peers = introduced(5)
    version, _ = made.introduce(peers[0], 0, 2.0)
    assert made.introduce(peers[0], version, 3.0) == (version, None)
    made.introduce(peer(9), 0, 4.0)
    newer, mates = made.introduce(peers[0], version, 5.0)
    assert newer > version
    assert mates is not None
    assert len(mates) == 6


def test_a_version_of_before_a_restart_is_never_taken_for_one_of_after_it() -> None:
    before, after = Groups(), Groups()
    for n in range(9):
        before.introduce(peer(n), 0, 1.0)
    known, _ = before.introduce(peer(0), 0, 1.0)
    version, mates = after.introduce(peer(0), known, 2.0)
    assert version > known
    assert mates == (peer(0),)


def test_who_is_not_heard_of_is_forgotten_and_its_room_is_given_away() -> None:
    made, peers = introduced(4, size=4)
    for each in peers[1:]:
        made.introduce(each, 0, 10.0)
    made.expire(12.0, 5.0)
    mates = made.introduce(peer(7), 0, 12.0)[1]
    assert mates is not None
    assert {mate.id for mate in mates} == {"n1", "n2", "n3", "n7"}
    assert made.find("n0") is None


def test_without_a_rack_or_without_children_a_node_has_no_group() -> None:
    made, _ = introduced(4)
    assert made.introduce(peer(8, rack=""), 0, 1.0) == (0, ())
    assert made.introduce(peer(9, slots=0), 0, 1.0) == (0, ())
    assert made.introduce(peer(0, slots=0), 0, 1.0) == (0, ()), "it serves nobody any more"
    assert len(made) == 3


def test_a_node_that_changes_its_rack_changes_its_group_and_an_address_is_told_anew() -> None:
    made, peers = introduced(6)
    assert made.introduce(peer(0, "r2"), 0, 2.0)[1] == (peer(0, "r2"),)
    moved = peer(1, address="10.9.9.9:1")
    made.introduce(moved, 0, 2.0)
    mates = made.introduce(peers[2], 0, 2.0)[1]
    assert mates is not None
    assert moved in mates
    assert peers[0].id not in {mate.id for mate in mates}


def test_one_address_does_not_fill_a_rack_but_over_loopback_all_are_alike() -> None:
    made = Groups()
    for n in range(10):
        made.introduce(peer(n, address=f"10.0.0.1:{n}"), 0, 1.0)
    assert len(made) == 4
    made.leave("n0")
    made.introduce(peer(8, address="10.0.0.1:8"), 0, 1.0)
    assert len(made) == 4
    assert made.find("n8")
    for n in range(20, 30):
        made.introduce(peer(n, address=f"127.0.0.1:{n}"), 0, 1.0)
    assert len(made) == 14
    mates = made.introduce(peer(20, address="127.0.0.1:20"), 0, 1.0)[1]
    assert mates is not None
    assert len(mates) == 10, "none of them can be reached by the others"


@given(st.lists(st.tuples(st.integers(0, 40), st.integers(0, 3), st.integers(0, 3)), max_size=120))
def test_whatever_happens_a_node_is_in_one_group_of_its_rack_and_no_group_is_too_large(
    steps: list[tuple[int, int, int]],
) -> None:
    made, where = Groups(size=5), dict[str, str]()
    for now, (number, rack, what) in enumerate(steps):
        who = peer(number, f"r{rack}" if rack else "")
        if what:
            mates = made.introduce(who, 0, float(now))[1]
            assert mates is not None
            assert (who in mates) == bool(rack)
            assert len(mates) <= 5
            assert all(mate.rack == who.rack for mate in mates)
            where[who.id] = who.rack
        else:
            made.leave(who.id)
            where.pop(who.id, None)
    assert len(made) == sum(map(bool, where.values()))
    assert made.count >= len(set(filter(None, where.values())))


# ---- a node's view


def test_mates_agree_on_the_delegate_of_an_image_and_images_have_different_ones() -> None:
    known, _ = standing(40)
    blobs = [f"sha256:{n:064x}" for n in range(60)]
    for group in known:
        for at in range(0, 60, 3):
            group.expect(blobs[at : at + 3])
    asked = {blob: {group.delegates(blob) for group in known} for blob in blobs}
    assert all(len(found) == 1 for found in asked.values())
    assert all(asked[blobs[at]] == asked[blobs[at + 2]] for at in range(0, 60, 3)), "one for an image's blobs"
    first = Counter(next(iter(found))[0] for found in asked.values())
    assert len(first) > 8


def test_a_small_group_asks_nobody() -> None:
    known, _ = standing(groups.LEAST - 1)
    assert known[0].delegates(BLOB) == ()
    assert not known[0].stands


def test_of_a_delegates_answer_only_mates_with_a_proof_are_used_at_the_superpeers_address() -> None:
    (group, *_), peers = standing(5)
    token = "token"
    proofs = {each.id: groups.proof(token, each.id) for each in (peers[1], peers[3])}
    proofs["n2"] = proofs["n1"]
    proofs["evil"] = groups.proof(token, "evil")
    said = Place(7, 3, (Peer("n1", "192.0.2.66:80"), peers[2], Peer("evil", "192.0.2.66:80"), peers[3]))

    def proven(peer_id: str, shown: str) -> bool:
        return groups.proves(token, peer_id, shown)

    place = group.believed(said, proofs, proven)
    assert place is not None
    assert place.parents == (peers[1], peers[3])
    assert group.believed(said, {}, proven) is None
    assert group.believed(Place(1, 1), proofs, proven) is None, "the root asks the superpeer"


def test_a_proof_is_of_one_token_and_one_node() -> None:
    shown = groups.proof("token", "n1")
    assert groups.proves("token", "n1", shown)
    assert not groups.proves("token", "n2", shown)
    assert not groups.proves("other", "n1", shown)
    assert not groups.proves("token", "n1", "")
    assert not groups.proves("token", "n1", "é")


def test_what_is_not_in_use_any_more_is_forgotten() -> None:
    (group, *_), _ = standing(5)
    group.expect([BLOB, OTHER])
    group.took(BLOB, "n3")
    group.took(OTHER, SUPERPEER)
    assert group.placed_by(BLOB) == "n3"
    assert group.has_outer_place(OTHER)
    group.keep([BLOB])
    assert group.placed_by(BLOB) == "n3"
    assert not group.has_outer_place(OTHER)


class Rack:
    """A rack's nodes and two delegates' directories, over one of a superpeer: who has whom as parents."""

    def __init__(self, count: int) -> None:
        self.peers = [groups.outward(peer(n)) for n in range(count)]
        self.outer = Directory(Settings(), now=0.0)
        self.desks = [Directory(Settings(root_slots=1), now=0.0) for _ in range(2)]
        self.groups = [Group() for _ in range(count)]
        for group in self.groups:
            group.learn(1, self.peers)
        self.places: dict[int, Place] = {}

    def join(self, number: int, desk: int | None, without: tuple[str, ...], now: float) -> None:
        group, who = self.groups[number], self.peers[number]
        place = None
        if desk is not None and not group.has_outer_place(BLOB):
            said = self.desks[desk].join(who, BLOB, now, without, group.order(BLOB))
            place = group.believed(said, {}, lambda peer_id, shown: True)
        if place is not None and desk is not None:
            group.took(BLOB, str(desk), place.order)
        else:
            place = self.outer.join(who, BLOB, now, without)
            group.took(BLOB, SUPERPEER)
        self.places[number] = place

    def beat(self, number: int, desk: int, now: float) -> None:
        if number not in self.places:
            return
        group, who, place = self.groups[number], self.peers[number], self.places[number]
        ids = tuple(each.id for each in place.parents)
        if group.has_outer_place(BLOB):
            changed = self.outer.heartbeat(Heartbeat(who, blobs=(Told(BLOB, place.order, place.depth, ids),)), now)
            self.places[number] = changed.get(BLOB, place)
            self.desks[desk].heartbeat(Heartbeat(who, blobs=(Told(BLOB, place.order, 1),)), now)
            return
        changed = self.desks[desk].heartbeat(Heartbeat(who, blobs=(Told(BLOB, place.order, place.depth, ids),)), now)
        if BLOB in changed:
            group.took(BLOB, str(desk))
            found = group.believed(changed[BLOB], {}, lambda peer_id, shown: True)
            if found is None:
                found = self.outer.join(who, BLOB, now)
                group.took(BLOB, SUPERPEER)
            self.places[number] = found
        else:
            group.took(BLOB, str(desk), place.order)

    def check(self) -> None:
        above = {self.peers[n].id: [each.id for each in place.parents] for n, place in self.places.items()}
        done: set[str] = set()

        def visit(at: str, way: tuple[str, ...]) -> None:
            assert at not in way, f"a cycle: {way}"
            if at not in done:
                for parent in above.get(at, ()):
                    visit(parent, (*way, at))
                done.add(at)

        for start in above:
            visit(start, ())


_STEPS = st.lists(
    st.tuples(st.sampled_from(["join", "beat", "restart", "without"]), st.integers(0, 11), st.sampled_from([0, 0, 1]),
              st.integers(0, 11)),
    max_size=80,
)  # fmt: skip


@given(_STEPS)
def test_delegates_that_come_go_and_disagree_make_no_cycle(steps: list[tuple[str, int, int, int]]) -> None:
    rack = Rack(12)
    for at, (what, number, desk, other) in enumerate(steps):
        now = 1.0 + at / 10
        if what == "join":
            rack.join(number, desk, (), now)
        elif what == "beat":
            rack.beat(number, desk, now)
        elif what == "restart":
            rack.desks[desk] = Directory(Settings(root_slots=1), now=now)
        else:
            rack.join(number, desk if other % 3 else None, (f"n{other}",), now)
        rack.check()


def test_who_joins_at_another_delegate_is_not_put_below_its_own_child() -> None:
    rack = Rack(4)
    for number in range(4):
        rack.join(number, 0, (), 1.0 + number)
    assert rack.places[2].parents[0].id == "n1"
    rack.beat(2, 1, 6.0)
    rack.join(1, 1, ("n0",), 7.0)
    assert "n2" not in {each.id for each in rack.places[1].parents}
    rack.check()


def test_a_racks_root_gives_to_two_other_racks_and_one_mate() -> None:
    outer, inner = Directory(Settings(root_slots=1)), Directory(Settings(root_slots=1))
    roots = [groups.outward(peer(n, f"r{n}")) for n in range(4)]
    above = [place.parents[0].id if place.parents else "" for place in (outer.join(r, BLOB, 1.0) for r in roots)]
    assert above == ["", "n0", "n0", "n1"]
    mates = [groups.outward(peer(n)) for n in range(4)]
    above = [place.parents[0].id if place.parents else "" for place in (inner.join(m, BLOB, 1.0) for m in mates)]
    assert above == ["", "n0", "n1", "n1"]


def test_on_slow_links_a_root_takes_no_more_of_other_racks_than_others() -> None:
    slow = peer(1, slots=1)
    assert groups.outward(slow) == slow
