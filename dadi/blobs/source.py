"""The one contract of every hop: something that verified chunks can be asked from.

Peers, superpeers and the disk are sources; so is each wrapper (verified, single flight, first of, kept, patient), which
takes a source and is one. `dadi/blobs/chain.py` puts them together, once.
"""

from __future__ import annotations

import enum
from typing import Protocol

from dadi.index.chunks import Blob


class Urgency(enum.IntEnum):
    """Who is waiting for the bytes; lower goes first."""

    DEMAND = 0
    """The kernel, and behind it a program."""
    STARTUP = 1
    """Nobody yet; a program that is starting now will, by what its image's trace says."""
    PREFETCH = 2
    """An operator, who wants it here before programs do."""
    BACKFILL = 3
    """Nobody."""

    @property
    def word(self) -> str:
        """What stands for it in messages and settings: "demand", "startup", "prefetch", "backfill"."""
        return self.name.lower()


def urgency_of_word(word: str | None) -> Urgency:
    """Return what a message says; DEMAND for nothing, and for a word that this version does not know."""
    return _BY_WORD.get(word or "", Urgency.DEMAND)


_BY_WORD = {urgency.word: urgency for urgency in Urgency}


class Source(Protocol):
    """Chunks of blobs.

    `read` returns one bytes object per chunk of the run, in order, each of exactly its chunk's length: there is no
    short read and never a zero in the place of a byte that is missing. `chunks` is a run of neighbouring chunks with
    step 1 (an empty one gives an empty list). Reading is idempotent and has no effect that a caller can see, apart
    from being faster the next time. A reader may be cancelled at any time.

    It raises an error of the tree in `dadi/errors.py` and then returns nothing at all of the run: NotFound if the
    source will never have the blob, Unavailable (retryable) if it cannot answer now, DigestMismatch if what it got is
    wrong. Only sources inside a `Verified` may return unverified bytes, and only to it.

    `repr()` shows the chain from here on.
    """

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run's chunks; see the class."""
        ...
