"""Work that takes its time: who brings something for a prefetch job waits for the job's rate, and makes way.

A `Pace` stands in a context variable (`PACE`) of the job's task and of all that it begins: between a job and the pass
over a layer that it wants stand resolving and indexing, which have nothing to do with jobs. Who comes along and is in a
hurry (a node that starts the image just now) lifts it: from then on the work goes as fast as if he had begun it. When
all jobs that something is done for have left, and nobody has lifted it, it is broken off.

Turns, for passes over whole layers: a job without a rate waits for one of the patient slots, by priority; one with a
rate takes none, since it would hold it for hours: it has one pass at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Protocol

from dadi.errors import Unavailable
from dadi.prefetch.messages import USUAL

Sleep = Callable[[float], Awaitable[None]]
_SLICE = 0.25
"""Seconds after which who waits looks whether it was lifted."""
_YIELDS = 1.0
"""Seconds that a step makes way for reads that somebody waits for: one that hangs must not hold jobs for ever."""
_LOOK = 0.02
_NONE = 1e-9
"""Seconds that are rounding."""


class Takes(Protocol):
    """What a `Bucket` of `dadi/prefetch/rate.py` is to who takes from it; the rate may change at any time."""

    @property
    def rate(self) -> float:
        """Units a second, 0 for no limit."""
        ...

    def take(self, amount: float, now: float) -> float:
        """Take; return the seconds to wait before the amount may pass."""
        ...


class Pace:
    """`buckets`: every one of them must let a step through. `busy`: whether somebody waits for a read just now.

    `alone`: where passes of a job with a rate wait for each other; None for one without.
    """

    def __init__(self, buckets: Sequence[Takes] = (), *, clock: Callable[[], float], sleep: Sleep = asyncio.sleep,
                 busy: Callable[[], bool] = lambda: False, priority: int = USUAL,
                 alone: Slots | None = None) -> None:  # fmt: skip
        self.priority = priority
        self.alone = alone
        self._buckets = buckets
        self._clock = clock
        self._sleep = sleep
        self._busy = busy
        self._lifted = asyncio.Event()
        self._parts: list[Pace] = []
        self._of: list[Pace] = []
        """Those that this is a part of."""
        self._left = False
        self._at_work: set[asyncio.Task[Any]] = set()
        self._broken_off: set[asyncio.Task[Any]] = set()

    def part(self) -> Pace:
        """Return the pace of a part of the work: what lifts it lifts not the rest, what lifts the rest lifts it."""
        part = Pace(self._buckets, clock=self._clock, sleep=self._sleep, busy=self._busy, priority=self.priority,
                    alone=self.alone)  # fmt: skip
        part.also(self)
        return part

    def also(self, other: Pace) -> None:
        """Be a part of another's work too: who leaves then leaves this to him."""
        if other is not self and other not in self._of:
            self._of.append(other)
            other._parts.append(self)
            if other._lifted.is_set():
                self.lift()

    @property
    def is_wanted(self) -> bool:
        """Whether anybody is there whom this is done for."""
        if self._lifted.is_set():
            return True
        return any(other.is_wanted for other in self._of) if self._of else not self._left

    def leave(self) -> None:
        """Do nothing more for who began this; what others want goes on."""
        self._left = True
        self._end()

    def _end(self) -> None:
        if self.is_wanted:
            return
        for task in self._at_work - self._broken_off:
            self._broken_off.add(task)
            task.cancel()
        for part in self._parts:
            part._end()

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Be broken off, inside, when nobody wants this any more: raises Unavailable then."""
        task = asyncio.current_task()
        assert task is not None
        if not self.is_wanted:
            raise _broken_off()
        self._at_work.add(task)
        try:
            yield
        except asyncio.CancelledError:
            if task not in self._broken_off or task.uncancel() > 0:
                raise
            raise _broken_off() from None  # who came just now asks again
        finally:
            self._at_work.discard(task)
            self._broken_off.discard(task)

    def begins(self) -> contextvars.Context:
        """Return a context for a task that works at this pace."""
        context = contextvars.copy_context()
        context.run(PACE.set, self)
        return context

    def lift(self) -> None:
        """Wait no more, in no part of the work."""
        self._lifted.set()
        for part in self._parts:
            part.lift()

    async def take(self, size: int) -> None:
        """Wait until `size` bytes may be asked for."""
        waited = 0.0
        while not self._lifted.is_set() and waited < _YIELDS and self._busy():
            await self._sleep(_LOOK)
            waited += _LOOK
        if self._lifted.is_set():
            return  # they are for somebody else, whom no rate holds
        now = self._clock()
        # What must flow by first, and no time: a rate that is raised meanwhile ends the wait sooner.
        ahead = [bucket.take(size, now) * bucket.rate for bucket in self._buckets]
        while not self._lifted.is_set():
            rates = [bucket.rate for bucket in self._buckets]
            wait = max((left / rate for left, rate in zip(ahead, rates, strict=True) if rate), default=0.0)
            if wait <= _NONE:
                return
            pause = min(_SLICE, wait)
            await self._sleep(pause)
            ahead = [left - pause * rate for left, rate in zip(ahead, rates, strict=True)]

    async def lifted_before(self, work: Awaitable[object]) -> bool:
        """Wait for the work (which is cancelled then) or to be lifted; return whether that came first."""
        doing, lifting = asyncio.ensure_future(work), asyncio.ensure_future(self._lifted.wait())
        try:
            await asyncio.wait([doing, lifting], return_when=asyncio.FIRST_COMPLETED)
            return not doing.done()
        finally:
            for task in (doing, lifting):
                task.cancel()
            await asyncio.gather(doing, lifting, return_exceptions=True)


PACE: ContextVar[Pace | None] = ContextVar("pace", default=None)
"""Of the job that the running task works for; None: of nobody who has time.

    set         in `jobs.py` (`_attempt`), in the job's own task
    passed on   to what that begins, by itself; to a task that outlives its caller a part of it, by `Pace.begins`
    looked at   in `resolving.py` (`resolve`, `_look_for_trace`) and `origin.py` (`bring`): is who asks in a hurry?
                here, in `turn` and `paced`: may the pass over a layer go on?
    left out    chunks by ranges and from siblings: for them the job waits before it asks (`jobs_warm.py`, `_owned`)
"""


def _broken_off() -> Unavailable:
    return Unavailable("it was broken off: the job that wanted it has ended", retry_after=1)


@contextlib.asynccontextmanager
async def turn(slots: asyncio.Semaphore, patient: Slots) -> AsyncIterator[None]:
    """Hold a slot: for who has a pace one of those in which nobody in a hurry waits, until that is lifted."""
    pace = PACE.get()
    if pace is None:
        async with slots:
            yield
        return
    with pace.working():
        mine = pace.alone or patient
        if await _outrun(pace, mine):
            async with slots:
                yield
            return
        try:
            yield
        finally:
            mine.release()


async def _outrun(pace: Pace, patient: Slots) -> bool:
    """Acquire `patient`; or return True, without having it, when the pace was lifted first."""
    if not patient.locked():
        await patient.acquire(pace.priority)
        return False
    got = False

    async def acquire() -> None:
        nonlocal got
        await patient.acquire(pace.priority)
        got = True

    try:
        lifted = await pace.lifted_before(acquire())
    except BaseException:
        if got:
            patient.release()
        raise
    return lifted and not got


async def paced(pieces: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """Yield the pieces at the pace of whoever is at work."""
    pace = PACE.get()
    async with contextlib.aclosing(pieces):
        async for piece in pieces:
            if pace is not None:
                await pace.take(len(piece))
            yield piece


class Slots:
    """So many at a time; of those who wait, the higher priority first, then who came first."""

    def __init__(self, count: int) -> None:
        self._free = count
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._numbers = itertools.count()

    def locked(self) -> bool:
        """Whether who comes now has to wait."""
        return not self._free or bool(self._waiting)

    async def acquire(self, priority: int) -> None:
        """Take a slot, which is to be released."""
        if not self.locked():
            self._free -= 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (-priority, next(self._numbers), turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            raise

    def release(self) -> None:
        """Give a slot back, to who has waited for it."""
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1

    @contextlib.asynccontextmanager
    async def held(self, priority: int) -> AsyncIterator[None]:
        """Hold a slot."""
        await self.acquire(priority)
        try:
            yield
        finally:
            self.release()
