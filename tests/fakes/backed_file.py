"""A `fuse.device.BackedFile` over a temporary file: bytes not marked present are zeros there, as in a store."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

from dadi.errors import DadiError


class FakeFile:
    """`content` as a file of which the chunks `present` are on disk; the others come from `read`.

    `asked` are the reads so far; `arrivals` is released at each; they wait while `go` is cleared, then raise `error`
    if there is one; `cut` bytes are missing from what they give; `cancelled` counts those that were cancelled.
    """

    def __init__(self, path: Path, content: bytes, present: set[int] | None = None, *, chunk_shift: int = 12) -> None:
        self.name, self.content, self.size, self.chunk_shift = path.name, content, len(content), chunk_shift
        self.path, chunk = path, 1 << chunk_shift
        count = -(-len(content) // chunk)
        self.present = bytearray(int(present is None or index in present) for index in range(count))
        self.touched = bytearray(count)
        self.asked: list[tuple[int, int]] = []
        self.arrivals = asyncio.Semaphore(0)
        self.go = asyncio.Event()
        self.go.set()
        self.error: Exception | None = None
        self.cut = self.cancelled = 0
        self.fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        os.ftruncate(self.fd, self.size)
        for index in range(count):
            if self.present[index]:
                os.pwrite(self.fd, content[index * chunk : (index + 1) * chunk], index * chunk)

    def keep(self, chunk: int) -> None:
        """Write a chunk and mark it present, as a store does."""
        size = 1 << self.chunk_shift
        os.pwrite(self.fd, self.content[chunk * size : (chunk + 1) * size], chunk * size)
        self.present[chunk] = 1

    async def read(self, offset: int, length: int) -> bytes:
        """See `BackedFile.read`."""
        self.asked.append((offset, length))
        self.arrivals.release()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            self.arrivals.release()
            raise
        if self.error:
            raise self.error
        return self.content[offset : offset + length - self.cut]

    async def reads(self, count: int) -> None:
        """Return when `count` more reads have come (or been cancelled)."""
        async with asyncio.timeout(30):
            for _ in range(count):
                await self.arrivals.acquire()

    def close(self) -> None:
        """Close the local file; idempotent."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)


class Broken(DadiError):
    """An error with an errno of its own."""

    errno = 71
