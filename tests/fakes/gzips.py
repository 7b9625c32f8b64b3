"""Layers' bytes in every form that a registry may have them in: what wrote them, and with what around them."""

from __future__ import annotations

import gzip
import random
import struct
import subprocess
import zlib
from collections.abc import Callable

import zstandard
from isal import igzip

Packer = Callable[[bytes], bytes]


def text(size: int, seed: int = 1) -> bytes:
    """Bytes that compress about as a program does, with references over all distances."""
    generator = random.Random(seed)
    words = [generator.randbytes(generator.randint(2, 9)) for _ in range(3000)]
    return b"".join(generator.choices(words, k=size // 2 + 1))[:size]


def member(data: bytes, level: int = 6) -> bytes:
    return gzip.compress(data, level, mtime=0)


def members(data: bytes, size: int, pack: Packer = member) -> bytes:
    return b"".join(pack(data[at : at + size]) for at in range(0, len(data), size)) or pack(b"")


def with_header(data: bytes, comment: int = 100_000) -> bytes:
    """A member whose header has all that a header can have."""
    plain = member(data)
    return plain[:3] + bytes([4 | 8 | 16]) + plain[4:10] + b"\5\0extraname\0" + b"c" * comment + b"\0" + plain[10:]


def deflated(data: bytes, *, level: int = 6, strategy: int = zlib.Z_DEFAULT_STRATEGY, flush: int | None = None,
             step: int = 40_000) -> bytes:  # fmt: skip
    stream = zlib.compressobj(level, zlib.DEFLATED, 31, 9, strategy)
    packed = b""
    for at in range(0, len(data), step):
        packed += stream.compress(data[at : at + step])
        if flush is not None:
            packed += stream.flush(flush)
    return packed + stream.flush()


def zstd(data: bytes, **options: object) -> bytes:
    return zstandard.ZstdCompressor(**options).compress(data)


def skippable(data: bytes) -> bytes:
    return struct.pack("<II", 0x184D2A50, len(data)) + data


def piped(*command: str) -> Packer:
    return lambda data: subprocess.run(command, input=data, stdout=subprocess.PIPE, check=True).stdout


GZIP: dict[str, Packer] = {
    "one member": member,
    "fast": lambda data: member(data, 1),
    "stored blocks": lambda data: member(data, 0),
    "isal": lambda data: igzip.compress(data),
    "fixed codes": lambda data: deflated(data, strategy=zlib.Z_FIXED),
    "no references": lambda data: deflated(data, strategy=zlib.Z_HUFFMAN_ONLY),
    "sync flushes": lambda data: deflated(data, flush=zlib.Z_SYNC_FLUSH),
    "full flushes": lambda data: deflated(data, flush=zlib.Z_FULL_FLUSH),
    "members": lambda data: members(data, 100_000),
    "a member a file": lambda data: members(data, 3000),
    "members of members": lambda data: members(data, 150_000, lambda part: members(part, 1000 + len(part) // 2)),
    "empty members": lambda data: member(b"") * 2 + members(data, 1000 + len(data) // 2) + member(b""),
    "zeros behind": lambda data: member(data) + bytes(2000),
    "zeros between": lambda data: member(data[:5000]) + bytes(700) + member(data[5000:]) + bytes(512),
    "many zeros between": lambda data: member(data[:70_000]) + bytes(300_000) + member(data[70_000:]),
    "long headers": lambda data: with_header(data[:80_000]) + with_header(data[80_000:]),
}  # fmt: skip

PROGRAMS: dict[str, Packer] = {
    "pigz": piped("pigz", "-p4"),
    "pigz -i": piped("pigz", "-i", "-p3"),
    "bgzip": piped("bgzip", "-c"),
    "gzip": piped("gzip", "-9", "-c"),
}

ZSTD: dict[str, Packer] = {
    "one frame": zstd,
    "a frame a chunk": lambda data: members(data, 16_384, zstd),
    "frames without size": lambda data: members(data, 50_000, lambda part: zstd(part, write_content_size=False)),
    "frames with checksum": lambda data: members(data, 50_000, lambda part: zstd(part, write_checksum=True)),
    "skippable frames": lambda data: skippable(b"in front") + members(
        data, 30_000, lambda part: skippable(b"between") + zstd(part, write_content_size=False)
    ) + skippable(b"behind"),
    "empty frames": lambda data: zstd(b"") + zstd(data[:1000]) + zstd(b"") * 2 + zstd(data[1000:]) + zstd(b""),
    "repeated blocks": lambda data: zstd(bytes(200_000)) + zstd(data),
}  # fmt: skip
