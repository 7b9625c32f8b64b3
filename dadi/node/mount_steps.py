"""The steps that a mount is made and ended by; `mounts.py` and `restoring.py` say when which of them is taken.

    is                        undone, last first, by      record         if we are killed here, the next process
    1 resolved                nothing                     none           knows nothing of it
    2 image index here        nothing                     none           knows nothing of it
    3 metadata whole, held    its holds are let go        none           knows nothing of it
    4 devices attached        `Devices.release`           none           ends devices that nobody wants
    5 about to be mounted     the record is removed       "mounting"     detaches it, if it is there: as if never made
    6 EROFS mounted           umount, detached            "mounting"     the same
    7 made, and reported so   8 and 9                     ""             adopts it, or mounts it anew
    8 about to be unmounted   7, where it is in use       "unmounting"   unmounts it; where it is in use it stays: 7
    9 EROFS unmounted         nothing                     "unmounting"   drops the record
      gone                    nothing                     none           ends devices that nobody wants

1 to 3 are `fetch` (1: who calls it), 4 to 7 `attach`, 8 is `write_step`, 9 `umount`, the last `gone`. A mount that was
recorded as made and does not stand any more takes 2 to 7 again, but its record says "" all the while, whatever fails.
`adopt` is 7 for one that still stands.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import msgspec

from dadi.blobs.disk import DiskBlobs
from dadi.errors import Conflict, DadiError
from dadi.fallbacks import Fallbacks
from dadi.index.image import ImageIndex
from dadi.node import kernel
from dadi.node.devices import BlobDevice, Devices
from dadi.node.in_kernel import in_kernel
from dadi.node.metadata import ImageMetadata
from dadi.node.mount_table import Mount, MountTable
from dadi.node.records import MountRecord, MountRecords


class MountSteps:
    """See the head of this file. Who calls must be alone at the directory (`MountTable.alone`)."""

    def __init__(self, table: MountTable, records: MountRecords, store: DiskBlobs, devices: Devices,
                 metadata: ImageMetadata, fallbacks: Fallbacks) -> None:  # fmt: skip
        self._table = table
        self._records = records
        self._store = store
        self._devices = devices
        self._metadata = metadata
        self._fallbacks = fallbacks

    def __repr__(self) -> str:
        return f"MountSteps({self._table!r})"

    # ---- making

    async def fetch(self, record: MountRecord, holds: contextlib.ExitStack, *,
                    admit: Callable[[ImageIndex], None] = lambda index: None) -> ImageIndex:  # fmt: skip
        """Have the image index and all of the metadata here, held: EROFS must never wait for them.

        `admit` raises if the image must not be mounted. Raises that, and what upstream raises.
        """
        index = await self._metadata.index(record.answer)
        if record.layers:
            index = await self._metadata.prefix(index, record.layers, holds)
        admit(index)
        await self._metadata.hold(record.answer, index, holds)
        return index

    async def attach(self, record: MountRecord, index: ImageIndex, *, recorded: bool = False) -> Mount:
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
        mount = self._table.standing[record.directory] = Mount(record, index, devices)
        self._table.lost.pop(record.directory, None)
        return mount

    async def adopt(self, record: MountRecord) -> Mount | None:
        """Return the mount as it still stands, if nothing in its way needs a process that we cannot replace."""
        if not await self.still_stands(record) or not self._store.has(record.answer.index_digest):
            return None
        index = await self._metadata.index(record.answer)
        if record.layers:
            with contextlib.ExitStack() as holds:
                index = await self._metadata.prefix(index, record.layers, holds)
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
        self._metadata.on_index(index)
        mount = self._table.standing[record.directory] = Mount(record, index, devices)
        for digest in (record.answer.index_digest, index.metadata.digest, *_layer_indexes(record, index)):
            if (held := self._store.find(digest)) is not None:
                mount.holds.enter_context(self._store.hold(held))
        return mount

    async def hold_what_is_here(self, record: MountRecord, holds: contextlib.ExitStack) -> None:
        """Hold what a recorded mount needs and the store has; nothing is fetched. Raises what is wrong with its index.
        """
        if not self._store.has(record.answer.index_digest):
            return
        index = await self._metadata.index(record.answer)
        needed = [record.answer.index_digest, index.metadata.digest, *(b.digest for b in index.device_blobs()),
                  *_layer_indexes(record, index)]  # fmt: skip
        for blob in filter(None, map(self._store.find, needed)):
            holds.enter_context(self._store.hold(blob))

    # ---- ending

    async def write_step(self, record: MountRecord, step: str) -> None:
        """Write down what is about to happen; a disk that is full must not keep a mount from being taken down."""
        try:
            await self._records.write(msgspec.structs.replace(record, step=step))
        except DadiError as error:
            self._fallbacks.note("mount record not written", f"{record.directory}: {error}")

    async def umount(self, directory: str, *, force: bool) -> None:
        """Unmount; with `force` from under its users, noted. Raises Conflict if it is in use."""
        try:
            await in_kernel(kernel.umount, directory)
        except Conflict:
            if not force:
                raise
            self._fallbacks.note("unmounted while in use", directory)
            await in_kernel(kernel.umount, directory, detach=True)

    async def gone(self, mount: Mount) -> None:
        """Forget a mount that is not there any more, and let go of what it had."""
        await self._records.remove(mount.record.directory)
        del self._table.standing[mount.record.directory]
        for device in mount.devices:
            await self._devices.release(device)
        mount.holds.close()

    async def forget(self, directory: str) -> None:
        """Remove the record of what does not stand, and will not be mounted again."""
        await self._records.remove(directory)

    async def end_left(self) -> None:
        """End the devices of an earlier process that nothing wants: the reads that wait for them fail."""
        await self._devices.end_left(self._table.wanted_devices())

    # ---- what is there

    async def still_stands(self, record: MountRecord) -> bool:
        """Say whether what is mounted there is what the record says."""
        there = await in_kernel(kernel.mounted_at, record.directory)
        return there is not None and is_ours(record, there)


def is_ours(record: MountRecord, there: kernel.Mount) -> bool:
    """Say whether a mount is what a record says."""
    return there.kind == "erofs" and there.source in record.devices[:1]


def _layer_indexes(record: MountRecord, index: ImageIndex) -> list[str]:
    """Return what metadata is made from that this node has made itself: an image's lowest layers."""
    return [layer.index_digest for layer in index.layers] if record.layers else []
