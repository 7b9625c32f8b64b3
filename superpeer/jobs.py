"""Prefetch jobs: kept on disk, resumed after a restart; one for an image, platform and scope, however often asked for.

    submit    a new job; or the same one: under way it goes on (`messages.joined`), over it begins anew
    a task    for each job that is not over: attempts (`jobs_warm.py`), with pauses while a registry or sibling is away
    slots     how many steps are worked on at a time, by priority; rates: `jobs_pace.py`
    pins      the layers of a job are held while it runs, and until `pin_until` when it has succeeded: never evicted
    success   is what `verify` says (`jobs_ready.py`), asked at the end

States are in `dadi/prefetch/life.py`, messages in `dadi/prefetch/messages.py`, HTTP in `jobs_http.py`,
what nodes are asked to do in `jobs_nodes.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from dadi.errors import Conflict, DadiError, NotFound, Unavailable
from dadi.prefetch.life import Event, State, after
from dadi.prefetch.messages import Job, Request, job_id, joined
from dadi.prefetch.plan import Wanted
from dadi.prefetch.rate import Bucket
from dadi.wire import error_fields
from superpeer.job_store import JobStore
from superpeer.jobs_nodes import JobNodes
from superpeer.jobs_pace import PACE, Pace, Sleep, Slots
from superpeer.jobs_ready import Shares
from superpeer.jobs_warm import Warming

if TYPE_CHECKING:
    from superpeer.service import Superpeer

log = structlog.get_logger()
_TRIES = 8
"""How often a job begins anew by itself, when somebody it needs is away."""
_PAUSE, _LONGEST_PAUSE = 2.0, 300.0
_LOOK = 0.25
"""Seconds between two looks of who follows a job."""
_SAVE_EVERY = 5.0
_UNPIN_EVERY = 30.0


class Prefetcher:
    """See the head of this file. `clock`: seconds since 1970."""

    def __init__(self, superpeer: Superpeer, *, clock: Callable[[], float] = time.time,
                 sleep: Sleep = asyncio.sleep) -> None:  # fmt: skip
        config = superpeer.config.prefetch
        self._superpeer = superpeer
        self._config = config
        self.clock = clock
        self.sleep = sleep
        self.shares = Shares(superpeer)
        self.nodes = JobNodes(self.shares, lambda: self.clock())
        self._files = JobStore(Path(superpeer.config.state) / "prefetch")
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._telling: dict[str, list[asyncio.Task[None]]] = {}
        self._paces: dict[str, Bucket] = {}
        self._shared = Bucket(config.rate, clock())
        self._slots = Slots(config.parallel)
        self._pins: dict[str, contextlib.ExitStack] = {}
        self._unpinning: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._began = 0

    def __repr__(self) -> str:
        return f"Prefetcher({len(self._jobs)} jobs, {len(self._tasks)} under way)"

    async def start(self) -> None:
        """Read the jobs; pin what is to be pinned, go on with what was under way."""
        for job in await self._files.load():
            self._jobs[job.id] = job
            if job.state is State.READY and job.request.pin_until > self.clock():
                await self._pin_again(job)
            elif not job.state.is_over:
                self._happens(job, Event.AGAIN)
                self._begin(job)

    # ---- what can be asked for

    async def submit(self, request: Request) -> Job:
        """Return the job that a canonical request is; it is under way then, unless a sibling's is done already."""
        async with self._changing:
            job = self._jobs.get(job_id(request))
            if (job is None or job.state.is_over) and len(self._tasks) >= self._config.most_jobs:
                raise Unavailable(f"{len(self._tasks)} prefetch jobs are under way: no more now", retry_after=60,
                                  hint="prefetch.most_jobs in the configuration")  # fmt: skip
            if job is None:
                job = self._jobs[job_id(request)] = Job(id=job_id(request), request=request, created=self.clock())
                await self._forget_oldest()
            elif not job.state.is_over:
                job.request = joined(job.request, request)
                if job.id in self._paces:
                    self._paces[job.id].change(job.request.rate, self.clock())
                await self._files.save(job)
                return job
            elif request.manifest and job.state is State.READY and job.manifest_digest == request.manifest:
                # A sibling tells of what we have done already. Not again: we would tell it, and so on.
                job.request = msgspec.structs.replace(
                    job.request, pin_until=max(job.request.pin_until, request.pin_until)
                )
                await self._pin_again(job)
                await self._files.save(job)
                return job
            else:
                job.request = request
                await self._renew(job)
            job.manifest_digest, job.top_digest = request.manifest, ""
            await self._files.save(job)
            self._begin(job)
            return job

    def find(self, job: str) -> Job:
        """Return a job. Raises NotFound."""
        if job not in self._jobs:
            raise NotFound(f"there is no prefetch job {job[:64]!r}", hint="dadi prefetch list shows them")
        return self._jobs[job]

    def jobs(self) -> list[Job]:
        """Return all, oldest first."""
        return sorted(self._jobs.values(), key=lambda job: job.created)

    async def cancel(self, name: str) -> Job:
        """Stop a job; what it has brought stays, until something else needs the room. Raises NotFound, Conflict."""
        async with self._changing:
            job = self.find(name)
            self._happens(job, Event.CANCEL)
            await self._stop(job)
            self._unpin(job)
            await self._files.save(job)
            return job

    async def retry(self, name: str) -> Job:
        """Begin a job that is over once more, with the image as it is now. Raises NotFound, Conflict."""
        async with self._changing:
            job = self.find(name)
            if not job.state.is_over:
                raise Conflict(f"job {job.id} is {job.state.value}", hint="cancel it first, or wait")
            job.request = msgspec.structs.replace(job.request, manifest="")
            await self._renew(job)
            job.manifest_digest = job.top_digest = ""
            await self._files.save(job)
            self._begin(job)
            return job

    async def follow(self, name: str) -> AsyncIterator[Job]:
        """Yield a job whenever it has changed, until it is over. Raises NotFound."""
        told = b""
        while True:
            job = self.find(name)
            now = msgspec.json.encode(job)
            if now != told:
                yield job
                told = now
            if job.state.is_over:
                return
            await asyncio.sleep(_LOOK)

    # ---- a job's way

    async def _renew(self, job: Job) -> None:
        self._happens(job, Event.RETRY)
        await self._stop(job)
        job.error, job.notes, job.lacking = None, [], []
        self.nodes.forget(job)
        job.total = job.done = job.registry = job.tries = 0

    def _begin(self, job: Job) -> None:
        task = self._tasks[job.id] = asyncio.create_task(self._run(job))
        task.add_done_callback(lambda done: self._ended(job, done))

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        if self._tasks.get(job.id) is task:
            del self._tasks[job.id]
            self._paces.pop(job.id, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a prefetch job failed by a fault of ours", job=job.id, why=repr(error))

    def _happens(self, job: Job, event: Event) -> None:
        before = job.state
        job.state = after(before, event)
        job.changed = self.clock()
        job.stage = ""
        log.info("prefetch job", job=job.id, image=job.request.reference, was=before.value, now=job.state.value)

    async def _next(self, job: Job, event: Event) -> None:
        self._happens(job, event)
        await self._files.save(job)

    async def _run(self, job: Job) -> None:
        try:
            while not await self._attempt(job):
                pass
        except DadiError as error:
            await self._failed(job, error)
        except Exception as error:
            # In a thread: to show a traceback is to read files.
            await asyncio.to_thread(log.error, "a prefetch job failed", job=job.id, exc_info=error)
            await self._failed(job, DadiError(f"a fault of ours, the log has its trace: {error!r}"))

    async def _failed(self, job: Job, error: DadiError) -> None:
        self._unpin(job)
        job.error = error_fields(error)
        await self._next(job, Event.FAIL)

    async def _attempt(self, job: Job) -> bool:
        """Do all of a job; return whether it is over, False to begin anew. Raises what cannot be helped by time."""
        now = self.clock()
        bucket = self._paces[job.id] = Bucket(job.request.rate, now)
        pace = Pace((self._shared, bucket), clock=self.clock, sleep=self.sleep,
                    busy=lambda: self._superpeer.demands > 0)  # fmt: skip
        PACE.set(pace)
        warming = Warming(self._superpeer, self.shares, job, pace, self._slots, clock=self.clock, sleep=self.sleep,
                          hold=self._hold)  # fmt: skip
        saving = asyncio.create_task(self._keep_saving(job))
        try:
            await self._next(job, Event.BEGIN)
            rates = [rate for rate in (job.request.rate, self._config.rate) if rate]
            await warming.resolve(min(rates, default=0.0))
            self._tell(job, warming)
            await self._next(job, Event.RESOLVED)
            while (left := job.request.at - self.clock()) > 0:
                await self.sleep(min(1.0, left))
            job.began = self.clock()
            await self._next(job, Event.DUE)
            record = await warming.index()
            await self._next(job, Event.INDEXED)
            # Each superpeer brings its own share now: together they keep the rate.
            bucket.change(job.request.rate / max(1, len(await self.shares.superpeers())), self.clock())
            await warming.warm(record)
            await self._next(job, Event.WARMED)
            readiness = await self.shares.readiness(job.request.reference, job.request.platform, job.request.scope,
                                                    manifest=job.manifest_digest)  # fmt: skip
        except Unavailable as error:
            if job.tries >= _TRIES:
                raise
            job.tries += 1
            warming.note(f"begun anew: {error.message}")
            await self._next(job, Event.AGAIN)
            pause = error.retry_after or min(_PAUSE * 2 ** (job.tries - 1), _LONGEST_PAUSE)
            job.stage = f"again in {pause:.0f} s: {error.message}"
            await self.sleep(pause)
            return False
        finally:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)
        if not readiness.ready:
            job.lacking = list(readiness.lacking)
            things = "; ".join(map(str, readiness.lacking[:3]))
            message = f"{job.request.reference} is not all here after it was fetched: {things}"
            job.error = error_fields(Unavailable(message, hint="dadi prefetch retry; is the store too small?"))
            self._unpin(job)
            await self._next(job, Event.LACKS)
            return True
        if 0 < job.request.deadline < self.clock():
            warming.note("done after its deadline")
        if job.request.pin_until <= self.clock():
            self._unpin(job)
        await self._next(job, Event.VERIFIED)
        return True

    async def _keep_saving(self, job: Job) -> None:
        while True:
            await asyncio.sleep(_SAVE_EVERY)
            await self._files.save(job)

    def _tell(self, job: Job, warming: Warming) -> None:
        """Have the siblings do their part: of a job that somebody has asked for here, not of one that they told."""
        siblings = self._superpeer.siblings
        if siblings is None or job.request.manifest:
            return
        for task in self._telling.pop(job.id, ()):
            task.cancel()
        tasks = self._telling[job.id] = [asyncio.create_task(warming.tell(url)) for url in siblings.others()]
        for task in tasks:
            task.add_done_callback(lambda done: done.cancelled() or done.exception())

    # ---- pins

    async def _hold(self, job: Job, mine: list[Wanted]) -> None:
        """Keep the layers of a job from eviction. Raises StoreFull."""
        with contextlib.ExitStack() as holds:
            for wanted in mine:
                await self._superpeer.store.prepare(wanted.layer.blob)
                holds.enter_context(self._superpeer.store.hold(wanted.layer.blob))
            self._unpin(job)
            self._pins[job.id] = holds.pop_all()
        if self._unpinning is None:
            self._unpinning = asyncio.create_task(self._keep_unpinning())

    async def _pin_again(self, job: Job) -> None:
        if job.request.pin_until <= self.clock():
            return
        try:
            record = self._superpeer.catalog.find(job.request.reference, job.request.platform)
            if record is None or record.manifest_digest != job.manifest_digest:
                raise NotFound(f"{job.pinned} is no longer known here")
            mine, _ = await self.shares.of(record, job.request.scope)
            await self._hold(job, mine)
        except DadiError as error:
            self._superpeer.fallbacks.note("image not pinned", f"{job.request.reference}: {error.message}")

    def _unpin(self, job: Job) -> None:
        holds = self._pins.pop(job.id, None)
        if holds is not None:
            holds.close()

    async def _keep_unpinning(self) -> None:
        while True:
            await asyncio.sleep(_UNPIN_EVERY)
            self.unpin_what_is_over()

    def unpin_what_is_over(self) -> None:
        """Let go of what was to be kept until a time that has come."""
        for name in list(self._pins):
            job = self._jobs[name]
            if job.state.is_over and job.request.pin_until <= self.clock():
                self._unpin(job)

    # ---- state

    async def _stop(self, job: Job) -> None:
        tasks = [task for task in (self._tasks.get(job.id), *self._telling.pop(job.id, ())) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forget_oldest(self) -> None:
        over = sorted((job for job in self._jobs.values() if job.state.is_over and job.id not in self._pins),
                      key=lambda job: job.changed)  # fmt: skip
        for job in over[: max(0, len(self._jobs) - self._config.most_jobs)]:
            del self._jobs[job.id]
            await self._files.remove(job)

    def statistics(self) -> dict[str, Any]:
        """Return how many jobs there are in each state, and how many images are pinned."""
        states = {state.value: 0 for state in State}
        for job in self._jobs.values():
            states[job.state.value] += 1
        return {"jobs": states, "pinned": len(self._pins)}

    async def close(self) -> None:
        """Stop; what is under way goes on at the next start."""
        tasks = [*self._tasks.values(), *(task for tasks in self._telling.values() for task in tasks)]
        if self._unpinning is not None:
            tasks.append(self._unpinning)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for job in self._jobs.values():
            self._unpin(job)
