"""Drives the choice of upstreams (`choose.py`) with real requests and real time: one flight for each chunk wanted.

    want ──► Chooser.begin ──► Pipe.want          a pipe an upstream: it joins, sends and reads
                                 │ came ────────► the flight has landed; whoever else was asked is told to drop it
                                 │ waits, begins  the chooser hears of it
                                 └ failed ──────► the chooser hears what, and says who is asked next
    a timer ──► Chooser.due ──► Pipe.want         hedges, and those whose upstreams have been dropped

    error of an upstream        chooser    besides
    Busy                        busy       the peer that it names is asked first from now on, if it is a parent
    DigestMismatch              lied
    RefusedAnew, of a peer      failed     it serves nobody any more
    NotFound, InvalidRequest    lacks      it is no parent of the blob any more; the directory is asked for another
    AccessDenied                lacks      it becomes the last parent: it is perhaps us who are refused, by all of them
    whatever else               failed

A flight belongs to the process: who wanted it may go away, others may be waiting. This is what makes a chunk come down
each edge once, also where two links of the chain ask for it at the same time.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import structlog

from dadi.blobs.source import Urgency
from dadi.errors import AccessDenied, DadiError, DigestMismatch, InvalidRequest, NotFound, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.peers.choose import Chooser
from dadi.peers.frames import Frames
from dadi.peers.health import Health
from dadi.peers.lanes import Wish
from dadi.peers.line import Busy, Line, RefusedAnew
from dadi.peers.patience import TRIES
from dadi.peers.pipe import Pipe
from dadi.peers.places import Place
from dadi.peers.tries import Ask

log = structlog.get_logger()
_LOOK_AGAIN = 0.001
_STALLED, _GRACE = 0.03, 0.2
"""Seconds: a timer that fires so late has been held up by this process; and how long what has come may then take."""
_Key = tuple[str, int, int]


class Flight(Wish):
    """A chunk on its way. `future`: its bytes."""

    __slots__ = ("ask", "chooser", "error", "future")

    def __init__(self, blob: Blob, chunk: int, urgency: Urgency, hops: int, chooser: Chooser, ask: Ask) -> None:
        super().__init__(blob, chunk, urgency, hops)
        self.chooser = chooser
        self.ask = ask
        self.error: DadiError | None = None
        self.future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    @property
    def key(self) -> _Key:
        return self.blob.digest, self.blob.table.chunk_size, self.chunk


class Asking:
    """All flights of a node. `order` gives a blob's superpeers, `line` makes the way to an upstream."""

    def __init__(self, order: Callable[[str], Sequence[str]], line: Callable[[str], Line], health: Health,
                 frames: Frames, fallbacks: Fallbacks, *, on_drops: Callable[[list[str]], None] = lambda blobs: None,
                 on_lacks: Callable[[str, str], None] = lambda blob, upstream: None,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        """`on_drops`: told of blobs whose parents may not be asked now; `on_lacks`: of a blob and who has it not."""
        self.health = health
        self.pipes: dict[str, Pipe] = {}
        self.choosers: dict[str, Chooser] = {}
        self.counts: Counter[str] = Counter()
        self.gone: Counter[str] = Counter()
        """What pipes had counted that are no more."""
        self._order = order
        self._line = line
        self._frames = frames
        self._fallbacks = fallbacks
        self._on_drops = on_drops
        self._on_lacks = on_lacks
        self._clock = clock
        self._flights: dict[_Key, Flight] = {}
        self._by_ask: dict[Ask, Flight] = {}
        self._drops = 0
        self._timer: asyncio.TimerHandle | None = None
        self._wakes_at = float("inf")
        self._was_stalled = False

    def __repr__(self) -> str:
        return f"Asking({len(self._flights)} in flight, {len(self.pipes)} upstreams)"

    # ---- what others want

    def want(self, blob: Blob, chunk: int, urgency: Urgency, hops: int) -> asyncio.Future[bytes]:
        """Return the future of a chunk; it is not to be cancelled."""
        flight = self._flights.get((blob.digest, blob.table.chunk_size, chunk))
        if flight is not None:
            self.hurry(blob, chunk, urgency)
            return flight.future
        chooser = self.chooser(blob.digest)
        now = self._clock()
        ask = chooser.begin(range(chunk, chunk + 1), blob.table.extent(chunk)[1], now, hops)
        flight = Flight(blob, chunk, urgency, hops, chooser, ask)
        if not ask.tries:
            self._fail(flight, Unavailable("there is nobody to ask", hint="is a superpeer configured, and known?"))
            return flight.future
        self._flights[flight.key] = self._by_ask[ask] = flight
        self._ask(flight, ask.tries[0].upstream)
        self._wake_at(ask.due)
        return flight.future

    def hurry(self, blob: Blob, chunk: int, urgency: Urgency) -> None:
        """Say that somebody more urgent wants a chunk that is in flight, if it is."""
        flight = self._flights.get((blob.digest, blob.table.chunk_size, chunk))
        if flight is not None and urgency < flight.urgency:
            flight.urgency = urgency
            for a_try in flight.ask.tries:
                self.pipes[a_try.upstream].hurry(flight)

    def chooser(self, digest: str) -> Chooser:
        """Return the chooser of a blob; a new one knows superpeers only."""
        chooser = self.choosers.get(digest)
        if chooser is None:
            chooser = self.choosers[digest] = Chooser(self.health, self._order(digest), TRIES)
        return chooser

    def learn(self, digest: str, place: Place) -> None:
        """Take the parents that the directory gives."""
        self.chooser(digest).learn(place)

    def in_flight(self, digest: str) -> bool:
        """Is anything of the blob being asked for?"""
        return any(key[0] == digest for key in self._flights)

    async def tidy(self, keep: set[str]) -> None:
        """Forget blobs that are not in `keep`, upstreams that nobody names any more; look at the superpeers anew."""
        for digest in [d for d in self.choosers if d not in keep and not self.in_flight(d)]:
            chooser = self.choosers.pop(digest)
            self.counts.update(hedges=chooser.hedges, refused_hedges=chooser.refused_hedges)
        for digest, chooser in self.choosers.items():
            chooser.superpeers = tuple(self._order(digest)) or chooser.superpeers
        named = {name for chooser in self.choosers.values() for name in (*chooser.parents, *chooser.superpeers)}
        for name in [
            name for name, pipe in self.pipes.items() if name not in named and pipe.idle and "://" not in name
        ]:  # superpeers are few, and their counts are shown
            pipe = self.pipes.pop(name)
            self.gone.update(bytes=pipe.bytes, wire_bytes=pipe.line.wire_bytes, requests=pipe.requests,
                             wrong=pipe.wrong, wasted_bytes=pipe.wasted_bytes)  # fmt: skip
            await pipe.close()
        self.health.forget(named)

    async def close(self) -> None:
        """Cancel what is in flight; who waits for it gets CancelledError."""
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = float("-inf")  # nothing arms it again
        await asyncio.gather(*(pipe.close() for pipe in self.pipes.values()))
        for flight in self._flights.values():
            flight.chooser.cancelled(flight.ask)
            flight.future.cancel()
        self._flights.clear()
        self._by_ask.clear()

    # ---- what pipes say (`pipe.Asker`)

    def begins(self, wish: Wish, upstream: str) -> None:
        """See `pipe.Asker`."""
        assert isinstance(wish, Flight)
        wish.chooser.heard(wish.ask, upstream, self._clock(), waiting=False)
        self._wake_at(wish.ask.due)

    def waits(self, wish: Wish, upstream: str) -> None:
        """See `pipe.Asker`."""
        assert isinstance(wish, Flight)
        self.counts["waits"] += 1
        wish.chooser.heard(wish.ask, upstream, self._clock(), waiting=True)
        self._wake_at(wish.ask.due)

    def came(self, wish: Wish, upstream: str, data: bytes, frame: bytes | None) -> None:
        """See `pipe.Asker`."""
        assert isinstance(wish, Flight)
        for other in wish.chooser.arrived(wish.ask, upstream, self._clock()):
            self.pipes[other].drop(wish)
        if frame is not None:
            self._frames.keep(wish.blob, wish.chunk, frame)
        self.counts["superpeer" if upstream in wish.chooser.superpeers else "peer"] += len(data)
        self._landed(wish)
        if not wish.future.done():
            wish.future.set_result(data)
        self._look_at_drops()

    def failed(self, wish: Wish, upstream: str, error: DadiError) -> None:
        """See `pipe.Asker`."""
        assert isinstance(wish, Flight)
        # What an upstream cannot make sense of says nothing of the read: it waits for one that can.
        told = Unavailable(error.message, hint=error.hint) if isinstance(error, InvalidRequest) else error
        wish.error = told if wish.error is None or told.retryable or not wish.error.retryable else wish.error
        following = self._passed_over(wish, upstream, error)
        if following is not None:
            self._fallbacks.note("upstream passed over", f"{upstream}: {error}")
            self._ask(wish, following)
            self._wake_at(wish.ask.due)
        elif not wish.ask.tries:
            self._fail(wish, wish.error)
        self._look_at_drops()

    # ---- how

    def _passed_over(self, flight: Flight, upstream: str, error: DadiError) -> str | None:
        """Draw the consequences of an error (the table at the head); returns whom to ask now, if anybody."""
        chooser, ask, now = flight.chooser, flight.ask, self._clock()
        if isinstance(error, Busy):
            self.counts["busy"] += 1
            if error.instead != upstream:
                chooser.put_first(error.instead)
            return chooser.busy(ask, upstream, now, error.retry_after or 0.0)
        if isinstance(error, DigestMismatch):
            self.counts["wrong"] += 1
            self.pipes[upstream].wrong += 1
            log.error("wrong bytes, thrown away", source=upstream, blob=flight.blob.digest, why=error.message)
            return chooser.lied(ask, upstream, now)
        if isinstance(error, RefusedAnew) and upstream not in chooser.superpeers:
            return chooser.failed(ask, upstream, now)
        if isinstance(error, AccessDenied):
            chooser.put_last(upstream)
            return chooser.lacks(ask, upstream, now)
        if isinstance(error, NotFound | InvalidRequest):
            if chooser.leave_out(upstream):
                self._on_lacks(flight.blob.digest, upstream)
            return chooser.lacks(ask, upstream, now)
        return chooser.failed(ask, upstream, now)

    def _ask(self, flight: Flight, upstream: str) -> None:
        pipe = self.pipes.get(upstream)
        if pipe is None:
            pipe = self.pipes[upstream] = Pipe(upstream, self._line(upstream), self)
        pipe.want(flight)

    def _landed(self, flight: Flight) -> None:
        self._flights.pop(flight.key, None)
        self._by_ask.pop(flight.ask, None)

    def _fail(self, flight: Flight, error: DadiError) -> None:
        self._landed(flight)
        if not flight.future.done():
            flight.future.set_exception(error)
            flight.future.exception()  # looked at: it is no fault if every reader has gone

    def _look_at_drops(self) -> None:
        if self.health.drops == self._drops:
            return
        self._drops = self.health.drops
        now = self._clock()
        self._wake_at(now)
        gone = [digest for digest, chooser in self.choosers.items()
                if any(not self.health.may_ask(parent, now) for parent in chooser.parents)]  # fmt: skip
        if gone:
            self._on_drops(gone)

    def _wake_at(self, at: float) -> None:
        if at >= self._wakes_at:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._wakes_at = at
        self._timer = asyncio.get_running_loop().call_later(max(0.0, at - self._clock()), self.look)

    def look(self) -> None:
        """Ask others for what takes too long; the timer calls it, and a test with a clock of its own."""
        now = self._clock()
        late = now - self._wakes_at
        self._timer, self._wakes_at = None, float("inf")
        if late > _STALLED and not self._was_stalled:
            # We were slow ourselves: what has come meanwhile has not been looked at yet.
            self._was_stalled = True
            self._wake_at(now + min(late, _GRACE))
            return
        self._was_stalled = False
        again = float("inf")
        for chooser in list(self.choosers.values()):
            for ask, upstream in chooser.due(now):
                self._ask(self._by_ask[ask], upstream)
            wake_at = chooser.wake_at()
            again = again if wake_at is None else min(again, wake_at)
        self._look_at_drops()
        if again < self._wakes_at:
            self._wake_at(max(again, now + _LOOK_AGAIN))

    def statistics(self) -> dict[str, Any]:
        """Return counts, and bytes by kind of upstream."""
        choosers = self.choosers.values()
        return {
            "peer_bytes": self.counts["peer"], "superpeer_bytes": self.counts["superpeer"],
            "waits": self.counts["waits"], "busy": self.counts["busy"], "wrong": self.counts["wrong"],
            "hedges": sum(chooser.hedges for chooser in choosers) + self.counts["hedges"],
            "refused_hedges": sum(chooser.refused_hedges for chooser in choosers) + self.counts["refused_hedges"],
            "wasted_bytes": sum(pipe.wasted_bytes for pipe in self.pipes.values()) + self.gone["wasted_bytes"],
            "in_flight": len(self._flights),
        }  # fmt: skip
