"""Tars made by hand, byte for byte, so that they can be wrong in one thing only; and what the parser makes of them."""

from __future__ import annotations

from dadi.index.layer import Entry
from dadi.index.tar import TarLimits, TarParser

END = bytes(1024)
POSIX, GNU = b"ustar\x0000", b"ustar  \0"


def octal(value: int, width: int) -> bytes:
    return b"%0*o\0" % (width - 1, value)


def base256(value: int, width: int) -> bytes:
    return ((value & ((1 << (8 * width - 1)) - 1)) | 1 << (8 * width - 1)).to_bytes(width, "big")


def header(name: bytes = b"f", type: bytes = b"0", size: int = 0, *, link: bytes = b"", magic: bytes = POSIX,
           fields: dict[int, bytes] | None = None, checksum: bytes | None = None) -> bytes:  # fmt: skip
    """A header; `fields` puts raw bytes at offsets."""
    block = bytearray(512)
    parts = {0: name, 100: octal(0o644, 8), 108: octal(1, 8), 116: octal(2, 8), 124: octal(size, 12),
             136: octal(3, 12), 156: type, 157: link, 257: magic}  # fmt: skip
    for at, field in (parts | (fields or {})).items():
        block[at : at + len(field)] = field
    block[148:156] = b" " * 8
    block[148:156] = checksum or b"%06o\0 " % sum(block)
    return bytes(block)


def padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 512)


def member(name: bytes = b"f", data: bytes = b"", type: bytes = b"0", **more: object) -> bytes:
    return header(name, type, len(data), **more) + padded(data)


def record(key: bytes, value: bytes) -> bytes:
    rest = b" %s=%s\n" % (key, value)
    length = len(rest) + 1
    while len(str(length)) + len(rest) != length:
        length += 1
    return b"%d%s" % (length, rest)


def pax(*records: tuple[bytes, bytes], type: bytes = b"x") -> bytes:
    return member(b"PaxHeaders/f", b"".join(record(key, value) for key, value in records), type)


def sparse_00(pairs: list[tuple[int, int]], size: int) -> bytes:
    records = [(b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.numblocks", b"%d" % len(pairs))]
    for offset, length in pairs:
        records += [(b"GNU.sparse.offset", b"%d" % offset), (b"GNU.sparse.numbytes", b"%d" % length)]
    return pax(*records) + member(b"s", bytes(sum(length for _, length in pairs)))


def sparse_01(pairs: list[tuple[int, int]], size: int) -> bytes:
    text = b",".join(b"%d,%d" % pair for pair in pairs)
    records = [(b"GNU.sparse.size", b"%d" % size), (b"GNU.sparse.map", text), (b"GNU.sparse.name", b"s")]
    return pax(*records) + member(b"GNUSparseFile.0/s", bytes(sum(length for _, length in pairs)))


def sparse_10(pairs: list[tuple[int, int]], size: int, count: int | None = None) -> bytes:
    lines = [len(pairs) if count is None else count, *(number for pair in pairs for number in pair)]
    text = padded(b"".join(b"%d\n" % number for number in lines))
    records = [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0"), (b"GNU.sparse.realsize", b"%d" % size)]
    records += [(b"GNU.sparse.name", b"s"), (b"path", b"GNUSparseFile.0/s")]
    return pax(*records) + member(b"GNUSparseFile.0/s", text + bytes(sum(length for _, length in pairs)))


def parse(data: bytes, step: int = 1 << 20, limits: TarLimits | None = None) -> tuple[Entry, ...]:
    parser = TarParser(limits)
    for at in range(0, len(data), step):
        parser.feed(memoryview(data)[at : at + step])
    return parser.finish()


def one(data: bytes) -> Entry:
    (entry,) = parse(data + END)
    return entry
