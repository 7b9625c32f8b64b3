"""Prefetch jobs: kept on disk, resumed after a restart; one for an image, platform and scope, however often asked for.

      operator, sibling, node ──HTTP──► jobs_http ── who may: jobs_operators, and the image's registry
                                           │ submit, cancel, retry, follow
                                           ▼
      job_store ◄── each change ───────  jobs.py  ── what the image is ──► jobs_telling ──► siblings
                                           │ a task for each job that is not over
           when again: jobs_tries          ▼
           with whose    ◄────────────  an attempt: jobs_warm ─────────────────────────► jobs_ready: is all here?
           credentials:                    │ resolve        │ index     │ warm             │ yes
           jobs_secrets                    ▼                ▼           ▼                  ▼
                               jobs_together, jobs_room   slots, turns, pace: jobs_pace   jobs_pins: kept until a time
                               does it come in time, fit  rates: jobs_rates               jobs_nodes: nodes are asked to

States are in `dadi/prefetch/life.py`, messages in `dadi/prefetch/messages.py`. A job that is asked for again goes on as
`messages.joined` says if it is under way, and begins anew if it is over. Credentials that came with it are forgotten
when it is over, and by a restart: one that cannot do without fails then, and says that it is to be submitted again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog

from dadi.errors import AccessDenied, Conflict, DadiError, NotFound, Unavailable
from dadi.oci.credentials import Credentials
from dadi.prefetch.life import Event, State, after
from dadi.prefetch.messages import Job, Readiness, Request, job_id, joined
from dadi.prefetch.rate import Bucket
from dadi.wire import error_fields
from superpeer.job_store import JobStore
from superpeer.jobs_nodes import JobNodes
from superpeer.jobs_operators import Operators
from superpeer.jobs_pace import PACE, Pace, Sleep, Slots
from superpeer.jobs_pins import Pins
from superpeer.jobs_rates import Rates
from superpeer.jobs_ready import Shares, StartupChunks
from superpeer.jobs_room import Room
from superpeer.jobs_telling import Telling
from superpeer.jobs_together import Together
from superpeer.jobs_tries import Tries
from superpeer.jobs_warm import Warming

if TYPE_CHECKING:
    from superpeer.service import Superpeer

log = structlog.get_logger()
_CHANGES = 3
"""How often a job begins anew because what a start reads is another thing than it was."""
_LOOK = 0.25
"""Seconds between two looks of who follows a job."""
_SAVE_EVERY = 5.0
_SWEEP_EVERY = 30.0


class Prefetcher:
    """See the head of this file. `clock`: seconds since 1970."""

    def __init__(self, superpeer: Superpeer, startup_chunks: StartupChunks, *,
                 clock: Callable[[], float] = time.time, sleep: Sleep = asyncio.sleep) -> None:  # fmt: skip
        config = superpeer.config.prefetch
        self._superpeer = superpeer
        self._config = config
        self.clock = clock
        self.sleep = sleep
        self.shares = Shares(superpeer, startup_chunks)
        self.nodes = JobNodes(self.shares, lambda: self.clock())
        self._files = JobStore(Path(superpeer.config.state) / "prefetch")
        self._jobs: dict[str, Job] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._paces: dict[str, list[Pace]] = {}
        """Of all attempts of a job under way: what an earlier one has begun may go on."""
        self._shared = Bucket(config.rate, clock())
        self.rates = Rates(lambda: self.clock())
        self.tries = Tries(lambda: self.clock(), lambda seconds: self.sleep(seconds), config.keep_trying)
        self.telling = Telling(superpeer, lambda: self.clock())
        self._room = Room(superpeer, self.shares)
        self.together = Together(self._jobs.values, lambda: self.clock(), config.rate)
        self._slots = Slots(config.parallel)
        self._indexing = Slots(config.parallel), Slots(4 * config.parallel)
        """For images that are streamed: by jobs without a rate, and by those with one, which take their time."""
        self.pins = Pins(superpeer, lambda: self.clock())
        self.secrets = superpeer.job_secrets
        self.operators = Operators(config.operators, superpeer.fallbacks,
                                   open_to_all=superpeer.config.authorization == "open")  # fmt: skip
        self._sweeping: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()

    async def start(self) -> None:
        """Read the jobs; pin what is to be pinned, go on with what was under way. Raises ConfigError (operators)."""
        await self.operators.load()
        for job in await self._files.load():
            self._jobs[job.id] = job
            self.pins.again(job)
            if not job.state.is_over:
                self._happens(job, Event.AGAIN)
                self._begin(job)
        self._sweeping = asyncio.create_task(self._keep_sweeping())

    def __repr__(self) -> str:
        return f"Prefetcher({len(self._jobs)} jobs, {len(self._tasks)} under way)"

    # ---- what can be asked for

    async def submit(self, request: Request, credentials: Credentials | None = None) -> Job:
        """Return the job that a canonical request is; it is under way then, unless a sibling's is done already."""
        async with self._changing:
            job = self._jobs.get(job_id(request))
            if (job is None or job.state.is_over) and len(self._tasks) >= self._config.most_jobs:
                raise Unavailable(f"{len(self._tasks)} prefetch jobs are under way: no more now", retry_after=60,
                                  hint="prefetch.most_jobs in the configuration")  # fmt: skip
            if job is None:
                await self._forget_oldest()
                job = self._jobs[job_id(request)] = Job(id=job_id(request), request=request, created=self.clock())
            elif not job.state.is_over:
                await self._join(job, request, credentials)
                return job
            elif request.manifest and job.state is State.READY and job.manifest_digest == request.manifest:
                # A sibling tells of what we have done already. Not again: we would tell it, and so on.
                until, batch = max(job.request.pin_until, request.pin_until), request.batch or job.request.batch
                job.request = msgspec.structs.replace(job.request, pin_until=until, batch=batch)
                self.pins.pin(job)
                await self._files.save(job)
                return job
            else:
                job.request = request  # what is pinned stays so, by its manifest
                await self._renew(job)
            return await self._set_off(job, credentials)

    async def _join(self, job: Job, request: Request, credentials: Credentials | None) -> None:
        """Have a job under way do what it is asked for once more. Raises InvalidRequest, and changes nothing then."""
        new, from_sibling = joined(job.request, request), bool(request.manifest)
        if not from_sibling and (new.rate, new.deadline) != (job.request.rate, job.request.deadline):
            self.together.check_joined(job, new)
        job.request = new
        self._give(job, credentials)
        self.rates.changed(job)
        for pace in self._paces.get(job.id, ()):
            pace.priority = new.priority
            pace.alone = pace.alone or (Slots(1) if new.rate else None)
        await self._files.save(job)
        if not from_sibling:
            self.tries.wake(job)
            self.telling.tell(job)  # whoever asks may have asked only us

    def _give(self, job: Job, credentials: Credentials | None) -> None:
        if credentials is not None:
            self.secrets.remember(job.id, job.pinned, credentials)
            job.private = True

    def find(self, job: str) -> Job:
        """Return a job. Raises NotFound."""
        if job not in self._jobs:
            raise no_such_job(job)
        return self._jobs[job]

    def jobs(self) -> list[Job]:
        """Return all, oldest first."""
        return sorted(self._jobs.values(), key=lambda job: job.created)

    async def cancel(self, name: str) -> Job:
        """Stop a job, or end its pins; what it has brought stays till the room is needed. Raises NotFound, Conflict."""
        async with self._changing:
            job = self.find(name)
            ends_pins = job.state.is_over and self.pins.is_kept(job)
            if not ends_pins:
                self._happens(job, Event.CANCEL)
            await self._stop(job)
            (self.pins.drop if ends_pins else self.pins.stop)(job)
            await self._files.save(job)
            return job

    async def retry(self, name: str, credentials: Credentials | None = None) -> Job:
        """Begin a job that is over once more, with the image as it is now; one that waits for its next try has it now.

        Raises NotFound, Conflict.
        """
        async with self._changing:
            job = self.find(name)
            if not job.state.is_over and self.tries.wake(job):
                self._give(job, credentials)
                await self._files.save(job)
                return job
            if not job.state.is_over:
                raise Conflict(f"job {job.id} is {job.state.value}", hint="cancel it first, or wait")
            job.request = msgspec.structs.replace(job.request, manifest="")
            await self._renew(job)
            return await self._set_off(job, credentials)

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
        self.nodes.forget(job)
        job.error, job.notes, job.lacking = None, [], []
        job.total = job.done = job.registry = job.tries = 0
        job.failing = job.patience = 0.0
        job.proven, job.needs_credentials, job.private = "", False, False

    async def _set_off(self, job: Job, credentials: Credentials | None) -> Job:
        job.manifest_digest, job.top_digest = job.request.manifest, ""
        self._give(job, credentials)
        await self._files.save(job)
        self._begin(job)
        return job

    def _begin(self, job: Job) -> None:
        task = self._tasks[job.id] = asyncio.create_task(self._run(job))
        task.add_done_callback(lambda done: self._ended(job, done))

    def _ended(self, job: Job, task: asyncio.Task[None]) -> None:
        if self._tasks.get(job.id) is task:
            del self._tasks[job.id]
            self.rates.end(job)
            self.together.ended()
            self.secrets.forget(job.id)
            self.tries.forget(job)
            for pace in self._paces.pop(job.id, ()):
                pace.leave()  # what nobody else waits for is broken off
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
            while True:
                given = self.secrets.given
                try:
                    if await self._attempt(job):
                        break
                except AccessDenied as error:
                    if self.secrets.given != given and self.secrets.has(job.id):  # they came meanwhile
                        await self._next(job, Event.AGAIN)
                        continue
                    raise self.secrets.refused(job, error) from None
        except DadiError as error:
            await self._failed(job, error)
        except Exception as error:
            # In a thread: to show a traceback is to read files.
            await asyncio.to_thread(log.error, "a prefetch job failed", job=job.id, exc_info=error)
            hint = f"the log of {job.url or 'the superpeer'} has its trace"
            await self._failed(job, DadiError(f"a fault of ours in prefetch job {job.id}: {error!r}", hint=hint))

    async def _failed(self, job: Job, error: DadiError) -> None:
        self.pins.release(job)
        job.error = error_fields(error)
        await self._next(job, Event.FAIL)

    async def _attempt(self, job: Job) -> bool:
        """Do all of a job; return whether it is over, False to begin anew. Raises what cannot be helped by time."""
        job.url, job.superpeers = self.shares.url, list(await self.shares.superpeers())
        superpeers, limited = len(job.superpeers), job.request.rate > 0
        self.rates.begin(job, superpeers)
        pace = Pace((self._shared, self.rates.taken_by(job)), clock=self.clock, sleep=self.sleep,
                    priority=job.request.priority, busy=lambda: self._superpeer.demands > 0,
                    alone=Slots(1) if limited else None)  # fmt: skip
        self._paces.setdefault(job.id, []).append(pace)
        PACE.set(pace)  # of this task, and of all that it begins: who reads it is said at `PACE`
        warming = Warming(self._superpeer, self.shares, self._room, self.together, job, pace, self._slots,
                          self._indexing[limited], clock=self.clock, sleep=self.sleep, hold=self.pins.hold)  # fmt: skip
        saving = asyncio.create_task(self._keep_saving(job))
        try:
            await self._next(job, Event.BEGIN)
            await warming.resolve()
            if not job.request.manifest:  # somebody has asked for it here; a sibling has told all of it himself
                self.telling.tell(job)
            await self._next(job, Event.RESOLVED)
            while (left := job.request.at - self.clock()) > 0:
                await self.sleep(min(1.0, left))
            job.began = self.clock()
            await self._next(job, Event.DUE)
            record = await warming.index()
            # Each superpeer brings its own share now: together they keep the rate.
            self.rates.divide(job, superpeers)
            await self._next(job, Event.INDEXED)
            await warming.warm(record)
            await self._next(job, Event.WARMED)
            readiness = await self.shares.readiness(job.request.reference, job.request.platform, job.request.scope,
                                                    manifest=job.manifest_digest)  # fmt: skip
        except Unavailable as error:
            pause = self.tries.failed(job, error)
            await self._next(job, Event.AGAIN)
            await self.tries.rest(job, pause, error)
            return False
        finally:
            saving.cancel()
            await asyncio.gather(saving, return_exceptions=True)
        return await self._settled(job, warming, readiness)

    async def _settled(self, job: Job, warming: Warming, readiness: Readiness) -> bool:
        """Have a job that has done its part be what the proof says; return whether it is over."""
        if not readiness.ready and job.request.scope == "startup" and job.tries < _CHANGES:
            # What containers read at their start was learnt anew meanwhile.
            job.tries += 1
            await self._next(job, Event.AGAIN)
            return False
        if not readiness.ready:
            job.lacking = list(readiness.lacking)
            things = "; ".join(map(str, readiness.lacking[:3]))
            message = f"{job.request.reference} is not all here after it was fetched: {things}"
            job.error = error_fields(Unavailable(message, hint="dadi prefetch retry; is the store too small?"))
            self.pins.release(job)
            await self._next(job, Event.LACKS)
            return True
        if 0 < job.request.deadline < self.clock():
            warming.note("done after its deadline")
        self.pins.pin(job)
        self.pins.release(job)
        await self._next(job, Event.VERIFIED)
        return True

    async def _keep_saving(self, job: Job) -> None:
        while True:
            await asyncio.sleep(_SAVE_EVERY)
            await self._files.save(job)

    async def _keep_sweeping(self) -> None:
        while True:
            await asyncio.sleep(_SWEEP_EVERY)
            self.sweep()

    def sweep(self) -> None:
        """Let go of pins whose time has come, and of what nodes have told of jobs that are not theirs any more."""
        for job in self._jobs.values():
            self.pins.sweep(job)
            self.nodes.sweep(job)

    # ---- state

    async def _stop(self, job: Job) -> None:
        tasks = [task for task in (self._tasks.get(job.id), *self.telling.stop(job)) if task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _forget_oldest(self) -> None:
        """Make room for one job more. Raises Unavailable where all are under way, or pinned."""
        over = sorted((job for job in self._jobs.values() if job.state.is_over and not self.pins.is_kept(job)),
                      key=lambda job: job.changed)  # fmt: skip
        more = len(self._jobs) + 1 - self._config.most_jobs
        if more > len(over):
            raise Unavailable(f"{len(self._jobs)} prefetch jobs are under way or pinned: no more now", retry_after=60,
                              hint="prefetch.most_jobs in the configuration; cancel ends pins")  # fmt: skip
        for job in over[: max(0, more)]:
            del self._jobs[job.id]
            self.nodes.forget(job)
            await self._files.remove(job)

    def statistics(self) -> dict[str, Any]:
        """Return how many jobs there are in each state, and how many images are pinned."""
        states = {state.value: 0 for state in State}
        for job in self._jobs.values():
            states[job.state.value] += 1
        return {"jobs": states, "pinned": len(self.pins)}

    async def close(self) -> None:
        """Stop; what is under way goes on at the next start."""
        tasks = [*self._tasks.values(), *self.telling.stop_all()]
        if self._sweeping is not None:
            tasks.append(self._sweeping)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.pins.close()


def no_such_job(name: str) -> NotFound:
    """Return what is said of a job that is not there, and of one that may not be seen: ids can be guessed."""
    hint = "dadi prefetch list shows those of public images; name the image instead of the job to see a private one's"
    return NotFound(f"there is no prefetch job {name[:64]!r}", hint=hint)
