"""Mounts of images: made, recorded, found again after a restart, unmounted.

    mount      (1) resolve upstream  (2) image index  (3) metadata, whole  (4) a device per layer  (5) EROFS over them
               whatever fails, the steps before it are undone
    unmount    plain: as umount(8), EBUSY while it is used; forced: waiting reads fail with EIO, the mount is detached
    restore    what is still mounted is adopted, lazy or local (`Devices.stands`); what is not is mounted anew; what was
               only half mounted or half unmounted when a process was killed is undone or ended

Each mount has a record (`records.py`), written before the image is mounted, again before the mount is reported as
made, and before it is unmounted; removed when it is gone.

Longer than most files here: a mount's whole life, whose steps undo each other, is in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any, TypeVar

import msgspec
import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.errors import Conflict, DadiError, Malformed, NotFound, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.image import ImageIndex
from dadi.node import kernel
from dadi.node.devices import BlobDevice, Devices, DeviceState
from dadi.node.in_kernel import in_kernel
from dadi.node.metadata import ImageMetadata
from dadi.node.records import MountRecord, MountRecords
from dadi.peers.superpeer import ImageAnswer, Upstream, image_answer
from dadi.wire import Event

log = structlog.get_logger()
T = TypeVar("T")


_RETRY_EVERY = 10.0
_LET_FINISH = 10.0
_LOOK_EVERY = 0.1
"""Seconds: between two tries to restore a mount; for mounts that are being made when we stop; between two looks at what
a process that is dying may still do."""


class Mount:
    """One mounted image: its record, its index, and its devices (metadata first)."""

    def __init__(self, record: MountRecord, index: ImageIndex, devices: list[BlobDevice]) -> None:
        self.record = record
        self.index = index
        self.devices = devices
        self.holds = contextlib.ExitStack()
        """The image index and the metadata, for as long as it is mounted."""

    def __repr__(self) -> str:
        return f"Mount({self.record.answer.reference} at {self.record.directory}, {self.state})"

    @property
    def state(self) -> str:
        """lazy, local, or broken."""
        states = {device.state for device in self.devices}
        for state in (DeviceState.BROKEN, DeviceState.LAZY):
            if state in states:
                return str(state.value)
        return str(DeviceState.LOCAL.value)


class Mounts:
    """All mounts of this node."""

    def __init__(self, records: MountRecords, store: DiskBlobs, devices: Devices, upstream: Upstream,
                 fallbacks: Fallbacks, on_mount: Callable[[], None],
                 on_index: Callable[[ImageIndex], None] = lambda index: None) -> None:  # fmt: skip
        """`on_mount`: told when there is something new; `on_index`: of an image whose blobs are about to be read."""
        self._records = records
        self._store = store
        self._devices = devices
        self._upstream = upstream
        self._fallbacks = fallbacks
        self._on_mount = on_mount
        self._on_index = on_index
        self._mounts: dict[str, Mount] = {}
        self._busy: set[str] = set()
        self._lost: dict[str, tuple[MountRecord, str]] = {}
        self._unfinished: dict[str, MountRecord] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self.adopted = 0
        """How many mounts of an earlier process still stood."""
        self.metadata = ImageMetadata(store, upstream, fallbacks, on_index)
        self.predecessor_is_dying: Callable[[], bool] = lambda: False
        """Whether calls of an earlier process, which was killed, may still be in the kernel."""
        self.admit: Callable[[ImageIndex], None] = lambda index: None
        """Raises if an image must not be mounted now."""
        self.on_start: Callable[[ImageIndex, asyncio.Event], None] = lambda index, made: None
        """Told of an image that is being mounted, all of it and not again, as soon as its metadata is here."""

    def __repr__(self) -> str:
        return f"Mounts({len(self._mounts)})"

    # ---- mounting

    async def mount(self, reference: str, directory: str, platform: str) -> AsyncGenerator[Event, None]:
        """Mount an image at a normalised path; yield "progress" events, at last "mounted" with its row of the status.

        Raises NotFound, Conflict, what upstream raises, and what the kernel refuses.
        """
        directory = await real_path(directory)
        if not await asyncio.to_thread(os.path.isdir, directory):
            raise NotFound(f"{directory} is not a directory", hint="create it first")
        self._check_free(directory)
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
        if directory in self._busy:
            raise Conflict(f"{directory} is being mounted or unmounted already", hint="try again in a moment")
        mount = self._mounts.get(directory)
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
        lost = self._lost.get(record.directory)
        if lost is not None:
            return await self._again(lost[0])
        gone = self._mounts.get(record.directory)
        if gone is not None:
            self._fallbacks.note("mount was gone, mounted again", record.directory)
            await self._gone(gone)
        there = await in_kernel(kernel.mounted_at, record.directory)
        if there is not None:
            if there.kind != "erofs":
                raise _other(record.directory, there)
            await in_kernel(kernel.umount_all, record.directory)  # of a process that was killed before its record
        return await self._make(record)

    async def _stands(self, record: MountRecord) -> bool:
        """Whether the image is still what is mounted there; raise Conflict if something else is."""
        there = await in_kernel(kernel.mounted_at, record.directory)
        if there is not None and not _is_ours(record, there):
            raise _other(record.directory, there)
        return there is not None

    async def _again(self, record: MountRecord) -> Mount:
        """Mount anew what could not be restored; raise its error if it still cannot be."""
        if not await self._restore(record):
            _, why = self._lost[record.directory]
            hint = f"it is tried again every {_RETRY_EVERY:.0f} s"
            raise Unavailable(f"{record.answer.reference} cannot be mounted at {record.directory}: {why}", hint=hint)
        self._lost.pop(record.directory, None)
        return self._mounts[record.directory]

    def _task(self, work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _check_free(self, directory: str) -> None:
        mount = self._mounts.get(directory)
        if mount is not None:
            hint = "unmount it first, or choose another directory"
            raise Conflict(f"{mount.record.answer.reference} is mounted at {directory} already", hint=hint)

    @contextlib.contextmanager
    def _alone(self, directory: str) -> Any:
        if directory in self._busy:
            raise Conflict(f"{directory} is being mounted or unmounted already", hint="try again in a moment")
        self._busy.add(directory)
        try:
            yield
        finally:
            self._busy.discard(directory)

    async def _make(self, record: MountRecord) -> Mount:
        with self._alone(record.directory):
            self._check_free(record.directory)
            made = asyncio.Event()
            with contextlib.ExitStack() as holds:
                holds.callback(made.set)
                index = await self._fetch(record, holds, made)
                lost, _ = self._lost.get(record.directory, (None, ""))
                while lost is not None and await self._still_stands(lost):
                    await in_kernel(kernel.umount, record.directory, detach=True)
                mount = await self._attach(record, index)
                made.set()
                mount.holds = holds.pop_all()
            if lost is not None:
                await self._end_left()  # its devices are not wanted any more
            return mount

    async def _fetch(self, record: MountRecord, holds: contextlib.ExitStack,
                     made: asyncio.Event | None = None) -> ImageIndex:  # fmt: skip
        """Have the image index and all of the metadata here, held: EROFS must never wait for them.

        `made`: the image is about to be started; set when it is mounted.
        """
        index = await self.metadata.index(record.answer)
        if record.layers:
            index = await self.metadata.prefix(index, record.layers, holds)
        if made is not None:
            self.admit(index)
        await self.metadata.hold(record.answer, index, holds)
        if made is not None and not record.layers:
            self.on_start(index, made)
        return index

    async def _attach(self, record: MountRecord, index: ImageIndex, *, recorded: bool = False) -> Mount:
        """Attach and mount. `recorded`: it was reported as made before; if we are killed half-way it is to be made."""
        async with contextlib.AsyncExitStack() as undo:
            devices: list[BlobDevice] = []
            for blob in (index.metadata, *index.device_blobs()):
                device = await self._devices.acquire(blob)
                undo.push_async_callback(self._devices.release, device)
                devices.append(device)
            metadata, *layers = [device.path for device in devices]
            record = msgspec.structs.replace(record, devices=(metadata, *layers), step="" if recorded else "mounting")
            await self._records.write(record)
            if not recorded:
                undo.push_async_callback(self._records.remove, record.directory)
            await in_kernel(kernel.mount_erofs, metadata, record.directory, layers)
            undo.push_async_callback(in_kernel, kernel.umount, record.directory, detach=True)
            if not recorded:
                record = msgspec.structs.replace(record, step="")
                await self._records.write(record)
            undo.pop_all()
        mount = self._mounts[record.directory] = Mount(record, index, devices)
        self._lost.pop(record.directory, None)
        return mount

    # ---- unmounting

    async def unmount(self, directory: str, *, force: bool = False) -> None:
        """Unmount (a normalised path). Raises NotFound if nothing of ours is there, Conflict if it is in use."""
        # A task of our own, as for a mount.
        await asyncio.shield(self._task(self._unmount(await real_path(directory), force)))

    async def _unmount(self, directory: str, force: bool) -> None:
        with self._alone(directory):
            if directory in self._lost:
                await self._unmount_lost(directory, force)
                return
            mount = self._mounts.get(directory)
            if mount is None:
                raise NotFound(f"no image is mounted at {directory}", hint="`dadi status` lists the mounts")
            if force:
                for device in mount.devices:
                    self._devices.abort(device)
            there = await in_kernel(kernel.mounted_at, directory)
            if there is not None and _is_ours(mount.record, there):
                await self._step(mount.record, "unmounting")
                try:
                    await self._umount(directory, force)
                except BaseException:
                    await self._step(mount.record, "")
                    raise
            elif there is not None and not force:
                raise _other(directory, there)
            await self._gone(mount)
            log.info("unmounted", image=mount.record.answer.reference, directory=directory, forced=force)

    async def _unmount_lost(self, directory: str, force: bool) -> None:
        """Take away what could not be restored, and what of it still stands."""
        record, why = self._lost.pop(directory)
        try:
            if force:
                await self._end_left()  # nothing wants its devices now: the reads that wait for them fail
            if await self._still_stands(record):
                await self._umount(directory, force)
        except BaseException:
            self._lost[directory] = record, why
            raise
        await self._records.remove(directory)
        await self._end_left()
        log.info("dropped", image=record.answer.reference, directory=directory, forced=force)

    async def _still_stands(self, record: MountRecord) -> bool:
        there = await in_kernel(kernel.mounted_at, record.directory)
        return there is not None and _is_ours(record, there)

    async def _step(self, record: MountRecord, step: str) -> None:
        """Write down what is about to happen; a disk that is full must not keep a mount from being taken down."""
        try:
            await self._records.write(msgspec.structs.replace(record, step=step))
        except DadiError as error:
            self._fallbacks.note("mount record not written", f"{record.directory}: {error}")

    async def _umount(self, directory: str, force: bool) -> None:
        try:
            await in_kernel(kernel.umount, directory)
        except Conflict:
            if not force:
                raise
            self._fallbacks.note("unmounted while in use", directory)
            await in_kernel(kernel.umount, directory, detach=True)

    async def _gone(self, mount: Mount) -> None:
        await self._records.remove(mount.record.directory)
        del self._mounts[mount.record.directory]
        for device in mount.devices:
            await self._devices.release(device)
        mount.holds.close()

    # ---- restarts

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
                await self._restore(record)
        self._unfinished = {record.directory: record for record in records if record.step}
        for record in self._unfinished.values():
            self._task(self._end(record))  # it may wait for reads that wait for upstream
        await self._end_left()
        for device in self._devices.lazy():
            if self._store.has(device.blob.digest):
                await self._devices.complete(device)  # the last of it came, but nobody was left to swap it
        if self._mounts:
            self._on_mount()

    async def _adopted(self, record: MountRecord) -> bool:
        with self._alone(record.directory):
            try:
                mount = await self._adopt(record)
            except (DadiError, OSError) as error:
                log.warning("a mount cannot be adopted", directory=record.directory, why=str(error))
                return False  # `_restore` says what becomes of it
        if mount is not None:
            self.adopted += 1
            log.info("adopted", image=record.answer.reference, directory=record.directory, state=mount.state)
        return mount is not None

    async def _end(self, record: MountRecord) -> None:
        """Undo a mount that was being made, or end one that was being unmounted, when a process was killed."""
        try:
            with self._alone(record.directory):
                busy, dying = False, True
                while dying:
                    # A process that is not gone yet may be in the middle of mount(2): it is looked once more after it.
                    dying = record.step == "mounting" and self.predecessor_is_dying()
                    if await self._still_stands(record):
                        try:
                            await in_kernel(kernel.umount, record.directory, detach=record.step == "mounting")
                        except Conflict:
                            busy = True  # what asked for it would have been told so
                    if dying:
                        await asyncio.sleep(_LOOK_EVERY)
                if not busy:
                    await self._records.remove(record.directory)
            log.warning("a killed process was at it", directory=record.directory, step=record.step, stays=busy)
            if busy:
                await self._step(record, "")
                record = msgspec.structs.replace(record, step="")
                if await self._adopted(record) or await self._restore(record):
                    self._on_mount()
        except DadiError as error:
            log.error("could not end what a killed process had begun", directory=record.directory, why=str(error))
        finally:
            self._unfinished.pop(record.directory, None)
            await self._end_left()

    async def _end_left(self) -> None:
        wanted = [*self._unfinished.values(), *(record for record, _ in self._lost.values())]
        await self._devices.end_left({device for record in wanted for device in record.devices})

    async def _hold_what_is_here(self, record: MountRecord, holds: contextlib.ExitStack) -> None:
        if not self._store.has(record.answer.index_digest):
            return
        try:
            index = await self.metadata.index(record.answer)
        except (DadiError, OSError) as error:
            log.warning("an image index cannot be read", directory=record.directory, why=str(error))
            return  # `_restore` says what becomes of it
        needed = [record.answer.index_digest, index.metadata.digest, *(b.digest for b in index.device_blobs())]
        if record.layers:
            needed += [layer.index_digest for layer in index.layers]
        for blob in filter(None, map(self._store.find, needed)):
            holds.enter_context(self._store.hold(blob))

    async def _restore(self, record: MountRecord) -> bool:
        with self._alone(record.directory):
            try:
                mount = await self._adopt(record)
                if mount is None:
                    with contextlib.ExitStack() as holds:
                        # Before anything is unmounted: what stands there may still be of use.
                        index = await self._fetch(record, holds)
                        await in_kernel(kernel.umount_all, record.directory)
                        mount = await self._attach(record, index, recorded=True)
                        mount.holds = holds.pop_all()
            except (DadiError, OSError) as error:
                self._lost[record.directory] = (record, str(error))
                self._fallbacks.note("mount not restored", f"{record.directory}: {error}")
                return False
        log.info("restored", image=record.answer.reference, directory=record.directory, state=mount.state)
        return True

    async def retry(self) -> None:
        """Try again, every now and then, what could not be restored; runs until it is cancelled."""
        while True:
            await asyncio.sleep(_RETRY_EVERY)
            for record, _ in list(self._lost.values()):
                if self._lost.get(record.directory, (None, ""))[0] is not record:
                    continue  # unmounted meanwhile
                try:
                    restored = await self._restore(record)
                except Conflict:
                    continue  # somebody is at it
                except Exception as error:  # a mistake of ours must not end it for all mounts
                    await asyncio.to_thread(log.error, "could not restore a mount", exc_info=error)
                    continue
                if restored:
                    self._lost.pop(record.directory, None)
                    await self._end_left()
                    self._on_mount()

    async def _adopt(self, record: MountRecord) -> Mount | None:
        """Return the mount as it still stands, if nothing in its way needs a process that we cannot replace."""
        there = await in_kernel(kernel.mounted_at, record.directory)
        if there is None or not _is_ours(record, there):
            return None
        if not self._store.has(record.answer.index_digest):
            return None
        index = await self.metadata.index(record.answer)
        if record.layers:
            with contextlib.ExitStack() as holds:
                index = await self.metadata.prefix(index, record.layers, holds)
        needed = [record.answer.index_digest, index.metadata.digest]
        if record.layers:
            needed += [layer.index_digest for layer in index.layers]
        blobs = [index.metadata, *index.device_blobs()]
        if len(blobs) != len(record.devices):
            return None
        for blob, name in zip(blobs, record.devices, strict=True):
            if not await self._devices.stands(blob, name):
                return None
        async with contextlib.AsyncExitStack() as undo:
            devices = []
            for blob, name in zip(blobs, record.devices, strict=True):
                devices.append(await self._devices.acquire(blob, adopt=name))
                undo.push_async_callback(self._devices.release, devices[-1])
            undo.pop_all()
        self._on_index(index)
        mount = self._mounts[record.directory] = Mount(record, index, devices)
        for digest in needed:
            if (held := self._store.find(digest)) is not None:
                mount.holds.enter_context(self._store.hold(held))
        return mount

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
        for mount in list(self._mounts.values()):
            directory = mount.record.directory
            mount.holds.close()
            if lazy_stay or (mount.state == "local" and not unmount):
                for device in mount.devices:
                    await self._devices.release(device)
                continue
            for device in mount.devices:
                self._devices.abort(device)
            try:
                await self._umount(directory, force=True)
            except DadiError as error:
                log.error("could not unmount", directory=directory, why=str(error))
            for device in mount.devices:
                await self._devices.release(device)
        self._mounts.clear()

    # ---- state

    def lost(self) -> list[str]:
        """Say of each mount that could not be restored where it is, and why."""
        return [f"the mount at {directory} is lost: {why}" for directory, (_, why) in self._lost.items()]

    async def metadata_again(self, digest: str) -> bool:
        """Make the metadata of the lowest layers of an image again, which nobody else has; say whether it is such.

        The store must lack some of it. Raises what upstream raises.
        """
        for mount in list(self._mounts.values()):
            if mount.record.layers and mount.index.metadata.digest == digest:
                index = await self.metadata.index(mount.record.answer)
                with contextlib.ExitStack() as holds:
                    await self.metadata.prefix(index, mount.record.layers, holds)
                return True
        return False

    def settled(self) -> bool:
        """Say whether nothing is being mounted or unmounted."""
        return not (self._tasks or self._busy)

    def lazy(self) -> list[Mount]:
        """Return the mounts that may still need upstream."""
        return [mount for mount in self._mounts.values() if mount.state != str(DeviceState.LOCAL.value)]

    def statistics(self) -> list[dict[str, Any]]:
        """Return a row for each mount, and for each that could not be restored (state "lost", with its error)."""
        lost = [
            {"reference": record.answer.reference, "platform": record.answer.platform, "directory": directory,
             "manifest_digest": record.answer.manifest_digest, "state": "lost", "error": why, "bytes": 0,
             "bytes_present": 0, "devices": []}
            for directory, (record, why) in self._lost.items()
        ]  # fmt: skip
        return [self._row(mount) for mount in self._mounts.values()] + lost

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


def _is_ours(record: MountRecord, there: kernel.Mount) -> bool:
    return there.kind == "erofs" and there.source in record.devices[:1]


def _other(directory: str, there: kernel.Mount) -> Conflict:
    what = f"{there.kind} of {there.source}"
    return Conflict(f"something else is mounted at {directory}: {what}", hint="unmount that first")


async def real_path(directory: str) -> str:
    """Return the path without symbolic links: a directory has one name here, whatever it was called by."""
    return await asyncio.to_thread(os.path.realpath, directory)
