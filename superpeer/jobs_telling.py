"""Siblings are told of a job, so that each does its part: when it is known what the image is, and when it is changed.

Told is `POST /v1/prefetch` with the manifest in the request, by which a sibling knows that it is to tell nobody else.
One that is away is told again, at growing intervals, for an hour. Cancelling is not told: who may cancel asks every
superpeer himself, and hears of each what it did (`dadi prefetch cancel`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

import msgspec

from dadi import http
from dadi.errors import DadiError
from dadi.prefetch.messages import Job, Request

if TYPE_CHECKING:
    from superpeer.service import Superpeer

_GIVE_UP = 3600.0
_LONGEST_PAUSE = 30.0


class Telling:
    """See the head of this file. `clock`: seconds since 1970."""

    def __init__(self, superpeer: Superpeer, clock: Callable[[], float]) -> None:
        self._superpeer = superpeer
        self._clock = clock
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        """By job; none are kept that have ended."""

    def __repr__(self) -> str:
        return f"Telling({len(self._tasks)} jobs)"

    def tell(self, job: Job) -> None:
        """Have all siblings told of a job as it is now, and of nothing older; of one whose image is known."""
        siblings = self._superpeer.siblings
        if siblings is None or not job.manifest_digest:
            return
        for task in self.stop(job):
            task.cancel()
        request = telling(job)
        tasks = [asyncio.create_task(self._tell(url, request)) for url in siblings.others()]
        if tasks:
            self._tasks[job.id] = tasks
        for task in tasks:
            task.add_done_callback(lambda done: self._told(job.id, done))

    def _told(self, job: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()
        if all(each.done() for each in self._tasks.get(job, ())):
            self._tasks.pop(job, None)

    async def _tell(self, url: str, request: Request) -> None:
        siblings = self._superpeer.siblings
        assert siblings is not None
        pause, until = 1.0, self._clock() + _GIVE_UP
        while True:
            try:
                async with (
                    siblings.superpeers.asking(url),
                    http.request(siblings.session, "POST", f"{url}/v1/prefetch", "telling a sibling of a job",
                                 data=msgspec.json.encode(request), headers=siblings.list_headers()),
                ):  # fmt: skip
                    return
            except DadiError as error:
                self._superpeer.fallbacks.note("sibling not told of a prefetch job", f"{url}: {error}")
                if self._clock() > until:
                    return
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    def stop(self, job: Job) -> list[asyncio.Task[None]]:
        """Return the tasks that tell of a job, for who cancels them and waits for their end."""
        return self._tasks.pop(job.id, [])

    def stop_all(self) -> list[asyncio.Task[None]]:
        """Do as `stop`, of all jobs."""
        tasks = [task for tasks in self._tasks.values() for task in tasks]
        self._tasks.clear()
        return tasks


def telling(job: Job) -> Request:
    """Return the request that makes a sibling do its part of a job."""
    return msgspec.structs.replace(job.request, manifest=job.manifest_digest)
