"""Chunk tables: a blob as fixed-size pieces, each with a SHA-256 of its own. Pure.

A chunk is the unit that is fetched, verified, kept and served. Chunk i covers the bytes [i·c, min((i+1)·c, size)) of
the blob, c being a power of two; only the last may be shorter. A blob of 0 bytes has 0 chunks.
"""

from __future__ import annotations

import hashlib

import msgspec

from dadi import digest as digests
from dadi.errors import DigestMismatch, Malformed

MIN_CHUNK_SIZE, DEFAULT_CHUNK_SIZE, MAX_CHUNK_SIZE = 4 << 10, 256 << 10, 16 << 20
OTHER_VERSION = "nodes and superpeers need versions of dadi that know each other's indexes: upgrade the older one"

_ASKED_AGAIN = (
    "thrown away, and asked for again; if wrong bytes go on coming from there, check its disk and memory: `dadi verify`"
)


class ChunkTable(msgspec.Struct, frozen=True, array_like=True):
    """The size of a blob (bytes), its chunk size (bytes) and the raw SHA-256 of each chunk, one after the other."""

    size: int
    chunk_size: int
    digests: bytes

    def check(self) -> ChunkTable:
        """Return self; raise Malformed if counts and sizes do not fit each other (for tables from outside)."""
        c = self.chunk_size
        if not (MIN_CHUNK_SIZE <= c <= MAX_CHUNK_SIZE) or c & (c - 1):
            raise Malformed(f"chunk size {c} is not a power of two from {MIN_CHUNK_SIZE} to {MAX_CHUNK_SIZE}")
        if self.size < 0 or len(self.digests) != self.count * digests.SIZE:
            raise Malformed(f"a chunk table of {len(self.digests)} bytes does not fit a blob of {self.size} bytes")
        return self

    @property
    def count(self) -> int:
        """How many chunks the blob has."""
        return -(-self.size // self.chunk_size)

    def extent(self, chunk: int) -> tuple[int, int]:
        """Return (offset, length) in bytes of a chunk; raise IndexError if there is no such chunk."""
        if not 0 <= chunk < self.count:
            raise IndexError(f"chunk {chunk} of {self.count}")
        offset = chunk * self.chunk_size
        return offset, min(self.chunk_size, self.size - offset)

    def covering(self, offset: int, length: int) -> range:
        """Return the chunks that hold the bytes [offset, offset + length), cut off at the blob's end."""
        end = min(offset + length, self.size)
        if offset >= end:
            return range(0)
        return range(offset // self.chunk_size, (end - 1) // self.chunk_size + 1)

    def span(self, chunks: range) -> tuple[int, int]:
        """Return (offset, length) in bytes of a run of neighbouring chunks (not empty)."""
        offset, _ = self.extent(chunks[0])
        last, length = self.extent(chunks[-1])
        return offset, last + length - offset

    def matches(self, chunk: int, data: bytes | memoryview) -> bool:
        """Return whether `data` is exactly that chunk. Hashes it: for threads."""
        _, length = self.extent(chunk)
        at = chunk * digests.SIZE
        return len(data) == length and hashlib.sha256(data).digest() == self.digests[at : at + digests.SIZE]


class Blob(msgspec.Struct, frozen=True, array_like=True):
    """Immutable bytes named by their digest, with the chunk table by which each piece of them is verified."""

    digest: str
    table: ChunkTable

    @property
    def size(self) -> int:
        """Bytes."""
        return self.table.size

    def verify(self, chunk: int, data: bytes | memoryview, *, source: str, hint: str = _ASKED_AGAIN) -> None:
        """Raise DigestMismatch, blaming `source`, unless `data` is exactly that chunk. Hashes it: for threads."""
        if not self.table.matches(chunk, data):
            why = f"chunk {chunk} of {self.digest} from {source} is not what its digest says"
            raise DigestMismatch(why, source=source, hint=hint)

    def __repr__(self) -> str:
        return f"Blob({digests.short(self.digest)}, {self.size} bytes, {self.table.count} chunks)"

    # The digest names the bytes; two tables for the same bytes are made alike (same chunk size), so identity is the
    # digest and the chunk size.
    def __hash__(self) -> int:
        return hash(self.digest)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Blob) and (self.digest, self.table) == (other.digest, other.table)


class ChunkHashes:
    """The chunk table of bytes that come in pieces of any size. Raises Malformed for what is no chunk size."""

    def __init__(self, chunk_size: int) -> None:
        ChunkTable(0, chunk_size, b"").check()
        self._chunk_size = chunk_size
        self._hash = hashlib.sha256()
        self._digests: list[bytes] = []
        self.size = 0

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes. Hashes them: for threads."""
        view = memoryview(data)
        while view:
            part = view[: self._chunk_size - self.size % self._chunk_size]
            view = view[len(part) :]
            self._hash.update(part)
            self.size += len(part)
            if self.size % self._chunk_size == 0:
                self._digests.append(self._hash.digest())
                self._hash = hashlib.sha256()

    def table(self) -> ChunkTable:
        """Return the table of what has come so far."""
        last = [self._hash.digest()] if self.size % self._chunk_size else []
        return ChunkTable(self.size, self._chunk_size, b"".join(self._digests + last))


def table_of(data: bytes | memoryview, chunk_size: int = DEFAULT_CHUNK_SIZE) -> ChunkTable:
    """Return the chunk table of bytes that are all in memory (metadata images, indexes)."""
    view = memoryview(data)
    parts = [hashlib.sha256(view[at : at + chunk_size]).digest() for at in range(0, len(view), chunk_size)]
    return ChunkTable(len(view), chunk_size, b"".join(parts))


def blob_of(data: bytes, chunk_size: int = DEFAULT_CHUNK_SIZE) -> Blob:
    """Return the blob that `data` is."""
    return Blob(digests.of(data), table_of(data, chunk_size))
