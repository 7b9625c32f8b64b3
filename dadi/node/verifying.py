"""`dadi verify` in a node that runs: the store is looked at piece by piece, and nobody is given what was found wrong.

    chunk wrong, its device lazy     withdrawn: the next read fetches it
    chunk wrong, its device local    withdrawn, the device read through us again (`Devices.demote`), the page cache
                                     dropped; backfill, or a repair, makes it whole and local again, in the same file
    blob that nobody uses            withdrawn: fetched when it is needed, or by a repair
    a local device over a file       whatever withdrew its chunks: as the second, each time it is looked
      that is not all here
    metadata of lowest layers        withdrawn, and made again here: nobody else has it

What a program has mapped or read before stays with it: it is said which images were concerned.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import structlog

from dadi.blobs.source import Urgency
from dadi.blobs.verifying import Checked, ReadingPace, verify
from dadi.errors import Conflict, DadiError
from dadi.node.backfill import pieces
from dadi.node.devices import BlobDevice, DeviceState
from dadi.node.in_kernel import in_kernel
from dadi.node.state_files import Damaged, check
from dadi.wire import Event

if TYPE_CHECKING:
    from dadi.node.node import Node

log = structlog.get_logger()
T = TypeVar("T")
_GIVE_UP = 30.0
"""Seconds for a source to give a piece of what is repaired."""
_TELL_EVERY = 1.0
"""Seconds between two events: a client gives up after ten minutes of silence."""
_DROP_EVERY = 5.0
"""Seconds at least between two times the page cache is dropped: it is the whole machine's."""

_HOLES = "its device reads a file that is not all right"


class Verifying:
    """One look at everything that a node keeps, at a time."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._running = asyncio.Lock()
        self._read = 0
        self._stale = False
        """The page cache may have bytes of files that were found wrong."""
        self._dropped_at = -_DROP_EVERY

    async def run(self, *, repair: bool, rate: float) -> AsyncGenerator[Event, None]:
        """Yield "progress" …, "bad" for each blob or file that is, "verified" with counts.

        `rate`: bytes a second that are read at most; 0: any. Raises Conflict if it runs already.
        """
        if self._running.locked():
            raise Conflict("this node is being verified already", hint="wait until that is done")
        async with self._running:
            node = self._node
            counts = {"blobs": 0, "bytes": 0, "bad_blobs": 0, "bad_chunks": 0, "repaired": 0, "bad_files": 0}
            total = node.store.statistics()["bytes"]
            self._read = 0
            async with contextlib.aclosing(_ticking(self._found(repair, rate))) as items:
                async for item in items:
                    if item is None:
                        await self._drop_stale(_DROP_EVERY)
                        yield {"event": "progress", "stage": "reading the store", "bytes": self._read, "total": total}
                        continue
                    checked, event = item
                    counts["blobs"] += checked.why != _HOLES  # that blob was looked at before
                    counts["bytes"] += checked.bytes
                    if event is not None:
                        counts["bad_blobs"] += 1
                        counts["bad_chunks"] += len(checked.bad)
                        counts["repaired"] += event["repaired"]
                        yield event
            for damaged in await asyncio.to_thread(check, Path(node.config.state)):
                counts["bad_files"] += 1
                yield bad_file(damaged)
            yield {"event": "verified", **counts}

    async def _found(self, repair: bool, rate: float) -> AsyncGenerator[tuple[Checked, Event | None], None]:
        """Yield each blob that was looked at, with the event for one that is bad, when all is done about it."""
        node = self._node
        bad = set()
        async with contextlib.aclosing(verify(node.store, ReadingPace(rate), self._on_bytes)) as blobs:
            async for checked in blobs:
                if checked.why:
                    bad.add(checked.blob.digest)
                yield checked, await self._bad(checked, repair) if checked.why else None
        for device in node.devices.all():
            blob = node.store.find(device.blob.digest)
            if device.state is not DeviceState.LOCAL or blob is None or node.store.has(blob.digest):
                continue
            if blob.digest not in bad:  # its chunks were withdrawn, and the device was not told, or could not be
                missing = tuple(await node.store.missing(blob))
                checked = Checked(blob, 0, missing, _HOLES)
                yield checked, await self._bad(checked, repair)
        await self._drop_stale()

    def _on_bytes(self, length: int) -> None:
        self._read += length

    async def _drop_stale(self, every: float = 0.0) -> None:
        if self._stale and time.monotonic() - self._dropped_at >= every:
            self._stale, self._dropped_at = False, time.monotonic()
            await in_kernel(_drop_page_cache)

    async def _bad(self, checked: Checked, repair: bool) -> Event:
        digest = checked.blob.digest
        self._node.fallbacks.note("wrong bytes on the disk", f"{digest}: {checked.why}")
        device = next((device for device in self._node.devices.all() if device.blob.digest == digest), None)
        thrown_away = checked.bad or self._node.store.find(digest) is None
        outcome, repaired = "fetched again when it is needed" if thrown_away else "left as it is", False
        try:
            if checked.bad and await self._node.devices.demote(digest):
                outcome = "read through dadi-node until it is whole again"
            if device is not None:
                self._stale = True
                self._node.backfill.wake()
            if checked.bad and device is not None and await self._node.mounts.metadata_again(digest):
                await self._whole_again(device)
                outcome, repaired = "made again", True
            elif repair and checked.bad:
                async with asyncio.timeout(None) as limit:
                    await self._fetch(checked, device, limit)
                outcome, repaired = "repaired", True
        except TimeoutError:
            outcome += f"; no source has given it within {_GIVE_UP:.0f} s"
        except DadiError as error:
            outcome += f"; {error.message}"
        images = [row["reference"] for row in self._node.mounts.statistics()
                  if digest in (each["blob"] for each in row["devices"])]  # fmt: skip
        return {**bad_blob(checked), "images": images, "outcome": outcome, "repaired": repaired}

    async def _fetch(self, checked: Checked, device: BlobDevice | None, limit: asyncio.Timeout) -> None:
        """Have what was withdrawn here again, and the whole complete if no more is missing."""
        node = self._node
        loop = asyncio.get_running_loop()
        blob = checked.blob
        mine = sorted(set(checked.bad) & set(await node.store.missing(blob)))
        try:
            for run in pieces(blob, mine):
                limit.reschedule(loop.time() + _GIVE_UP)
                await node.chain.read(blob, run, Urgency.BACKFILL)
        except DadiError:
            if device is not None:
                raise
            # An index: nodes have them whole.
            limit.reschedule(loop.time() + _GIVE_UP)
            await node.store.put(await node.upstream.whole(blob.digest, blob.size))
        limit.reschedule(None)
        if await node.store.missing(blob):
            if set(checked.bad) & set(await node.store.missing(blob)):
                raise Conflict("it came, and could not be kept")
            return
        if device is not None:
            await self._whole_again(device)
        else:
            await node.store.finish(blob)

    async def _whole_again(self, device: BlobDevice) -> None:
        await self._node.devices.complete(device)
        if device.state is DeviceState.BROKEN or device.error:
            raise Conflict(device.error or "the device is broken")


async def _next(work: AsyncGenerator[T, None]) -> T | None:
    return await anext(work, None)


async def _ticking(work: AsyncGenerator[T, None]) -> AsyncGenerator[T | None, None]:
    """Yield what `work` does, and None every `_TELL_EVERY` seconds, however long it takes."""
    due = 0.0
    async with contextlib.aclosing(work):
        while True:
            step = asyncio.create_task(_next(work))
            try:
                while not step.done():
                    now = time.monotonic()
                    if now >= due:
                        due = now + _TELL_EVERY
                        yield None
                    await asyncio.wait({step}, timeout=max(0.0, due - now))
            finally:
                step.cancel()
                await asyncio.gather(step, return_exceptions=True)
            item = step.result()
            if item is None:
                return
            yield item


def bad_blob(checked: Checked) -> dict[str, Any]:
    """Return the event for a blob that is not as it should be."""
    return {"event": "bad", "blob": checked.blob.digest, "chunks": list(checked.bad)[:1000],
            "bad_chunks": len(checked.bad), "why": checked.why}  # fmt: skip


def bad_file(damaged: Damaged) -> dict[str, Any]:
    """Return the event for a file that is not as it should be."""
    return {"event": "bad", "file": str(damaged.path), "why": damaged.why, "outcome": "left as it is"}


def _drop_page_cache() -> None:
    """Have the kernel forget what it has read of mounted images, as far as nobody has it mapped; see proc_sys_vm(5)."""
    try:
        Path("/proc/sys/vm/drop_caches").write_text("1")
    except OSError as error:
        log.error("the page cache cannot be dropped: it may have wrong bytes until it needs the room", why=str(error))
