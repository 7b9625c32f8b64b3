"""Reads the body of an answer in exact lengths, or frame by frame, as it comes, and keeps its request alive meanwhile.

What the bytes are is for `line.py` to say.
"""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import aiohttp

from dadi.errors import DigestMismatch
from dadi.peers.frames import Scan, longest

_WAKE = 128 << 10
"""Bytes for which the event loop is woken while more of a chunk than that is to come: a link gives a few KiB at a time,
and each time costs as much as ten KiB do."""


class Alive:
    """Puts off the end of a request (a time-out of `seconds`) while bytes come."""

    def __init__(self, limit: asyncio.Timeout, seconds: float | None) -> None:
        self._limit = limit
        self._seconds = seconds
        self._loop = asyncio.get_running_loop()
        self._put_off_at = self._loop.time()

    def came(self) -> None:
        """Bytes have come. Looked at from time to time only: a timer costs more than what is done with the bytes."""
        now = self._loop.time()
        if self._seconds is not None and now - self._put_off_at > self._seconds / 16:
            self._put_off_at = now
            self._limit.reschedule(now + self._seconds)


class Body:
    """Reads exact lengths; the event loop is not woken for each few KiB of what is to be had whole."""

    def __init__(self, response: aiohttp.ClientResponse, alive: Alive) -> None:
        self._content = response.content
        self._alive = alive
        self._rest = b""
        self._low = 1
        transport = response.connection.transport if response.connection else None
        # Not under TLS: how much of a length is still to come, in its records, is not known here.
        plain = transport is not None and transport.get_extra_info("sslcontext") is None
        self._socket: Any = transport.get_extra_info("socket") if transport is not None and plain else None

    async def exactly(self, length: int) -> bytes:
        """Return the next `length` bytes; raise ClientPayloadError if there are not so many."""
        pieces, need = [], length
        try:
            while need > 0:
                piece = self._rest or await self._read(need)
                if len(piece) > need:
                    piece, self._rest = piece[:need], piece[need:]
                else:
                    self._rest = b""
                pieces.append(piece)
                need -= len(piece)
        finally:
            self._wake_at(1)  # else what is shorter would never be seen, of the next request neither
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def _read(self, need: int) -> bytes:
        self._wake_at(min(need, _WAKE))
        piece = await self._content.readany()
        if not piece:
            raise aiohttp.ClientPayloadError(f"body cut short: {need} more bytes were to come")
        self._alive.came()
        return piece

    async def more(self) -> bool:
        """Say whether there is more, where the end should be."""
        return bool(self._rest or await self._content.read(1))

    def _wake_at(self, size: int) -> None:
        """Have the kernel wake us for so many bytes (or the end), of which all are still to be read from it."""
        if self._socket is None or size == self._low:
            return
        self._low = size
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, size)
        except OSError:  # closed by now
            self._socket = None


class FrameBody:
    """Cuts a body into frames as it comes."""

    def __init__(self, response: aiohttp.ClientResponse, where: str, alive: Alive) -> None:
        self._content = response.content
        self._alive = alive
        self._where = where
        self.rest = bytearray()

    async def next(self, length: int) -> bytes:
        """Return the next frame, of a chunk of `length` bytes."""
        try:
            scan = Scan(longest(length))
            while (end := scan.end(self.rest)) is None:
                piece = await self._content.readany()
                if not piece:
                    raise aiohttp.ClientPayloadError("body cut short, within a frame")
                self._alive.came()
                self.rest += piece
        except DigestMismatch as error:
            raise DigestMismatch(f"{self._where}: {error.message}", source=self._where) from None
        frame = bytes(memoryview(self.rest)[:end])
        del self.rest[:end]
        return frame
