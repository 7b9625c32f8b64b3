"""How many nodes the read that is under way has come through: 0 for a read of this node's own. No I/O.

The count goes with the task that reads, through single flight and store, to who asks upstream: links between them need
not know that it exists. A read that waits for somebody else's fetch of the same chunk adds nothing to that fetch.
"""

from __future__ import annotations

from contextvars import ContextVar

HOPS: ContextVar[int] = ContextVar("hops", default=0)
HEADER = "Dadi-Hops"
_MOST = 1000


def hops_of(text: str | None) -> int:
    """Return the number in a header; what is none, or too large, is as far away as can be."""
    if text is None:
        return 0
    return min(int(text), _MOST) if text.isascii() and text.isdigit() and len(text) < 6 else _MOST
