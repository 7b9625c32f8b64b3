"""Blobs in original form that are here or on their way, and for whom: the part of `Originals` that begins fetches.

    here, or arriving from his own registry   given to whoever may read the repository (`proven.py` says what is proved)
    here, but from another registry           his registry has to send it all once, too
    else                                      it begins to arrive: from `elsewhere` if that has it, from the registry
    wanted for something else (an index)      it arrives for that; plain pulls that come meanwhile follow
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from functools import partial

from dadi.blobs.disk import DiskBlobs
from dadi.fallbacks import Fallbacks
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.originals.access import Access
from dadi.originals.arriving import Arriving, Unasked
from dadi.originals.caller import ANYBODY, Caller
from dadi.originals.fetching import Elsewhere, Fetch
from dadi.originals.intake import Intake
from dadi.originals.original import Original
from dadi.originals.proven import Proven, registry_of

_UNASKED = "for an index"
"""Who begins to fetch a blob that no caller has asked for; no `Caller.key`."""
AtPace = Callable[[AsyncGenerator[bytes, None]], AsyncGenerator[bytes, None]]


class Coming:
    """See the head of this file. `elsewhere`: who may have a blob nearer than the registry."""

    def __init__(self, store: DiskBlobs, access: Access, proven: Proven, fallbacks: Fallbacks,
                 clock: Callable[[], float], elsewhere: Elsewhere | None) -> None:  # fmt: skip
        self.intake = Intake(store, fallbacks, clock)
        self.proving: dict[str, Intake] = {}
        """By registry: blobs that are here and that it has to send all the same."""
        self._store = store
        self._access = access
        self._proven = proven
        self._fallbacks = fallbacks
        self._clock = clock
        self._elsewhere = elsewhere
        self._tasks: set[asyncio.Task[None]] = set()

    def __repr__(self) -> str:
        return f"Coming({self.intake!r})"

    def find(self, ref: Reference, digest: str) -> Original | None:
        """Return a blob that is here or arriving, if it may be given to who may read the repository of `ref`.

        Of what is arriving only what comes from his own registry: any other could stall it, or send what is wrong.
        """
        whole = self.intake.whole(digest) if self._proven.to(ref.registry, digest) else None
        arriving = self.intake.arriving(digest)
        if whole is not None or arriving is None:
            return whole
        coming = arriving.origin.name if isinstance(arriving.origin, Fetch) else ""
        own = registry_of(coming) == ref.registry or (arriving.verified and self._proven.shares(ref.registry, coming))
        return arriving if own else None

    def find_for(self, ref: Reference, digest: str, caller: Caller) -> Original | None:
        """Return the same for a caller, who counts as asking: what arrives may be gone on with for him."""
        here = self.find(ref, digest)
        return here if here is None else self._joined(here, ref, caller)

    def _joined(self, original: Original, ref: Reference, caller: Caller) -> Original:
        """Let a fetch that is under way be gone on with for this caller, where it fails for another's credentials."""
        if isinstance(original, Arriving):
            original.want()
            if isinstance(original.origin, Fetch) and registry_of(original.origin.name) == ref.registry:
                original.origin.add(ref, caller.key, self._access.client(ref.registry, caller))
        return original

    def begin(self, ref: Reference, descriptor: Descriptor, caller: Caller) -> Original:
        """Return a blob that is here by now, is arriving, or begins to. Awaits nothing: what it finds stays so."""
        digest = descriptor.digest
        if (here := self.find_for(ref, digest, caller)) is not None:
            return here
        intake = self.intake
        if intake.find(digest) is not None:
            # Here, but from elsewhere: this registry has to send it all once, and then has proved that it has it.
            self.proving = {registry: proving for registry, proving in self.proving.items() if proving.busy}
            intake = self.proving.setdefault(ref.registry, Intake(self._store, self._fallbacks, self._clock))
        fetch = self._fetch(ref, descriptor)
        fetch.add(ref, caller.key, self._access.client(ref.registry, caller))
        if self._access.is_public(ref.name):
            fetch.add(ref, ANYBODY.key, self._access.client(ref.registry, ANYBODY))
        verified = partial(self._verified, fetch, descriptor)
        return self._joined(intake.begin(digest, descriptor.size, fetch.stream, verified, fetch), ref, caller)

    def begin_unasked(self, ref: Reference, descriptor: Descriptor, client: RegistryClient, at_pace: AtPace,
                      unasked: Unasked) -> tuple[Fetch, Arriving] | None:  # fmt: skip
        """Have a layer arrive, by a client of one's own, that is wanted for something else than a plain pull.

        `at_pace` goes around the stream. None if it is here or arriving already, or there is no room for it.
        """
        digest, size = descriptor.digest, descriptor.size
        if self.intake.find(digest) is not None or not self.intake.has_room(digest, size):
            return None
        fetch = self.fetch(ref, descriptor, client)

        def verified() -> None:  # not written down: who wants the index remembers where its layers came from
            self._proven.came(digest, fetch.proved)

        arriving = self.intake.begin(digest, size, lambda distrust: at_pace(fetch.stream(distrust)), verified, fetch,
                                     unasked)  # fmt: skip
        return (fetch, arriving) if isinstance(arriving, Arriving) else None

    def fetch(self, ref: Reference, descriptor: Descriptor, client: RegistryClient) -> Fetch:
        """Return a fetch by a client of one's own, of which nobody else has anything."""
        fetch = self._fetch(ref, descriptor)
        fetch.add(ref, _UNASKED, client)
        return fetch

    def _fetch(self, ref: Reference, descriptor: Descriptor) -> Fetch:
        return Fetch(ref, descriptor, self._elsewhere, partial(self._proven.shares, ref.registry), self._fallbacks)

    def _verified(self, fetch: Fetch, descriptor: Descriptor) -> None:
        self.came(descriptor.digest, descriptor.size, fetch.proved)

    def came(self, digest: str, size: int, name: str) -> None:
        """Remember, and write down, that all of a blob has come from a repository, and was what its digest says."""
        self._proven.came(digest, name)
        task = asyncio.create_task(self._proven.record(digest, name, size))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def sources(self, digest: str) -> list[str]:
        """Return repositories, with their registries, from which what is here of a blob came, or is coming."""
        arriving = self.intake.arriving(digest)
        coming = [arriving.origin.proved] if arriving is not None and isinstance(arriving.origin, Fetch) else []
        return [*coming, *self._proven.names(digest)]

    async def close(self) -> None:
        """Break off what is under way."""
        for intake in (self.intake, *self.proving.values()):
            await intake.close()
        await asyncio.gather(*self._tasks, return_exceptions=True)
