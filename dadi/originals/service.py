"""Images as the registry has them, for callers whom the registry accepts: each byte once, whoever asks.

    manifest, tags, referrers   `documents.py`
    blob                        in the store; arriving already; assembled from chunks, where `packed` knows their table;
                                else it begins to arrive (`coming.py`); or passes by, where the store has no room for it
    who may                     `access.py`; and the repository must have the blob: `records.py`

`packed` is the superpeer's hook: the layers whose compressed bytes it fetches by ranges for others at the same time.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlencode

import msgspec

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.errors import AccessDenied, NotFound, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.oci import index_document, media_types
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.originals import lists
from dadi.originals.access import Access
from dadi.originals.arriving import Arriving
from dadi.originals.away import Away, CallerFlights, slow
from dadi.originals.caller import ANYBODY, Caller
from dadi.originals.coming import Coming
from dadi.originals.config import OriginalsConfig
from dadi.originals.documents import Document, Documents, Fetched
from dadi.originals.fetching import Elsewhere, Shares
from dadi.originals.original import Awaited, Chunked, EitherOr, Original, check_size, whole_of
from dadi.originals.proven import Known, Proven
from dadi.originals.records import Records, steady

T = TypeVar("T")

_DOUBTED_FOR = 1.0
"""Seconds between two questions for the size of a blob of which wrong bytes came."""
Packed = Callable[[str, Shares], Awaitable[Chunked | None]]
"""Returns how a blob is assembled from chunks of a repository that may be shared; None if that is not known."""


class Originals:
    """See the head of this file. `store` is closed by who opened it; so is `registry`."""

    def __init__(self, config: OriginalsConfig, state: Path, store: DiskBlobs, registry: RegistryClient,
                 fallbacks: Fallbacks, *, packed: Packed | None = None, known: Known = lambda digest: (),
                 lend: bool | None = None, elsewhere: Elsewhere | None = None,
                 clock: Callable[[], float] = steady) -> None:  # fmt: skip
        """`lend`: as `config.lend_credentials`, which it overrides."""
        if lend is not None:
            config = msgspec.structs.replace(config, lend_credentials=lend)
        self.store = store
        self._fallbacks = fallbacks
        self._packed = packed
        self._clock = clock
        self._away = Away(patience=config.patience, clock=clock)
        self.records = Records(state / "originals", most=config.most_records, clock=clock)
        self.access = Access(registry, config, self.records, self._away, fallbacks, clock)
        self.proven = Proven(self.records, self.access, known, config.most_records)
        self.documents = Documents(store, self.records, config, self._away, fallbacks)
        self._flights = CallerFlights()
        self.coming = Coming(store, self.access, self.proven, fallbacks, clock, elsewhere)
        self.intake = self.coming.intake

    def __repr__(self) -> str:
        return f"Originals({self.records!r}, {self.intake!r})"

    async def start(self) -> None:
        """Read what earlier runs left."""
        await self.records.load()
        self.access.start()
        self.proven.start()

    # ---- documents

    async def manifest(self, ref: Reference, caller: Caller) -> Document:
        """Return the manifest or index that a reference leads to, verified.

        Raises what `RegistryClient` raises, LoginRequired.
        """
        return await self._let_in(ref, caller, partial(self._manifest, ref))

    async def _manifest(self, ref: Reference, caller: Caller) -> Document:
        key = f"manifest {ref.name}{'@' if ref.digest else ':'}{ref.identifier}"
        client = self.access.client(ref.registry, caller)

        async def probe(asker: RegistryClient) -> None:
            if not self.documents.has(key):
                fetched = await _manifest(asker, ref)
                await self.documents.learn(key, fetched)
                await self._learn_by_digest(ref, fetched)
            else:
                await self.documents.confirm(key, (await asker.resolve(ref)).digest)

        async def revalidate() -> str:
            found = await client.resolve(ref)
            self.access.admit(ref, caller)
            return found.digest

        async def fetch() -> Fetched:
            fetched = await _manifest(client, ref)
            await self._learn_by_digest(ref, fetched)
            return fetched

        await self.access.check(ref, caller, probe)
        async with self._asking(ref, caller):
            return await self.documents.get(ref.registry, key, fetch, revalidate, immutable=ref.digest is not None,
                                            who=caller.key, of=f"{ref.name}@{ref.digest}" if ref.digest else ref.name
                                            )  # fmt: skip

    async def _let_in(self, ref: Reference, caller: Caller, work: Callable[[Caller], Awaitable[T]]) -> T:
        """Do work for a caller; as anybody's where his credentials are refused for what everybody may read.

        (Tokens for REGISTRY/NAME, as a repository is called at a proxy, open nothing at the registry.)
        """
        try:
            return await work(caller)
        except AccessDenied:
            if not (caller.authorization and self.access.is_public(ref.name)):
                raise
        return await work(ANYBODY)

    @contextlib.asynccontextmanager
    async def _asking(self, ref: Reference, caller: Caller) -> AsyncIterator[None]:
        """Tell who was let in before and is refused now what the registry wants to see."""
        try:
            yield
        except AccessDenied as error:
            raise await self.access.refused(ref, caller, error) from None

    async def _learn_by_digest(self, ref: Reference, fetched: Fetched) -> None:
        if ref.digest is None:  # it is asked for by its digest next
            await self.documents.learn(f"manifest {ref.name}@{fetched.digest}", fetched)

    async def tags(self, ref: Reference, parameters: dict[str, str], caller: Caller) -> Document:
        """Return a page of the repository's tags, as JSON; `parameters` are n and last."""
        return await self._let_in(ref, caller, partial(self._tags, ref, parameters))

    async def _tags(self, ref: Reference, parameters: dict[str, str], caller: Caller) -> Document:
        key = f"tags {ref.name} {urlencode(sorted(parameters.items()))}"

        async def fetch(asker: RegistryClient) -> Fetched:
            found = lists.page(await asker.tags(ref, parameters), parameters)
            raw = msgspec.json.encode({"name": ref.repository, "tags": found.tags})
            return Fetched(raw, digests.of(raw), "application/json", found.following)

        async def probe(asker: RegistryClient) -> None:
            await self.documents.learn(key, await fetch(asker))

        await self.access.check(ref, caller, probe)
        client = self.access.client(ref.registry, caller)
        async with self._asking(ref, caller):
            return await self.documents.get(ref.registry, key, lambda: fetch(client), who=caller.key, of=ref.name)

    async def referrers(self, ref: Reference, artifact_type: str, caller: Caller) -> Document:
        """Return the index of what has the reference's digest as its subject, of one artifact type if that is given."""
        return await self._let_in(ref, caller, partial(self._referrers, ref, artifact_type))

    async def _referrers(self, ref: Reference, artifact_type: str, caller: Caller) -> Document:
        assert ref.digest is not None
        digest = ref.digest
        client = self.access.client(ref.registry, caller)

        async def fetch() -> Fetched:
            raw = lists.index(await client.referrers(ref, digest))
            return Fetched(raw, digests.of(raw), media_types.OCI_INDEX)

        async def probe(asker: RegistryClient) -> None:
            # Not by the referrers: that there are none is also what somebody is told who may not see them.
            try:
                await asker.resolve(ref)
            except NotFound:
                await asker.tags(ref, {"n": "1"})

        await self.access.check(ref, caller, probe)
        async with self._asking(ref, caller):
            found = await self.documents.get(ref.registry, f"referrers {ref.name} {digest}", fetch, who=caller.key,
                                             of=ref.name)  # fmt: skip
        if not artifact_type:
            return found
        entries = index_document.parse(found.raw, media_types.OCI_INDEX).descriptors
        raw = lists.index([entry for entry in entries if entry.artifact_type == artifact_type])
        return msgspec.structs.replace(found, raw=raw, digest=digests.of(raw))

    def changed(self, ref: Reference) -> None:
        """Have the registry asked anew about a repository's tags and lists, and this digest: something was pushed."""
        self.documents.changed(ref.name)
        self.documents.changed(f"{ref.name}@{ref.digest}")

    async def challenge(self, registry: str) -> str | None:
        """Return how a registry meets whom it does not know (WWW-Authenticate); None: it lets him in.

        None, too, while it is away, if nobody can bring a token then: what everybody may read is given without.
        """
        try:
            found = await self.access.challenge(registry)
            if not (found and found[:7].lower() == "bearer " and self._away.is_away(registry)):
                return found
            why = "it would send for tokens"
        except Unavailable as error:
            why = error.message
        self._fallbacks.note("registry away, nobody is asked to log in", f"{registry}: {why}")
        return None

    # ---- blobs

    async def blob(self, ref: Reference, digest: str, caller: Caller) -> Original:
        """Return a blob of the repository of `ref`; nothing of it is fetched before somebody reads it.

        Raises LoginRequired, NotFound, what `RegistryClient` raises.
        """
        size = await self.size(ref, digest, caller)
        return Awaited(size, lambda: self._open(ref, Descriptor("", digest, size), caller))

    async def size(self, ref: Reference, digest: str, caller: Caller) -> int:
        """Return how many bytes a blob of the repository has, if the caller may have it. Raises as `blob` does."""
        ref = Reference(ref.registry, ref.repository).at(digest)
        return await self._let_in(ref, caller, partial(self._size, ref, digest))

    async def _size(self, ref: Reference, digest: str, caller: Caller) -> int:
        key = f"blob {ref.name}@{digest}"

        async def ask(asker: RegistryClient) -> None:
            size = await asker.blob_size(ref, digest)
            await self.records.learn(key, digest, check_size(digest, size, ref.registry))

        await self.access.check(ref, caller, ask)
        record = self.records.find(key)
        # A size that was wrong once would make the blob wrong for ever: it is asked for anew.
        doubtful = record is not None and self.intake.distrusts(digest) and not self.store.has(digest)
        if record is None or (doubtful and self.records.age(record) >= _DOUBTED_FOR):
            client, limit = self.access.client(ref.registry, caller), self._away.limit(ref.registry, old=False)
            async with self._asking(ref, caller):
                try:
                    await self._flights.join(key, lambda: ask(client), limit, who=caller.key)
                except TimeoutError:
                    self._away.failed(ref.registry)
                    raise slow(ref.registry, limit) from None
        record = self.records.find(key)
        if record is None:
            raise NotFound(f"{ref.name} has no blob {digest}")
        return check_size(digest, record.size, ref.registry)

    def is_proven(self, ref: Reference, digest: str) -> bool:
        """Whether what is here of a blob may be given to who may read the repository of `ref`, which has it."""
        return self.proven.to(ref.registry, digest)

    async def _open(self, ref: Reference, descriptor: Descriptor, caller: Caller) -> Original:
        if (here := self.coming.find_for(ref, descriptor.digest, caller)) is not None:
            return here
        begin = partial(self.coming.begin, ref, descriptor, caller)
        # Not of what is here as a whole, or arrives: that is another registry's, and this one has to send it, too.
        if self._packed is not None and self.intake.find(descriptor.digest) is None:
            chunked = await self._packed(descriptor.digest, partial(self.proven.shares, ref.registry))
            if chunked is not None:
                return EitherOr(chunked, begin, self._fallbacks)
        return begin()

    async def make_whole(self, ref: Reference, digest: str, caller: Caller, seconds: float) -> bool:
        """Have all of a blob brought here, once for all who want that; False if it is not done after `seconds`.

        True says that nothing is under way any more, not that there was room to keep it. Raises as `blob` does.
        """
        try:
            work = partial(self._make_whole, ref, digest, caller)
            await self._flights.join(f"whole {ref.name}@{digest}", work, seconds, who=caller.key)
        except TimeoutError:
            return False
        return True

    async def _make_whole(self, ref: Reference, digest: str, caller: Caller) -> None:
        size = await self.size(ref, digest, caller)
        original: Original | None = await self._open(ref, Descriptor("", digest, size), caller)
        if isinstance(original, EitherOr):
            async with contextlib.aclosing(original.parts(0, original.size)) as parts:
                async for _ in parts:
                    pass
            original = self.intake.arriving(digest)
        if isinstance(original, Arriving):
            with contextlib.suppress(StoreFull):  # it passes by, to each who asks for it
                await original.settled()

    async def head(self, ref: Reference, digest: str, offset: int, most: int) -> bytes:
        """Return at most `most` bytes at `offset` of a blob that is arriving; they are not verified yet."""
        here = self.coming.find(ref, digest)
        return await here.head(offset, most) if isinstance(here, Arriving) else b""

    def local(self, ref: Reference, digest: str) -> AsyncGenerator[bytes, None] | None:
        """Return the bytes of a layer of an image that is here or arriving; None if it is not, or is not proven.

        For who needs all of it in this process.
        """
        here = self.coming.find(ref, digest)
        if isinstance(here, Arriving):
            here.want()  # who began it may not need it any more before this one does
        return None if here is None else whole_of(here)

    def table(self, ref: Reference, digest: str) -> Blob | None:
        """Return a whole, verified blob with its chunk table, by which others may fetch it piece by piece."""
        return self.store.find(digest) if self.store.has(digest) and self.is_proven(ref, digest) else None

    # ---- state

    def statistics(self) -> dict[str, Any]:
        """Return counts for `dadi status` and the metrics."""
        return {
            "records": len(self.records),
            "documents_fetched": self.documents.fetched,
            "documents_revalidated": self.documents.revalidated,
            "documents_stale": self.documents.stale,
            "access_asked": self.access.asked,
            "access_refused": self.access.refusals,
            **self.intake.statistics(),
        }

    async def close(self) -> None:
        """Break off what is under way."""
        await self.coming.close()
        await self._flights.close()
        await self.documents.close()
        await self.access.close()


async def _manifest(client: RegistryClient, ref: Reference) -> Fetched:
    descriptor, raw = await client.manifest(ref)
    return Fetched(raw, descriptor.digest, descriptor.media_type)
