"""Everything that a store says it has, looked at on the disk: chunks by the chunk table, complete blobs as a whole.

    a chunk is wrong                      it is withdrawn: missing from now on
    all chunks right, the whole wrong     the table lied: all of it is withdrawn
    chunks wrong, the whole right         the table on the disk is damaged: thrown away, or said where it is in use

Nothing is fetched here. Blobs that come meanwhile are not looked at; one that goes is left out.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable

import msgspec

from dadi.blobs import files
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.single_flight import runs
from dadi.errors import DadiError
from dadi.index.chunks import Blob

_RUN = 4 << 20
"""Bytes that are read and hashed by one call in a thread."""


class Checked(msgspec.Struct):
    """What was found of one blob. `bad`: chunks that were withdrawn; `why`: "" if all is well; bytes were looked at."""

    blob: Blob
    bytes: int
    bad: tuple[int, ...] = ()
    why: str = ""


class ReadingPace:
    """At most `rate` bytes a second (0: any)."""

    def __init__(self, rate: float, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:  # fmt: skip
        self._rate, self._clock, self._sleep = rate, clock, sleep
        self._next = 0.0

    async def keep(self, length: int) -> None:
        """Wait until `length` bytes more may be read."""
        if not self._rate:
            return
        now = self._clock()
        if self._next > now:
            await self._sleep(self._next - now)
        self._next = max(now, self._next) + length / self._rate


async def verify(store: DiskBlobs, pace: ReadingPace, on_bytes: Callable[[int], None]) -> AsyncGenerator[Checked, None]:
    """Yield each blob as it was found; what is bad has been withdrawn by then. `on_bytes` is told of each piece."""
    for digest in sorted(store.digests()):
        blob = store.find(digest)
        if blob is None:
            continue  # evicted meanwhile
        try:
            with store.hold(blob, touch=False):
                checked, table_damaged = await _check(store, blob, pace, on_bytes)
        except DadiError as error:
            checked, table_damaged = Checked(blob, 0, (), error.message), False
        if table_damaged and await store.remove(digest):
            checked.why += ": thrown away"
        yield checked


async def _check(
    store: DiskBlobs, blob: Blob, pace: ReadingPace, on_bytes: Callable[[int], None]
) -> tuple[Checked, bool]:
    complete, path, looked = store.has(blob.digest), store.data_path(blob), 0
    whole = hashlib.sha256() if complete else None
    bad: list[int] = []
    step = max(1, _RUN // blob.table.chunk_size)
    for at in range(0, blob.table.count, step):
        for run in runs(store.believed(blob, range(at, min(at + step, blob.table.count)))):
            _, length = blob.table.span(run)
            await pace.keep(length)
            # What an unclean stop left is hashed by this, and dropped where it is wrong.
            missing = set(await store.missing(blob, run))
            wrong = await asyncio.to_thread(files.bad_chunks, path, blob, run, whole)
            bad += sorted(missing.union(wrong))
            looked += length
            on_bytes(length)
    right = whole is None or f"sha256:{whole.hexdigest()}" == blob.digest
    if bad and whole is not None and right:
        return Checked(blob, looked, (), "its chunk table on the disk is damaged, its bytes are right"), True
    why = ""
    if bad:
        why = f"{len(bad)} of {blob.table.count} chunks are not what they should be"
    elif not right:
        why, bad = "all chunks match their table, the whole does not match its digest", list(range(blob.table.count))
    if bad:
        try:
            await store.withdraw(blob, bad)
        except DadiError as error:
            why += f"; {error.message}"
    return Checked(blob, looked, tuple(bad), why), False
