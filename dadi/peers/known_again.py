"""A source whose images are resolved again where the superpeers have forgotten them.

    read ──► NotFound: no superpeer knows an image with the blob ──► resolve the image again, by its manifest's digest
         ──► read once more

A superpeer remembers `most_images` images, and loses its disk now and then; what runs here must not fail for that. One
request for each image at a time, whoever waits for it, and not again for `_REST` seconds: what the registry has lost
too stays lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import TypeVar

from dadi.blobs.source import Source, Urgency
from dadi.errors import DadiError, NotFound
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.peers.tokens import Tokens
from dadi.wire import Event

_REST = 15.0

T = TypeVar("T")


class Resolver:
    """Resolves again; shared by all that read. `resolve` as of `Upstream`; `tokens` know which image has a blob."""

    def __init__(self, resolve: Callable[[str, str], AsyncGenerator[Event, None]], tokens: Tokens, fallbacks: Fallbacks,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._resolve = resolve
        self._tokens = tokens
        self._fallbacks = fallbacks
        self._clock = clock
        self._under_way: dict[tuple[str, str], asyncio.Task[None]] = {}
        self._rests: dict[tuple[str, str], float] = {}

    async def tried(self, digest: str, read: Callable[[], Awaitable[T]]) -> T:
        """Return what `read` gives, if need be after the blob's image was resolved again. Raises what that raises."""
        try:
            return await read()
        except NotFound as error:
            if not await self._again(digest, error):
                raise
        return await read()

    async def _again(self, digest: str, error: NotFound) -> bool:
        image = self._tokens.image_with(digest)
        if image is None or image[1] in self._tokens.renew_by:  # of a plain pull: that is no image
            return False
        task = self._under_way.get(image)
        if task is None:
            now = self._clock()
            self._rests = {key: until for key, until in self._rests.items() if until > now}
            if image in self._rests:
                return False
            self._rests[image] = now + _REST
            self._fallbacks.note("image forgotten by superpeers, resolved again", f"{image[0]}: {error}")
            task = self._under_way[image] = asyncio.create_task(self._run(*image))
            task.add_done_callback(lambda done: self._ended(image, done))
        try:
            await asyncio.shield(task)
        except DadiError as failed:
            if failed.retryable:
                raise failed.with_traceback(None) from None  # the registry is away: whoever reads waits for it
            return False
        return True

    async def _run(self, reference: str, platform: str) -> None:
        async with contextlib.aclosing(self._resolve(reference, platform)) as events:
            async for _ in events:
                pass

    def _ended(self, image: tuple[str, str], task: asyncio.Task[None]) -> None:
        self._under_way.pop(image, None)
        if not task.cancelled() and (error := task.exception()) is not None:
            if isinstance(error, DadiError) and error.retryable:
                self._rests.pop(image, None)

    async def close(self) -> None:
        """Break off what is under way."""
        tasks = list(self._under_way.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class KnownAgain:
    """See the head of this file."""

    def __init__(self, source: Source, resolver: Resolver) -> None:
        self._source = source
        self._resolver = resolver

    def __repr__(self) -> str:
        return f"KnownAgain({self._source!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run."""
        return await self._resolver.tried(blob.digest, lambda: self._source.read(blob, chunks, urgency))
