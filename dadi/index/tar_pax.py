"""The records of a pax extended header, and the values in them. Pure.

    body of an 'x' (next member) or 'g' (all that follow) header: records, one after the other:

    bytes               what
    decimal digits      length of the whole record in bytes, these digits and the newline included
    1                   space
    up to "="           key; the ones that matter: path, linkpath, size, uid, gid, mtime, SCHILY.devmajor,
                        SCHILY.devminor, SCHILY.xattr.NAME (the value as it is),
                        LIBARCHIVE.xattr.NAME (name percent-encoded, value in base64), GNU.sparse.* (`tar_sparse.py`)
    the rest but one    value: any bytes
    1                   newline

Xattr names are taken as they stand, as container engines take them: GNU tar writes "=" in a name as "%3D" and they do
not undo that either.

Sources: POSIX.1-2017 "pax > pax Extended Header"; tar(5) of libarchive; the star manual for SCHILY.*.
"""

from __future__ import annotations

import binascii
import re
from urllib.parse import unquote_to_bytes

from dadi.errors import Malformed, TooLarge
from dadi.index.tar_header import MAX_SIZE, Header, clamp_time

MAX_XATTR_NAME = 255
MAX_XATTRS = 64 << 10
"""Bytes of all names and values of one file: Linux gives one value no more (XATTR_SIZE_MAX), nor the list of names."""

SPARSE_MAP, SPARSE_NAME = b"GNU.sparse.map", b"GNU.sparse.name"
_SPARSE_PAIR = (b"GNU.sparse.offset", b"GNU.sparse.numbytes")
_SCHILY, _LIBARCHIVE = b"SCHILY.xattr.", b"LIBARCHIVE.xattr."
_TIME = re.compile(rb"(-?)([0-9]{1,20})(?:\.([0-9]*))?")

Records = dict[bytes, bytes]


def parse(body: bytes) -> Records:
    """Return the records, of equal keys the last; raise Malformed if they do not follow each other exactly.

    The repeated offset and numbytes keys of GNU's sparse format 0.0 come out as the one map of format 0.1.
    """
    records: Records = {}
    pairs: list[bytes] = []
    at = 0
    while at < len(body):
        space = body.find(b" ", at, at + 20)
        digits = body[at:space]
        end = at + int(digits) if space > 0 and digits.isdigit() else 0
        equals = body.find(b"=", space, end)
        if equals < 0 or not space < end <= len(body) or body[end - 1] != 0x0A:
            raise Malformed(f"its pax header breaks off at {body[at : at + 30]!r}")
        key, value = body[space + 1 : equals], body[equals + 1 : end - 1]
        if key in _SPARSE_PAIR:
            if key != _SPARSE_PAIR[len(pairs) % 2]:
                raise Malformed("its sparse map has an offset without a length")
            pairs.append(value)
        else:
            records[key] = value
        at = end
    if pairs:
        records[SPARSE_MAP] = b",".join(pairs)
    return records


def apply(records: Records, header: Header) -> None:
    """Put what the records say in the place of what the header said; an empty value leaves the header's."""
    for key, value in records.items():
        if not value:
            continue
        if key == SPARSE_NAME or (key == b"path" and SPARSE_NAME not in records):
            # A sparse file's "path", as the name in its header, is made up for readers that do not know sparse files.
            header.name = value
        elif key == b"linkpath":
            header.link = value
        elif key == b"size":
            header.size = decimal(value, "size")
        elif key == b"mtime":
            header.mtime = time(value)
        elif key == b"uid":
            header.uid = decimal(value, "uid")
        elif key == b"gid":
            header.gid = decimal(value, "gid")
        elif key == b"SCHILY.devmajor":
            header.major = decimal(value, "major number")
        elif key == b"SCHILY.devminor":
            header.minor = decimal(value, "minor number")


def decimal(value: bytes, what: str) -> int:
    """Return a number of bytes, an id or a count; raise Malformed if it is not plain decimal, or above 2^62."""
    if not value.isdigit() or len(value) > 20 or (number := int(value)) > MAX_SIZE:
        raise Malformed(f"its {what} is {value[:40]!r}")
    return number


def time(value: bytes) -> int:
    """Return seconds with an optional fraction as nanoseconds, exactly (further digits are cut off)."""
    match = _TIME.fullmatch(value)
    if match is None:
        raise Malformed(f"its time is {value[:40]!r}")
    sign, seconds, fraction = match.groups()
    total = int(seconds) * 1_000_000_000 + int((fraction or b"")[:9].ljust(9, b"0"))
    return clamp_time(-total if sign else total)


def xattrs(records: Records) -> tuple[tuple[bytes, bytes], ...]:
    """Return (name, value) of each extended attribute; raise Malformed or TooLarge for what Linux would not take."""
    found: Records = {}
    for key, value in records.items():
        if key.startswith(_SCHILY):
            found[key[len(_SCHILY) :]] = value
        elif key.startswith(_LIBARCHIVE):
            # bsdtar writes every attribute in both ways: the plain one wins
            name = unquote_to_bytes(key[len(_LIBARCHIVE) :])
            if _SCHILY + name not in records:
                found[name] = _base64(value)
    for name in found:
        if not name or b"\0" in name or len(name) > MAX_XATTR_NAME:
            raise Malformed(f"an extended attribute is named {name[:300]!r}")
    if sum(len(name) + len(value) for name, value in found.items()) > MAX_XATTRS:
        raise TooLarge(f"its extended attributes are larger than {MAX_XATTRS} bytes")
    return tuple(found.items())


def _base64(value: bytes) -> bytes:
    unpadded = value.rstrip(b"=\n")
    try:
        return binascii.a2b_base64(unpadded + b"=" * (-len(unpadded) % 4), strict_mode=True)
    except binascii.Error:
        raise Malformed(f"an extended attribute is not base64: {value[:40]!r}") from None
