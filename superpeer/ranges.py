"""A layer in the registry as a source of chunks of its compressed blob, by range requests.

`VerifiedRanges` is what others use: it verifies, and asks the registry itself again where wrong bytes came. A registry
that does not do ranges is Unsupported: whoever asked streams the whole layer then, instead of having it sent again and
again for the sake of its parts.
"""

from __future__ import annotations

from dadi.blobs.source import Urgency
from dadi.blobs.verified import Verified
from dadi.errors import DigestMismatch, NotFound
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient


class RegistryRanges:
    """The source of one layer; `reference` says in which repository it is. Counts what it asked for."""

    def __init__(self, registry: RegistryClient, reference: Reference, descriptor: Descriptor) -> None:
        self._registry = registry
        self._reference = reference
        self._descriptor = descriptor
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


class VerifiedRanges(Verified):
    """`ranges`, verified; what is wrong is asked for once more, without mirrors, before anybody is called a liar."""

    def __init__(self, ranges: RegistryRanges, fallbacks: Fallbacks) -> None:
        super().__init__(repr(ranges), ranges)
        self._ranges = ranges
        self._fallbacks = fallbacks

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run; raise DigestMismatch if it is wrong twice."""
        try:
            return await super().read(blob, chunks, urgency)
        except DigestMismatch as error:
            self._fallbacks.note("wrong range, asked the registry itself again", error.message)
            self._ranges.mirrors = False
            return await super().read(blob, chunks, urgency)
