"""A new blob on a node that has peers: the superpeer gets all of it first, and gives a few bytes meanwhile.

    0 s      the superpeer is asked to have it fetched; it answers when it is whole, or after a second
    then     "coming", with up to HEAD bytes of what has arrived: the client's first bytes; asked again, by long poll,
             for the next few each time: enough for a client to see that it gets on, nothing for the superpeer's link
    whole    the rest comes chunk by chunk, from peers, and what was given is compared with it before anything else is
    silence  where not a byte came for the client for `PATIENCE`, and more than the last one could have: as a stream
             from the superpeer, noted

What was given early was not verified; the last bytes are given only after all of the answer was. If the early ones
prove wrong, the answer is cut off.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

from dadi.errors import DigestMismatch, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.originals.messages import OriginalAnswer
from dadi.originals.original import Original, OriginalPart
from dadi.originals.restart import GONE, Restart

PATIENCE = 45.0
"""Seconds: clients (containerd's image_pull_progress_timeout among them) give up after a minute without a byte."""
_SOON = 1
_HASTY = 5
"""How often it is asked again soon while the client has nothing."""

Ask = Callable[[int, int], Awaitable[OriginalAnswer]]
"""Asks the superpeer, which waits (seconds) and gives bytes from an offset; raises what cannot be helped."""


class Waiting:
    """See the head of this file. `then` is what the superpeer's last answer leads to."""

    def __init__(self, size: int, wait: int, ask: Ask, then: Callable[[OriginalAnswer], Original],
                 fallbacks: Fallbacks) -> None:  # fmt: skip
        self.size = size
        self._wait = wait
        self._ask = ask
        self._then = then
        self._fallbacks = fallbacks

    def __repr__(self) -> str:
        return f"Waiting({self.size} bytes)"

    async def parts(self, offset: int, length: int) -> AsyncGenerator[OriginalPart, None]:
        """See `Original`."""
        given = bytearray()
        until = time.monotonic() + PATIENCE
        asked = 0
        while True:
            soon = not given and asked < _HASTY
            said = await self._asked(min(_SOON, self._wait) if soon else self._wait, offset, len(given))
            asked += 1
            missing = length - 1 - len(given)
            if not said.coming or (missing and time.monotonic() > until):
                break
            if head := said.head[:missing]:
                given += head
                until = time.monotonic() + PATIENCE
                yield OriginalPart(-1, 0, len(head), head)
        async with contextlib.aclosing(_rest(self._then(said), offset, length, bytes(given))) as parts:
            async for part in parts:
                yield part

    async def _asked(self, wait: int, offset: int, given: int) -> OriginalAnswer:
        restart = Restart()
        while True:
            try:
                return await self._ask(wait, offset + given)
            except Unavailable as error:
                if not given or not await restart.wait(error):
                    raise
                self._fallbacks.note(GONE, str(error))


async def _rest(original: Original, offset: int, length: int, given: bytes) -> AsyncGenerator[OriginalPart, None]:
    """Yield what follows `given`; raise DigestMismatch if that is not how the range begins."""
    at = 0
    async with contextlib.aclosing(original.parts(offset, length)) as parts:
        async for part in parts:
            count = min(len(given) - at, part.length)
            if not count:
                yield part
                continue
            data = part.data
            if data is not None:
                found = data[:count]
            else:
                found = await asyncio.to_thread(os.pread, part.fd, count, part.offset)
            if found != given[at : at + count]:
                why = f"the first bytes of {original!r} were not what its digest says"
                raise DigestMismatch(why, source="superpeers", hint="ask again: a registry or mirror had sent them")
            at += count
            if count < part.length:
                rest = data[count:] if data is not None else None
                yield OriginalPart(part.fd, part.offset + count, part.length - count, rest)
