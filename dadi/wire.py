"""What our own programs say to each other: errors and events as JSON, a header. Pure; `dadi/http.py` carries it.

    an error     {"error": code, "message": …, "hint": …} (codes: `dadi/errors.py`)
    an event     one JSON object a line; the last has "event": "done", or "event": "error" with the fields above
    a header     Dadi-Urgency: startup | prefetch | backfill (see `URGENCY`)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from dadi.errors import DadiError, Unavailable, by_code

Event = dict[str, Any]
URGENCY = "Dadi-Urgency"
"""The header that says who waits for a blob's bytes, see `Urgency` in `dadi/blobs/source.py`; without it a program."""
MAX_EVENT = 16 << 20
"""Bytes that one event may have."""

_decoder = msgspec.json.Decoder(dict[str, Any])


def error_fields(error: DadiError) -> Event:
    """Return an error as the fields of a JSON object."""
    return {"error": error.code, "message": error.message, "hint": error.hint}


def error_from(fields: Event) -> DadiError:
    """Return the error that another program of ours put into JSON."""
    hint = fields.get("hint")
    return by_code(str(fields.get("error")))(str(fields.get("message")), hint=str(hint) if hint else None)


def error_in(body: bytes) -> DadiError | None:
    """Return the error that a response's body holds; None if it holds none of ours."""
    try:
        fields = _decoder.decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return None
    ours = isinstance(fields.get("error"), str) and isinstance(fields.get("message"), str)
    return error_from(fields) if ours else None


class EventReader:
    """Bytes in, events out. `done` is True once the last one has come."""

    def __init__(self, where: str) -> None:
        self.done = False
        self._where = where
        self._pending = b""

    def feed(self, data: bytes) -> Iterator[Event]:
        """Yield the events that are whole now; raise the error that one of them is, Unavailable if one is none."""
        *lines, self._pending = (self._pending + data).split(b"\n")
        if len(self._pending) > MAX_EVENT:
            raise Unavailable(f"{self._where} sent an event of more than {MAX_EVENT} bytes")
        for line in lines:
            try:
                event = _decoder.decode(line)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                raise Unavailable(f"{self._where} sent what is no event: {line[:100]!r}") from None
            if event.get("event") == "error":
                raise error_from(event)
            self.done = self.done or event.get("event") == "done"
            yield event

    def end(self) -> None:
        """Raise Unavailable if there is no more to come and "done" was not among it."""
        if not self.done:
            raise Unavailable(f"{self._where} broke off before it was done", hint="look into its log")
