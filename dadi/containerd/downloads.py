"""Layers that cannot be lazy: fetched whole into containerd's content store, some at a time, ahead of the unpacking.

The first such layer makes those above it be fetched too, as in containerd's own client: as a rule none of them can be
lazy then. One that is lazy after all is let go again.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from dadi.containerd.client import Containerd
from dadi.errors import Conflict, DadiError, DigestMismatch
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.publish.progress import Part, Progress

AT_ONCE = 3


class LayerDownloads:
    """The layers of one image, by number; `close` it."""

    def __init__(
        self,
        registry: RegistryClient,
        containerd: Containerd,
        reference: Reference,
        layers: Sequence[Descriptor],
        writing: str,
        progress: Progress,
    ) -> None:
        self.fetched = 0
        """Bytes that came from the registry, for layers that were wanted or not."""
        self._registry, self._containerd, self._reference = registry, containerd, reference
        self._layers, self._writing, self._progress = layers, writing, progress
        self._slots = asyncio.Semaphore(AT_ONCE)
        self._tasks: dict[int, asyncio.Task[None]] = {}

    def __repr__(self) -> str:
        return f"LayerDownloads({len(self._tasks)} of {len(self._layers)} layers, {self.fetched} bytes)"

    async def have(self, number: int) -> None:
        """Return when the layer is in the content store; raise DigestMismatch, and what the two clients raise."""
        for later in range(number, len(self._layers)):
            if later not in self._tasks:
                self._progress.expect(size=self._layers[later].size)
                self._tasks[later] = asyncio.create_task(self._fetch(later))
        await self._tasks[number]

    async def drop(self, number: int) -> None:
        """Stop fetching a layer: it is not needed."""
        task = self._tasks.get(number)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def close(self) -> None:
        """Stop all that is under way."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _fetch(self, number: int) -> None:
        layer = self._layers[number]
        part = Part(self._progress)
        name = f"{self._writing}-layer-{number}"
        async with self._slots:
            try:
                try:
                    await self._write(name, layer, part, mirrors=True)
                except Conflict:  # not what its digest says: once more, from the registry itself
                    await self._forget(name, part)
                    await self._write(name, layer, part, mirrors=False)
            except Conflict:
                await self._forget(name, part)
                raise DigestMismatch(
                    f"layer {layer.digest} of {self._reference.name} is not what its digest says",
                    source=self._reference.registry,
                    hint="neither by mirrors nor by the registry itself: push the image again",
                ) from None
            except asyncio.CancelledError:
                part.again()
                self._progress.expect(size=-layer.size)
                raise
        part(layer.size)

    async def _write(self, name: str, layer: Descriptor, part: Part, *, mirrors: bool) -> None:
        async def source() -> AsyncGenerator[bytes, None]:
            done = 0
            async with aclosing(self._registry.blob(self._reference, layer, mirrors=mirrors)) as pieces:
                async for piece in pieces:
                    yield piece
                    done += len(piece)
                    self.fetched += len(piece)
                    part(done)

        await self._containerd.write(name, layer.digest, layer.size, source)

    async def _forget(self, name: str, part: Part) -> None:
        part.again()
        with contextlib.suppress(DadiError):
            await self._containerd.abort(name)
