"""Indexes under a tag that many write to: read, change, write, and look again whether it stayed.

    1. read the index (none is an empty one) and ask `change` what it should be
    2. nothing to change: done
    3. write it, with If-Match where the registry gave an ETag (few look at it); 412: somebody was faster, go to 1
    4. wait for longer than others may take between their 1 and 3, and go to 1: who lost the race sees it there

The distribution protocol has no compare-and-swap, so whoever writes last wins, and the others must notice. That is
certain as long as nobody takes longer for a read and a write than the wait in 4, which grows with how long ours took;
a write that fails is never sent again without reading first. In this process no two writes overlap at all. Hence
`change` is called several times, with different lists, and must leave a list alone that it has changed already.
(OCI distribution specification, "Pushing Manifests with Subject", on the referrers tag.)
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Callable

from dadi import digest as digests
from dadi.errors import Conflict, DadiError, DigestMismatch, TooLarge
from dadi.oci import index_document, media_types
from dadi.oci.auth import Authenticator
from dadi.oci.endpoints import Endpoint, Endpoints
from dadi.oci.index_document import IndexDocument
from dadi.oci.manifest import MAX_SIZE, Descriptor
from dadi.oci.push import Changed, Pushes
from dadi.oci.reference import Reference
from dadi.oci.retry import Clock

Change = Callable[[list[Descriptor]], list[Descriptor]]

_ATTEMPTS = 12
_SETTLE = 0.3
"""Seconds of the wait in step 4 at least; by chance up to twice that: those who lost must not come back together."""
_SETTLE_FACTOR = 4
"""How many times longer than our own read and write others are given."""
_HINT = "delete entries that nobody needs any more"


class TaggedIndexes:
    """Reads and changes indexes under tags, at the registry itself; `RegistryClient` says what the methods promise."""

    def __init__(self, pushes: Pushes, endpoints: Endpoints, auth: Authenticator, clock: Clock) -> None:
        self._pushes = pushes
        self._endpoints = endpoints
        self._auth = auth
        self._clock = clock
        self._locks: weakref.WeakValueDictionary[tuple[str, str, str], asyncio.Lock] = weakref.WeakValueDictionary()

    async def entries(self, ref: Reference, tag: str) -> list[Descriptor]:
        """See `RegistryClient.tagged_index`."""
        ref = Reference(ref.registry, ref.repository, tag)
        document, _ = await self._endpoints.ask(
            ref.registry, lambda endpoint: self._read(endpoint, ref, endpoint.scope(ref)), mirrors=False
        )
        return document.descriptors

    async def update(self, ref: Reference, tag: str, change: Change) -> None:
        """See `RegistryClient.update_index`."""
        ref = Reference(ref.registry, ref.repository, tag)
        key = (ref.registry, ref.repository, tag)
        for _ in range(_ATTEMPTS):
            # Held by its users only, so that a name that is used no more takes no memory.
            lock = self._locks.setdefault(key, asyncio.Lock())
            async with lock:
                began = self._clock.monotonic()
                if await self._pushes.ask(ref, lambda endpoint: self._change_at(endpoint, ref, change)):
                    return
                took = self._clock.monotonic() - began
            await self._clock.sleep(max(_SETTLE, _SETTLE_FACTOR * took) * (1 + self._clock.random()))
        raise Conflict(
            f"the index {ref} is changed by others as fast as we change it: gave up after {_ATTEMPTS} attempts",
            hint="try again when they are done",
        )

    async def _change_at(self, endpoint: Endpoint, ref: Reference, change: Change) -> bool:
        """Return True if there was nothing to change, False if it was written and might get lost again."""
        document, etag = await self._read(endpoint, ref, endpoint.push_scope(ref))
        wanted = change(document.descriptors)
        if wanted == document.descriptors:
            return True
        raw = await asyncio.to_thread(document.with_descriptors, wanted)
        digest = await asyncio.to_thread(digests.of, raw)
        try:
            conditions = {"If-Match": etag} if etag else None
            await self._pushes.put_manifest(endpoint, ref, digest, raw, document.media_type, conditions)
        except Changed:
            pass
        return False

    async def _read(self, endpoint: Endpoint, ref: Reference, scope: str) -> tuple[IndexDocument, str]:
        """Return the index under the tag, an empty one if there is none, and its strong ETag, or ""."""
        url, headers = endpoint.url(ref, f"manifests/{ref.identifier}"), {"Accept": media_types.ACCEPT}
        async with self._auth.open("GET", endpoint.host, url, headers, scope) as answer:
            if answer.status == 404:
                return index_document.EMPTY, ""
            if answer.status != 200:
                raise await answer.error(f"the index {ref}", endpoint.host)
            try:
                raw = await answer.body(MAX_SIZE, f"the index {ref}")
            except TooLarge as error:
                error.hint = _HINT
                raise
        digest = await asyncio.to_thread(digests.of, raw)
        if answer.digest not in (None, digest):
            raise DigestMismatch(f"{answer.host}: the index {ref} has digest {digest}", source=endpoint.host)
        try:
            document = await asyncio.to_thread(index_document.parse, raw, answer.headers.get("Content-Type", ""))
        except DadiError as error:
            error.message = f"{ref}: {error.message}"
            raise
        etag = answer.headers.get("ETag", "")
        return document, etag if etag.startswith('"') else ""
