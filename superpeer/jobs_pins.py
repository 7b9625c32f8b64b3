"""What prefetch jobs keep from eviction: while they run what they bring, and what they have brought until a time.

A pin is of an image, by its manifest, not of what the reference leads to by then: the tag may move, the job fail when
it is asked for again, the superpeer be restarted. Pinned is everything of the image that is here: what a start needs
(the catalog's record, image index, layer indexes, seek tables, metadata, the layers' tars), and the compressed forms.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec
import structlog

from dadi.errors import NotFound
from dadi.oci.reference import Reference
from dadi.prefetch.messages import Job, Pin
from dadi.prefetch.plan import Wanted
from superpeer.catalog import ImageRecord
from superpeer.jobs_ready import small

if TYPE_CHECKING:
    from superpeer.service import Superpeer

log = structlog.get_logger()
_Key = tuple[str, str]
"""Job and manifest."""


class Pins:
    """See the head of this file. `clock`: seconds since 1970."""

    def __init__(self, superpeer: Superpeer, clock: Callable[[], float]) -> None:
        self._superpeer = superpeer
        self._clock = clock
        self._running: dict[str, contextlib.ExitStack] = {}
        self._pinned: dict[_Key, contextlib.ExitStack] = {}
        self._records: dict[_Key, set[tuple[str, str, str]]] = {}
        """Of each pin the records that stay: reference, platform, manifest."""

    def __repr__(self) -> str:
        return f"Pins({len(self._running)} running, {len(self._pinned)} pinned)"

    def __len__(self) -> int:
        """How many images are held."""
        return len(self._running) + len(self._pinned)

    def is_pinned(self, record: ImageRecord) -> bool:
        """Whether the catalog's record of an image is to stay."""
        key = (record.reference, record.platform, record.manifest_digest)
        return any(key in records for records in self._records.values())

    # ---- while a job runs

    async def hold(self, job: Job, mine: list[Wanted]) -> None:
        """Keep what a job is about to bring, until `release`. Raises StoreFull."""
        with contextlib.ExitStack() as holds:
            for wanted in mine:
                await self._superpeer.store.prepare(wanted.layer.blob)
                holds.enter_context(self._superpeer.store.hold(wanted.layer.blob))
            self.release(job)
            self._running[job.id] = holds.pop_all()

    def release(self, job: Job) -> None:
        """Let go of what a job has held while it ran; what is pinned stays."""
        if (holds := self._running.pop(job.id, None)) is not None:
            holds.close()

    # ---- until a time

    def pin(self, job: Job) -> None:
        """Keep a job's image, as it is in the store now, until the job's `pin_until`. Raises NotFound."""
        until = job.request.pin_until
        until = max([until, *(pin.until for pin in job.pins if pin.manifest == job.manifest_digest)])
        if until <= self._clock():
            if until and (note := "its pin was over before it was ready: it is not kept") not in job.notes:
                job.notes = [*job.notes[-19:], note]
            return
        self._take(job, job.manifest_digest)
        job.request = msgspec.structs.replace(job.request, pin_until=until)
        before = [pin for pin in job.pins if pin.manifest != job.manifest_digest]
        job.pins = [*before, Pin(job.manifest_digest, until)]

    def _take(self, job: Job, manifest: str) -> None:
        ref, catalog, store = Reference.parse(job.request.reference), self._superpeer.catalog, self._superpeer.store
        record = catalog.by_manifest(manifest, ref.name)
        if record is None:
            hint = f"prefetch {job.request.reference} again, with --pin-until (job {job.id})"
            raise NotFound(f"{ref.name}@{manifest}, which was to be pinned, is no longer known here", hint=hint)
        index = catalog.image(record)
        digests = [*small(record, index), *(digest for each in index.layers
                                            for digest in (each.diff_id, each.layer_digest))]  # fmt: skip
        with contextlib.ExitStack() as holds:
            for digest in dict.fromkeys(digests):
                if (blob := store.find(digest)) is not None:
                    holds.enter_context(store.hold(blob))
            self._let_go((job.id, manifest))
            self._pinned[job.id, manifest] = holds.pop_all()
        names = (str(ref), str(ref.at(manifest)), record.reference)
        platforms = (job.request.platform, record.platform)
        self._records[job.id, manifest] = {(name, on, manifest) for name in names for on in platforms}

    def again(self, job: Job) -> None:
        """Keep what a job had pinned before a restart; noted if that is gone."""
        for pin in job.pins:
            if pin.until > self._clock():
                try:
                    self._take(job, pin.manifest)
                except NotFound as error:
                    self._superpeer.fallbacks.note("image not pinned", f"{job.request.reference}: {error}")

    def is_kept(self, job: Job) -> bool:
        """Whether anything of a job is held, or to be held still."""
        return job.id in self._running or any(pin.until > self._clock() for pin in job.pins)

    def stop(self, job: Job) -> None:
        """Let go of what a job that is cancelled was to bring; what it had pinned before stays until its time."""
        self.release(job)
        until = max([0.0, *(pin.until for pin in job.pins)])
        job.request = msgspec.structs.replace(job.request, pin_until=until)

    def drop(self, job: Job) -> None:
        """Keep nothing of a job any more."""
        self.release(job)
        for pin in job.pins:
            self._let_go((job.id, pin.manifest))
        job.pins = []
        job.request = msgspec.structs.replace(job.request, pin_until=0.0)

    def sweep(self, job: Job) -> None:
        """Let go of what was to be kept until a time that has come."""
        for pin in job.pins:
            if pin.until <= self._clock():
                log.info("image no longer pinned", job=job.id, image=job.request.reference, manifest=pin.manifest)
                self._let_go((job.id, pin.manifest))
        job.pins = [pin for pin in job.pins if pin.until > self._clock()]

    def _let_go(self, key: _Key) -> None:
        self._records.pop(key, None)
        if (holds := self._pinned.pop(key, None)) is not None:
            holds.close()

    def close(self) -> None:
        """Let go of everything; what is pinned is pinned again by the next start."""
        for holds in [*self._running.values(), *self._pinned.values()]:
            holds.close()
        self._running.clear()
        self._pinned.clear()
        self._records.clear()
