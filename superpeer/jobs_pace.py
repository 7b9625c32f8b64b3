"""Work that takes its time: who brings something for a prefetch job waits for the job's rate, and makes way.

A `Pace` stands in a context variable of whoever works for a job, and of the tasks that he starts: `origin.py`, whose
passes outlive their callers, finds it there. Who comes along and is in a hurry (a node that starts the image just now)
lifts it: from then on the work goes as fast as if he had begun it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import heapq
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextvars import ContextVar

from dadi.prefetch.rate import Bucket

Sleep = Callable[[float], Awaitable[None]]
_SLICE = 0.25
"""Seconds after which who waits looks whether it was lifted."""
_YIELDS = 1.0
"""Seconds that a step makes way for reads that somebody waits for: one that hangs must not hold jobs for ever."""
_LOOK = 0.02


class Pace:
    """`buckets`: every one of them must let a step through. `busy`: whether somebody waits for a read just now."""

    def __init__(self, buckets: Sequence[Bucket] = (), *, clock: Callable[[], float], sleep: Sleep = asyncio.sleep,
                 busy: Callable[[], bool] = lambda: False) -> None:  # fmt: skip
        self._buckets = buckets
        self._clock = clock
        self._sleep = sleep
        self._busy = busy
        self._lifted = asyncio.Event()
        self._parts: list[Pace] = []

    def part(self) -> Pace:
        """Return the pace of a part of the work: what lifts it lifts not the rest, what lifts the rest lifts it."""
        part = Pace(self._buckets, clock=self._clock, sleep=self._sleep, busy=self._busy)
        self._parts.append(part)
        if self._lifted.is_set():
            part.lift()
        return part

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
        wait = max((bucket.take(size, now) for bucket in self._buckets), default=0.0)
        while wait > 0 and not self._lifted.is_set():
            await self._sleep(min(_SLICE, wait))
            wait -= _SLICE

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


@contextlib.asynccontextmanager
async def turn(slots: asyncio.Semaphore, patient: asyncio.Semaphore) -> AsyncIterator[None]:
    """Hold a slot: one of `patient` for who has a pace, until that is lifted. So nobody in a hurry waits for those."""
    pace = PACE.get()
    mine = patient
    if pace is None or await _outrun(pace, patient):
        mine = slots
        await slots.acquire()
    try:
        yield
    finally:
        mine.release()


async def _outrun(pace: Pace, patient: asyncio.Semaphore) -> bool:
    """Acquire `patient`; or return True, without having it, when the pace was lifted first."""
    if not patient.locked():
        await patient.acquire()
        return False
    got = False

    async def acquire() -> None:
        nonlocal got
        await patient.acquire()
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

    @contextlib.asynccontextmanager
    async def held(self, priority: int) -> AsyncIterator[None]:
        """Hold a slot."""
        if self._free and not self._waiting:
            self._free -= 1
        else:
            turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            heapq.heappush(self._waiting, (-priority, next(self._numbers), turn))
            try:
                await turn
            except asyncio.CancelledError:
                if turn.done() and not turn.cancelled():
                    self._pass_on()
                raise
        try:
            yield
        finally:
            self._pass_on()

    def _pass_on(self) -> None:
        while self._waiting:
            _, _, turn = heapq.heappop(self._waiting)
            if not turn.done():
                turn.set_result(None)
                return
        self._free += 1
