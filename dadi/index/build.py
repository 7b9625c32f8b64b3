"""One streaming pass over a layer gives its index, and its uncompressed bytes to a sink on the way.

    event loop         thread 1                 thread 2                thread 3
    pieces ─bounded─►  hash: layer digest  ─┬─► hash: diff ID
                       decompress           │   tar entries
                                            └─────────────────────────► hash: chunk digests
                                                                        sink.write

All queues are bounded (`_IN_FLIGHT` compressed bytes, `_QUEUE` uncompressed pieces), so that the slowest of all,
registry, CPU or disk, sets the pace, and memory stays the same whatever the layer. Hashing, decompressing and writing
let go of the GIL, and three threads share two cores evenly by themselves.

What the layer's bytes are is known only at their end, so an error in them counts as the layer's own (Malformed and the
like) only if their digest is right; otherwise it was the transfer (DigestMismatch). For that the compressed bytes are
hashed to their end even after decompressing or the tar has failed. An error of the sink ends the pass at once.

The pass never outlives the call: when `build` returns or raises, also when it is cancelled, its threads are gone and
the sink is not written to any more.
"""

from __future__ import annotations

import asyncio
import hashlib
import queue
from collections import deque
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

import msgspec

from dadi import digest as digests
from dadi.errors import DadiError, DigestMismatch
from dadi.index.chunks import DEFAULT_CHUNK_SIZE, ChunkHashes
from dadi.index.decompress import uncompressed
from dadi.index.layer import VERSION, Entry, LayerIndex
from dadi.index.tar import TarLimits, TarParser

_IN_FLIGHT = 4 << 20
_QUEUE = 4


class LayerSource(msgspec.Struct, frozen=True):
    """What manifest and config say of a layer: the blob in the registry (`layer_digest`, `layer_size` bytes,
    `media_type`) and the digest of its uncompressed tar."""

    layer_digest: str
    layer_size: int
    media_type: str
    diff_id: str


class LayerSink(Protocol):
    """Where the uncompressed bytes go."""

    def write(self, data: bytes, /) -> object:
        """Keep the next bytes (in order). Called from a worker thread, never from two at once; may block."""
        ...


class Limits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one layer may cost; more of it is TooLarge."""

    max_uncompressed_size: int = 256 << 30
    """Bytes of the uncompressed tar. This bounds the disk that a bomb can take; memory is bounded anyway."""
    tar: TarLimits = TarLimits()


async def build(
    pieces: AsyncIterator[bytes],
    layer: LayerSource,
    sink: LayerSink,
    *,
    chunk_size: int = DEFAULT_CHUNK_SIZE,
    limits: Limits | None = None,
    on_progress: Callable[[int], None] | None = None,
    verified: bool = False,
) -> LayerIndex:
    """Return the index of the layer whose bytes, as the registry has them, are `pieces` (of any sizes).

    `on_progress` is called on the event loop with the number of compressed bytes that are done, now and then and at
    the end. `verified`: `pieces` raises, and does not give the last byte, if its bytes are not what `layer` says: they
    are not hashed again. Raises DigestMismatch if the bytes are not what `layer` says; Malformed, TooLarge, Unsupported
    for a layer that is what it says and still cannot be indexed; whatever `pieces`, `sink` and `on_progress` raise.
    After an error the sink has been given bytes that must be thrown away. `pieces` is the caller's to close.
    """
    progress = on_progress or (lambda _: None)
    work = _Pass(layer, sink, chunk_size, limits or Limits(), verified=verified)
    try:
        async for piece in pieces:
            await work.feed(piece)
            progress(work.done)
        index = await work.finish()
    finally:
        await work.close()
    progress(layer.layer_size)
    return index


class _Stopped(Exception):
    """Nobody wants the result of the pass any more; never leaves this file."""


class _Pass:
    """The threads of one pass and what goes between them. `feed`, `finish` and `close` belong to the event loop."""

    def __init__(self, layer: LayerSource, sink: LayerSink, chunk_size: int, limits: Limits, *, verified: bool) -> None:
        self.done = 0
        """Compressed bytes that thread 1 has taken."""
        self._layer = layer
        self._sink = sink
        self._limits = limits
        self._loop = asyncio.get_running_loop()
        self._room = asyncio.Event()
        self._given = 0
        self._compressed = _Compressed(self._taken, None if verified else hashlib.sha256())
        self._to_tar: queue.Queue[bytes | None] = queue.Queue(_QUEUE)
        self._to_chunks: queue.Queue[bytes | None] = queue.Queue(_QUEUE)
        self._tar = TarParser(limits.tar)
        self._diff_id = hashlib.sha256()
        self._chunks = ChunkHashes(chunk_size)
        self._entries: tuple[Entry, ...] = ()
        self._layer_error: DadiError | None = None
        self._fatal: Exception | None = None
        self._pool = ThreadPoolExecutor(3, thread_name_prefix=f"index-{digests.short(layer.layer_digest)}")
        stages = (self._unpack, self._read_tar, self._keep_chunks)
        self._threads = [asyncio.wrap_future(self._pool.submit(stage)) for stage in stages]

    async def feed(self, piece: bytes) -> None:
        """Take the next compressed bytes; wait while there are too many under way."""
        self._given += len(piece)
        if self._given > self._layer.layer_size:
            raise self._mismatch(f"more than the {self._layer.layer_size} bytes that its manifest says arrived")
        if piece:
            self._compressed.put(piece)
        while self._given - self.done > _IN_FLIGHT and self._fatal is None:
            self._room.clear()
            await self._room.wait()
        if self._fatal is not None:
            raise self._fatal

    async def finish(self) -> LayerIndex:
        """Return the index, once all that was fed has gone through and every digest is right."""
        self._compressed.put(None)
        await asyncio.wait(self._threads)
        for thread in self._threads:
            thread.result()  # a thread that died of anything unforeseen has kept less than it was given
        layer, given = self._layer, self._compressed
        if self._fatal is not None:
            raise self._fatal
        if given.size != layer.layer_size:
            raise self._mismatch(f"{given.size} bytes arrived; its manifest says {layer.layer_size}")
        if given.digest() not in (None, layer.layer_digest):
            raise self._mismatch(f"the bytes that arrived are {given.digest()}")
        if (error := self._layer_error) is not None:
            raise type(error)(f"layer {layer.layer_digest}: {error.message}", hint=error.hint)
        diff_id = digests.from_raw(self._diff_id.digest())
        if diff_id != layer.diff_id:
            raise self._mismatch(f"it unpacks to {diff_id}; the image's config says {layer.diff_id}")
        return LayerIndex(VERSION, layer.layer_digest, layer.layer_size, diff_id, self._chunks.table(), self._entries)

    async def close(self) -> None:
        """End the threads, wherever they are; wait for that even if cancelled (a write under way cannot be)."""
        self._compressed.stop()
        cancelled: asyncio.CancelledError | None = None
        while not all(thread.done() for thread in self._threads):
            try:
                await asyncio.wait(self._threads)
            except asyncio.CancelledError as error:
                cancelled = error
        self._pool.shutdown(wait=False)
        if cancelled is not None:
            raise cancelled

    def _mismatch(self, why: str) -> DigestMismatch:
        return DigestMismatch(f"layer {self._layer.layer_digest}: {why}")

    # Thread 1 takes a piece: its place is free again.
    def _taken(self, size: int) -> None:
        self._loop.call_soon_threadsafe(self._make_room, size)

    def _make_room(self, size: int) -> None:
        self.done += size
        self._room.set()

    def _fail(self, error: DadiError) -> None:
        self._layer_error = self._layer_error or error

    def _abort(self, error: Exception) -> None:
        self._fatal = self._fatal or error
        self._compressed.stop()
        self._loop.call_soon_threadsafe(self._room.set)

    # The threads. Whatever goes wrong in one, it takes pieces until None comes, so that no other waits for ever.

    def _unpack(self) -> None:
        limit, media_type = self._limits.max_uncompressed_size, self._layer.media_type
        try:
            try:
                for piece in uncompressed(self._compressed, max_size=limit, media_type=media_type):
                    self._to_tar.put(piece)
                    self._to_chunks.put(piece)
                    if self._layer_error is not None:
                        break
            except DadiError as error:
                self._fail(error)
            finally:
                self._to_tar.put(None)
                self._to_chunks.put(None)
            self._compressed.drain()
        except _Stopped:
            pass
        except Exception as error:
            self._abort(error)

    def _read_tar(self) -> None:
        pieces = iter(self._to_tar.get, None)
        try:
            for piece in pieces:
                self._diff_id.update(piece)
                self._tar.feed(piece)
            self._entries = self._tar.finish()
        except DadiError as error:
            self._fail(error)
        except Exception as error:
            self._abort(error)
        finally:
            deque(pieces, maxlen=0)

    def _keep_chunks(self) -> None:
        pieces = iter(self._to_chunks.get, None)
        try:
            for piece in pieces:
                self._chunks.update(piece)
                self._sink.write(piece)
        except Exception as error:
            self._abort(error)
        finally:
            deque(pieces, maxlen=0)


class _Compressed:
    """The compressed bytes on their way from the event loop (`put`, `stop`) to thread 1 (`read`, `drain`).

    `taken` is called with the size of each piece that thread 1 takes. `hashed` is fed with them.
    """

    def __init__(self, taken: Callable[[int], None], hashed: hashlib._Hash | None) -> None:
        self.size = 0
        self._taken = taken
        self._hash = hashed
        self._pieces: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._piece: bytes | None = b""
        self._at = 0
        self._stopped = False

    def put(self, piece: bytes | None) -> None:
        """Give the next piece; None is the end."""
        self._pieces.put(piece)

    def stop(self) -> None:
        """Make `read` raise _Stopped from now on."""
        self._stopped = True
        self._pieces.put(None)

    def read(self, size: int, /) -> bytes:
        if self._stopped:
            raise _Stopped
        if self._piece is not None and self._at == len(self._piece):
            self._next_piece()
        if self._piece is None:
            return b""
        data = self._piece[self._at : self._at + size]
        self._at += len(data)
        return data

    def drain(self) -> None:
        """Hash what is still to come."""
        while self._piece is not None:
            self._next_piece()

    def digest(self) -> str | None:
        """Return the digest of what was taken so far; None if it is not hashed here."""
        return digests.from_raw(self._hash.digest()) if self._hash is not None else None

    def _next_piece(self) -> None:
        self._piece, self._at = self._pieces.get(), 0
        if self._stopped:
            raise _Stopped
        if self._piece is not None:
            if self._hash is not None:
                self._hash.update(self._piece)
            self.size += len(self._piece)
            self._taken(len(self._piece))
