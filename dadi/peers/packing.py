"""Which chunks a node gives as zstd frames: those that it got as such, and those that it has compressed itself."""

from __future__ import annotations

import asyncio
import os

from dadi.blobs.disk import DiskBlobs
from dadi.errors import DadiError
from dadi.index.chunks import Blob
from dadi.peers.frames import Frames, packed


class Packing:
    """Frames of what is in `store`; they are kept in `frames_kept`."""

    def __init__(self, store: DiskBlobs, frames_kept: Frames) -> None:
        self._store = store
        self._frames = frames_kept
        self._compressing = 0

    def __repr__(self) -> str:
        return f"Packing({self._compressing} at work)"

    async def frames(self, blob: Blob, chunks: range, *, compress: bool) -> list[bytes]:
        """Return the frames of the first chunks, of as many as have some; none if plain bytes are better."""
        if compress and any(self._frames.get(blob, chunk) is None for chunk in chunks):
            await self._compress(blob, chunks)
        frames = []
        for chunk in chunks:
            frame = self._frames.get(blob, chunk)
            if not frame:
                break
            frames.append(frame)
        return frames

    def plain_ones(self, blob: Blob, chunks: range) -> range:
        """Return the first chunks, up to one that has a frame."""
        stop = next((chunk for chunk in chunks if self._frames.get(blob, chunk)), chunks.stop)
        return range(chunks.start, max(stop, chunks.start + 1))

    async def _compress(self, blob: Blob, chunks: range) -> None:
        """Make the frames that are not known, unless the processors are busy with that already."""
        if self._compressing >= (os.cpu_count() or 1):
            return
        unknown = [chunk for chunk in chunks if self._frames.get(blob, chunk) is None]
        self._compressing += 1
        try:
            for chunk in unknown:
                (data,) = await self._store.read(blob, range(chunk, chunk + 1))
                self._frames.keep(blob, chunk, await asyncio.to_thread(_packed_if_right, blob, chunk, data))
        except DadiError:
            pass  # evicted, or spoilt on the disk: not to be kept; whoever sends it, or is sent it, finds out
        finally:
            self._compressing -= 1


def _packed_if_right(blob: Blob, chunk: int, data: bytes) -> bytes:
    # A frame outlives the bytes on the disk that it was made of.
    blob.verify(chunk, data, source="the disk")
    return packed(data)
