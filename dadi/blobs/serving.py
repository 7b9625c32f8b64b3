"""Answer `GET /v1/blobs/{digest}`: exactly the bytes that were asked for, from the store's files to the socket.

A `Range` of one `bytes=A-B` (or `A-`) gives 206, no `Range` gives 200 and the whole; anything else gives 416. Only
present, verified bytes are sent; the kernel sends them (`sendfile`). Pages that are not in its cache are read in a
thread first, since `sendfile` would wait for the disk on the event loop.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Awaitable, Callable

from aiohttp import web

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.errors import NotFound
from dadi.index.chunks import Blob

_RANGE = re.compile(r"bytes=([0-9]{1,18})-([0-9]{0,18})")
_FIRST_PART = 16 << 10
_STEP = 1 << 20

Bring = Callable[[str], Awaitable[Blob]]
"""Brings a blob that is not all here; raises NotFound for one that nobody knows."""


class BlobServer:
    """The handler; `bring` is asked for a blob that is not all here. Counts what it sent."""

    def __init__(self, store: DiskBlobs, bring: Bring) -> None:
        self._store = store
        self._bring = bring
        self.requests = 0
        self.bytes = 0

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer GET and HEAD."""
        digest = digests.parse(request.match_info["digest"])
        blob = self._store.find(digest)
        if blob is None or not self._store.has(digest):
            blob = await self._bring(digest)
        offset, length, status = _requested(request, blob.size)
        headers = {
            "Content-Length": str(length),
            "Content-Type": "application/octet-stream",
            "Accept-Ranges": "bytes",
            "Docker-Content-Digest": digest,
        }
        if status == 206:
            headers["Content-Range"] = f"bytes {offset}-{offset + length - 1}/{blob.size}"
        if status == 416:
            headers = {"Content-Range": f"bytes */{blob.size}"}
        response = web.StreamResponse(status=status, headers=headers)
        if request.method == "HEAD" or not length or status == 416:
            await response.prepare(request)
            return response
        self.requests += 1
        with self._store.open_device(blob) as file:
            if await self._store.missing(blob, blob.table.covering(offset, length)):
                raise NotFound(f"{blob} is not all here")
            await response.prepare(request)
            await _send(request, response, file.fd, offset, length)
        self.bytes += length
        return response


def _requested(request: web.Request, size: int) -> tuple[int, int, int]:
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


async def _send(request: web.Request, response: web.StreamResponse, fd: int, offset: int, length: int) -> None:
    loop = asyncio.get_running_loop()
    end = offset + length
    # The head and the first bytes leave together; the rest never enters this process.
    first = await loop.run_in_executor(None, os.pread, fd, min(_FIRST_PART, length), offset)
    await response.write(first)
    offset += len(first)
    with os.fdopen(os.dup(fd), "rb", buffering=0) as file:
        while offset < end:
            step = min(_STEP, end - offset)
            if not _in_page_cache(fd, offset, step):
                await loop.run_in_executor(None, _read_ahead, fd, offset, step)
            transport = request.transport
            if transport is None or transport.is_closing():
                raise ConnectionResetError("the reader has gone")
            await loop.sendfile(transport, file, offset, step)
            offset += step


def _in_page_cache(fd: int, offset: int, length: int) -> bool:
    probe = [bytearray(1)]
    try:
        return all(os.preadv(fd, probe, at, os.RWF_NOWAIT) for at in (offset, offset + length - 1))
    except (BlockingIOError, OSError):
        return False


def _read_ahead(fd: int, offset: int, length: int) -> None:
    os.pread(fd, length, offset)
