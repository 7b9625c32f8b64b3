"""Block devices over blobs: one per blob and node, shared by all images that have the layer.

    life cycle   LAZY ──complete──► LOCAL        a loop device over a file in our FUSE mount; then over the store's file
                 LOCAL ──bad bytes──► LAZY       its file was found damaged: read through us until it is whole again
                 LAZY ──lied──────► BROKEN       all chunks matched the table, the whole not its digest: reads fail

A blob that is complete when it is attached is LOCAL from the start, and then our process is never in its read path.

A loop device outlives us while something is mounted on it. `reopen` gives the FUSE files under such devices their bytes
again, before the kernel may ask for them; `acquire` then adopts the device. Blob and store are all that this needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import os
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, TypeVar

import structlog

from dadi.blobs.chain import Chain
from dadi.blobs.disk import DeviceFile, DiskBlobs
from dadi.errors import DadiError, DigestMismatch, Malformed
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.node import loop
from dadi.node.demand import Demand
from dadi.node.in_kernel import in_kernel
from fuse.session import Session

log = structlog.get_logger()
T = TypeVar("T")


class DeviceState(enum.Enum):
    """See the head of this file."""

    LAZY = "lazy"
    LOCAL = "local"
    BROKEN = "broken"


class LazyFile:
    """A blob as a file of the FUSE mount (see `fuse.device.BackedFile`): hits from `fd`, misses by `read`.

    Named by the blob's digest without "sha256:", padded to a multiple of 4096 bytes. `chain`: `dadi/blobs/chain.py`.
    """

    def __init__(self, file: DeviceFile, chain: Chain, demand: Demand) -> None:
        self.file = file
        self.blob = file.blob
        self.name = file.blob.digest[7:]
        self.size = file.size
        self.fd = file.fd
        self.present = file.present
        self.touched = bytearray(len(file.present))
        self.chunk_shift = file.chunk_shift
        self.failed: DadiError | None = None
        self._chain = chain
        self._demand = demand

    async def read(self, offset: int, length: int) -> bytes:
        """Return the bytes [offset, offset + length) of the padded file, fetching what is not here."""
        if self.failed:
            raise self.failed
        length = min(length, self.size - offset)
        table = self.blob.table
        chunks = table.covering(offset, length)
        if not chunks:
            return bytes(length)  # in the padding behind the blob's end
        with self._demand.waiting():
            self._demand.on_miss(self.blob, chunks)
            parts = await self._chain.read(self.blob, chunks)
        if self.failed:
            raise self.failed
        skip = offset - chunks.start * table.chunk_size
        data = parts[0][skip : skip + length] if len(parts) == 1 else b"".join(parts)[skip : skip + length]
        if len(data) != min(length, self.blob.size - offset):
            raise Malformed(f"{len(data)} bytes came for the {length} at {offset} of {self.blob}")
        return data.ljust(length, b"\0")  # the padding, if the read goes beyond the blob's end


class BlobDevice:
    """One blob's loop device; made and ended by `Devices` only."""

    def __init__(self, blob: Blob) -> None:
        self.blob = blob
        self.state = DeviceState.LAZY
        self.users = 0
        self.error: str | None = None
        self.file: DeviceFile | None = None
        """The store's file, open and held for as long as the device is."""
        self.lazy_file: LazyFile | None = None
        self.loop: loop.LoopDevice | None = None
        self.resources = contextlib.ExitStack()

    def __repr__(self) -> str:
        return f"BlobDevice({self.blob!r}, {self.state.value}, {self.path}, {self.users} users)"

    @property
    def path(self) -> str:
        """/dev/loopN."""
        return self.loop.path if self.loop else "-"


class _Left:
    """A FUSE file under a loop device of an earlier process, open again, that no mount has claimed yet."""

    def __init__(self, path: str, file: LazyFile, resources: contextlib.ExitStack) -> None:
        self.path, self.file, self.resources = path, file, resources
        self.loop: loop.LoopDevice | None = None

    def close(self) -> None:
        with self.resources:
            if self.loop:
                self.loop.close()


class Devices:
    """All devices of this node."""

    def __init__(self, store: DiskBlobs, chain: Chain, session: Session, demand: Demand, fallbacks: Fallbacks) -> None:
        self._store = store
        self._chain = chain
        self._session = session
        self._demand = demand
        self._fallbacks = fallbacks
        self._devices: dict[str, BlobDevice] = {}
        self._changing = asyncio.Lock()
        self._left: dict[str, _Left] = {}
        self._swaps: set[asyncio.Task[Any]] = set()
        self._place = ""

    def __repr__(self) -> str:
        return f"Devices({len(self._devices)}, {len(self.lazy())} lazy)"

    def lazy(self) -> list[BlobDevice]:
        """Return the devices whose blobs are not complete yet, in the order they were attached."""
        return [device for device in self._devices.values() if device.state is DeviceState.LAZY]

    def all(self) -> list[BlobDevice]:
        """Return every device."""
        return list(self._devices.values())

    def touched(self, digest: str) -> bytearray | None:
        """Return the marks that hits leave in a lazy device's file (see `fuse.device.BackedFile`), if it is one."""
        device = self._devices.get(digest)
        return device.lazy_file.touched if device and device.lazy_file else None

    async def acquire(self, blob: Blob, *, adopt: str | None = None) -> BlobDevice:
        """Return the blob's device, attached; pair with `release`.

        `adopt` names a loop device of an earlier process for which `stands` is true.
        """
        async with self._changing:
            device = self._devices.get(blob.digest)
            if device is not None and device.state is DeviceState.BROKEN:
                hint = "unmount every image that has this layer, then mount again"
                raise DigestMismatch(f"{blob} is broken: {device.error}", hint=hint)
            if device is None:
                device = BlobDevice(blob)
                try:
                    await self._attach(device, adopt)
                except BaseException:
                    await in_kernel(self._end, device)
                    raise
                self._devices[blob.digest] = device
            device.users += 1
            return device

    async def _attach(self, device: BlobDevice, adopt: str | None) -> None:
        blob = device.blob
        left = self._left.get(blob.digest)
        if left is not None and await in_kernel(self._over_fuse, blob, adopt or left.path):
            del self._left[blob.digest]
            device.lazy_file, device.resources = left.file, left.resources
            device.file, device.blob = left.file.file, left.file.blob
            device.loop = left.loop
            if device.loop is None or adopt not in (None, left.path):
                device.loop = await in_kernel(loop.adopt, adopt or left.path)
                if left.loop:
                    await in_kernel(left.loop.close)
            return
        await self._store.prepare(blob)
        file = device.file = device.resources.enter_context(self._store.open_device(blob))
        if self._store.has(blob.digest):
            device.state = DeviceState.LOCAL
            open_loop = loop.adopt if adopt else loop.attach
            device.loop = await in_kernel(open_loop, adopt or str(file.path))
            return
        device.lazy_file = LazyFile(file, self._chain, self._demand)
        self._session.add(device.lazy_file)
        path = Path(self._session.directory) / device.lazy_file.name
        device.loop = await in_kernel(loop.attach, str(path))

    async def release(self, device: BlobDevice) -> None:
        """Give a device back; the last user's release ends it."""
        async with self._changing:
            device.users -= 1
            if device.users == 0:
                del self._devices[device.blob.digest]
                await in_kernel(self._end, device)

    def _end(self, device: BlobDevice) -> None:
        # Each of them, whatever becomes of the others: last in, first out.
        with device.resources:
            if device.lazy_file:
                device.resources.callback(self._session.remove, device.lazy_file.name)
            if device.loop:
                device.resources.callback(device.loop.close)

    def abort(self, device: BlobDevice) -> None:
        """Fail the reads that wait for this device, and those to come, unless another image uses it too."""
        if device.lazy_file and device.users == 1:
            self._session.abort(device.lazy_file.name)

    async def complete(self, device: BlobDevice) -> None:
        """Verify a blob whose chunks are all here as a whole, and re-point its device to the local file.

        A blob that is not what its digest says makes the device BROKEN. Raises NotFound if chunks are missing.
        """
        if device.state is not DeviceState.LAZY:
            return
        try:
            await self._store.finish(device.blob)
        except DigestMismatch as error:
            device.state = DeviceState.BROKEN
            device.error = error.message
            if device.lazy_file:
                device.lazy_file.failed = error
                self._session.abort(device.lazy_file.name)
            log.error("a device is broken", device=device.path, blob=device.blob.digest, why=str(error))
            return
        await self._uncut(self._swap(device))

    async def _uncut(self, swap: Coroutine[Any, Any, T]) -> T:
        # Not cut short by who asked for it: the kernel would go on, and would need us for its reads.
        task = asyncio.create_task(swap)
        self._swaps.add(task)
        task.add_done_callback(self._swaps.discard)
        return await asyncio.shield(task)

    async def _swap(self, device: BlobDevice) -> None:
        async with self._changing:
            if device.loop is None or not device.users:
                return
            if not self._store.has(device.blob.digest):
                return  # chunks were withdrawn meanwhile
            path = self._store.data_path(device.blob)
            try:
                if not await in_kernel(device.loop.swap, str(path)):
                    self._fallbacks.note("device reads its local file by buffered I/O", f"{device.path}: {path}")
            except DadiError as error:
                # All bytes are here, so reads are hits; only our process stays in their way.
                self._fallbacks.note("device not swapped to the local file", f"{device.path}: {error}")
                device.error = error.message
                return
            device.state, device.error = DeviceState.LOCAL, None
            if device.lazy_file:
                await in_kernel(self._session.remove, device.lazy_file.name)
                device.lazy_file = None
        log.info("local: no longer in the read path", device=device.path, blob=device.blob.digest)

    async def demote(self, digest: str) -> bool:
        """Have a local device read through us again, since its file has wrong bytes; say whether there was one.

        The store must have withdrawn the chunks before; `complete` makes the device local again.
        """
        return await self._uncut(self._demote(digest))

    async def _demote(self, digest: str) -> bool:
        async with self._changing:
            device = self._devices.get(digest)
            if device is None or device.state is not DeviceState.LOCAL or not device.loop or not device.file:
                return False
            # The store's own chunk table: while the blob was whole, another may have done for the device.
            device.blob = device.file.blob
            device.lazy_file = LazyFile(device.file, self._chain, self._demand)
            self._session.add(device.lazy_file)
            path = Path(self._session.directory) / device.lazy_file.name
            try:
                await in_kernel(device.loop.swap, str(path))
            except DadiError:
                await in_kernel(self._session.remove, device.lazy_file.name)
                device.lazy_file = None
                raise
            device.state = DeviceState.LAZY
        log.error("a local file has wrong bytes: read through dadi-node until it is whole", device=device.path,
                  blob=digest)  # fmt: skip
        return True

    async def settle(self, seconds: float) -> None:
        """Wait until no device is being re-pointed, but not for ever."""
        if self._swaps:
            await asyncio.wait(self._swaps, timeout=seconds)

    # ---- after another process

    async def reopen(self) -> int:
        """Open the FUSE files under an earlier process's loop devices; return how many. Touches no mount."""
        run, name = os.path.split(self._session.directory)
        self._place = os.path.join(await in_kernel(os.path.realpath, run), name)
        for status in await in_kernel(loop.attached):
            place, _, file_name = _alive(status.backing_file).rpartition("/")
            digest = f"sha256:{file_name}"
            if place != self._place or digest in self._left:
                continue
            blob = self._store.find(digest)
            if blob is None:
                self._fallbacks.note("device not taken over", f"{status.path}: {digest} is not in the store")
                continue
            with contextlib.ExitStack() as resources:
                file = LazyFile(resources.enter_context(self._store.open_device(blob)), self._chain, self._demand)
                self._session.add(file)
                self._left[digest] = _Left(status.path, file, resources.pop_all())
        return len(self._left)

    async def hold_left(self) -> None:
        """Open the devices under which files were opened again: they must not end with the last mount on them.

        Only when the FUSE files are served: a call of the process before may stand in the way, and wait for them.
        """
        for left in self._left.values():
            with contextlib.suppress(DadiError):  # it has ended
                left.loop = await in_kernel(loop.adopt, left.path)

    async def stands(self, blob: Blob, name: str) -> bool:
        """Whether the loop device `name` of an earlier process is over this blob, and can be adopted."""
        device = self._devices.get(blob.digest)
        if device is not None:
            return device.path == name
        if await in_kernel(loop.backing_file, name) == str(self._store.data_path(blob)):
            return self._store.has(blob.digest)
        return blob.digest in self._left and await in_kernel(self._over_fuse, blob, name)

    async def end_left(self, keep: set[str]) -> None:
        """Let reads fail of what no mount has claimed, but for the devices `keep` (/dev/loopN)."""
        for digest, left in list(self._left.items()):
            if left.path in keep:
                continue
            async with self._changing:  # a mount that is being made may be about to claim it
                if self._left.pop(digest, None) is not None:
                    await in_kernel(self._session.remove, left.file.name)
                    await in_kernel(left.close)

    def _over_fuse(self, blob: Blob, name: str) -> bool:
        backing = loop.backing_file(name)
        return backing is not None and _alive(backing) == f"{self._place}/{blob.digest[7:]}"

    def rows(self, blobs: list[Blob]) -> list[dict[str, Any]]:
        """Return what `dadi status` shows of the devices of an image."""
        rows = []
        for blob in blobs:
            device = self._devices.get(blob.digest)
            rows.append({
                "blob": blob.digest,
                "bytes": blob.size,
                "bytes_present": self._store.present_bytes(blob),
                "state": device.state.value if device else "detached",
                "device": device.path if device else None,
                "error": device.error if device else None,
            })  # fmt: skip
        return rows


def _alive(backing_file: str) -> str:
    """Return the path of a file whose name may have been taken back meanwhile."""
    return backing_file.removesuffix(" (deleted)")
