"""An answer that gives chunks as they come: its records. Pure; `server.py` writes them, `line.py` reads them.

    offset  size
    0       1     kind: 0 waits   nothing has come for a while, what is left has been asked for: a sign of life
                        1 plain   a chunk's bytes
                        2 frame   a chunk as one zstd frame
                        3 error   no more comes; JSON as in `dadi/wire.py`, with `retry_after` and `instead` if busy
    1       4     chunk, big endian; 0 where it is about none
    5       4     length of what follows, big endian; 0 with "waits"
    9

Each chunk that was asked for comes once, in whatever order, unless an error ends it. Who asks says `Dadi-Stream: 1`;
the body's type is `TYPE`, its length is not known beforehand.

Chunks that are not neighbours are asked for in one request by `Dadi-Chunks: 4-7,12,30-31`, ascending; the range is then
that of the first neighbours among them, and who answers says `Dadi-Chunks: 1`. Without that in the answer it is about
the range alone, and the others are to be asked for again. Nobody is asked so before he has said it once.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterable
from typing import Any

import msgspec

from dadi.errors import AccessDenied, DadiError, DigestMismatch, InvalidRequest, NotFound, Unavailable
from dadi.wire import error_fields, error_in

HEADER, CHUNKS, TYPE = "Dadi-Stream", "Dadi-Chunks", "application/vnd.dadi.chunks"
HEADERS = {"Content-Type": TYPE, CHUNKS: "1"}
"""Of an answer."""
WAITS, PLAIN, FRAME, ERROR = range(4)
_HEAD = struct.Struct(">BII")
SIZE = _HEAD.size
WAITING = _HEAD.pack(WAITS, 0, 0)
MAX_ERROR = 64 << 10
_LONGEST_RETRY = 86400.0
_NEIGHBOURS = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?", re.ASCII)


def head(kind: int, chunk: int, length: int) -> bytes:
    """Return a record's first bytes."""
    return _HEAD.pack(kind, chunk, length)


def parse(data: bytes) -> tuple[int, int, int]:
    """Return (kind, chunk, length) of `SIZE` bytes; raise DigestMismatch for what is no record."""
    kind, chunk, length = _HEAD.unpack(data)
    if kind > ERROR or (kind == WAITS and length) or (kind == ERROR and length > MAX_ERROR):
        raise DigestMismatch(f"what came is no record of a stream of chunks: kind {kind}, {length} bytes")
    return kind, chunk, length


def chunks_text(runs: Iterable[range]) -> str:
    """Return the header `Dadi-Chunks` for runs of neighbours, ascending."""
    return ",".join(f"{run.start}-{run.stop - 1}" if len(run) > 1 else str(run.start) for run in runs)


def chunks_of(text: str, count: int, most: int) -> list[int]:
    """Return the chunks that a header names, of a blob of `count`; raise InvalidRequest if they do not ascend."""
    found: list[int] = []
    for part in text.split(","):
        match = _NEIGHBOURS.fullmatch(part)
        first = int(match[1]) if match else -1
        last = int(match[2] or first) if match else -1
        if first < 0 or last < first or last >= count or (found and first <= found[-1]):
            raise InvalidRequest(f"{part[:40]!r} in {CHUNKS} names no chunks of the blob, or not in their order")
        if len(found) + last - first >= most:
            raise InvalidRequest(f"more than {most} chunks were asked for at once")
        found.extend(range(first, last + 1))
    return found


def error_record(error: DadiError, instead: str = "") -> bytes:
    """Return the record that ends a stream for an error; `instead`: whom else to ask."""
    fields: dict[str, Any] = error_fields(error)
    if isinstance(error, Unavailable) and error.retry_after is not None:
        fields |= {"retry_after": error.retry_after, "instead": instead}
    body = msgspec.json.encode(fields)
    if len(body) > MAX_ERROR:
        body = msgspec.json.encode({"error": error.code, "message": "an error too long to tell", "hint": None})
    return head(ERROR, 0, len(body)) + body


def error_of(body: bytes, where: str) -> tuple[DadiError, float | None, str]:
    """Return the error in a record, in how many seconds to ask again (if it says), and whom else.

    Whatever went wrong over there, the bytes that came here from `where` did not: it is never a DigestMismatch.
    """
    error = error_in(body)
    text = f"{where}: {error.message if error else 'broke off'}"
    if isinstance(error, NotFound | AccessDenied):
        return type(error)(text, hint=error.hint), None, ""
    fields = msgspec.json.decode(body, type=dict[str, Any]) if error else {}
    after, instead = fields.get("retry_after"), fields.get("instead")
    # As it is, not float(after): there are integers that no float can be.
    seconds = float(min(max(0, after), _LONGEST_RETRY)) if isinstance(after, int | float) else None
    return Unavailable(text, retry_after=seconds), seconds, instead[:200] if isinstance(instead, str) else ""
