"""What one upstream is being asked for: wishes for chunks wait here, are joined into requests, and go out.

    want ──► queue ──► what is wanted in one moment in one request, of at most a MiB ──► came | waits | failed
                          demand at once, on connections of its own; startup traces on a few; what is left on two

Only neighbours go into one request, until an upstream has shown that it takes others too (`Line.scattered`).

Whom to ask, and what follows from what was heard, is decided elsewhere (`asking.py`). A wish that is dropped is not
sent any more; when nothing of a request under way is wanted any more its connection is closed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import structlog

from dadi.blobs.source import Urgency
from dadi.errors import DadiError, Unavailable
from dadi.index.chunks import Blob
from dadi.peers.line import Line, joined

log = structlog.get_logger()
_RUN = 1 << 20
_LANES = {Urgency.DEMAND: "demand", Urgency.STARTUP: "startup", Urgency.PREFETCH: "rest", Urgency.BACKFILL: "rest"}
_MOST = {"demand": 32, "startup": 6, "rest": 2}
"""Requests to one upstream at a time. What a sender has put into connections of the others is what demand has to get
past; fewer for a startup trace, whose chunks are scattered, would cost a round trip for each few of them."""
_SCATTERED, _MOST_SCATTERED = 3 << 20, 2
"""Bytes of a startup trace in one request, and such requests, where that may be scattered: the same bytes in fewer of
them. Each request, and each sign of life in it, costs as much as a good part of a chunk, at each link of a chain."""
_OWN = {"demand": 8, "startup": 1, "rest": 0}
"""So many of them are for this node's own reads only."""
_MOST_WAITING = 8
"""Requests that wait at the upstream put nothing in anybody's way: up to so many do not count among these."""
_SOONEST = 0.02
"""Seconds after which a peer that has answered "waiting" is asked again at the soonest: most have waited for longer."""


class Wish:
    """One chunk that somebody wants. `hops`: how many nodes the wish has come through."""

    __slots__ = ("blob", "chunk", "hops", "urgency")

    def __init__(self, blob: Blob, chunk: int, urgency: Urgency, hops: int) -> None:
        self.blob = blob
        self.chunk = chunk
        self.urgency = urgency
        self.hops = hops

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.blob!r}, chunk {self.chunk}, {self.urgency.name.lower()})"


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

    def __init__(self, pipe: Pipe, wishes: list[Wish]) -> None:
        self.wishes = {wish.chunk: wish for wish in wishes}
        self.urgency = wishes[0].urgency
        self.lane = _LANES[self.urgency]
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
        self._running = dict.fromkeys(_MOST, 0)
        self._waiting = dict.fromkeys(_MOST, 0)
        """Those of them that wait at the upstream."""
        self._standing: dict[str, dict[Wish, None]] = {lane: {} for lane in _MOST}
        """Those in the queue of whom it was said that they wait."""
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

    def stands(self, lane: str) -> list[Wish]:
        """Return what stands in the queue behind requests that wait at the upstream: no later than they are."""
        if not self._full(lane):
            return []
        found = [wish for wish in self._queue if _LANES[wish.urgency] == lane]
        self._standing[lane].update(dict.fromkeys(found))
        return found

    def moves(self, lane: str) -> list[Wish]:
        """Return those of them that still stand there, once: something comes again, and the queue will move."""
        found = [wish for wish in self._standing[lane] if wish in self._queue]
        self._standing[lane].clear()
        return found

    def is_waiting(self, request: _Request, waiting: bool) -> None:
        """The upstream waits itself for what a request is about, or does so no more."""
        if request not in self._tasks:
            return
        if request.waiting != waiting:
            request.waiting = waiting
            self._waiting[request.lane] += 1 if waiting else -1
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
        for urgency, lane in _LANES.items():
            if self._full(lane):
                continue
            wishes = [wish for wish in self._queue if wish.urgency == urgency]
            found = list(_runs(wishes))
            if self.line.scattered:
                found = _put_together(found, _SCATTERED if lane == "startup" else _RUN)
            # This node's own reads first: they do not wait until what its children ask for has come.
            for run in sorted(found, key=_for_others):
                if self._full(lane, _OWN[lane] if _for_others(run) else 0):
                    break
                self._send(run)

    def _full(self, lane: str, spare: int = 0) -> bool:
        if lane == "startup" and self.line.scattered:
            return self._running[lane] >= _MOST_SCATTERED - spare
        return self._running[lane] - min(self._waiting[lane], _MOST_WAITING) >= _MOST[lane] - spare

    def _send(self, wishes: list[Wish]) -> None:
        request = _Request(self, wishes)
        for wish in wishes:
            del self._queue[wish]
            self.under_way[wish] = request
        self.requests += 1
        self._running[request.lane] += 1
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
        self._running[request.lane] -= 1
        self._waiting[request.lane] -= request.waiting
        for wish in request.wishes.values():  # cancelled
            self.under_way.pop(wish, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a fault of ours", upstream=self.name, exc_info=error)
        if self._queue:
            self._flush_soon()


def _for_others(run: list[Wish]) -> bool:
    return all(wish.hops for wish in run)


def _runs(wishes: Iterable[Wish]) -> Iterator[list[Wish]]:
    """Return wishes as runs, those asked for first coming first."""
    by_blob: dict[tuple[str, int], dict[int, Wish]] = {}
    for wish in wishes:
        by_blob.setdefault((wish.blob.digest, wish.blob.table.chunk_size), {})[wish.chunk] = wish
    for found in by_blob.values():
        for _, run in joined([(found[chunk].blob, chunk) for chunk in sorted(found)], _RUN):
            yield [found[chunk] for chunk in run]


def _put_together(found: list[list[Wish]], most: int) -> list[list[Wish]]:
    """Return runs as requests of `most` bytes at most (or one run): of one blob, all of them ours or all others'."""
    requests: list[list[Wish]] = []
    open_: dict[tuple[str, int, bool], list[Wish]] = {}
    for run in found:
        size = run[0].blob.table.chunk_size
        key = run[0].blob.digest, size, _for_others(run)
        request = open_.get(key)
        if request is None or (len(request) + len(run)) * size > most:
            request = open_[key] = []
            requests.append(request)
        request.extend(run)
    return requests
