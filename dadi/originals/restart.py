"""Patience with superpeers that are gone for a moment: who has begun to give a client bytes waits for their restart.

A client whose pull has not begun goes to the registry, at once; one that has part of a body loses it (podman's pull
fails) when that is cut off.
"""

from __future__ import annotations

import asyncio

from dadi.errors import DadiError, Unreachable

PATIENCE = 10.0
"""Seconds that a superpeer may be gone; clients wait much longer for the next byte."""
GONE = "superpeer gone in the middle of a blob, waited for"
"""The fallback's kind."""
_EACH = 0.25


class Restart:
    """One client's, or one fetch's, patience; `came` begins it anew."""

    def __init__(self) -> None:
        self._until: float | None = None

    def came(self) -> None:
        """Something has come."""
        self._until = None

    async def wait(self, error: DadiError) -> bool:
        """Return True, a moment later, if it is worth asking again; False if that is not why, or it takes too long."""
        if not isinstance(error, Unreachable):
            return False
        now = asyncio.get_running_loop().time()
        if self._until is None:
            self._until = now + PATIENCE
        if now >= self._until:
            return False
        await asyncio.sleep(_EACH)
        return True
