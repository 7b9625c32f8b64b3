"""Mounts of images: made, recorded, found again after a restart, unmounted.

    mount      (1) resolve upstream  (2) image index  (3) metadata, whole  (4) a device per layer  (5) EROFS over them
               whatever fails, the steps before it are undone
    unmount    plain: as umount(8), EBUSY while it is used; forced: waiting reads fail with EIO, the mount is detached
    restore    what is still mounted on local devices is adopted; what is not, or needs our process, is mounted anew

Each mount is a small JSON file under STATE/mounts, written before it is reported as made, removed when it is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import structlog

from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.layout import write_durably
from dadi.errors import Conflict, DadiError, Malformed, NotFound
from dadi.fallbacks import Fallbacks
from dadi.index import image as image_index
from dadi.index.image import ImageIndex
from dadi.node import kernel
from dadi.node.devices import Device, Devices, DeviceState
from dadi.peers.superpeer import ImageAnswer, Upstream, image_answer
from dadi.wire import Event

log = structlog.get_logger()


class MountRecord(msgspec.Struct, frozen=True):
    """What is kept of a mount. `devices`: the loop devices, metadata first, as they were when it was made."""

    directory: str
    answer: ImageAnswer
    devices: tuple[str, ...] = ()


class Mount:
    """One mounted image: its record, its index, and its devices (metadata first)."""

    def __init__(self, record: MountRecord, index: ImageIndex, devices: list[Device]) -> None:
        self.record = record
        self.index = index
        self.devices = devices

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

    def __init__(self, directory: Path, store: DiskBlobs, chain: Chain, devices: Devices, upstream: Upstream,
                 fallbacks: Fallbacks, on_mount: Callable[[], None]) -> None:  # fmt: skip
        self._records = directory
        self._store = store
        self._chain = chain
        self._devices = devices
        self._upstream = upstream
        self._fallbacks = fallbacks
        self._on_mount = on_mount
        self._mounts: dict[str, Mount] = {}
        self._busy: set[str] = set()

    def __repr__(self) -> str:
        return f"Mounts({len(self._mounts)})"

    # ---- mounting

    async def mount(self, reference: str, directory: str, platform: str) -> AsyncIterator[Event]:
        """Mount an image at a normalised path; yield "progress" events, at last "mounted" with its row of the status.

        Raises NotFound, Conflict, what upstream raises, and what the kernel refuses.
        """
        if not await asyncio.to_thread(os.path.isdir, directory):
            raise NotFound(f"{directory} is not a directory", hint="create it first")
        with self._alone(directory):
            if directory in self._mounts:
                raise Conflict(f"{self._mounts[directory].record.answer.reference} is mounted at {directory} already",
                               hint="unmount it first, or choose another directory")  # fmt: skip
            answer: ImageAnswer | None = None
            async for event in self._upstream.resolve(reference, platform):
                if event.get("event") == "image":
                    answer = image_answer(event)
                else:
                    yield event
            if answer is None:
                raise Malformed(f"the superpeer did not say what {reference} is")
            yield {"event": "progress", "stage": "fetching metadata"}
            mount = await self._make(MountRecord(directory, answer))
            self._on_mount()
            log.info("mounted", image=answer.reference, directory=directory, state=mount.state)
            yield {"event": "mounted", **self._row(mount)}

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
        index = await self.index(record.answer)
        await self._whole(index)
        async with contextlib.AsyncExitStack() as undo:
            devices: list[Device] = []
            for blob in (index.metadata, *index.device_blobs()):
                device = await self._devices.acquire(blob)
                undo.push_async_callback(self._devices.release, device)
                devices.append(device)
            metadata, *layers = [device.path for device in devices]
            await asyncio.to_thread(kernel.mount_erofs, metadata, record.directory, layers)
            undo.push_async_callback(asyncio.to_thread, kernel.umount, record.directory, detach=True)
            record = msgspec.structs.replace(record, devices=(metadata, *layers))
            await asyncio.to_thread(write_durably, self._file(record.directory), msgspec.json.encode(record))
            undo.pop_all()
        mount = self._mounts[record.directory] = Mount(record, index, devices)
        return mount

    async def index(self, answer: ImageAnswer) -> ImageIndex:
        """Return the image's index, from the store or else from upstream."""
        if self._store.has(answer.index_digest):
            return image_index.decode(await self._store.get(answer.index_digest))
        data = await self._upstream.whole(answer.index_digest, answer.index_size)
        index = image_index.decode(data)
        if index.manifest_digest != answer.manifest_digest:
            raise Malformed(f"the index {answer.index_digest} is of another image than {answer.manifest_digest}")
        try:
            await self._store.put(data)
        except DadiError as error:
            self._fallbacks.note("not kept: store full", error.message)
        return index

    async def _whole(self, index: ImageIndex) -> None:
        """Have all of the metadata here: EROFS must never wait for it."""
        blob = index.metadata
        if not self._store.has(blob.digest):
            await self._chain.read(blob, range(blob.table.count))
            await self._store.finish(blob)

    # ---- unmounting

    async def unmount(self, directory: str, *, force: bool = False) -> None:
        """Unmount (a normalised path). Raises NotFound if nothing of ours is there, Conflict if it is in use."""
        with self._alone(directory):
            mount = self._mounts.get(directory)
            if mount is None:
                raise NotFound(f"no image is mounted at {directory}", hint="`dadi status` lists the mounts")
            if force:
                for device in mount.devices:
                    self._devices.abort(device)
            if await asyncio.to_thread(kernel.is_mounted, directory):
                await self._umount(directory, force)
            await self._gone(mount)
            log.info("unmounted", image=mount.record.answer.reference, directory=directory, forced=force)

    async def _umount(self, directory: str, force: bool) -> None:
        try:
            await asyncio.to_thread(kernel.umount, directory)
        except Conflict:
            if not force:
                raise
            self._fallbacks.note("unmounted while in use", directory)
            await asyncio.to_thread(kernel.umount, directory, detach=True)

    async def _gone(self, mount: Mount) -> None:
        await asyncio.to_thread(self._file(mount.record.directory).unlink, missing_ok=True)
        del self._mounts[mount.record.directory]
        for device in mount.devices:
            await self._devices.release(device)

    # ---- restarts

    async def restore(self) -> None:
        """Have what was mounted before this process mounted again; what cannot be is logged and stays recorded."""
        await asyncio.to_thread(self._records.mkdir, parents=True, exist_ok=True)
        for file in await asyncio.to_thread(lambda: sorted(self._records.glob("*.json"))):
            try:
                record = msgspec.json.decode(await asyncio.to_thread(file.read_bytes), type=MountRecord)
            except (msgspec.MsgspecError, UnicodeDecodeError, OSError) as error:
                log.warning("dropped a damaged mount record", file=str(file), why=str(error))
                await asyncio.to_thread(file.unlink, missing_ok=True)
                continue
            try:
                mount = await self._adopt(record)
                if mount is None:
                    await asyncio.to_thread(kernel.umount_all, record.directory)
                    mount = await self._make(record)
                log.info("restored", image=record.answer.reference, directory=record.directory, state=mount.state)
            except (DadiError, OSError) as error:
                self._fallbacks.note("mount not restored", f"{record.directory}: {error}")
        if self._mounts:
            self._on_mount()

    async def _adopt(self, record: MountRecord) -> Mount | None:
        """Return the mount as it still stands, if nothing in its way needs an earlier process of ours."""
        if not record.devices or not await asyncio.to_thread(kernel.is_mounted, record.directory):
            return None
        if not self._store.has(record.answer.index_digest):
            return None
        index = await self.index(record.answer)
        blobs = [index.metadata, *index.device_blobs()]
        if len(blobs) != len(record.devices):
            return None
        for blob, name in zip(blobs, record.devices, strict=True):
            path = str(self._store.data_path(blob))
            if not self._store.has(blob.digest) or await asyncio.to_thread(kernel.loop_backing, name) != path:
                return None
        devices = [await self._devices.acquire(blob, adopt=name)
                   for blob, name in zip(blobs, record.devices, strict=True)]  # fmt: skip
        mount = self._mounts[record.directory] = Mount(record, index, devices)
        return mount

    async def close(self, *, unmount: bool) -> None:
        """Leave local mounts standing (unless `unmount`); unmount the others, since their reads would fail.

        Their records stay: the next process mounts them again.
        """
        for mount in list(self._mounts.values()):
            directory = mount.record.directory
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

    def _file(self, directory: str) -> Path:
        return self._records / f"{hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]}.json"

    # ---- state

    def statistics(self) -> list[dict[str, Any]]:
        """Return a row for each mount."""
        return [self._row(mount) for mount in self._mounts.values()]

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
            "compressed_bytes": index.layers_size,
            "unpacked_bytes": index.unpacked_size,
            "bytes": sum(row["bytes"] for row in rows),
            "bytes_present": sum(row["bytes_present"] for row in rows),
            "devices": rows,
        }
