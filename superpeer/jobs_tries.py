"""When a job is tried again whose registry, or a sibling, is away: at growing intervals, for so long; or at once.

    a try fails    the next one is after 2, 4, 8, … 300 s (or when the registry says), until the job's deadline; without
                   one for `keep_trying`, from when nothing came of it any more
    wake           an operator asks for the image again: he may know that the registry is back. It is tried at once, and
                   for as long as if it had never failed. Where a try is under way the pause after it is a short one

What a sibling tells wakes nobody: two that tell each other with each try would keep each other from waiting at all.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dadi.errors import Unavailable
from dadi.prefetch.messages import Job, patience
from dadi.prefetch.when import written
from superpeer.jobs_pace import Sleep

_PAUSE, _LONGEST_PAUSE = 2.0, 300.0


class Tries:
    """See the head of this file. `clock`: seconds since 1970; `keep_trying`: seconds, of a job without a deadline."""

    def __init__(self, clock: Callable[[], float], sleep: Sleep, keep_trying: float) -> None:
        self._clock = clock
        self._sleep = sleep
        self._keep_trying = keep_trying
        self._reached: dict[str, int] = {}
        """The most bytes that a try of a job under way has had."""
        self._resting: dict[str, asyncio.Event] = {}
        self._asked: set[str] = set()
        """Jobs that somebody asked for while a try was under way."""

    def __repr__(self) -> str:
        return f"Tries({len(self._resting)} wait)"

    def failed(self, job: Job, error: Unavailable) -> float:
        """Return in how many seconds a job is to be tried again; raise the error if it is not to be."""
        now = self._clock()
        if job.id in self._asked:
            self._asked.discard(job.id)
            job.tries = 0
        if job.tries == 0 or job.done > self._reached.get(job.id, 0):
            job.failing, job.tries = now, 0
        self._reached[job.id] = max(job.done, self._reached.get(job.id, 0))
        job.patience = patience(job.request, job.failing, self._keep_trying)
        if now >= job.patience:
            raise error
        job.tries, job.done = job.tries + 1, 0
        self._resting[job.id] = asyncio.Event()  # from now on: who wakes it before it rests is not missed
        pause = error.retry_after or min(_PAUSE * 2 ** min(job.tries - 1, 16), _LONGEST_PAUSE)
        return max(1.0, min(pause, job.patience - now))

    async def rest(self, job: Job, pause: float, error: Unavailable) -> None:
        """Wait for so many seconds, or until somebody wakes the job; it says why."""
        job.stage = f"try {job.tries + 1} in {pause:.0f} s, until {written(job.patience)}: {error.message}"
        woken = self._resting[job.id]
        waiting = [asyncio.ensure_future(self._sleep(pause)), asyncio.ensure_future(woken.wait())]
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._resting.pop(job.id, None)
            for each in waiting:
                each.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    def wake(self, job: Job) -> bool:
        """Have a job that waits for its next try tried now; return whether it did."""
        if (woken := self._resting.get(job.id)) is None:
            self._asked.add(job.id)
            return False
        job.tries = 0
        woken.set()
        return True

    def forget(self, job: Job) -> None:
        """Begin anew with a job, or have nothing to do with it any more."""
        self._reached.pop(job.id, None)
        self._resting.pop(job.id, None)
        self._asked.discard(job.id)
