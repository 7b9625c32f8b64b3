"""Prefetch jobs on disk: STATE/prefetch/ID.json, one small file each, replaced all at once.

Written when a job's state changes and when it has got on a good way. What cannot be written is logged: the job goes on,
and a restart begins it where the file stands; what it has brought by then is in the store.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from dadi.blobs.layout import remove_or_log, write_durably
from dadi.errors import DadiError
from dadi.prefetch.messages import Job, canonical, job_id

log = structlog.get_logger()


class JobStore:
    """The files in `directory`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._writing = asyncio.Lock()

    def __repr__(self) -> str:
        return f"JobStore({self._directory})"

    async def load(self) -> list[Job]:
        """Return the jobs, oldest first; a file that is damaged is thrown away, and that is said."""
        return await asyncio.to_thread(self._load)

    def _load(self) -> list[Job]:
        self._directory.mkdir(parents=True, exist_ok=True)
        jobs = []
        for path in sorted(self._directory.glob("*.json")):
            try:
                job = msgspec.json.decode(path.read_bytes(), type=Job)
                if path.stem != job.id or job.id != job_id(canonical(job.request)):
                    raise ValueError("it is another job than its name says")
                jobs.append(job)
            except OSError as error:
                log.error("could not read a prefetch job", file=str(path), why=str(error))
            except (DadiError, msgspec.MsgspecError, ValueError, UnicodeDecodeError, RecursionError) as error:
                log.warning("threw away what is no prefetch job", file=str(path), why=str(error))
                remove_or_log(path)
        return sorted(jobs, key=lambda job: job.created)

    async def save(self, job: Job) -> None:
        """Write a job as it is now."""
        async with self._writing:  # in order: an older state must not replace a newer one
            data = msgspec.json.encode(job)
            try:
                await _to_its_end(lambda: write_durably(self._directory / f"{job.id}.json", data))
            except OSError as error:
                log.error("could not write a prefetch job", job=job.id, why=str(error))

    async def remove(self, job: Job) -> None:
        """Forget a job."""
        async with self._writing:
            await _to_its_end(lambda: remove_or_log(self._directory / f"{job.id}.json"))


async def _to_its_end(work: Callable[[], object]) -> None:
    """Do work in a thread; who is cancelled meanwhile waits for it: it would overtake what is written next."""
    working = asyncio.ensure_future(asyncio.to_thread(work))
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait([working])
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        working.exception()
        raise cancelled
    working.result()
