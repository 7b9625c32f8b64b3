"""The place that a store's blobs take: who is in it, who uses what, and who goes when there is no room for more.

    held                  in use: a mount, a read, a write. Stays, whatever the limit
    not held              goes, the least recently used first, when the limit or the disk has no room for more
    gone                  forgotten at once; its files are removed by a thread of their own, and no later life of the
                          same blob begins before they are (`until_left`)

The limit is kept by reckoning: bytes that are here, and those that are being written (`reserved`). The disk says itself
when it is full: then what nobody uses goes, one blob after the other, until the write succeeds (`writing`), and waits
for each to be off the disk. All but what threads do is on the event loop.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import structlog

from dadi.blobs import files
from dadi.blobs.files import NO_SPACE, RAISE_LIMIT, full_or_broken
from dadi.blobs.layout import BlobDirectory
from dadi.blobs.stored import Stored
from dadi.errors import StoreFull

log = structlog.get_logger()
P = ParamSpec("P")
R = TypeVar("R")


class Room(msgspec.Struct, frozen=True):
    """An answer of `Space.room`. `free` bytes now; `evicted`: (digest, bytes) that would go, the oldest first."""

    free: int
    evicted: tuple[tuple[str, int], ...]
    enough: bool


class Space:
    """See the head of this file. `limit` in bytes, 0 for none; `clock`: seconds since 1970."""

    def __init__(self, root: Path, limit: int, clock: Callable[[], float]) -> None:
        self.root = root
        self.limit = limit
        self.clock = clock
        self.blobs: dict[str, Stored] = {}
        self.held: set[Stored] = set()
        """Those with `holds`: few, where there may be thousands of blobs."""
        self.bytes = 0
        """Of all chunks that are present or claimed."""
        self.evicted = 0
        self._coming = 0
        """Bytes that are being written."""
        self._leaving: dict[str, asyncio.Future[None]] = {}
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="store")
        # Of their own: a write that met a full disk waits in a thread of `_threads` until something was removed.
        self._removals = ThreadPoolExecutor(1, thread_name_prefix="store-removal")

    def __repr__(self) -> str:
        return f"Space({self.root}, {len(self.blobs)} blobs, {self.bytes} bytes)"

    def add(self, stored: Stored, used_at: float | None = None) -> Stored:
        """Take in a blob that has its files; it was used just now, or at `used_at`."""
        stored.used_at = self.clock() if used_at is None else used_at
        self.blobs[stored.blob.digest] = stored
        self.bytes += stored.bytes
        return stored

    # ---- in use

    @contextmanager
    def using(self, stored: Stored, *, touch: bool = True) -> Iterator[None]:
        """Inside, the blob is held; `touch`: it counts as used."""
        stored.holds += 1
        self.held.add(stored)
        if touch:
            stored.used_at = self.clock()
        try:
            yield
        finally:
            stored.holds -= 1
            if not stored.holds:
                self.held.discard(stored)

    # ---- room

    @contextmanager
    def reserved(self, more: int) -> Iterator[None]:
        """Inside, `more` bytes have their place under the limit, others were evicted for them if it took that.

        Raises StoreFull, and then evicts nothing, if they cannot fit.
        """
        if self.limit:
            in_use = sum(stored.bytes for stored in self.held)
            if in_use + self._coming + more > self.limit:
                why = f"the store's limit of {self.limit} bytes is reached by blobs in use"
                raise StoreFull(why, hint=RAISE_LIMIT)
            while self.bytes + self._coming + more > self.limit and self.evict_one() is not None:
                pass
        self._coming += more
        try:
            yield
        finally:
            self._coming -= more

    async def room(self, more: int, keep: Collection[str]) -> Room:
        """See `DiskBlobs.room`."""
        disk = (await self.run(shutil.disk_usage, self.root)).free
        free = min(disk, self.limit - self.bytes - self._coming) if self.limit else disk
        victims: list[tuple[str, int]] = []
        gain = 0
        loose = (stored for stored in self.blobs.values() if not stored.holds and stored.blob.digest not in keep)
        for stored in sorted(loose, key=lambda stored: stored.used_at):
            if free + gain >= more:
                break
            victims.append((stored.blob.digest, stored.bytes))
            gain += stored.bytes
        return Room(max(0, free), tuple(victims), free + gain >= more)

    # ---- who goes

    def evict_one(self) -> asyncio.Future[None] | None:
        """Discard the blob that was not used for longest; None if all are in use."""
        free = [stored for stored in self.blobs.values() if not stored.holds]
        if not free:
            return None
        victim = min(free, key=lambda stored: stored.used_at)
        log.info("evicted a blob", blob=victim.blob.digest, bytes=victim.bytes)
        self.evicted += 1
        return self.discard(victim)

    def discard(self, stored: Stored) -> asyncio.Future[None]:
        """Forget a blob that nobody holds; the future is done when its files are gone."""
        digest = stored.blob.digest
        del self.blobs[digest]
        self.bytes -= stored.bytes
        loop = asyncio.get_running_loop()
        gone = loop.run_in_executor(self._removals, files.remove, stored.directory)
        self._leaving[digest] = gone
        gone.add_done_callback(lambda done: self._left(digest, done))
        return gone

    def _left(self, digest: str, done: asyncio.Future[None]) -> None:
        if self._leaving.get(digest) is done:
            del self._leaving[digest]

    async def until_left(self, digest: str) -> None:
        """Wait until the files of an earlier life of this blob are gone."""
        leaving = self._leaving.get(digest)
        if leaving is not None:
            await asyncio.wait([leaving])

    # ---- threads

    async def run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run in a thread what reads, or what writes and cannot be tried again."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, lambda: function(*args, **kwargs))

    async def writing(
        self, directory: BlobDirectory, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Run `work`, which writes, in a thread; on a full disk evict what nobody uses and try again.

        Raises StoreFull, or Unavailable where the disk is broken.
        """
        while True:
            try:
                return await self.run(work, *args, **kwargs)
            except OSError as error:
                gone = self.evict_one() if error.errno in NO_SPACE else None
                if gone is None:
                    raise full_or_broken(directory.path, error) from None
                await gone

    def room_maker(self) -> Callable[[], bool]:
        """Return what a thread calls that met a full disk: it evicts one blob; False if there is none to evict."""
        loop = asyncio.get_running_loop()

        async def evict() -> bool:
            gone = self.evict_one()
            if gone is None:
                return False
            await gone
            return True

        return lambda: asyncio.run_coroutine_threadsafe(evict(), loop).result()

    def close(self) -> None:
        """Let end what still writes or removes; blocks for as long as that takes."""
        self._threads.shutdown()
        self._removals.shutdown()
