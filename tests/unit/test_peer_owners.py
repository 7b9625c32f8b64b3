"""Rendezvous hashing: everybody agrees, shares are fair, and only what must move moves."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from dadi.peers.owners import owners

SUPERPEERS = [f"http://superpeer-{n}:7070" for n in range(5)]
DIGESTS = [f"sha256:{n:064x}" for n in range(5000)]


def test_the_order_is_the_same_whoever_works_it_out() -> None:
    assert owners("sha256:00", SUPERPEERS) == owners("sha256:00", [*reversed(SUPERPEERS), SUPERPEERS[2]])
    assert owners("sha256:00", SUPERPEERS)[0] == owners("sha256:00", reversed(SUPERPEERS))[0]


def test_the_order_is_that_of_the_published_formula() -> None:
    assert owners("sha256:00", ["a", "b", "c", "d"]) == ["c", "b", "d", "a"]  # a change would move every blob


def test_owners_and_stand_ins_are_shared_out_evenly() -> None:
    for place in (0, 1):
        counts = Counter(owners(digest, SUPERPEERS)[place] for digest in DIGESTS)
        assert all(850 < counts[name] < 1150 for name in SUPERPEERS)


@given(st.text(), st.lists(st.text(min_size=1), min_size=2, unique=True), st.data())
def test_when_one_leaves_the_others_keep_their_order(digest: str, names: list[str], data: st.DataObject) -> None:
    gone = data.draw(st.sampled_from(names))
    before = owners(digest, names)
    assert owners(digest, [name for name in names if name != gone]) == [name for name in before if name != gone]


def test_only_the_blobs_of_the_one_that_leaves_move_each_to_its_stand_in() -> None:
    left = SUPERPEERS[1:]
    for digest in DIGESTS:
        before = owners(digest, SUPERPEERS)
        expected = before[1] if before[0] == SUPERPEERS[0] else before[0]
        assert owners(digest, left)[0] == expected
