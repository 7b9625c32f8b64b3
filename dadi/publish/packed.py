"""A layer packed anew: zstd, one frame for each 256 KiB chunk of its tar, so that one can begin at any chunk.

    frame n     chunk n of the tar: content size in its header, no checksum (chunks have digests), no dictionary
    a tar of 0 bytes is one empty frame

Frames are made by several threads and written in order, by whoever calls `write`; no more than `_AHEAD` chunks a
thread are held. libzstd makes the same frame of the same chunk at the same level, whichever thread it is in, so the
same layer, level and version of libzstd give the same bytes. (RFC 8878.)

Blocks: for threads.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import msgspec
import zstandard

from dadi import digest as digests
from dadi.index import seek
from dadi.index.chunks import DEFAULT_CHUNK_SIZE, ChunkHashes
from dadi.index.layer import LayerIndex
from dadi.index.seek import COMPRESSED_CHUNK, Form, SeekPoint, SeekTable
from dadi.publish.work import temporary

DEFAULT_LEVEL = 9
MIN_LEVEL, MAX_LEVEL = 1, 19
_AHEAD = 3


class Packer:
    """The threads that compress, shared by all layers of a run. Use it as a context manager."""

    def __init__(self, level: int = DEFAULT_LEVEL, threads: int | None = None) -> None:
        self.level = level
        self.threads = threads or max(1, len(os.sched_getaffinity(0)))
        self._own = threading.local()
        self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="pack")

    def __enter__(self) -> Packer:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)  # no layer waits for a frame any more

    def submit(self, chunk: bytes) -> Future[bytes]:
        """Return the frame of a chunk, when it is made."""
        return self._pool.submit(self._frame, chunk)

    def _frame(self, chunk: bytes) -> bytes:
        compressor = getattr(self._own, "compressor", None)
        if compressor is None:  # one a thread: a compressor's state is not for two at once
            compressor = zstandard.ZstdCompressor(self.level, write_checksum=False, write_content_size=True)
            self._own.compressor = compressor
        frame: bytes = compressor.compress(chunk)
        return frame


class PackedLayer:
    """A layer that is being packed into the file at `path`. It is a `LayerSink`; then `finish`, in any case `close`."""

    def __init__(self, packer: Packer, path: Path) -> None:
        self.path = path
        self._packer = packer
        with self._kept():
            self._file = path.open("wb")
        self._parts: list[bytes] = []
        self._held = 0
        self._frames: deque[Future[bytes]] = deque()
        self._points: list[SeekPoint] = []
        self._hash = hashlib.sha256()
        self._chunks = ChunkHashes(COMPRESSED_CHUNK)

    def write(self, data: bytes, /) -> None:
        """Take the next bytes of the tar."""
        view = memoryview(data)
        while view:
            part = view[: DEFAULT_CHUNK_SIZE - self._held]
            view = view[len(part) :]
            self._parts.append(bytes(part))
            self._held += len(part)
            if self._held == DEFAULT_CHUNK_SIZE:
                self._cut()

    def finish(self, index: LayerIndex) -> tuple[LayerIndex, SeekTable]:
        """Return the index of the packed layer, made from that of the layer it was, and its seek table."""
        if self._held or not index.table.size:
            self._cut()
        while self._frames:
            self._put(self._frames.popleft().result())
        with self._kept():
            self._file.close()  # what is buffered is written now
        digest = digests.from_raw(self._hash.digest())
        table = SeekTable(
            seek.VERSION, Form.ZSTD, digest, index.diff_id, index.table.size, self._chunks.table(), tuple(self._points)
        )
        return msgspec.structs.replace(index, layer_digest=digest, layer_size=self._chunks.size), table

    def close(self) -> None:
        """Let go of the file, and of what was not written."""
        for frame in self._frames:
            frame.cancel()
        with contextlib.suppress(OSError):
            self._file.close()

    def _kept(self) -> contextlib.AbstractContextManager[None]:
        return temporary(f"a packed layer cannot be kept at {self.path}")

    def _cut(self) -> None:
        chunk = b"".join(self._parts)
        self._parts, self._held = [], 0
        self._frames.append(self._packer.submit(chunk))
        if len(self._frames) > _AHEAD * self._packer.threads:
            self._put(self._frames.popleft().result())

    def _put(self, frame: bytes) -> None:
        self._points.append(SeekPoint(self._chunks.size * 8, len(self._points) * DEFAULT_CHUNK_SIZE, False, b""))
        with self._kept():
            self._file.write(frame)
        self._hash.update(frame)
        self._chunks.update(frame)
