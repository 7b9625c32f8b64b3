"""The superpeer as a node sees it: resolve an image, get a whole small blob, be the source of chunks.

`Upstream` is the contract; `SuperpeerClient` speaks HTTP to one or more superpeers (`superpeers.py` says who is asked
for what); a node without a superpeer has one embedded behind the same contract (`dadi/node/embedded.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import aiohttp
import msgspec

from dadi import digest as digests
from dadi import http
from dadi.blobs.remote import Remote
from dadi.blobs.source import Source, Urgency
from dadi.blobs.verified import Verified
from dadi.errors import AccessDenied, DadiError, DigestMismatch, Malformed, TokenRefused, TooLarge, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.oci.reference import Reference
from dadi.peers.access import Access, Caller, FindCredentials, Refused
from dadi.peers.hanging import Hanging
from dadi.peers.health import State
from dadi.peers.keys import Keys
from dadi.peers.known_again import KnownAgain, Resolver
from dadi.peers.superpeers import Resolver as NameResolver
from dadi.peers.superpeers import Superpeers, addresses_of, most_hopeful
from dadi.peers.tokens import Tokens
from dadi.tls import Tls
from dadi.wire import Event

MAX_SMALL_BLOB = 1 << 30
_MOST_TOLD = 1000

T = TypeVar("T")


class ImageAnswer(msgspec.Struct, frozen=True):
    """What a superpeer says an image is. `age`: seconds since the registry was asked."""

    reference: str
    platform: str
    manifest_digest: str
    index_digest: str
    index_size: int
    age: float = 0.0


class Upstream(Protocol):
    """What a node needs of a superpeer. `source` gives verified chunks, or is wrapped by who uses it."""

    source: Source

    def resolve(self, reference: str, platform: str) -> AsyncGenerator[Event, None]:
        """Yield "progress" events and at last one "image" event (the fields of `ImageAnswer`).

        Raises what the superpeer says; Unavailable if none answers within seconds.
        """
        ...

    async def whole(self, digest: str, size: int) -> bytes:
        """Return a small blob, verified. Raises Unavailable, NotFound, DigestMismatch."""
        ...

    def statistics(self) -> list[dict[str, Any]]:
        """Return a row for each machine behind: name, bytes (of chunks), wire_bytes, requests, wrong (chunks)."""
        ...

    async def close(self) -> None:
        """Let go of connections."""
        ...


class _Machine(msgspec.Struct):
    """One superpeer: what was asked of it, verified."""

    remote: Remote
    verified: Verified


class SuperpeerClient:
    """The superpeers that are configured: each thing is asked of who is responsible for it, then of its stand-ins.

    `superpeers` says who that is, and `session` is what they are asked by: the directory's client shares both.
    """

    def __init__(self, urls: Sequence[str], fallbacks: Fallbacks, *, connect: float, read: float,
                 compress: bool = True, tls: Tls | None = None, refresh: float = 30.0,
                 resolver: NameResolver = addresses_of, tokens: Tokens | None = None,
                 credentials: FindCredentials | None = None,
                 refused: Refused = lambda reference, credentials: False,
                 keys_file: Path | None = None) -> None:  # fmt: skip
        """`tokens`: what the node holds, loaded by who made it; `credentials`: the node's own, for registries.

        `refused` is told which of these a registry refuses, by what superpeers say; `keys_file` keeps their keys.
        """
        self._fallbacks = fallbacks
        self._compress = compress
        self.session: aiohttp.ClientSession = http.client(connect=connect, read=read, tls=tls)
        self.superpeers = Superpeers(urls, fallbacks, refresh=refresh, resolver=resolver)
        self._hanging = Hanging(tls)
        self._machines: dict[str, _Machine] = {}
        self._told: OrderedDict[str, str] = OrderedDict()
        """Image indexes, and which superpeer has told us of each: it has them."""
        self.tokens = Tokens(fallbacks) if tokens is None else tokens
        self.known_again = Resolver(self.resolve, self.tokens, fallbacks)
        self.source: Source = KnownAgain(_Responsible(self), self.known_again)
        self.access = Access(self.tokens, self.session, fallbacks, self.ask, credentials, refused)
        self.keys = Keys(lambda: self.superpeers.names, self.access.fetch_keys, fallbacks, file=keys_file)
        """What tokens of peers are checked with; started by who serves peers."""

    def __repr__(self) -> str:
        return f"SuperpeerClient({self.superpeers!r})"

    def machine(self, url: str) -> Verified:
        """Return one superpeer as a source of verified chunks."""
        return self._machine(url).verified

    def _machine(self, url: str) -> _Machine:
        machine = self._machines.get(url)
        if machine is None:
            remote = Remote(url, self.session, compress=self._compress, tokens=self.tokens)
            machine = self._machines[url] = _Machine(remote, Verified(f"superpeer {url}", remote))
            for gone in [name for name in self._machines if name != url and name not in self.superpeers.names]:
                del self._machines[gone]
        return machine

    async def resolve(self, reference: str, platform: str) -> AsyncGenerator[Event, None]:
        """See `Upstream`."""
        caller = await self.access.caller(reference)
        while True:
            try:
                async with contextlib.aclosing(self._resolve_as(caller, reference, platform)) as events:
                    async for event in events:
                        yield event
                return
            except AccessDenied as error:
                caller = await self.access.instead(caller, error)

    async def _resolve_as(self, caller: Caller, reference: str, platform: str) -> AsyncGenerator[Event]:
        parameters = {"reference": reference, "platform": platform}
        errors: list[DadiError] = []
        urls = await self._to_ask(_canonical(reference))
        for place, url in enumerate(urls):
            try:
                async with contextlib.AsyncExitStack() as asking:
                    await asking.enter_async_context(self.superpeers.asking(url))
                    request = http.request(self.session, "GET", f"{url}/v1/images", f"resolving {reference}",
                                           params=parameters, headers=caller.headers)  # fmt: skip
                    async with self._watched(url, urls):  # until it answers: then it tells of its progress
                        response = await asking.enter_async_context(request)
                    async for event in http.events(response):
                        if event.get("event") == "image":
                            self._remember(event, url)
                            await self.access.learn(event)
                            yield event
                            return
                        yield event
                raise Unavailable(f"{url} did not say what {reference} is")
            except Unavailable as error:
                errors.append(error)
                if place + 1 < len(urls):
                    self.superpeers.passed_over(url, error)
        raise most_hopeful(errors)

    def _remember(self, event: Event, url: str) -> None:
        self._told[str(event.get("index_digest"))] = url
        while len(self._told) > _MOST_TOLD:
            self._told.popitem(last=False)

    async def whole(self, digest: str, size: int) -> bytes:
        """See `Upstream`."""
        if size > MAX_SMALL_BLOB:
            raise TooLarge(f"{digest} is said to have {size} bytes; the limit is {MAX_SMALL_BLOB}")

        async def from_one(url: str) -> bytes:
            return await self._whole_from(url, digest, size)

        return await self.known_again.tried(digest, lambda: self.ask(digest, from_one))

    async def ask(self, digest: str, one: Callable[[str], Awaitable[T]]) -> T:
        """Return what `one` gives for the first superpeer that can, of those that may have the blob.

        Raises the most hopeful of their errors.
        """
        errors: list[DadiError] = []
        urls = await self._to_ask(digest)
        for place, url in enumerate(urls):
            try:
                async with self.superpeers.asking(url), self._watched(url, urls):
                    return await one(url)
            except DadiError as error:
                errors.append(error)
                if place + 1 < len(urls):
                    self.superpeers.passed_over(url, error)
        raise most_hopeful(errors)

    def _watched(self, url: str, urls: Sequence[str]) -> contextlib.AbstractAsyncContextManager[None]:
        """Around a request to one of `urls`, which are asked in this order: it is left when it hangs."""
        if url == urls[-1]:  # nobody else can be asked: it may have much to do, it may come back
            return contextlib.nullcontext()
        return self._hanging.watched(url, first=self.superpeers.state(url) == State.PROBING.value)

    async def _to_ask(self, key: str) -> list[str]:
        await self.superpeers.ready()
        urls = self.superpeers.to_ask(key)
        told = self._told.get(key)
        if told in urls and self.superpeers.state(told) == State.GOOD.value:
            urls.remove(told)
            urls.insert(0, told)
        return urls

    async def _whole_from(self, url: str, digest: str, size: int) -> bytes:
        shown = self.tokens.text(digest)
        try:
            return await self._whole_with(url, digest, size, self.tokens.headers(digest))
        except TokenRefused:
            if not await self.tokens.renewed(digest, shown):
                raise
        return await self._whole_with(url, digest, size, self.tokens.headers(digest))

    async def _whole_with(self, url: str, digest: str, size: int, headers: dict[str, str]) -> bytes:
        where = f"{url}/v1/blobs/{digest}"
        async with http.request(self.session, "GET", where, "reading an index", headers=headers) as response:
            data = bytearray()
            async for piece in response.content.iter_any():
                data += piece
                if len(data) > size:
                    raise DigestMismatch(f"{where} is longer than the {size} bytes that were announced", source=url)
        if await asyncio.to_thread(digests.of, data) != digest:
            raise DigestMismatch(f"{where} is not what its digest says", source=url)
        return bytes(data)

    def statistics(self) -> list[dict[str, Any]]:
        """See `Upstream`."""
        return [
            {"name": m.verified.name, "bytes": m.verified.bytes, "wire_bytes": m.remote.wire_bytes,
             "requests": m.remote.requests, "wrong": m.verified.wrong, "state": self.superpeers.state(name)}
            for name in self.superpeers.names for m in [self._machine(name)]
        ]  # fmt: skip

    async def close(self) -> None:
        """See `Upstream`."""
        await self.known_again.close()
        await self.keys.close()
        await self.tokens.close()
        await self.superpeers.close()
        await self._hanging.close()
        await self.session.close()


class _Responsible:
    """The source over all superpeers; see `SuperpeerClient`."""

    def __init__(self, client: SuperpeerClient) -> None:
        self._client = client

    def __repr__(self) -> str:
        return f"Responsible({self._client.superpeers!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run from the blob's superpeer, or from who stands in for it."""

        async def from_one(url: str) -> list[bytes]:
            return await self._client.machine(url).read(blob, chunks, urgency)

        return await self._client.ask(blob.digest, from_one)


def _canonical(reference: str) -> str:
    """Return what everybody calls an image, however it was written; what is no reference as it is."""
    try:
        return str(Reference.parse(reference))
    except DadiError:
        return reference


def image_answer(event: Event) -> ImageAnswer:
    """Return the answer in an "image" event; raise Malformed if it is none."""
    try:
        return msgspec.convert(event, ImageAnswer)
    except msgspec.ValidationError as error:
        raise Malformed(f"the superpeer's answer cannot be used: {error}", hint="are the versions alike?") from None
