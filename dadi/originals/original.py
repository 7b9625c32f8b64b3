"""A blob in original form that somebody is given: in the store, still arriving, assembled from chunks, or passing by.

Each kind is an `Original`: its bytes come as parts, in order, as soon as they may be given. What all of them promise:
the last byte that is asked for is given only after all bytes of the answer were verified, by the blob's digest or by
its chunk table. If they are wrong `parts` raises, and whoever passes them on cuts the connection: no client ever takes
a wrong blob for a whole one.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import msgspec

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.single_flight import runs
from dadi.blobs.source import Source, Urgency
from dadi.errors import AccessDenied, DadiError, DigestMismatch, NotFound, StoreFull, Unavailable, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.originals.restart import GONE, Restart

_EMPTY = digests.of(b"")
_STEP = 4 << 20
"""Bytes that are brought at a time of what is assembled from chunks."""


class OriginalPart(msgspec.Struct, frozen=True):
    """Bytes that may be given now: `length` bytes at `offset` of the file `fd`, or `data` where that is not None."""

    fd: int
    offset: int
    length: int
    data: bytes | None = None


class Original(Protocol):
    """See the head of this file."""

    @property
    def size(self) -> int:
        """Bytes of the blob."""
        ...

    def parts(self, offset: int, length: int) -> AsyncGenerator[OriginalPart, None]:
        """Yield the bytes [offset, offset + length), which lie in the blob, as they come; `length` is above 0.

        A part is good until the next one is asked for. Raises DigestMismatch, and what fetching raises.
        """
        ...


class Whole:
    """A blob that is complete in the store."""

    def __init__(self, store: DiskBlobs, blob: Blob) -> None:
        self._store = store
        self._blob = blob

    def __repr__(self) -> str:
        return f"Whole({self._blob!r})"

    @property
    def size(self) -> int:
        """See `Original`."""
        return self._blob.size

    async def parts(self, offset: int, length: int) -> AsyncGenerator[OriginalPart, None]:
        """See `Original`. Raises NotFound if it has been evicted."""
        with self._store.open_device(self._blob) as file:
            yield OriginalPart(file.fd, offset, length)


Opened = Callable[[], AbstractAsyncContextManager[Source]]
"""Opens the source of a blob's chunks for as long as somebody reads; its `read` verifies them and keeps them."""


class Chunked:
    """A blob whose chunk table is known: what is not here is brought chunk by chunk, and shared with all others.

    When all of it is here it is made complete, which verifies the whole; an answer that goes up to the blob's end
    waits for that. Once something was given, a source of our own that cannot be reached is waited for (`restart.py`).
    """

    def __init__(self, store: DiskBlobs, blob: Blob, opened: Opened, fallbacks: Fallbacks) -> None:
        self._store = store
        self._blob = blob
        self._opened = opened
        self._fallbacks = fallbacks

    def __repr__(self) -> str:
        return f"Chunked({self._blob!r})"

    @property
    def size(self) -> int:
        """See `Original`."""
        return self._blob.size

    async def parts(self, offset: int, length: int) -> AsyncGenerator[OriginalPart, None]:
        """See `Original`."""
        table, end = self._blob.table, offset + length
        chunks = table.covering(offset, length)
        count = max(1, _STEP // table.chunk_size)
        steps = [chunks[at : at + count] for at in range(0, len(chunks), count)]
        await self._store.prepare(self._blob)
        async with self._opened() as source:
            with self._store.open_device(self._blob) as file:
                coming = asyncio.ensure_future(self._bring(source, steps[0]))
                try:
                    for number, step in enumerate(steps):
                        data = await coming
                        if number + 1 < len(steps):  # while one is sent, the next is on its way
                            coming = asyncio.ensure_future(self._bring_on(source, steps[number + 1]))
                        elif end == table.size and not await self._store.missing(self._blob):
                            await self._store.finish(self._blob)
                        first, size = table.span(step)
                        at, upto = max(first, offset), min(first + size, end)
                        found = data[at - first : upto - first] if data is not None else None
                        yield OriginalPart(file.fd, at, upto - at, found)
                finally:
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)

    async def _bring_on(self, source: Source, step: range) -> bytes | None:
        """Do as `_bring`, for who has been given something."""
        restart = Restart()
        while True:
            try:
                return await self._bring(source, step)
            except Unavailable as error:
                if not await restart.wait(error):
                    raise
                self._fallbacks.note(GONE, str(error))

    async def _bring(self, source: Source, step: range) -> bytes | None:
        """Bring chunks into the store; return them where the store has no room for them."""
        for run in runs(await self._store.missing(self._blob, step)):
            await source.read(self._blob, run, Urgency.DEMAND)
        if not await self._store.missing(self._blob, step):
            return None
        return b"".join(await source.read(self._blob, step, Urgency.DEMAND))


Stream = Callable[[], AsyncGenerator[bytes, None]]
"""Begins to read a blob from its start."""


class Passing:
    """A blob that the store has no room for: it passes by, each time anew, and is verified on the way."""

    def __init__(self, digest: str, size: int, stream: Stream, on_verified: Callable[[], None] = lambda: None) -> None:
        self.size = size
        self._on_verified = on_verified
        self._digest = digest
        self._stream = stream

    def __repr__(self) -> str:
        return f"Passing({self._digest}, {self.size} bytes)"

    async def parts(self, offset: int, length: int) -> AsyncGenerator[OriginalPart, None]:
        """See `Original`. All of the blob is read, whatever is asked for: there is no other way to verify it."""
        found = hashlib.sha256()
        at, end = 0, offset + length
        held = b""
        async with contextlib.aclosing(self._stream()) as pieces:
            async for piece in pieces:
                await asyncio.to_thread(found.update, piece)
                wanted = piece[max(0, offset - at) : max(0, end - at)]
                at += len(piece)
                if wanted:
                    if held:
                        yield OriginalPart(-1, 0, len(held), held)
                    held = wanted
        if at != self.size or "sha256:" + found.hexdigest() != self._digest:
            raise DigestMismatch(f"what came for {self._digest} is not that blob", hint="ask again: others may have it")
        self._on_verified()
        yield OriginalPart(-1, 0, len(held), held)


class EitherOr:
    """`first`; and what `otherwise` gives, from there on, if `first` turns out not to be possible.

    That is what a registry without ranges is, one that does not know us but the caller, a store that has no room for a
    blob of chunks, or a chunk table that has gone; never wrong bytes: who has been given some must not be given others.
    """

    def __init__(self, first: Original, otherwise: Callable[[], Original], fallbacks: Fallbacks) -> None:
        self.first = first
        self._otherwise = otherwise
        self._fallbacks = fallbacks

    def __repr__(self) -> str:
        return f"EitherOr({self.first!r})"

    @property
    def size(self) -> int:
        """See `Original`."""
        return self.first.size

    async def parts(self, offset: int, length: int) -> AsyncGenerator[OriginalPart, None]:
        """See `Original`."""
        given = 0
        try:
            async with contextlib.aclosing(self.first.parts(offset, length)) as parts:
                async for part in parts:
                    given += part.length
                    yield part
            return
        except (Unsupported, NotFound, StoreFull, AccessDenied) as error:
            self._fallbacks.note("blob not assembled, fetched whole", str(error))
        if given < length:
            async with contextlib.aclosing(self._otherwise().parts(offset + given, length - given)) as parts:
                async for part in parts:
                    yield part


class Awaited:
    """A blob of which it is found out how it comes when somebody reads it: that may take a while, or cost a fetch."""

    def __init__(self, size: int, opening: Callable[[], Awaitable[Original]]) -> None:
        self.size = size
        self._opening = opening

    def __repr__(self) -> str:
        return f"Awaited({self.size} bytes)"

    async def parts(self, offset: int, length: int) -> AsyncGenerator[OriginalPart, None]:
        """See `Original`. Raises what the opening raises."""
        original = await self._opening()
        async with contextlib.aclosing(original.parts(offset, length)) as parts:
            async for part in parts:
                yield part


def check_size(digest: str, size: int, who: str) -> int:
    """Return a blob's size as `who` says it; raise DigestMismatch for no bytes where the digest is of some.

    An answer without bytes has nothing that could be verified while it is sent.
    """
    if not size and digest != _EMPTY:
        why = f"{who} says that {digest} has no bytes: that is not what its digest says"
        raise DigestMismatch(why, source=who, hint="what keeps the blobs over there is damaged: push the layer again")
    return size


async def whole_of(original: Original) -> AsyncGenerator[bytes, None]:
    """Yield all of an original as bytes, in pieces of at most 1 MiB, for who reads it in this process."""
    if not original.size:
        return
    async with contextlib.aclosing(original.parts(0, original.size)) as parts:
        async for part in parts:
            if part.data is not None:
                yield part.data
                continue
            at, end = part.offset, part.offset + part.length
            while at < end:
                piece = await asyncio.to_thread(os.pread, part.fd, min(1 << 20, end - at), at)
                if not piece:
                    hint = "`dadi verify` throws away what is damaged"
                    raise DadiError(f"{original!r} is shorter than it says", hint=hint)
                yield piece
                at += len(piece)
