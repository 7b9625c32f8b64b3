"""A *try*: one upstream that is asked for one run of chunks. Its states, and what time makes of it. Pure.

    state      what was heard of the run            it waits   it begins   late, if nothing came for     overdue, for
    ASKED      nothing                              WAITING    -           `patience`                    4 × `patience`
    WAITING    the upstream lacks it, and has       WAITING    SENDING     `waiting` + `patience`; when  `waiting` +
               asked for it itself                                         `waits_until` is over         `patience`
    SENDING    it waited, and now begins to send    WAITING    -           `patience`                    4 × `patience`

*Nothing*: since it was asked, last said that it waits, began to send; or since whatever came from that upstream. What
stands in a queue that moves is not late. Where a try is late somebody else is asked besides (a *hedge*). One that is
*overdue* counts as FAILED, goes on being asked, and may still win; a superpeer is so after `superpeer_silent` at least.

    a try ends because              of its upstream `health.py` is told
    its run came                    ANSWERED; nothing if it was late, unless it is WAITING or a superpeer
    it came from one asked later    LATE if it was late; of one that is WAITING: if it is stuck, see below
    it came from one asked before   nothing
    it refused, broke off; lied     FAILED; LIED
    it is busy                      BUSY
    it lacks the run                nothing
    nobody wants the run any more   nothing

A peer that lacks a chunk says so at once, says it again from time to time, and sends when it has it. Whoever waits is
in order: only the node right below a silent or crawling peer hedges, within its patience, and all below that one just
wait. Without that distinction one dead node near the top would make thousands hedge, and the last in their order is the
superpeer.

Nor may anybody wait for ever: who is cut off, hostile, or waits for us in turn.

    WAITING ──► `waits_until`: `waiting_most` after the last chunk of the blob that came from it (on slow links a
       ▲         │             queue is long, and moves); the nearer to where it is stuck the sooner: those below
       │         ▼             then have it from the parent that they waited for, and do not blame it
       │        test: somebody else is asked for one run only. Where the registry is slow everybody waits for
       │         │    everything, and what comes in the end comes to all
       │         ▼
       │        outrun: it came from there
       │         │  `patience`, in which nothing came from the one that waits
       │         ▼
       └─────── stuck: the other runs are asked for elsewhere, too; what then comes at once makes it LATE
    a chunk comes from it
"""

from __future__ import annotations

import enum
from collections.abc import Collection

import msgspec

from dadi.peers.health import Health, State

_OVERDUE = 4.0
"""Times its patience."""
_SOONER_A_HOP = 0.95


class Settings(msgspec.Struct, frozen=True):
    """Durations in seconds. `patience.py` has those of a node."""

    waiting: float = 0.1
    """A peer that waits for its own parent says so again after this time; one that does not is overdue."""
    superpeer_silent: float = 1.0
    """A superpeer that says nothing for so long is taken for dead; until then it has much to do."""
    waiting_most: float = 5.0
    """After so long without a chunk from it somebody else is asked too, however often it says that it waits."""
    waiting_suspect: float = 0.5
    """The same of a peer that is not GOOD, since it first said that it waits."""


class TryState(enum.Enum):
    """See the table at the head of this file."""

    ASKED = "asked"
    WAITING = "waiting"
    SENDING = "sending"


ON_WAITS = dict.fromkeys(TryState, TryState.WAITING)
ON_BEGINS = {TryState.WAITING: TryState.SENDING}


class Try(msgspec.Struct, eq=False, gc=False):
    """One upstream that is being asked. Once it has ended it is in no `Ask` any more."""

    upstream: str
    since: float
    """When it was asked, last said that it waits, or began to send."""
    due: float
    """When it is late, if nothing else comes from its upstream meanwhile."""
    state: TryState = TryState.ASKED
    waits_since: float = 0.0
    waits_until: float = 0.0

    @property
    def waiting(self) -> bool:
        """Is it WAITING?"""
        return self.state is TryState.WAITING


class Ask(msgspec.Struct, eq=False, gc=False):
    """One run of chunks that is being asked for, of `size` bytes; it is over when it has no tries.

    `hops`: how many nodes the request has come through. `due`: when to look at it again.
    """

    run: range
    size: int
    hops: int
    due: float = 0.0
    tries: list[Try] = []
    """Who is being asked now, in the order of asking."""
    gone: set[str] | None = None
    """Who failed, lied, was busy or lacks it."""

    def tried(self) -> set[str]:
        """Return who is not to be asked (again)."""
        return {a_try.upstream for a_try in self.tries} | (self.gone or set())


class Lateness:
    """Which tries are late, overdue, stuck; for one blob on one node."""

    def __init__(self, health: Health, settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self._health = health
        self._came_at: dict[str, float] = {}
        """When something of the blob last came from each upstream."""
        self._tests: dict[str, Ask] = {}
        """Of each upstream that waits too long, the ask for which somebody else is asked too."""
        self._outrun_at: dict[str, float] = {}
        """When a run first came from somebody else for which an upstream said that it waits; since, nothing from it."""

    def forget(self, keep: Collection[str]) -> None:
        """Forget upstreams that are not in `keep`."""
        for seen in (self._came_at, self._tests, self._outrun_at):
            for name in seen.keys() - keep:
                del seen[name]

    # ── what happens ──────────────────────────────────────────────────────────────────────────────────────────────

    def begin(self, ask: Ask, upstream: str, now: float) -> None:
        """Add a try."""
        ask.due = now + self._health.patience(ask.size)
        ask.tries.append(Try(upstream, now, ask.due))

    def heard(self, ask: Ask, a_try: Try, now: float, *, waiting: bool) -> None:
        """It says that it waits, or begins to send."""
        after = (ON_WAITS if waiting else ON_BEGINS).get(a_try.state)
        if after is None:
            return
        a_try.since = now
        a_try.due = now + self._health.patience(ask.size)
        if after is TryState.WAITING:
            if a_try.state is not TryState.WAITING:
                a_try.waits_since = now
            a_try.waits_until = self._waits_until(ask, a_try, now)
            a_try.due = min(a_try.due + self.settings.waiting, max(now, a_try.waits_until))
        a_try.state = after

    def won(self, ask: Ask, a_try: Try, now: float, began: float) -> None:
        """The run came from it. `began`: when it began to send, if `heard` was not told."""
        self._outrun_at.pop(a_try.upstream, None)
        before = self._came_at.get(a_try.upstream, 0.0)
        self._health.took(ask.size, now - max(a_try.since, began, before))

    def outrun(self, ask: Ask, a_try: Try, now: float, *, at_once: bool) -> bool:
        """The run came from somebody who was asked later (who had it, `at_once`): say whether that makes it LATE."""
        if not a_try.waiting:
            return now >= self.late_at(ask, a_try)
        late = at_once and now >= a_try.waits_until and self._is_stuck(ask, a_try, now)
        self._outrun_at.setdefault(a_try.upstream, now)
        return late

    def came(self, upstream: str, now: float) -> None:
        """Something of the blob came from there."""
        self._came_at[upstream] = now

    # ── what time makes of it ─────────────────────────────────────────────────────────────────────────────────────

    def late_at(self, ask: Ask, a_try: Try) -> float:
        """Return when a try is late, by what has been heard until now."""
        moved = self._health.last_heard(a_try.upstream)  # for another blob, too: they share one queue to it
        if moved <= a_try.since:
            return a_try.due
        if not a_try.waiting:
            return moved + self._health.patience(ask.size)
        again = moved + self.settings.waiting + self._health.patience(ask.size)
        return max(a_try.due, min(again, a_try.waits_until))

    def is_overdue(self, ask: Ask, a_try: Try, now: float, *, superpeer: bool) -> bool:
        """Has nothing come for so long that its upstream counts as FAILED?"""
        patience = self._health.patience(ask.size)
        if a_try.waiting:
            heard = max(a_try.since, self._health.last_heard(a_try.upstream))
            return now >= heard + self.settings.waiting + patience
        longer = (_OVERDUE - 1) * patience
        if superpeer:
            longer = max(longer, self.settings.superpeer_silent)
        return now >= self.late_at(ask, a_try) + longer

    def may_hedge(self, ask: Ask, now: float) -> bool:
        """Say whether somebody else may be asked for a late run: one run only, of those that a GOOD peer waits for."""
        a_try = ask.tries[-1]
        name = a_try.upstream
        if not a_try.waiting or self._health.state(name, now) is not State.GOOD:
            return True
        if self._is_stuck(ask, a_try, now):
            return True
        test = self._tests.get(name, ask)
        if test is not ask and test.tries:
            return False
        self._tests[name] = ask
        return True

    def _waits_until(self, ask: Ask, a_try: Try, now: float) -> float:
        """Return until when an upstream may say that it waits."""
        since, most = a_try.waits_since, self.settings.waiting_suspect
        if self._health.state(a_try.upstream, now) is State.GOOD:
            since, most = max(since, self._came_at.get(a_try.upstream, 0.0)), self.settings.waiting_most
        return since + most * _SOONER_A_HOP ** min(ask.hops, 8)

    def _is_stuck(self, ask: Ask, a_try: Try, now: float) -> bool:
        outrun_at = self._outrun_at.get(a_try.upstream)
        return outrun_at is not None and now >= outrun_at + self._health.patience(ask.size)
