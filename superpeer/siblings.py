"""The other superpeers of this datacenter: blobs of which only they know, and chunks that they have.

Blobs are shared out by `owners.py`, while an image is indexed by whoever owns its reference. So a superpeer is asked
for blobs of images that it does not know:

    learn(digest)     ask all siblings at once, each one once (GET /v1/blobs/{digest}/origin; they look at what they
                      have, and never ask others); take over the image of the first that knows it (`adopting.py`).
                      That nobody knows it is remembered for a few seconds
    chunks.bring(…)   chunks of a layer from a sibling that has all of it; or take(…) from one (`sibling_chunks.py`)
    catch_up()        at the start: what the siblings have come to know meanwhile
    announce(digest)  a new image: have the siblings learn of it (HEAD of its index), so that they can go on when this
                      superpeer dies

Siblings come from the configuration only; no address in any message is ever asked. One that does not answer is passed
over until it is tried again (`dadi/peers/superpeers.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Coroutine, Mapping
from functools import partial
from typing import Annotated, Any, Protocol, cast

import aiohttp
import msgspec
import structlog

from dadi import digest as digests
from dadi import http
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.remote import Remote
from dadi.blobs.source import Urgency
from dadi.blobs.verified import Verified
from dadi.errors import DadiError, DigestMismatch, Malformed, NotFound, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.peers.access import keys_of
from dadi.peers.gate import AUTHORIZATION
from dadi.peers.hanging import Hanging
from dadi.peers.health import State
from dadi.peers.keys import PublicKeys
from dadi.peers.places import Digest
from dadi.peers.superpeers import Resolver, Superpeers, addresses_of
from dadi.peers.tokens import Tokens
from dadi.tls import Tls
from superpeer.adopting import Adopter, SiblingOrigin, decode_told
from superpeer.config import SuperpeerConfig
from superpeer.sibling_chunks import NOBODY_KNOWS, Answers, OnLie, SiblingChunks
from superpeer.sibling_serving import MOST_TOLD

log = structlog.get_logger()
_MAX_TOLD = 16 << 10
_MOST_REMEMBERED = 10_000
_MOST_ASKING = 64
"""Digests that are asked for at a time; who asks for more is told to come back."""
_MAX_IMAGES = 64 << 10
_ANNOUNCING = 60.0
_AGAIN = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds after which a sibling that could not be told of an image is told again."""


class SiblingTokens(Protocol):
    """What we show to siblings (`WhoMay`)."""

    def sibling_headers(self, *blobs: str) -> Mapping[str, str]:
        """Return the headers of a request for blobs."""

    def sibling_list_headers(self) -> Mapping[str, str]:
        """Return the headers of a request for what is told to no node."""


class Siblings:
    """See the head of this file. `on_lie` is told of a layer whose tar is not what its index says."""

    def __init__(self, config: SuperpeerConfig, store: DiskBlobs, adopter: Adopter, fallbacks: Fallbacks,
                 *, on_lie: OnLie, tls: Tls | None = None, resolver: Resolver = addresses_of) -> None:  # fmt: skip
        self._adopter = adopter
        self._fallbacks = fallbacks
        self.own = config.url.rstrip("/")
        self.superpeers = Superpeers(config.siblings, fallbacks, refresh=config.siblings_refresh, resolver=resolver)
        self.session: aiohttp.ClientSession = http.client(connect=1.0, read=5.0, tls=tls)
        self._tokens: SiblingTokens | None = None
        self._quick = aiohttp.ClientTimeout(total=3.0, sock_connect=1.0)
        self._hanging = Hanging(tls)
        self._learning: dict[str, asyncio.Task[None]] = {}
        self._adopting: dict[str, asyncio.Task[None]] = {}
        self._unknown = Answers()
        self._remotes: dict[str, Verified] = {}
        self.chunks = SiblingChunks(store, fallbacks, self._ask_all, self.read, self.spawn, on_lie=on_lie)
        self._background: set[asyncio.Task[None]] = set()
        self._refused: dict[str, None] = {}
        """Image indexes that lied."""
        self.adopted = 0
        self.asked = 0

    def __repr__(self) -> str:
        return f"Siblings({', '.join(self.others()) or 'none'})"

    def connect(self, tokens: SiblingTokens) -> None:
        """Show tokens from now on: keys are read when the superpeer has been started."""
        self._tokens = tokens

    def headers(self, digest: str) -> Mapping[str, str]:
        """Return what to show to siblings with a request for a blob."""
        return self._tokens.sibling_headers(digest) if self._tokens else {}

    def list_headers(self) -> Mapping[str, str]:
        """Return what to show to siblings with the question for all their images."""
        return self._tokens.sibling_list_headers() if self._tokens else {}

    def others(self) -> list[str]:
        """Return the siblings that are known now."""
        return [name for name in self.superpeers.names if name != self.own]

    # ---- images

    async def learn(self, digest: str) -> None:
        """Have the image of a blob, or of a manifest, that we do not know in the catalog.

        Raises NotFound if no sibling knows it; Unavailable if one that may is away, or we have too much to do; what
        taking over raises.
        """
        if (error := self._unknown.get(digest)) is not None:
            raise error.with_traceback(None)
        task = self._learning.get(digest)
        if task is None:
            if len(self._learning) >= _MOST_ASKING:
                raise Unavailable(f"too many unknown blobs are asked for; not now: {digest}", retry_after=1)
            task = self._learning[digest] = asyncio.create_task(self._learn(digest))
            task.add_done_callback(lambda done: self._learned(digest, done))
        await asyncio.shield(task)

    def _learned(self, digest: str, task: asyncio.Task[None]) -> None:
        del self._learning[digest]
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, DadiError):
                self._unknown.put(digest, error, NOBODY_KNOWS if isinstance(error, NotFound) else 1.0)
            else:
                log.error("could not learn of a blob", blob=digest, why=repr(error))

    async def knows(self, manifest_digest: str) -> bool:
        """Whether a sibling knew an image, which is in the catalog now: its layers need no second copy. StoreFull."""
        try:
            await self.learn(manifest_digest)
        except NotFound:
            return False
        except StoreFull:
            raise
        except DadiError as error:
            self._fallbacks.note("siblings not asked about an image", str(error))
            return False
        return True

    async def _learn(self, digest: str) -> None:
        answers, away = await self._ask_all(digest)
        errors: list[DadiError] = []
        for url, told in answers:
            if told.index_digest in self._refused:
                continue
            try:
                await self._adopt(url, told, digest)
                return
            except StoreFull:
                raise
            except DadiError as error:
                errors.append(error)
                self._fallbacks.note("sibling's image not taken over", f"{url}, {told.reference}: {error}")
        if errors:
            raise Unavailable(f"what siblings know of {digest} cannot be used: {errors[-1].message}", retry_after=1)
        if away:
            raise Unavailable(f"{digest} is not known here, and {', '.join(away)} does not answer", retry_after=1)
        raise NotFound(f"no image that this superpeer or its siblings know has the blob {digest}",
                       hint="ask for its image first")  # fmt: skip

    def refuse(self, index_digest: str) -> None:
        """Never take over this image index again: it has lied."""
        self._refused[index_digest] = None
        if len(self._refused) > _MOST_REMEMBERED:
            del self._refused[next(iter(self._refused))]

    async def _adopt(self, url: str, told: SiblingOrigin, digest: str) -> None:
        task = self._adopting.get(told.index_digest)
        if task is None:
            log.info("an image is taken over from a sibling", sibling=url, image=told.reference)
            work = self._adopter.adopt(told, digest, partial(self._whole, url), self._verified(url))
            task = self._adopting[told.index_digest] = asyncio.create_task(work)
            task.add_done_callback(lambda done: self._adopted(told, done))
        await asyncio.shield(task)

    def _adopted(self, told: SiblingOrigin, task: asyncio.Task[None]) -> None:
        del self._adopting[told.index_digest]
        self.adopted += not task.cancelled() and task.exception() is None

    async def _ask_all(self, digest: str) -> tuple[list[tuple[str, SiblingOrigin]], list[str]]:
        """Return what siblings know of a digest, those first that have it whole; and who did not answer."""
        try:
            await self.superpeers.ready()
        except Unavailable as error:
            return [], [error.message]
        others = self.others()
        self.asked += 1
        results = await asyncio.gather(*(self._ask(url, digest) for url in others), return_exceptions=True)
        found: list[tuple[str, SiblingOrigin]] = []
        away: list[str] = []
        for url, result in zip(others, results, strict=True):
            if isinstance(result, SiblingOrigin):
                found.append((url, result))
            elif isinstance(result, DadiError):
                if not isinstance(result, NotFound):
                    away.append(url)
                    self._fallbacks.note("sibling passed over", f"{url}: {result.message}")
            else:
                raise result
        return sorted(found, key=lambda each: not each[1].whole), away

    async def _ask(self, url: str, digest: str) -> SiblingOrigin:
        superpeers = self.superpeers
        if not superpeers.health.may_ask(url, superpeers.clock()):
            raise Unavailable("it did not answer a moment ago")
        where = f"{url}/v1/blobs/{digest}/origin"
        return decode_told(await self.answer(url, where, self.headers(digest), _MAX_TOLD))

    async def answer(self, url: str, where: str, headers: Mapping[str, str], most: int) -> bytearray:
        """Return a sibling's answer to a question for what it knows, of at most so many bytes.

        Raises what it says, Unavailable, Malformed.
        """
        request = http.request(self.session, "GET", where, "asking a sibling", headers=headers, timeout=self._quick)
        async with self.asking(url), request as response:
            return await bounded(response, most, url)

    async def _whole(self, url: str, digest: str, size: int) -> bytes:
        where = f"{url}/sibling/v1/blobs/{digest}"
        async with (
            self.superpeers.asking(url),
            http.request(self.session, "GET", where, "reading a sibling's index",
                         headers=self.headers(digest)) as response,
        ):  # fmt: skip
            data = await bounded(response, size, url)
            if await asyncio.to_thread(digests.of, data) != digest:
                raise DigestMismatch(f"{where} is not what its digest says", source=url)
        return bytes(data)

    def _verified(self, url: str, where: str = "sibling") -> Verified:
        verified = self._remotes.get(f"{url}/{where}")
        if verified is None:
            remote = Remote(f"{url}/{where}", self.session, compress=False, tokens=cast("Tokens", _Shown(self)))
            verified = self._remotes[f"{url}/{where}"] = Verified(f"sibling {url}", remote)
        return verified

    async def read(self, url: str, blob: Blob, chunks: range, urgency: Urgency, *, packed: bool = False) -> list[bytes]:
        """Return chunks that a sibling has, verified; `packed`: that it has, or can fetch, of a compressed layer.

        Raises NotFound if it has not all of them, Unavailable, DigestMismatch.
        """
        if not self.superpeers.health.may_ask(url, self.superpeers.clock()):
            raise Unavailable("it did not answer a moment ago")
        async with self.asking(url):
            return await self._verified(url, "sibling/packed" if packed else "sibling").read(blob, chunks, urgency)

    def watched(self, url: str) -> contextlib.AbstractAsyncContextManager[None]:
        """Around waiting for a sibling; raises Unreachable inside once it is known to hang."""
        return self._hanging.watched(url)

    @contextlib.asynccontextmanager
    async def asking(self, url: str) -> AsyncIterator[None]:
        """Around what somebody waits for: one that hangs must not cost each of them seconds."""
        first = self.superpeers.state(url) == State.PROBING.value
        async with self.superpeers.asking(url), self._hanging.watched(url, first=first):
            yield

    async def fetch_keys(self, url: str) -> PublicKeys:
        """Return what a sibling says of the keys that it signs tokens with."""
        return await keys_of(self.session, url, timeout=self._quick)

    def catch_up(self) -> None:
        """Learn what the siblings have come to know meanwhile, without waiting for it."""

        async def everybody() -> None:
            try:
                await self.superpeers.ready()
            except Unavailable:
                return  # noted where the names are asked for
            await asyncio.gather(*map(self._catch_up_with, self.others()))

        self.spawn(everybody())

    async def _catch_up_with(self, url: str) -> None:
        headers = self.list_headers()
        where = f"{url}/sibling/v1/images"
        try:
            async with http.request(self.session, "GET", where, "asking a sibling for its images", headers=headers,
                                    timeout=self._quick) as response:  # fmt: skip
                data = await bounded(response, _MAX_IMAGES, url)
            images = msgspec.json.decode(data, type=_Images).images
            for digest in images:
                if not self._adopter.knows(digest):
                    await self.learn(digest)
        except (DadiError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            # It may be starting too. What is asked for is learnt of all the same.
            self._fallbacks.note("did not catch up with a sibling", f"{url}: {error}")

    def announce(self, digest: str) -> None:
        """Have the siblings learn of an image (by its index), without waiting for it."""

        async def everybody() -> None:
            try:
                await self.superpeers.ready()
            except Unavailable:
                return  # noted where the names are asked for
            await asyncio.gather(*(self._announce_to(url, digest) for url in self.others()))

        self.spawn(everybody())

    async def _announce_to(self, url: str, digest: str) -> None:
        where = f"{url}/v1/blobs/{digest}"
        timeout = aiohttp.ClientTimeout(total=_ANNOUNCING, sock_connect=1.0)
        for wait in _AGAIN:
            try:
                async with http.request(self.session, "HEAD", where, "telling a sibling of an image",
                                        headers=self.headers(digest), timeout=timeout):  # fmt: skip
                    return
            except DadiError as error:
                self._fallbacks.note("sibling not told of an image", f"{url}: {error}")
            await asyncio.sleep(wait)

    # ---- state

    def spawn(self, work: Coroutine[Any, Any, None]) -> None:
        """Do work that nobody waits for; it is broken off at the end."""
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("work with siblings failed", why=repr(error))

    def statistics(self) -> dict[str, Any]:
        """Return counts, and the state of each sibling."""
        return {
            "asked": self.asked, "adopted": self.adopted, "bytes": self.chunks.bytes,
            "wrong": sum(verified.wrong for verified in self._remotes.values()),
            "states": {url: self.superpeers.state(url) for url in self.others()},
        }  # fmt: skip

    async def close(self) -> None:
        """Break off what is under way."""
        await self.chunks.settle()
        tasks = [*self._learning.values(), *self._adopting.values(), *self._background]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.chunks.close()
        await self._hanging.close()
        await self.superpeers.close()
        await self.session.close()


class _Shown:
    """What `Remote` asks of a node's tokens: superpeers make their own."""

    def __init__(self, siblings: Siblings) -> None:
        self._siblings = siblings

    def text(self, digest: str) -> str | None:
        """Return the token for a blob."""
        return self._siblings.headers(digest).get(AUTHORIZATION, "").removeprefix("Bearer ") or None

    async def renewed(self, digest: str, shown: str | None) -> bool:
        """There is no other."""
        return False


class _Images(msgspec.Struct, frozen=True):
    images: Annotated[tuple[Digest, ...], msgspec.Meta(max_length=MOST_TOLD)]


async def bounded(response: aiohttp.ClientResponse, most: int, url: str) -> bytearray:
    """Return what a sibling sends. Raises Malformed for more than `most` bytes."""
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > most:
            raise Malformed(f"{url} sends more than {most} bytes")
    return data
