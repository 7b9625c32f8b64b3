"""One attempt at one prefetch job: find out what the image is, whether it fits and in time; index it; bring our share.

    resolve   manifest by the registry, once: then the job goes by its digest. Said here, before anything is brought:
              unknown image; no space (`jobs_room.py`), a deadline that cannot be met (`plan.py`), by all images of a
              command together (`jobs_together.py`)
    index     by whoever answers for the reference (its first owner that has the job); the others take the image over
              from it. So a layer that has no index yet is streamed once in the datacenter
    warm      owned blobs: from the registry (or a sibling that has streamed the layer), at the job's pace;
              blobs that we stand in for: from their owner, as it gets them. Only when the owner is away, or its job is
              over and it has not got them, the registry is asked, and that is noted
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING

import msgspec
import structlog

from dadi import http
from dadi.blobs.source import Urgency
from dadi.errors import Conflict, DadiError, InvalidRequest, NotFound, StoreFull, Unavailable
from dadi.index.chunks import Blob
from dadi.oci import platforms
from dadi.oci.reference import Reference
from dadi.peers.owners import owners
from dadi.prefetch import plan
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job
from dadi.prefetch.plan import Wanted
from superpeer.catalog import ImageRecord
from superpeer.jobs_pace import Pace, Sleep, Slots
from superpeer.jobs_ready import Shares
from superpeer.jobs_room import Needs, Room
from superpeer.jobs_together import Together
from superpeer.siblings import bounded

if TYPE_CHECKING:
    from superpeer.service import Superpeer

log = structlog.get_logger()
_STEP = 8 << 20
"""Bytes of a tar that are brought as one."""
_AT_A_TIME = 3
"""Layers of one job."""
_POLL = 0.5
"""Seconds between two looks at what a sibling has."""
PATIENCE = 10.0
"""Seconds that a sibling may be away, or not know of the job, before others do its part."""
_LOOKS = 4
"""At what fits, before what does not is refused."""
_MOST_TOLD = 4 << 20


class Warming:
    """See the head of this file. `slots` are for steps; `indexing` for images that are streamed, which takes long."""

    def __init__(self, superpeer: Superpeer, shares: Shares, room: Room, together: Together, job: Job, pace: Pace,
                 slots: Slots, indexing: Slots, *, clock: Callable[[], float], sleep: Sleep,
                 hold: Callable[[Job, list[Wanted]], Awaitable[None]]) -> None:  # fmt: skip
        self._superpeer = superpeer
        self._shares = shares
        self._room = room
        self._together = together
        self._job = job
        self._pace = pace
        self._slots = slots
        self._indexing = indexing
        self._clock = clock
        self._sleep = sleep
        self._hold = hold
        self._given_up: set[str] = set()

    # ---- what it is

    async def resolve(self) -> None:
        """Have the manifest's digest in the job. Raises NotFound and the like, StoreFull; InvalidRequest (deadline)."""
        job = self._job
        is_known = bool(job.top_digest)  # by an attempt before, maybe before a restart
        layers = {} if is_known and self._known() is not None else await self._ask_registry()
        needs = await self._room.needs(job, layers)
        job.registry = needs.registry
        if is_known:
            # What was found to fit is begun anew until its deadline, and has some of its bytes by now.
            self.note(await self._room.check(job, self._together.knows(job, needs)))
            return
        async with self._together.looking(job, needs) as sums:
            self.note(await self._room.check(job, sums.images))
            try:
                self._together.check_deadline(job.request, sums.registry)
            except InvalidRequest as error:
                if not job.tries:
                    raise
                self.note(str(error))  # its registry was away: late is better than never

    async def _ask_registry(self) -> dict[str, int]:
        """Find out what the job's image is; return its layers' compressed sizes, none if the registry is away.

        Raises what the registry client raises; Conflict if the reference has moved since a sibling has asked.
        """
        job, superpeer = self._job, self._superpeer
        ref, platform = Reference.parse(job.request.reference), platforms.parse(job.request.platform)
        try:
            # Until it is known what the reference leads to, also when a sibling has said so.
            resolved = await superpeer.registry.image(job.pinned if job.top_digest else ref, platform)
        except Unavailable as error:
            record = superpeer.catalog.find(str(ref), str(platform))
            if record is None or job.request.manifest not in ("", record.manifest_digest):
                raise
            superpeer.fallbacks.note("registry away, prefetched as it was", f"{ref}: {error}")
            self.note(f"the registry is away: {ref} is taken for what it was")
            job.manifest_digest, job.top_digest = record.manifest_digest, record.top_digest
            job.resolved = record.resolved_at
            return {}
        digest = resolved.descriptor.digest
        if job.request.manifest not in ("", digest):
            raise Conflict(f"{ref} has moved to {digest} since a sibling asked", hint="prefetch it again")
        if not job.top_digest:
            job.manifest_digest, job.top_digest = digest, resolved.index_digest or digest
            job.resolved = self._clock()
        return {layer.digest: layer.size for layer in resolved.manifest.layers}

    def _known(self) -> ImageRecord | None:
        job = self._job
        return self._superpeer.catalog.by_manifest(job.manifest_digest, Reference.parse(job.request.reference).name)

    def note(self, text: str) -> None:
        """Put a note into the job, once; an empty one is none."""
        if text and text not in self._job.notes:
            self._job.notes = [*self._job.notes[-19:], text]

    # ---- index

    async def index(self) -> ImageRecord:
        """Return the image's record, with its index in the store, under the reference that was asked for."""
        record = self._known()
        if record is None:
            record = await self._indexed()
        job = self._job
        ref, platform = Reference.parse(job.request.reference), platforms.parse(job.request.platform)
        found = self._superpeer.catalog.find(str(ref), str(platform))
        if found is None or (found.manifest_digest != job.manifest_digest and found.resolved_at < job.resolved):
            # The registry has told us itself what the reference is, when the job was resolved.
            record = await self._superpeer.catalog.confirm(record, str(ref), str(platform), job.top_digest)
        return record

    async def _indexed(self) -> ImageRecord:
        job, siblings = self._job, self._superpeer.siblings
        before: list[str] = []
        if siblings is not None:
            order = owners(job.request.reference, await self._shares.superpeers())
            before = order[: order.index(self._shares.url)] if self._shares.url in order else []
        for url in before:
            job.stage = f"waiting for {url} to index it"
            if await self._learns_from(url):
                break
        else:
            job.stage = "indexing"
            # No slot of those for steps: at a low rate it would be held for hours.
            async with self._indexing.held(job.request.priority):
                resolving = self._superpeer.resolve(str(job.pinned), job.request.platform)
                while not resolving.task.done():
                    await asyncio.wait([resolving.task], timeout=_POLL)
                    job.total, job.done = resolving.progress.total, resolving.progress.bytes
                await asyncio.shield(resolving.task)
        record = self._known()
        if record is None:
            raise Unavailable(f"the index of {job.pinned} has gone again: it is made anew", retry_after=1,
                              hint="if that goes on: is the store too small?")  # fmt: skip
        return record

    async def _learns_from(self, url: str) -> bool:
        """Wait for a sibling to have the image, and take it over; False when it will not, or is not heard of."""
        siblings = self._superpeer.siblings
        assert siblings is not None
        left = PATIENCE
        while left > 0 and url not in self._given_up:
            state = await self._state_at(url)
            if state in (State.WARMING, State.VERIFYING, State.READY):
                if await siblings.knows(self._job.manifest_digest):
                    return True
                left -= _POLL
            elif state is None:
                left -= _POLL
            elif state.is_over:
                break
            await self._sleep(_POLL)
        self._give_up(url, "an image's index")
        return False

    def _give_up(self, url: str, what: str) -> None:
        """Wait for a sibling no more: do its part."""
        if url not in self._given_up:
            self._given_up.add(url)
            self._superpeer.fallbacks.note("sibling has not warmed its part, registry asked", f"{url}: {what}")
            self.note(f"{url} did not do its part: the registry was asked")

    async def _state_at(self, url: str) -> State | None:
        """Return where a sibling is with the job; None if it cannot say, or cannot begin."""
        siblings = self._superpeer.siblings
        assert siblings is not None
        where = f"{url}/v1/prefetch/{self._job.id}"
        try:
            async with (
                siblings.superpeers.asking(url),
                http.request(siblings.session, "GET", where, "asking a sibling for a job",
                             headers=siblings.headers(self._job.manifest_digest)) as response,
            ):  # fmt: skip
                told = msgspec.json.decode(await bounded(response, _MOST_TOLD, url), type=Job)
        except (DadiError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return None
        if told.tries > 0 and told.state in (State.QUEUED, State.RESOLVING):
            return None  # up, but its registry is away, maybe not ours
        # What it is doing with another image of that tag tells nothing of this one.
        return told.state if told.manifest_digest in ("", self._job.manifest_digest) else None

    # ---- chunks

    async def warm(self, record: ImageRecord) -> None:
        """Bring this superpeer's share of the scope. Raises what bringing raises; StoreFull."""
        job = self._job
        job.stage = "fetching"
        needs = await self._room.needs(job, {})  # it is known exactly now
        job.registry, job.total = needs.registry, 0  # nothing of that has come yet
        self.note(await self._fits(needs))
        mine, note = await self._shares.of(record, job.request.scope)
        if note:
            self.note(note)
        job.proven = "full" if note else job.request.scope
        await self._hold(job, mine)
        job.total = sum(wanted.size for wanted in mine)
        lacking = [(wanted, await self._shares.missing(wanted)) for wanted in mine]
        job.done = job.total - sum(plan.size_of(wanted.layer.blob, runs) for wanted, runs in lacking)
        self._together.knows(job, needs)  # of which so much is left now
        reference = str(job.pinned)
        log.info("warming", image=reference, job=job.id, bytes=job.total, missing=job.total - job.done)
        await self._each([(wanted, runs) for wanted, runs in lacking if not wanted.place], self._owned)
        await self._each([(wanted, runs) for wanted, runs in lacking if wanted.place], self._stood_in_for)

    async def _fits(self, needs: Needs) -> str:
        """Do as `Room.check` for all of the batch, while others of it are being brought.

        What those have brought since they last said so, or are just writing, would count twice: before one is refused
        they are looked at, and looked at again.
        """
        job, together, catalog = self._job, self._together, self._superpeer.catalog
        looks = 0
        while True:
            try:
                return await self._room.check(job, together.knows(job, needs))
            except StoreFull:
                mates, looks = together.under_way_with(job), looks + 1
                if not mates or looks == _LOOKS:
                    raise
            await self._sleep(_POLL)
            for mate in mates:
                if catalog.by_manifest(mate.manifest_digest, Reference.parse(mate.request.reference).name) is not None:
                    together.knows(mate, await self._room.needs(mate, {}))
            needs = await self._room.needs(job, {})

    async def _each(
        self, work: list[tuple[Wanted, list[range]]], bring: Callable[[Wanted, range], Awaitable[None]]
    ) -> None:
        queue = iter(work)

        async def worker() -> None:
            for wanted, runs in queue:  # one iterator for all workers
                blob = wanted.layer.blob
                for step in (step for run in runs for step in self._steps(run, blob)):
                    await bring(wanted, step)
                    if await self._superpeer.store.missing(blob, step):
                        raise StoreFull(f"the store does not keep {blob}", hint="raise store.limit")
                    self._job.done += blob.table.span(step)[1]

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(_AT_A_TIME):
                    group.create_task(worker())
        except ExceptionGroup as failed:
            raise failed.exceptions[0] from None

    def _steps(self, run: range, blob: Blob) -> Iterator[range]:
        while run:
            step = next(iter(plan.steps(run, blob, self._step())))  # its rate may have changed meanwhile
            yield step
            run = run[len(step) :]

    def _step(self) -> int:
        """Return the bytes to bring as one: half a second's worth, so that a rate is kept evenly too."""
        rates = [rate for rate in (self._job.request.rate, self._superpeer.config.prefetch.rate) if rate]
        return min(_STEP, int(min(rates) / 2)) if rates else _STEP

    async def _owned(self, wanted: Wanted, step: range) -> None:
        siblings, layer = self._superpeer.siblings, wanted.layer
        # What is streamed whole keeps the pace by itself (`origin.py`); what a sibling has costs the registry nothing.
        if layer.seek_digest and not (siblings and await siblings.chunks.is_held(layer.diff_id)):
            await self._pace.take(plan.cost(layer, layer.table.span(step)[1]))
        async with self._slots.held(self._job.request.priority):
            await self._superpeer.bring(layer.blob, step, Urgency.PREFETCH)

    async def _stood_in_for(self, wanted: Wanted, step: range) -> None:
        siblings, owner = self._superpeer.siblings, wanted.order[0]
        assert siblings is not None
        left = PATIENCE
        while left > 0 and owner not in self._given_up:
            try:
                await siblings.chunks.take(owner, wanted.layer, step, Urgency.PREFETCH)
                return
            except StoreFull:
                raise
            except NotFound:
                state = await self._state_at(owner)
                if state is not None and state.is_over:
                    break
                left = left - _POLL if state is None else PATIENCE
            except DadiError as error:
                log.info("a blob's owner does not give it", owner=owner, blob=wanted.layer.diff_id, why=error.message)
                left -= _POLL
            await self._sleep(_POLL)
        self._give_up(owner, wanted.layer.diff_id)
        await self._owned(wanted, step)
