"""The chain of a node's block reads, put together here and nowhere else; `repr()` of the result prints it.

    SingleFlight( Kept( store, Patient( upstream ) ) )

The order matters. `SingleFlight` is outermost: N readers of a chunk cause one fetch, and one write. `Kept` asks the
disk first, and keeps what comes. `Patient` waits while everybody is away; inside it each machine has its own `Verified`
(see `dadi/peers/superpeer.py`), so that a lying one fails alone and the next one answers.
"""

from __future__ import annotations

from dadi.blobs.kept import Kept
from dadi.blobs.patient import Patient
from dadi.blobs.single_flight import SingleFlight
from dadi.blobs.source import Source
from dadi.blobs.store import BlobStore
from dadi.fallbacks import Fallbacks


class Chain(SingleFlight):
    """A node's source for everything it reads; its links are at hand for statistics."""

    def __init__(self, store: BlobStore, upstream: Source, *, patience: float, fallbacks: Fallbacks) -> None:
        """`patience`: seconds that a read waits for upstream before it fails."""
        self.patient = Patient(upstream, patience, fallbacks)
        self.kept = Kept(store, self.patient, fallbacks)
        super().__init__(self.kept)
