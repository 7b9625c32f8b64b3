"""`dadi verify` in a node that runs: the store is looked at piece by piece, and nobody is given what was found wrong.

    chunk wrong, its device lazy     withdrawn: the next read fetches it
    chunk wrong, its device local    withdrawn, the device read through us again (`Devices.demote`), the page cache
                                     dropped; backfill, or a repair, makes it whole and local again, in the same file
    blob that nobody uses            withdrawn: fetched when it is needed, or by a repair

What a program has mapped or read before stays with it: it is said which images were concerned.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import structlog

from dadi.blobs.source import Urgency
from dadi.blobs.verifying import Checked, Pace, verify
from dadi.errors import Conflict, DadiError
from dadi.node.backfill import pieces
from dadi.node.devices import Device, DeviceState
from dadi.node.in_kernel import in_kernel
from dadi.node.state_files import Damaged, check
from dadi.wire import Event

if TYPE_CHECKING:
    from dadi.node.node import Node

log = structlog.get_logger()
_GIVE_UP = 30.0
"""Seconds for a source to give a piece of what is repaired."""
_TELL_EVERY = 64 << 20
"""Bytes between two events."""


class Verifying:
    """One look at everything that a node keeps, at a time."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._running = asyncio.Lock()

    async def run(self, *, repair: bool, rate: float) -> AsyncGenerator[Event, None]:
        """Yield "progress" …, "bad" for each blob or file that is, "verified" with counts.

        `rate`: bytes a second that are read at most; 0: any. Raises Conflict if it runs already.
        """
        if self._running.locked():
            raise Conflict("this node is being verified already", hint="wait until that is done")
        async with self._running:
            node = self._node
            counts = {"blobs": 0, "bytes": 0, "bad_blobs": 0, "bad_chunks": 0, "repaired": 0, "bad_files": 0}
            total, told = node.store.statistics()["bytes"], -_TELL_EVERY
            done = 0

            def on_bytes(length: int) -> None:
                nonlocal done
                done += length

            async for checked in verify(node.store, Pace(rate), on_bytes):
                counts["blobs"] += 1
                counts["bytes"] += checked.bytes
                if checked.why:
                    event = await self._bad(checked, repair)
                    counts["bad_blobs"] += 1
                    counts["bad_chunks"] += len(checked.bad)
                    counts["repaired"] += event["repaired"]
                    yield event
                if done - told >= _TELL_EVERY:
                    told = done
                    yield {"event": "progress", "stage": "reading the store", "bytes": done, "total": total}
            for damaged in await asyncio.to_thread(check, Path(node.config.state)):
                counts["bad_files"] += 1
                yield bad_file(damaged)
            yield {"event": "verified", **counts}

    async def _bad(self, checked: Checked, repair: bool) -> Event:
        digest = checked.blob.digest
        self._node.fallbacks.note("wrong bytes on the disk", f"{digest}: {checked.why}")
        device = next((device for device in self._node.devices.all() if device.blob.digest == digest), None)
        outcome, repaired = "fetched again when it is needed", False
        try:
            if checked.bad and await self._node.devices.demote(digest):
                outcome = "read through dadi-node until it is whole again"
            if device is not None:
                await in_kernel(_drop_page_cache)
                self._node.backfill.wake()
            if repair and checked.bad:
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

    async def _fetch(self, checked: Checked, device: Device | None, limit: asyncio.Timeout) -> None:
        """Have what was withdrawn here again, and the whole complete if no more is missing."""
        node = self._node
        loop = asyncio.get_running_loop()
        blob = device.blob if device else checked.blob
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
            await node.devices.complete(device)
            if device.state is DeviceState.BROKEN or device.error:
                raise Conflict(device.error or "the device is broken")
        else:
            await node.store.finish(blob)


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
