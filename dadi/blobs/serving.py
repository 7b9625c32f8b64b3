"""Answer `GET /v1/blobs/{digest}`: exactly the bytes that were asked for, from the store's files to the socket.

A `Range` of one `bytes=A-B` (or `A-`) gives 206, no `Range` gives 200 and the whole; anything else gives 416. What is
not here is brought first, and just that; only present, verified bytes are sent, in the way of `answering.py`.

A range request with `Accept-Encoding: zstd` may get its bytes compressed (`Content-Encoding: zstd`, a frame a chunk,
`Content-Range` still counts the bytes as they are in the blob): see `Compressor`.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

import zstandard
from aiohttp import web

from dadi import digest as digests
from dadi.blobs.answering import Answer
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Urgency, urgency_of_word
from dadi.errors import DigestMismatch, NotFound
from dadi.index.chunks import Blob
from dadi.peers.gate import OPEN, Doorman
from dadi.wire import URGENCY

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")


class Shelf(Protocol):
    """What is served: blobs that are in `store`, or can be brought there."""

    @property
    def store(self) -> DiskBlobs:
        """Where the bytes are served from."""
        ...

    def find(self, digest: str) -> Blob:
        """Return a blob; raise NotFound for one that nobody knows."""
        ...

    async def bring(self, blob: Blob, chunks: range, urgency: Urgency) -> None:
        """Bring chunks of it into the store."""
        ...


class BlobServer:
    """The handler; `shelf` brings what is not here yet, `gate` says who gets it. Counts what it sent."""

    def __init__(self, shelf: Shelf, compressor: Compressor, gate: Doorman = OPEN, *,
                 learn: Callable[[str], Awaitable[None]] | None = None) -> None:  # fmt: skip
        """`learn`: has others asked about a blob that the shelf may not know, before it is looked for there."""
        self._gate = gate
        self._learn = learn
        self._shelf = shelf
        self._store = shelf.store
        self._compressor = compressor
        self.requests = 0
        self.bytes = 0
        self.wire_bytes = 0

    def statistics(self) -> dict[str, int]:
        """Return requests, bytes of blobs, and bytes of bodies as they went over the wire."""
        return {"requests": self.requests, "bytes": self.bytes, "wire_bytes": self.wire_bytes}

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer GET and HEAD."""
        digest = digests.parse(request.match_info["digest"])
        # First of all: who may not have a blob is not told either whether it is here.
        await self._gate.admit(request.headers, digest)
        if self._learn is not None:
            await self._learn(digest)
        blob = self._shelf.find(digest)
        offset, length, status = requested(request, blob.size)
        headers = {
            "Content-Length": str(length),
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "Docker-Content-Digest": digest,
            "Vary": "Accept-Encoding",
        }
        if status == 206:
            headers["Content-Range"] = f"bytes {offset}-{offset + length - 1}/{blob.size}"
        if status == 416:
            headers = {"Content-Range": f"bytes */{blob.size}"}
        if request.method == "HEAD" or not length or status == 416:
            response = web.StreamResponse(status=status, headers=headers)
            await response.prepare(request)
            return response
        self.requests += 1
        self.bytes += length
        chunks = blob.table.covering(offset, length)
        await self._shelf.bring(blob, chunks, urgency_of(request.headers))
        with self._store.open_device(blob) as file:
            if await self._store.missing(blob, chunks):
                raise NotFound(f"{blob} is not all here")
            if status == 206 and "zstd" in request.headers.get("Accept-Encoding", ""):
                body = await self._compressor.range(blob, file.fd, offset, length)
                if body is not None:
                    self.wire_bytes += len(body)
                    del headers["Content-Length"]
                    return web.Response(status=206, body=body, headers={**headers, "Content-Encoding": "zstd"})
            answer = Answer(request, status, headers)
            await answer.begin()
            await answer.file(file.fd, offset, length)
            await answer.end()
        self.wire_bytes += length
        return answer


class Compressor:
    """Compresses ranges where that pays: what many nodes ask for once, and nothing while the processors are busy.

    Compressed ranges are kept in memory up to `cache` bytes, the least recently used go first: nodes that start the
    same image ask for the same ranges. When `most` ranges are being compressed already, the next goes as it is.
    """

    LARGEST = 4 << 20
    LEVEL = 3

    def __init__(self, *, cache: int, most: int = 4 * (os.cpu_count() or 1)) -> None:
        self._limit = cache
        self._most = most
        self._busy = 0
        self._bytes = 0
        self._cache: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()

    async def range(self, blob: Blob, fd: int, offset: int, length: int) -> bytes | None:
        """Return the range as zstd frames, one a chunk; None if it should go as it is."""
        key = (blob.digest, offset, length)
        body = self._cache.get(key)
        if body is not None:
            self._cache.move_to_end(key)
            return body or None
        if not self._limit or max(length, blob.table.chunk_size) > self.LARGEST or self._busy >= self._most:
            return None
        self._busy += 1
        try:
            body = await asyncio.to_thread(self._compress, blob, fd, offset, length)
        except DigestMismatch:
            return None  # the disk spoilt it: not to be remembered; whoever is sent it finds out
        finally:
            self._busy -= 1
        if len(body) > length * 9 // 10:
            body = b""  # remembered too: it does not pay
        self._remember(key, body)
        return body or None

    def _compress(self, blob: Blob, fd: int, offset: int, length: int) -> bytes:
        compressor = zstandard.ZstdCompressor(level=self.LEVEL)
        frames = []
        end = offset + length
        for chunk in blob.table.covering(offset, length):
            begin, size = blob.table.extent(chunk)
            data = os.pread(fd, size, begin)
            blob.verify(chunk, data, source="the disk")  # what is remembered outlives the bytes on the disk
            part = memoryview(data)[max(offset - begin, 0) : end - begin]
            frames.append(compressor.compress(part))
        return b"".join(frames)

    def _remember(self, key: tuple[str, int, int], body: bytes) -> None:
        if key in self._cache:
            return
        self._cache[key] = body
        self._bytes += len(body) + 200
        while self._bytes > self._limit:
            _, old = self._cache.popitem(last=False)
            self._bytes -= len(old) + 200


def urgency_of(headers: Mapping[str, str]) -> Urgency:
    """Return what the request's header says."""
    return urgency_of_word(headers.get(URGENCY))


def requested(request: web.Request, size: int) -> tuple[int, int, int]:
    """Return (offset, length, status)."""
    text = request.headers.get("Range")
    if text is None:
        return 0, size, 200
    match = _RANGE.fullmatch(text)
    if not match:
        return 0, 0, 416
    first = int(match[1])
    last = min(int(match[2]) if match[2] else size - 1, size - 1)
    return (first, last - first + 1, 206) if first <= last else (0, 0, 416)
