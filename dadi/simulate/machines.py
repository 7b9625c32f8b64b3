"""The machines of a simulation: their links, what they have, and what they do when a run is asked of them.

Each has one processor for the joins, heartbeats and reports that it answers, be it as a superpeer or as a delegate.

A link sends one run after the other at its full rate, demand before bulk (first in, first out otherwise): a run is
passed on when it is whole. That is what a program does that serves chunks; links shared fairly by all transfers end at
the same moment for the last child, and later for the first. Receiving links are never faster than their rate either.
Links between racks have no limit here: they are only counted.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dadi.simulate.world import World

NEVER = float("inf")


class Machine:
    """Something that has runs and sends them: the registry, a superpeer, a node. `rack` is None outside all racks."""

    def __init__(self, world: World, name: str, rack: int | None, sends: float, receives: float) -> None:
        self.world = world
        self.name = name
        self.rack = rack
        self.sends, self.receives = sends, receives
        self.alive = True
        self.lies = False
        self.got = array("d", [NEVER]) * world.runs
        """When it got each run."""
        self.sent_bytes = 0
        self.sending_done = 0.0
        self.sending_seconds = 0.0
        self.waiters: dict[int, dict[Machine, bool]] = {}
        """Who waits for a run that it does not have yet, and whether urgently."""
        self._queued: dict[tuple[Machine, int], float] = {}
        self._demand: deque[tuple[Machine, int]] = deque()
        self._bulk: deque[tuple[Machine, int]] = deque()
        self._sending = False
        self._receiving_until = 0.0
        self.busy_seconds = 0.0
        self._busy_until = 0.0

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name})"

    def has(self, run: int) -> bool:
        return self.got[run] != NEVER

    # ── serving ───────────────────────────────────────────────────────────────────────────────────────────────────

    def asked(self, by: Machine, run: int, urgent: bool, hops: int) -> None:
        """A request has come in. The dead say nothing."""
        if not self.alive:
            return
        if self.got[run] != NEVER:
            self.queue(by, run, urgent)
            return
        waiting = self.waiters.setdefault(run, {})
        waiting[by] = urgent or waiting.get(by, False)
        self.need(run, urgent, hops)

    def hurried(self, by: Machine, run: int) -> None:
        """Somebody waits urgently for what was asked before: move it up, if it is not on its way already."""
        if not self.alive:
            return
        if (by, run) in self._queued:
            self.queue(by, run, True)
        elif by in self.waiters.get(run, ()):
            self.waiters[run][by] = True
            self.need(run, True, 0)

    def need(self, run: int, urgent: bool, hops: int) -> None:
        """Get a run from upstream, if that is not under way."""
        raise NotImplementedError

    def obtained(self, run: int) -> None:
        """It has the run, whole and right: send it to those who wait for it."""
        self.got[run] = self.world.events.now
        for machine, urgent in self.waiters.pop(run, {}).items():
            self.queue(machine, run, urgent)

    def queue(self, to: Machine, run: int, urgent: bool) -> None:
        """Put a run into the queue; one that is in it already may move up."""
        key = (to, run)
        if key not in self._queued:
            self._queued[key] = self.world.events.now
        elif not urgent:
            return
        (self._demand if urgent else self._bulk).append(key)
        if not self._sending:
            self._next()

    def _next(self) -> None:
        self._sending = False
        while self._demand or self._bulk:
            to, run = key = (self._demand or self._bulk).popleft()
            since = self._queued.pop(key, None)
            if since is None or not to.alive or to.got[run] != NEVER:
                continue  # it moved up; or it was cancelled
            self._sending = True
            seconds = self.world.sizes[run] / self.sends
            self.sending_seconds += seconds
            self.world.events.at(self.world.events.now + seconds, self._sent, to, run, since)
            return

    def _sent(self, to: Machine, run: int, since: float) -> None:
        if not self.alive:
            return
        world = self.world
        size = world.sizes[run]
        self.sent_bytes += size
        self.sending_done = world.events.now
        world.count_crossing(self, to, size)
        latency = world.registry_latency if self is world.registry else world.latency
        began = world.events.now - size / self.sends + latency
        arrives = max(world.events.now + latency, max(began, to._receiving_until) + size / to.receives)
        to._receiving_until = arrives
        world.events.at(arrives, to.delivered, self, run, since)
        self._next()

    def delivered(self, by: Machine, run: int, since: float) -> None:
        """A run has come in from `by`, which could have begun to send it at `since`."""
        raise NotImplementedError

    def work(self, pieces: int = 1) -> float:
        """Queue up for the processor with joins, heartbeats or reports; returns when this work is done."""
        seconds = pieces * self.world.join_time
        self._busy_until = max(self._busy_until, self.world.events.now) + seconds
        self.busy_seconds += seconds
        return self._busy_until

    def die(self) -> None:
        """Go silent, for good."""
        self.alive = False


class Registry(Machine):
    """It has everything, and sends to superpeers."""

    def __init__(self, world: World, rate: float) -> None:
        super().__init__(world, "registry", None, rate, rate)
        self.got = array("d", [0.0]) * world.runs

    def need(self, run: int, urgent: bool, hops: int) -> None:
        raise AssertionError("the registry has everything")

    def delivered(self, by: Machine, run: int, since: float) -> None:
        raise AssertionError("nobody sends to the registry")


class Superpeer(Machine):
    """It takes each run from the registry once."""

    def __init__(self, world: World, name: str, rate: float) -> None:
        super().__init__(world, name, None, rate, rate)
        self.fetched_bytes = 0
        self._fetching: set[int] = set()

    def need(self, run: int, urgent: bool, hops: int) -> None:
        events, registry = self.world.events, self.world.registry
        if run not in self._fetching:
            self._fetching.add(run)
            events.at(events.now + self.world.registry_latency, registry.asked, self, run, urgent, 0)
        elif urgent:
            events.at(events.now + self.world.registry_latency, registry.hurried, self, run)

    def delivered(self, by: Machine, run: int, since: float) -> None:
        if self.alive:
            self._fetching.discard(run)
            self.fetched_bytes += self.world.sizes[run]
            self.obtained(run)
