"""The body of a stream of chunks (`stream.py`), as a node writes it; and what a write of an answer may take.

What is in memory goes through aiohttp. What is in the store leaves by `sendfile`, past it, as one piece of the chunked
body, whose length is written by hand: for that the answer's head must have left, which aiohttp holds back for what is
written by it next. So the first record is never sent that way; nor is anything under TLS.
"""

from __future__ import annotations

from aiohttp import web

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.serving import FIRST_PART, cached, send_file, write
from dadi.errors import DadiError, NotFound
from dadi.index.chunks import Blob
from dadi.peers import stream

_STALLED = 60.0


class ChunkStream(web.StreamResponse):
    """An answer. `begin` it, then records, then `write_eof`. ConnectionResetError if the reader has gone."""

    def __init__(self, request: web.Request) -> None:
        super().__init__(status=200, headers={"Content-Type": stream.TYPE})
        self.enable_chunked_encoding()
        self._asked = request
        self._begun = False

    async def begin(self) -> None:
        """Call this first."""
        await self.prepare(self._asked)

    async def sign(self) -> None:
        """Say that we wait for what is left."""
        await self._record(stream.WAITING)

    async def error(self, error: DadiError, instead: str) -> None:
        """Say why no more comes; `instead`: whom else to ask, by id."""
        await self._record(stream.error_record(error, instead))

    async def chunk(self, kind: int, chunk: int, body: bytes | memoryview) -> None:
        """Send a chunk (`stream.PLAIN`) or its frame (`stream.FRAME`)."""
        await self._record(b"".join((stream.head(kind, chunk, len(body)), body)))

    async def stored(self, store: DiskBlobs, blob: Blob, chunk: int) -> None:
        """Send a chunk that is in `store`: the head and the first bytes by us, the rest by the kernel."""
        offset, length = blob.table.extent(chunk)
        with store.open_device(blob) as file:
            if await store.missing(blob, range(chunk, chunk + 1)):
                raise NotFound(f"{blob} is not all here any more")
            first = cached(file.fd, offset, min(FIRST_PART, length))
            transport = self._asked.transport
            if first and self._begun and transport and transport.get_extra_info("sslcontext") is None:
                if transport.is_closing():
                    raise ConnectionResetError("the reader has gone")
                head = stream.head(stream.PLAIN, chunk, length)
                transport.write(b"".join((b"%x\r\n" % (len(head) + length), head, first)))
                await send_file(self._asked, file.fd, offset + len(first), length - len(first))
                transport.write(b"\r\n")
                return
            data: bytes | memoryview | None = cached(file.fd, offset, length)
        if not data or len(data) != length:
            (data,) = await store.read(blob, range(chunk, chunk + 1))
        await self.chunk(stream.PLAIN, chunk, data)

    async def _record(self, record: bytes) -> None:
        await write(self._asked, self, record)
        self._begun = True
