"""The blob store on disk: sparse files, a byte a chunk, least recently used out. See `layout.py` for the files.

All state lives in `_Stored` objects that only the event loop changes; worker threads read and write file data and
nothing else. A blob is evicted whole, never while it is held or read. After an unclean stop the chunks of blobs that
were not complete are only claims: `read` and `missing` do not believe one before it has been hashed again.

The kernel's own readers (`fuse/`) look at `DeviceFile.present` and `.fd` directly, from their threads: a byte of
`present` becomes 1 only after the data is in the file, and the file stays open while the device file is held.

Longer than most files here, since every line shares the one state; what touches file data is in `files.py`.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import ParamSpec, TypeVar

import msgspec
import structlog

from dadi import digest as digests
from dadi import locks
from dadi.blobs import files
from dadi.blobs.files import NO_SPACE, RAISE_LIMIT, DiskIngest, full_or_broken
from dadi.blobs.layout import BlobDirectory, padded, sync_directory
from dadi.blobs.source import Urgency
from dadi.errors import DadiError, DigestMismatch, Malformed, NotFound, StoreFull
from dadi.index.chunks import Blob, blob_of

log = structlog.get_logger()
P = ParamSpec("P")
R = TypeVar("R")


class _Stored:
    """One blob's state. `present` has a byte a chunk; `claimed` are chunks to be hashed before they are believed."""

    def __init__(self, directory: BlobDirectory, blob: Blob, present: bytearray | None, *, trusted: bool) -> None:
        self.directory = directory
        self.blob = blob
        self.complete = present is None
        self.claimed: set[int] = set()
        count = blob.table.count
        if present is None:
            present = bytearray(b"\x01" * count)
        elif not trusted:
            self.claimed = {chunk for chunk in range(count) if present[chunk]}
            present = bytearray(count)
        self.present = present
        self.holds = 0
        self.refused = False
        """Its chunk table lied: nothing by that table is kept any more."""
        self.in_doubt = False
        """Its file of claims says more than is known to be true, and cannot be written."""
        self.unmarked = False
        """Complete for the next process, not for this one: its file of marks could not be written."""
        self.vouching = asyncio.Lock()
        """Held by who writes down whether it is complete."""
        self.used_at = 0.0
        self.bytes = blob.size if self.complete else self._count_bytes()

    def _count_bytes(self) -> int:
        table = self.blob.table
        have = self.present.count(1) + len(self.claimed)
        size = have * table.chunk_size
        last = table.count - 1
        if have and (self.present[last] or last in self.claimed):
            size -= table.chunk_size - table.extent(last)[1]
        return size

    def __repr__(self) -> str:
        state = "complete" if self.complete else f"{self.present.count(1)}/{self.blob.table.count} chunks"
        return f"_Stored({digests.short(self.blob.digest)}, {state}, {self.holds} holds)"


class DeviceFile:
    """A held blob as the kernel's readers need it: its open data file, its size padded to 4096, and what is present."""

    def __init__(self, stored: _Stored, fd: int) -> None:
        self.blob = stored.blob
        self.fd = fd
        self.size = padded(stored.blob.size)
        self.present = stored.present
        self.chunk_shift = stored.blob.table.chunk_size.bit_length() - 1
        self.path = stored.directory.data


class Room(msgspec.Struct, frozen=True):
    """An answer of `DiskBlobs.room`. `free` bytes now; `evicted`: (digest, bytes) that would go, the oldest first."""

    free: int
    evicted: tuple[tuple[str, int], ...]
    enough: bool


class DiskBlobs:
    """See the head of this file, and `BlobStore` for the contract. `limit` in bytes, 0 for none."""

    def __init__(self, root: Path, *, limit: int = 0, clock: Callable[[], float] = time.time) -> None:
        """Open or create the store; blocks for as long as reading its small files takes.

        Raises Conflict if another process uses it.
        """
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.root = root = root.resolve()
        self.limit = limit
        self._clock = clock
        self._blobs: dict[str, _Stored] = {}
        self._bytes = 0
        self._evicted = 0
        self._recovered = 0
        self._names = itertools.count()
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="store")
        # Of their own: a write that met a full disk waits in a thread of `_threads` until something was removed.
        self._removals = ThreadPoolExecutor(1, thread_name_prefix="store-removal")
        self._loop: asyncio.AbstractEventLoop | None = None
        self._closed = False
        self._coming = 0
        self._leaving: dict[str, asyncio.Future[None]] = {}
        # Blobs come into being one after the other, so that no two writers make the same one.
        self._changing = asyncio.Lock()
        (root / "blobs").mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = locks.take(root, "two daemons need two state directories")
        self._load()

    def __repr__(self) -> str:
        return f"DiskBlobs({self.root}, {len(self._blobs)} blobs, {self._bytes} bytes)"

    # ---- start and stop

    def _load(self) -> None:
        running = self.root / "running"
        clean = not running.exists()
        shutil.rmtree(self.root / "incoming", ignore_errors=True)
        (self.root / "incoming").mkdir(mode=0o700)
        for path in (self.root / "blobs").iterdir():
            directory = BlobDirectory(path)
            try:
                blob, present = directory.read()
            except Malformed as error:
                # A blob that was being made, or a damaged one: it can be had again.
                log.warning("threw away what is not a whole blob", path=str(path), why=str(error))
                shutil.rmtree(path, ignore_errors=True)
                continue
            stored = self._blobs[blob.digest] = _Stored(directory, blob, present, trusted=clean)
            stored.used_at = directory.data.stat().st_atime
            self._bytes += stored.bytes
            self._recovered += len(stored.claimed)
        if self._recovered:
            log.warning("the last stop was not clean: chunks will be verified again", chunks=self._recovered)
        running.touch(mode=0o600)
        sync_directory(self.root)

    async def close(self) -> None:
        """Sync what is partly here, and say that this stop was clean."""
        if self._closed:
            return
        self._closed = True
        # First let end what still writes: `present` must not become durable before its data.
        await asyncio.to_thread(self._threads.shutdown)
        await asyncio.to_thread(self._removals.shutdown)
        await asyncio.to_thread(self._sync_all, [s for s in self._blobs.values() if not s.complete])
        self._lock.release()

    def _sync_all(self, partial: list[_Stored]) -> None:
        clean = True
        for stored in partial:
            try:
                if stored.unmarked:
                    files.withdraw_or_doom(stored.directory, stored.blob, bytes(stored.present))
                files.sync_partial(stored.directory)
                os.utime(stored.directory.data, (stored.used_at, stored.used_at))
            except OSError as error:
                clean = False
                log.warning("could not sync a blob", blob=stored.blob.digest, why=str(error))
            # Claims that nobody has looked at must not become facts by this stop.
            clean = clean and not stored.claimed and not stored.in_doubt
        if clean:
            try:
                (self.root / "running").unlink(missing_ok=True)
                sync_directory(self.root)
            except OSError as error:
                log.warning("could not say that this stop was clean", root=str(self.root), why=str(error))

    async def _run(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        self._loop = asyncio.get_running_loop()
        return await self._loop.run_in_executor(self._threads, lambda: function(*args, **kwargs))

    # ---- what is here

    def has(self, digest: str) -> bool:
        """Whole and verified?"""
        stored = self._blobs.get(digest)
        return stored is not None and stored.complete

    def find(self, digest: str) -> Blob | None:
        """Return what is known of it."""
        stored = self._blobs.get(digest)
        return stored.blob if stored else None

    def _entry(self, blob: Blob) -> _Stored | None:
        """Return the state of `blob` if what is here was verified by the same table, or as a whole."""
        stored = self._blobs.get(blob.digest)
        if stored and (stored.blob.table == blob.table or (stored.complete and stored.blob.size == blob.size)):
            return stored
        return None

    async def missing(self, blob: Blob, chunks: range | None = None) -> list[int]:
        """Return the chunks that are not here, after having verified what an unclean stop left in doubt."""
        chunks = range(blob.table.count) if chunks is None else chunks
        stored = self._entry(blob)
        if stored is not None and not stored.claimed.isdisjoint(chunks):
            with self._using(stored, touch=False):
                await self._verify_claims(stored, chunks)
        return self._missing(stored, chunks)

    @staticmethod
    def _missing(stored: _Stored | None, chunks: range) -> list[int]:
        if stored is None:
            return list(chunks)
        if not chunks or stored.present.find(0, chunks.start, chunks.stop) < 0:
            return []
        return [chunk for chunk in chunks if not stored.present[chunk]]

    def believed(self, blob: Blob, chunks: range) -> list[int]:
        """Return the chunks that are here, or are said to be here by what an unclean stop left."""
        stored = self._entry(blob)
        if stored is None:
            return []
        return [chunk for chunk in chunks if stored.present[chunk] or chunk in stored.claimed]

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
        with self._using(stored):
            return await self._run(files.read_chunks, stored.directory.data, blob, chunks)

    async def _verify_claims(self, stored: _Stored, chunks: range) -> None:
        claims = sorted(stored.claimed.intersection(chunks))
        good, written = await self._run(files.hash_again, stored.directory, stored.blob, claims)
        stored.in_doubt |= not written
        for chunk in claims:
            if chunk not in stored.claimed:
                continue  # somebody else looked meanwhile
            stored.claimed.discard(chunk)
            if chunk in good:
                stored.present[chunk] = 1
            else:
                log.warning("a chunk on disk is not what it should be; it will be fetched", blob=stored.blob.digest)
                self._bytes -= stored.blob.table.extent(chunk)[1]
                stored.bytes -= stored.blob.table.extent(chunk)[1]

    # ---- taking in

    async def keep(self, blob: Blob, first: int, parts: list[bytes]) -> None:
        """Write, then mark."""
        stored = self._entry(blob) or await self._create(blob)
        if stored.complete or stored.refused or not self._missing(stored, range(first, first + len(parts))):
            return
        with self._using(stored), self._reserved(sum(map(len, parts))):
            if stored.unmarked:
                await self._mark(stored)
            await self._writing(stored.directory, files.write_chunks, stored.directory, blob, first, parts)
            if stored.refused:
                return
            for chunk, part in enumerate(parts, first):
                if not stored.present[chunk]:
                    stored.present[chunk] = 1
                    if chunk in stored.claimed:
                        stored.claimed.discard(chunk)
                    else:
                        stored.bytes += len(part)
                        self._bytes += len(part)

    async def _create(self, blob: Blob) -> _Stored:
        async with self._changing:
            stored = self._entry(blob)
            if stored is not None:
                return stored
            old = self._blobs.get(blob.digest)
            if old is not None:
                if old.complete:
                    hint = "who says that it has another size is wrong, or lies"
                    raise Malformed(f"{blob} is here, whole and verified, and has {old.blob.size} bytes", hint=hint)
                if old.holds:
                    hint = "unmount what uses it first"
                    raise StoreFull(f"{blob} is held here with another chunk table", hint=hint)
                await self._discard(old)
            await self._until_left(blob.digest)
            directory = BlobDirectory.of(self.root, blob.digest)
            try:
                await self._writing(directory, directory.create, blob)
            except DadiError:
                await self._run(files.remove, directory)
                raise
            stored = self._blobs[blob.digest] = _Stored(directory, blob, bytearray(blob.table.count), trusted=True)
            stored.used_at = self._clock()
            return stored

    async def finish(self, blob: Blob) -> None:
        """Hash the whole, sync it, mark it complete."""
        stored = self._entry(blob)
        if stored is not None and stored.complete:
            return
        if stored is None or await self.missing(blob):
            raise NotFound(f"{blob} is not all in {self.root}")
        with self._using(stored):
            async with stored.vouching:
                await self._finish(stored, blob)

    async def _finish(self, stored: _Stored, blob: Blob) -> None:
        if not stored.complete:
            if self._missing(stored, range(stored.blob.table.count)):
                raise NotFound(f"{blob} is not all in {self.root} any more")
            try:
                good = await self._run(files.complete, stored.directory, blob)
            except OSError as error:
                self._withdraw(stored)
                raise full_or_broken(stored.directory.path, error) from None
            if not good:
                # No await from here to the raise: nobody may keep a chunk by the same table in between.
                stored.refused = True
                self._withdraw(stored)
                raise DigestMismatch(
                    f"all chunks of {blob} match its chunk table, but the whole does not match its digest",
                    hint="its chunk table is wrong: unmount the images that have it, and mount them again",
                )
            stored.complete = True

    async def withdraw(self, blob: Blob, chunks: Collection[int]) -> None:
        """Believe these chunks no more, since their bytes are not what they should be; the blob is not complete then.

        Raises StoreFull, Unavailable if that cannot be written down: this process does not believe them all the same.
        """
        stored = self._entry(blob)
        if stored is None:
            return
        with self._using(stored, touch=False):
            async with stored.vouching:
                await self._withdraw_some(stored, blob, chunks)

    async def _withdraw_some(self, stored: _Stored, blob: Blob, chunks: Collection[int]) -> None:
        gone = [chunk for chunk in chunks if stored.present[chunk] or chunk in stored.claimed]
        for chunk in gone:
            stored.present[chunk] = 0
            stored.claimed.discard(chunk)
            length = blob.table.extent(chunk)[1]
            stored.bytes -= length
            self._bytes -= length
        stored.unmarked |= stored.complete
        marks = bytes(stored.present) if stored.unmarked else None
        try:
            # Until this has ended a complete blob keeps nothing: there is no file of marks yet.
            await self._writing(stored.directory, files.withdraw, stored.directory, blob, gone, marks)
            stored.unmarked = False
        except DadiError:
            stored.in_doubt = True
            raise
        finally:
            stored.complete = False

    async def _mark(self, stored: _Stored) -> None:
        """Write the marks that could not be written when chunks of a complete blob were withdrawn."""
        async with stored.vouching:
            if stored.unmarked:
                marks = bytes(stored.present)
                await self._writing(stored.directory, files.withdraw, stored.directory, stored.blob, [], marks)
                stored.unmarked = False

    def _withdraw(self, stored: _Stored) -> None:
        """Believe nothing of a blob any more."""
        stored.present[:] = bytes(stored.blob.table.count)
        stored.claimed.clear()
        self._bytes -= stored.bytes
        stored.bytes = 0

    async def _writing(
        self, directory: BlobDirectory, work: Callable[P, None], *args: P.args, **kwargs: P.kwargs
    ) -> None:
        """Run `work`, which writes, in a thread; on a full disk evict what nobody uses and try again.

        Raises StoreFull, or Unavailable where the disk is broken.
        """
        while True:
            try:
                return await self._run(work, *args, **kwargs)
            except OSError as error:
                gone = self._evict_one() if error.errno in NO_SPACE else None
                if gone is None:
                    raise full_or_broken(directory.path, error) from None
                await gone

    def ingest(self) -> DiskIngest:
        """Begin a whole blob."""
        self._loop = asyncio.get_running_loop()
        return DiskIngest(self.root / "incoming" / str(next(self._names)), self._make_room_from_thread, self.limit)

    async def commit(self, ingest: object, blob: Blob) -> None:
        """Move the ingested file into place."""
        assert isinstance(ingest, DiskIngest)
        try:
            if ingest.size != blob.size:
                raise DigestMismatch(f"{ingest.size} bytes were written of {blob}")
            async with self._changing:
                stored = self._blobs.get(blob.digest)
                if stored is None or not (stored.complete or stored.holds):
                    await self._move_in(ingest, blob, stored)
                    return
            if not stored.complete:
                if stored.blob.table != blob.table:
                    hint = "unmount what uses it first"
                    raise StoreFull(f"{blob} is held here with another chunk table", hint=hint)
                with self._using(stored):
                    # Mounted while it is partly here: fill the file that the kernel has open, not another one.
                    await self._writing(stored.directory, ingest.seal)
                    await self._fill_from(stored, ingest.path)
        finally:
            await self._run(ingest.abort)

    async def _move_in(self, ingest: DiskIngest, blob: Blob, partial: _Stored | None) -> None:
        if partial is not None:
            await self._discard(partial)
        await self._until_left(blob.digest)
        directory = BlobDirectory.of(self.root, blob.digest)
        with self._reserved(blob.size):
            try:
                await self._run(files.move_in, ingest, directory, blob)
            except OSError as error:
                await self._run(files.remove, directory)
                raise full_or_broken(directory.path, error) from None
        stored = self._blobs[blob.digest] = _Stored(directory, blob, None, trusted=True)
        stored.used_at = self._clock()
        self._bytes += blob.size

    async def _fill_from(self, stored: _Stored, path: Path) -> None:
        for chunk in await self.missing(stored.blob):
            parts = await self._run(files.read_chunks, path, stored.blob, range(chunk, chunk + 1))
            await self._run(stored.blob.table.verify, chunk, parts[0], source=str(path))
            await self.keep(stored.blob, chunk, parts)
        await self.finish(stored.blob)

    async def put(self, data: bytes) -> Blob:
        """Store a small whole blob."""
        blob = await self._run(blob_of, data)
        if not self.has(blob.digest):
            ingest = self.ingest()
            try:
                await self._run(ingest.write, data)
            except BaseException:
                await self._run(ingest.abort)
                raise
            await self.commit(ingest, blob)
        return blob

    async def get(self, digest: str) -> bytes:
        """Return a small whole blob."""
        stored = self._blobs.get(digest)
        if stored is None or not stored.complete:
            raise NotFound(f"{digest} is not in {self.root}")
        return b"".join(await self.read(stored.blob, range(stored.blob.table.count)))

    # ---- holding and letting go

    @contextmanager
    def hold(self, blob: Blob, *, touch: bool = True) -> Iterator[None]:
        """Keep it from eviction; `touch`: it counts as used."""
        stored = self._blobs.get(blob.digest)
        if stored is None:
            raise NotFound(f"{blob} is not in {self.root}: nothing to hold")
        with self._using(stored, touch=touch):
            yield

    @contextmanager
    def _using(self, stored: _Stored, *, touch: bool = True) -> Iterator[None]:
        stored.holds += 1
        if touch:
            stored.used_at = self._clock()
        try:
            yield
        finally:
            stored.holds -= 1

    @contextmanager
    def open_device(self, blob: Blob) -> Iterator[DeviceFile]:
        """Hold the blob and give its file to the kernel's readers; `prepare` must have been called."""
        stored = self._entry(blob)
        if stored is None:
            raise NotFound(f"{blob} is not in {self.root}")
        with self._using(stored):
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

    @contextmanager
    def _reserved(self, more: int) -> Iterator[None]:
        """Inside, `more` bytes have their place under the limit, others were evicted for them if it took that.

        Raises StoreFull, and then evicts nothing, if they cannot fit.
        """
        if self.limit:
            in_use = sum(stored.bytes for stored in self._blobs.values() if stored.holds)
            if in_use + self._coming + more > self.limit:
                why = f"the store's limit of {self.limit} bytes is reached by blobs in use"
                raise StoreFull(why, hint=RAISE_LIMIT)
            while self._bytes + self._coming + more > self.limit and self._evict_one() is not None:
                pass
        self._coming += more
        try:
            yield
        finally:
            self._coming -= more

    def digests(self) -> list[str]:
        """Return all blobs that are here in whole or in part, in no order."""
        return list(self._blobs)

    async def room(self, more: int, keep: Collection[str] = ()) -> Room:
        """Say whether `more` bytes would fit, and what would be evicted for them; evict nothing.

        `keep`: digests of blobs that the bytes are wanted together with.
        """
        disk = (await self._run(shutil.disk_usage, self.root)).free
        free = min(disk, self.limit - self._bytes - self._coming) if self.limit else disk
        victims: list[tuple[str, int]] = []
        gain = 0
        loose = (stored for stored in self._blobs.values() if not stored.holds and stored.blob.digest not in keep)
        for stored in sorted(loose, key=lambda stored: stored.used_at):
            if free + gain >= more:
                break
            victims.append((stored.blob.digest, stored.bytes))
            gain += stored.bytes
        return Room(max(0, free), tuple(victims), free + gain >= more)

    def _make_room_from_thread(self) -> bool:
        """For an ingest that met a full disk: evict one blob; False if there is none to evict."""
        assert self._loop is not None

        async def evict() -> bool:
            gone = self._evict_one()
            if gone is None:
                return False
            await gone
            return True

        return asyncio.run_coroutine_threadsafe(evict(), self._loop).result()

    def _evict_one(self) -> asyncio.Future[None] | None:
        """Forget the blob that was not used for longest; its files go in a thread. None if all are in use."""
        free = [stored for stored in self._blobs.values() if not stored.holds]
        if not free:
            return None
        victim = min(free, key=lambda stored: stored.used_at)
        log.info("evicted a blob", blob=victim.blob.digest, bytes=victim.bytes)
        self._evicted += 1
        return self._discard(victim)

    def _discard(self, stored: _Stored) -> asyncio.Future[None]:
        digest = stored.blob.digest
        del self._blobs[digest]
        self._bytes -= stored.bytes
        loop = asyncio.get_running_loop()
        gone = loop.run_in_executor(self._removals, files.remove, stored.directory)
        self._leaving[digest] = gone
        gone.add_done_callback(lambda done: self._left(digest, done))
        return gone

    def _left(self, digest: str, done: asyncio.Future[None]) -> None:
        if self._leaving.get(digest) is done:
            del self._leaving[digest]

    async def _until_left(self, digest: str) -> None:
        """Wait until the files of an earlier life of this blob are gone."""
        leaving = self._leaving.get(digest)
        if leaving is not None:
            await asyncio.wait([leaving])

    async def remove(self, digest: str) -> bool:
        """Throw a blob away unless it is in use; say whether it was."""
        stored = self._blobs.get(digest)
        if stored is None or stored.holds:
            return False
        await self._discard(stored)
        return True

    def statistics(self) -> dict[str, int]:
        """Counts and bytes."""
        held = sum(1 for stored in self._blobs.values() if stored.holds)
        claims = sum(len(stored.claimed) for stored in self._blobs.values())
        return {"blobs": len(self._blobs), "bytes": self._bytes, "limit": self.limit, "evicted": self._evicted,
                "held": held, "unverified_chunks": claims}  # fmt: skip
