"""One piece of work per key at a time, however many want it; it outlives the one who asked first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from functools import partial
from typing import Any, Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Flights(Generic[K, V]):
    """Work that is under way, by key."""

    def __init__(self) -> None:
        self._tasks: dict[K, asyncio.Task[V]] = {}
        self.joined = 0
        """How often somebody has joined what was under way already."""

    def __repr__(self) -> str:
        return f"Flights({len(self._tasks)})"

    def __contains__(self, key: K) -> bool:
        return key in self._tasks

    async def join(self, key: K, work: Callable[[], Coroutine[Any, Any, V]]) -> V:
        """Return what `work` returns, or what it does if it is under way for this key already."""
        task = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(work())
            task.add_done_callback(partial(self._landed, key))
        else:
            self.joined += 1
        return await asyncio.shield(task)

    def _landed(self, key: K, task: asyncio.Task[V]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # looked at: it is no fault if everybody who waited has gone

    async def close(self) -> None:
        """Cancel what is under way; those who wait get CancelledError."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
