"""Waiting for what becomes true in its own time, with a limit; never for a fixed time.

`until` is for tests on an event loop, `wait_until` for threads and tests without one. The limits are wide: a machine
that is busy is no finding.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

SECONDS = 60.0


async def until(true: Callable[[], object], seconds: float = SECONDS) -> None:
    """Let the event loop go on until `true` says so. Raises TimeoutError."""
    async with asyncio.timeout(seconds):
        while not true():
            await asyncio.sleep(0.005)


def wait_until(true: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait until `true`, which may take its time to look, says so. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise TimeoutError(f"it did not come true within {seconds:g} s")
        time.sleep(0.02)
