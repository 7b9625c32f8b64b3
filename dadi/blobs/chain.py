"""The chain of a node's block reads, put together here and nowhere else; `repr()` of the result prints it.

    SingleFlight( Kept( store, Patient( upstream ) ) )              an upstream that takes chunks one by one: peers
    SingleFlight( Kept( store, Patient( Turns( upstream ) ) ) )     one that is asked for runs: superpeers alone

The order matters. `SingleFlight` is outermost: N readers of a chunk cause one fetch, and one write. `Kept` asks the
disk first, and keeps what comes. `Patient` waits while everybody is away; inside it each machine has its own `Verified`
(see `dadi/peers/superpeer.py`), so that a lying one fails alone and the next one answers. What is not demand is fetched
chunk by chunk, in turns: whoever comes to wait for it waits for one chunk, not for a run of many.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dadi.blobs.kept import Kept
from dadi.blobs.patient import Patient
from dadi.blobs.single_flight import SingleFlight
from dadi.blobs.source import Source, Urgency
from dadi.blobs.store import BlobStore
from dadi.blobs.turns import Turns
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob

Hurry = Callable[[Blob, range, Urgency], None]


class Chain(SingleFlight):
    """A node's source for everything it reads; its links are at hand for statistics."""

    def __init__(self, store: BlobStore, upstream: Source, *, patience: float, fallbacks: Fallbacks,
                 hurry: Hurry | None = None, in_turns: bool = False) -> None:  # fmt: skip
        """`patience`: seconds that a read waits for upstream before it fails.

        `hurry`: of an upstream that takes chunks one by one, and can be told of those that somebody waits for by now.
        `in_turns`: of one that cannot, and is to be asked for what is not demand chunk by chunk, a few at a time.
        """
        self._turns = Turns(upstream) if in_turns else None
        self.patient = Patient(self._turns or upstream, patience, fallbacks, wanted=self.wanted)
        self.kept = Kept(store, self.patient, fallbacks)
        self._hurry = hurry
        super().__init__(self.kept, by_chunk=hurry is not None or in_turns, demand_joined=in_turns)

    def begin(self, blob: Blob, chunks: range, urgency: Urgency) -> list[asyncio.Future[bytes]]:
        """See `SingleFlight.begin`; what is in flight for somebody less urgent is hurried."""
        self.hurry(blob, chunks, urgency)
        return super().begin(blob, chunks, urgency)

    def hurry(self, blob: Blob, chunks: range, urgency: Urgency) -> None:
        """Say that chunks are wanted which may be in flight already."""
        if urgency != Urgency.DEMAND:
            return
        if self._turns is not None:
            self._turns.hurry(blob, chunks)
        if self._hurry is not None:
            self._hurry(blob, chunks, urgency)
