"""What counts for all images of one command together: they share one rate and one store.

    first looks    each job knows what its image needs when it is resolved; it then waits until the others of its batch
                   know too, `_PATIENCE` at most (`messages.together` says how many they are), less without a deadline.
                   All see the same sums: all begin or none does; of a deadline each names the rate that would do for
                   all
    later ones     an image that is resolved later, or known exactly only now, counts what the others still lack
    a job joins    one that is under way and gets another rate or deadline: what it still lacks, at once

What fits is reckoned in `jobs_room.py`, what comes in time in `dadi/prefetch/plan.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable

import msgspec

from dadi.errors import InvalidRequest
from dadi.prefetch import plan
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Request, together
from superpeer.jobs_room import Needs

_LOOK = 0.05
_PATIENCE = 10.0
_PATIENCE_FOR_ROOM = 2.0
"""Without a deadline: who comes later counts what the others still lack, so that little is lost."""
_UNKNOWN = {State.QUEUED, State.RESOLVING}
_NOTHING_MORE = {State.FAILED, State.CANCELLED}


class Sums(msgspec.Struct, frozen=True):
    """What all images of a command need: the `images`, first that of who looks; bytes from the `registry`."""

    images: list[Needs]
    registry: int


class _Looking:
    """The jobs of one batch that look. `needs`: of each that looks, or has looked while another still does."""

    def __init__(self) -> None:
        self.needs: dict[str, Needs] = {}
        self.inside = 0
        self.all_known: asyncio.Task[None] | None = None


class Together:
    """See the head of this file. `jobs`: all that are known; `rate`: what all jobs may take, 0 for no limit."""

    def __init__(self, jobs: Callable[[], Iterable[Job]], clock: Callable[[], float], rate: float) -> None:
        self._jobs = jobs
        self._clock = clock
        self._rate = rate
        self._looking: dict[str, _Looking] = {}
        """By batch."""
        self._needs: dict[str, tuple[Needs, float]] = {}
        """By job, while anything of its batch is under way: what it needed when it looked, the part of it left then."""

    def __repr__(self) -> str:
        return f"Together({len(self._looking)} batches)"

    @contextlib.asynccontextmanager
    async def looking(self, job: Job, needs: Needs) -> AsyncIterator[Sums]:
        """Wait for the others of a resolved job's batch, then give what all need. `needs`: what the job does.

        Inside, all of them see the same, whatever becomes of one of them meanwhile.
        """
        batch = job.request.batch
        if not batch:
            yield Sums([needs], needs.registry)
            return
        self._needs[job.id] = needs, _part_left(job)
        looking = self._looking.setdefault(batch, _Looking())
        looking.needs[job.id] = needs
        looking.inside += 1
        try:
            if looking.all_known is None:
                patience = _PATIENCE if job.request.deadline else _PATIENCE_FOR_ROOM
                looking.all_known = asyncio.create_task(self._until_known(batch, looking.needs, patience))
            await asyncio.wait([looking.all_known])
            yield self._sums(job, looking.needs)
        finally:
            looking.inside -= 1
            if not looking.inside:
                del self._looking[batch]
                if looking.all_known is not None:
                    looking.all_known.cancel()

    async def _until_known(self, batch: str, needs: dict[str, Needs], patience: float) -> None:
        """Return when each image of a batch is known, or will not be soon; once for all that wait: they may be many."""
        waited = 0.0
        while waited < patience and not self._all_known(batch, needs):
            await asyncio.sleep(_LOOK)
            waited += _LOOK

    def _all_known(self, batch: str, needs: dict[str, Needs]) -> bool:
        members = self._members(batch)
        # One whose registry is away is not waited for.
        unknown = any(each.state in _UNKNOWN and not each.tries for each in members if each.id not in needs)
        return len(members) >= together(batch) and not unknown

    def _sums(self, job: Job, needs: dict[str, Needs]) -> Sums:
        mates = [each for name, each in needs.items() if name != job.id]
        registry = sum(each.registry for each in needs.values())
        for each in self._members(job.request.batch):
            if each.id not in needs and each.state not in _NOTHING_MORE:
                registry += left(each)
                if each.id in self._needs:
                    needed, of = self._needs[each.id]
                    mates.append(needed.scaled(min(1.0, _part_left(each) / of) if of else 0.0))
        return Sums([needs[job.id], *mates], registry)

    def _members(self, batch: str) -> list[Job]:
        return [each for each in self._jobs() if batch and each.request.batch == batch]

    # ---- in time

    def check_joined(self, job: Job, request: Request) -> None:
        """Do as `check_deadline`, for a job under way that is to go on as the request says."""
        if request.deadline and job.state not in _UNKNOWN:
            others = (each for each in self._members(request.batch) if each.id != job.id)
            self.check_deadline(request, left(job) + sum(map(left, others)))

    def check_deadline(self, request: Request, size: int) -> None:
        """Raise InvalidRequest, with the rate that would do, if `size` bytes, of all of a batch, come too late."""
        rate = min((rate for rate in (request.rate, self._rate) if rate), default=0.0)
        try:
            plan.check_deadline(size, rate, at=request.at, deadline=request.deadline, now=self._clock())
        except InvalidRequest as error:
            if not request.batch:
                raise
            raise InvalidRequest(f"{error.message}, all images together", hint=error.hint) from None

    # ---- for who comes later

    def knows(self, job: Job, needs: Needs) -> list[Needs]:
        """Remember what a job needs by now; return what it and the others of its batch do, without waiting for any."""
        if job.request.batch:
            self._needs[job.id] = needs, _part_left(job)
        return self._sums(job, {job.id: needs}).images

    def under_way_with(self, job: Job) -> list[Job]:
        """Return the other jobs of its batch that are not over."""
        return [each for each in self._members(job.request.batch) if each.id != job.id and not each.state.is_over]

    def ended(self) -> None:
        """Forget what jobs needed of whose batch nothing is under way any more."""
        jobs = list(self._jobs())
        under_way = {each.request.batch for each in jobs if not each.state.is_over}
        keep = {each.id for each in jobs if each.request.batch in under_way}
        for name in self._needs.keys() - keep:
            del self._needs[name]


def left(job: Job) -> int:
    """Return the bytes that a job still takes from the registry, about."""
    return round(job.registry * _part_left(job))


def _part_left(job: Job) -> float:
    if job.state.is_over:
        return 0.0
    return max(0, job.total - job.done) / job.total if job.total else 1.0
