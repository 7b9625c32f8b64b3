"""What one process believes of one blob in its store, as tables. No I/O; only the event loop changes it.

    a chunk     `present`   `claimed`
    missing     0           no          nobody reads it
    claimed     0           yes         a process that did not stop cleanly says that it is there: hashed before use
    present     1           no          its verified bytes are in the file; FUSE threads look at this without a lock

    a blob
    PARTIAL     some of its chunks, none, or all
    COMPLETE    all; hashed as a whole, durable, and marked so: the next process believes it as it stands
    REFUSED     its chunks matched its table, the whole not its digest: the table lied, nothing by it is kept any more

    event       when                                    chunks                          blob
    come        verified bytes were written             missing, claimed → present      (not where it is REFUSED)
    hashed      a claim was looked at, and is right     claimed → present
    drop        a claim, or `dadi verify`, found wrong  present, claimed → missing
    withdrawn   that was written down, or could not be                                  COMPLETE → PARTIAL
    finished    the whole was hashed and synced                                         PARTIAL → COMPLETE
    lost        it could not be made durable            all → missing
    lied        the whole is not what its digest says   all → missing                   PARTIAL → REFUSED
    (gone)      evicted, removed, replaced              all                             only while nobody holds it

Who may: whoever reads, writes or mounts a blob *holds* it (`Space.using`), so that it is neither evicted nor replaced
under him. Who changes what the disk says of the whole has `vouching`: one at a time. Where the disk says more than is
believed here, since it could not be written: `in_doubt` (marks of chunks: this stop will not be a clean one), and
`unmarked` (it still says "complete": nothing is kept before its marks are written).

Events that bring bytes, or take some away, return how many: the store's sum (`Space.bytes`) is the caller's business.
"""

from __future__ import annotations

import asyncio
import enum
from collections.abc import Collection, Iterable

from dadi import digest as digests
from dadi.blobs.layout import BlobDirectory
from dadi.index.chunks import Blob


class State(enum.Enum):
    """Of a blob; see the head of this file."""

    PARTIAL = "partial"
    COMPLETE = "complete"
    REFUSED = "refused"


class Stored:
    """One blob; see the head of this file. `present` has a byte a chunk. `used_at`: seconds since 1970."""

    def __init__(self, directory: BlobDirectory, blob: Blob, present: bytearray | None, *, trusted: bool) -> None:
        """`present`: the marks on the disk, None for a blob that is complete; not `trusted`: they are claims."""
        self.directory = directory
        self.blob = blob
        self.state = State.COMPLETE if present is None else State.PARTIAL
        self.claimed: set[int] = set()
        count = blob.table.count
        if present is None:
            present = bytearray(b"\x01" * count)
        elif not trusted:
            self.claimed = {chunk for chunk in range(count) if present[chunk]}
            present = bytearray(count)
        self.present = present
        self.holds = 0
        self.in_doubt = False
        self.unmarked = False
        self.vouching = asyncio.Lock()
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
        return f"Stored({digests.short(self.blob.digest)}, {state}, {self.holds} holds)"

    # ---- what is here

    @property
    def complete(self) -> bool:
        """Whole, verified, durable?"""
        return self.state is State.COMPLETE

    def serves(self, blob: Blob) -> bool:
        """Whether what is here can be read by the chunk table of `blob`: it was verified by that, or as a whole."""
        return self.blob.table == blob.table or (self.complete and self.blob.size == blob.size)

    def missing(self, chunks: range) -> list[int]:
        """Return which of the chunks are not present, ascending."""
        if not chunks or self.present.find(0, chunks.start, chunks.stop) < 0:
            return []
        return [chunk for chunk in chunks if not self.present[chunk]]

    def believed(self, chunks: Iterable[int]) -> list[int]:
        """Return which of the chunks are present or claimed, ascending."""
        return [chunk for chunk in chunks if self.present[chunk] or chunk in self.claimed]

    # ---- events

    def come(self, first: int, parts: list[bytes]) -> int:
        """Neighbouring chunks were written; return how many bytes are new. A claim was counted already."""
        more = 0
        for chunk, part in enumerate(parts, first):
            if not self.present[chunk] and self.state is not State.REFUSED:
                self.present[chunk] = 1
                if chunk in self.claimed:
                    self.claimed.discard(chunk)
                else:
                    more += len(part)
        self.bytes += more
        return more

    def hashed(self, claims: list[int], good: Collection[int]) -> list[int]:
        """Claims were looked at: the good ones are present; return the wrong ones, which are still to be dropped."""
        still = [chunk for chunk in claims if chunk in self.claimed]  # others have come, or were looked at, meanwhile
        for chunk in still:
            if chunk in good:
                self.claimed.discard(chunk)
                self.present[chunk] = 1
        return [chunk for chunk in still if chunk not in good]

    def drop(self, chunks: Collection[int]) -> int:
        """These, present or claimed, are missing now; return how many bytes that takes away."""
        for chunk in chunks:
            self.present[chunk] = 0
            self.claimed.discard(chunk)
        less = sum(self.blob.table.extent(chunk)[1] for chunk in chunks)
        self.bytes -= less
        return less

    def lost(self) -> int:
        """All is missing now; return how many bytes that takes away."""
        self.present[:] = bytes(self.blob.table.count)  # in place: the kernel's readers look at this very object
        self.claimed.clear()
        less, self.bytes = self.bytes, 0
        return less

    def lied(self) -> int:
        """Its chunk table is wrong; return how many bytes that takes away."""
        self.state = State.REFUSED
        return self.lost()

    def finished(self) -> None:
        """It is whole, durable and marked so."""
        assert self.state is not State.REFUSED, self
        self.state, self.unmarked = State.COMPLETE, False

    def withdrawn(self) -> None:
        """Chunks of it were dropped, and that was written down, or could not be."""
        if self.complete:
            self.state = State.PARTIAL
