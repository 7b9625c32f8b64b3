"""Layers with seek points: just the compressed ranges that are asked for, each byte once; the rest when it is quiet.

One layer's chain, from what nodes ask for to the registry:

    Joined( Unpacked( Kept( store, Joined( Kept( store, VerifiedRanges ) ) ) ) )

The inner `Joined` has the requests to the registry: demand first, neighbours together. The `Kept` inside of it puts
the compressed bytes into the store before anybody is told that they have come, so that none is fetched twice; the one
around it answers from the store without a place in the queue. `Unpacked` verifies and keeps the tar's chunks. The outer
`Joined` unpacks each once.

When all chunks of the tar are here (`lazy_layers.py` sees to that), both forms are made complete: the tar is checked
against the diff ID, the compressed blob against the layer's digest, and the tar is parsed again: what the index said of
its members must be what they are. An index that is found to lie, then or on the way, is a `Lie`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.joined import Joined
from dadi.blobs.kept import Kept
from dadi.blobs.single_flight import runs
from dadi.blobs.source import Urgency
from dadi.blobs.unpacked import Unpacked
from dadi.errors import DadiError, DigestMismatch, Malformed, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.index import layer as layer_index
from dadi.index.image import ImageLayer
from dadi.index.layer import Entry
from dadi.index.seek import Form, SeekTable
from dadi.index.tar import TarLimits, TarParser
from superpeer.ranges import RegistryRanges, VerifiedRanges

_LARGEST_REQUEST = 4 << 20
_LARGEST_RUN = 8 << 20
_LARGEST_UNIT = 32 << 20
"""Compressed bytes between two seek points that are held in memory; zstd of one frame can only be streamed, whole."""
_UNPACKING = 16
"""Runs of tar chunks that may wait for their compressed bytes, or be unpacked, at a time."""
_STEP = 8 << 20
"""Bytes of the tar that the rest is fetched by; small, because demand may have to wait for what is under way."""
_PIECE = 1 << 20


class Lie(DadiError):
    """What an index said is not so. Never leaves the superpeer: the index is replaced by one of our own."""


class RangedLayer:
    """One layer; see the head of this file. Raises Unsupported if it cannot be read in parts that are small enough."""

    def __init__(self, store: DiskBlobs, layer: ImageLayer, table: SeekTable, source: RegistryRanges, *,
                 parallel: int, fallbacks: Fallbacks) -> None:  # fmt: skip
        largest = max((table.compressed_extent(range(n, n + 1))[1] for n in range(table.count)), default=0)
        if largest > _LARGEST_UNIT:
            raise Unsupported(f"layer {layer.layer_digest} has {largest} bytes without a seek point")
        self.layer = layer
        self.table = table
        self.source = source
        self._store = store
        self._waiting = 0
        fetched = Kept(store, VerifiedRanges(source, fallbacks), fallbacks)
        self._fetches = Joined(fetched, parallel=parallel, largest=_LARGEST_REQUEST)
        self._packed = Kept(store, self._fetches, fallbacks)
        # A tar that is not compressed is its own compressed form: one blob in the store, by the tar's chunk table.
        self._forms = [layer.blob] if table.form is Form.PLAIN else [layer.blob, table.blob]
        self._chunks = self._fetches
        if table.form is not Form.PLAIN:
            unpacked = Unpacked(store, table, self._packed)
            self._chunks = Joined(unpacked, parallel=_UNPACKING, largest=_LARGEST_RUN)

    def __repr__(self) -> str:
        return f"RangedLayer({self._chunks!r})"

    async def bring(self, chunks: range, urgency: Urgency) -> None:
        """Bring chunks of the tar into the store. Raises Lie, StoreFull, and what the registry client raises."""
        blob = self.layer.blob
        missing = runs(await self._store.missing(blob, chunks))
        self._waiting += 1
        try:
            async with self._held():
                await asyncio.gather(*(self._chunks.read(blob, run, urgency) for run in missing))
        except (DigestMismatch, Malformed) as error:
            raise Lie(error.message) from error
        finally:
            self._waiting -= 1

    def waiting(self) -> int:
        """Return how many calls of `bring` are under way."""
        return self._waiting

    async def missing_steps(self, count: int) -> list[range]:
        """Return the first runs of the tar that are not here, at most `count`, each of at most a step."""
        size = max(1, _STEP // self.layer.table.chunk_size)
        steps: list[range] = []
        for run in runs(await self._store.missing(self.layer.blob)):
            steps += [run[at : at + size] for at in range(0, len(run), size)]
            if len(steps) >= count:
                break
        return steps[:count]

    async def complete(self) -> None:
        """Make both forms complete, once the tar's chunks are all here; raise Lie if it is not what the index said."""
        tar, packed = self.layer.blob, self.table.blob
        try:
            await self._store.finish(tar)
            await self._check_entries()
            if packed not in self._forms:
                return
            async with self._held():
                for run in runs(await self._store.missing(packed)):
                    await self._packed.read(packed, run, Urgency.BACKFILL)
                if not await self._store.missing(packed):  # a full store keeps nothing
                    await self._store.finish(packed)
        except (DigestMismatch, Malformed) as error:
            raise Lie(error.message) from error

    async def _check_entries(self) -> None:
        encoded = await self._store.get(self.layer.index_digest)
        path, tar = self._store.data_path(self.layer.blob), self.layer.blob
        with self._store.hold(tar):
            await asyncio.to_thread(_check_entries, encoded, path, tar.size)

    @contextlib.asynccontextmanager
    async def _held(self) -> AsyncIterator[None]:
        """Keep what is there of both forms from eviction."""
        with contextlib.ExitStack() as holds:
            for blob in self._forms:
                await self._store.prepare(blob)
                holds.enter_context(self._store.hold(blob))
            yield

    async def close(self) -> None:
        """Break off what is under way."""
        await self._chunks.close()
        await self._fetches.close()


def _check_entries(encoded: bytes, path: Path, size: int) -> None:
    """Raise Malformed unless the tar in a file has exactly the members that the index names. For threads."""
    said = layer_index.decode(encoded).entries
    found = _entries(path, size)
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
