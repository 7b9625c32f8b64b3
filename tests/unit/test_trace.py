"""Startup traces: their bytes, what is made of several recordings, what is refused."""

from __future__ import annotations

import random
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import InvalidRequest, Malformed
from dadi.index.chunks import blob_of
from dadi.prefetch import trace, trace_json
from dadi.prefetch.trace import KeptTrace, Message, Recording, Report, StartGroup, Trace

MANIFEST = "sha256:" + "ab" * 32
A, B, C = (f"sha256:{letter * 64}" for letter in "abc")
SIZE = 4096


def recording(node: str, *chunks: tuple[str, int], blobs: tuple[str, ...] = (A, B), pace: int = 10) -> Recording:
    steps = tuple((blobs.index(blob), chunk, pace * place) for place, (blob, chunk) in enumerate(chunks))
    return Recording(node, tuple((blob, SIZE) for blob in blobs), steps)


def kept(*recordings: Recording) -> KeptTrace:
    found = KeptTrace(MANIFEST)
    for each in recordings:
        found = trace.added(found, each)
    return found


def merged(*recordings: Recording) -> Trace:
    found = trace.merged(kept(*recordings))
    assert found is not None
    return found


def chunks_of(found: Trace, group: int = 0) -> list[tuple[str, int]]:
    return found.chunks(found.groups[group])


steps = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 40), st.integers(0, 9000)), max_size=30,
                 unique_by=lambda step: step[:2])  # fmt: skip
recordings = st.builds(
    lambda node, found: Recording(node, ((A, SIZE), (B, SIZE)), tuple(found)), st.sampled_from("nmopqr"), steps
)


def test_one_start_is_replayed_as_it_was() -> None:
    order = [(A, 5), (B, 1), (A, 0), (A, 6)]
    found = merged(recording("n", *order))
    assert chunks_of(found) == order
    assert [at for _, _, at in found.groups[0].steps] == [0, 10, 20, 30]


def test_frequent_chunks_come_early_and_one_off_chunks_not_at_all() -> None:
    often, sometimes, once = (A, 9), (A, 1), (A, 2)
    base = [(B, chunk) for chunk in range(20)]
    nodes = [recording(f"n{n}", *base[:10], often, *base[10:]) for n in range(2)]
    nodes += [recording(f"m{n}", sometimes, *base[:10], often, *base[10:]) for n in range(2)]
    nodes.append(recording("last", once, *base[:10], often, *base[10:]))
    (group,) = merged(*nodes).groups
    found = chunks_of(merged(*nodes))
    assert group.recordings == 5
    assert once not in found
    assert found.index(often) < found.index((B, 12))
    assert found.index(sometimes) > found.index((B, 0)), "it was read first, but in two of five starts only"


def test_two_entry_points_are_two_groups_and_the_more_frequent_is_first() -> None:
    common = [(A, chunk) for chunk in range(4)]
    server = [*common, *((A, chunk) for chunk in range(10, 20))]
    worker = [*common, *((B, chunk) for chunk in range(10, 20))]
    found = merged(recording("n", *worker), recording("m", *server), recording("o", *server))
    assert [group.recordings for group in found.groups] == [2, 1]
    assert chunks_of(found) == server
    assert chunks_of(found, 1) == worker


def test_of_one_node_the_newest_start_counts() -> None:
    old, new = recording("n", (A, 1), (A, 2), (A, 3)), recording("n", (A, 1), (A, 2), (A, 4))
    assert kept(old, new).recordings == (new,)
    assert len(kept(old, recording("m", (A, 1), (A, 2), (A, 4))).recordings) == 2


def test_a_node_that_could_not_watch_a_blob_does_not_vote_on_it() -> None:
    both = [recording(f"n{n}", (A, 1), (A, 2), (B, 3)) for n in range(2)]
    half = [recording(f"m{n}", (A, 1), (A, 2), blobs=(A,)) for n in range(6)]
    (group,) = merged(*both, *half).groups
    assert group.recordings == 8
    assert (B, 3) in chunks_of(merged(*both, *half))


def test_a_start_that_could_watch_less_than_the_last_one_of_its_node_does_not_undo_it() -> None:
    whole = recording("n", (A, 1), (B, 7), (A, 2), (B, 8))
    later = recording("n", (B, 7), (B, 8), (B, 9), blobs=(B,))
    (group,) = merged(whole, later).groups
    assert chunks_of(merged(whole, later)) == [(A, 1), (B, 7), (A, 2), (B, 8), (B, 9)]
    assert group.recordings == 1
    assert merged(whole, later) == merged(whole, later, later)


def test_starts_that_could_watch_little_do_not_push_out_the_one_that_watched_all() -> None:
    whole = recording("n", (A, 1), (B, 7), (A, 2), (B, 8))
    few = [recording(f"m{n}", (A, 1), (A, 2), blobs=(A,)) for n in range(3 * trace.MOST_IN_GROUP)]
    assert chunks_of(merged(whole, *few)) == [(A, 1), (B, 7), (A, 2), (B, 8)]
    assert len(kept(whole, *few).recordings) == trace.MOST_IN_GROUP


def test_what_was_read_after_a_layer_became_local_was_perhaps_read() -> None:
    whole = [(A, chunk) for chunk in range(10)]
    cut = [msgspec.structs.replace(recording(f"m{n}", *whole[:2]), partial=(0,)) for n in range(7)]
    assert chunks_of(merged(recording("n", *whole), *cut)) == whole
    other = recording("o", *((A, chunk) for chunk in range(20, 30)))
    assert [group.recordings for group in merged(recording("n", *whole), other, *cut).groups] == [8, 1]


def test_what_a_node_saw_of_two_starts_is_one_start_only_if_a_chunk_says_how_their_clocks_stand() -> None:
    whole = recording("z", (C, 1), (A, 1), (B, 1), blobs=(A, B, C))
    parts = [recording("n", (blob, 1), blobs=(blob,)) for blob in (A, B, C)]
    assert kept(*parts).recordings == tuple(parts), "nobody saw which came first"
    assert chunks_of(merged(whole, *parts)) == [(C, 1), (A, 1), (B, 1)]
    later = recording("n", (C, 1), (A, 1), blobs=(A, C))
    assert chunks_of(merged(recording("n", (A, 1), (B, 1)), later)) == [(C, 1), (A, 1), (B, 1)], "C before the old 0"


def test_the_start_that_saw_all_stays_when_each_of_its_blobs_was_watched_by_many() -> None:
    whole = recording("z", (C, 1), (A, 1), (B, 1), blobs=(A, B, C))
    first = [recording(f"m{n}", (A, 1), (B, 1)) for n in range(6)]
    last = [recording(f"o{n}", (C, 1), blobs=(C,)) for n in range(6)]
    mixed = [each for pair in zip(first, last, strict=True) for each in pair]
    assert chunks_of(merged(whole, *mixed)) == [(C, 1), (A, 1), (B, 1)]
    assert len(kept(whole, *mixed).recordings) == trace.MOST_IN_GROUP


def subsets(of: list[str], least: int = 0) -> st.SearchStrategy[set[str]]:
    return st.sets(st.sampled_from(of), min_size=least)


@given(st.lists(st.tuples(st.sampled_from("abcdefghijklmnop"), subsets([A, B, C], 1), subsets([A, B, C]),
                          st.integers(0, 29)), max_size=20), st.integers(0, 20), st.randoms(use_true_random=False))
def test_starts_that_saw_a_part_never_make_the_trace_of_a_whole_one_worse(
    nodes: list[tuple[str, set[str], set[str], int]], place: int, source: random.Random
) -> None:
    """A model: all nodes run one program; some have layers that they cannot watch, or not beyond some read of it."""
    order = [(blob, chunk) for blob in (A, B, C) for chunk in range(10)]
    source.shuffle(order)
    whole = recording("z", *order, blobs=(A, B, C))
    others = []
    for node, watched, cut, until in nodes:
        blobs = tuple(sorted(watched))
        seen = [(chunk, 10 * at) for at, chunk in enumerate(order)
                if chunk[0] in watched and (chunk[0] not in cut or at < until)]  # fmt: skip
        first = seen[0][1] if seen else 0
        steps = tuple((blobs.index(blob), chunk, at - first) for (blob, chunk), at in seen)
        places = tuple(place for place, blob in enumerate(blobs) if blob in cut)
        if steps:
            others.append(Recording(node, tuple((blob, SIZE) for blob in blobs), steps, places))
    place = min(place, len(others))
    found = merged(*others[:place], whole, *others[place:])
    assert len(found.groups) == 1
    assert chunks_of(found) == order
    assert trace.decode(trace.encode(kept(*others, whole)), KeptTrace).recordings[-1] == whole


def test_what_was_borrowed_is_the_trace_until_starts_here_say_otherwise() -> None:
    shipped = merged(recording("n", *((A, chunk) for chunk in range(10))))
    borrowed = trace.borrowed(shipped)
    assert merged(*borrowed).groups == shipped.groups
    here = [recording(f"m{n}", *((A, chunk) for chunk in range(2, 12))) for n in range(3)]
    assert (A, 0) in chunks_of(merged(*borrowed, here[0]))
    assert chunks_of(merged(*borrowed, *here)) == [(A, chunk) for chunk in range(2, 12)]
    other = recording("o", (B, 1), (B, 2))
    assert chunks_of(merged(*borrowed, *borrowed, other)) == [(B, 1), (B, 2)], "what was seen here comes first"
    assert [group.recordings for group in merged(*borrowed, *here, other).groups] == [3, 1]


def test_a_layer_that_is_in_chunks_of_another_size_now_is_learnt_anew() -> None:
    other = Recording("m", ((A, 2 * SIZE),), ((0, 1, 0),))
    found = merged(recording("n", (A, 1), (B, 1)), other)
    assert found.blobs == ((A, 2 * SIZE),)


@given(st.lists(recordings, max_size=40))
def test_what_is_kept_is_bounded_and_the_trace_names_only_what_was_recorded(found: list[Recording]) -> None:
    all_of = kept(*found)
    assert len(all_of.recordings) <= min(trace.MOST_RECORDINGS, len(found))
    result = trace.merged(all_of)
    if result is None:
        assert not any(each.steps for each in all_of.recordings)
        return
    assert len(result.groups) <= trace.MOST_GROUPS
    assert set().union(*map(result.chunks, result.groups)) <= {c for each in found for c in each.chunks()}
    assert trace.decode(trace.encode(result), Trace) == result
    assert trace.decode(trace.encode(all_of), KeptTrace) == all_of
    again = trace_json.from_json(msgspec.json.decode(msgspec.json.encode(trace_json.to_json(result))))
    assert list(map(again.chunks, again.groups)) == list(map(result.chunks, result.groups))


@given(st.lists(recordings, max_size=12), st.randoms(use_true_random=False))
def test_the_bytes_do_not_depend_on_the_order_in_which_recordings_came(
    found: list[Recording], source: random.Random
) -> None:
    shuffled = list(found)
    source.shuffle(shuffled)
    one, other = (trace.merged(KeptTrace(MANIFEST, tuple(each))) for each in (found, shuffled))
    assert (one and trace.encode(one)) == (other and trace.encode(other))


def test_of_many_groups_and_recordings_those_of_the_last_starts_stay() -> None:
    many = [recording(f"n{n}", *((A, chunk) for chunk in range(20))) for n in range(trace.MOST_IN_GROUP + 5)]
    assert kept(*many).recordings == tuple(many[5:])
    apart = [recording(f"n{n}", (A, 2 * n), (A, 2 * n + 1)) for n in range(trace.MOST_RECORDINGS + 3)]
    assert kept(*apart).recordings == tuple(apart[3:])


@given(st.binary(max_size=300))
def test_garbage_is_malformed(data: bytes) -> None:
    for kind, magic in ((Trace, b"DADITRC1"), (Message, b"DADIREC1"), (KeptTrace, b"DADITRK1")):
        for raw in (data, magic + data):
            try:
                trace.decode(raw, kind)
            except Malformed:
                continue
            assert raw.startswith(magic)


@given(st.integers(0, 10_000), st.integers(1, 255))
def test_a_trace_with_a_changed_byte_is_another_trace_or_malformed(at: int, change: int) -> None:
    data = bytearray(trace.encode(merged(recording("n", (A, 1), (B, 2), (A, 3)))))
    data[at % len(data)] ^= change
    try:
        found = trace.decode(data, Trace)
    except Malformed:
        return
    assert all(blob < len(found.blobs) for group in found.groups for blob, _, _ in group.steps)


@pytest.mark.parametrize(
    "wrong",
    [
        Trace(MANIFEST, ((A, SIZE),), (StartGroup(1, ((1, 0, 0),)),)),
        Trace(MANIFEST, ((A, SIZE),), (StartGroup(1, ((0, 0, 0), (0, 0, 5))),)),
        Trace(MANIFEST, ((A, SIZE), (A, SIZE)), ()),
        Trace("../../etc", (), ()),
        Trace(MANIFEST + "\n", ((A, 3),), ()),
        Trace(MANIFEST, ((A, SIZE),), (StartGroup(1, tuple((0, n, 0) for n in range(trace.MOST_STEPS + 1))),)),
        Trace(MANIFEST, ((A, SIZE),), tuple(StartGroup(1, ()) for _ in range(trace.MOST_GROUPS + 1))),
        Trace(MANIFEST, ((A, SIZE),), (StartGroup(1, ((0, -1, 0),)),)),
        Message(MANIFEST, Recording("n", ((A, SIZE),), ((1, 0, 0),))),
        Message(MANIFEST, Recording("n" * 200, (), ())),
        Message(MANIFEST, Recording("n", ((A, SIZE),), ((0, 0, 0),), (1,))),
        KeptTrace(MANIFEST, (Recording("n", ((A, SIZE),), ((0, 0, 0),), (0, 7)),)),
    ],
)
def test_what_contradicts_itself_or_breaks_a_limit_is_malformed(wrong: Any) -> None:
    with pytest.raises(Malformed):
        trace.decode(trace.encode(wrong), type(wrong))


def test_a_recording_must_fit_the_image() -> None:
    blob = blob_of(bytes(10 * SIZE), SIZE)
    fits = Recording("n", ((blob.digest, SIZE),), ((0, 9, 0),))
    trace.check_fits(fits, {blob.digest: blob})
    for wrong in (
        msgspec.structs.replace(fits, steps=((0, 10, 0),)),
        msgspec.structs.replace(fits, blobs=((blob.digest, 2 * SIZE),)),
        msgspec.structs.replace(fits, blobs=((A, SIZE),)),
    ):
        with pytest.raises(Malformed):
            trace.check_fits(wrong, {blob.digest: blob})


def test_the_ratio_is_of_what_was_fetched_ahead() -> None:
    assert trace.ratio([]) is None
    assert trace.ratio([Report("t", 0, 0, 5)]) is None
    assert trace.ratio([Report("t", 10, 5, 50), Report("t", 30, 25, 25)]) == 0.75


json = st.recursive(
    st.none() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["groups", "manifest", "blobs", "steps", "recordings"]), inner),
)


@given(json)
def test_json_that_is_no_trace_is_refused(value: Any) -> None:
    if isinstance(value, dict):
        value = {"format": trace_json.FORMAT, **value}
    with pytest.raises(InvalidRequest):
        trace_json.from_json(value)


def test_what_is_imported_gives_the_trace_that_was_exported() -> None:
    common = [(A, chunk) for chunk in range(4)]
    found = merged(recording("n", *common, (B, 1)), recording("m", *common, (B, 1)),
                   recording("o", *((B, chunk) for chunk in range(10, 20))))  # fmt: skip
    value = trace_json.to_json(found)
    again = merged(*trace_json.recordings(trace_json.from_json(value)))
    assert sorted(map(again.chunks, again.groups)) == sorted(map(found.chunks, found.groups))
