"""One fetch of a blob from a registry, with the credentials of whoever waits for it, one caller's after another's.

It begins with those of who asked first. Where they are refused (a token that has run out before a download was taken up
again) it goes on at the same byte with the next caller's; it fails when nobody's are good enough.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator

import structlog

from dadi.errors import AccessDenied
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient

log = structlog.get_logger()
_MOST = 64


class Fetch:
    """See the head of this file. All callers are of one registry, which has told each that he may have the blob."""

    def __init__(self, ref: Reference, descriptor: Descriptor) -> None:
        self.name = ref.name
        """The repository, with its registry, that sends."""
        self._descriptor = descriptor
        self._callers: OrderedDict[str, tuple[Reference, RegistryClient]] = OrderedDict()

    def __repr__(self) -> str:
        return f"Fetch({self._descriptor.digest} from {self.name}, {len(self._callers)} callers)"

    def add(self, ref: Reference, key: str, client: RegistryClient) -> None:
        """Let somebody join; `key` names him (`Caller.key`)."""
        if len(self._callers) < _MOST:
            self._callers.setdefault(key, (ref, client))

    async def stream(self, distrust: bool) -> AsyncGenerator[bytes, None]:
        """Yield the blob from its start; `distrust`: not from mirrors. Raises what `RegistryClient.blob` raises."""
        at, tried = 0, set[str]()
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
