"""Is this machine short of memory or processor time? Linux' pressure stall information (PSI).

    /proc/pressure/memory     some avg10=1.23 avg60=… avg300=… total=…      % of time in which something had to wait
                              full avg10=0.00 …                             … in which everything had to

A node under pressure refuses children first: what runs on it goes before what it does for others. A kernel without
these files (before 4.20, or `psi=0`) has no pressure that could be seen.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable
from pathlib import Path

_SOME = re.compile(rb"^some avg10=([0-9.]+)", re.MULTILINE)
_LOOK_EVERY = 1.0


def share_stalled(text: bytes) -> float:
    """Return the share (0 to 1) of the last 10 s in which something had to wait; 0 for what cannot be read."""
    match = _SOME.search(text)
    try:
        return float(match[1]) / 100 if match else 0.0
    except ValueError:
        return 0.0


class Pressure:
    """Looks at most once a second. `memory`, `cpu`: the shares (0 to 1) from which on there is pressure; 0: never."""

    def __init__(self, *, memory: float, cpu: float, root: Path = Path("/proc/pressure"),
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._limits = {"memory": memory, "cpu": cpu}
        self._root = root
        self._clock = clock
        self._looked = float("-inf")
        self.shares = dict.fromkeys(self._limits, 0.0)

    def __repr__(self) -> str:
        return f"Pressure({self.shares})"

    async def why(self) -> str | None:
        """Return what there is too little of ("memory"), or None."""
        now = self._clock()
        if now - self._looked >= _LOOK_EVERY and any(self._limits.values()):
            self._looked = now
            self.shares = await asyncio.to_thread(self._look)
        return self.seen()

    def seen(self) -> str | None:
        """Return as `why` does, of the last look."""
        return next((name for name, limit in self._limits.items() if limit and self.shares[name] >= limit), None)

    def _look(self) -> dict[str, float]:
        found = {}
        for name in self._limits:
            try:
                found[name] = share_stalled((self._root / name).read_bytes())
            except OSError:
                found[name] = 0.0
        return found
