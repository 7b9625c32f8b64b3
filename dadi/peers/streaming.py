"""The body of a stream of chunks (`stream.py`), as a node writes it; and how it waits for what is to be written.

What is in memory leaves by one `writev` with its record's head, what is in the store by `sendfile`: see
`dadi/blobs/answering.py`. The head of the answer leaves with the first record.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterable, Mapping
from functools import partial

from dadi.blobs.answering import Answer
from dadi.blobs.disk import DiskBlobs
from dadi.errors import DadiError, NotFound, Unavailable
from dadi.index.chunks import Blob
from dadi.peers import stream


class ChunkStream:
    """`begin` it, then records, then `end`; return `answer`. ConnectionResetError if the reader has gone."""

    def __init__(self, answer: Answer) -> None:
        """`answer`: with `stream.HEADERS`, chunked."""
        self.answer = answer

    async def begin(self) -> None:
        """Call this first."""
        await self.answer.begin()

    async def sign(self) -> None:
        """Say that we wait for what is left."""
        await self.answer.write(stream.WAITING)

    async def error(self, error: DadiError, instead: str) -> None:
        """Say why no more comes; `instead`: whom else to ask, by id."""
        await self.answer.write(stream.error_record(error, instead))

    async def chunk(self, kind: int, chunk: int, body: bytes) -> None:
        """Send a chunk (`stream.PLAIN`) or its frame (`stream.FRAME`)."""
        await self.answer.write(stream.head(kind, chunk, len(body)), body)

    async def stored(self, store: DiskBlobs, blob: Blob, chunk: int) -> None:
        """Send a chunk that is in `store`: the head and the first bytes by us, the rest by the kernel."""
        offset, length = blob.table.extent(chunk)
        with store.open_device(blob) as file:
            if not file.present[chunk] and await store.missing(blob, range(chunk, chunk + 1)):
                raise NotFound(f"{blob} is not all here any more")
            await self.answer.file(file.fd, offset, length, stream.head(stream.PLAIN, chunk, length))

    async def end(self) -> None:
        """All has been sent."""
        await self.answer.end()


class Arrivals:
    """The chunks of one stream, in the order in which they are here; `left`: how many are still to be taken."""

    def __init__(self, here: Iterable[int]) -> None:
        self._arrived: deque[tuple[int, asyncio.Future[bytes] | None]] = deque((chunk, None) for chunk in here)
        self._more = Bell()
        self.left = len(self._arrived)

    def expect(self, fetches: Mapping[int, asyncio.Future[bytes]]) -> None:
        """Chunks that are being fetched come, too."""
        self.left += len(fetches)
        for chunk, fetch in fetches.items():
            fetch.add_done_callback(partial(self._came, chunk))

    def _came(self, chunk: int, fetch: asyncio.Future[bytes]) -> None:
        self._arrived.append((chunk, fetch))
        self._more.ring()

    async def next(self, seconds: float) -> tuple[int, bytes] | None:
        """Return a chunk, and its bytes if it has come just now, else b""; None if none comes for so many seconds.

        Raises what has kept it from coming.
        """
        while not self._arrived:
            if not await self._more.heard(seconds):
                return None
        self.left -= 1
        chunk, fetch = self._arrived.popleft()
        if fetch is None:
            return chunk, b""
        if fetch.cancelled():
            raise Unavailable("this node is stopping")
        return chunk, fetch.result()


class Bell:
    """Wakes the one who waits for it; what rang before is heard at once. Cheaper than an Event with a timeout."""

    def __init__(self) -> None:
        self._rang = False
        self._waiter: asyncio.Future[bool] | None = None

    def ring(self) -> None:
        """Something has come."""
        self._rang = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(True)

    async def heard(self, seconds: float) -> bool:
        """Return True once it has rung, False after so many seconds."""
        if not self._rang:
            loop = asyncio.get_running_loop()
            self._waiter = waiter = loop.create_future()
            timer = loop.call_later(seconds, _over, waiter)
            try:
                await waiter
            finally:
                timer.cancel()
        heard, self._rang = self._rang, False
        return heard


def _over(waiter: asyncio.Future[bool]) -> None:
    if not waiter.done():
        waiter.set_result(False)
