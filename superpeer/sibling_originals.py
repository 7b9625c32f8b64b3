"""Compressed layers from siblings: a layer is owned by one superpeer as a tar, by another as its registry has it.

Without this each of the two forms would leave the registry once. So before a superpeer asks the registry for bytes of a
compressed blob it asks its siblings, all at once, what they have of it (`OriginalHere`):

    all of it; or it arrives there          `find`: a stream, for plain pulls and for indexes on first sight
    parts; or it is fetched there by ranges `read`: chunks, for lazy reads and for what is assembled from chunks

Two that want all of it at the same moment must not both go to the registry, nor wait for each other:

    it has begun to fetch, or has bytes       it is followed
    it is still asking, or follows somebody   it is followed if it is earlier in the order of the blob's owners
    it asks us while we are asking            we ask again before we go to the registry: it may have begun meanwhile

Of two that fetch by ranges the later has the earlier fetch for it. The question itself tells the asked one to ask anew
what it believed nobody to have. What is under way when the other one begins may come twice.

The asked one answers from what it has, or is fetching for itself; it begins nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, Awaitable, Callable

import aiohttp

from dadi import http
from dadi.blobs.source import Source, Urgency
from dadi.errors import DadiError, DigestMismatch, NotFound, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.originals.fetching import Shares
from dadi.peers.owners import owners
from superpeer.sibling_chunks import NOBODY_KNOWS, Answers
from superpeer.sibling_serving import OriginalHere, decode_here
from superpeer.siblings import Siblings

Has = Callable[[str], Awaitable[object]]
"""Raises DadiError unless the registry says that a repository has a blob."""
May = Callable[[str], Awaitable[bool]]
_MAX_TOLD = 128 << 10
_HAS_IT = 10.0
"""Seconds that it is believed that a sibling has something of a blob; one that has not all of it may soon have more."""
_ROUNDS = 3
"""Questions for one blob, where siblings ask for it meanwhile."""
_SILENT = 20.0
"""Seconds without a byte until a stream is given up; a sibling waits for its registry for almost as long."""


class SiblingOriginals:
    """See the head of this file. An `Elsewhere` for `Originals`, and a source of chunks. Others close `siblings`."""

    def __init__(self, siblings: Siblings, fallbacks: Fallbacks) -> None:
        self._siblings = siblings
        self._fallbacks = fallbacks
        self._holders = Answers()
        self._finding: dict[str, bool] = {}
        """Blobs that we are asking for as a whole, and whether somebody has asked us meanwhile."""
        self._slow = aiohttp.ClientTimeout(total=None, sock_connect=1.0, sock_read=_SILENT)
        self.bytes = 0
        """That came from siblings."""

    def __repr__(self) -> str:
        return f"SiblingOriginals({self._siblings!r}, {self.bytes} bytes)"

    # ---- as a stream

    async def find(self, digest: str, size: int, shares: Shares) -> tuple[str, AsyncGenerator[bytes, None]] | None:
        """See `Elsewhere`."""
        try:
            for _ in range(_ROUNDS):
                self._finding[digest] = False
                told = await self._ask_all(digest)
                if (found := self._best(digest, told, shares)) is not None:
                    return found[1], self._stream(found[0], digest, size)
                if not self._finding.get(digest):
                    break
            return None
        finally:
            self._finding.pop(digest, None)

    def _best(self, digest: str, told: list[tuple[str, OriginalHere]], shares: Shares) -> tuple[str, str] | None:
        """Return whom to follow, and from which repository it has the blob."""
        found: list[tuple[bool, int, str, str]] = []
        for url, each in told:
            source = next((name for name in each.sources if shares(name)), None)
            comes = each.arriving is not None and (each.arriving or each.fetching or self._precedes(url, digest))
            if source is not None and (each.whole or comes):
                found.append((each.whole, each.arriving or 0, url, source))
        return max(found)[2:] if found else None

    async def _stream(self, url: str, digest: str, size: int) -> AsyncGenerator[bytes, None]:
        where, siblings, came = f"{url}/sibling/v1/originals/{digest}/bytes", self._siblings, 0
        request = http.request(siblings.session, "GET", where, "reading a sibling's blob",
                               headers=siblings.list_headers(), timeout=self._slow)  # fmt: skip
        async with siblings.superpeers.asking(url), contextlib.AsyncExitStack() as held:
            async with siblings.watched(url):
                response = await held.enter_async_context(request)
            if response.content_length != size:
                raise DigestMismatch(f"{where} has {response.content_length} bytes, not {size}", source=url)
            while True:
                async with siblings.watched(url):  # piece by piece: who takes them has time
                    piece = await response.content.readany()
                if not piece:
                    break
                came += len(piece)
                self.bytes += len(piece)
                yield piece
        if came != size:
            raise Unavailable(f"{where} was cut off {size - came} bytes before its end")

    # ---- as chunks

    def chunks(self, shares: Shares, has: Has) -> Source:
        """Return a source of the chunks that siblings have, from repositories that may be shared.

        `has` asks the registry whether the repository that they are read for has the blob.
        """
        return _Chunks(self, shares, has)

    async def read(self, blob: Blob, chunks: range, urgency: Urgency, shares: Shares, may: May) -> list[bytes]:
        """Return the run, verified; raise NotFound if no sibling has it, or `may` says no."""
        digest = blob.digest
        for url, told in await self._who_has(digest):
            if not any(map(shares, told.sources)) or not await may(digest):
                continue
            try:
                packed = told.ranges and self._precedes(url, digest)
                parts = await self._siblings.read(url, blob, chunks, urgency, packed=packed)
                self.bytes += sum(map(len, parts))
                return parts
            except NotFound:
                continue
            except DadiError as error:
                self._fallbacks.note("sibling passed over", f"{url}: {error}")
                self._holders.drop(digest)
        raise NotFound(f"no sibling has that of {blob}")

    async def _who_has(self, digest: str) -> list[tuple[str, OriginalHere]]:
        """Return who has something of a blob, or is to fetch what we need of it."""
        holders: list[tuple[str, OriginalHere]] | None = self._holders.get(digest)
        if holders is None:
            told = await self._ask_all(digest)
            holders = [(url, each) for url, each in told
                       if each.whole or each.part or (each.ranges and self._precedes(url, digest))]  # fmt: skip
            self._holders.put(digest, holders, _HAS_IT if holders else NOBODY_KNOWS)
        return holders

    def forget(self, digest: str) -> None:
        """Ask anew about a blob: a sibling has just asked for it, and may have it soon."""
        self._holders.drop(digest)
        if digest in self._finding:
            self._finding[digest] = True

    # ---- asking

    def _precedes(self, url: str, digest: str) -> bool:
        """Whether a sibling comes before us where both want the same: one of two, whoever reckons."""
        own = self._siblings.own
        order = owners(digest, sorted({*self._siblings.superpeers.names, own, url}))
        return order.index(url) < order.index(own)

    async def _ask_all(self, digest: str) -> list[tuple[str, OriginalHere]]:
        superpeers = self._siblings.superpeers
        try:
            await superpeers.ready()
        except Unavailable:
            return []  # noted where the names are asked for
        others = [url for url in self._siblings.others() if superpeers.health.may_ask(url, superpeers.clock())]
        answers = await asyncio.gather(*(self._ask(url, digest) for url in others))
        return [(url, told) for url, told in zip(others, answers, strict=True) if told is not None]

    async def _ask(self, url: str, digest: str) -> OriginalHere | None:
        where, headers = f"{url}/sibling/v1/originals/{digest}", self._siblings.list_headers()
        try:
            return decode_here(await self._siblings.answer(url, where, headers, _MAX_TOLD))
        except NotFound:
            return None  # an older version
        except DadiError as error:
            self._fallbacks.note("sibling passed over", f"{url}: {error}")
            return None


class _Chunks:
    """See `SiblingOriginals.chunks`."""

    name = "siblings"

    def __init__(self, originals: SiblingOriginals, shares: Shares, has: Has) -> None:
        self._originals = originals
        self._shares = shares
        self._has = has
        self._answers = Answers()

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run."""
        return await self._originals.read(blob, chunks, urgency, self._shares, self._may)

    async def _may(self, digest: str) -> bool:
        """Whether the registry says that the repository has the blob: that an image names it is no proof."""
        found: bool | None = self._answers.get(digest)
        if found is None:
            try:
                await self._has(digest)
                found = True
            except DadiError:
                found = False  # who asks the registry for the bytes hears why
            self._answers.put(digest, found, math.inf if found else NOBODY_KNOWS)
        return found
