"""How registries meet whom they do not know: their WWW-Authenticate, asked for once in a while, however many want it.

    younger than `access_ttl`    given
    older                        the registry is asked, once for all who want it
    registry away, or slow       the old one, if it is not older than `stale`: it is no permission; else an error

None is an answer too: the registry lets everybody in.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Coroutine
from typing import Any

from dadi.errors import Unavailable
from dadi.originals.away import Away, CallerFlights
from dadi.originals.config import OriginalsConfig

_MOST = 10_000


class Challenges:
    """See the head of this file. A challenge is for a registry as a whole, or for one of its repositories."""

    def __init__(self, config: OriginalsConfig, away: Away, clock: Callable[[], float]) -> None:
        self._config = config
        self._away = away
        self._clock = clock
        self._flights = CallerFlights()
        self._known: OrderedDict[str, tuple[float, str | None]] = OrderedDict()

    def __repr__(self) -> str:
        return f"Challenges({len(self._known)})"

    async def get(self, registry: str, name: str, ask: Callable[[], Coroutine[Any, Any, str | None]]) -> str | None:
        """Return the challenge for `name` (REGISTRY or REGISTRY/REPOSITORY). Raises what `ask` raises."""
        at, known = self._known.get(name, (None, None))
        age = None if at is None else self._clock() - at
        if age is not None and age <= self._config.access_ttl:
            return known
        usable = age is not None and age <= self._config.stale
        try:
            work = lambda: self._ask(registry, name, ask)  # noqa: E731
            return await self._away.ask(self._flights, registry, name, work, old=usable)
        except Unavailable:
            if usable:
                return known
            raise

    async def _ask(self, registry: str, name: str, ask: Callable[[], Coroutine[Any, Any, str | None]]) -> str | None:
        try:
            found = await ask()
        except Unavailable:
            self._away.failed(registry)
            raise
        self._known[name] = (self._clock(), found)
        self._known.move_to_end(name)
        if len(self._known) > _MOST:
            self._known.popitem(last=False)
        return found

    async def close(self) -> None:
        """Break off what is under way."""
        await self._flights.close()
