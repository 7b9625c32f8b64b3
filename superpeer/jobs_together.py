"""Whether all images that were asked for together come in time: their sum counts, since they share one rate.

    first looks    each job knows what its image costs the registry when it is resolved; it then waits until the others
                   of its batch know too, `_PATIENCE` at most (`messages.together` says how many they are). All see the
                   same sum: all begin or none does, and each names the rate that would do for all
    later ones     an image that is resolved later counts what the others still lack
    a job joins    one that is under way and gets another rate or deadline: what it still lacks, at once
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from dadi.errors import InvalidRequest
from dadi.prefetch import plan
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Request, together

_LOOK = 0.05
_PATIENCE = 10.0
_UNKNOWN = {State.QUEUED, State.RESOLVING}


class Together:
    """See the head of this file. `jobs`: all that are known; `rate`: what all jobs may take, 0 for no limit."""

    def __init__(self, jobs: Callable[[], Iterable[Job]], clock: Callable[[], float], rate: float) -> None:
        self._jobs = jobs
        self._clock = clock
        self._rate = rate
        self._looking: dict[str, dict[str, int]] = {}
        """By batch: what each job costs that looks, or has looked while another still does."""
        self._inside: dict[str, int] = {}

    def __repr__(self) -> str:
        return f"Together({len(self._looking)} batches)"

    async def check(self, job: Job) -> None:
        """Raise InvalidRequest, with the rate that would do, if a resolved job and those of its batch come too late."""
        if not job.request.deadline:
            return
        batch = job.request.batch
        if not batch:
            self._check(job.request, job.registry)
            return
        sizes = self._looking.setdefault(batch, {})
        sizes[job.id] = job.registry
        self._inside[batch] = self._inside.get(batch, 0) + 1
        try:
            waited = 0.0
            while waited < _PATIENCE and not self._all_known(batch, sizes):
                await asyncio.sleep(_LOOK)
                waited += _LOOK
            self._check(job.request, sum(sizes.values()) + self._besides(batch, sizes))
        finally:
            self._inside[batch] -= 1
            if not self._inside[batch]:
                del self._inside[batch], self._looking[batch]

    def check_joined(self, job: Job, request: Request) -> None:
        """Do as `check`, for a job under way that is to go on as the request says."""
        if request.deadline and job.state not in _UNKNOWN:
            self._check(request, left(job) + self._besides(request.batch, {job.id: 0}))

    def _all_known(self, batch: str, sizes: dict[str, int]) -> bool:
        members = [each for each in self._jobs() if each.request.batch == batch]
        # One whose registry is away is not waited for.
        unknown = any(each.state in _UNKNOWN and not each.tries for each in members if each.id not in sizes)
        return len(members) >= together(batch) and not unknown

    def _besides(self, batch: str, sizes: dict[str, int]) -> int:
        others = (each for each in self._jobs() if batch and each.request.batch == batch and each.id not in sizes)
        return sum(left(each) for each in others if not each.state.is_over)

    def _check(self, request: Request, size: int) -> None:
        rate = min((rate for rate in (request.rate, self._rate) if rate), default=0.0)
        try:
            plan.check_deadline(size, rate, at=request.at, deadline=request.deadline, now=self._clock())
        except InvalidRequest as error:
            if not request.batch:
                raise
            raise InvalidRequest(f"{error.message}, all images together", hint=error.hint) from None


def left(job: Job) -> int:
    """Return the bytes that a job still takes from the registry, about."""
    return round(job.registry * max(0, job.total - job.done) / job.total) if job.total else job.registry
