"""A blob store in memory: the fake for tests and simulations. It passes the same contract tests as the one on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

from dadi.blobs.source import Urgency
from dadi.errors import Conflict, DigestMismatch, NotFound, StoreFull
from dadi.index.chunks import Blob, blob_of


class MemoryIngest:
    """See `dadi.blobs.store.Ingest`."""

    def __init__(self, limit: int) -> None:
        self.data = bytearray()
        self.ended = False
        self._limit = limit

    def write(self, data: bytes | memoryview) -> None:
        """Append."""
        if self.ended:
            raise Conflict("this ingest has ended")
        if self._limit and len(self.data) + len(data) > self._limit:
            raise StoreFull(f"a blob of more than {self._limit} bytes does not fit the store")
        self.data += data

    def abort(self) -> None:
        """Forget."""
        self.ended = True
        self.data.clear()


class MemoryBlobs:
    """See `dadi.blobs.store.BlobStore`. Least recently used is what comes first in `_blobs`."""

    def __init__(self, *, limit: int = 0) -> None:
        self.limit = limit
        self._blobs: dict[str, tuple[Blob, dict[int, bytes]]] = {}
        self._complete: set[str] = set()
        self._holds: dict[str, int] = {}
        self._evicted = 0

    def __repr__(self) -> str:
        return f"MemoryBlobs({len(self._blobs)} blobs)"

    def has(self, digest: str) -> bool:
        """Whole and verified?"""
        return digest in self._complete

    def find(self, digest: str) -> Blob | None:
        """Return what is known of it."""
        return self._blobs[digest][0] if digest in self._blobs else None

    async def missing(self, blob: Blob, chunks: range | None = None) -> list[int]:
        """Return the chunks that are not here."""
        have = self._chunks(blob)
        return [chunk for chunk in (range(blob.table.count) if chunks is None else chunks) if chunk not in have]

    def _chunks(self, blob: Blob) -> dict[int, bytes]:
        """Return what is here of the blob, cut as its own table says."""
        known, have = self._blobs.get(blob.digest, (blob, {}))
        if known.table == blob.table:
            return have
        if blob.digest not in self._complete or known.size != blob.size:
            return {}
        data = b"".join(have[chunk] for chunk in sorted(have))
        extents = map(blob.table.extent, range(blob.table.count))
        return {chunk: data[offset : offset + length] for chunk, (offset, length) in enumerate(extents)}

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run."""
        if not chunks:
            return []
        if await self.missing(blob, chunks):
            raise NotFound(f"chunks {chunks.start} to {chunks.stop - 1} of {blob} are not all here")
        self._touch(blob.digest)
        have = self._chunks(blob)
        return [have[chunk] for chunk in chunks]

    async def keep(self, blob: Blob, first: int, parts: list[bytes]) -> None:
        """Keep."""
        have = self._blobs.setdefault(blob.digest, (blob, {}))[1]
        self._touch(blob.digest)
        new = {chunk: part for chunk, part in enumerate(parts, first) if chunk not in have}
        with self.hold(blob):
            self._make_room(sum(map(len, new.values())))
        have.update(new)

    async def finish(self, blob: Blob) -> None:
        """Verify the whole."""
        if await self.missing(blob):
            raise NotFound(f"{blob} is not all here")
        have = self._blobs[blob.digest][1] if blob.digest in self._blobs else {}
        if "sha256:" + hashlib.sha256(b"".join(have[chunk] for chunk in sorted(have))).hexdigest() != blob.digest:
            have.clear()
            raise DigestMismatch(f"all chunks of {blob} match its table, but the whole does not match its digest")
        self._complete.add(blob.digest)

    def ingest(self) -> MemoryIngest:
        """Begin a whole blob."""
        return MemoryIngest(self.limit)

    async def commit(self, ingest: object, blob: Blob) -> None:
        """Make the ingested bytes the blob."""
        assert isinstance(ingest, MemoryIngest)
        data = bytes(ingest.data)
        ingest.abort()
        if blob.digest in self._complete:
            return
        if len(data) != blob.size:
            raise DigestMismatch(f"{len(data)} bytes were written of {blob}")
        parts = [data[at : at + blob.table.chunk_size] for at in range(0, len(data), blob.table.chunk_size)]
        await self.keep(blob, 0, parts)
        self._complete.add(blob.digest)

    async def put(self, data: bytes) -> Blob:
        """Store a small whole blob."""
        blob = blob_of(data)
        ingest = self.ingest()
        ingest.write(data)
        await self.commit(ingest, blob)
        return blob

    async def get(self, digest: str) -> bytes:
        """Return a small whole blob."""
        if digest not in self._complete:
            raise NotFound(f"{digest} is not here")
        blob = self._blobs[digest][0]
        return b"".join(await self.read(blob, range(blob.table.count)))

    @contextmanager
    def hold(self, blob: Blob) -> Iterator[None]:
        """Keep it from eviction."""
        if blob.digest not in self._blobs:
            raise NotFound(f"{blob} is not here: nothing to hold")
        self._holds[blob.digest] = self._holds.get(blob.digest, 0) + 1
        try:
            yield
        finally:
            self._holds[blob.digest] -= 1

    def _touch(self, digest: str) -> None:
        self._blobs[digest] = self._blobs.pop(digest)

    def _bytes(self) -> int:
        return sum(len(part) for _, have in self._blobs.values() for part in have.values())

    def _make_room(self, more: int) -> None:
        while self.limit and self._bytes() + more > self.limit:
            victim = next((digest for digest in self._blobs if not self._holds.get(digest)), None)
            if victim is None:
                raise StoreFull(f"the store's limit of {self.limit} bytes is reached by blobs in use")
            del self._blobs[victim]
            self._complete.discard(victim)
            self._evicted += 1

    def statistics(self) -> dict[str, int]:
        """Counts and bytes."""
        held = sum(1 for holds in self._holds.values() if holds)
        return {"blobs": len(self._blobs), "bytes": self._bytes(), "limit": self.limit, "evicted": self._evicted,
                "held": held}  # fmt: skip

    async def close(self) -> None:
        """Nothing to do."""
