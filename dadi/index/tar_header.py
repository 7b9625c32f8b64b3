"""One 512-byte tar header: its fields, its numbers, its checksum. Pure; what the fields mean together is `tar.py`'s.

    offset  bytes  field       what
         0    100  name        up to the first NUL
       100      8  mode        numbers: octal digits with spaces and NULs around them, or, with the top bit of the
       108      8  uid           first byte set, base 256: big-endian two's complement in the remaining bits (GNU)
       116      8  gid
       124     12  size        bytes of data that follow, before padding to 512
       136     12  mtime       seconds since 1970
       148      8  checksum    sum of all 512 bytes, these eight taken as spaces
       156      1  type        see `tar.py`
       157    100  link        up to the first NUL
       257      6  magic       "ustar\\0" POSIX 1988 (ustar, pax, star); "ustar " GNU; anything else: v7, ends here
       263      2  version
       265     64  owner and group names (not used: an image knows numbers only)
       329      8  major       of a device
       337      8  minor
       345    155  prefix      ustar: goes before the name, with "/" between; star (header ends in "tar\\0"): 131 bytes;
                               GNU: atime and ctime (12 each) instead, and at 386 the map of `tar_sparse.py`

Sources: POSIX.1-2017 "pax > ustar Interchange Format"; GNU tar manual, "Basic Tar Format"; tar(5) of libarchive.
"""

from __future__ import annotations

import functools
import re
import struct
from zlib import adler32

import msgspec

from dadi.errors import Malformed

BLOCK = 512
ZEROS = bytes(BLOCK)
MAX_SIZE = 1 << 62
"""Bytes: no size or offset above this is believed."""

_FIELDS = struct.Struct("100s8s8s8s12s12s8sc100s6s66s8s8s155s12s")
_PLAIN_OCTAL = re.compile(rb"[0-7]{11}[\0 ]").fullmatch
_POSIX, _GNU = b"ustar\0", b"ustar "
_MIN_TIME, _MAX_TIME = -(1 << 63), (1 << 63) - 1


class Header(msgspec.Struct, gc=False):
    """The fields of one header; `mtime` in nanoseconds, `major` and `minor` of devices only."""

    name: bytes
    mode: int
    uid: int
    gid: int
    size: int
    mtime: int
    type: bytes
    link: bytes
    gnu: bool
    major: int
    minor: int


def parse(block: bytes) -> Header:
    """Return the header in these 512 bytes; raise Malformed if the checksum or a number is wrong."""
    (name, mode, uid, gid, size, mtime, checksum, kind, link, magic, _, major, minor, prefix, tail) = _FIELDS.unpack(
        block
    )
    _check(block, checksum)
    name = text(name)
    if prefix[0]:
        if magic == _POSIX:
            name = text(prefix[:131] if tail.endswith(b"tar\0") else prefix) + b"/" + name
        elif magic == _GNU:
            name = _old_go_prefix(prefix) + name
    device = kind in b"34"  # the fields of other members are not always clean
    length = int(size[:11], 8) if _PLAIN_OCTAL(size) else number(size)
    if not 0 <= length <= MAX_SIZE:
        raise Malformed(f"its size is {length} bytes")
    return Header(
        name,
        number(mode),
        number(uid),
        number(gid),
        length,
        _nanoseconds(mtime),
        kind,
        text(link),
        magic == _GNU,
        number(major) if device else 0,
        number(minor) if device else 0,
    )


def text(field: bytes) -> bytes:
    """Return what stands before the first NUL."""
    return field.split(b"\0", 1)[0]


@functools.lru_cache(maxsize=4096)  # a layer has few modes, owners and dates; equal ones also share their object
def number(field: bytes) -> int:
    """Return the number in a field, octal or base 256; raise Malformed if it is neither. An empty one is 0."""
    first = field[0]
    if first & 0x80:
        bits = 8 * len(field) - 1
        value = int.from_bytes(field, "big") & ((1 << bits) - 1)
        return value - (1 << bits) if first & 0x40 else value
    digits = text(field.strip(b" \0")).rstrip(b" ")
    if not digits:
        return 0
    # int() alone would take signs, underscores and "0o" as well
    if not digits.isdigit() or digits.strip(b"01234567"):
        raise Malformed(f"{field!r} is not a number")
    return int(digits, 8)


@functools.lru_cache(maxsize=4096)
def _nanoseconds(field: bytes) -> int:
    return clamp_time(number(field) * 1_000_000_000)


def clamp_time(nanoseconds: int) -> int:
    """Return the time, or the end of the range that 64 bits hold (1677 to 2262), as file systems do."""
    return min(max(nanoseconds, _MIN_TIME), _MAX_TIME)


def padded(size: int) -> int:
    """Return how many bytes of the tar `size` bytes of data take: data ends on a block boundary."""
    return (size + BLOCK - 1) & -BLOCK


def _check(block: bytes, field: bytes) -> None:
    # The low half of an Adler-32 is 1 + the sum of the bytes modulo 65,521, summed in C. 256 bytes sum to 65,280 at
    # most, so two halves give the exact sum; all 512 together would not.
    unsigned = (adler32(block[:256]) & 0xFFFF) + (adler32(block[256:]) & 0xFFFF) - 2 - sum(field) + 8 * 32
    if field == b"%06o\0 " % unsigned or (stored := number(field)) == unsigned:
        return
    # Some old tars summed signed characters, so that a byte from 128 on counted 256 less.
    signed = sum(memoryview(block).cast("b")) - sum(memoryview(field).cast("b")) + 8 * 32
    if stored != signed:
        raise Malformed(f"its checksum is wrong ({stored}, not {unsigned})")


def _old_go_prefix(field: bytes) -> bytes:
    # Go before 1.8, and so the Docker of those days, wrote some long names into "GNU" headers with a ustar prefix,
    # where GNU has atime and ctime: what cannot be read as these two is such a prefix.
    try:
        number(field[:12])
        number(field[12:24])
    except Malformed:
        prefix = text(field)
        return prefix + b"/" if prefix.isascii() else b""
    return b""
