"""Mounts over a restart: what stood is adopted, what did not is mounted anew, what was half done is undone or ended.

    record says ""              still there: adopted, lazy or local (`Devices.stands`); else mounted anew; cannot be
                                yet: lost, and tried again every 10 s
    "mounting", "unmounting"    undone or ended, as `mount_steps.py` has it, in the background: it may wait for reads
                                that wait for upstream

`restore` once, at the start; `retry` from then on.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.errors import Conflict, DadiError, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.node import kernel
from dadi.node.devices import Devices
from dadi.node.in_kernel import in_kernel
from dadi.node.mount_steps import MountSteps
from dadi.node.mount_table import Lost, Mount, MountTable
from dadi.node.records import MountRecord, MountRecords

log = structlog.get_logger()
_RETRY_EVERY = 10.0
_LOOK_EVERY = 0.1
"""Seconds: between two tries to restore a mount; between two looks at what a process that is dying may still do."""


class Restoring:
    """See the head of this file."""

    def __init__(self, table: MountTable, steps: MountSteps, records: MountRecords, store: DiskBlobs, devices: Devices,
                 fallbacks: Fallbacks, *, predecessor_is_dying: Callable[[], bool], on_mount: Callable[[], None],
                 spawn: Callable[[Coroutine[Any, Any, None]], object]) -> None:  # fmt: skip
        """`predecessor_is_dying`: whether calls of an earlier process, which was killed, may still be in the kernel;
        `on_mount`: told when there is something new; `spawn`: begins a task of `Mounts`."""
        self._table = table
        self._steps = steps
        self._records = records
        self._store = store
        self._devices = devices
        self._fallbacks = fallbacks
        self._predecessor_is_dying = predecessor_is_dying
        self._on_mount = on_mount
        self._spawn = spawn
        self.adopted = 0
        """How many mounts of an earlier process still stood."""

    def __repr__(self) -> str:
        return f"Restoring({self._table!r}, {self.adopted} adopted)"

    async def restore(self) -> None:
        """Have what was mounted before this process mounted again; what cannot be yet is tried again by `retry`."""
        records = await self._records.all()
        with contextlib.ExitStack() as holds:
            for record in records:
                # First all of them: making one mount must not evict what another one needs.
                await self._hold_what_is_here(record, holds)
            finished = [record for record in records if not record.step]
            # First what stands: its devices must not be made a second time for another image.
            anew = [record for record in finished if not await self._adopted(record)]
            for record in anew:
                await self._restored(record)
        self._table.unfinished.update({record.directory: record for record in records if record.step})
        for record in list(self._table.unfinished.values()):
            self._spawn(self._end(record))
        await self._steps.end_left()
        for device in self._devices.lazy():
            if self._store.has(device.blob.digest):
                await self._devices.complete(device)  # the last of it came, but nobody was left to swap it
        if self._table.standing:
            self._on_mount()

    async def retry(self) -> None:
        """Try again, every now and then, what could not be restored; runs until it is cancelled."""
        while True:
            await asyncio.sleep(_RETRY_EVERY)
            for record, _ in list(self._table.lost.values()):
                lost = self._table.lost.get(record.directory)
                if lost is None or lost.record is not record:
                    continue  # unmounted meanwhile
                try:
                    restored = await self._restored(record)
                except Conflict:
                    continue  # somebody is at it
                except Exception as error:  # a mistake of ours must not end it for all mounts
                    await asyncio.to_thread(log.error, "could not restore a mount", exc_info=error)
                    continue
                if restored:
                    self._table.lost.pop(record.directory, None)
                    await self._steps.end_left()
                    self._on_mount()

    async def again(self, record: MountRecord) -> Mount:
        """Mount anew what could not be restored. Raises Unavailable, with what is wrong, if it still cannot be."""
        if not await self._restored(record):
            why = self._table.lost[record.directory].why
            hint = f"it is tried again every {_RETRY_EVERY:.0f} s; `dadi umount` gives it up"
            raise Unavailable(f"{record.answer.reference} cannot be mounted at {record.directory}: {why}", hint=hint)
        self._table.lost.pop(record.directory, None)
        return self._table.standing[record.directory]

    async def _hold_what_is_here(self, record: MountRecord, holds: contextlib.ExitStack) -> None:
        try:
            await self._steps.hold_what_is_here(record, holds)
        except (DadiError, OSError) as error:  # `_restored` says what becomes of it
            log.warning("an image index cannot be read", directory=record.directory, why=str(error))

    async def _adopted(self, record: MountRecord) -> bool:
        with self._table.alone(record.directory):
            try:
                mount = await self._steps.adopt(record)
            except (DadiError, OSError) as error:
                log.warning("a mount cannot be adopted", directory=record.directory, why=str(error))
                return False  # `_restored` says what becomes of it
        if mount is not None:
            self.adopted += 1
            log.info("adopted", image=record.answer.reference, directory=record.directory, state=mount.state)
        return mount is not None

    async def _restored(self, record: MountRecord) -> bool:
        """Adopt it, or mount it anew; if neither can be it is lost: noted, returned as False."""
        with self._table.alone(record.directory):
            try:
                mount = await self._steps.adopt(record)
                if mount is None:
                    with contextlib.ExitStack() as holds:
                        # Before anything is unmounted: what stands there may still be of use.
                        index = await self._steps.fetch(record, holds)
                        await in_kernel(kernel.umount_all, record.directory)
                        mount = await self._steps.attach(record, index, recorded=True)
                        mount.holds = holds.pop_all()
            except (DadiError, OSError) as error:
                self._table.lost[record.directory] = Lost(record, str(error))
                self._fallbacks.note("mount not restored", f"{record.directory}: {error}")
                return False
        log.info("restored", image=record.answer.reference, directory=record.directory, state=mount.state)
        return True

    async def _end(self, record: MountRecord) -> None:
        """Undo a mount that was being made, or end one that was being unmounted, when a process was killed."""
        try:
            with self._table.alone(record.directory):
                stays = await self._ended_but_in_use(record)
                if not stays:
                    await self._steps.forget(record.directory)
            log.warning("a killed process was at it", directory=record.directory, step=record.step, stays=stays)
            if stays:
                await self._steps.write_step(record, "")
                record = msgspec.structs.replace(record, step="")
                if await self._adopted(record) or await self._restored(record):
                    self._on_mount()
        except DadiError as error:
            log.error("could not end what a killed process had begun", directory=record.directory, why=str(error))
        finally:
            self._table.unfinished.pop(record.directory, None)
            await self._steps.end_left()

    async def _ended_but_in_use(self, record: MountRecord) -> bool:
        """Unmount it; say whether it is in use, which what asked for it would have been told, and stays therefore."""
        in_use, dying = False, True
        while dying:
            # A process that is not gone yet may be in the middle of mount(2): it is looked once more after it.
            dying = record.step == "mounting" and self._predecessor_is_dying()
            if await self._steps.still_stands(record):
                try:
                    await in_kernel(kernel.umount, record.directory, detach=record.step == "mounting")
                except Conflict:
                    in_use = True
            if dying:
                await asyncio.sleep(_LOOK_EVERY)
        return in_use
