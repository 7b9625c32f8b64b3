"""Wait and ask again while upstream is away, up to a limit: what a mounted image needs. One retry policy for reads."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable

from dadi.blobs.source import Source, Urgency
from dadi.errors import DadiError, InvalidRequest, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob

_FIRST_WAIT, _LONGEST_WAIT = 0.1, 5.0


class Patient:
    """A source that asks `source` again, with growing and jittered waits, until `patience` (seconds) has passed.

    Whatever is wrong upstream may heal while a program waits: away; wrong bytes (another source, or the same mended,
    has the right ones); not found (it was restarted empty); full; denied (a token is renewed). Only a request that
    makes no sense is raised at once. In the end Unavailable is raised.
    """

    def __init__(
        self,
        source: Source,
        patience: float,
        fallbacks: Fallbacks,
        *,
        wanted: Callable[[Blob, range, Urgency], Urgency] = lambda blob, chunks, urgency: urgency,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        """`wanted`: how urgent a read is by now; somebody more urgent may have joined it since."""
        self.source = source
        self.patience = patience
        self.waiting = 0
        """Reads that are being waited out now."""
        self._fallbacks = fallbacks
        self._wanted = wanted
        self._clock = clock
        self._sleep = sleep

    def __repr__(self) -> str:
        return f"Patient({self.source!r}, {self.patience:g} s)"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run, or raise Unavailable, saying how long was waited and why, when patience runs out."""
        deadline = self._clock() + self.patience
        wait = _FIRST_WAIT
        while True:
            try:
                return await self.source.read(blob, chunks, self._wanted(blob, chunks, urgency))
            except DadiError as error:
                if isinstance(error, InvalidRequest):
                    raise
                left = deadline - self._clock()
                if left <= 0:
                    failure = self._gave_up(blob, error)
                    self._fallbacks.note("read failed, nobody could answer", str(failure))
                    raise failure from error
                self._fallbacks.note("read waits for upstream", str(error))
                asked = error.retry_after if isinstance(error, Unavailable) and error.retry_after else 0.0
                self.waiting += 1
                try:
                    await self._sleep(min(left, max(asked, wait * random.uniform(0.5, 1.0))))
                finally:
                    self.waiting -= 1
                wait = min(wait * 2, _LONGEST_WAIT)

    def _gave_up(self, blob: Blob, error: DadiError) -> DadiError:
        hint = error.hint or "is the superpeer up, and does it reach the registry? reads go on when it is back"
        return Unavailable(f"a read of {blob} was given up after {self.patience:g} s: {error.message}", hint=hint)
