"""The body of a stream of chunks (`stream.py`), as a node writes it; and how it waits for what is to be written.

What is in memory leaves by one `writev` with its record's head, what is in the store by `sendfile`: see
`dadi/blobs/answering.py`. The head of the answer leaves with the first record.
"""

from __future__ import annotations

import asyncio

from dadi.blobs.answering import Answer, read
from dadi.blobs.disk import DiskBlobs
from dadi.errors import DadiError, NotFound
from dadi.index.chunks import Blob
from dadi.peers import stream

_FIRST_PART = 16 << 10


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
            first = await read(file.fd, offset, min(_FIRST_PART, length))
            rest = length - len(first)
            await self.answer.file(file.fd, offset + len(first), rest, stream.head(stream.PLAIN, chunk, length), first)

    async def end(self) -> None:
        """All has been sent."""
        await self.answer.end()


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
