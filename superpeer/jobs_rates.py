"""The rates of prefetch jobs: one bucket for all jobs that were asked for together, divided among superpeers.

    one job       one superpeer indexes: at the whole rate. Then each brings its share, at its part of the rate
    a batch       several images are indexed and brought by several superpeers at once: each has its part all along

So a datacenter keeps the rate, whatever is asked for again meanwhile.
"""

from __future__ import annotations

from collections.abc import Callable

from dadi.prefetch.messages import Job
from dadi.prefetch.rate import Bucket


class Rates:
    """The buckets. `clock`: seconds since 1970."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._buckets: dict[str, Bucket] = {}
        self._jobs: dict[str, dict[str, Job]] = {}
        """By batch: its jobs that are under way."""
        self._parts: dict[str, int] = {}
        """By job: how many superpeers share its rate, once they do."""
        self._rates: dict[str, float] = {}
        """By batch: what was said last, of whichever of its jobs."""

    def __repr__(self) -> str:
        return f"Rates({len(self._buckets)})"

    def begin(self, job: Job, superpeers: int) -> Bucket:
        """Return the bucket of a job that begins, where so many superpeers do their part."""
        name = _batch(job)
        if job.id not in self._jobs.get(name, {}):
            self.end(job)
        # Else an attempt anew: what the earlier one has begun goes on, from the same bucket.
        self._jobs.setdefault(name, {})[job.id] = job
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = Bucket(job.request.rate, self._clock())
            self._rates[name] = job.request.rate
        if len(self._jobs[name]) > 1:
            self._parts[name] = max(1, superpeers)
        else:
            self._parts.pop(name, None)
        self._apply(name)
        return bucket

    def divide(self, job: Job, superpeers: int) -> None:
        """From now on so many superpeers share the job's rate."""
        self._parts[_batch(job)] = max(1, superpeers)
        self._apply(_batch(job))

    def changed(self, job: Job) -> None:
        """Go on with the rate that a job's request has now."""
        name = _batch(job)
        if name in self._rates:
            self._rates[name] = job.request.rate
        self._apply(name)

    def _apply(self, name: str) -> None:
        if (bucket := self._buckets.get(name)) is not None:
            bucket.change(self._rates[name] / self._parts.get(name, 1), self._clock())

    def of(self, job: Job) -> float:
        """Return what this superpeer may take for a job, and those of its batch; 0 for no limit."""
        name = _batch(job)
        return self._rates.get(name, job.request.rate) / self._parts.get(name, 1)

    def end(self, job: Job) -> None:
        """Forget a job."""
        for name in [name for name, jobs in self._jobs.items() if job.id in jobs]:
            del self._jobs[name][job.id]
            if not self._jobs[name]:
                del self._jobs[name], self._buckets[name], self._rates[name]
                self._parts.pop(name, None)


def _batch(job: Job) -> str:
    return job.request.batch or job.id
