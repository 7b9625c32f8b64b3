"""Mounts of images, the way in: mount, unmount, what is mounted. The only thing of the mounts that others talk to.

    mount, ensure    a path that anybody gives; a directory that is the snapshotter's alone
    unmount          plain: as umount(8), EBUSY while it is used; forced: waiting reads fail with EIO, it is detached
    restore, retry   after a restart: `restoring.py`
    settle, close    the end of this process: which mounts stay without it

What a mount is made of, and in which order that is undone: the table in `mount_steps.py`. Which mounts there are:
`mount_table.py`. What of them is on disk: `records.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.errors import Conflict, DadiError, Malformed, NotFound
from dadi.fallbacks import Fallbacks
from dadi.index.image import ImageIndex
from dadi.node import kernel
from dadi.node.devices import Devices, DeviceState
from dadi.node.in_kernel import in_kernel
from dadi.node.metadata import ImageMetadata
from dadi.node.mount_steps import MountSteps, is_ours
from dadi.node.mount_table import Mount, MountTable
from dadi.node.records import MountRecord, MountRecords
from dadi.node.restoring import Restoring
from dadi.peers.superpeer import ImageAnswer, Upstream, image_answer
from dadi.wire import Event

log = structlog.get_logger()
T = TypeVar("T")


_LET_FINISH = 10.0
"""Seconds for mounts that are being made when we stop, and for an unmount that a forced one finds under way."""


class Mounts:
    """All mounts of this node."""

    def __init__(self, records: MountRecords, store: DiskBlobs, devices: Devices, upstream: Upstream,
                 fallbacks: Fallbacks, *, on_index: Callable[[ImageIndex], None],
                 admit: Callable[[ImageIndex], None], on_start: Callable[[ImageIndex, asyncio.Event], None],
                 on_mount: Callable[[], None], predecessor_is_dying: Callable[[], bool]) -> None:  # fmt: skip
        """What others want to know of a mount, in this order.

        `on_index`: told of an image whose blobs are about to be read. `admit`: raises if it must not be mounted now.
        `on_start`: told of one that is being mounted, all of it and not again, as soon as its metadata is here; the
        event is set when the mount is made, or given up. `on_mount`: told when there is something new.
        `predecessor_is_dying`: whether calls of an earlier process, which was killed, may still be in the kernel.
        """
        self._devices = devices
        self._upstream = upstream
        self._fallbacks = fallbacks
        self._on_start = on_start
        self._on_mount = on_mount
        self.admit = admit
        self._tasks: set[asyncio.Task[Any]] = set()
        self.metadata = ImageMetadata(store, upstream, fallbacks, on_index)
        self.table = MountTable()
        self._steps = MountSteps(self.table, records, store, devices, self.metadata, fallbacks)
        self._restoring = Restoring(self.table, self._steps, records, store, devices, fallbacks, spawn=self._task,
                                    on_mount=on_mount, predecessor_is_dying=predecessor_is_dying)  # fmt: skip

    def __repr__(self) -> str:
        return f"Mounts({self.table!r})"

    # ---- mounting

    async def mount(self, reference: str, directory: str, platform: str) -> AsyncGenerator[Event, None]:
        """Mount an image at a normalised path; yield "progress" events, at last "mounted" with its row of the status.

        Raises NotFound, Conflict, what upstream raises, and what the kernel refuses.
        """
        directory = await real_path(directory)
        if not await asyncio.to_thread(os.path.isdir, directory):
            raise NotFound(f"{directory} is not a directory", hint="create it first")
        self.table.check_free(directory)
        answer: ImageAnswer | None = None
        async for event in self._upstream.resolve(reference, platform):
            if event.get("event") == "image":
                answer = image_answer(event)
            else:
                yield event
        if answer is None:
            hint = "its log may; are the versions alike?"
            raise Malformed(f"the superpeer did not say what {reference} is", hint=hint)
        yield {"event": "progress", "stage": "fetching metadata"}
        # A task of our own: a client that goes away in the middle must not leave half a mount.
        mount = await asyncio.shield(self._task(self._make(MountRecord(directory, answer))))
        self._on_mount()
        log.info("mounted", image=answer.reference, directory=directory, state=mount.state)
        yield {"event": "mounted", **self._row(mount)}

    async def ensure(self, answer: ImageAnswer, directory: str, layers: int) -> None:
        """Have the lowest `layers` layers (0: all) of a resolved image mounted; nothing to do if they are.

        Raises what `mount` raises; Conflict also if something else of ours is mounted there.
        """
        directory = await real_path(directory)
        self.table.check_idle(directory)
        mount = self.table.standing.get(directory)
        if mount is not None:
            if (mount.record.answer.index_digest, mount.record.layers) != (answer.index_digest, layers):
                raise Conflict(f"{mount.record.answer.reference} is mounted at {directory} already",
                               hint="`dadi umount` it, if nobody needs it there")  # fmt: skip
            if await self._stands(mount.record):
                return
        mount = await asyncio.shield(self._task(self._ensured(MountRecord(directory, answer, layers=layers))))
        self._on_mount()
        log.info("mounted", image=answer.reference, directory=directory, layers=layers, state=mount.state)

    async def _ensured(self, record: MountRecord) -> Mount:
        """Mount at a directory that is ours alone, whatever an earlier process or somebody else has done there."""
        lost = self.table.lost.get(record.directory)
        if lost is not None:
            return await self._restoring.again(lost.record)
        gone = self.table.standing.get(record.directory)
        if gone is not None:
            self._fallbacks.note("mount was gone, mounted again", record.directory)
            await self._steps.gone(gone)
        there = await in_kernel(kernel.mounted_at, record.directory)
        if there is not None:
            if there.kind != "erofs":
                raise _other(record.directory, there)
            await in_kernel(kernel.umount_all, record.directory)  # of a process that was killed before its record
        return await self._make(record)

    async def _stands(self, record: MountRecord) -> bool:
        """Whether the image is still what is mounted there; raise Conflict if something else is."""
        there = await in_kernel(kernel.mounted_at, record.directory)
        if there is not None and not is_ours(record, there):
            raise _other(record.directory, there)
        return there is not None

    async def _make(self, record: MountRecord) -> Mount:
        with self.table.alone(record.directory):
            self.table.check_free(record.directory)
            made = asyncio.Event()
            with contextlib.ExitStack() as holds:
                holds.callback(made.set)
                index = await self._steps.fetch(record, holds, admit=self.admit)
                if not record.layers:
                    self._on_start(index, made)
                lost = self.table.lost.get(record.directory)
                while lost is not None and await self._steps.still_stands(lost.record):
                    await in_kernel(kernel.umount, record.directory, detach=True)
                mount = await self._steps.attach(record, index)
                made.set()
                mount.holds = holds.pop_all()
            if lost is not None:
                await self._steps.end_left()  # its devices are not wanted any more
            return mount

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # ---- unmounting

    async def unmount(self, directory: str, *, force: bool = False) -> None:
        """Unmount (a normalised path). Raises NotFound if nothing of ours is there, Conflict if it is in use."""
        # A task of our own, as for a mount.
        await asyncio.shield(self._task(self._unmount(await real_path(directory), force)))

    async def _unmount(self, directory: str, force: bool) -> None:
        if force and (standing := self.table.standing.get(directory)) is not None:
            for device in standing.devices:
                self._devices.abort(device)
            await self.table.until_idle(directory, _LET_FINISH)  # who unmounts it already has waited for those reads
            if directory not in self.table.standing:
                return
        with self.table.alone(directory):
            if directory in self.table.lost:
                await self._unmount_lost(directory, force)
                return
            mount = self.table.standing.get(directory)
            if mount is None:
                raise NotFound(f"no image is mounted at {directory}", hint="`dadi status` lists the mounts")
            there = await in_kernel(kernel.mounted_at, directory)
            if there is not None and is_ours(mount.record, there):
                await self._steps.write_step(mount.record, "unmounting")
                try:
                    await self._steps.umount(directory, force=force)
                except BaseException:
                    await self._steps.write_step(mount.record, "")
                    raise
            elif there is not None and not force:
                raise _other(directory, there)
            await self._steps.gone(mount)
            log.info("unmounted", image=mount.record.answer.reference, directory=directory, forced=force)

    async def _unmount_lost(self, directory: str, force: bool) -> None:
        """Take away what could not be restored, and what of it still stands."""
        lost = self.table.lost.pop(directory)
        try:
            if force:
                await self._steps.end_left()  # nothing wants its devices now: the reads that wait for them fail
            if await self._steps.still_stands(lost.record):
                await self._steps.umount(directory, force=force)
        except BaseException:
            self.table.lost[directory] = lost
            raise
        await self._steps.forget(directory)
        await self._steps.end_left()
        log.info("dropped", image=lost.record.answer.reference, directory=directory, forced=force)

    # ---- restarts, and the end

    async def restore(self) -> None:
        """Have what was mounted before this process mounted again; what cannot be yet is tried again by `retry`."""
        await self._restoring.restore()

    async def retry(self) -> None:
        """Try again, every now and then, what could not be restored; runs until it is cancelled."""
        await self._restoring.retry()

    async def settle(self) -> None:
        """Let end what is being mounted or unmounted, or cut it short."""
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LET_FINISH)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._devices.settle(_LET_FINISH)

    async def close(self, *, unmount: bool, lazy_stay: bool) -> None:
        """Leave local mounts standing (unless `unmount`), and lazy ones if `lazy_stay`; unmount the others.

        Their records stay: the next process mounts them again.
        """
        for mount in list(self.table.standing.values()):
            directory = mount.record.directory
            mount.holds.close()
            if lazy_stay or (mount.state == "local" and not unmount):
                for device in mount.devices:
                    await self._devices.release(device)
                continue
            for device in mount.devices:
                self._devices.abort(device)
            try:
                await self._steps.umount(directory, force=True)
            except DadiError as error:
                log.error("could not unmount", directory=directory, why=str(error))
            for device in mount.devices:
                await self._devices.release(device)
        self.table.standing.clear()

    # ---- state

    @property
    def adopted(self) -> int:
        """How many mounts of an earlier process still stood."""
        return self._restoring.adopted

    def lost(self) -> list[str]:
        """Say of each mount that could not be restored where it is, and why."""
        return [f"the mount at {directory} is lost: {lost.why}" for directory, lost in self.table.lost.items()]

    async def metadata_again(self, digest: str) -> bool:
        """Make the metadata of the lowest layers of an image again, which nobody else has; say whether it is such.

        The store must lack some of it. Raises what upstream raises.
        """
        for mount in list(self.table.standing.values()):
            if mount.record.layers and mount.index.metadata.digest == digest:
                index = await self.metadata.index(mount.record.answer)
                with contextlib.ExitStack() as holds:
                    await self.metadata.prefix(index, mount.record.layers, holds)
                return True
        return False

    def settled(self) -> bool:
        """Say whether nothing is being mounted or unmounted."""
        return not (self._tasks or self.table.busy)

    def lazy(self) -> list[Mount]:
        """Return the mounts that may still need upstream."""
        return [mount for mount in self.table.standing.values() if mount.state != str(DeviceState.LOCAL.value)]

    def statistics(self) -> list[dict[str, Any]]:
        """Return a row for each mount, and for each that could not be restored (state "lost", with its error)."""
        return [self._row(mount) for mount in self.table.standing.values()] + self.table.lost_rows()

    def _row(self, mount: Mount) -> dict[str, Any]:
        answer, index = mount.record.answer, mount.index
        rows = self._devices.rows([index.metadata, *index.device_blobs()])
        return {
            "reference": answer.reference,
            "platform": answer.platform,
            "manifest_digest": answer.manifest_digest,
            "directory": mount.record.directory,
            "state": mount.state,
            "layers": len(index.layers),
            "index_origin": index.origin,
            "compressed_bytes": index.layers_size,
            "unpacked_bytes": index.unpacked_size,
            "bytes": sum(row["bytes"] for row in rows),
            "bytes_present": sum(row["bytes_present"] for row in rows),
            "devices": rows,
        }


def _other(directory: str, there: kernel.Mount) -> Conflict:
    what = f"{there.kind} of {there.source}"
    return Conflict(f"something else is mounted at {directory}: {what}", hint=f"`umount {directory}` that first")


async def real_path(directory: str) -> str:
    """Return the path without symbolic links: a directory has one name here, whatever it was called by."""
    return await asyncio.to_thread(os.path.realpath, directory)
