"""The rates of prefetch jobs: one bucket for all jobs that were asked for together, divided among superpeers.

    one job       one superpeer indexes: at the whole rate. Then each brings its share, at its part of the rate
    a batch       several images are indexed and brought by several superpeers at once: each has its part all along

So a datacenter keeps the rate, whatever is asked for again meanwhile. A job that is under way when it is asked for with
others, at a rate, joins them: from then on it takes from their bucket, and what it has begun too.
"""

from __future__ import annotations

from collections.abc import Callable

from dadi.prefetch.messages import Job
from dadi.prefetch.rate import Bucket


class Taken:
    """Where a job takes from: the `bucket` of its batch, whichever that is by now."""

    def __init__(self, bucket: Bucket) -> None:
        self.bucket = bucket

    def __repr__(self) -> str:
        return f"Taken({self.bucket})"

    @property
    def rate(self) -> float:
        """See `Bucket`."""
        return self.bucket.rate

    def take(self, amount: float, now: float) -> float:
        """See `Bucket`."""
        return self.bucket.take(amount, now)


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
        self._taken: dict[str, Taken] = {}
        self._superpeers: dict[str, int] = {}
        """By job: how many superpeers do their part."""
        self._divided: set[str] = set()

    def __repr__(self) -> str:
        return f"Rates({len(self._buckets)})"

    def begin(self, job: Job, superpeers: int) -> Bucket:
        """Return the bucket of a job that begins, where so many superpeers do their part."""
        self._superpeers[job.id] = max(1, superpeers)
        self._divided.discard(job.id)
        return self._enter(job)

    def _enter(self, job: Job) -> Bucket:
        name = _batch(job)
        if job.id not in self._jobs.get(name, {}):
            self._leave(job)
        # Else an attempt anew: what the earlier one has begun goes on, from the same bucket.
        self._jobs.setdefault(name, {})[job.id] = job
        bucket = self._buckets.get(name)
        if bucket is None:
            bucket = self._buckets[name] = Bucket(job.request.rate, self._clock())
            self._rates[name] = job.request.rate
        if len(self._jobs[name]) > 1 or job.id in self._divided:
            self._parts[name] = self._superpeers[job.id]
        else:
            self._parts.pop(name, None)
        self._taken.setdefault(job.id, Taken(bucket)).bucket = bucket
        self._apply(name)
        return bucket

    def taken_by(self, job: Job) -> Taken:
        """Return where a job that has begun takes from, also when it changes its batch."""
        return self._taken[job.id]

    def divide(self, job: Job, superpeers: int) -> None:
        """From now on so many superpeers share the job's rate."""
        self._divided.add(job.id)
        self._parts[_batch(job)] = max(1, superpeers)
        self._apply(_batch(job))

    def changed(self, job: Job) -> None:
        """Go on with the rate that a job's request has now, and in the batch that it names."""
        name = _batch(job)
        if job.id in self._taken and job.id not in self._jobs.get(name, {}):
            self._enter(job)
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
        self._leave(job)
        self._taken.pop(job.id, None)
        self._superpeers.pop(job.id, None)
        self._divided.discard(job.id)

    def _leave(self, job: Job) -> None:
        for name in [name for name, jobs in self._jobs.items() if job.id in jobs]:
            del self._jobs[name][job.id]
            if not self._jobs[name]:
                del self._jobs[name], self._buckets[name], self._rates[name]
                self._parts.pop(name, None)


def _batch(job: Job) -> str:
    """Return whom a job shares its rate with: what was asked for together has a batch without a rate, too."""
    return (job.request.batch if job.request.rate else "") or job.id
