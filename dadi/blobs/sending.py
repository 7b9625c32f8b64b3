"""Bytes of a file on their way to a socket, by the kernel, and never waiting for the disk on the event loop.

    in the page cache     `sendfile`, as much as the socket takes; the rest when it takes more
    not there             read in a thread first, a MiB at a time
    reader too slow       waited for, as long as his kernel takes a byte now and then

A reader that has gone, or takes nothing for `STALLED` seconds, raises ConnectionResetError; a file that cannot be read,
or is too short, DadiError: that is our own disk's fault, and to be told.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct

from aiohttp import web

from dadi.blobs.files import CHECK_DISK
from dadi.errors import DadiError

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
Piece = bytes | memoryview


def transport_of(request: web.Request) -> asyncio.Transport:
    """Return the transport of who asked; raise ConnectionResetError if he has gone."""
    transport = request.transport
    if transport is None or transport.is_closing():
        raise ConnectionResetError("the reader has gone")
    return transport


def raise_if_gone(error: OSError) -> None:
    """Raise ConnectionResetError if that is what a socket says whose other end has gone; asyncio may not know yet."""
    if error.errno in _GONE:
        raise ConnectionResetError(f"the reader has gone: {error}") from None


async def drained(request: web.Request, transport: asyncio.Transport) -> None:
    """Wait until the transport has room for more; raise ConnectionResetError if the reader takes nothing."""
    protocol = request.protocol
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
                        watched = os.dup(transport_of(self._request).get_extra_info("socket").fileno())
                    await self._wait(loop, watched)
        except ConnectionResetError:
            raise
        except OSError as error:
            raise_if_gone(error)
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
                at, before = self._at, _taken(transport_of(self._request))
                await asyncio.wait([waiting], timeout=STALLED)
                if not waiting.done() and self._at == at:
                    _give_up_idle(transport_of(self._request), before)
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
        self._at += _sent_at_once(transport_of(self._request), self._fd, self._at, self._cached - self._at)


async def read(fd: int, offset: int, length: int) -> Piece:
    """Return bytes of a file, at least one; in a thread if the first is not in the page cache. Raises DadiError."""
    piece: Piece | None = cached(fd, offset, length)
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
