"""The answer to one HTTP request: its body, bounded, or the error that its status means."""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses

import aiohttp
import msgspec

from dadi import digest as digests
from dadi.errors import AccessDenied, DadiError, InvalidRequest, Malformed, NotFound, TooLarge, Unavailable
from dadi.oci.retry import Clock, parse_retry_after

_MAX_ERROR = 64 << 10
"""Bytes of an error's body that are read, for what the registry has to say."""
_SLOWEST = 1 << 10
"""Bytes a second: a body that comes more slowly stands still, whatever trickles; another connection may not."""


@dataclasses.dataclass(slots=True)
class Counters:
    """What the client has done since it was made."""

    requests: int = 0
    bytes: int = 0
    redirects: int = 0
    tokens: int = 0
    retries: int = 0
    resumed: int = 0
    mirror_failures: int = 0


class _Problem(msgspec.Struct):
    code: str = ""
    message: str = ""


class _Problems(msgspec.Struct):
    errors: list[_Problem] = []


class Answer:
    """The answer to a request: status and headers at once, the body as it comes. Valid while its `open` is."""

    def __init__(
        self,
        response: aiohttp.ClientResponse,
        url: str,
        host: str,
        at_home: bool,
        counters: Counters,
        clock: Clock,
        patience: float,
    ) -> None:
        """`patience`: seconds of waiting after which what has come meanwhile is looked at."""
        self._patience = patience
        self._waited, self._came = 0.0, 0
        self._response = response
        self._counters = counters
        self._clock = clock
        self.status = response.status
        self.headers = response.headers
        self.url = url
        """What a relative Location is relative to. It may hold credentials: never to be shown."""
        self.host = host
        """Who answered, after redirects."""
        self.at_home = at_home
        """Whether that is the origin that was asked; only its challenges are answered with credentials."""
        self.said = ""
        """The registry's own words, once `error` was asked for."""

    @property
    def length(self) -> int | None:
        """Bytes of the body as announced."""
        return self._response.content_length

    @property
    def digest(self) -> str | None:
        """The digest that the registry gives for the content, None if it gives none that we can check."""
        try:
            return digests.parse(self.headers.get("Docker-Content-Digest", ""))
        except InvalidRequest:
            return None

    async def piece(self) -> bytes:
        """Return the next piece of the body, as large as the socket gave since the last one; b"" at the end.

        Raises Unavailable if it trickles. Only waiting counts: that a reader takes its time is not its fault.
        """
        began = self._clock.monotonic()
        piece = await self._response.content.readany()
        self._counters.bytes += len(piece)
        self._waited += self._clock.monotonic() - began
        self._came += len(piece)
        if self._waited >= self._patience:
            if piece and self._came < _SLOWEST * self._waited:
                told = f"{self.host} sent {self._came} bytes in {self._waited:.0f} s"
                raise Unavailable(told, hint="too slow: it is asked anew")
            self._waited, self._came = 0.0, 0
        return piece

    async def body(self, limit: int, what: str) -> bytes:
        """Return the whole body; raise TooLarge if it has more than `limit` bytes."""
        if (self.length or 0) > limit:
            raise TooLarge(f"{what} from {self.host} has {self.length} bytes; the limit is {limit}")
        parts: list[bytes] = []
        size = 0
        while piece := await self.piece():
            size += len(piece)
            if size > limit:
                raise TooLarge(f"{what} from {self.host} has more than {limit} bytes")
            parts.append(piece)
        return b"".join(parts)

    async def error(self, what: str, registry: str) -> DadiError:
        """Return the error that a status other than the expected one means for `what`, asked of `registry`."""
        self.said = await self._said()
        sentence = f"{what}: {self.host} answers {self.status}{f' ({self.said})' if self.said else ''}"
        if self.status in (401, 403) and not self.at_home:
            # A signed link that has run out: asking the registry again gives a new one.
            return Unavailable(f"{what}: {self.host}, to which the registry redirects, answers {self.status}")
        if self.status in (401, 403, 451):
            hint = f"log in to it with `docker login {registry}`, or check that the name is right"
            return AccessDenied(sentence, hint=hint)
        if self.status in (404, 410):
            return NotFound(sentence, hint="is the name right, and is it still there?")
        if self.status in (408, 425, 429) or self.status >= 500:
            after = parse_retry_after(self.headers.get("Retry-After"), self._clock.wall())
            return Unavailable(sentence, retry_after=after)
        if self.status == 400:
            return InvalidRequest(sentence)
        return Malformed(sentence)

    async def _said(self) -> str:
        """Return the registry's own words from an error body (OCI distribution specification, "Error Codes")."""
        try:
            problems = msgspec.json.decode(await self.body(_MAX_ERROR, "an error"), type=_Problems).errors
        except (DadiError, aiohttp.ClientError, OSError, TimeoutError, msgspec.MsgspecError, UnicodeDecodeError,
                RecursionError):  # fmt: skip
            return ""
        text = "; ".join(f"{problem.code} {problem.message}".strip() for problem in problems[:3])
        clean = "".join(character if character.isprintable() else " " for character in text)
        return "" if _repeats(clean, self._response.request_info.headers.get("Authorization", "")) else clean[:200]


def _repeats(text: str, authorization: str) -> bool:
    """Whether a registry's words have what it was shown in them: they go into logs and errors."""
    value = authorization.partition(" ")[2]
    secrets = [value]
    with contextlib.suppress(binascii.Error, ValueError):
        secrets.append(base64.b64decode(value, validate=True).decode().partition(":")[2])
    return any(secret in text for secret in secrets if secret)
