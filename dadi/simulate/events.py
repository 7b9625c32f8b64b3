"""The clock of a simulation: what happens when, in an order that depends on nothing but the simulation itself."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

_Event = tuple[float, int, Callable[..., None], tuple[Any, ...]]


class Events:
    """Calls to come, by simulated time in seconds; of those at the same time, the one that was planned first."""

    def __init__(self) -> None:
        self.now = 0.0
        self.over = False
        self.count = 0
        """Events so far."""
        self._planned = 0
        self._heap: list[_Event] = []

    def at(self, time: float, act: Callable[..., None], *arguments: Any) -> None:
        """Plan a call; a time that has passed means now."""
        self._planned += 1
        heapq.heappush(self._heap, (time if time > self.now else self.now, self._planned, act, arguments))

    def run(self, limit: float) -> None:
        """Let things happen until somebody sets `over`, or nothing is left, or `limit` seconds are over."""
        heap, pop = self._heap, heapq.heappop
        planned_before = self._planned - len(heap)
        while heap and not self.over:
            time, _, act, arguments = pop(heap)
            if time > limit:
                self.now = limit
                break
            self.now = time
            act(*arguments)
        self.count += self._planned - len(heap) - planned_before
