"""Chunks of an uncompressed tar, unpacked from the ranges of the compressed layer that they need.

    tar chunks wanted ─► units between seek points ─► chunks of the compressed blob ─► `packed` (a source)
                                                           │
    kept in `store` ◄─ verified by the tar's chunk table ◄─┴─ unpacked, in a thread, a few MiB at a time

Whatever else comes out on the way (whole chunks beside those that were asked for) is verified and kept too: the next
reader wants it. A chunk that is not what the table says means that table, seek points or layer lie: DigestMismatch. Or
that our own disk has spoilt compressed bytes since they were verified: before anybody is blamed, they are hashed again,
and the spoilt ones fetched from `again`, which is not our disk.

Memory: a read holds at most `most` compressed bytes at a time, or what one chunk needs (`largest_extent`), beside the
chunks that it returns. How many reads there are at a time is the caller's business.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Iterator

from dadi.blobs.single_flight import runs
from dadi.blobs.source import Source, Urgency
from dadi.blobs.store import BlobStore
from dadi.errors import DigestMismatch, Malformed
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, ChunkTable
from dadi.index.seek import SeekTable, unpack

_BATCH = 4 << 20
"""Bytes of chunks that are unpacked, and then kept, at a time."""
_FETCH = 4 << 20
"""Compressed bytes that are asked for at a time."""
_MARGIN, _MORE = 1.1, 32 << 10
"""How far a guess goes beyond the average: the factor, and bytes. A wrong guess costs a second request."""
_WORTH = 0.8
"""The share of a unit above which all of it is fetched."""


def largest_extent(table: SeekTable, tar: ChunkTable) -> int:
    """Return the most compressed bytes that a chunk of the tar needs; as much work as there are chunks: for threads."""
    extents = (table.compressed_extent(table.units(*tar.extent(chunk))) for chunk in range(tar.count))
    return max((length for _, length in extents), default=0)


class Unpacked:
    """The source of one layer's tar; `packed` and `again` must give verified chunks of `table.blob`."""

    def __init__(self, store: BlobStore, table: SeekTable, packed: Source, again: Source, fallbacks: Fallbacks, *,
                 most: int) -> None:  # fmt: skip
        self._store = store
        self._table = table
        self._packed = packed
        self._again = again
        self._fallbacks = fallbacks
        self._most = most
        self.bytes = 0
        """Bytes of the tar that were unpacked."""

    def __repr__(self) -> str:
        return f"Unpacked({self._packed!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run, verified; it is in the store then. Raises StoreFull."""
        found: list[bytes] = []
        while chunks:
            # As many as `most` allows: a table can say that each chunk needs some other MiB of the layer.
            counts = range(2, len(chunks) + 1)
            count = 1 + bisect_right(counts, self._most, key=lambda n: self._needed(blob, chunks[:n]))
            found += await self._read(blob, chunks[:count], urgency)
            chunks = chunks[count:]
        return found

    def _needed(self, blob: Blob, chunks: range) -> int:
        return self._table.compressed_extent(self._table.units(*blob.table.span(chunks)))[1]

    async def _read(self, blob: Blob, chunks: range, urgency: Urgency) -> list[bytes]:
        units = self._table.units(*blob.table.span(chunks))
        whole = self._table.compressed_extent(units)
        if urgency == Urgency.DEMAND:
            extent = await self._beginning(blob, chunks, units, whole)
            if extent != whole:
                found = await self._unpacked(blob, chunks, units, extent, urgency, beginning=True)
                if len(found) == len(chunks):
                    return found
        found = await self._unpacked(blob, chunks, units, whole, urgency)
        if len(found) != len(chunks):
            raise Malformed(f"the units {units.start} to {units.stop - 1} of {blob} do not hold chunks {chunks}")
        return found

    async def _beginning(self, blob: Blob, chunks: range, units: range, whole: tuple[int, int]) -> tuple[int, int]:
        """Return the (offset, length) of the compressed bytes to fetch for a demand.

        Who reads here and there wants nothing of what a unit holds behind: it is left out, as far as can be guessed
        from how the unit is compressed on average. Who reads on is given the rest of the unit, in one request.
        """
        offset, length = blob.table.span(chunks)
        begin, size = self._table.extent(units[-1:])
        share = (offset + length - begin) / size
        packed, packed_size = self._table.compressed_extent(units[-1:])
        guessed = int(packed_size * share * _MARGIN) + _MORE
        if guessed > packed_size * _WORTH or not await self._is_new(blob, chunks, begin):
            return whole
        return whole[0], packed + guessed - whole[0]

    async def _is_new(self, blob: Blob, chunks: range, begin: int) -> bool:
        """Whether nothing of a unit has been read yet, which begins at that byte of the tar."""
        first = -(-begin // blob.table.chunk_size)
        before = range(min(first, chunks.start), chunks.start)
        return len(await self._store.missing(blob, before)) == len(before)

    async def _unpacked(self, blob: Blob, chunks: range, units: range, extent: tuple[int, int], urgency: Urgency, *,
                        beginning: bool = False) -> list[bytes]:  # fmt: skip
        """Return those of the chunks that the compressed bytes `extent` give; all that they give is kept."""
        begin, length = extent
        packed = self._table.compressed.covering(begin, length)
        data = bytearray(self._table.compressed.span(packed)[1] if packed else 0)
        await self._fetch(self._packed, packed, packed, data, urgency)
        begin -= packed.start * self._table.compressed.chunk_size
        view = memoryview(data)[begin : begin + length]
        try:
            return await self._kept(blob, chunks, self._batches(blob, units, view, beginning=beginning))
        except (DigestMismatch, Malformed):
            spoilt = await asyncio.to_thread(self._spoilt, packed, data)
            if not spoilt:
                raise
        why = f"{len(spoilt)} chunks of {self._table.blob}, {spoilt[0]} the first"
        self._fallbacks.note("our own disk spoilt bytes, fetched again", why)
        for run in runs(spoilt):
            await self._fetch(self._again, packed, run, data, urgency)
        return await self._kept(blob, chunks, self._batches(blob, units, view, beginning=beginning))

    async def _fetch(self, source: Source, packed: range, run: range, data: bytearray, urgency: Urgency) -> None:
        """Fill in a run of the compressed chunks `packed`, of which `data` is the room."""
        size = self._table.compressed.chunk_size
        step = _FETCH // size
        for first in range(run.start, run.stop, step):
            some = range(first, min(first + step, run.stop))
            for chunk, part in enumerate(await source.read(self._table.blob, some, urgency), first):
                at = (chunk - packed.start) * size
                data[at : at + len(part)] = part

    def _spoilt(self, packed: range, data: bytearray) -> list[int]:
        """Return which of the compressed chunks are not what they were when they came. For threads."""
        table, spoilt = self._table.compressed, []
        first = packed.start * table.chunk_size
        for chunk in packed:
            offset, length = table.extent(chunk)
            if not table.matches(chunk, memoryview(data)[offset - first : offset - first + length]):
                spoilt.append(chunk)
        return spoilt

    async def _kept(self, blob: Blob, chunks: range, batches: Iterator[tuple[int, list[bytes]]]) -> list[bytes]:
        """Keep what is unpacked; return those of the chunks that are among it."""
        found: list[bytes] = []
        while (batch := await asyncio.to_thread(next, batches, None)) is not None:
            first, ready = batch
            await self._store.keep(blob, first, ready)
            self.bytes += sum(map(len, ready))
            found += [part for chunk, part in enumerate(ready, first) if chunk in chunks]
        return found

    def _batches(
        self, blob: Blob, units: range, data: memoryview, *, beginning: bool
    ) -> Iterator[tuple[int, list[bytes]]]:
        """Yield (first chunk, verified chunks) of what the bytes of the units give whole. For threads."""
        begin, length = self._table.extent(units)
        table, size = blob.table, blob.table.chunk_size
        chunk = -(-begin // size)
        skip = chunk * size - begin
        end = begin + length
        pending = bytearray()
        ready: list[bytes] = []
        for piece in unpack(self._table, units, data, beginning=beginning):
            pending += memoryview(piece)[skip:] if skip else piece
            skip = max(0, skip - len(piece))
            while chunk + len(ready) < table.count:
                offset, expected = table.extent(chunk + len(ready))
                if len(pending) < expected or offset + expected > end:
                    break
                ready.append(_verified(blob, chunk + len(ready), bytes(memoryview(pending)[:expected])))
                del pending[:expected]
                if len(ready) * size >= _BATCH:
                    yield chunk, ready
                    chunk, ready = chunk + len(ready), []
        if ready:
            yield chunk, ready


def _verified(blob: Blob, chunk: int, data: bytes) -> bytes:
    blob.verify(chunk, data, source="its seek points", hint="the layer's index lies: its images are indexed anew")
    return data
