"""The contract of a blob store: sparse blobs on this machine. `disk.py` is the real one; tests have one in memory.

A store is a `Source` that answers only from what it has. Around that: keeping verified chunks, finishing a blob,
taking in a whole one, holding it against eviction. All methods run on the event loop and never block it; what touches
the disk is awaited. Both implementations pass `tests/contracts/store.py`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from dadi.blobs.source import Source
from dadi.index.chunks import Blob


class Ingest(Protocol):
    """A whole blob on its way in, written from front to back by a worker thread (a `LayerSink`).

    It becomes visible by `BlobStore.commit` only, all at once; `abort` (idempotent) forgets it.
    """

    def write(self, data: bytes | memoryview) -> None:
        """Append. Called from worker threads, never from the event loop. Raises StoreFull."""
        ...

    def abort(self) -> None:
        """Throw away what was written; in a worker thread. Nothing happens if it was committed or aborted before."""
        ...


class BlobStore(Source, Protocol):
    """What a store says it has, it has: a chunk is present only after its verified bytes were written.

    `read` (see `Source`) raises NotFound unless the whole run is present. Reading or keeping marks a blob as used.
    """

    def has(self, digest: str) -> bool:
        """Is the whole blob here, verified against its digest?"""
        ...

    def find(self, digest: str) -> Blob | None:
        """Return what is known of a blob that is here in whole or in part."""
        ...

    async def missing(self, blob: Blob, chunks: range | None = None) -> list[int]:
        """Return which chunks (of the run; of all) are not here, ascending; what is in doubt is verified first."""
        ...

    async def keep(self, blob: Blob, first: int, parts: list[bytes]) -> None:
        """Write verified chunks `first`, `first` + 1 … and mark them present; nil effect on those present already.

        Raises StoreFull, and then none of the run is marked that was not before.
        """
        ...

    async def finish(self, blob: Blob) -> None:
        """Hash all of a blob whose chunks are all present; make it durable and complete. Idempotent.

        Raises NotFound if chunks are missing, DigestMismatch if the whole is not what its digest says: then the chunk
        table lied, and all of its chunks are missing again. StoreFull, Unavailable (a broken disk) if that cannot be
        written down.
        """
        ...

    def ingest(self) -> Ingest:
        """Begin to take in a whole blob whose digest may not be known yet."""
        ...

    async def commit(self, ingest: Ingest, blob: Blob) -> None:
        """Make what was ingested the blob; the caller has verified its digest and table while it was written.

        Idempotent as to the blob: one that is complete already stays, and the ingest is forgotten. Raises StoreFull.
        """
        ...

    async def put(self, data: bytes) -> Blob:
        """Store a small blob that is all in memory (an index, metadata); return it. Raises StoreFull."""
        ...

    async def get(self, digest: str) -> bytes:
        """Return all of a complete, small blob. Raises NotFound."""
        ...

    def hold(self, blob: Blob) -> AbstractContextManager[None]:
        """Inside, the blob is not evicted, whatever the limit. Nests."""
        ...

    def statistics(self) -> dict[str, int]:
        """Return blobs, bytes (present), limit (bytes), evicted (blobs since the start), held (blobs)."""
        ...

    async def close(self) -> None:
        """Stop cleanly: what is present stays so. Idempotent."""
        ...
