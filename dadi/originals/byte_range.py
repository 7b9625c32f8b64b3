"""The Range header of a request for one blob (RFC 9110, 14). Pure.

    bytes=A-B   bytes=A-   bytes=-N      one range; what it means of a blob of `size` bytes
    behind the end, or B before A        416: so do registries, and the specification's own conformance tests ask it
    several ranges, another unit, or     the whole blob: a server may ignore a Range that it does not do
    what is no range at all

That is for clients of all kinds. Between our own programs what makes no sense is refused: `dadi/blobs/serving.py`.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_RANGE = re.compile(r"bytes=[ \t]*(?:([0-9]{1,19})-([0-9]{0,19})|-([0-9]{1,19}))[ \t]*")


class ByteRange(NamedTuple):
    """What is to be sent, and with which status: 200, 206, or 416 (then nothing)."""

    offset: int
    length: int
    status: int


def parse(header: str | None, size: int) -> ByteRange:
    """Return what a Range header asks for."""
    match = _RANGE.fullmatch(header) if header is not None else None
    if match is None:
        return ByteRange(0, size, 200)
    first, last, suffix = match.groups()
    if suffix is not None:
        length = min(int(suffix), size)
        return ByteRange(size - length, length, 206) if length else ByteRange(0, 0, 416)
    start = int(first)
    if start >= size or (last and int(last) < start):
        return ByteRange(0, 0, 416)
    return ByteRange(start, min(int(last) if last else size - 1, size - 1) - start + 1, 206)
