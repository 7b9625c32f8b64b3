"""Layers with seek points: just the compressed ranges that are asked for, each byte once; the rest when it is quiet.

One layer's chain, from what nodes ask for to the registry:

    Joined( Held( Unpacked( PackedLayer: Kept( store, Joined( Held( Kept( store, VerifiedRanges ) ) ) ) ) ) )

`Unpacked` verifies and keeps the tar's chunks. The outer `Joined` unpacks each once; a demand does not wait there for
what is brought for nobody, but asks below, where each compressed byte is fetched once (`ranges.py`).

Memory: chunks are brought by steps, a few at a time, and the bytes dropped; how many runs are unpacked at a time
depends on how many compressed bytes that takes. A layer one chunk of which needs too many is Unsupported.

When all chunks of the tar are here (`lazy_layers.py` sees to that), both forms are made complete: the tar is checked
against the diff ID, the compressed blob against the layer's digest, and the tar is parsed again: what the index said of
its members must be what they are. An index that is found to lie, then or on the way, is a `Lie`. What our own disk has
spoilt is no lie: it is thrown away and brought again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.joined import Joined, together
from dadi.blobs.single_flight import runs
from dadi.blobs.source import Urgency
from dadi.blobs.unpacked import Unpacked, largest_extent
from dadi.errors import DadiError, DigestMismatch, Malformed, Unavailable, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.index import layer as layer_index
from dadi.index import seek
from dadi.index.chunks import Blob
from dadi.index.image import ImageLayer
from dadi.index.layer import Entry
from dadi.index.seek import Form, SeekTable
from dadi.index.tar import TarLimits, TarParser
from superpeer.ranges import Held, PackedLayer, WrongRange

_LARGEST_RUN = 4 << 20
"""Bytes of the tar that are unpacked, and held in memory, as one."""
_LARGEST_NEED = 32 << 20
"""Compressed bytes for one chunk that are held in memory; zstd of one frame can only be streamed, whole."""
_USUAL_NEED = 8 << 20
"""Compressed bytes for one run that are held in memory, if none of its chunks needs more."""
_MEMORY = 192 << 20
"""Bytes that may be held for one layer, however many ask for its chunks."""
_UNPACKING = 16
"""Runs of tar chunks that may wait for their compressed bytes, or be unpacked, at a time."""
_STEP = 4 << 20
"""Bytes of the tar that are brought by one of those who bring."""
_BRINGING = 2
"""Steps of one call that are brought at a time: while one is unpacked, the next is on the wire."""
_AHEAD = 8 << 20
"""Bytes of the tar that the rest is brought by: how soon it ends when somebody asks."""
_REMAINDER = 1 << 20
"""Compressed bytes that may be fetched only to make the layer complete (what stands behind the tar's last byte). Where
more is missing it was not assembled here, or was evicted: that would be a second copy."""
_PIECE = 1 << 20


class Lie(DadiError):
    """What an index said is not so. Never leaves the superpeer: the index is replaced by one of our own.

    `proven`: by the index itself, or by the layer's digests. Else ranges of the compressed layer came otherwise than
    its table says, twice: who spoils bytes on their way (a proxy, memory) makes any index look so.
    """

    def __init__(self, message: str, *, proven: bool = True, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.proven = proven


def lie_of(error: DadiError) -> Lie:
    """Return what wrong chunks of a layer say of its index."""
    return Lie(error.message, proven=not isinstance(error, WrongRange))


def decoded(raw: bytes, layer: ImageLayer) -> tuple[SeekTable, int]:
    """Return a layer's seek table, and the most compressed bytes that a chunk needs. For threads.

    Raises Unsupported if that is more than is held in memory, Unavailable if our disk has spoilt the table.
    """
    _check_own_disk(raw, layer.seek_digest)
    table = seek.decode(raw)
    largest = largest_extent(table, layer.table)
    if largest > _LARGEST_NEED:
        raise Unsupported(f"layer {layer.layer_digest} has {largest} bytes without a seek point")
    return table, largest


def packed_blob(layer: ImageLayer, table: SeekTable) -> Blob:
    """Return the layer as the registry has it.

    A tar that is not compressed is its own compressed form: one blob in the store, by the tar's chunk table.
    """
    return layer.blob if table.form is Form.PLAIN else table.blob


class RangedLayer:
    """One layer; see the head of this file. `largest` is what `decoded` gave; who opened `packed` closes it."""

    def __init__(self, store: DiskBlobs, layer: ImageLayer, table: SeekTable, packed: PackedLayer, *,
                 largest: int, fallbacks: Fallbacks) -> None:  # fmt: skip
        self.layer = layer
        self.packed = packed
        self._store = store
        self._fallbacks = fallbacks
        self._waiting = 0
        self._chunks = packed.fetches
        if packed.blob.digest != layer.diff_id:
            most = max(largest, _USUAL_NEED)
            unpacked = Unpacked(store, table, packed.chunks, packed.again, fallbacks, most=most)
            parallel = max(_BRINGING, min(_UNPACKING, _MEMORY // (most + _LARGEST_RUN)))
            held = Held(unpacked, store, layer.blob, packed.blob)
            self._chunks = Joined(held, parallel=parallel, largest=_LARGEST_RUN, overtake=True)

    def __repr__(self) -> str:
        return f"RangedLayer({self._chunks!r})"

    async def bring(self, chunks: range, urgency: Urgency) -> None:
        """Bring chunks of the tar into the store. Raises Lie, StoreFull, and what the registry client raises."""
        steps = self._steps(chunks)
        self._waiting += 1
        try:
            await together(self._bring(steps, urgency) for _ in range(_BRINGING))
        except (DigestMismatch, Malformed) as error:
            raise lie_of(error) from error
        finally:
            self._waiting -= 1

    def _steps(self, chunks: range) -> Iterator[range]:
        size = max(1, _STEP // self.layer.table.chunk_size)
        return (chunks[at : at + size] for at in range(0, len(chunks), size))

    async def _bring(self, steps: Iterator[range], urgency: Urgency) -> None:
        for step in steps:  # one iterator for all who bring: each takes what comes next
            missing = runs(await self._store.missing(self.layer.blob, step))
            await together(self._read(run, urgency) for run in missing)

    async def _read(self, run: range, urgency: Urgency) -> None:
        await self._chunks.read(self.layer.blob, run, urgency)

    def waiting(self) -> int:
        """Return how many calls of `bring` are under way."""
        return self._waiting

    async def ahead(self) -> range:
        """Return the first part of the tar that is not all here; an empty one if all is."""
        table = self.layer.table
        for step in self._steps(range(table.count)):
            if missing := await self._store.missing(self.layer.blob, step):
                return range(missing[0], min(missing[0] + max(1, _AHEAD // table.chunk_size), table.count))
        return range(0)

    async def complete(self) -> None:
        """Make both forms complete, once the tar's chunks are all here; raise Lie if it is not what the index said.

        The compressed form only if it was assembled here: nobody is waiting for it.
        """
        await prove_tar(self._store, self.layer)
        blob = self.packed.blob
        if self._store.has(blob.digest):
            return
        missing = await self._store.missing(blob)
        if len(missing) * blob.table.chunk_size > _REMAINDER:
            return
        try:
            for run in runs(missing):
                await self.packed.chunks.read(blob, run, Urgency.BACKFILL)
            await _finish(self._store, blob)
        except DigestMismatch as error:  # not of our disk's bytes: of the registry's, twice
            raise lie_of(error) from error
        except Lie:
            raise
        except DadiError as error:
            self._fallbacks.note("compressed layer not assembled", str(error))

    async def close(self) -> None:
        """Break off what is under way."""
        if self._chunks is not self.packed.fetches:
            await self._chunks.close()


async def prove_tar(store: DiskBlobs, layer: ImageLayer) -> None:
    """Make a layer's tar complete, all of whose chunks are here, and compare its members with what the index says.

    Raises Lie; Unavailable if our own disk has spoilt it; NotFound if it, or its index, is not here any more.
    """
    await _finish(store, layer.blob)
    encoded = await store.get(layer.index_digest)
    try:
        with store.hold(layer.blob):
            await asyncio.to_thread(_check_entries, encoded, layer, store.data_path(layer.blob))
    except Malformed as error:
        raise await _blame(store, layer.blob, error) from error
    except OSError as error:
        raise Unavailable(f"cannot read {layer.blob}: {error.strerror}", hint="check the disk") from None


async def _finish(store: DiskBlobs, blob: Blob) -> None:
    """Make a blob complete. Raises Lie if its chunk table does not lead to its digest, Unavailable if our disk does."""
    try:
        await store.finish(blob)
    except DigestMismatch as error:
        raise await _blame(store, blob, error) from error


async def _blame(store: DiskBlobs, blob: Blob, error: DadiError) -> DadiError:
    """Return what is to be raised of a blob each of whose chunks was verified, and that is wrong as a whole."""
    with store.hold(blob):
        spoilt = await asyncio.to_thread(_is_spoilt, store.data_path(blob), blob)
    if not spoilt:
        return Lie(error.message)
    await store.remove(blob.digest)
    return Unavailable(f"our own disk spoilt {blob}: it will be fetched again", hint="check the disk")


def _is_spoilt(path: Path, blob: Blob) -> bool:
    """Whether a file's bytes are not those that were verified, a chunk at a time, before they were written to it."""
    try:
        with path.open("rb") as file:
            for chunk in range(blob.table.count):
                if not blob.table.matches(chunk, file.read(blob.table.extent(chunk)[1])):
                    return True
    except OSError:
        return True
    return False


def _check_own_disk(raw: bytes, digest: str) -> None:
    if digests.of(raw) != digest:
        raise Unavailable(f"our own disk spoilt the index {digest}", hint="check the disk; remove it from the store")


def _check_entries(encoded: bytes, layer: ImageLayer, path: Path) -> None:
    """Raise Malformed unless the tar in a file has exactly the members that the index names. For threads."""
    _check_own_disk(encoded, layer.index_digest)
    said = layer_index.decode(encoded).entries
    found = _entries(path, layer.table.size)
    if found != said:
        pairs = zip(found, said, strict=False)
        place = next((number for number, (a, b) in enumerate(pairs) if a != b), min(len(found), len(said)))
        about = found[place].path if place < len(found) else said[place].path
        raise Malformed(f"the index tells something else of {about!r} than the layer's tar")


def _entries(path: Path, size: int) -> tuple[Entry, ...]:
    parser = TarParser(TarLimits())
    with path.open("rb") as file:
        while size > 0 and (piece := file.read(min(_PIECE, size))):
            parser.feed(piece)
            size -= len(piece)
    return parser.finish()
