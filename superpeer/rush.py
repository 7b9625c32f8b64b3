"""How many joins a superpeer takes when thousands of nodes come at once. No I/O: time is an argument.

    wait(now)   0: take it; else the seconds after which the node is to come again
    took(cost)  what a join that was taken cost, in seconds of this process

Joins get `SHARE` of the process, since it serves reads meanwhile, and may be `BURST` ahead of it. Who comes in vain is
given a turn of its own behind those that were told to wait before, so that they do not all come again in one second;
turns later than `LONGEST` are drawn at random. A virtual queue as in GCRA (ITU-T I.371); nothing is kept of anybody.
"""

from __future__ import annotations

import random
from collections.abc import Callable

SHARE = 0.7
BURST = 0.5
LONGEST = 60.0
"""Seconds."""
_AROUND = 0.0004
"""Seconds for the HTTP around a join, which it cannot measure itself."""
_FADE = 0.05


class Rush:
    """See the head of this file."""

    def __init__(self, *, cost: float = 0.001, draw: Callable[[float, float], float] = random.uniform) -> None:
        """`cost`: of a join, as long as none was measured."""
        self.put_off = 0
        """Joins that were told to wait."""
        self._draw = draw
        self._cost = cost
        self._busy_until = 0.0
        self._last_turn = 0.0

    def wait(self, now: float) -> float:
        """Return 0 if a join is to be taken now, else the seconds to wait."""
        each = self._cost / SHARE
        if self._busy_until <= now + BURST:
            self._busy_until = max(self._busy_until, now) + each
            return 0.0
        self.put_off += 1
        if self._last_turn - now > LONGEST:
            return self._draw(LONGEST / 2, LONGEST)
        self._last_turn = max(self._last_turn, self._busy_until) + each
        return self._last_turn - now

    def took(self, cost: float) -> None:
        """Learn from a join that was taken."""
        self._cost += _FADE * (min(cost, 1.0) + _AROUND - self._cost)
