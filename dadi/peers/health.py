"""What a node has seen of its upstreams: who may be asked, and how long an answer takes. Pure: time is an argument.

Life cycles; an event that is not in the table changes nothing:

    a peer     answered   late       failed     lied       busy       its time is over
    GOOD       -          SUSPECT    DROPPED    BARRED     DROPPED
    SUSPECT    GOOD       DROPPED    DROPPED    BARRED     DROPPED
    DROPPED    -          -          -          BARRED     DROPPED    PROBING
    PROBING    GOOD       DROPPED    DROPPED    BARRED     DROPPED
    BARRED     -          -          -          -          -                     (for good)

    a superpeer
    GOOD       -          -          DROPPED    DROPPED    DROPPED
    DROPPED    GOOD       -          -          -          DROPPED    PROBING
    PROBING    GOOD       -          DROPPED    DROPPED    DROPPED

*Late*: it had more than the time that 95 of 100 answers take, and somebody else who was asked after it was faster; of a
SUSPECT the former is enough. What comes late does not count as answered. So a peer that crawls is left as soon as one
that is dead and silent, and one that refuses connections sooner still. Each time that a peer is dropped again it is
dropped for twice as long. While it is probed it is asked for one thing at a time.

*Busy*: it asked to be left alone for some time. Until then nothing that it answers makes it GOOD. That is no fault:
nobody is told of it, and it is not dropped for longer the next time.

Superpeers (`trusted`) are few, and asked all the same when nobody else is left: so one that is DROPPED may answer. They
are never reported, and never left out of a join.
"""

from __future__ import annotations

import enum
import math
from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate

import msgspec

from dadi.peers.places import Fault


class Settings(msgspec.Struct, frozen=True):
    """Durations in seconds."""

    dropped: float = 1.0
    """How long a peer is not asked after it failed or was late twice; doubled each time, up to `dropped_most`."""
    dropped_most: float = 300.0
    quantile: float = 0.95
    """An answer that takes longer than this share of answers is hedged."""
    margin: float = 0.02
    """So much later than that share of answers: a busy event loop is not a slow peer."""
    longest: float = 0.1
    """An answer may take so long, and the time that it needs at the rate `slowest`, whatever was observed: else a node
    whose first parent crawls would take crawling for normal. As long as nothing was observed it may take as long."""
    slowest: float = 4e6
    """Bytes a second; a small part of what the node's link can do."""


class State(enum.Enum):
    """See the table at the head of this file."""

    GOOD = "good"
    SUSPECT = "suspect"
    DROPPED = "dropped"
    PROBING = "probing"
    BARRED = "barred"


class Event(enum.Enum):
    """See the table at the head of this file."""

    ANSWERED = "answered"
    LATE = "late"
    FAILED = "failed"
    LIED = "lied"
    BUSY = "busy"
    OVER = "its time is over"


TRANSITIONS: dict[tuple[State, Event], State] = {
    (State.GOOD, Event.LATE): State.SUSPECT,
    (State.GOOD, Event.FAILED): State.DROPPED,
    (State.SUSPECT, Event.ANSWERED): State.GOOD,
    (State.SUSPECT, Event.LATE): State.DROPPED,
    (State.SUSPECT, Event.FAILED): State.DROPPED,
    (State.DROPPED, Event.OVER): State.PROBING,
    (State.PROBING, Event.ANSWERED): State.GOOD,
    (State.PROBING, Event.LATE): State.DROPPED,
    (State.PROBING, Event.FAILED): State.DROPPED,
    **{(state, Event.LIED): State.BARRED for state in State if state is not State.BARRED},
    **{(state, Event.BUSY): State.DROPPED for state in State if state is not State.BARRED},
}
"""Of a peer."""
OF_SUPERPEERS: dict[tuple[State, Event], State] = {
    (State.GOOD, Event.FAILED): State.DROPPED,
    (State.GOOD, Event.LIED): State.DROPPED,
    (State.DROPPED, Event.ANSWERED): State.GOOD,
    (State.DROPPED, Event.OVER): State.PROBING,
    (State.PROBING, Event.ANSWERED): State.GOOD,
    (State.PROBING, Event.FAILED): State.DROPPED,
    (State.PROBING, Event.LIED): State.DROPPED,
    **{(state, Event.BUSY): State.DROPPED for state in (State.GOOD, State.DROPPED, State.PROBING)},
}


class _Record(msgspec.Struct):
    state: State = State.GOOD
    strikes: int = 0
    dropped_at: float = 0.0
    until: float = 0.0
    busy_until: float = 0.0
    in_flight: int = 0


class Health:
    """Of one node, for all its blobs."""

    def __init__(self, settings: Settings | None = None, *, trusted: Iterable[str] = ()) -> None:
        """`trusted`: superpeers."""
        self.settings = settings or Settings()
        self._trusted = frozenset(trusted)
        self._records: dict[str, _Record] = {}
        self._heard: dict[str, float] = {}
        self._latency: dict[int, _Latency] = {}
        self._patience: dict[int, float] = {}
        self._reports: list[tuple[str, Fault]] = []
        self.drops = 0
        """How often a peer was dropped or barred."""

    def __repr__(self) -> str:
        bad = {name: record.state.value for name, record in self._records.items() if record.state is not State.GOOD}
        return f"Health({bad})"

    def trust(self, superpeers: Iterable[str]) -> None:
        """Learn of more superpeers (see `trusted`)."""
        self._trusted |= frozenset(superpeers)

    def heard(self, peer: str, now: float) -> None:
        """Something came from it, for whatever blob: bytes, or word that it waits."""
        self._heard[peer] = now

    def last_heard(self, peer: str) -> float:
        """Return when something last came from it; 0 for never."""
        return self._heard.get(peer, 0.0)

    # ── who may be asked ──────────────────────────────────────────────────────────────────────────────────────────

    def state(self, peer: str, now: float) -> State:
        """Return the state of a peer; one that nothing is known of is GOOD."""
        record = self._records.get(peer)
        if record is None:
            return State.GOOD
        if record.state is State.DROPPED and now >= record.until:
            record.state = TRANSITIONS[State.DROPPED, Event.OVER]
        return record.state

    def may_ask(self, peer: str, now: float) -> bool:
        """Say whether to ask it for something now."""
        record = self._records.get(peer)
        if record is None or record.state is State.GOOD:
            return True
        state = self.state(peer, now)
        return state is State.SUSPECT or (state is State.PROBING and record.in_flight == 0)

    def asked(self, peer: str) -> None:
        """It is being asked for something."""
        self._record(peer).in_flight += 1

    def ended(self, peer: str) -> None:
        """What it was asked for is settled, one way or another."""
        self._records[peer].in_flight -= 1

    def happened(self, peer: str, event: Event, now: float) -> State:
        """Take in an event; returns the state after it. Dropping and barring a peer is noted for the directory.

        Of one that is busy `busy` is told.
        """
        record = self._record(peer)
        if event is Event.ANSWERED and (record.state is State.GOOD or now < record.busy_until):
            return record.state  # nearly always
        before = self.state(peer, now)
        transitions = OF_SUPERPEERS if peer in self._trusted else TRANSITIONS
        after = record.state = transitions.get((before, event), before)
        if after is not before and event is not Event.BUSY:
            if after is State.DROPPED:
                self.drops += 1
                self._dropped(record, now)
                self._note(peer, Fault.FAILED if event is Event.FAILED else Fault.SLOW)
            elif after is State.BARRED:
                self.drops += 1
                self._note(peer, Fault.LIED)
        return after

    def busy(self, peer: str, seconds: float, now: float) -> None:
        """It asked to be left alone for so long (429, 503 with Retry-After)."""
        if self.happened(peer, Event.BUSY, now) is State.DROPPED:
            record = self._records[peer]
            record.busy_until = now + min(max(0.0, seconds), self.settings.dropped_most)
            record.until = max(record.until, record.busy_until)

    def reports(self) -> list[tuple[str, Fault]]:
        """Return what the directory should be told of peers, each thing once."""
        reports, self._reports = self._reports, []
        return reports

    def liars(self) -> list[str]:
        """Return those that are barred."""
        return [peer for peer, record in self._records.items() if record.state is State.BARRED]

    def unwanted(self, now: float) -> frozenset[str]:
        """Return those that are not to be asked now, for a join."""
        bad = (State.DROPPED, State.BARRED)
        return frozenset(p for p in self._records if p not in self._trusted and self.state(p, now) in bad)

    def forget(self, keep: Iterable[str]) -> None:
        """Forget peers that are well, nothing is asked of, and not in `keep`; else a node would remember everybody."""
        kept = set(keep)
        for peer in [p for p, r in self._records.items() if r.state is State.GOOD and not r.in_flight]:
            if peer not in kept:
                del self._records[peer]
                self._heard.pop(peer, None)

    def _record(self, peer: str) -> _Record:
        record = self._records.get(peer)
        if record is None:
            record = self._records[peer] = _Record()
        return record

    def _dropped(self, record: _Record, now: float) -> None:
        longest = self.settings.dropped_most
        if now > record.dropped_at + longest:
            record.strikes = 0
        record.until = max(record.until, now + min(self.settings.dropped * 2**record.strikes, longest))
        record.strikes = min(record.strikes + 1, 16)
        record.dropped_at = now

    def _note(self, peer: str, fault: Fault) -> None:
        if peer not in self._trusted:
            self._reports.append((peer, fault))

    # ── how long an answer takes ──────────────────────────────────────────────────────────────────────────────────

    def took(self, size: int, seconds: float) -> None:
        """An answer of `size` bytes came within so many seconds, not counting what the peer itself had to wait."""
        kind = size.bit_length()
        latency = self._latency.get(kind)
        if latency is None:
            latency = self._latency[kind] = _Latency(self.settings.quantile)
        if latency.observe(seconds):
            self._patience.clear()

    def patience(self, size: int) -> float:
        """Return the seconds after which an answer of `size` bytes is late: the quantile and the margin.

        Sizes are told apart by powers of two. As long as there are too few answers of one, what was observed of the
        nearest other size is used, in proportion if that was smaller.
        """
        kind = size.bit_length()
        patience = self._patience.get(kind)
        if patience is None:
            patience = self._patience[kind] = self._work_out_patience(size, kind)
        return patience

    def _work_out_patience(self, size: int, kind: int) -> float:
        longest = self.settings.longest + size / self.settings.slowest
        margin = self.settings.margin
        latency = self._latency.get(kind)
        if latency is not None and latency.enough:
            return min(longest, latency.value + margin)
        known = [other for other, latency in self._latency.items() if latency.enough]
        if not known:
            return longest
        nearest = min(known, key=lambda other: abs(other - kind))
        return min(longest, self._latency[nearest].value * 2.0 ** max(0, kind - nearest) + margin)


class _Latency:
    """A quantile of durations: counts in buckets that are 10 % wide; old ones fade, halved every 512 observations."""

    _FADE = 512
    _RENEW = 16
    _ENOUGH = 16
    _BUCKETS = 200  # 1 µs to 190 s
    _PER_E = 1 / math.log(1.1)

    def __init__(self, quantile: float) -> None:
        self.enough = False
        self.value = 0.0
        self._quantile = quantile
        self._counts = [0.0] * self._BUCKETS
        self._seen = 0

    def observe(self, seconds: float) -> bool:
        """Take in a duration; says whether `value` may have changed."""
        bucket = int(math.log(max(seconds, 1e-6) / 1e-6) * self._PER_E)
        self._counts[min(bucket, self._BUCKETS - 1)] += 1
        self._seen += 1
        if self._seen % self._RENEW:
            return False
        self._renew()
        if self._seen % self._FADE == 0:
            self._counts = [count / 2 for count in self._counts]
        return True

    def _renew(self) -> None:
        sums = list(accumulate(self._counts))
        bucket = bisect_left(sums, sums[-1] * self._quantile)
        self.value = 1e-6 * 1.1 ** (bucket + 1)  # the bucket's upper edge: never sooner than was observed
        self.enough = self._seen >= self._ENOUGH
