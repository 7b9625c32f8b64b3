"""The superpeer as a node sees it: resolve an image, get a whole small blob, be the source of chunks.

`Upstream` is the contract; `SuperpeerClient` speaks HTTP to one or more superpeers, in order of the list; a node
without a superpeer has one embedded behind the same contract (`dadi/node/daemon.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

import aiohttp
import msgspec

from dadi import digest as digests
from dadi import http
from dadi.blobs.first_of import FirstOf
from dadi.blobs.remote import Remote
from dadi.blobs.source import Source
from dadi.blobs.verified import Verified
from dadi.errors import DadiError, DigestMismatch, Malformed, TooLarge, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.wire import Event

MAX_SMALL_BLOB = 1 << 30


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

    def resolve(self, reference: str, platform: str) -> AsyncIterator[Event]:
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


class SuperpeerClient:
    """The superpeers at `urls`, the first that answers."""

    def __init__(self, urls: Sequence[str], fallbacks: Fallbacks, *, connect: float, read: float,
                 compress: bool = True) -> None:  # fmt: skip
        self._urls = [url.rstrip("/") for url in urls]
        self._fallbacks = fallbacks
        self._session: aiohttp.ClientSession = http.client(connect=connect, read=read)
        self._remotes = [Remote(url, self._session, compress=compress) for url in self._urls]
        self._verified = [Verified(f"superpeer {remote.url}", remote) for remote in self._remotes]
        self.source: Source = self._verified[0] if len(urls) == 1 else FirstOf(self._verified, fallbacks)

    def __repr__(self) -> str:
        return f"SuperpeerClient({', '.join(self._urls)})"

    async def resolve(self, reference: str, platform: str) -> AsyncIterator[Event]:
        """See `Upstream`."""
        parameters = {"reference": reference, "platform": platform}
        for place, url in enumerate(self._urls):
            try:
                async with http.request(
                    self._session, "GET", f"{url}/v1/images", f"resolving {reference}", params=parameters
                ) as response:
                    async for event in http.events(response):
                        yield event
                        if event.get("event") == "image":
                            return
                raise Unavailable(f"{url} did not say what {reference} is")
            except Unavailable as error:
                if place + 1 == len(self._urls):
                    raise
                self._fallbacks.note("superpeer passed over", f"{url}: {error.message}")

    async def whole(self, digest: str, size: int) -> bytes:
        """See `Upstream`."""
        if size > MAX_SMALL_BLOB:
            raise TooLarge(f"{digest} is said to have {size} bytes; the limit is {MAX_SMALL_BLOB}")
        errors: list[DadiError] = []
        for place, url in enumerate(self._urls):
            try:
                return await self._whole_from(url, digest, size)
            except DadiError as error:
                errors.append(error)
                if place + 1 < len(self._urls):
                    self._fallbacks.note("superpeer passed over", f"{url}: {error.message}")
        raise next((error for error in errors if error.retryable), errors[-1])

    async def _whole_from(self, url: str, digest: str, size: int) -> bytes:
        where = f"{url}/v1/blobs/{digest}"
        async with http.request(self._session, "GET", where, "reading an index") as response:
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
            {"name": v.name, "bytes": v.bytes, "wire_bytes": remote.wire_bytes, "requests": remote.requests,
             "wrong": v.wrong}
            for v, remote in zip(self._verified, self._remotes, strict=True)
        ]  # fmt: skip

    async def close(self) -> None:
        """See `Upstream`."""
        await self._session.close()


def image_answer(event: Event) -> ImageAnswer:
    """Return the answer in an "image" event; raise Malformed if it is none."""
    try:
        return msgspec.convert(event, ImageAnswer)
    except msgspec.ValidationError as error:
        raise Malformed(f"the superpeer's answer cannot be used: {error}", hint="are the versions alike?") from None
