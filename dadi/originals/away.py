"""Registries that did not answer a moment ago; and work that is done once for all who want it.

    an old answer is here    the registry has `patience` seconds; none while it is believed to be away, but once in 5 s
                             one who asks has it asked all the same, and nobody waits for that: what fails for one who
                             asks again and again must not keep everybody else's answers old
    none is                  15 s; 5 s while it is believed to be away; then an error that clients go elsewhere by

Whoever gives up waiting, the request goes on for those who come later. Work fails for the credentials that it was begun
with: then whoever else waits for it does it with his own.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Hashable
from typing import Any, NamedTuple, TypeVar

from dadi.errors import AccessDenied, Unavailable

T = TypeVar("T")
_REST = 10.0
"""Seconds that a registry is believed to be away."""
_LONGEST, _LONGEST_AWAY = 15.0, 5.0
"""Seconds that anybody waits for a registry's first word. Whether it answers again is found out by who waits."""
_LOOK = 5.0
"""Seconds between two looks at a registry that is believed to be away, for those who have an old answer."""
_MOST = 1000


class Away:
    """Which registries are away."""

    def __init__(self, *, patience: float, clock: Callable[[], float]) -> None:
        self.patience = patience
        self._clock = clock
        self._until: dict[str, float] = {}
        self._look: dict[str, float] = {}
        """When the next look is due."""

    def __repr__(self) -> str:
        return f"Away({', '.join(name for name in self._until if self.is_away(name))})"

    def is_away(self, registry: str) -> bool:
        """Whether it has failed a moment ago."""
        return self._clock() < self._until.get(registry, 0.0)

    def limit(self, registry: str, *, old: bool) -> float:
        """Return how long the registry is waited for; `old`: something can be given in place of its answer."""
        if old:
            return self.patience
        return max(self.patience, _LONGEST_AWAY if self.is_away(registry) else _LONGEST)

    def failed(self, registry: str) -> None:
        """Remember that it did not answer."""
        if len(self._until) > _MOST:
            self._until.clear()
            self._look.clear()
        now = self._clock()
        if not self.is_away(registry):
            self._look[registry] = now + _LOOK
        self._until[registry] = now + _REST

    def answered(self, registry: str) -> None:
        """Remember that it does answer."""
        self._until.pop(registry, None)
        self._look.pop(registry, None)

    async def ask(self, flights: CallerFlights, registry: str, key: Hashable,
                  work: Callable[[], Coroutine[Any, Any, T]], *, old: bool, hasty: bool = False,
                  who: Hashable = None) -> T:  # fmt: skip
        """Return what `work` gives, as `CallerFlights.join` does; raise Unavailable if it takes too long.

        `old`: something can be given in place of the answer. `hasty`: it would only save another question.
        """
        limit, looking = self.limit(registry, old=old or hasty), old and self.is_away(registry)
        if looking and not self._may_look(registry):
            raise _no_answer(registry)
        try:
            return await flights.join(key, work, 0.0 if looking else limit, who=who)
        except TimeoutError:
            if looking:
                raise _no_answer(registry) from None
            if not hasty:
                self.failed(registry)
            raise slow(registry, limit) from None

    def _may_look(self, registry: str) -> bool:
        now = self._clock()
        if now < self._look.get(registry, 0.0):
            return False
        self._look[registry] = now + _LOOK
        return True


class _Flight(NamedTuple):
    task: asyncio.Task[Any]
    who: Hashable


class CallerFlights:
    """One piece of work at a time for each key, shared by all who want it; it outlives whoever began it."""

    def __init__(self) -> None:
        self._flights: dict[Hashable, _Flight] = {}

    def __repr__(self) -> str:
        return f"CallerFlights({len(self._flights)})"

    async def join(self, key: Hashable, work: Callable[[], Coroutine[Any, Any, T]], patience: float | None = None, *,
                   who: Hashable = None) -> T:  # fmt: skip
        """Return what the work gives; raise TimeoutError after `patience` seconds, while the work goes on.

        `who`: whose credentials `work` shows. Where those of another were refused the work begins anew with these.
        """
        loop = asyncio.get_running_loop()
        until = None if patience is None else loop.time() + patience
        while True:
            flight = self._flights.get(key)
            if flight is None:
                flight = self._flights[key] = _Flight(asyncio.create_task(work()), who)
                flight.task.add_done_callback(lambda done: self._landed(key, done))
            task: asyncio.Task[T] = flight.task
            if until is not None:
                await asyncio.wait([task], timeout=max(0.0, until - loop.time()))
                if not task.done():
                    raise TimeoutError
            try:
                return await asyncio.shield(task)
            except AccessDenied:
                if flight.who == who:
                    raise

    def _landed(self, key: Hashable, task: asyncio.Task[Any]) -> None:
        del self._flights[key]
        if not task.cancelled():
            task.exception()  # looked at: whoever wanted it may have gone

    async def close(self) -> None:
        """Break off what is under way."""
        tasks = [flight.task for flight in self._flights.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _no_answer(registry: str) -> Unavailable:
    return Unavailable(f"{registry} did not answer a moment ago")


def slow(registry: str, patience: float) -> Unavailable:
    """Return the error of a registry that has not answered in time."""
    return Unavailable(f"{registry} has not answered for {patience:g} s", hint="is it up, and reachable from here?")
