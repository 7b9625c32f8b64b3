"""A layer in the registry as a source of chunks of its compressed blob, by range requests.

`VerifiedRanges` verifies, and asks the registry itself again where wrong bytes came. A registry that does not do ranges
is Unsupported: whoever asked streams the whole layer then, instead of having it sent again and again for the sake of
its parts. `PackedLayer` is what others use: each byte is fetched once, and kept. `Held` keeps what a read fills from
eviction.
"""

from __future__ import annotations

import contextlib

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.first_of import FirstOf
from dadi.blobs.joined import Joined
from dadi.blobs.kept import Kept
from dadi.blobs.source import Source, Urgency
from dadi.blobs.verified import Verified
from dadi.errors import DigestMismatch, NotFound
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient

_LARGEST_REQUEST = 4 << 20
_PATIENT_REQUEST = 1 << 20
"""Bytes of a request for nobody: who comes to wait for one of its chunks waits for all of them."""


class RegistryRanges:
    """The source of one layer; `reference` says in which repository it is. Counts what it asked for."""

    def __init__(self, registry: RegistryClient, reference: Reference, descriptor: Descriptor) -> None:
        self._registry = registry
        self._reference = reference
        self._descriptor = descriptor
        self.name = reference.name
        """The repository, with its registry."""
        self.mirrors = True
        self.requests = 0
        self.bytes = 0

    def __repr__(self) -> str:
        return f"RegistryRanges({self._reference.name}, {self._descriptor!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run in one request."""
        if blob.digest != self._descriptor.digest:
            raise NotFound(f"{blob} is not layer {self._descriptor.digest}")
        offset, length = blob.table.span(chunks)
        self.requests += 1
        whole = await self._registry.blob_range(self._reference, self._descriptor, offset, length, mirrors=self.mirrors)
        self.bytes += length
        data = memoryview(whole)
        ends = [blob.table.extent(chunk) for chunk in chunks]
        return [bytes(data[at - offset : at - offset + size]) for at, size in ends]


class WrongRange(DigestMismatch):
    """A range that came wrong, and wrong again: either the table lies, or the bytes are spoilt on their way."""


class VerifiedRanges(Verified):
    """`ranges`, verified; what is wrong is asked for once more, without mirrors, before anybody is called a liar."""

    def __init__(self, ranges: RegistryRanges, fallbacks: Fallbacks) -> None:
        super().__init__(repr(ranges), ranges)
        self._ranges = ranges
        self._fallbacks = fallbacks

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run; raise WrongRange if it is wrong twice."""
        try:
            return await super().read(blob, chunks, urgency)
        except DigestMismatch as error:
            self._fallbacks.note("wrong range, asked the registry itself again", str(error))
            self._ranges.mirrors = False
        try:
            return await super().read(blob, chunks, urgency)
        except DigestMismatch as error:
            raise WrongRange(error.message, source=error.source, hint=error.hint) from error


class Held:
    """`source`, during whose reads some blobs are not evicted from the store; these outlive the readers (`Joined`)."""

    def __init__(self, source: Source, store: DiskBlobs, *blobs: Blob) -> None:
        self.source = source
        self._store = store
        self._blobs = blobs

    def __repr__(self) -> str:
        return f"Held({self.source!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run. Raises StoreFull."""
        with contextlib.ExitStack() as holds:
            for held in self._blobs:
                await self._store.prepare(held)
                holds.enter_context(self._store.hold(held))
            return await self.source.read(blob, chunks, urgency)


class Sent:
    """`source`, of which it is counted which chunks have come, and were right (it verifies)."""

    def __init__(self, source: Source, blob: Blob) -> None:
        self.source = source
        self._come = bytearray(blob.table.count)

    def __repr__(self) -> str:
        return f"Sent({self.source!r})"

    @property
    def all(self) -> bool:
        """Whether each chunk has come from here."""
        return all(self._come)

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run."""
        parts = await self.source.read(blob, chunks, urgency)
        self._come[chunks.start : chunks.stop] = b"\x01" * len(chunks)
        return parts


class PackedLayer:
    """A layer as the registry has it, for all indexes that say the same of it: `Kept(Joined(Held(Kept(ranges))))`.

    `nearer` is asked before the registry: what it returns is verified; NotFound says that it has not got it. `sent`
    knows what has come since it was opened: of the rest, which was in the store, nobody knows from where.

    `fetches` is the queue for the registry: demand first, neighbours together. The `Kept` inside of it puts bytes into
    the store before anybody is told that they have come, so that none is fetched twice. `chunks` answers from the store
    without a place in the queue. `again` asks the registry whatever the store has. `users` is who uses it, counted by
    whoever opens and closes it.
    """

    def __init__(self, store: DiskBlobs, blob: Blob, ranges: RegistryRanges, *, parallel: int,
                 fallbacks: Fallbacks, nearer: Source | None = None) -> None:  # fmt: skip
        self.blob = blob
        self.ranges = ranges
        self.users = 0
        self.again = VerifiedRanges(ranges, fallbacks)
        upstream: Source = self.again if nearer is None else FirstOf([nearer, self.again], fallbacks)
        self.sent = Sent(upstream, blob)
        fetched = Held(Kept(store, self.sent, fallbacks), store, blob)
        self.fetches = Joined(fetched, parallel=parallel, largest=_LARGEST_REQUEST, patient=_PATIENT_REQUEST)
        self.chunks = Kept(store, self.fetches, fallbacks)

    def __repr__(self) -> str:
        return f"PackedLayer({self.chunks!r}, {self.users} users)"

    async def close(self) -> None:
        """Break off what is under way."""
        await self.fetches.close()
