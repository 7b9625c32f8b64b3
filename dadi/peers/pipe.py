"""What one upstream is being asked for: wishes for chunks wait here, are joined into requests, and go out.

    want ──► queue ──► what is wanted in one moment in as few requests as there may be ──► came | waits | failed
      ▲                                                                                     │
      └─────────────── again ◄── 202, or a shorter answer than the request ◄────────────────┘

What goes into one request, and how many of them at a time: `lanes.py`.
Whom to ask, and what follows from what was heard, is decided elsewhere (`asking.py`). A wish that is dropped is not
sent any more; when nothing of a request under way is wanted any more its connection is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Protocol

import structlog

from dadi.errors import DadiError, Unavailable
from dadi.peers.lanes import Lane, Wish, for_others, lanes, put_together, runs
from dadi.peers.line import Line

log = structlog.get_logger()
_SOONEST = 0.02
"""Seconds after which a peer that has answered "waiting" is asked again at the soonest: most have waited for longer."""


class Asker(Protocol):
    """Who is told how it goes."""

    def begins(self, wish: Wish, upstream: str) -> None:
        """The upstream begins to send."""

    def waits(self, wish: Wish, upstream: str) -> None:
        """It has asked for the chunk itself; it is being asked again."""

    def came(self, wish: Wish, upstream: str, data: bytes, frame: bytes | None) -> None:
        """Here it is, verified."""

    def failed(self, wish: Wish, upstream: str, error: DadiError) -> None:
        """It will not come from there."""


class _Request:
    """One run under way; also what its line tells (`line.Heard`)."""

    def __init__(self, pipe: Pipe, wishes: list[Wish], lane: Lane) -> None:
        self.wishes = {wish.chunk: wish for wish in wishes}
        self.urgency = wishes[0].urgency
        self.lane = lane
        self.waiting = False
        """The upstream has nothing to send yet."""
        self._pipe = pipe

    def begins(self, chunk: int | None = None) -> None:
        self._pipe.is_waiting(self, False)
        sent = [wish for wish in self.wishes.values() if chunk is None or chunk == wish.chunk]
        for wish in [*sent, *self._pipe.moves(self.lane)]:
            self._pipe.asker.begins(wish, self._pipe.name)

    def waits(self) -> None:
        self._pipe.is_waiting(self, True)
        for wish in [*self.wishes.values(), *self._pipe.stands(self.lane)]:
            self._pipe.asker.waits(wish, self._pipe.name)

    def chunk(self, chunk: int, data: bytes, frame: bytes | None) -> None:
        self._pipe.bytes += len(data)
        wish = self.wishes.pop(chunk, None)
        if wish is None:
            self._pipe.wasted_bytes += len(data)
        else:
            self._pipe.under_way.pop(wish, None)
            self._pipe.asker.came(wish, self._pipe.name, data, frame)


class Pipe:
    """See the head of this file. `name` is the upstream's id."""

    def __init__(self, name: str, line: Line, asker: Asker) -> None:
        self.name = name
        self.line = line
        self.asker = asker
        self.requests = 0
        self.bytes = 0
        """Of chunks that came from there."""
        self.wrong = 0
        self.wasted_bytes = 0
        """Of those among them that somebody else had brought by then."""
        self.under_way: dict[Wish, _Request] = {}
        self._queue: dict[Wish, None] = {}
        self._resting: dict[Wish, asyncio.TimerHandle] = {}
        self._tasks: dict[_Request, asyncio.Task[None]] = {}
        self._lanes = lanes()
        self._soon: asyncio.Handle | None = None
        self._closed = False

    def __repr__(self) -> str:
        return f"Pipe({self.name}: {len(self._queue)} queued, {len(self.under_way)} under way)"

    @property
    def idle(self) -> bool:
        """Nothing is wanted from here."""
        return not (self._queue or self.under_way or self._resting or self._tasks)

    def want(self, wish: Wish) -> None:
        """Ask for a chunk, together with what else is wanted in this moment."""
        self._queue[wish] = None
        self._flush_soon()

    def hurry(self, wish: Wish) -> None:
        """Somebody waits for it now (its urgency has changed): if it is still in the queue it is sent."""
        if wish in self._queue:
            self._flush_soon()
        elif (request := self.under_way.get(wish)) is not None and request.waiting:
            self._split(request)

    def drop(self, wish: Wish) -> None:
        """It is not wanted from here any more."""
        self._queue.pop(wish, None)
        if (rest := self._resting.pop(wish, None)) is not None:
            rest.cancel()
        request = self.under_way.pop(wish, None)
        if request is not None:
            request.wishes.pop(wish.chunk, None)
            if not request.wishes and request in self._tasks:
                self._tasks[request].cancel()

    async def close(self) -> None:
        """Stop everything; nothing is told any more."""
        self._closed = True
        if self._soon:
            self._soon.cancel()
        for rest in self._resting.values():
            rest.cancel()
        self._resting.clear()
        self._queue.clear()
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # ---- sending

    def stands(self, lane: Lane) -> list[Wish]:
        """Return what stands in the queue behind requests that wait at the upstream: no later than they are."""
        if not lane.full(scattered=self.line.scattered):
            return []
        found = [wish for wish in self._queue if self._lanes[wish.urgency] is lane]
        lane.standing.update(dict.fromkeys(found))
        return found

    def moves(self, lane: Lane) -> list[Wish]:
        """Return those of them that still stand there, once: something comes again, and the queue will move."""
        found = [wish for wish in lane.standing if wish in self._queue]
        lane.standing.clear()
        return found

    def is_waiting(self, request: _Request, waiting: bool) -> None:
        """The upstream waits itself for what a request is about, or does so no more."""
        if request not in self._tasks:
            return
        if request.waiting != waiting:
            request.waiting = waiting
            request.lane.waiting += 1 if waiting else -1
            if waiting and self._queue:
                self._flush_soon()
        if waiting:
            self._split(request)

    def _split(self, request: _Request) -> None:
        """Ask anew for what a request is about if some of it has become urgent: the upstream has to know."""
        wishes = list(request.wishes.values())
        if any(wish.urgency < request.urgency for wish in wishes):
            for wish in wishes:
                self.drop(wish)
                self.want(wish)

    def _flush_soon(self) -> None:
        if self._soon is None and not self._closed:
            self._soon = asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        self._soon = None
        scattered = self.line.scattered
        for urgency, lane in self._lanes.items():
            if lane.full(scattered=scattered):
                continue
            wishes = [wish for wish in self._queue if wish.urgency == urgency]
            found = list(runs(wishes))
            if scattered:
                found = put_together(found, lane.scattered_size)
            # This node's own reads first: they do not wait until what its children ask for has come.
            for run in sorted(found, key=for_others):
                if lane.full(scattered=scattered, for_others=for_others(run)):
                    break
                self._send(run, lane)

    def _send(self, wishes: list[Wish], lane: Lane) -> None:
        request = _Request(self, wishes, lane)
        for wish in wishes:
            del self._queue[wish]
            self.under_way[wish] = request
        self.requests += 1
        lane.running += 1
        task = self._tasks[request] = asyncio.get_running_loop().create_task(self._ask(request))
        task.add_done_callback(lambda done: self._ended(request, done))

    async def _ask(self, request: _Request) -> None:
        wishes = list(request.wishes.values())
        chunks: Sequence[int] = sorted(request.wishes)
        if not self.line.scattered or chunks[-1] - chunks[0] == len(chunks) - 1:
            chunks = range(chunks[0], chunks[-1] + 1)
        hops = max(wish.hops for wish in wishes)
        loop = asyncio.get_running_loop()
        asked = loop.time()
        error: DadiError | None = None
        sends = False
        try:
            sends = await self.line.ask(wishes[0].blob, chunks, wishes[0].urgency, hops, request)
        except DadiError as failed:
            error = failed
        except Exception as failed:  # a mistake of ours must not leave a read waiting for ever
            log.exception("a fault of ours", upstream=self.name)
            error = Unavailable(f"asking {self.name} failed: {failed!r}")
        left = list(request.wishes.values())
        request.wishes.clear()
        for wish in left:
            del self.under_way[wish]
            if error is not None:
                self.asker.failed(wish, self.name, error)
            elif sends:
                self.want(wish)  # the answer was shorter than the request
            else:
                self._again(wish, asked + _SOONEST - loop.time())
                self.asker.waits(wish, self.name)

    def _again(self, wish: Wish, wait: float) -> None:
        if wait <= 0:
            self.want(wish)
        else:
            self._resting[wish] = asyncio.get_running_loop().call_later(wait, self._rested, wish)

    def _rested(self, wish: Wish) -> None:
        del self._resting[wish]
        self.want(wish)

    def _ended(self, request: _Request, task: asyncio.Task[None]) -> None:
        del self._tasks[request]
        request.lane.running -= 1
        request.lane.waiting -= request.waiting
        for wish in request.wishes.values():  # cancelled
            self.under_way.pop(wish, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fault of ours", upstream=self.name, exc_info=error)
        if self._queue:
            self._flush_soon()
