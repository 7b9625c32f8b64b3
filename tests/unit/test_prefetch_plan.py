"""Prefetching without machines: shares, rates, deadlines, a job's life, times, messages."""

from __future__ import annotations

import itertools
from datetime import UTC, datetime, timedelta, timezone

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.blobs.source import Urgency, urgency_of_word
from dadi.errors import Conflict, DadiError, InvalidRequest
from dadi.index.chunks import Blob, table_of
from dadi.index.image import VERSION, ImageIndex, ImageLayer
from dadi.peers.owners import owners
from dadi.prefetch import nodes, plan
from dadi.prefetch.life import TRANSITIONS, Event, State, after
from dadi.prefetch.messages import Request, canonical, decode_request, job_id, joined
from dadi.prefetch.rate import Bucket
from dadi.prefetch.when import moment

CHUNK = 4096


def digest(number: int) -> str:
    return f"sha256:{number:064x}"


def layer(number: int, chunks: int = 10) -> ImageLayer:
    table = table_of(bytes([number]) * (chunks * CHUNK - 100), CHUNK)
    return ImageLayer(digest(1000 + number), table.size // 2, "t", digest(number), table, digest(2000 + number), 1)


def image(*layers: ImageLayer, devices: tuple[int, ...] | None = None) -> ImageIndex:
    metadata = Blob(digest(9), table_of(b"m", CHUNK))
    used = tuple(range(len(layers))) if devices is None else devices
    return ImageIndex(VERSION, digest(1), digest(2), "linux/amd64", b"{}", layers, metadata, used)


# ---- shares


@given(st.integers(1, 6), st.integers(1, 12))
def test_each_layer_is_warmed_by_its_owner_and_one_stand_in(superpeers: int, layers: int) -> None:
    names = [f"http://s{n}" for n in range(superpeers)]
    index = image(*map(layer, range(layers)))
    shares = {name: plan.share(index, names, name) for name in names}
    for each in index.layers:
        holders = {name: wanted.place for name, wanted in _having(shares, each).items()}
        order = owners(each.diff_id, names)[:2]
        assert holders == {name: place for place, name in enumerate(order)}
    for wanted in shares.values():
        assert [each.place for each in wanted] == sorted(each.place for each in wanted), "owned first"


def _having(shares: dict[str, list[plan.Wanted]], each: ImageLayer) -> dict[str, plan.Wanted]:
    return {name: wanted for name, mine in shares.items() for wanted in mine if wanted.layer == each}


def test_a_superpeer_that_is_alone_or_does_not_know_its_name_warms_everything() -> None:
    index = image(layer(1), layer(2))
    for names, own in (((), ""), (("http://a", "http://b"), "http://c")):
        mine = plan.share(index, names, own)
        assert [wanted.layer.diff_id for wanted in mine] == [digest(1), digest(2)]
        assert all(wanted.order == () and wanted.place == 0 for wanted in mine)


def test_layers_that_are_no_devices_and_repeated_ones_are_left_out() -> None:
    index = image(layer(1), layer(2), layer(1), devices=(0, 2))
    assert [wanted.layer.diff_id for wanted in plan.share(index, (), "")] == [digest(1)]


def test_of_a_trace_only_what_the_image_has_is_taken() -> None:
    index = image(layer(1), layer(2))
    chunks = {index.layers[0].blob: [range(2, 4), range(8, 99), range(50, 60)], layer(5).blob: [range(3)]}
    (wanted,) = plan.share(index, (), "", chunks)
    assert wanted.runs == (range(2, 4), range(8, 10))
    assert wanted.size == 4 * CHUNK - 100


@given(st.integers(0, 50), st.integers(1, 60), st.integers(1, 20 * CHUNK))
def test_steps_are_all_of_a_run_in_order(start: int, count: int, most: int) -> None:
    blob = layer(1, chunks=120).blob
    run = range(start, start + count)
    steps = list(plan.steps(run, blob, most))
    assert [chunk for step in steps for chunk in step] == list(run)
    assert all(len(step) == 1 or len(step) * CHUNK <= most for step in steps)


# ---- deadlines


def test_a_deadline_that_can_be_met_says_nothing() -> None:
    plan.check_deadline(1000, 10.0, at=0.0, deadline=200.0, now=100.0)
    plan.check_deadline(10**18, 0.0, at=0.0, deadline=200.0, now=100.0)
    plan.check_deadline(10**18, 1.0, at=0.0, deadline=0.0, now=100.0)


@given(
    st.integers(1, 10**15), st.floats(1, 1e12), st.floats(0, 1e9), st.floats(0, 1e9), st.floats(1, 1e9)
)
def test_the_rate_that_is_named_would_do(size: int, rate: float, now: float, wait: float, left: float) -> None:
    at = now + wait
    deadline = at + left
    try:
        plan.check_deadline(size, rate, at=at, deadline=deadline, now=now)
    except InvalidRequest as error:
        from dadi.config import RATE, quantity

        assert size > rate * (deadline - at)
        named = quantity(str(error.hint).split()[1], RATE)
        plan.check_deadline(size, named, at=at, deadline=deadline, now=now)
        later = now + wait + 0.04 * left  # when it is asked for again
        plan.check_deadline(size, named, at=at, deadline=deadline, now=later)
    else:
        assert size <= rate * (deadline - at)


def test_a_deadline_before_the_beginning_is_said() -> None:
    with pytest.raises(InvalidRequest, match="over before"):
        plan.check_deadline(1, 0.0, at=500.0, deadline=400.0, now=100.0)


@pytest.mark.parametrize(("rate", "text"), [(250_000_000, "2Gbit"), (125_001, "1.01Mbit"), (3.2, "4B"), (125, "1kbit")])
def test_rates_are_written_as_they_are_taken(rate: float, text: str) -> None:
    assert plan.bits(rate) == text


# ---- rates


@given(st.lists(st.floats(1, 1000), min_size=1, max_size=50), st.floats(1, 100))
def test_over_time_no_more_passes_than_the_rate_allows(amounts: list[float], rate: float) -> None:
    bucket, now = Bucket(rate, 0.0), 0.0
    for amount in amounts:
        now += bucket.take(amount, now)
    assert sum(amounts) <= rate * now + rate / 2 + 1e-6 * sum(amounts)
    assert now <= sum(amounts) / rate + 1e-6 * sum(amounts)


def test_without_a_rate_nobody_waits_and_a_pause_saves_up_half_a_second_only() -> None:
    assert Bucket(0.0, 0.0).take(1e12, 0.0) == 0.0
    bucket = Bucket(100.0, 0.0)
    assert bucket.take(50, 1000.0) == 0.0
    assert bucket.take(100, 1000.0) == pytest.approx(1.0)
    assert bucket.take(100, 999.0) == pytest.approx(2.0), "a clock that was set back"
    bucket.change(200.0, 1000.0)
    assert bucket.take(0, 1000.0) == pytest.approx(0.5), "debts stay, and are paid back at the new rate"


# ---- life


def test_a_job_goes_this_way() -> None:
    state, seen = State.QUEUED, []
    for event in (Event.BEGIN, Event.RESOLVED, Event.DUE, Event.INDEXED, Event.WARMED, Event.VERIFIED):
        state = after(state, event)
        seen.append(state.value)
    assert seen == ["resolving", "waiting", "indexing", "warming", "verifying", "ready"]


@pytest.mark.parametrize(("state", "event"), list(itertools.product(State, Event)))
def test_what_is_not_in_the_table_is_refused(state: State, event: Event) -> None:
    if (state, event) in TRANSITIONS:
        assert after(state, event) is TRANSITIONS[state, event]
        assert not state.is_over or event is Event.RETRY
    else:
        with pytest.raises(Conflict):
            after(state, event)


def test_every_state_is_reached_and_can_be_left() -> None:
    assert {*TRANSITIONS.values()} == set(State)
    assert {state for state, _ in TRANSITIONS} == set(State)


# ---- messages


def test_the_same_image_platform_and_scope_is_the_same_job_however_it_is_written() -> None:
    a = canonical(Request("nginx", "linux/amd64"))
    b = canonical(Request("docker.io/library/nginx:latest", "linux/amd64", priority=9, rate=5.0))
    assert job_id(a) == job_id(b)
    others = [Request("nginx:1", "linux/amd64"), Request("nginx", "linux/arm64")]
    others.append(Request("nginx", "linux/amd64", "startup"))
    assert len({job_id(canonical(each)) for each in [a, *others]}) == 4


def test_a_job_that_is_asked_for_again_does_no_less() -> None:
    old = Request("nginx", "linux/amd64", rate=5.0, priority=7, pin_until=100.0, at=50.0, deadline=90.0)
    new = joined(old, Request("nginx", "linux/amd64", priority=3, pin_until=200.0, rate=9.0))
    assert (new.rate, new.priority, new.pin_until, new.at, new.deadline) == (9.0, 7, 200.0, 0.0, 90.0)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b'{"reference": 1}', b'{"reference": "nginx", "platform": "linux/amd64", "rate": -1}',
             b'{"reference": "nginx", "platform": "linux/amd64", "url": "http://x"}', b"\xff", b"[" * 10_000,
             b'{"reference": "no spaces", "platform": "linux/amd64"}', b'{"reference": "nginx", "platform": "x"}',
             b'{"reference": "nginx", "platform": "linux/amd64", "manifest": "sha256:1"}']
)  # fmt: skip
def test_what_is_no_request_is_refused(body: bytes) -> None:
    with pytest.raises(InvalidRequest):
        decode_request(body)


@given(st.binary(max_size=300))
def test_any_bytes_are_a_request_or_refused(body: bytes) -> None:
    try:
        request = decode_request(body)
    except DadiError:
        return
    assert decode_request(msgspec.json.encode(request)) == request


# ---- times


def test_moments() -> None:
    assert moment("2026-11-10T22:00+08:00", 0.0) == datetime(2026, 11, 10, 14, tzinfo=UTC).timestamp()
    here = timezone(timedelta(hours=2))
    assert moment("2026-11-10 22:00", 0.0, here) == datetime(2026, 11, 10, 20, tzinfo=UTC).timestamp()
    assert moment(" +2h ", 100.0) == 7300.0
    assert moment("+90", 0.0) == 90.0


@pytest.mark.parametrize("text", ["", "+", "tomorrow", "+2y", "25:00", "2026-13-01", "-2h", "+9999999d"])
def test_what_is_no_moment_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        moment(text, 0.0)
    assert "2026-11-10T22:00+08:00" in str(raised.value.hint)


def test_urgencies_have_an_order_and_words() -> None:
    assert Urgency.DEMAND < Urgency.STARTUP < Urgency.PREFETCH < Urgency.BACKFILL
    assert all(urgency_of_word(urgency.word) is urgency for urgency in Urgency)
    assert urgency_of_word(None) is urgency_of_word("soon") is Urgency.DEMAND


# ---- nodes


def test_nodes_are_chosen_by_label_and_share_and_all_superpeers_choose_alike() -> None:
    names = [f"node-{n}" for n in range(2000)]

    def which(text: str, zone: str = "a", rack: str = "r7") -> set[str]:
        return {name for name in names if nodes.chosen(nodes.parse(text), "job", name, zone, rack)}

    assert which("all") == set(names)
    assert which("zone=a, rack=r7") == set(names)
    assert which("zone=b") == which("zone=a,rack=r8") == set()
    assert 300 < len(which("20%")) < 500
    assert which("20%") < which("50%") < which("100%") == set(names)
    assert which("zone=a,20%") == which("20%")


@pytest.mark.parametrize("text", ["some", "0%", "101%", "x%", "zone=", "host=x", "zone=a,zone=b", "all,", "nan%"])
def test_what_names_no_nodes_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        canonical(Request("nginx", "linux/amd64", nodes=text))
