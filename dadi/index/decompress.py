"""A layer's bytes as the registry has them become its uncompressed tar, in bounded pieces. Blocks: for threads only.

What the bytes are is told by how they begin, as containerd does it, whatever the media type says:

    first bytes           what
    1f 8b                 gzip: one or more members, each with its CRC-32 and length checked; zeros between and after
                          them are padding
    28 b5 2f fd           zstd: one or more frames, their checksums verified where they have them
    50..5f 2a 4d 18       zstd too: a skippable frame
    anything else         a tar as it is, or nothing that `tar.py` will accept

It pulls, so that neither library ever holds more output than one piece, whatever a few bytes of input expand to:
python-zstandard has nothing to push to with such a bound. isa-l does gzip, libzstd zstd; both let go of the GIL.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from typing import BinaryIO, Protocol, cast

import zstandard
from isal import igzip, isal_zlib

from dadi.errors import Malformed, TooLarge, Unsupported

PIECE = 512 << 10
"""Bytes of a piece at most."""
MAX_ZSTD_WINDOW = 128 << 20
"""Bytes that a zstd frame may make its reader remember: what `zstd -d` allows without being asked."""

_GZIP, _ZSTD, _ZSTD_SKIPPABLE = b"\x1f\x8b", b"\x28\xb5\x2f\xfd", b"\x2a\x4d\x18"
_OTHERS = {b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x04\x22\x4d\x18": "lz4", b"PK\x03\x04": "zip"}
_HEAD = 6
_ENDLESS_HEADER = f"its gzip header is larger than {igzip.READ_BUFFER_SIZE} bytes"
_IsalError = cast(type[Exception], isal_zlib.IsalError)
# Put behind the layer's last byte: the reader does not tell whether its input ended in the middle of a frame, but if it
# did, the content of this frame would not come out of it. In two parts, because libzstd forgets a frame header that was
# cut off if the next input begins with a whole frame.
_LAST_WORDS = b"end of the layer"
_LAST_FRAME = zstandard.ZstdCompressor().compress(_LAST_WORDS)


class Readable(Protocol):
    """Where the bytes come from: any binary file will do."""

    def read(self, size: int, /) -> bytes:
        """Return up to `size` bytes, and none only at the end."""
        ...


def uncompressed(source: Readable, *, max_size: int, media_type: str = "") -> Iterator[bytes]:
    """Yield the uncompressed bytes, none of the pieces empty or longer than `PIECE`.

    `max_size`: bytes in all, above it TooLarge; `media_type` is for messages. Raises Malformed for a stream that is
    damaged, cut off or followed by something else, Unsupported for one that nothing here can read, and whatever
    `source` raises.
    """
    head = b""
    while len(head) < _HEAD and (more := source.read(_HEAD - len(head))):
        head += more
    rewound = _Rewound(head, source)
    left = max_size
    for piece in _pieces(head, rewound, media_type):
        left -= len(piece)
        if left < 0:
            raise TooLarge(f"it unpacks to more than {max_size} bytes", hint="the limit can be configured")
        yield piece


def _pieces(head: bytes, source: _Rewound, media_type: str) -> Iterator[bytes]:
    if head.startswith(_GZIP):
        return _gunzip(source)
    if head.startswith(_ZSTD) or (head[1:4] == _ZSTD_SKIPPABLE and head[0] & 0xF0 == 0x50):
        return _unzstd(source)
    for magic, name in _OTHERS.items():
        if head.startswith(magic):
            raise Unsupported(
                f"it is compressed with {name} (its media type says {media_type or 'nothing'})",
                hint="dadi reads gzip, zstd and plain tar",
            )
    return iter(lambda: source.read(PIECE), b"")


def _gunzip(source: _Rewound) -> Iterator[bytes]:
    file = igzip.IGzipFile(fileobj=source, mode="rb")  # type: ignore[no-untyped-call]
    try:
        while piece := file.read1(PIECE):
            yield piece
    except OverflowError:
        raise TooLarge(_ENDLESS_HEADER) from None
    except EOFError:
        raise Malformed("its gzip stream is cut off") from None
    except gzip.BadGzipFile as error:
        if str(error).startswith("Not a gzipped"):
            raise Malformed(f"behind its gzip data stands something else: {error}") from None
        raise Malformed(f"its gzip stream is damaged: {error}") from None
    except _IsalError as error:
        raise Malformed(f"its gzip stream is damaged: {error}") from None


def _unzstd(source: _Rewound) -> Iterator[bytes]:
    source.tail = [_LAST_FRAME[:1], _LAST_FRAME[1:]]
    decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_ZSTD_WINDOW)
    held = b""
    try:
        with decompressor.stream_reader(cast(BinaryIO, source), read_across_frames=True, closefd=False) as reader:
            while piece := reader.read(PIECE):
                if len(piece) < len(_LAST_WORDS):  # only the last one can be short; the words may be spread over two
                    held += piece
                    continue
                if held:
                    yield held
                held = piece
    except zstandard.ZstdError as error:
        if "too much memory" in str(error):
            raise TooLarge(f"its zstd window is larger than {MAX_ZSTD_WINDOW} bytes") from None
        raise Malformed(f"its zstd stream is damaged: {error}") from None
    if not held.endswith(_LAST_WORDS):
        raise Malformed("its zstd stream is cut off")
    if last := held[: -len(_LAST_WORDS)]:
        yield last


class _Rewound:
    """A source with its first bytes put back, some of our own behind it, and a limit on the size of a gzip header."""

    def __init__(self, head: bytes, source: Readable) -> None:
        self._head = head
        self._source = source
        self.tail: list[bytes] = []

    def read(self, size: int = -1) -> bytes:
        if self._head:
            data, self._head = self._head[:size], self._head[size:]
            return data
        data = self._source.read(size)
        if not data and self.tail:
            data = self.tail.pop(0)
        return data

    def readinto(self, buffer: memoryview) -> int:
        # Some versions of python-isal double their buffer until a member's header (file name, comment) fits in it;
        # others raise OverflowError.
        if len(buffer) > igzip.READ_BUFFER_SIZE:
            raise TooLarge(_ENDLESS_HEADER)
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)
