"""For whom blobs are fetched from superpeers: callers and their credentials, for as long as the work needs them.

    while his blob is read           kept
    afterwards                       `KEEP` seconds (twice that where others asked in between and nobody since): the
                                     token by which a crowd's nodes serve the blob to each other is renewed as for him,
                                     once; then the node leaves the blob's tree, if nobody asks anew
    refused by superpeer or registry dropped at once
    who shows no credentials         kept without end, since there is nothing to keep secret

In memory only. Where one caller is refused another's turn comes: of each blob the last few who asked are known.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import msgspec

from dadi.oci.reference import Reference
from dadi.originals.caller import Caller
from dadi.originals.remembered import Remembered

KEEP = 900.0
_MOST, _EACH = 10_000, 8


class AskedFor(msgspec.Struct, eq=False):
    """A caller, and the repository from which he wants the blob. `reading`: how many of his reads are under way."""

    ref: Reference
    caller: Caller
    until: float
    reading: int = 0


class Asked:
    """See the head of this file. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._blobs: Remembered[str, list[AskedFor]] = Remembered(KEEP, _MOST, clock, held=self._prune)

    def __repr__(self) -> str:
        return f"Asked({len(self._blobs)} blobs)"

    def add(self, digest: str, ref: Reference, caller: Caller) -> AskedFor:
        """Remember who has just been let have a blob."""
        askers = self.of(digest)
        asker = next((one for one in askers if one.ref.name == ref.name and one.caller == caller), None)
        if asker is None:
            asker = AskedFor(ref, caller, 0.0)
        asker.until = self._clock() + KEEP
        self._blobs.put(digest, [asker, *(one for one in askers if one is not asker)][:_EACH])
        return asker

    def of(self, digest: str) -> list[AskedFor]:
        """Return who asked for a blob, the last one first."""
        askers = self._blobs.peek(digest) or []
        self._prune(askers)
        return [*askers]

    def drop(self, digest: str, asker: AskedFor) -> None:
        """Forget one who was refused."""
        askers = self._blobs.peek(digest)
        if askers is not None:
            askers[:] = [one for one in askers if one is not asker]

    @contextlib.contextmanager
    def reading(self, asker: AskedFor) -> Iterator[None]:
        """Keep him for as long as he reads."""
        asker.reading += 1
        try:
            yield
        finally:
            asker.reading -= 1

    def _prune(self, askers: list[AskedFor]) -> bool:
        """Drop whose time is over; return whether somebody is left."""
        now = self._clock()
        askers[:] = [one for one in askers if one.reading or not one.caller.authorization or one.until > now]
        return bool(askers)

    def close(self) -> None:
        """Forget all."""
        self._blobs.close()
