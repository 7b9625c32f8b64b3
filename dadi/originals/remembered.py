"""What must not be kept for long: values that are dropped by themselves some time after they were last used.

Credentials live here and nowhere else. They are in memory only, and go when their time is over, also when nobody asks
for anything any more: a timer sees to that.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class Remembered(Generic[K, V]):
    """At most `most` values, each for `seconds` after its last `get` or `put`. For use in one event loop.

    `gone` hears of each value that is dropped. Values for which `held` is true stay beyond their time.
    """

    def __init__(self, seconds: float, most: int, clock: Callable[[], float], *,
                 gone: Callable[[V], None] = lambda value: None, held: Callable[[V], bool] = lambda value: False
                 ) -> None:  # fmt: skip
        self._seconds = seconds
        self._most = most
        self._clock = clock
        self._gone = gone
        self._held = held
        self._values: OrderedDict[K, tuple[V, float]] = OrderedDict()
        self._timer: asyncio.TimerHandle | None = None

    def __repr__(self) -> str:
        return f"Remembered({len(self._values)})"

    def __len__(self) -> int:
        self.purge()
        return len(self._values)

    def get(self, key: K) -> V | None:
        """Return a value, and begin its time anew."""
        value = self.peek(key)
        if value is not None:
            self.put(key, value)
        return value

    def peek(self, key: K) -> V | None:
        """Return a value without beginning its time anew."""
        self.purge()
        found = self._values.get(key)
        return found[0] if found is not None else None

    def put(self, key: K, value: V) -> None:
        """Take a value, in place of the key's old one."""
        self._values[key] = (value, self._clock() + self._seconds)
        self._values.move_to_end(key)
        while len(self._values) > self._most:
            self._gone(self._values.popitem(last=False)[1][0])
        if self._timer is None:
            self._wait(self._seconds)

    def drop(self, key: K) -> None:
        """Forget a value now."""
        found = self._values.pop(key, None)
        if found is not None:
            self._gone(found[0])

    def values(self) -> list[V]:
        """Return all that are here, the one that was used last at the end."""
        self.purge()
        return [value for value, _ in self._values.values()]

    def purge(self) -> None:
        """Drop what has had its time."""
        now = self._clock()
        while self._values:
            key, (value, until) = next(iter(self._values.items()))
            if until > now:
                break  # they are in the order of their last use
            if self._held(value):
                self._values[key] = (value, now + self._seconds)
                self._values.move_to_end(key)
            else:
                self.drop(key)

    def _wait(self, seconds: float) -> None:
        self._timer = asyncio.get_running_loop().call_later(seconds, self._due)

    def _due(self) -> None:
        self._timer = None
        self.purge()
        if self._values:
            _, until = next(iter(self._values.values()))
            self._wait(max(0.1, until - self._clock()))

    def close(self) -> None:
        """Forget all."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for key in [*self._values]:
            self.drop(key)
