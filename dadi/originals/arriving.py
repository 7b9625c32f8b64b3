"""A blob on its way in: fetched once, by nobody in particular, given to all who ask for it meanwhile.

The bytes go into an ingest of the store (a file) while they are hashed, as a whole and chunk by chunk; readers follow
in that file. So a reader may begin late, want a part only, be slow, or go away, and the fetch does not notice. A chunk
table comes out at the end, by which others can be served piece by piece. Where the disk is full in the middle, each
reader goes on with a stream of its own.

Nobody is given the last byte that he wants before the whole has been verified: there is no smaller unit that could be.
What is wrong as a whole is thrown away, and all readers get the error.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, Protocol

import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.errors import DadiError, DigestMismatch, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import DEFAULT_CHUNK_SIZE, Blob, ChunkHashes
from dadi.originals.original import OriginalPart, Passing, Stream, Whole

log = structlog.get_logger()


class Unasked(Protocol):
    """Who has a blob fetched that nobody has asked for in this form so far."""

    def wanted(self) -> None:
        """Hear that somebody asks for it now; called for each who does."""
        ...

    async def keep(self) -> bool:
        """Return, once that is decided, whether the store is to keep it; it stays arriving until then."""
        ...


class Arriving:
    """See the head of this file. `on_end` is called once, when it is in the store, or has failed.

    `on_verified` is called when all of it has come and is right, before the store has it: who finds it there may rely
    on that. `origin` is whatever the one who began it wants to remember of where it comes from. With
    `unasked` the store keeps it if that says so; as the first that goes, if nobody has asked for it.
    """

    def __init__(self, store: DiskBlobs, digest: str, size: int, stream: Stream, fallbacks: Fallbacks,
                 on_end: Callable[[Arriving], None], origin: object = None,
                 on_verified: Callable[[], None] = lambda: None, unasked: Unasked | None = None) -> None:  # fmt: skip
        self.digest = digest
        self.size = size
        self.origin = origin
        self.error: DadiError | None = None
        self.here = 0
        """Bytes that are in the file."""
        self.verified = False
        self.readers = 0
        self.dropped = False
        """Nobody has asked for it, and it was not kept."""
        self._unasked = unasked
        self._asked = unasked is None
        self._store = store
        self._stream = stream
        self._fallbacks = fallbacks
        self._on_verified = on_verified
        self._on_end: Callable[[Arriving], None] | None = on_end
        self._moved = asyncio.Event()
        self._ingest = store.ingest()
        self._fd = os.open(self._ingest.path, os.O_RDONLY | os.O_CLOEXEC)
        self._task = asyncio.create_task(self._run())
        self._task.add_done_callback(lambda _: self._ended())

    def __repr__(self) -> str:
        return f"Arriving({self.digest}, {self.here}/{self.size} bytes, {self.readers} readers)"

    @property
    def done(self) -> bool:
        """Whether nothing of it is under way any more."""
        return self._task.done()

    def want(self) -> None:
        """Say that somebody asks for it."""
        self._asked = True
        if self._unasked is not None:
            self._unasked.wanted()

    async def parts(self, offset: int, length: int) -> AsyncGenerator[OriginalPart, None]:
        """See `Original`. Whoever comes when nobody reads it any more reads what is in the store."""
        if self._fd < 0:
            async with contextlib.aclosing(self._left().parts(offset, length)) as parts:
                async for part in parts:
                    yield part
            return
        end = offset + length
        self.readers += 1
        try:
            while offset < end:
                if isinstance(self.error, StoreFull):
                    async with contextlib.aclosing(self._anew(offset, end)) as parts:
                        async for part in parts:
                            yield part
                    return
                if self.error is not None:
                    raise self.error
                moved = self._moved
                ready = min(self.here, end) if self.verified else min(self.here, end - 1)
                if ready > offset:
                    yield OriginalPart(self._fd, offset, ready - offset)
                    offset = ready
                else:
                    await moved.wait()
        finally:
            self.readers -= 1
            self._close_if_unused()

    async def _anew(self, offset: int, end: int) -> AsyncGenerator[OriginalPart, None]:
        """Yield the bytes [offset, end) from a stream of their own: the store had no room for the rest.

        What this reader has been given was not verified: it is compared with what that stream begins with, which is.
        """
        self._fallbacks.note("blob passes by, no room to keep it", f"{self.digest}, from {offset} bytes on")
        at, passing = 0, Passing(self.digest, self.size, self._stream)
        async with contextlib.aclosing(passing.parts(0, end)) as parts:
            async for part in parts:
                assert part.data is not None
                count = max(0, min(offset - at, part.length))
                if count and await asyncio.to_thread(os.pread, self._fd, count, at) != part.data[:count]:
                    raise DigestMismatch(f"{self.digest} came with other bytes the second time", source="registry")
                at += part.length
                if count < part.length:
                    yield OriginalPart(-1, 0, part.length - count, part.data[count:])

    def _left(self) -> Whole:
        """Return what has become of it, once it is closed; raise what went wrong."""
        blob = self._store.find(self.digest) if self._store.has(self.digest) else None
        if self.error is not None:
            raise self.error
        if blob is None:
            hint = "ask again; is store.limit too small?"
            raise Unavailable(f"blob {self.digest} came, and the store has it no more", hint=hint)
        return Whole(self._store, blob)

    async def head(self, offset: int, most: int) -> bytes:
        """Return at most `most` of the bytes at `offset` that are here, not verified, and never the blob's last one."""
        count = min(self.here, self.size - 1, offset + most) - offset
        if count <= 0 or self._fd < 0 or self.error is not None:
            return b""
        self.readers += 1
        try:
            return await asyncio.to_thread(os.pread, self._fd, count, offset)
        finally:
            self.readers -= 1
            self._close_if_unused()

    async def settled(self) -> None:
        """Return when all of it is in the store, if that has room; raises what went wrong."""
        await asyncio.wait([self._task])
        if self.error is not None:
            raise self.error

    async def close(self) -> None:
        """Break it off, unless all of it has come; readers get Unavailable."""
        if not self.verified:
            self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        await asyncio.to_thread(self._ingest.abort)

    async def _run(self) -> None:
        try:
            blob = await self._receive()
            self._on_verified()
            self._advance(verified=True)
            if self._unasked is not None and not await self._unasked.keep():
                self.dropped = True
                return
            try:
                await self._store.commit(self._ingest, blob, asked=self._asked)
            except DadiError as error:
                # Its readers have an open file: they read on.
                self._fallbacks.note("original not kept", str(error))
        except DadiError as error:
            log.warning("a blob did not arrive", blob=self.digest, why=error.message)
            self._fail(error)
        except BaseException as error:
            self._fail(Unavailable(f"the fetch of blob {self.digest} was broken off", hint="ask again"))
            if isinstance(error, Exception):
                await asyncio.to_thread(log.error, "a fault of ours", blob=self.digest, exc_info=error)
                return
            raise
        finally:
            await asyncio.shield(asyncio.to_thread(self._ingest.abort))

    async def _receive(self) -> Blob:
        whole, chunks = hashlib.sha256(), ChunkHashes(DEFAULT_CHUNK_SIZE)

        def take(piece: bytes) -> None:
            self._ingest.write(piece)
            whole.update(piece)
            chunks.update(piece)

        async with contextlib.aclosing(self._stream()) as pieces:
            async for piece in pieces:
                await _to_its_end(asyncio.to_thread(take, piece))
                self.here += len(piece)
                self._advance()
        blob = await asyncio.to_thread(lambda: Blob("sha256:" + whole.hexdigest(), chunks.table()))
        if blob.digest != self.digest or blob.size != self.size:
            raise DigestMismatch(f"what came for {self.digest} is {blob.digest}, {blob.size} bytes", source="registry",
                                 hint="thrown away; if it comes so again, a registry or mirror has a damaged copy"
                                 )  # fmt: skip
        return blob

    def _advance(self, *, verified: bool = False) -> None:
        self.verified = self.verified or verified
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    def _fail(self, error: DadiError) -> None:
        if not self.verified and self.error is None:
            self.error = error
            self._tell()  # before its readers hear of it: who of them asks again must not come to this one
        self._advance()

    def _tell(self) -> None:
        on_end, self._on_end = self._on_end, None
        if on_end is not None:
            on_end(self)

    def _ended(self) -> None:
        if not self.verified and self.error is None:  # cancelled before it began
            self._fail(Unavailable(f"the fetch of blob {self.digest} was broken off", hint="ask again"))
        self._close_if_unused()
        self._tell()

    def _close_if_unused(self) -> None:
        if self._task.done() and not self.readers and self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for a thread's work even when cancelled: the file that it writes to must not be closed under it."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait([task])
        raise
