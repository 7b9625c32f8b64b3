"""Whom a node asks for a run of chunks, and whom next. Pure: time is an argument; the caller sends and cancels.

    begin ──► ask the first upstream ──► heard: it is alive, and sends or waits for its own parent
                 │ patience over                 │ arrived: cancel the others; who was passed over is late
                 ▼                               │ failed, lied: the next one, if nobody else is being asked
              due ──► ask the next one too       ▼

Upstreams in order: the parent, its stand-ins, the blob's superpeer, the superpeers that stand in for it. Those that
`health.py` does not let us ask are left out. When nobody is left, dropped superpeers are tried all the same: each when
the one before has failed, or has been silent for as long as makes it fail.

A peer that lacks a chunk says so at once (it is *waiting*), says it again from time to time, and sends when it has it.
Whoever waits is in order: only the node right below a silent or crawling peer hedges, within its patience, and all
below that one just wait. Without that distinction one dead node near the top would make thousands hedge, and the last
in their order is the superpeer. Patience counts from the last thing that came from a peer: what stands in a queue that
moves is not late.

Nor may anybody wait for ever: who is cut off, hostile, or waits for us in turn. `waiting_most` after the last chunk of
the blob that came from it (on slow links a queue is long, and moves) somebody else is asked too. The nearer to where
it is stuck the sooner: those below then have it from the parent that they waited for, and do not blame it. First for
one run only: where the registry is slow everybody waits for everything, and what comes in the end comes to all. When
that run came from elsewhere, and then still nothing from the one that waits, others follow; if they come from elsewhere
at once, too, it counts as late.

Hedges cost upload. They are paid from an allowance: each ask earns a tenth of one, each second five. Asking somebody
else after a failure, or because the peer was dropped meanwhile, is no hedge. Without allowance, and where whoever else
was asked does not answer either, a peer has failed when it took four times its patience.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain

import msgspec

from dadi.peers.health import Event, Health, State
from dadi.peers.places import Place

MAX_HOPS = 64
"""A request that came through so many nodes is passed on to superpeers only: that ends any loop."""
_EARNED = 0.1
_EARNED_A_SECOND = 5.0
_MOST_HEDGES = 16.0
_SILENT = 4.0
"""An upstream that takes so many times its patience has failed."""
_SOONER_A_HOP = 0.95
_ASKABLE = (State.GOOD, State.SUSPECT, State.PROBING)


class Settings(msgspec.Struct, frozen=True):
    """Durations in seconds."""

    waiting: float = 0.1
    """A peer that waits for its own parent says so again after this time; one that does not has failed."""
    superpeer_silent: float = 1.0
    """A superpeer that says nothing for so long is taken for dead; until then it has much to do."""
    waiting_most: float = 5.0
    """After so long without a chunk from it somebody else is asked too, however often it says that it waits."""
    waiting_suspect: float = 0.5
    """The same of a peer that is not GOOD."""


class Try(msgspec.Struct, eq=False, gc=False):
    """One upstream that is being asked. `since`: when it began to answer; until then, when it was asked."""

    upstream: str
    since: float
    due: float
    waiting: bool = False
    waiting_since: float = 0.0
    """0: it never said that it waits."""
    waits_until: float = 0.0


class Ask(msgspec.Struct, eq=False, gc=False):
    """One run of chunks that is being asked for. `tries`: who is being asked now, in the order of asking."""

    run: range
    size: int
    hops: int
    due: float = 0.0
    tries: list[Try] = []
    passed: set[str] | None = None
    """Who failed, lied or was busy."""


class Chooser:
    """The upstreams of one blob on one node."""

    def __init__(self, health: Health, superpeers: Sequence[str], settings: Settings | None = None) -> None:
        """`superpeers`: in the order of `owners.owners`."""
        self.health = health
        self.settings = settings or Settings()
        self.superpeers = tuple(superpeers)
        self.parents: tuple[str, ...] = ()
        self.hedges = 0
        self.refused_hedges = 0
        """Hedges for which there was no allowance."""
        self._open: dict[Ask, None] = {}
        self._drops_seen = 0
        self._progress: dict[str, float] = {}
        """When something last came from each upstream."""
        self._probes: dict[str, Ask] = {}
        """Of each upstream that waits too long, the ask for which somebody else is asked too."""
        self._passed: dict[str, float] = {}
        """When a run first came from somebody else for which an upstream said that it waits; since, nothing from it."""
        self._allowance = _MOST_HEDGES / 2
        self._paid_at = 0.0

    def __repr__(self) -> str:
        return f"Chooser({', '.join((*self.parents, *self.superpeers))}: {len(self._open)} open)"

    def learn(self, place: Place) -> None:
        """Take the parents that the directory gives. What is being asked goes on."""
        self.parents = tuple(peer.id for peer in place.parents)
        known = {*self.parents, *self.superpeers}
        for seen in (self._progress, self._probes, self._passed):
            for name in seen.keys() - known:
                del seen[name]

    def order(self, now: float) -> list[str]:
        """Return whom a new ask would try, in order."""
        return list(self._candidates(0, (), now))

    # ── one ask ───────────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, run: range, size: int, now: float, hops: int = 0) -> Ask:
        """Begin to ask for a run of `size` bytes; `tries[0].upstream` is whom to ask. No tries: there is nobody.

        `hops`: how many nodes the request has come through, 0 for one of our own.
        """
        ask = Ask(run, size, hops)
        upstream = next(chain(self._candidates(hops, (), now), self._last_resort(())), None)
        if upstream is not None:
            self._open[ask] = None
            self._allowance = min(self._allowance + _EARNED, _MOST_HEDGES)
            self._try(ask, upstream, now)
        return ask

    def heard(self, ask: Ask, upstream: str, now: float, *, waiting: bool) -> None:
        """An upstream gave a sign of life: it waits for its own parent, or begins to send."""
        self.health.heard(upstream, now)
        for a_try in ask.tries:
            if a_try.upstream == upstream and (a_try.waiting or waiting):
                a_try.since = now
                a_try.due = now + self.health.patience(ask.size)
                if waiting:
                    if not a_try.waiting:
                        a_try.waiting_since = now
                    a_try.waits_until = self._waits_until(ask, a_try, now)
                    a_try.due = min(a_try.due + self.settings.waiting, max(now, a_try.waits_until))
                a_try.waiting = waiting
        if ask.tries:
            ask.due = ask.tries[-1].due  # those asked before were due already when it was asked

    def arrived(self, ask: Ask, upstream: str, now: float, began: float = 0.0) -> list[str]:
        """The run came from `upstream`, and is right. Returns who else is being asked: cancel that.

        `began`: when it began to send, if it had to wait before and `heard` was not told.
        """
        self._open.pop(ask, None)
        others = []
        passed_over = True
        at_once = any(
            t.upstream == upstream and not t.waiting_since and now < self._due(ask, t) for t in ask.tries
        )  # whoever has to wait for it himself shows nothing of others
        for a_try in ask.tries:
            self.health.ended(a_try.upstream)
            if a_try.upstream == upstream:
                passed_over = False
                self._passed.pop(upstream, None)
                self.health.took(ask.size, now - max(a_try.since, began, self._progress.get(upstream, 0.0)))
                if a_try.waiting or now < self._due(ask, a_try) or upstream in self.superpeers:
                    self.health.happened(upstream, Event.ANSWERED, now)
                continue
            others.append(a_try.upstream)
            late = now >= self._due(ask, a_try)
            if a_try.waiting:
                late = now >= a_try.waits_until and at_once and self._was_passed(ask, a_try, now)
                if passed_over and a_try.upstream not in self._passed:
                    self._passed[a_try.upstream] = now
            if passed_over and late:
                self.health.happened(a_try.upstream, Event.LATE, now)
        ask.tries = []
        self._progress[upstream] = now
        self.health.heard(upstream, now)
        return others

    def failed(self, ask: Ask, upstream: str, now: float) -> str | None:
        """`upstream` refused, broke off or timed out. Returns whom to ask now, if anybody."""
        return self._gone(ask, upstream, Event.FAILED, now)

    def lied(self, ask: Ask, upstream: str, now: float) -> str | None:
        """`upstream` sent wrong bytes. Returns whom to ask now, if anybody."""
        return self._gone(ask, upstream, Event.LIED, now)

    def busy(self, ask: Ask, upstream: str, now: float, retry_after: float) -> str | None:
        """`upstream` takes no more requests for so many seconds. Returns whom to ask now, if anybody."""
        self.health.busy(upstream, retry_after, now)
        return self._gone(ask, upstream, None, now)

    def lacks(self, ask: Ask, upstream: str, now: float) -> str | None:
        """`upstream` will never have the run, or not give it to us: no fault. Returns whom to ask now, if anybody."""
        return self._gone(ask, upstream, None, now)

    def cancelled(self, ask: Ask) -> list[str]:
        """Nobody wants the run any more. Returns who is being asked: cancel that."""
        self._open.pop(ask, None)
        upstreams = [a_try.upstream for a_try in ask.tries]
        for upstream in upstreams:
            self.health.ended(upstream)
        ask.tries = []
        return upstreams

    # ── time ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def wake_at(self) -> float | None:
        """Return when `due` has something to say, if nothing else happens before; None if nothing is open."""
        if self._open and self._drops_seen != self.health.drops:
            return 0.0
        return min((ask.due for ask in self._open), default=None)

    def due(self, now: float) -> list[tuple[Ask, str]]:
        """Return whom to ask in addition, for the asks that take too long or whose upstreams have been dropped."""
        self._drops_seen = self.health.drops
        found = []
        for ask in list(self._open):
            if now >= ask.due:
                ask.due = self._due(ask, ask.tries[-1])
            left = self._left(ask, now)
            if now < ask.due and not left:
                continue
            silent = self._give_up_silent(ask, now)
            left = left or self._left(ask, now)
            tried = _tried(ask)
            behind = self._last_resort(tried) if left and silent else ()
            upstream = next(chain(self._candidates(ask.hops, tried, now), behind), None)
            if upstream is not None and not left and self._late_again(ask, now):
                left = True
            if upstream is not None and (left or (self._first_to_wait(ask, now) and self._pay(now))):
                self.hedges += not left
                self._try(ask, upstream, now)
                found.append((ask, upstream))
            else:
                ask.due = now + self.health.patience(ask.size)
        return found

    # ── how ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _candidates(self, hops: int, tried: Collection[str], now: float) -> Iterator[str]:
        if hops < MAX_HOPS:
            for parent in self.parents:
                if parent not in tried and self.health.may_ask(parent, now):
                    yield parent
        for superpeer in self.superpeers:
            if self.health.may_ask(superpeer, now):
                if superpeer not in tried:
                    yield superpeer
                return  # a stand-in would fetch from the registry: only for an owner that is away, never as a hedge

    def _left(self, ask: Ask, now: float) -> bool:
        return not any(self.health.state(a_try.upstream, now) in _ASKABLE for a_try in ask.tries)

    def _last_resort(self, tried: Collection[str]) -> Iterator[str]:
        return (superpeer for superpeer in self.superpeers if superpeer not in tried)

    def _try(self, ask: Ask, upstream: str, now: float) -> None:
        self.health.asked(upstream)
        patience = self.health.patience(ask.size)
        ask.tries.append(Try(upstream, now, now + patience))
        ask.due = now + patience

    def _due(self, ask: Ask, a_try: Try) -> float:
        """Return when a try is late. One that stands in a queue is not, as long as the queue moves."""
        moved = self.health.last_heard(a_try.upstream)  # for another blob, too: they share one queue to it
        if moved <= a_try.since:
            return a_try.due
        if a_try.waiting:
            again = moved + self.settings.waiting + self.health.patience(ask.size)
            return max(a_try.due, min(again, a_try.waits_until))
        return moved + self.health.patience(ask.size)

    def _waits_until(self, ask: Ask, a_try: Try, now: float) -> float:
        """Return until when an upstream may say that it waits."""
        since, most = a_try.waiting_since, self.settings.waiting_suspect
        if self.health.state(a_try.upstream, now) is State.GOOD:
            since, most = max(since, self._progress.get(a_try.upstream, 0.0)), self.settings.waiting_most
        return since + most * _SOONER_A_HOP ** min(ask.hops, 8)

    def _first_to_wait(self, ask: Ask, now: float) -> bool:
        """Say whether to ask somebody else for what a peer waits for that is well; see the head of this file."""
        a_try = ask.tries[-1]
        name = a_try.upstream
        if not a_try.waiting or self.health.state(name, now) is not State.GOOD:
            return True
        if self._was_passed(ask, a_try, now):
            return True
        if self._probes.get(name, ask) is not ask and self._probes[name] in self._open:
            return False
        self._probes[name] = ask
        return True

    def _was_passed(self, ask: Ask, a_try: Try, now: float) -> bool:
        """Say whether one that waits has given nothing since somebody else did: what comes to all takes a moment."""
        passed = self._passed.get(a_try.upstream)
        return passed is not None and now >= passed + self.health.patience(ask.size)

    def _give_up_silent(self, ask: Ask, now: float) -> bool:
        """Count those as failing that have said nothing for several times what an answer takes, hedge or no hedge.

        Returns whether that is all of them.
        """
        silent_ones = 0
        for a_try in ask.tries:
            if a_try.waiting:
                heard = max(a_try.since, self.health.last_heard(a_try.upstream))
                silent = now >= heard + self.settings.waiting + self.health.patience(ask.size)
            else:
                longer = (_SILENT - 1) * self.health.patience(ask.size)
                if a_try.upstream in self.superpeers:
                    longer = max(longer, self.settings.superpeer_silent)
                silent = now >= self._due(ask, a_try) + longer
            if silent:
                silent_ones += 1
                self.health.happened(a_try.upstream, Event.FAILED, now)
        return silent_ones == len(ask.tries)

    def _gone(self, ask: Ask, upstream: str, event: Event | None, now: float) -> str | None:
        """Take `upstream` out of the ask; ask the next one if it was the only one."""
        if event is not None:
            self.health.happened(upstream, event, now)
        for a_try in [a_try for a_try in ask.tries if a_try.upstream == upstream]:
            ask.tries.remove(a_try)
            self.health.ended(upstream)
        ask.passed = (ask.passed or set()) | {upstream}
        if ask.tries:
            ask.due = ask.tries[-1].due
            return None
        tried = _tried(ask)
        following = next(chain(self._candidates(ask.hops, tried, now), self._last_resort(tried)), None)
        if following is None:
            self._open.pop(ask, None)
        else:
            self._try(ask, following, now)
        return following

    def _late_again(self, ask: Ask, now: float) -> bool:
        """Leave peers that have lost a hedge before and are late again: no second hedge is needed to see it."""
        suspects = [
            t.upstream for t in ask.tries if not t.waiting and self.health.state(t.upstream, now) is State.SUSPECT
        ]  # of one that waits only a hedge shows whether it should have had it
        for suspect in suspects:
            self.health.happened(suspect, Event.LATE, now)
        return len(suspects) == len(ask.tries)

    def _pay(self, now: float) -> bool:
        self._allowance = min(self._allowance + _EARNED_A_SECOND * max(0.0, now - self._paid_at), _MOST_HEDGES)
        self._paid_at = now
        if self._allowance < 1:
            self.refused_hedges += 1
            return False
        self._allowance -= 1
        return True


def _tried(ask: Ask) -> set[str]:
    return {a_try.upstream for a_try in ask.tries} | (ask.passed or set())
