"""One fetch of a blob from a registry, with the credentials of whoever waits for it, one caller's after another's.

It begins with those of who asked first. Where they are refused (a token that has run out before a download was taken up
again) it goes on at the same byte with the next caller's; it fails when nobody's are good enough.

Where somebody nearer has the blob it comes from there (`Elsewhere`), and what is left when that breaks off from the
registry: who asks has verified it only when he has all of it.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable
from typing import Protocol

import structlog

from dadi.errors import AccessDenied, DadiError
from dadi.fallbacks import Fallbacks
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient

log = structlog.get_logger()
_MOST = 64


Shares = Callable[[str], bool]
"""Whether what came from a repository (REGISTRY/REPOSITORY) may be given to who is asking."""


class Elsewhere(Protocol):
    """Who may have blobs nearer than their registry (a superpeer's siblings)."""

    async def find(self, digest: str, size: int, shares: Shares) -> tuple[str, AsyncGenerator[bytes, None]] | None:
        """Return a repository that has proved to have a blob, and the blob, unverified; None if nobody has it."""
        ...


class Fetch:
    """See the head of this file. All callers are of one registry, which has told each that he may have the blob."""

    def __init__(self, ref: Reference, descriptor: Descriptor, elsewhere: Elsewhere | None, shares: Shares,
                 fallbacks: Fallbacks) -> None:  # fmt: skip
        """`shares`: from which repositories `elsewhere` may have it."""
        self.name = ref.name
        """The repository, with its registry, that sends; as which it is asked for."""
        self.came_from = ""
        """The repository that had sent what somebody else has; empty where nobody has it."""
        self.at_registry = False
        """Whether it is clear that the registry is asked."""
        self.nearer_bytes = 0
        """That came from there."""
        self._elsewhere = elsewhere
        self._shares = shares
        self._fallbacks = fallbacks
        self._descriptor = descriptor
        self._callers: OrderedDict[str, tuple[Reference, RegistryClient]] = OrderedDict()

    @property
    def proved(self) -> str:
        """The repository that has the blob, when all of it has come and is right."""
        return self.came_from if self.nearer_bytes else self.name

    def __repr__(self) -> str:
        return f"Fetch({self._descriptor.digest} from {self.name}, {len(self._callers)} callers)"

    def add(self, ref: Reference, key: str, client: RegistryClient) -> None:
        """Let somebody join; `key` names him (`Caller.key`)."""
        if len(self._callers) < _MOST:
            self._callers.setdefault(key, (ref, client))

    async def stream(self, distrust: bool) -> AsyncGenerator[bytes, None]:
        """Yield the blob from its start; `distrust`: not from mirrors, nor from `elsewhere`.

        Raises what `RegistryClient.blob` raises.
        """
        at, tried = 0, set[str]()
        found, self.came_from, self.nearer_bytes, self.at_registry = None, "", 0, False
        if self._elsewhere is not None and not distrust:
            found = await self._elsewhere.find(self._descriptor.digest, self._descriptor.size, self._shares)
        if found is not None:
            self.came_from, nearer = found
            try:
                async with contextlib.aclosing(nearer):
                    async for piece in nearer:
                        at += len(piece)
                        self.nearer_bytes = at
                        yield piece
            except DadiError as error:
                why = f"{self._descriptor.digest}: {error}"
                self._fallbacks.note("blob broken off by a sibling, registry asked", why)
            if at >= self._descriptor.size:
                return
        self.at_registry = True
        while True:
            key = next(key for key in self._callers if key not in tried)
            tried.add(key)
            ref, client = self._callers[key]
            self.name = ref.name
            try:
                pieces = client.blob(ref, self._descriptor, offset=at, mirrors=not distrust)
                async with contextlib.aclosing(pieces):
                    async for piece in pieces:
                        at += len(piece)
                        yield piece
                return
            except AccessDenied as error:
                if tried >= self._callers.keys():
                    raise
                log.warning("a blob is fetched on for another caller", blob=self._descriptor.digest, why=error.message)
