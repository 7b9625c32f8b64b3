"""Whom a node asks for a run of chunks, and whom next. Pure: time is an argument; the caller sends and cancels.

    begin ──► ask the first upstream ──► heard: it is alive, and sends or waits for its own parent
                 │ late                  │ arrived: cancel the others
                 ▼                       │ failed, lied, busy, lacks: the next one, if nobody else is being asked
              due ──► ask the next too   ▼

Who is being asked, for how long that is in order, and what it means for an upstream is a *try*: see `tries.py`.

Upstreams in order: the parent, its stand-ins, the blob's superpeer, the superpeers that stand in for it. Those that
`health.py` does not let us ask are left out. When nobody is left, dropped superpeers are tried all the same: each when
the one before has failed, or has been silent for as long as makes it fail.

Hedges cost upload: they are paid from an allowance. Asking somebody else after a failure, or because all who are being
asked have been dropped meanwhile, is no hedge.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from itertools import chain

from dadi.peers.health import Event, Health, State
from dadi.peers.places import Place
from dadi.peers.tries import Ask, Lateness, Settings, TryState

MAX_HOPS = 64
"""A request that came through so many nodes is passed on to superpeers only: that ends any loop."""
_ASKABLE = (State.GOOD, State.SUSPECT, State.PROBING)


class Chooser:
    """The upstreams of one blob on one node."""

    def __init__(self, health: Health, superpeers: Sequence[str], settings: Settings | None = None) -> None:
        """`superpeers`: in the order of `owners.owners`."""
        self.health = health
        self.lateness = Lateness(health, settings)
        self.superpeers = tuple(superpeers)
        self.parents: tuple[str, ...] = ()
        self.hedges = 0
        self._open: dict[Ask, None] = {}
        self._drops_seen = 0
        self._allowance = _Allowance()

    def __repr__(self) -> str:
        return f"Chooser({', '.join((*self.parents, *self.superpeers))}: {len(self._open)} open)"

    @property
    def refused_hedges(self) -> int:
        """Hedges for which there was no allowance."""
        return self._allowance.refused

    def learn(self, place: Place) -> None:
        """Take the parents that the directory gives. What is being asked goes on."""
        self.parents = tuple(peer.id for peer in place.parents)
        self.lateness.forget({*self.parents, *self.superpeers})

    def put_first(self, peer: str) -> None:
        """Ask a peer before the other parents from now on, if it is one of them."""
        if peer in self.parents:
            self.parents = (peer, *(parent for parent in self.parents if parent != peer))

    def put_last(self, peer: str) -> None:
        """Ask a peer after the other parents from now on, if it is one of them."""
        if self.leave_out(peer):
            self.parents = (*self.parents, peer)

    def leave_out(self, peer: str) -> bool:
        """Ask a peer no more; says whether it was one of the parents."""
        before = self.parents
        self.parents = tuple(parent for parent in before if parent != peer)
        return len(self.parents) < len(before)

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
            self._allowance.earn()
            self._try(ask, upstream, now)
        return ask

    def heard(self, ask: Ask, upstream: str, now: float, *, waiting: bool) -> None:
        """An upstream gave a sign of life: it waits for its own parent, or begins to send."""
        self.health.heard(upstream, now)
        for a_try in ask.tries:
            if a_try.upstream == upstream:
                self.lateness.heard(ask, a_try, now, waiting=waiting)
        if ask.tries:
            ask.due = ask.tries[-1].due  # those asked before were due already when it was asked

    def arrived(self, ask: Ask, upstream: str, now: float, began: float = 0.0) -> list[str]:
        """The run came from `upstream`, and is right. Returns who else is being asked: cancel that.

        `began`: when it began to send, if it had to wait before and `heard` was not told.
        """
        self._open.pop(ask, None)
        lateness = self.lateness
        at_once = any(
            t.upstream == upstream and t.state is TryState.ASKED and now < lateness.late_at(ask, t) for t in ask.tries
        )  # whoever has to wait for it himself shows nothing of others
        others = []
        asked_before = True
        for a_try in ask.tries:
            self.health.ended(a_try.upstream)
            if a_try.upstream == upstream:
                asked_before = False
                lateness.won(ask, a_try, now, began)
                if a_try.waiting or now < lateness.late_at(ask, a_try) or upstream in self.superpeers:
                    self.health.happened(upstream, Event.ANSWERED, now)
                continue
            others.append(a_try.upstream)
            if asked_before and lateness.outrun(ask, a_try, now, at_once=at_once):
                self.health.happened(a_try.upstream, Event.LATE, now)
        ask.tries = []
        lateness.came(upstream, now)
        self.health.heard(upstream, now)
        return others

    def failed(self, ask: Ask, upstream: str, now: float) -> str | None:
        """`upstream` refused, broke off or timed out. Returns whom to ask now, if anybody."""
        self.health.happened(upstream, Event.FAILED, now)
        return self._gone(ask, upstream, now)

    def lied(self, ask: Ask, upstream: str, now: float) -> str | None:
        """`upstream` sent wrong bytes. Returns whom to ask now, if anybody."""
        self.health.happened(upstream, Event.LIED, now)
        return self._gone(ask, upstream, now)

    def busy(self, ask: Ask, upstream: str, now: float, retry_after: float) -> str | None:
        """`upstream` takes no more requests for so many seconds. Returns whom to ask now, if anybody."""
        self.health.busy(upstream, retry_after, now)
        return self._gone(ask, upstream, now)

    def lacks(self, ask: Ask, upstream: str, now: float) -> str | None:
        """`upstream` will never have the run, or not give it to us: no fault. Returns whom to ask now, if anybody."""
        return self._gone(ask, upstream, now)

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
                ask.due = self.lateness.late_at(ask, ask.tries[-1])
            dropped = self._all_dropped(ask, now)
            if now < ask.due and not dropped:
                continue
            upstream = self._also(ask, now, dropped=dropped)
            if upstream is None:
                ask.due = now + self.health.patience(ask.size)
            else:
                self._try(ask, upstream, now)
                found.append((ask, upstream))
        return found

    def _also(self, ask: Ask, now: float, *, dropped: bool) -> str | None:
        """Return whom to ask besides for a run that is late, or all of whose upstreams have been dropped."""
        all_overdue = self._see_overdue(ask, now)
        dropped = dropped or self._all_dropped(ask, now)
        tried = ask.tried()
        behind = self._last_resort(tried) if dropped and all_overdue else ()
        upstream = next(chain(self._candidates(ask.hops, tried, now), behind), None)
        if upstream is None or dropped or self._late_again(ask, now):
            return upstream
        if self.lateness.may_hedge(ask, now) and self._allowance.pay(now):
            self.hedges += 1
            return upstream
        return None

    def _see_overdue(self, ask: Ask, now: float) -> bool:
        """Count as failing who has said nothing for several times what an answer takes, hedge or no hedge.

        Returns whether that is all of them.
        """
        overdue = 0
        for a_try in ask.tries:
            if self.lateness.is_overdue(ask, a_try, now, superpeer=a_try.upstream in self.superpeers):
                overdue += 1
                self.health.happened(a_try.upstream, Event.FAILED, now)
        return overdue == len(ask.tries)

    def _late_again(self, ask: Ask, now: float) -> bool:
        """Leave peers that have lost a hedge before and are late again: no second hedge is needed to see it.

        Returns whether that is all of them.
        """
        suspects = [
            t.upstream for t in ask.tries if not t.waiting and self.health.state(t.upstream, now) is State.SUSPECT
        ]  # of one that waits only a hedge shows whether it should have had it
        for suspect in suspects:
            self.health.happened(suspect, Event.LATE, now)
        return len(suspects) == len(ask.tries)

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

    def _last_resort(self, tried: Collection[str]) -> Iterator[str]:
        return (superpeer for superpeer in self.superpeers if superpeer not in tried)

    def _all_dropped(self, ask: Ask, now: float) -> bool:
        return not any(self.health.state(a_try.upstream, now) in _ASKABLE for a_try in ask.tries)

    def _try(self, ask: Ask, upstream: str, now: float) -> None:
        self.health.asked(upstream)
        self.lateness.begin(ask, upstream, now)

    def _gone(self, ask: Ask, upstream: str, now: float) -> str | None:
        """Take `upstream` out of the ask; ask the next one if it was the only one."""
        for a_try in [a_try for a_try in ask.tries if a_try.upstream == upstream]:
            ask.tries.remove(a_try)
            self.health.ended(upstream)
        ask.gone = (ask.gone or set()) | {upstream}
        if ask.tries:
            ask.due = ask.tries[-1].due
            return None
        tried = ask.tried()
        following = next(chain(self._candidates(ask.hops, tried, now), self._last_resort(tried)), None)
        if following is None:
            self._open.pop(ask, None)
        else:
            self._try(ask, following, now)
        return following


class _Allowance:
    """What hedges are paid from: each ask earns a tenth of one, each second five."""

    _A_TRY, _A_SECOND, _MOST = 0.1, 5.0, 16.0

    def __init__(self) -> None:
        self.refused = 0
        self._hedges = self._MOST / 2
        self._earned_at = 0.0

    def earn(self) -> None:
        """Something is being asked for."""
        self._hedges = min(self._hedges + self._A_TRY, self._MOST)

    def pay(self, now: float) -> bool:
        """Take one hedge out, if there is one."""
        self._hedges = min(self._hedges + self._A_SECOND * max(0.0, now - self._earned_at), self._MOST)
        self._earned_at = now
        if self._hedges < 1:
            self.refused += 1
            return False
        self._hedges -= 1
        return True
