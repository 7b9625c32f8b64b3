"""Where blobs in original form come into a store: each fetched once, whoever asks, and how it went remembered."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable

import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.errors import DigestMismatch, StoreFull
from dadi.fallbacks import Fallbacks
from dadi.originals.arriving import Arriving, Unasked
from dadi.originals.original import Original, Passing, Whole

log = structlog.get_logger()
Streams = Callable[[bool], AsyncGenerator[bytes, None]]
"""Begins to read a blob from its start; True: not from who gave wrong bytes a while ago, where there is a choice."""
OnVerified = Callable[[], None]
_NO_ROOM_FOR = 10.0
"""Seconds that a store is believed to have no room for a blob."""
_DISTRUST = 600.0


class Intake:
    """The blobs that are on their way into `store`. `clock`: seconds."""

    def __init__(self, store: DiskBlobs, fallbacks: Fallbacks, clock: Callable[[], float]) -> None:
        self._store = store
        self._fallbacks = fallbacks
        self._clock = clock
        self._arriving: dict[str, Arriving] = {}
        self._cleaning: list[Arriving] = []
        """Those that have failed and still remove what they had written."""
        self._no_room: dict[str, float] = {}
        self._distrusted: dict[str, float] = {}
        """Blobs of which wrong bytes came, and until when that is remembered."""
        self.blobs = 0
        self.bytes = 0
        self.wrong = 0

    def __repr__(self) -> str:
        return f"Intake({len(self._arriving)} arriving)"

    @property
    def busy(self) -> bool:
        """Whether something is under way."""
        return bool(self._arriving) or not all(one.done for one in self._cleaning)

    def find(self, digest: str) -> Original | None:
        """Return a blob that is in the store as a whole, or arriving."""
        return self.whole(digest) or self._arriving.get(digest)

    def whole(self, digest: str) -> Original | None:
        """Return a blob that is in the store as a whole."""
        blob = self._store.find(digest) if self._store.has(digest) else None
        return Whole(self._store, blob) if blob is not None else None

    def distrusts(self, digest: str) -> bool:
        """Whether wrong bytes have come for a blob a while ago."""
        return self._clock() < self._distrusted.get(digest, 0.0)

    def arriving(self, digest: str) -> Arriving | None:
        """Return a blob that is arriving."""
        return self._arriving.get(digest)

    def has_room(self, digest: str, size: int) -> bool:
        """Whether a blob may fit, as far as is known."""
        limit = self._store.limit
        return not (limit and size > limit) and self._clock() >= self._no_room.get(digest, 0.0)

    def begin(self, digest: str, size: int, streams: Streams, on_verified: OnVerified = lambda: None,
              origin: object = None, unasked: Unasked | None = None) -> Original:  # fmt: skip
        """Return a blob that is arriving: from now on, if it was not; or it passes by, if there is no room for it.

        `on_verified` is called when all of it has come and is what its digest says. `origin`, `unasked`: see
        `Arriving`; what comes for somebody `unasked` is counted there.
        """
        if (under_way := self._arriving.get(digest)) is not None:
            return under_way
        distrust = self.distrusts(digest)

        def stream() -> AsyncGenerator[bytes, None]:
            return streams(distrust)

        if not self.has_room(digest, size):
            self._fallbacks.note("blob passes by, no room to keep it", f"{digest}, {size} bytes")
            return Passing(digest, size, stream, on_verified)

        def verified() -> None:
            if unasked is None:
                self.blobs += 1
                self.bytes += size
            on_verified()

        arriving = Arriving(self._store, digest, size, stream, self._fallbacks, self._arrived, origin, verified,
                            unasked)  # fmt: skip
        self._arriving[digest] = arriving
        return arriving

    def _arrived(self, arriving: Arriving) -> None:
        del self._arriving[arriving.digest]
        now = self._clock()
        self._cleaning = [one for one in self._cleaning if not one.done]
        if not arriving.done:
            self._cleaning.append(arriving)
        for remembered in (self._no_room, self._distrusted):
            for digest in [digest for digest, until in remembered.items() if until < now]:
                del remembered[digest]
        lost = arriving.verified and not arriving.dropped and not self._store.has(arriving.digest)
        if isinstance(arriving.error, StoreFull) or lost:
            self._no_room[arriving.digest] = now + _NO_ROOM_FOR
        elif isinstance(arriving.error, DigestMismatch):
            self.wrong += 1
            self._distrusted[arriving.digest] = now + _DISTRUST
            log.error("wrong blob, thrown away", blob=arriving.digest, why=str(arriving.error))

    def statistics(self) -> dict[str, int]:
        """Return what is arriving and for how many readers; blobs and bytes that have come; wrong ones."""
        return {
            "arriving": len(self._arriving),
            "readers": sum(arriving.readers for arriving in self._arriving.values()),
            "blobs": self.blobs,
            "bytes": self.bytes,
            "wrong": self.wrong,
        }

    async def close(self) -> None:
        """Break off what is under way."""
        for arriving in [*self._arriving.values(), *self._cleaning]:
            await arriving.close()
