"""Manifests and lists, kept: what is named by a digest for good, what is named by a tag for `tag_ttl`.

    here, by digest, or young enough   given
    here, older, or from before a      a HEAD says whether it is still the same (manifests; lists are read again)
        push that we know of
    registry away, or slow             given as it is, marked as stale, if it is not older than `stale`; said aloud
    not here                           fetched; once, however many ask

The bytes lie in the store, verified by their digests, and may be evicted like any blob; what leads to them is in
`records.py`.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Awaitable, Callable

import msgspec

from dadi import digest as digests
from dadi.blobs.store import BlobStore
from dadi.errors import DadiError, NotFound, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.originals.away import Away, CallerFlights
from dadi.originals.config import OriginalsConfig
from dadi.originals.records import Record, Records


class Fetched(msgspec.Struct, frozen=True):
    """What a registry has answered, verified. `following`: parameters of a list's next page."""

    raw: bytes
    digest: str
    media_type: str
    following: dict[str, str] = {}


class Document(msgspec.Struct, frozen=True):
    """What is given. `stale`: seconds since the registry was asked, where it should have been again; else None."""

    raw: bytes
    digest: str
    media_type: str
    following: dict[str, str] = {}
    stale: float | None = None


_MOST_CHANGED = 10_000
"""Repositories whose last push is remembered."""
_RECENT = 8 << 20
"""Bytes of documents that are kept in memory."""
Fetch = Callable[[], Awaitable[Fetched]]
Revalidate = Callable[[], Awaitable[str]]
"""Returns the digest that a name leads to now."""


class Documents:
    """See the head of this file."""

    def __init__(self, store: BlobStore, records: Records, config: OriginalsConfig, away: Away,
                 fallbacks: Fallbacks) -> None:  # fmt: skip
        self._store = store
        self._records = records
        self._config = config
        self._away = away
        self._fallbacks = fallbacks
        self._flights = CallerFlights()
        self._recent: OrderedDict[str, bytes] = OrderedDict()
        """The bytes that were given last, by their digests: a tag's manifest is asked for by whole crowds."""
        self._recent_bytes = 0
        self._changed: OrderedDict[str, float] = OrderedDict()
        self.fetched = 0
        self.revalidated = 0
        self.stale = 0

    def __repr__(self) -> str:
        return f"Documents({self._records!r}, {self.fetched} fetched)"

    def has(self, key: str) -> bool:
        """Whether there is something to give, however old."""
        record = self._records.find(key)
        return record is not None and self._store.has(record.digest)

    async def get(self, registry: str, key: str, fetch: Fetch, revalidate: Revalidate | None = None, *,
                  immutable: bool = False, who: str = "", of: str = "") -> Document:  # fmt: skip
        """Return what `key` names. Raises what `fetch` and `revalidate` raise, unless something stale may be given.

        `who`: whose credentials those two show, see `CallerFlights.join`. `of`: what `changed` is told where
        this may have.
        """
        record, changed = self._records.find(key), self._changed.get(of)
        if record is not None and self._store.has(record.digest):
            young = immutable or self._records.age(record) <= self._config.tag_ttl
            if young and (changed is None or record.checked_at > changed):
                found = await self._given(record)
                if found is not None:
                    return found
        else:
            record = None
        usable = record is not None and self._records.age(record) <= self._config.stale
        work = lambda: self._refresh(registry, key, record, fetch, revalidate)  # noqa: E731
        try:
            return await self._away.ask(self._flights, registry, (key, changed), work, old=usable, who=who)
        except Unavailable as error:
            found = await self._given(record, stale=True) if record is not None and usable else None
            if found is None:
                raise
            self.stale += 1
            self._fallbacks.note("registry away, answered from the cache", f"{key}: {error.message}")
            return found

    def changed(self, of: str) -> None:
        """Have the registry asked anew about what it has said before: it has another tag, or one less."""
        self._changed[of] = self._records.now()
        self._changed.move_to_end(of)
        if len(self._changed) > _MOST_CHANGED:
            self._changed.popitem(last=False)

    async def learn(self, key: str, fetched: Fetched, asked_at: float | None = None) -> Document:
        """Keep what was fetched just now. A store without room loses the keeping, not the answer."""
        self.fetched += 1
        try:
            await self._store.put(fetched.raw)
            await self._records.learn(key, fetched.digest, len(fetched.raw), fetched.media_type, fetched.following,
                                      asked_at=asked_at)  # fmt: skip
        except StoreFull as error:
            self._fallbacks.note("not kept: store full", str(error))
        except DadiError as error:
            self._fallbacks.note("not kept: disk failed", str(error))
        return Document(fetched.raw, fetched.digest, fetched.media_type, fetched.following)

    async def confirm(self, key: str, digest: str, asked_at: float | None = None) -> bool:
        """Remember that the registry has just said that `key` leads to `digest`; False if that is news."""
        self.revalidated += 1
        record = self._records.find(key)
        if record is None or record.digest != digest or not self._store.has(digest):
            return False
        await self._records.learn(key, digest, record.size, record.media_type, record.following, asked_at=asked_at)
        return True

    async def _refresh(self, registry: str, key: str, record: Record | None, fetch: Fetch,
                       revalidate: Revalidate | None) -> Document:  # fmt: skip
        asked_at = self._records.now()  # what is pushed while the registry answers may not be in its answer
        try:
            if record is not None and revalidate is not None and await self.confirm(key, await revalidate(), asked_at):
                found = await self._given(record)
                if found is not None:
                    return found
            fetched = await fetch()
        except Unavailable:
            self._away.failed(registry)
            raise
        except NotFound:
            await self._records.forget(key)  # deleted there: not to be given as stale when the registry is away
            raise
        self._away.answered(registry)
        return await self.learn(key, fetched, asked_at)

    async def _given(self, record: Record, *, stale: bool = False) -> Document | None:
        """Return a document from the store; None if it has just been evicted, or cannot be read."""
        raw = self._recent.get(record.digest)
        if raw is None:
            try:
                raw = await self._store.get(record.digest)
            except DadiError as error:
                self._fallbacks.note("local document not readable", str(error))
                return None
            if await asyncio.to_thread(digests.of, raw) != record.digest:
                self._fallbacks.note("local document spoilt by our disk", record.key)
                return None
            self._remember(record.digest, raw)
        age = self._records.age(record) if stale else None
        return Document(raw, record.digest, record.media_type, record.following, age)

    def _remember(self, digest: str, raw: bytes) -> None:
        if digest not in self._recent:
            self._recent[digest] = raw
            self._recent_bytes += len(raw)
        while self._recent_bytes > _RECENT:
            self._recent_bytes -= len(self._recent.popitem(last=False)[1])

    async def close(self) -> None:
        """Break off what is under way."""
        await self._flights.close()
