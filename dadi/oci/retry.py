"""When to try again, and how long to wait before: backoff, Retry-After, patience that progress restores.

Time and chance come in from outside (`Clock`), so that tests own them. The arithmetic is in plain functions.
"""

from __future__ import annotations

import asyncio
import dataclasses
import email.utils
import random
import time
from collections.abc import Awaitable, Callable

from dadi.errors import DadiError, DigestMismatch, Unavailable

_LATER = "try again in a while; if it lasts, look after the registry, and the way to it"


@dataclasses.dataclass(frozen=True, slots=True)
class Clock:
    """Seconds since some time, seconds since 1970, waiting for seconds, and a number from 0 to 1."""

    monotonic: Callable[[], float] = time.monotonic
    wall: Callable[[], float] = time.time
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep
    random: Callable[[], float] = random.random


def backoff(failures: int, first: float, most: float, chance: float) -> float:
    """Return the seconds to wait after the n-th failure in a row: doubled each time, and up to half less by chance.

    The chance keeps a thousand clients that failed together from coming back together.
    """
    full: float = min(most, first * 2 ** min(failures - 1, 30))
    return full * (1 - chance / 2)


def parse_retry_after(text: str | None, now: float) -> float | None:
    """Return the seconds that a Retry-After header asks for (RFC 9110, 10.2.3), None if it makes no sense.

    `now` is in seconds since 1970, for headers that give a date.
    """
    if text is None:
        return None
    text = text.strip()
    if text.isascii() and text.isdigit():
        return float(text[:9])
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - now)
    except (ValueError, OverflowError):
        return None


class Patience:
    """How many more failures one operation may meet. Not shared between operations.

    A retryable error is met with a wait, `retries` times; a wrong digest with one more try, because bits flip on the
    way; any other error with none. `restored()` says that the operation got on and starts the count anew.
    """

    def __init__(self, clock: Clock, *, retries: int, first: float, most: float, max_retry_after: float) -> None:
        self._clock = clock
        self._retries = retries
        self._first, self._most, self._max_retry_after = first, most, max_retry_after
        self.failures = 0

    def restored(self) -> None:
        """Forget the failures so far: there was progress."""
        self.failures = 0

    async def spend(self, error: DadiError) -> None:
        """Wait as long as `error` and its predecessors call for; raise it if it is not worth waiting any more."""
        self.failures += 1
        allowed = self._retries if error.retryable else min(1, self._retries)
        if not (error.retryable or isinstance(error, DigestMismatch)):
            raise error
        error.hint = error.hint or _LATER
        if self.failures > allowed:
            if self.failures > 1:
                error.message = f"{error.message}; gave up after {self.failures} attempts"
            raise error
        wait = backoff(self.failures, self._first, self._most, self._clock.random())
        asked = error.retry_after if isinstance(error, Unavailable) else None
        if asked is not None and asked > self._max_retry_after:
            raise error
        await self._clock.sleep(wait + (asked or 0.0))
