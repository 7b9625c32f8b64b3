"""An answer that goes to the socket past aiohttp, which would copy its bytes twice and look at each header again.

    head held back ──► write(piece, …): together with it, by `writev` ──► file(fd, offset, length): by `sendfile`

What the socket does not take at once waits in the transport, or for the transport; under TLS all bytes go through it.
How a file's bytes get to a socket, and when a reader is given up, is `sending.py`; it says what is raised. Body lengths
are the caller's: `Content-Length`, or `chunked`, where each `write` and each `file` is one chunk and `end` the last.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from aiohttp import HttpVersion10, web

from dadi import http
from dadi.blobs.sending import Piece, drained, raise_if_gone, read, send_file, transport_of
from dadi.errors import DadiError, InvalidRequest

FIRST_PART = 16 << 10
"""Bytes of a file that leave together with what comes before them."""
_ENCRYPTED_STEP = 256 << 10


class Answer(web.StreamResponse):
    """See the head of this file. `begin` it, write all of it, return it to aiohttp, which adds nothing."""

    def __init__(self, request: web.Request, status: int, headers: Mapping[str, str], *, chunked: bool = False) -> None:
        """Raises InvalidRequest for `chunked` to who speaks HTTP/1.0."""
        super().__init__(status=status)
        self._asked = request
        self._chunked_body = chunked
        self._keeps = request.keep_alive
        old = request.version == HttpVersion10
        if chunked and old:
            raise InvalidRequest("HTTP/1.0 has no bodies whose length is not known", hint="ask by HTTP/1.1")
        lines = [f"HTTP/1.1 {_reason(status)}", *(f"{name}: {value}" for name, value in headers.items())]
        if chunked:
            lines.append("Transfer-Encoding: chunked")
        if old or not self._keeps:
            lines.append(f"Connection: {'keep-alive' if self._keeps else 'close'}")
        self._held = "\r\n".join((*lines, f"Date: {_date(int(time.time()))}\r\n\r\n")).encode("latin-1")
        transport = request.transport
        encrypted = transport is None or transport.get_extra_info("sslcontext") is not None
        self._fd = -1 if encrypted or transport is None else transport.get_extra_info("socket").fileno()

    @property
    def keep_alive(self) -> bool | None:
        """Whether the connection serves on; aiohttp asks."""
        return self._keeps

    async def prepare(self, request: web.BaseRequest) -> None:
        """Nothing: aiohttp calls this for what a handler returns."""

    async def begin(self) -> None:
        """Call this first: what fails from now on cuts the connection (`http.cut_if_begun`)."""
        await http.mark_begun(self._asked, self)

    async def write(self, *pieces: Piece) -> None:  # type: ignore[override]  # several pieces, one system call
        """Send pieces of the body, in chunked encoding as one chunk."""
        if self._chunked_body:
            pieces = (b"%x\r\n" % sum(map(len, pieces)), *pieces, b"\r\n")
        await self._send(*pieces)

    async def file(self, fd: int, offset: int, length: int, *before: Piece) -> None:
        """Send `before`, then bytes of a file (1 at least); in chunked encoding as one chunk.

        The first few leave by the system call that `before` leaves by; the others do not enter this process. Pages
        that are not in the page cache are read in a thread first, since `sendfile` would wait for the disk.
        """
        if self._chunked_body:
            before = (b"%x\r\n" % (sum(map(len, before)) + length), *before)
        first = await read(fd, offset, min(FIRST_PART, length))
        before, offset, length = (*before, first), offset + len(first), length - len(first)
        try:
            await self._rest_of_file(fd, offset, length, before)
        except DadiError as error:
            http.cut_if_begun(self._asked, error)  # whatever is written now would be taken for the file's bytes
            raise
        if self._chunked_body:
            self._held = b"\r\n"  # leaves with what is written next

    async def _rest_of_file(self, fd: int, offset: int, length: int, before: tuple[Piece, ...]) -> None:
        if self._fd < 0:
            await self._send(*before)
            await self._through_us(fd, offset, length)
            return
        self._cork(True)  # else what is before the file is a packet of its own, as dear as 64 KiB
        try:
            await self._send(*before)
            await send_file(self._asked, fd, offset, length)
        finally:
            self._cork(False)

    async def end(self) -> None:
        """All has been written."""
        await self._send(*((b"0\r\n\r\n",) if self._chunked_body else ()))

    async def write_eof(self, data: bytes | bytearray | memoryview = b"") -> None:
        """Nothing: aiohttp calls this for what a handler returns."""

    # ---- how

    def _cork(self, on: bool) -> None:
        """Have the kernel fill its packets before it sends; what is held back leaves at the end of that."""
        if self._asked.transport is not None:
            with contextlib.suppress(OSError):  # the reader has gone
                self._asked.transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_CORK, on)

    async def _send(self, *pieces: Piece) -> None:
        transport = transport_of(self._asked)
        if self._held:
            pieces, self._held = (self._held, *pieces), b""
        if not pieces:
            return
        sent = 0
        if self._fd >= 0 and not transport.get_write_buffer_size():
            try:
                sent = os.writev(self._fd, pieces)
            except BlockingIOError:
                pass
            except OSError as error:
                raise_if_gone(error)
                raise
        for piece in pieces:
            if sent >= len(piece):
                sent -= len(piece)
                continue
            transport.write(memoryview(piece)[sent:] if sent else piece)
            sent = 0
        await drained(self._asked, transport)

    async def _through_us(self, fd: int, offset: int, length: int) -> None:
        """`sendfile` cannot encrypt, and asyncio's way around it takes 16 KiB a time."""
        end = offset + length
        while offset < end:
            piece = await read(fd, offset, min(_ENCRYPTED_STEP, end - offset))
            await self._send(piece)
            offset += len(piece)


@lru_cache(2)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


@lru_cache
def _reason(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}"
