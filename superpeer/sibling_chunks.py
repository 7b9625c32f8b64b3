"""Chunks of layers' tars from siblings; mostly from those that have all of a tar (they have indexed it on first sight).

    take     from the one sibling that is named, whatever it has: for prefetch jobs, which know who brings it
    bring    who has it: asked once, and believed for a while → a queue: each chunk once, demand first (`Joined`)
             → the first of them that answers, verified by the layer's table → kept in the store

When all of a tar is here it is checked as one that comes from the registry is (`ranged.prove_tar`). Where no sibling
has it, or none answers, the caller asks the registry.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from typing import Any, cast

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.joined import Joined, together
from dadi.blobs.kept import Kept
from dadi.blobs.single_flight import runs
from dadi.blobs.source import Urgency
from dadi.errors import DadiError, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.index.image import ImageLayer
from superpeer.adopting import SiblingOrigin
from superpeer.ranged import Lie, prove_tar
from superpeer.ranges import Held

NOBODY_KNOWS = 3.0
"""Seconds that it is believed that no sibling knows a blob, or (of a tar) has all of it."""
_HAS_IT = 60.0
_MOST_REMEMBERED = 10_000
_STEP, _PATIENT_STEP = 4 << 20, 1 << 20
_PARALLEL = 8
_SETTLING = 2.0

OnLie = Callable[[ImageLayer, Lie], Awaitable[None]]
AskAll = Callable[[str], Awaitable[tuple[list[tuple[str, SiblingOrigin]], list[str]]]]
"""A digest → what siblings know of it, and who did not answer."""
ReadFrom = Callable[[str, Blob, range, Urgency], Awaitable[list[bytes]]]
Spawn = Callable[[Coroutine[Any, Any, None]], None]


class Answers:
    """What is known of digests for a while; the oldest go first."""

    def __init__(self) -> None:
        self._known: OrderedDict[str, tuple[float, Any]] = OrderedDict()

    def get(self, digest: str) -> Any | None:
        """Return the answer, if one is known."""
        until, answer = self._known.get(digest, (0.0, None))
        return answer if asyncio.get_running_loop().time() < until else None

    def put(self, digest: str, answer: Any, seconds: float) -> None:
        """Remember an answer for so long."""
        self._known[digest] = (asyncio.get_running_loop().time() + seconds, answer)
        self._known.move_to_end(digest)
        while len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)

    def drop(self, digest: str) -> None:
        """Forget an answer."""
        self._known.pop(digest, None)


class SiblingChunks:
    """See the head of this file. `on_lie` is told of a layer whose tar is not what its index says."""

    def __init__(self, store: DiskBlobs, fallbacks: Fallbacks, ask_all: AskAll, read_from: ReadFrom, spawn: Spawn,
                 *, on_lie: OnLie) -> None:  # fmt: skip
        self._store = store
        self._fallbacks = fallbacks
        self._ask_all = ask_all
        self._read_from = read_from
        self._spawn = spawn
        self._on_lie = on_lie
        self._holders = Answers()
        kept = Kept(store, _Reader(self._from_holders), fallbacks)
        self._joined = Joined(_Reader(partial(_held, kept)), parallel=_PARALLEL, largest=_STEP, patient=_PATIENT_STEP)
        self._checking: set[str] = set()
        self._checks: set[asyncio.Task[None]] = set()
        self.bytes = 0
        """That came from siblings."""

    def __repr__(self) -> str:
        return f"SiblingChunks({self._joined!r})"

    async def bring(self, layer: ImageLayer, chunks: range, urgency: Urgency) -> bool:
        """Bring chunks of a layer's tar into the store, if a sibling has all of it; False: the registry has to be
        asked. Raises StoreFull."""
        blob = layer.blob
        if not await self._who_has(blob.digest):
            return False
        try:
            step = max(1, _STEP // blob.table.chunk_size)
            for at in range(0, len(chunks), step):
                missing = runs(await self._store.missing(blob, chunks[at : at + step]))
                await together(self._read(blob, run, urgency) for run in missing)
        except StoreFull:
            raise
        except DadiError as error:
            self._fallbacks.note("no chunks from siblings, registry asked", f"{blob}: {error}")
            self._holders.drop(blob.digest)
            return False
        if self._store.present_bytes(blob) == blob.size and not self._store.has(blob.digest):
            self._check_whole(layer)
        return True

    async def take(self, url: str, layer: ImageLayer, chunks: range, urgency: Urgency) -> None:
        """Bring chunks of a layer's tar into the store from one sibling, which need not have all of it.

        Raises NotFound if it has not all of the chunks (yet), Unavailable, DigestMismatch, StoreFull.
        """

        async def read(blob: Blob, run: range, urgency: Urgency) -> list[bytes]:
            parts = await self._read_from(url, blob, run, urgency)
            self.bytes += sum(map(len, parts))
            return parts

        await _held(Kept(self._store, _Reader(read), self._fallbacks), layer.blob, chunks, urgency)
        if self._store.present_bytes(layer.blob) == layer.blob.size and not self._store.has(layer.diff_id):
            self._check_whole(layer)

    async def is_held(self, digest: str) -> bool:
        """Whether a sibling has all of a tar: then it costs the registry nothing."""
        return bool(await self._who_has(digest))

    async def _read(self, blob: Blob, run: range, urgency: Urgency) -> None:
        await self._joined.read(blob, run, urgency)

    async def _who_has(self, digest: str) -> list[str]:
        """Return the siblings that have all of a tar."""
        holders: list[str] | None = self._holders.get(digest)
        if holders is None:
            answers, _ = await self._ask_all(digest)
            holders = [url for url, told in answers if told.whole]
            self._holders.put(digest, holders, _HAS_IT if holders else NOBODY_KNOWS)
        return holders

    async def _from_holders(self, blob: Blob, chunks: range, urgency: Urgency) -> list[bytes]:
        errors: list[DadiError] = []
        for url in await self._who_has(blob.digest):
            try:
                parts = await self._read_from(url, blob, chunks, urgency)
                self.bytes += sum(map(len, parts))
                return parts
            except DadiError as error:
                errors.append(error)
                self._fallbacks.note("sibling passed over", f"{url}: {error}")
        raise errors[-1] if errors else Unavailable(f"no sibling that has {blob} answers")

    def _check_whole(self, layer: ImageLayer) -> None:
        """Check, for once, a tar all of whose chunks are here as one that comes from the registry."""
        if layer.diff_id in self._checking:
            return

        async def checking() -> None:
            self._checks.add(cast("asyncio.Task[None]", asyncio.current_task()))
            try:
                await prove_tar(self._store, layer)
            except Lie as lie:
                await self._on_lie(layer, lie)
            except DadiError as error:
                self._fallbacks.note("layer could not be checked", f"{layer.diff_id}: {error}")
            finally:
                self._checking.discard(layer.diff_id)
                self._checks.discard(cast("asyncio.Task[None]", asyncio.current_task()))

        self._checking.add(layer.diff_id)
        self._spawn(checking())

    async def settle(self) -> None:
        """Let checks end that are about to: one that is broken off has to be done again."""
        if self._checks:
            await asyncio.wait(self._checks, timeout=_SETTLING)

    async def close(self) -> None:
        """Break off what is under way."""
        await self._joined.close()


class _Reader:
    """A function as a source."""

    def __init__(self, read: Callable[[Blob, range, Urgency], Awaitable[list[bytes]]]) -> None:
        self._read = read

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run."""
        return await self._read(blob, chunks, urgency)


async def _held(kept: Kept, blob: Blob, chunks: range, urgency: Urgency) -> list[bytes]:
    """Read while the blob is not evicted from the store. Raises StoreFull."""
    store = kept.store
    assert isinstance(store, DiskBlobs)
    return await Held(kept, store, blob).read(blob, chunks, urgency)
