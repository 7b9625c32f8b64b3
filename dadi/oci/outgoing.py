"""A request's body on its way out: in small pieces, counted, and watched for a receiver that takes nothing any more.

    source ──pieces of any size──► Outgoing ──at most PIECE bytes at a time──► the socket

A `Body` can be sent again (a redirect, a new token, an upload that starts anew): each time is an `Outgoing`, which asks
the source for its bytes from the first one on. What the source itself raises is no failure of the registry's: it comes
out as `SourceFailed`, which nobody retries. No HTTP here (`transport.py`).
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Callable

from dadi.errors import InvalidRequest

PIECE = 256 << 10
"""Bytes that are handed to the socket at once: small enough that a slow link takes one within the read time-out."""

Source = bytes | Callable[[], AsyncIterator[bytes]]
"""The bytes, or something that gives them from the start each time it is called."""


class SourceFailed(Exception):
    """What was to be sent could not be read; `error` is what the source raised."""

    def __init__(self, error: Exception) -> None:
        super().__init__(str(error))
        self.error = error


@dataclasses.dataclass(frozen=True, slots=True)
class Body:
    """`size` bytes to send. `on_progress` hears how many are sent of this attempt; a new attempt begins at 0 again.

    Without a size (what somebody else sends, passed on) they go in HTTP's own chunks, and the source's end is theirs.
    """

    size: int | None
    source: Source
    on_progress: Callable[[int], None] | None = None

    def start(self) -> Outgoing:
        """Return the body for one attempt to send it."""
        return Outgoing(self)


class Outgoing:
    """One attempt to send a body: an asynchronous iterator for one use. Close it, also when it was not used up."""

    def __init__(self, body: Body) -> None:
        self._body = body
        self.size = body.size
        self._iterator = _once(body.source) if isinstance(body.source, bytes) else body.source()
        self._piece = memoryview(b"")
        self._handed = 0
        self._pull: asyncio.Future[bytes | None] | None = None
        self._closed = False
        self.finished = False
        """Whether all bytes were handed on: if not, the connection is of no use any more."""
        self.failure: Exception | None = None
        """What the source raised."""
        self.watch: Callable[[bool], None] | None = None
        """Called with True when it is the receiver's turn (to take a piece), with False when it is the source's."""

    def __repr__(self) -> str:
        return f"Outgoing({self._handed} of {self._body.size} bytes)"

    def __aiter__(self) -> Outgoing:
        return self

    async def __anext__(self) -> memoryview:
        if self._closed:
            raise ConnectionAbortedError("this body is not to be sent any more")
        self._turn_of_receiver(False)
        try:
            if self._handed and self._body.on_progress is not None:
                self._body.on_progress(self._handed)
            await self._refill()
        except Exception as error:
            self.failure = error
            raise
        if not self._piece:
            self.finished = True
            raise StopAsyncIteration
        piece, self._piece = self._piece[:PIECE], self._piece[PIECE:]
        self._handed += len(piece)
        self._turn_of_receiver(True)
        return piece

    async def close(self) -> None:
        """Stop reading the source and close it; idempotent."""
        self._closed, self.watch = True, None
        if self._pull is not None:
            self._pull.cancel()
            await asyncio.wait([self._pull])
        close = getattr(self._iterator, "aclose", None)
        if close is not None:
            await close()

    async def _refill(self) -> None:
        """Have a piece to hand on, or none at the end; raise InvalidRequest if the source has not `size` bytes."""
        while not self._piece:
            # A task of its own, so that `close` can stop it wherever it waits.
            self._pull = asyncio.ensure_future(anext(self._iterator, None))
            try:
                piece = await self._pull
            finally:
                self._pull = None
            size = self._body.size
            if size is None:
                if piece is None:
                    return
                self._piece = memoryview(piece)
                continue
            missing = size - self._handed
            if piece is None:
                if missing:
                    raise InvalidRequest(f"there are only {self._handed} bytes to send where {size} were announced")
                return
            if len(piece) > missing:
                raise InvalidRequest(f"there are more than the {size} bytes to send that were announced")
            self._piece = memoryview(piece)

    def _turn_of_receiver(self, yes: bool) -> None:
        if self.watch is not None:
            self.watch(yes)


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data
