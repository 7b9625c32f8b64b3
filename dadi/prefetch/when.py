"""Moments as an operator writes them: 2026-11-10T22:00+08:00, or +2h from now. Pure: the clock is given."""

from __future__ import annotations

from datetime import datetime, tzinfo

from dadi.config import SECONDS, quantity
from dadi.errors import ConfigError, InvalidRequest

LATEST = 1e11
"""Seconds since 1970: what messages may say, and what has a date."""
HINT = "write it as 2026-11-10T22:00+08:00, or +2h (s, m, h, d) from now"


def moment(text: str, now: float, zone: tzinfo | None = None) -> float:
    """Return seconds since 1970. Without an offset it is the time of `zone` (None: of this machine).

    Raises InvalidRequest for what is no moment.
    """
    text = text.strip()
    try:
        if text.startswith("+"):
            at = now + quantity(text[1:], SECONDS)
        else:
            found = datetime.fromisoformat(text)
            at = (found if found.tzinfo else found.replace(tzinfo=zone)).timestamp()
    except (ConfigError, ValueError, OverflowError, OSError):
        raise InvalidRequest(f"{text!r} is no time", hint=HINT) from None
    if at > LATEST:
        raise InvalidRequest(f"{text!r} is too far away", hint=HINT)
    return at


def written(seconds: float) -> str:
    """Return a moment as this machine's people read it; "" for none."""
    return datetime.fromtimestamp(seconds).astimezone().isoformat(sep=" ", timespec="seconds") if seconds else ""
