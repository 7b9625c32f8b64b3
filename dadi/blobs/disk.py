"""The blob store on disk: sparse files, a byte a chunk, least recently used out. What is asked of it is all in here.

    DiskBlobs      the contract (`store.py`): who may read, who writes, which of two writers makes the blob
      Stored       `stored.py`: one blob: the states of its chunks and of itself, what may happen to them. No I/O
      Space        `space.py`: all of them: who is in use, who is evicted, the threads
      Vouching     `vouching.py`: claims, the whole, wrong bytes: what is said of a blob is made true, and durable
    start_stop     what one process leaves to the next, cleanly or not
    files, ingest  what worker threads do with bytes, and in which order it becomes durable; `layout.py`: where

State is changed by the event loop only; worker threads read and write file data and nothing else. The kernel's own
readers (`fuse/`) look at `DeviceFile.present` and `.fd` directly, from their threads: a byte of `present` becomes 1
only after the data is in the file, and the file stays open while the device file is held.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from dadi import locks, state_version
from dadi.blobs import files, start_stop
from dadi.blobs.files import CHECK_DISK
from dadi.blobs.ingest import DiskIngest, move_in
from dadi.blobs.layout import BlobDirectory, padded
from dadi.blobs.source import Urgency
from dadi.blobs.space import Room, Space
from dadi.blobs.stored import State, Stored
from dadi.blobs.vouching import Vouching
from dadi.errors import DadiError, DigestMismatch, Malformed, NotFound, StoreFull
from dadi.index.chunks import Blob, blob_of


class DeviceFile:
    """A held blob as the kernel's readers need it: its open data file, its size padded to 4096, and what is present."""

    def __init__(self, stored: Stored, fd: int) -> None:
        self.blob = stored.blob
        self.fd = fd
        self.size = padded(stored.blob.size)
        self.present = stored.present
        self.chunk_shift = stored.blob.table.chunk_size.bit_length() - 1
        self.path = stored.directory.data


class DiskBlobs:
    """See the head of this file, and `BlobStore` for the contract. `limit` in bytes, 0 for none."""

    def __init__(self, root: Path, *, limit: int = 0, clock: Callable[[], float] = time.time) -> None:
        """Open or create the store; blocks for as long as reading its small files takes.

        Raises Conflict if another process uses it.
        """
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root = root = root.resolve()
        self.limit = limit
        self._space = Space(root, limit, clock)
        self._vouching = Vouching(self._space)
        self._names = itertools.count()
        self._closed = False
        self._finishing: dict[asyncio.Task[None], ExitStack] = {}
        """What holds each blob that is being finished."""
        # Blobs come into being one after the other, so that no two writers make the same one.
        self._changing = asyncio.Lock()
        (root / "blobs").mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = locks.take(root, "two daemons need two state directories")
        for stored, used_at in start_stop.found(root):
            self._space.add(stored, used_at)

    @classmethod
    def of_state(cls, state: Path, limit: int = 0) -> DiskBlobs:
        """Open the store of a program whose state is in `state`; blocks.

        Raises Unsupported, before anything that we do not understand is thrown away, if a newer dadi has left that.
        """
        state.mkdir(parents=True, exist_ok=True)
        state_version.check(state)
        return cls(state / "store", limit=limit)

    def __repr__(self) -> str:
        return f"DiskBlobs({self.root}, {len(self._space.blobs)} blobs, {self._space.bytes} bytes)"

    async def close(self) -> None:
        """Sync what is partly here, and say that this stop was clean."""
        if self._closed:
            return
        self._closed = True
        # First let end what still writes: `present` must not become durable before its data.
        await asyncio.gather(*self._finishing, return_exceptions=True)
        await asyncio.to_thread(self._space.close)
        partial = [stored for stored in self._space.blobs.values() if not stored.complete]
        await asyncio.to_thread(start_stop.leave, self.root, partial)
        self._lock.release()

    # ---- what is here

    def has(self, digest: str) -> bool:
        """Whole and verified?"""
        stored = self._space.blobs.get(digest)
        return stored is not None and stored.complete

    def find(self, digest: str) -> Blob | None:
        """Return what is known of it."""
        stored = self._space.blobs.get(digest)
        return stored.blob if stored else None

    def _entry(self, blob: Blob) -> Stored | None:
        """Return the state of `blob` if what is here was verified by the same table, or as a whole."""
        stored = self._space.blobs.get(blob.digest)
        return stored if stored is not None and stored.serves(blob) else None

    async def missing(self, blob: Blob, chunks: range | None = None) -> list[int]:
        """Return the chunks that are not here, after having verified what an unclean stop left in doubt."""
        chunks = range(blob.table.count) if chunks is None else chunks
        stored = self._entry(blob)
        if stored is not None and not stored.claimed.isdisjoint(chunks):
            with self._space.using(stored, touch=False):
                await self._vouching.look_at_claims(stored, chunks)
        return list(chunks) if stored is None else stored.missing(chunks)

    def believed(self, blob: Blob, chunks: range) -> list[int]:
        """Return the chunks that are here, or are said to be here by what an unclean stop left."""
        stored = self._entry(blob)
        return [] if stored is None else stored.believed(chunks)

    def present_bytes(self, blob: Blob) -> int:
        """Return how many bytes of the blob are here (verified or claimed)."""
        stored = self._entry(blob)
        return stored.bytes if stored else 0

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run, or raise NotFound if any of it is not here."""
        if not chunks:
            return []
        missing = await self.missing(blob, chunks)
        stored = self._entry(blob)
        if stored is None or missing:
            raise NotFound(f"chunks {chunks.start} to {chunks.stop - 1} of {blob} are not all in {self.root}")
        with self._space.using(stored):
            return await self._space.run(files.read_chunks, stored.directory.data, blob, chunks)

    # ---- taking in

    async def keep(self, blob: Blob, first: int, parts: list[bytes]) -> None:
        """Write, then mark."""
        stored = self._entry(blob) or await self._create(blob)
        run = range(first, first + len(parts))
        if stored.state is not State.PARTIAL or not stored.missing(run):
            return
        with self._space.using(stored), self._space.reserved(sum(map(len, parts))):
            if stored.unmarked:
                await self._vouching.mark(stored)
            await self._space.writing(stored.directory, files.write_chunks, stored.directory, blob, first, parts)
            self._space.bytes += stored.come(first, parts)

    async def _create(self, blob: Blob) -> Stored:
        async with self._changing:
            stored = self._entry(blob)
            if stored is not None:
                return stored
            old = self._space.blobs.get(blob.digest)
            if old is not None:
                if old.complete:
                    hint = "who says that it has another size is wrong, or lies"
                    raise Malformed(f"{blob} is here, whole and verified, and has {old.blob.size} bytes", hint=hint)
                if old.holds:
                    hint = "unmount what uses it first"
                    raise StoreFull(f"{blob} is held here with another chunk table", hint=hint)
                await self._space.discard(old)
            await self._space.until_left(blob.digest)
            directory = BlobDirectory.of(self.root, blob.digest)
            try:
                await self._space.writing(directory, directory.create, blob)
            except DadiError:
                await self._space.run(files.remove, directory)
                raise
            return self._space.add(Stored(directory, blob, bytearray(blob.table.count), trusted=True))

    async def finish(self, blob: Blob) -> None:
        """Hash the whole, sync it, mark it complete."""
        stored = self._entry(blob)
        if stored is not None and stored.complete:
            return
        if stored is None or await self.missing(blob):
            raise NotFound(f"{blob} is not all in {self.root}")
        # A task of ours: who is cancelled must not leave "complete" on the disk with nobody here who knows of it.
        holding = ExitStack()
        holding.enter_context(self._space.using(stored))
        task = asyncio.create_task(self._vouching.finish(stored))
        self._finishing[task] = holding
        task.add_done_callback(self._finished)
        await asyncio.shield(task)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._finishing.pop(task).close()
        if not task.cancelled():
            task.exception()  # looked at: who waited for it may have gone

    async def withdraw(self, blob: Blob, chunks: Collection[int]) -> None:
        """Believe these chunks no more, since their bytes are not what they should be; the blob is not complete then.

        Raises StoreFull, Unavailable if that cannot be written down: this process does not believe them all the same.
        """
        stored = self._entry(blob)
        if stored is not None:
            with self._space.using(stored, touch=False):
                await self._vouching.withdraw(stored, chunks)

    def ingest(self) -> DiskIngest:
        """Begin a whole blob."""
        return DiskIngest(self.root / "incoming" / str(next(self._names)), self._space.room_maker(), self.limit)

    async def commit(self, ingest: object, blob: Blob, *, asked: bool = True) -> None:
        """Move the ingested file into place. `asked`: False for what nobody has asked for, which goes first then."""
        assert isinstance(ingest, DiskIngest)
        try:
            if ingest.size != blob.size:
                raise DigestMismatch(f"{ingest.size} bytes were written of {blob.digest}, which has {blob.size}")
            async with self._changing:
                stored = self._space.blobs.get(blob.digest)
                if stored is None or not (stored.complete or stored.holds):
                    await self._move_in(ingest, blob, stored, asked)
                    return
            if not stored.complete:
                if stored.blob.table != blob.table:
                    hint = "unmount what uses it first"
                    raise StoreFull(f"{blob} is held here with another chunk table", hint=hint)
                with self._space.using(stored):
                    # Mounted while it is partly here: fill the file that the kernel has open, not another one.
                    await self._space.writing(stored.directory, ingest.seal)
                    await self._fill_from(stored, ingest.path)
        finally:
            await self._space.run(ingest.abort)

    async def _move_in(self, ingest: DiskIngest, blob: Blob, partial: Stored | None, asked: bool) -> None:
        if partial is not None:
            await self._space.discard(partial)
        await self._space.until_left(blob.digest)
        directory = BlobDirectory.of(self.root, blob.digest)
        with self._space.reserved(blob.size):
            try:
                await self._space.writing(directory, move_in, ingest, directory, blob)
            except DadiError:
                await self._space.run(files.remove, directory)
                raise
        if not asked:
            with suppress(OSError):  # for the next start; without it, it counts as used just now
                await self._space.run(os.utime, directory.data, (0.0, 0.0))
        self._space.add(Stored(directory, blob, None, trusted=True), used_at=None if asked else 0.0)

    async def _fill_from(self, stored: Stored, path: Path) -> None:
        for chunk in await self.missing(stored.blob):
            parts = await self._space.run(files.read_chunks, path, stored.blob, range(chunk, chunk + 1))
            await self._space.run(stored.blob.verify, chunk, parts[0], source=str(path), hint=CHECK_DISK)
            await self.keep(stored.blob, chunk, parts)
        await self.finish(stored.blob)

    async def put(self, data: bytes) -> Blob:
        """Store a small whole blob."""
        blob = await self._space.run(blob_of, data)
        if not self.has(blob.digest):
            ingest = self.ingest()
            try:
                await self._space.run(ingest.write, data)
            except BaseException:
                await self._space.run(ingest.abort)
                raise
            await self.commit(ingest, blob)
        return blob

    async def get(self, digest: str) -> bytes:
        """Return a small whole blob."""
        stored = self._space.blobs.get(digest)
        if stored is None or not stored.complete:
            raise NotFound(f"{digest} is not in {self.root}")
        return b"".join(await self.read(stored.blob, range(stored.blob.table.count)))

    # ---- holding and letting go

    @contextmanager
    def hold(self, blob: Blob, *, touch: bool = True) -> Iterator[None]:
        """Keep it from eviction; `touch`: it counts as used."""
        stored = self._space.blobs.get(blob.digest)
        if stored is None:
            raise NotFound(f"{blob} is not in {self.root}: nothing to hold")
        with self._space.using(stored, touch=touch):
            yield

    @contextmanager
    def open_device(self, blob: Blob) -> Iterator[DeviceFile]:
        """Hold the blob and give its file to the kernel's readers; `prepare` must have been called."""
        stored = self._entry(blob)
        if stored is None:
            raise NotFound(f"{blob} is not in {self.root}")
        with self._space.using(stored):
            fd = os.open(stored.directory.data, os.O_RDONLY | os.O_CLOEXEC)
            try:
                yield DeviceFile(stored, fd)
            finally:
                os.close(fd)

    def data_path(self, blob: Blob) -> Path:
        """Return where the blob's bytes are, padded to 4096."""
        return BlobDirectory.of(self.root, blob.digest).data

    async def prepare(self, blob: Blob) -> None:
        """Make the blob's (empty) sparse file, if it has none. Raises StoreFull."""
        if self._entry(blob) is None:
            await self._create(blob)

    def digests(self) -> list[str]:
        """Return all blobs that are here in whole or in part, in no order."""
        return list(self._space.blobs)

    async def room(self, more: int, keep: Collection[str] = ()) -> Room:
        """Say whether `more` bytes would fit, and what would be evicted for them; evict nothing.

        `keep`: digests of blobs that the bytes are wanted together with.
        """
        return await self._space.room(more, keep)

    async def remove(self, digest: str) -> bool:
        """Throw a blob away unless it is in use; say whether it was."""
        stored = self._space.blobs.get(digest)
        if stored is None or stored.holds:
            return False
        await self._space.discard(stored)
        return True

    def statistics(self) -> dict[str, int]:
        """Counts and bytes."""
        space = self._space
        claims = sum(len(stored.claimed) for stored in space.blobs.values())
        return {"blobs": len(space.blobs), "bytes": space.bytes, "limit": self.limit, "evicted": space.evicted,
                "held": len(space.held), "unverified_chunks": claims}  # fmt: skip
