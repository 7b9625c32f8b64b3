"""Originals from superpeers, over HTTP (`superpeer/original.py` is the other side), for a proxy on a node.

    manifest, tags, referrers   asked of the superpeer each time: it checks who may, and keeps
    blob, 1.                    the superpeer says how large it is, and its chunk table if it has one; it checks who may
    blob, 2. with a table       chunk by chunk, verified each, kept here: single flight( kept( store, first of( `source`
                                (a node's parents), superpeers ) ) ); whole at the end: verified by its digest
    blob, 2. without            as a stream, which is verified by its digest before its last byte is passed on

A superpeer has a table as soon as it has the whole, verified blob: it was made while the blob arrived. It is trusted as
the superpeer is, for a chunk at a time; what a table leads to is checked by the blob's digest in the end.

Where there is a `source`, N nodes that want a new blob do not take N streams: they wait until the superpeer has it
whole (`waiting.py`), and give each other its chunks then. What is `SMALL` is not worth that.
The caller's credentials go along in a header of our own, for the superpeer to show to the registry; `asked.py` says how
long they are kept. Where those of one are refused in the middle, another's who wants the same blob are shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from typing import Any
from urllib.parse import parse_qsl

import aiohttp
import msgspec

from dadi import digest as digests
from dadi import http
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.first_of import FirstOf
from dadi.blobs.kept import Kept
from dadi.blobs.single_flight import SingleFlight
from dadi.blobs.source import Source, Urgency
from dadi.blobs.verified import Verified
from dadi.errors import AccessDenied, DadiError, DigestMismatch, Malformed, NotFound, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.oci.reference import Reference
from dadi.originals.asked import Asked, AskedFor
from dadi.originals.caller import Caller
from dadi.originals.documents import Document
from dadi.originals.inquiry import Inquiry
from dadi.originals.intake import Intake
from dadi.originals.messages import MOST_WAIT, NEXT, SMALL, STALE, OriginalAnswer
from dadi.originals.original import Awaited, Chunked, Original, Passing, check_size
from dadi.originals.restart import GONE, Restart
from dadi.originals.waiting import Waiting
from dadi.peers.superpeers import Superpeers
from dadi.tls import Tls

_MAX_DOCUMENT = 8 << 20
_MAX_TABLE = 64 << 20
_TRIES = 3
_PROGRESS = 64 << 20
"""Bytes of a stream after which it may break off as often again."""
_TELL = 5.0
"""Seconds that a push waits for superpeers to hear of it."""

OnTable = Callable[[Reference, Blob, str], Awaitable[None]]
"""Told of a blob that is about to be read chunk by chunk, or is here as a whole: its reference, and its token."""


_answer = msgspec.msgpack.Decoder(OriginalAnswer)
_challenge = msgspec.json.Decoder(dict[str, str | None])


def decode_answer(data: bytes, digest: str) -> OriginalAnswer:
    """Return what a superpeer says of a blob; raise Malformed, or TooLarge."""
    try:
        said = _answer.decode(data)
        if said.blob is not None and (said.blob.table.check().size != said.size or said.blob.digest != digest):
            raise Malformed("another blob's chunk table")
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, DadiError) as error:
        raise Malformed(f"what a superpeer says of {digest} makes no sense: {error}") from None
    check_size(digest, said.size, "a superpeer")
    return said


class FromSuperpeers:
    """See the head of this file. `store` is closed by who opened it."""

    def __init__(self, urls: Sequence[str], store: DiskBlobs, fallbacks: Fallbacks, *, connect: float = 3.0,
                 read: float = 30.0, tls: Tls | None = None, source: Source | None = None,
                 on_table: OnTable | None = None, known: Superpeers | None = None) -> None:  # fmt: skip
        """`known`: whom to ask, in place of `urls`; closed by who made it. Raises ConfigError for what is no URL."""
        self._known = Superpeers(urls, fallbacks) if known is None else known
        self._owns_known = known is None
        self._on_table = on_table
        self._shared = source is not None
        self._wait = int(min(MOST_WAIT, read / 2))
        self._store = store
        self._fallbacks = fallbacks
        self._session = http.client(connect=connect, read=read, tls=tls)
        self._inquiry = Inquiry(self._known, self._session, fallbacks, tls)
        self._intake = Intake(store, fallbacks, time.time)
        self._asked = Asked()
        upstream: Source = Verified("superpeers", self)
        if source is not None:
            upstream = FirstOf([source, upstream], fallbacks)
        self._kept = Kept(store, upstream, fallbacks)
        self._chunks = SingleFlight(self._kept, by_chunk=self._shared)

    def __repr__(self) -> str:
        return f"FromSuperpeers({self._known!r})"

    # ---- documents

    async def manifest(self, ref: Reference, caller: Caller) -> Document:
        """See `Originals.manifest`."""
        found = await self._document("manifests", ref, {}, caller)
        if found.digest != digests.of(found.raw) or ref.digest not in (None, found.digest):
            raise DigestMismatch(f"the manifest of {ref} from a superpeer is not what its digest says")
        return found

    async def tags(self, ref: Reference, parameters: dict[str, str], caller: Caller) -> Document:
        """See `Originals.tags`."""
        return await self._document("tags", ref, parameters, caller)

    async def referrers(self, ref: Reference, artifact_type: str, caller: Caller) -> Document:
        """See `Originals.referrers`."""
        return await self._document("referrers", ref, {"artifact_type": artifact_type}, caller)

    async def _document(self, kind: str, ref: Reference, parameters: dict[str, str], caller: Caller) -> Document:
        """Ask the superpeer of the repository: what a tag leads to is asked for by its digest next."""
        parameters = {"reference": str(ref), **parameters}
        async with self._inquiry.ask(ref.name, f"/v1/{kind}", parameters, caller) as response:
            raw = await _body(response, _MAX_DOCUMENT)
            headers = response.headers
            stale = headers.get(STALE, "")
            stale_for = float(stale) if stale.isascii() and stale.isdigit() and len(stale) < 16 else None
            return Document(raw, headers.get("Docker-Content-Digest", ""), headers.get("Content-Type", ""),
                            dict(parse_qsl(headers.get(NEXT, ""))), stale_for)  # fmt: skip

    async def challenge(self, registry: str) -> str | None:
        """See `RegistryClient.challenge`."""
        async with self._inquiry.ask(registry, "/v1/challenge", {"registry": registry}, Caller()) as response:
            raw = await _body(response, _MAX_DOCUMENT)
        try:
            return _challenge.decode(raw).get("challenge")
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            hint = "are the versions alike?"
            raise Malformed(f"what a superpeer says of {registry} makes no sense: {error}", hint=hint) from None

    async def changed(self, ref: Reference) -> None:
        """See `Upstream`. All superpeers are told: any of them may have answers of its registry."""

        async def tell(url: str) -> None:
            what = f"telling of a push to {ref.name}"
            try:
                async with (
                    asyncio.timeout(_TELL),
                    self._known.asking(url),
                    http.request(self._session, "POST", f"{url}/v1/changed", what, params={"reference": str(ref)}),
                ):
                    pass
            except (DadiError, TimeoutError) as error:
                self._fallbacks.note("superpeer not told of a push", f"{url}: {str(error) or 'no answer in time'}")

        try:
            await self._known.ready()
        except Unavailable as error:
            self._fallbacks.note("superpeer not told of a push", str(error))
        await asyncio.gather(*(tell(url) for url in self._known.names))

    # ---- blobs

    async def blob(self, ref: Reference, digest: str, caller: Caller) -> Original:
        """See `Originals.blob`."""
        said, asker = await self._said(ref, digest, caller)

        async def opening() -> Original:
            return self._open(said, digest, asker, may_wait=self._shared)

        return Awaited(said.size, opening)

    async def _said(self, ref: Reference, digest: str, caller: Caller, more: dict[str, str] | None = None
                    ) -> tuple[OriginalAnswer, AskedFor]:  # fmt: skip
        """Ask about a blob; who is answered is remembered as somebody who wants it."""
        said = await self._ask_about(ref, digest, caller, more or {})
        return said, self._asked.add(digest, ref, caller)

    async def _ask_about(self, ref: Reference, digest: str, caller: Caller, more: dict[str, str]) -> OriginalAnswer:
        here = self._store.has(digest)
        parameters = {"reference": str(ref), **more, **({"table": "no"} if here else {})}
        async with self._inquiry.ask(digest, f"/v1/original/{digest}/table", parameters, caller) as response:
            raw = await _body(response, _MAX_TABLE)
        said = decode_answer(raw, digest)
        blob = self._store.find(digest) if here and said.proven else said.blob
        if self._on_table is not None and blob is not None and blob.size > SMALL:
            await self._on_table(ref, blob, said.token)
        return said

    def _open(self, said: OriginalAnswer, digest: str, asker: AskedFor, *, may_wait: bool) -> Original:
        ref = asker.ref
        found = self._intake.find(digest)
        coming = self._intake.arriving(digest)
        if coming is not None and found is coming and coming.origin == ref.registry:
            return coming
        if found is not None and found is not coming and said.proven:
            return found
        if found is not None:
            # Here, but not for this caller yet: the superpeer has it proved by his registry while it passes.
            return Passing(digest, said.size, lambda: self._stream(digest, said.size, asker, alone=True))
        shared = self._shared and said.size > SMALL and self._fits(said.size)
        if said.blob is not None and (shared or not self._shared) and self._fits(said.size):
            return Chunked(self._store, said.blob, lambda: self._opened(asker), self._fallbacks)
        if shared and may_wait:
            return self._waiting(said.size, digest, asker)
        return self._intake.begin(
            digest, said.size, lambda _: self._stream(digest, said.size, asker), origin=ref.registry
        )

    def _waiting(self, size: int, digest: str, asker: AskedFor) -> Original:
        """Return a blob that the superpeer gets first; if that takes too long, as a stream."""
        tries = 0

        async def ask(wait: int, start: int) -> OriginalAnswer:
            nonlocal asker, tries
            more = {"wait": str(wait), "from": str(start)}
            while True:
                try:
                    said, asker = await self._said(asker.ref, digest, asker.caller, more)
                    return said
                except Unavailable as error:
                    tries += 1
                    if tries >= _TRIES:
                        raise
                    self._fallbacks.note("superpeer asked again for a chunk table", str(error))
                    await asyncio.sleep(0.1 * tries)

        def then(said: OriginalAnswer) -> Original:
            if said.blob is None and not self._store.has(digest):
                self._fallbacks.note("no chunk table in time, original streamed", digest)
            return self._open(said, digest, asker, may_wait=False)

        return Waiting(size, self._wait, ask, then, self._fallbacks)

    async def token(self, digest: str) -> str:
        """Return a new token for a blob that was asked for, as for who asked last; raise NotFound if there is none."""
        refused: DadiError = NotFound(f"nobody has asked for {digest} lately")
        for asker in self._asked.of(digest):
            try:
                said = await self._ask_about(asker.ref, digest, asker.caller, {})
            except AccessDenied as error:
                self._asked.drop(digest, asker)
                refused = error
                continue
            if said.token:
                return said.token
            refused = NotFound(f"no token for {digest}")
        raise refused

    def _fits(self, size: int) -> bool:
        return not self._store.limit or size <= self._store.limit

    @contextlib.asynccontextmanager
    async def _opened(self, asker: AskedFor) -> AsyncIterator[Source]:
        with self._asked.reading(asker):
            yield self._chunks

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Be the source of chunks from superpeers, unverified; for `Verified` only."""
        refused: DadiError = NotFound(f"nobody has asked for {blob.digest} lately")
        for asker in self._asked.of(blob.digest):
            try:
                return await self._read_for(asker, blob, chunks)
            except AccessDenied as error:
                self._asked.drop(blob.digest, asker)
                refused = error
        raise refused

    async def _read_for(self, asker: AskedFor, blob: Blob, chunks: range) -> list[bytes]:
        offset, length = blob.table.span(chunks)
        last = offset + length - 1
        headers, parameters = {"Range": f"bytes={offset}-{last}"}, {"reference": str(asker.ref)}
        async with self._inquiry.ask(blob.digest, f"/v1/original/{blob.digest}", parameters, asker.caller,
                                     headers) as response:  # fmt: skip
            _check_range(response, offset, last, blob.size)
            async with self._inquiry.watched(response):
                parts = [await response.content.readexactly(blob.table.extent(chunk)[1]) for chunk in chunks]
                more = await response.content.read(1)
            if more:
                raise DigestMismatch("a superpeer sent more than the range it was asked for", source="superpeers")
            return parts

    async def _stream(self, digest: str, size: int, asker: AskedFor, *, alone: bool = False
                      ) -> AsyncGenerator[bytes, None]:  # fmt: skip
        """Yield a blob from its start; where one superpeer breaks off the next goes on.

        Not `alone`: where the asker is refused, it goes on as for another who wants it from the same registry.
        """
        at = tries = failed_at = 0
        restart = Restart()
        with contextlib.ExitStack() as held:
            held.enter_context(self._asked.reading(asker))
            while at < size:
                answered = False
                try:
                    headers, parameters = {"Range": f"bytes={at}-{size - 1}"}, {"reference": str(asker.ref)}
                    async with self._inquiry.ask(digest, f"/v1/original/{digest}", parameters, asker.caller, headers,
                                                 first=tries) as response:  # fmt: skip
                        _check_range(response, at, size - 1, size)
                        answered = True
                        restart.came()
                        while piece := await self._inquiry.piece(response):
                            at += len(piece)
                            if at > size:
                                raise DigestMismatch(f"a superpeer sent more than {size} bytes of {digest}")
                            yield piece
                    if at < size:
                        raise Unavailable(f"a superpeer cut {digest} off {size - at} bytes before its end")
                except AccessDenied:
                    self._asked.drop(digest, asker)
                    others = [one for one in self._asked.of(digest) if one.ref.registry == asker.ref.registry]
                    if alone or not others:
                        raise
                    asker = others[0]
                    held.enter_context(self._asked.reading(asker))
                except Unavailable as error:
                    if at and not answered and await restart.wait(error):
                        self._fallbacks.note(GONE, str(error))
                        continue
                    # Few, also where a little comes each time: what was found to be wrong breaks off too, at its end.
                    if at - failed_at >= _PROGRESS:
                        tries = 0
                    tries, failed_at = tries + 1, at
                    if tries >= _TRIES:
                        raise
                    self._fallbacks.note("original broken off, gone on", str(error))

    def statistics(self) -> dict[str, Any]:
        """Return counts for status and metrics."""
        chunks = {"local_bytes": self._kept.local_bytes, "fetched_bytes": self._kept.fetched_bytes,
                  "joined": self._chunks.joined}  # fmt: skip
        return {"streamed": self._intake.statistics(), "chunks": chunks, "store": self._store.statistics()}

    async def close(self) -> None:
        """Break off what is under way."""
        await self._intake.close()
        await self._chunks.close()
        self._asked.close()
        await self._inquiry.close()
        await self._session.close()
        if self._owns_known:
            await self._known.close()


async def _body(response: aiohttp.ClientResponse, limit: int) -> bytes:
    raw = bytearray()
    async for piece in response.content.iter_any():
        raw += piece
        if len(raw) > limit:
            raise Malformed(f"{response.url.origin()} answered more than {limit} bytes")
    return bytes(raw)


def _check_range(response: aiohttp.ClientResponse, first: int, last: int, size: int) -> None:
    said = response.headers.get("Content-Range", "")
    if response.status != 206 or said != f"bytes {first}-{last}/{size}":
        told = f"{response.status} with {said or 'no range'}"
        raise DigestMismatch(f"{response.url.origin()} answered {told} to bytes={first}-{last}", source="superpeers")
