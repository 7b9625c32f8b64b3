"""An answer that goes to the socket past aiohttp, which would copy its bytes twice and look at each header again.

    head held back ──► write(piece, …): together with it, by `writev` ──► file(fd, offset, length): by `sendfile`

What the socket does not take at once waits in the transport, or for the transport; under TLS all bytes go through it.
A reader that has gone, or takes nothing for `STALLED` seconds, raises ConnectionResetError; a file that cannot be read,
or is too short, DadiError: that is our own disk's fault, and to be told. Body lengths are the caller's:
`Content-Length`, or `chunked`, where each `write` and each `file` is one chunk and `end` the last.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import struct
import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus

from aiohttp import HttpVersion10, web

from dadi import http
from dadi.blobs.files import CHECK_DISK
from dadi.errors import DadiError, InvalidRequest

STALLED = 60.0
"""Seconds without a byte that the reader took, after which it is given up; one that is only slow is not."""
_GONE = frozenset((errno.EPIPE, errno.ECONNRESET, errno.ECONNABORTED, errno.ENOTCONN, errno.ESHUTDOWN, errno.ETIMEDOUT,
                   errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENETDOWN))  # fmt: skip
"""What a socket says when the other end has gone; all else is about our file."""
_BYTES_ACKED = struct.Struct("=120xQ")
"""`tcpi_bytes_acked` in Linux's `struct tcp_info`."""
_PROBED = 128 << 10
"""How far apart it is looked whether a page is cached: so much the kernel reads ahead, and a look costs 3 µs."""
_STEP = 1 << 20
_ENCRYPTED_STEP = 256 << 10
_Piece = bytes | memoryview


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

    async def write(self, *pieces: _Piece) -> None:  # type: ignore[override]  # several pieces, one system call
        """Send pieces of the body, in chunked encoding as one chunk."""
        if self._chunked_body:
            pieces = (b"%x\r\n" % sum(map(len, pieces)), *pieces, b"\r\n")
        await self._send(*pieces)

    async def file(self, fd: int, offset: int, length: int, *before: _Piece) -> None:
        """Send `before`, then bytes of a file that do not enter this process; in chunked encoding as one chunk.

        Pages that are not in the page cache are read in a thread first, since `sendfile` would wait for the disk.
        """
        if self._chunked_body:
            before = (b"%x\r\n" % (sum(map(len, before)) + length), *before)
        if self._fd < 0:
            await self._send(*before)
            await self._through_us(fd, offset, length)
        else:
            self._cork(True)  # else what is before the file is a packet of its own, as dear as 64 KiB
            try:
                await self._send(*before)
                await send_file(self._asked, fd, offset, length)
            finally:
                self._cork(False)
        if self._chunked_body:
            self._held = b"\r\n"  # leaves with what is written next

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

    def _transport(self) -> asyncio.Transport:
        transport = self._asked.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the reader has gone")
        return transport

    async def _send(self, *pieces: _Piece) -> None:
        transport = self._transport()
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
        for piece in pieces:
            if sent >= len(piece):
                sent -= len(piece)
                continue
            transport.write(memoryview(piece)[sent:] if sent else piece)
            sent = 0
        await self._drained(transport)

    async def _drained(self, transport: asyncio.Transport) -> None:
        protocol = self._asked.protocol
        if not protocol.writing_paused:
            return
        while True:
            before = _taken(transport)
            try:
                async with asyncio.timeout(STALLED):
                    await protocol._drain_helper()
                return
            except TimeoutError:
                _give_up_idle(transport, before)

    async def _through_us(self, fd: int, offset: int, length: int) -> None:
        """`sendfile` cannot encrypt, and asyncio's way around it takes 16 KiB a time."""
        end = offset + length
        while offset < end:
            piece = await read(fd, offset, min(_ENCRYPTED_STEP, end - offset))
            await self._send(piece)
            offset += len(piece)


async def send_file(request: web.Request, fd: int, offset: int, length: int) -> None:
    """Send bytes of a file without their entering this process; not under TLS. Raises as the head of this file says."""
    await _Sending(request, fd, offset, offset + length).run()


class _Sending:
    """Bytes of a file on their way to a socket, sent by the event loop's own callback.

    asyncio's `sendfile` begins to watch the socket, and stops, for each piece: that is half of the processor's time.
    """

    def __init__(self, request: web.Request, fd: int, offset: int, end: int) -> None:
        self._request = request
        self._fd = fd
        self._at, self._end = offset, end
        self._cached = offset
        """Up to where pages have been found in the page cache."""
        self._waiting: asyncio.Future[None] | None = None

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        watched = -1
        try:
            while self._at < self._end:
                if not self._is_cached():
                    step = min(_STEP, self._end - self._at)
                    await loop.run_in_executor(None, _read_ahead, self._fd, self._at, step)
                    self._cached = self._at + step
                self._send()
                if self._at < self._cached:
                    if watched < 0:  # nobody may watch a transport's own descriptor
                        watched = os.dup(self._transport().get_extra_info("socket").fileno())
                    await self._wait(loop, watched)
        except ConnectionResetError:
            raise
        except OSError as error:
            if error.errno in _GONE:
                raise ConnectionResetError(f"the reader has gone: {error}") from None
            raise _unreadable(error) from None
        finally:
            if watched >= 0:
                os.close(watched)

    async def _wait(self, loop: asyncio.AbstractEventLoop, watched: int) -> None:
        """Wait until all is sent, or something is not in the page cache; meanwhile the callback sends."""
        waiting = self._waiting = loop.create_future()
        loop.add_writer(watched, self._writable)
        try:
            while not waiting.done():
                at, before = self._at, _taken(self._transport())
                await asyncio.wait([waiting], timeout=STALLED)
                if not waiting.done() and self._at == at:
                    _give_up_idle(self._transport(), before)
            waiting.result()
        finally:
            loop.remove_writer(watched)
            if waiting.done():
                waiting.exception()  # who is cancelled has no use for it

    def _writable(self) -> None:
        waiting = self._waiting
        assert waiting is not None
        if waiting.done():
            return
        try:
            if self._is_cached():
                self._send()
                if self._at < self._end:
                    return
            waiting.set_result(None)
        except (DadiError, OSError) as error:
            waiting.set_exception(error)

    def _is_cached(self) -> bool:
        if self._at == self._cached:
            step = min(_STEP, self._end - self._at)
            if not _in_page_cache(self._fd, self._at, step):
                return False
            self._cached += step
        return True

    def _send(self) -> None:
        self._at += _sent_at_once(self._transport(), self._fd, self._at, self._cached - self._at)

    def _transport(self) -> asyncio.Transport:
        transport = self._request.transport
        if transport is None or transport.is_closing():
            raise ConnectionResetError("the reader has gone")
        return transport


async def read(fd: int, offset: int, length: int) -> _Piece:
    """Return bytes of a file, at least one; in a thread if the first is not in the page cache. Raises DadiError."""
    piece: _Piece | None = cached(fd, offset, length)
    if piece is None:
        try:
            piece = await asyncio.get_running_loop().run_in_executor(None, os.pread, fd, length, offset)
        except OSError as error:
            raise _unreadable(error) from None
    if not piece:
        raise _too_short()
    return piece


def cached(fd: int, offset: int, length: int) -> memoryview | None:
    """Return what the page cache has at once of these bytes; None if it has not even the first."""
    buffer = bytearray(length)
    try:
        got = os.preadv(fd, [buffer], offset, os.RWF_NOWAIT)
    except OSError:
        return None
    return memoryview(buffer)[:got] if got else None


def _sent_at_once(transport: asyncio.Transport, fd: int, offset: int, length: int) -> int:
    """Return how many bytes the socket has taken without waiting: mostly all, and the event loop's way costs more."""
    if transport.get_write_buffer_size():
        return 0  # what the transport holds goes first
    to, done = transport.get_extra_info("socket").fileno(), 0
    try:
        while done < length:
            if not (sent := os.sendfile(to, fd, offset + done, length - done)):
                raise _too_short()
            done += sent
    except BlockingIOError:
        pass
    return done


def _taken(transport: asyncio.Transport) -> int:
    """Return how many bytes the reader's kernel has taken. Ours says late that there is room: when a third is free."""
    try:
        raw = transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _BYTES_ACKED.size)
        return int(_BYTES_ACKED.unpack(raw)[0])
    except (OSError, struct.error):  # it has gone, or is no TCP
        return -transport.get_write_buffer_size()


def _give_up_idle(transport: asyncio.Transport, taken: int) -> None:
    """Raise ConnectionResetError if a reader has taken no more than that: it would hold the blob for ever."""
    if _taken(transport) == taken:
        transport.abort()
        raise ConnectionResetError("the reader does not read")


def _unreadable(error: OSError) -> DadiError:
    return DadiError(f"a blob's file cannot be sent: {error.strerror or error}", hint=CHECK_DISK)


def _too_short() -> DadiError:
    return DadiError("a blob's file in the store is shorter than the blob", hint=CHECK_DISK)


def _in_page_cache(fd: int, offset: int, length: int) -> bool:
    probe, end = [bytearray(1)], offset + length
    try:
        return all(os.preadv(fd, probe, at, os.RWF_NOWAIT) for at in (*range(offset, end, _PROBED), end - 1))
    except (BlockingIOError, OSError):
        return False


def _read_ahead(fd: int, offset: int, length: int) -> None:
    os.pread(fd, length, offset)


@lru_cache(2)
def _date(seconds: int) -> str:
    return formatdate(seconds, usegmt=True)


@lru_cache
def _reason(status: int) -> str:
    return f"{status} {HTTPStatus(status).phrase}"
