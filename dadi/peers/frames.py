"""Chunks as zstd frames, the way they cross the network: where a frame ends, what is in it, and a cache of them.

    frame    magic  descriptor  window?  dictionary?  content size?  block …  checksum?     (RFC 8878, "Frame Format")
    block    3 bytes, little endian: bit 0 last, bits 1-2 type (raw, run, compressed), size above; then its content

A node passes on the frames that it got, as they are: to compress anew what was compressed a hop before costs a
millisecond a chunk. Frames are no part of what is verified; the chunk in them is.
"""

from __future__ import annotations

from collections import OrderedDict

import zstandard

from dadi.errors import DigestMismatch
from dadi.index.chunks import MAX_CHUNK_SIZE, Blob

LEVEL = 3
PAYS = 0.9
"""A frame that is larger than this share of its chunk is not worth its while."""
_MAGIC = b"\x28\xb5\x2f\xfd"
_DICTIONARY = (0, 1, 2, 4)
_CONTENT_SIZE = (0, 2, 4, 8)
_OVERHEAD = 200


def longest(length: int) -> int:
    """Return how long a frame of `length` bytes may be: what does not compress becomes a little longer."""
    return length + (length >> 8) + 128


class Scan:
    """Looks for the end of one frame of at most `most` bytes, in bytes that come in pieces: each is looked at once.

    A frame may have as many blocks as if each were of a KiB; zstd makes them of up to 128. Else a body of blocks
    without content would keep the event loop busy, here and wherever the frame is passed on to.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._blocks = most // 1024 + 16
        self._at = 0
        self._checksum = 0
        self._last = False

    def end(self, data: bytes | bytearray) -> int | None:
        """Return where the frame at the start of `data` ends; None if that is not to be seen yet.

        `data`: what was there the last time, and more behind it. Raises DigestMismatch for what is no frame, or one
        that is too long.
        """
        if not self._at and not self._begin(data):
            return None
        while not self._last:
            if self._at > self._most:
                raise self._too_long()
            if len(data) < self._at + 3:
                return None
            header = int.from_bytes(data[self._at : self._at + 3], "little")
            self._last, kind = bool(header & 1), header >> 1 & 3
            if kind == 3:
                raise DigestMismatch("a zstd frame has a block of no known type")
            self._at += 3 + (1 if kind == 1 else header >> 3)
            self._blocks -= 1
            if not self._blocks and not self._last:
                raise DigestMismatch("a zstd frame has more blocks than any that zstd makes")
        end = self._at + self._checksum
        if end > self._most:
            raise self._too_long()
        return end if len(data) >= end else None

    def _begin(self, data: bytes | bytearray) -> bool:
        if data[:4] != _MAGIC[: len(data)]:
            raise DigestMismatch("what came is no zstd frame")
        if len(data) < 5:
            return False
        descriptor = data[4]
        single = descriptor >> 5 & 1
        size = _CONTENT_SIZE[descriptor >> 6] or single
        self._checksum = 4 * (descriptor >> 2 & 1)
        self._at = 5 + (1 - single) + _DICTIONARY[descriptor & 3] + size
        return True

    def _too_long(self) -> DigestMismatch:
        return DigestMismatch(f"a zstd frame is longer than the {self._most} bytes that it may have")


def frame_end(data: bytes | bytearray, most: int) -> int | None:
    """Return where the first frame in `data` ends, see `Scan`."""
    return Scan(most).end(data)


def unpacked(frame: bytes, length: int) -> bytes:
    """Return the `length` bytes in a frame; raise DigestMismatch if it holds anything else. Memory is bounded."""
    if frame_end(frame, longest(length)) != len(frame):
        raise DigestMismatch("what came is not one zstd frame, and nothing else")  # it is passed on as it is
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_CHUNK_SIZE)
        if zstandard.get_frame_parameters(frame).content_size == length:
            data = decompressor.decompress(frame)
            more = b""
        else:
            with decompressor.stream_reader(frame) as reader:
                data, more = reader.read(length), reader.read(1)
    except zstandard.ZstdError as error:
        raise DigestMismatch(f"what came is no zstd frame: {error}") from None
    if len(data) != length or more:
        raise DigestMismatch(f"a zstd frame does not hold {length} bytes")
    return data


def packed(data: bytes) -> bytes:
    """Return a chunk as a frame; nothing if that does not pay. Takes about a millisecond for 256 KiB: in a thread."""
    frame = zstandard.ZstdCompressor(level=LEVEL).compress(data)
    return frame if len(frame) <= len(data) * PAYS else b""


class Frames:
    """The frames of chunks, up to `limit` bytes; those not used for longest go first. 0: it keeps none."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._frames: OrderedDict[tuple[str, int, int], bytes] = OrderedDict()
        self.bytes = 0

    def __repr__(self) -> str:
        return f"Frames({len(self._frames)}, {self.bytes} bytes)"

    def __bool__(self) -> bool:
        return self._limit > 0

    def keep(self, blob: Blob, chunk: int, frame: bytes) -> None:
        """Keep the frame of a chunk that was verified; b"" says that compressing it does not pay."""
        key = (blob.digest, blob.table.chunk_size, chunk)
        if key in self._frames or not self._limit:
            return
        self._frames[key] = frame
        self.bytes += len(frame) + _OVERHEAD
        while self.bytes > self._limit:
            _, old = self._frames.popitem(last=False)
            self.bytes -= len(old) + _OVERHEAD

    def get(self, blob: Blob, chunk: int) -> bytes | None:
        """Return a chunk's frame, b"" if it does not pay, None if nothing is known."""
        key = (blob.digest, blob.table.chunk_size, chunk)
        frame = self._frames.get(key)
        if frame is not None:
            self._frames.move_to_end(key)
        return frame
