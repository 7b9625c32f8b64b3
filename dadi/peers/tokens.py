"""The tokens that a node holds, by image; renewed before they run out, and at once when one is refused.

    learn       with an image, the superpeer gives read tokens for its blobs, and a renewal for each of them
    headers     what a request for a blob shows to superpeers and peers: the read token, never the renewal
    renew       from about half of a token's life on, in the background, for images that are in use; and when a read was
                refused for its token. One request for each image at a time, whoever waits for it. While no superpeer
                answers, the error is Unavailable and retryable: a read waits, it does not fail
    on disk     the tokens of all images in one file that only our user may read: after a restart they are still known

A running container must not lose its reads because a token ran out: the renewal buys new tokens for a day after the
registry's last yes even where registry or credentials are away by now (the rules: `superpeer/who_may.py`).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog

from dadi.blobs.layout import write_durably
from dadi.errors import DadiError, TokenRefused, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.image import MAX_LAYERS
from dadi.peers import token as token_format
from dadi.peers.token import MAX_BLOBS, NAME, Token

log = structlog.get_logger()
MOST_IMAGES = 2000
MOST_TOKENS = -(-(4 * MAX_LAYERS + 4) // MAX_BLOBS)
"""Tokens that one image may have: four blobs of each of its layers, and four of its own."""
_LOOK_EVERY = 15.0
_REST = 5.0
"""Seconds: between two looks for tokens to renew, and between two tries for one image."""


class ImageTokens(msgspec.Struct, frozen=True):
    """What a superpeer gives with an image, for its blobs together: read tokens, and the renewals of each.

    `reference` is pinned to the image's manifest, so that its tokens can be had again without any renewal.
    """

    reference: str
    platform: str
    tokens: tuple[str, ...]
    renewals: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return f"ImageTokens({self.reference}, {len(self.tokens)} hidden)"


Renew = Callable[[ImageTokens], Awaitable[ImageTokens]]


class Needed(msgspec.Struct, frozen=True):
    """An image whose blobs something on this node may still read. `reference` is pinned to the manifest."""

    reference: str
    platform: str
    blobs: tuple[str, ...]


class _Held:
    """An image's tokens as they are now. `renew_at`, `tried_at`: by the monotonic clock."""

    def __init__(self, image: ImageTokens, now: float, *, fresh: bool, blobs: Iterable[str] = ()) -> None:
        """`blobs`: what the image is known to have, where there is no token yet."""
        self.image = image
        self.parsed: list[tuple[str, Token]] = [(text, token_format.parse(text)) for text in image.tokens]
        self.names = {token.names[at : at + NAME] for _, token in self.parsed
                      for at in range(0, len(token.names), NAME)}  # fmt: skip
        self.names.update(map(token_format.name_of, blobs))
        # By how long a token lives, not by our clock, which may be wrong.
        shortest = min((token.expires - token.not_before for _, token in self.parsed), default=0)
        # Nodes that started an image in the same second must not all renew in the same second.
        self.renew_at = now + shortest * random.uniform(0.4, 0.6) if fresh else now
        self.tried_at = float("-inf")
        self.used_at = now
        self.renewal: asyncio.Task[None] | None = None
        self.refused: DadiError | None = None

    def age(self) -> tuple[bool, bool, float]:
        """Return what orders several for a blob: the greatest is the best."""
        return self.refused is None, bool(self.parsed), self.renew_at

    def opens(self, digest: str) -> str | None:
        return next((text for text, token in self.parsed if token.opens(digest)), None)


class Tokens:
    """See the head of this file. `renew` is set by the client of the superpeers; without it nothing is renewed."""

    def __init__(
        self,
        fallbacks: Fallbacks,
        *,
        file: Path | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.renew: Renew | None = None
        self.renew_by: dict[str, Renew] = {}
        """Who renews instead, by `ImageTokens.platform`: of what is no image for a platform."""
        self._fallbacks = fallbacks
        self._file = file
        self._clock = clock
        self._images: dict[tuple[str, str], _Held] = {}
        """Those that were learnt or renewed last stand last."""
        self._by_name: dict[bytes, list[_Held]] = {}
        self._background: asyncio.Task[None] | None = None
        self._writing = asyncio.Lock()
        self.renewed_count = 0

    def __repr__(self) -> str:
        return f"Tokens(of {len(self._images)} images)"

    # ---- what is shown

    def headers(self, *blobs: str) -> dict[str, str]:
        """Return the header that opens these blobs ({} if there is no token that names the first of them).

        Without blobs: with any token. One header holds one token: for blobs of several images ask `groups`.
        """
        text = self.text(blobs[0]) if blobs else self._any()
        return {"Authorization": f"Bearer {text}"} if text else {}

    def groups(self, blobs: Iterable[str]) -> list[tuple[dict[str, str], list[str]]]:
        """Return the blobs in groups, each with the header that opens all of its group."""
        groups: dict[str, list[str]] = {}
        for digest in blobs:
            groups.setdefault(self.text(digest) or "", []).append(digest)
        return [({"Authorization": f"Bearer {text}"} if text else {}, group) for text, group in groups.items()]

    def text(self, digest: str) -> str | None:
        """Return the newest token that opens a blob."""
        # One that has no token yet comes last, however young it is.
        held = max(self._with(digest), key=lambda each: (bool(each.parsed), each.age()), default=None)
        if held is None:
            return None
        held.used_at = self._clock()
        return held.opens(digest)

    def image_with(self, digest: str) -> tuple[str, str] | None:
        """Return an image that has a blob: its reference, pinned to the manifest, and its platform."""
        held = self._holding(digest)
        return (held.image.reference, held.image.platform) if held else None

    def _with(self, digest: str) -> Sequence[_Held]:
        return self._by_name.get(token_format.name_of(digest), ())

    def _holding(self, digest: str) -> _Held | None:
        # Of several images with this blob the one to renew: the youngest; one that was refused comes last.
        return max(self._with(digest), key=_Held.age, default=None)

    def _any(self) -> str | None:
        held = max((each for each in self._images.values() if each.parsed), key=_Held.age, default=None)
        return held.parsed[0][0] if held else None

    # ---- learning

    async def learn(self, image: ImageTokens) -> None:
        """Remember what a superpeer gave, in place of what it gave before. What is no token is left out, and said."""
        if not image.tokens or len(image.tokens) > MOST_TOKENS or len(image.renewals) > MOST_TOKENS:
            return
        try:
            self._put(_Held(image, self._clock(), fresh=True))
        except TokenRefused as error:
            self._fallbacks.note("tokens that make no sense left out", f"{image.reference}: {error}")
            return
        await self._save()

    def _put(self, held: _Held) -> None:
        key = (held.image.reference, held.image.platform)
        self._drop(key)
        self._images[key] = held
        for name in held.names:
            self._by_name.setdefault(name, []).append(held)
        while len(self._images) > MOST_IMAGES:
            self._drop(min(self._images, key=lambda each: self._images[each].used_at))

    def _drop(self, key: tuple[str, str]) -> None:
        held = self._images.pop(key, None)
        if held is None:
            return
        for name in held.names:
            rest = [each for each in self._by_name.get(name, ()) if each is not held]
            if rest:
                self._by_name[name] = rest
            else:
                self._by_name.pop(name, None)

    # ---- renewing

    async def renewed(self, digest: str, shown: str | None) -> bool:
        """Have a token for a blob that is another than `shown`, which was refused; return False if there is none.

        Raises Unavailable while no superpeer can say; AccessDenied if access was refused.
        """
        if (text := self.text(digest)) is not None and text != shown:
            return True
        held = self._holding(digest)
        if held is None or self.renew is None:
            return False
        if held.renewal is None and self._clock() - held.tried_at < _REST:
            if held.refused is not None:
                raise held.refused.with_traceback(None)
            if (text := self.text(digest)) == shown:
                raise Unavailable(f"the token for {held.image.reference} was refused again right after it was renewed",
                                  retry_after=_REST, hint="do the clocks of the machines agree?")  # fmt: skip
        await self._renew(held)
        return self.text(digest) not in (None, shown)

    async def _renew(self, held: _Held) -> None:
        """Renew an image's tokens, once for all who wait, whoever of them goes away."""
        if held.renewal is None:
            held.tried_at = self._clock()
            held.renewal = asyncio.create_task(self._renew_now(held))
            held.renewal.add_done_callback(partial(_landed, held))
        await asyncio.shield(held.renewal)

    async def _renew_now(self, held: _Held) -> None:
        assert self.renew is not None
        try:
            fresh = await self.renew_by.get(held.image.platform, self.renew)(held.image)
        except Unavailable as error:
            self._fallbacks.note("tokens not renewed", f"{held.image.reference}: {error}")
            raise
        except DadiError as error:
            held.refused = error
            self._fallbacks.note("tokens refused", f"{held.image.reference}: {error}")
            raise
        if self._images.get((held.image.reference, held.image.platform)) not in (held, None):
            return  # it was resolved meanwhile
        renewed = _Held(fresh, self._clock(), fresh=True)
        renewed.used_at, renewed.tried_at = held.used_at, held.tried_at
        self._put(renewed)
        self.renewed_count += 1
        await self._save()

    def start(self, needed: Callable[[], Iterable[Needed]]) -> None:
        """Begin to renew in the background what is needed."""
        self._background = asyncio.create_task(self._keep_fresh(needed))

    async def _keep_fresh(self, needed: Callable[[], Iterable[Needed]]) -> None:
        while True:
            await self.renew_due(list(needed()))
            await asyncio.sleep(_LOOK_EVERY)

    async def renew_due(self, needed: Iterable[Needed]) -> None:
        """Renew what should be by now, of these images; have tokens for those that have none. Raises nothing."""
        now = self._clock()
        due = []
        for image in needed:
            key = (image.reference, image.platform)
            held = self._images.get(key)
            if held is None:
                self._put(_Held(ImageTokens(*key, ()), now, fresh=False, blobs=image.blobs))
                held = self._images[key]
            held.used_at = now
            if held.renew_at <= now and now - held.tried_at >= 2 * _REST:
                due.append(held)
        if self.renew is not None:
            for held in due:  # one after the other: nobody waits for these
                await asyncio.gather(self._renew(held), return_exceptions=True)

    # ---- on disk

    async def load(self) -> None:
        """Read what an earlier run left; what cannot be read is left out: tokens can be had again."""
        if self._file is None:
            return
        try:
            images = msgspec.json.decode(await asyncio.to_thread(self._file.read_bytes), type=list[ImageTokens])
            for image in images[:MOST_IMAGES]:
                self._put(_Held(image, self._clock(), fresh=False))
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, DadiError) as error:
            # Not what it says: a decoder's error may quote what it read.
            self._fallbacks.note("tokens could not be read", f"{self._file}: {type(error).__name__}")

    async def _save(self) -> None:
        if self._file is None:
            return
        async with self._writing:
            data = msgspec.json.encode([held.image for held in self._images.values()])
            try:
                await asyncio.to_thread(_write_private, self._file, data)
            except OSError as error:
                self._fallbacks.note("tokens could not be written", f"{self._file}: {error.strerror}")

    async def close(self) -> None:
        """Stop renewing."""
        tasks = [task for task in (self._background, *(held.renewal for held in self._images.values())) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def statistics(self) -> dict[str, Any]:
        """Return counts: images with tokens, of these refused ones, and how often tokens were renewed."""
        refused = sum(held.refused is not None for held in self._images.values())
        return {"images": len(self._images), "refused": refused, "renewed": self.renewed_count}


def _landed(held: _Held, task: asyncio.Task[None]) -> None:
    held.renewal = None
    if not task.cancelled():
        task.exception()  # looked at: whoever waited for it may be gone


def _write_private(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, data)
