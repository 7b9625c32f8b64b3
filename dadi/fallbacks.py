"""Nobody falls back silently: every fallback is logged, counted (a metric) and remembered (for `dadi status`)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import structlog

log = structlog.get_logger()
_LOG_EVERY = 10.0


class Fallbacks:
    """What this process did instead of what it should have done, and why.

    A fallback has a kind (a few words, fixed: they become a metric's label) and a reason (free text). Of each kind the
    last reason is kept; the log has each kind at most every 10 s, so that a storm does not fill the disk.
    """

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._last: dict[str, tuple[float, str]] = {}
        self._logged: dict[str, float] = {}

    def __repr__(self) -> str:
        return f"Fallbacks({dict(self._counts)})"

    def note(self, kind: str, why: str) -> None:
        """Remember that this happened now."""
        now = self._clock()
        self._counts[kind] += 1
        self._last[kind] = (now, why)
        if now - self._logged.get(kind, float("-inf")) >= _LOG_EVERY:
            self._logged[kind] = now
            log.warning("fell back", kind=kind, why=why, times=self._counts[kind])

    def statistics(self) -> list[dict[str, Any]]:
        """Return kind, count, last (seconds since 1970) and why (of the last), most frequent first."""
        return [{"kind": kind, "count": count, "last": self._last[kind][0], "why": self._last[kind][1]}
                for kind, count in self._counts.most_common()]  # fmt: skip
