"""Registries that did not answer a moment ago; and work that is done once for all who want it.

Who has an old answer does not ask a registry again for a while after it has failed, and gives it `patience` seconds
otherwise: then the old answer is given, and the request goes on for those who come later.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, TypeVar

from dadi.errors import Unavailable

T = TypeVar("T")
_REST = 10.0
"""Seconds that a registry is believed to be away."""
_MOST = 1000


class Away:
    """Which registries are away."""

    def __init__(self, *, patience: float, clock: Callable[[], float]) -> None:
        self.patience = patience
        self._clock = clock
        self._until: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"Away({', '.join(name for name in self._until if self.is_away(name))})"

    def is_away(self, registry: str) -> bool:
        """Whether it has failed a moment ago."""
        return self._clock() < self._until.get(registry, 0.0)

    def failed(self, registry: str) -> None:
        """Remember that it did not answer."""
        if len(self._until) > _MOST:
            self._until.clear()
        self._until[registry] = self._clock() + _REST

    def answered(self, registry: str) -> None:
        """Remember that it does answer."""
        self._until.pop(registry, None)


class Flights:
    """One piece of work at a time for each key, shared by all who want it; it outlives whoever began it."""

    def __init__(self) -> None:
        self._tasks: dict[Hashable, asyncio.Task[Any]] = {}

    def __repr__(self) -> str:
        return f"Flights({len(self._tasks)})"

    async def join(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]], patience: float | None = None) -> T:
        """Return what the work gives; raise TimeoutError after `patience` seconds, while the work goes on."""
        task: asyncio.Task[T] | None = self._tasks.get(key)
        if task is None:
            task = self._tasks[key] = asyncio.create_task(work())
            task.add_done_callback(lambda done: self._landed(key, done))
        if patience is not None:
            await asyncio.wait([task], timeout=patience)
            if not task.done():
                raise TimeoutError
        return await asyncio.shield(task)

    def _landed(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        del self._tasks[key]
        if not task.cancelled():
            task.exception()  # looked at: whoever wanted it may have gone

    async def close(self) -> None:
        """Break off what is under way."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def slow(registry: str, patience: float) -> Unavailable:
    """Return the error of a registry that has not answered in time."""
    return Unavailable(f"{registry} has not answered for {patience:g} s")
