"""Who is let in: a request shows a token that names the blobs it wants, or gets nothing.

    headers ──► token's text ──► seen before? ──no──► key known? ──no──► asked for, once (`keys.py`) ──► signature
                                      │                                                                     │
                                      └──────────────► in time? not revoked? names the blob? ◄──────────────┘

Whose signature was right once is not calculated again (an Ed25519 check costs as much as a small read); time and
revocation are looked at each time. The tokens that were seen are remembered by a keyed hash, so that looking one up
takes no time that tells anything of it.
"""

from __future__ import annotations

import hashlib
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from dadi.errors import AccessDenied, TokenRefused
from dadi.peers import token as tokens
from dadi.peers.keys import KeySource
from dadi.peers.token import Token

AUTHORIZATION = "Authorization"
_MOST_SEEN = 4096


class Doorman(Protocol):
    """What a server asks before it serves: a `Gate`, or OPEN."""

    def check(self, headers: Mapping[str, str], *blobs: str) -> None:
        """Raise TokenRefused (401) or AccessDenied (403) unless the headers show a token for all these digests.

        Without a digest any token of ours will do.
        """
        ...

    async def admit(self, headers: Mapping[str, str], *blobs: str) -> None:
        """Do as `check`, and ask for keys first if the token's is not known yet (which may have been made just now)."""
        ...

    def named(self, headers: Mapping[str, str], blobs: Iterable[str]) -> set[str]:
        """Return those of the blobs that the headers show a token for. Raises TokenRefused if they show none."""
        ...

    async def admit_sibling(self, headers: Mapping[str, str]) -> None:
        """Raise TokenRefused (401) unless the headers show a token that no node is given."""
        ...

    def statistics(self) -> dict[str, int]:
        """Return how many were let in and turned away."""
        ...


class Gate:
    """Lets in who has a token. See the head of this file."""

    def __init__(self, keys: KeySource, *, clock: Callable[[], float] = time.time) -> None:
        self.keys = keys
        """Where keys are found; may be replaced by a source that knows more."""
        self._clock = clock
        self._secret = secrets.token_bytes(32)
        self._seen: OrderedDict[bytes, Token] = OrderedDict()
        self._counts: Counter[str] = Counter(admitted=0, refused=0, not_named=0)

    def __repr__(self) -> str:
        return f"Gate({self._counts['admitted']} let in, {self._counts['refused']} refused)"

    def check(self, headers: Mapping[str, str], *blobs: str) -> None:
        """See `Doorman`."""
        self._check(headers, lambda token: tokens.require(token, blobs))

    def _check(self, headers: Mapping[str, str], require: Callable[[Token], None]) -> None:
        try:
            require(self._valid(tokens.bearer(headers.get(AUTHORIZATION))))
        except TokenRefused:
            self._counts["refused"] += 1
            raise
        except AccessDenied:
            self._counts["not_named"] += 1
            raise
        self._counts["admitted"] += 1

    async def admit(self, headers: Mapping[str, str], *blobs: str) -> None:
        """See `Doorman`."""
        await self._ask_for_key(headers)
        self.check(headers, *blobs)

    def named(self, headers: Mapping[str, str], blobs: Iterable[str]) -> set[str]:
        """See `Doorman`."""
        token = self._valid(tokens.bearer(headers.get(AUTHORIZATION)))
        tokens.require(token, ())
        return {blob for blob in blobs if token.opens(blob)}

    async def admit_sibling(self, headers: Mapping[str, str]) -> None:
        """See `Doorman`."""
        await self._ask_for_key(headers)
        self._check(headers, tokens.require_sibling)

    async def _ask_for_key(self, headers: Mapping[str, str]) -> None:
        try:
            key = tokens.parse(tokens.bearer(headers.get(AUTHORIZATION))).key if self._is_new(headers) else ""
        except TokenRefused:
            key = ""  # `check` says what is wrong, and counts it
        if key and self.keys.find(key) is None:
            await self.keys.ask_for(key)

    def _is_new(self, headers: Mapping[str, str]) -> bool:
        return self._hash(tokens.bearer(headers.get(AUTHORIZATION))) not in self._seen

    def _hash(self, text: str) -> bytes:
        return hashlib.blake2b(text.encode(), key=self._secret, digest_size=16).digest()

    def _valid(self, text: str) -> Token:
        """Return a token that one of our keys has signed, that is in time and not revoked."""
        place = self._hash(text)
        token = self._seen.get(place)
        if token is None:
            token = self._seen[place] = tokens.verify(text, self.keys.find)
            if len(self._seen) > _MOST_SEEN:
                self._seen.popitem(last=False)
        else:
            self._seen.move_to_end(place)
        try:
            token.check_time(self._clock())
            self.keys.check_not_revoked(token)
        except TokenRefused:
            del self._seen[place]
            raise
        return token

    def statistics(self) -> dict[str, int]:
        """See `Doorman`."""
        return dict(self._counts)


class _Open:
    """Lets everybody in: where the network itself says who may (`authorization = "open"`)."""

    def __repr__(self) -> str:
        return "OPEN"

    def check(self, headers: Mapping[str, str], *blobs: str) -> None:
        """See `Doorman`."""

    async def admit(self, headers: Mapping[str, str], *blobs: str) -> None:
        """See `Doorman`."""

    def named(self, headers: Mapping[str, str], blobs: Iterable[str]) -> set[str]:
        """See `Doorman`."""
        return set(blobs)

    async def admit_sibling(self, headers: Mapping[str, str]) -> None:
        """See `Doorman`."""

    def statistics(self) -> dict[str, int]:
        """See `Doorman`."""
        return {}


OPEN: Doorman = _Open()
