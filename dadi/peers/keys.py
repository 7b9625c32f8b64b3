"""The public keys that tokens are checked with, and what was revoked: asked of superpeers, kept while they are away.

    GET /v1/keys → {"keys": [{"id", "key": base64 of the 32 bytes, "not_before": seconds}],
                    "revoked": [id of a token or a key],
                    "siblings": [the same, as its siblings have said to it]}

Each superpeer speaks for its own keys: what it says replaces what it said before, so that a key or a revocation that
it drops is dropped here; while it does not answer, its last word stands. Tokens signed with a key before its
`not_before` are refused. Asked every minute, and when a token names a key that is not known: now and then at most,
whatever strangers show us.

What a superpeer has signed outlives it: the word of one that is no longer named stands for `keep`, until its last token
has run out; it is in `file` for a restart, and whoever knew it passes it on under "siblings", one hop far.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec
import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dadi.blobs.layout import write_durably
from dadi.errors import DadiError, Malformed, TokenRefused
from dadi.fallbacks import Fallbacks
from dadi.peers.token import Token, key_id

log = structlog.get_logger()
EVERY = 60.0
"""Seconds between two questions."""
AT_MOST, WHILE = 3, 15.0
"""Questions, in so many seconds, for keys that are not known; evenly spread where strangers use them up."""
KEEP = 2 * 86400.0
"""Seconds for which the keys of a superpeer that is gone are kept: a token lives a day by default."""
MAX_ANSWER = 1 << 20
REVOKED = "STATE/keys/revoked of a superpeer has it, or its key; who has a right to the image mounts it anew"
_MOST_KEYS = 64
_MOST_KNOWN = 256
"""Superpeers whose word is kept, with those that are gone."""
_MOST_REVOKED = 10_000


class PublicKey(msgspec.Struct, frozen=True):
    """One key, as GET /v1/keys has it."""

    id: str
    key: str
    not_before: int = 0


class PublicKeys(msgspec.Struct, frozen=True):
    """The answer to GET /v1/keys: the key that signs now first, then those whose tokens still live."""

    keys: tuple[PublicKey, ...]
    revoked: tuple[str, ...] = ()
    siblings: tuple[PublicKeys, ...] = ()
    """What others said, without what these have from others."""

    def size(self) -> tuple[int, int]:
        """Return the numbers of keys and of revoked tokens, with those of the siblings."""
        parts = (self, *self.siblings)
        return sum(len(part.keys) for part in parts), sum(len(part.revoked) for part in parts)


class _Word(msgspec.Struct):
    """The last word of a superpeer; `gone`: since when it is not named any more, seconds since 1970."""

    said: PublicKeys
    gone: float | None = None


class KeySource(Protocol):
    """Where a gate finds keys."""

    def find(self, key: str) -> Ed25519PublicKey | None:
        """Return the public key of this id."""
        ...

    def check_not_revoked(self, token: Token) -> None:
        """Raise TokenRefused if the token, or all that its key signed then, was revoked."""
        ...

    async def ask_for(self, key: str) -> None:
        """Find out about a key that is not known, unless that was tried just now. Raises nothing."""
        ...


class KnownKeys:
    """What one superpeer says: an answer to GET /v1/keys, checked. Raises Malformed for one that makes no sense."""

    def __init__(self, said: PublicKeys, where: str) -> None:
        keys, revoked = said.size()
        if keys > _MOST_KEYS or revoked > _MOST_REVOKED:
            raise Malformed(f"{where} names {keys} keys and {revoked} revoked tokens")
        self.said = msgspec.structs.replace(said, siblings=())
        self.keys: dict[str, Ed25519PublicKey] = {}
        self.not_before: dict[str, int] = {}
        self.revoked = frozenset(name for part in (said, *said.siblings) for name in part.revoked)
        self.gone: float | None = None
        for each in (key for part in (*said.siblings, said) for key in part.keys):  # of its own keys it knows best
            try:
                key = Ed25519PublicKey.from_public_bytes(base64.b64decode(each.key, validate=True))
            except (binascii.Error, ValueError):
                raise Malformed(f"{where} names something that is no Ed25519 key") from None
            if key_id(key) != each.id:  # or it could speak for somebody else's tokens
                raise Malformed(f"{where} names a key by another id than its own")
            self.keys[each.id] = key
            self.not_before[each.id] = each.not_before

    def check_not_revoked(self, token: Token) -> None:
        """See `KeySource`."""
        if {token.id, token.key} & self.revoked or token.not_before < self.not_before.get(token.key, 0):
            raise TokenRefused("the token was revoked", hint=REVOKED)


Fetch = Callable[[str], Awaitable[PublicKeys]]


class Keys:
    """The keys of the superpeers at `urls()`, asked by `fetch`. `start` it, `close` it. A `KeySource`."""

    def __init__(
        self,
        urls: Callable[[], Iterable[str]],
        fetch: Fetch,
        fallbacks: Fallbacks,
        *,
        own: KeySource | None = None,
        file: Path | None = None,
        keep: float = KEEP,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`own`: keys that need not be asked for (a superpeer's, beside those of its siblings).

        `keep`: seconds that a token may be valid for; `clock` and `wall`: the seconds that pass, and those since 1970.
        """
        self._urls = urls
        self._fetch = fetch
        self._fallbacks = fallbacks
        self._own = own
        self._file = file
        self._keep = keep
        self._clock = clock
        self._wall = wall
        self._known: dict[str, KnownKeys] = {}
        self._loaded = file is None
        self._written = b""
        self._budget, self._budget_at = float(AT_MOST), clock()
        self._asking: asyncio.Task[None] | None = None
        self._every: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Keys({sum(len(known.keys) for known in self._known.values())} of {len(self._known)} superpeers)"

    def start(self) -> None:
        """Begin to ask every minute."""
        self._every = asyncio.create_task(self._keep_asking())

    async def close(self) -> None:
        """Stop asking."""
        tasks = [task for task in (self._every, self._asking) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def find(self, key: str) -> Ed25519PublicKey | None:
        """See `KeySource`."""
        found = self._own.find(key) if self._own else None
        return found or next((known.keys[key] for known in self._known.values() if key in known.keys), None)

    def check_not_revoked(self, token: Token) -> None:
        """See `KeySource`: whoever has the token's key, or knows its id, may revoke it."""
        if self._own:
            self._own.check_not_revoked(token)
        for known in self._known.values():
            known.check_not_revoked(token)
        if self.find(token.key) is None:
            hint = "the node gets a new one from its superpeer by itself; if it does not, look into its log"
            raise TokenRefused("the token was signed with a key that is no longer in use", hint=hint)

    async def ask_for(self, key: str) -> None:
        """See `KeySource`."""
        if self._asking is None:
            now = self._clock()
            self._budget = min(float(AT_MOST), self._budget + (now - self._budget_at) * AT_MOST / WHILE)
            self._budget_at = now
            if self._budget < 1:
                return
            self._budget -= 1
        await self.ask()

    async def ask(self) -> None:
        """Ask all superpeers now; whoever else asks meanwhile waits for the same answers. Raises nothing."""
        if self._asking is None:
            self._asking = asyncio.create_task(self._ask_all())
            self._asking.add_done_callback(self._asked)
        await asyncio.wait([self._asking])

    def _asked(self, task: asyncio.Task[None]) -> None:
        self._asking = None
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("could not ask for keys", why=type(error).__name__)

    async def _ask_all(self) -> None:
        if not self._loaded:
            await self._load()
        # No names: they cannot be found just now, and who was known before may still answer.
        urls = list(dict.fromkeys(self._urls())) or list(self._known)
        answers = await asyncio.gather(*map(self._ask_one, urls))
        now = self._wall()
        known = {url: known for url, known in zip(urls, answers, strict=True) if known is not None}
        for url, before in self._known.items():
            if url not in urls:
                before.gone = before.gone if before.gone is not None and before.gone <= now else now
                if now - before.gone < self._keep and len(known) < _MOST_KNOWN:
                    known[url] = before
        self._known = known
        if self._file is not None:
            await self._save(self._file)

    async def _load(self) -> None:
        assert self._file is not None
        try:
            data = await asyncio.to_thread(self._file.read_bytes)
            for url, word in msgspec.json.decode(data, type=dict[str, _Word]).items():
                known = self._known[url] = KnownKeys(word.said, str(self._file))
                known.gone = word.gone
            self._written = data
        except FileNotFoundError:
            pass
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, DadiError) as error:
            self._fallbacks.note("keys could not be read", f"{self._file}: {type(error).__name__}")
        self._loaded = True

    async def _save(self, file: Path) -> None:
        data = msgspec.json.encode({url: _Word(known.said, known.gone) for url, known in self._known.items()})
        if data == self._written:
            return
        try:
            await asyncio.to_thread(write_durably, file, data)
            self._written = data
        except OSError as error:
            self._fallbacks.note("keys could not be written", f"{file}: {error.strerror}")

    def with_siblings(self, own: PublicKeys) -> PublicKeys:
        """Return an answer to GET /v1/keys with what others have said to us, as much as the limits allow."""
        told = own
        for url, known in self._known.items():
            more = msgspec.structs.replace(told, siblings=(*told.siblings, known.said))
            keys, revoked = more.size()
            if keys <= _MOST_KEYS and revoked <= _MOST_REVOKED:
                told = more
            else:
                self._fallbacks.note("keys of a sibling not passed on", f"{url}: too many")
        return told

    async def _ask_one(self, url: str) -> KnownKeys | None:
        try:
            return KnownKeys(await self._fetch(url), url)  # whoever answers is not gone
        except DadiError as error:
            self._fallbacks.note("keys not renewed, known ones used", f"{url}: {error}")
            return self._known.get(url)

    async def _keep_asking(self) -> None:
        while True:
            await self.ask()
            await asyncio.sleep(EVERY)

    def statistics(self) -> Mapping[str, int]:
        """Return how many keys are known, of how many superpeers, and how many tokens are revoked."""
        known = self._known.values()
        return {
            "keys": sum(len(each.keys) for each in known),
            "superpeers": len(self._known),
            "revoked": sum(len(each.revoked) for each in known),
        }
