"""Mounts of images: made, recorded, found again after a restart, unmounted.

    mount      (1) resolve upstream  (2) image index  (3) metadata, whole  (4) a device per layer  (5) EROFS over them
               whatever fails, the steps before it are undone
    unmount    plain: as umount(8), EBUSY while it is used; forced: waiting reads fail with EIO, the mount is detached
    restore    what is still mounted on local devices is adopted; what is not, or needs our process, is mounted anew

Each mount has a record (`records.py`), written before the mount is reported as made, removed when it is gone.

Longer than most files here: a mount's whole life, whose steps undo each other, is in one place.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import structlog

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.erofs import writer as erofs
from dadi.errors import Conflict, DadiError, Malformed, NotFound, TooLarge, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index import image as image_index
from dadi.index import layer as layer_index
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex
from dadi.node import kernel
from dadi.node.backfill import pieces
from dadi.node.devices import Device, Devices, DeviceState
from dadi.node.in_kernel import in_kernel
from dadi.node.records import MountRecord, MountRecords
from dadi.peers.superpeer import MAX_SMALL_BLOB, ImageAnswer, Upstream, image_answer
from dadi.wire import Event

log = structlog.get_logger()


_RETRY_EVERY = 10.0
_LET_FINISH = 10.0
"""Seconds: between two tries to restore a mount; for mounts that are being made when we stop."""


class Mount:
    """One mounted image: its record, its index, and its devices (metadata first)."""

    def __init__(self, record: MountRecord, index: ImageIndex, devices: list[Device]) -> None:
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
                 fallbacks: Fallbacks, on_mount: Callable[[], None]) -> None:  # fmt: skip
        self._records = records
        self._store = store
        self._devices = devices
        self._upstream = upstream
        self._fallbacks = fallbacks
        self._on_mount = on_mount
        self._mounts: dict[str, Mount] = {}
        self._busy: set[str] = set()
        self._lost: dict[str, tuple[MountRecord, str]] = {}
        self._tasks: set[asyncio.Task[Mount]] = set()
        self._metadata = asyncio.Lock()

    def __repr__(self) -> str:
        return f"Mounts({len(self._mounts)})"

    # ---- mounting

    async def mount(self, reference: str, directory: str, platform: str) -> AsyncIterator[Event]:
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
            raise Malformed(f"the superpeer did not say what {reference} is")
        yield {"event": "progress", "stage": "fetching metadata"}
        # A task of our own: a client that goes away in the middle must not leave half a mount.
        task = asyncio.create_task(self._make(MountRecord(directory, answer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        mount = await asyncio.shield(task)
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
                raise Conflict(f"{mount.record.answer.reference} is mounted at {directory} already")
            if await self._stands(mount.record):
                return
        task = asyncio.create_task(self._ensured(MountRecord(directory, answer, layers=layers)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        mount = await asyncio.shield(task)
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
            raise Unavailable(f"{record.answer.reference} cannot be mounted at {record.directory}: {why}")
        self._lost.pop(record.directory, None)
        return self._mounts[record.directory]

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
            with contextlib.ExitStack() as holds:
                index = await self._fetch(record, holds)
                mount = await self._attach(record, index, holds)
                mount.holds = holds.pop_all()
                return mount

    async def _fetch(self, record: MountRecord, holds: contextlib.ExitStack) -> ImageIndex:
        """Have the image index and all of the metadata here, held: EROFS must never wait for them."""
        index = await self.index(record.answer)
        if record.layers:
            index = await self._prefix(index, record.layers, holds)
        await self.hold_metadata(record.answer, index, holds)
        return index

    async def hold_metadata(self, answer: ImageAnswer, index: ImageIndex, holds: contextlib.ExitStack) -> None:
        """Have the metadata here, all of it, and hold it and the image index."""
        for digest in (answer.index_digest, index.metadata.digest):
            blob = self._store.find(digest)
            if blob is not None:
                holds.enter_context(self._store.hold(blob))
        async with self._metadata:
            await self._whole(index.metadata, holds)
        whole = self._store.find(index.metadata.digest)
        if whole is not None:  # it may have come by another call's hands
            holds.enter_context(self._store.hold(whole))

    async def hold_layer_indexes(self, index: ImageIndex, holds: contextlib.ExitStack) -> None:
        """Have the layer indexes here, and hold them: what a mount of fewer layers is made from."""
        for layer in index.layers:
            if not self._store.has(layer.index_digest):
                await self._store.put(await self._upstream.whole(layer.index_digest, layer.index_size))
            held = self._store.find(layer.index_digest)
            if held is not None:
                holds.enter_context(self._store.hold(held))

    async def _prefix(self, index: ImageIndex, layers: int, holds: contextlib.ExitStack) -> ImageIndex:
        """Return the index of an image that is only the lowest layers of another; its metadata is made here."""
        index = msgspec.structs.replace(index, layers=index.layers[:layers], devices=())
        await self.hold_layer_indexes(index, holds)
        indexes = []
        for layer in index.layers:
            data = await self._store.get(layer.index_digest)
            indexes.append(await asyncio.to_thread(layer_index.decode, data))
        metadata = await asyncio.to_thread(erofs.write, indexes)
        blob = await self._store.put(metadata.image)
        return msgspec.structs.replace(index, metadata=blob, devices=metadata.devices)

    async def _attach(self, record: MountRecord, index: ImageIndex, holds: contextlib.ExitStack) -> Mount:
        async with contextlib.AsyncExitStack() as undo:
            devices: list[Device] = []
            for blob in (index.metadata, *index.device_blobs()):
                device = await self._devices.acquire(blob)
                undo.push_async_callback(self._devices.release, device)
                devices.append(device)
            metadata, *layers = [device.path for device in devices]
            await in_kernel(kernel.mount_erofs, metadata, record.directory, layers)
            undo.push_async_callback(in_kernel, kernel.umount, record.directory, detach=True)
            record = msgspec.structs.replace(record, devices=(metadata, *layers))
            await self._records.write(record)
            undo.pop_all()
        mount = self._mounts[record.directory] = Mount(record, index, devices)
        self._lost.pop(record.directory, None)
        return mount

    async def index(self, answer: ImageAnswer) -> ImageIndex:
        """Return the image's index, from the store or else from upstream."""
        if self._store.has(answer.index_digest):
            data = await self._store.get(answer.index_digest)
            if await asyncio.to_thread(digests.of, data) == answer.index_digest:
                return image_index.decode(data)
            self._fallbacks.note("our own disk spoilt bytes, fetched again", f"the index {answer.index_digest}")
            await self._store.remove(answer.index_digest)
        data = await self._upstream.whole(answer.index_digest, answer.index_size)
        index = image_index.decode(data)
        if index.manifest_digest != answer.manifest_digest:
            raise Malformed(f"the index {answer.index_digest} is of another image than {answer.manifest_digest}")
        try:
            await self._store.put(data)
        except DadiError as error:
            self._fallbacks.note("not kept: store full", error.message)
        return index

    async def _whole(self, blob: Blob, holds: contextlib.ExitStack) -> None:
        """Have all of a blob here, or raise; does not wait for an upstream that is away."""
        if blob.size > MAX_SMALL_BLOB:
            raise TooLarge(f"the metadata of an image has {blob.size} bytes; the limit is {MAX_SMALL_BLOB}")
        if self._store.has(blob.digest):
            return
        await self._store.prepare(blob)
        holds.enter_context(self._store.hold(blob))
        for run in pieces(blob, await self._store.missing(blob)):
            parts = await self._upstream.source.read(blob, run)
            await self._store.keep(blob, run.start, parts)
        await self._store.finish(blob)

    # ---- unmounting

    async def unmount(self, directory: str, *, force: bool = False) -> None:
        """Unmount (a normalised path). Raises NotFound if nothing of ours is there, Conflict if it is in use."""
        directory = await real_path(directory)
        with self._alone(directory):
            if directory in self._lost:
                del self._lost[directory]
                await self._records.remove(directory)
                return
            mount = self._mounts.get(directory)
            if mount is None:
                raise NotFound(f"no image is mounted at {directory}", hint="`dadi status` lists the mounts")
            if force:
                for device in mount.devices:
                    self._devices.abort(device)
            there = await in_kernel(kernel.mounted_at, directory)
            if there is not None and _is_ours(mount.record, there):
                await self._umount(directory, force)
            elif there is not None and not force:
                raise _other(directory, there)
            await self._gone(mount)
            log.info("unmounted", image=mount.record.answer.reference, directory=directory, forced=force)

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
            for record in records:
                await self._restore(record)
        if self._mounts:
            self._on_mount()

    async def _hold_what_is_here(self, record: MountRecord, holds: contextlib.ExitStack) -> None:
        if not self._store.has(record.answer.index_digest):
            return
        try:
            index = await self.index(record.answer)
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
                        mount = await self._attach(record, index, holds)
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
                    self._on_mount()

    async def _adopt(self, record: MountRecord) -> Mount | None:
        """Return the mount as it still stands, if nothing in its way needs an earlier process of ours."""
        there = await in_kernel(kernel.mounted_at, record.directory)
        if there is None or not _is_ours(record, there):
            return None
        if not self._store.has(record.answer.index_digest):
            return None
        index = await self.index(record.answer)
        if record.layers:
            with contextlib.ExitStack() as holds:
                index = await self._prefix(index, record.layers, holds)
        needed = [record.answer.index_digest, index.metadata.digest]
        if record.layers:
            needed += [layer.index_digest for layer in index.layers]
        blobs = [index.metadata, *index.device_blobs()]
        if len(blobs) != len(record.devices):
            return None
        for blob, name in zip(blobs, record.devices, strict=True):
            path = str(self._store.data_path(blob))
            if not self._store.has(blob.digest) or await in_kernel(kernel.loop_backing, name) != path:
                return None
        async with contextlib.AsyncExitStack() as undo:
            devices = []
            for blob, name in zip(blobs, record.devices, strict=True):
                devices.append(await self._devices.acquire(blob, adopt=name))
                undo.push_async_callback(self._devices.release, devices[-1])
            undo.pop_all()
        mount = self._mounts[record.directory] = Mount(record, index, devices)
        for digest in needed:
            if (held := self._store.find(digest)) is not None:
                mount.holds.enter_context(self._store.hold(held))
        return mount

    async def close(self, *, unmount: bool) -> None:
        """Leave local mounts standing (unless `unmount`); unmount the others, since their reads would fail.

        Their records stay: the next process mounts them again.
        """
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=_LET_FINISH)
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for mount in list(self._mounts.values()):
            directory = mount.record.directory
            mount.holds.close()
            if mount.state == "local" and not unmount:
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
