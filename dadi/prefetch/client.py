"""Startup traces, as a node asks superpeers for them and tells what it saw: the HTTP of `superpeer/traces_http.py`.

Asked is whoever is responsible for the image's manifest (`dadi/peers/superpeers.py`), then those that stand in for him.
What is shown is the token of the image, which names its manifest too.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol, TypeVar

from dadi import http
from dadi.errors import Malformed, TokenRefused
from dadi.peers.superpeer import SuperpeerClient
from dadi.prefetch import trace
from dadi.prefetch.trace import Given, Message

T = TypeVar("T")
RECORDINGS = "Dadi-Recordings"
"""A header of the superpeer's answers: ENOUGH if it wants no recording of this image now, or has not taken this one."""
ENOUGH = "enough"


class TraceKeeper(Protocol):
    """Who keeps traces: superpeers, or the one that is embedded. All raise what superpeers say; Unavailable."""

    async def fetch(self, manifest: str) -> Given:
        """Return the encoded trace of an image, b"" if there is none; and whether this start is to be told of."""
        ...

    async def send(self, message: Message) -> bool:
        """Tell what was seen; return False if there are enough recordings of these minutes without it."""
        ...

    async def clear(self, manifest: str) -> None:
        """Have what was learnt of an image forgotten."""
        ...


class TraceClient:
    """See `TraceKeeper`."""

    def __init__(self, client: SuperpeerClient) -> None:
        self._client = client

    async def fetch(self, manifest: str) -> Given:
        """See `TraceKeeper`."""

        async def one(url: str, headers: dict[str, str]) -> Given:
            data = bytearray()
            async with http.request(
                self._client.session, "GET", f"{url}/v1/traces", "asking for a startup trace",
                params={"manifest": manifest}, headers=headers,
            ) as response:  # fmt: skip
                async for piece in response.content.iter_any():
                    data += piece
                    if len(data) > trace.MAX_SIZE:
                        raise Malformed(f"{url} gives a startup trace of more than {trace.MAX_SIZE} bytes")
                return Given(bytes(data), response.headers.get(RECORDINGS) != ENOUGH)

        return await self._ask(manifest, one)

    async def send(self, message: Message) -> bool:
        """See `TraceKeeper`."""
        body = trace.encode(message)

        async def one(url: str, headers: dict[str, str]) -> bool:
            what = "telling a startup trace"
            async with http.request(
                self._client.session, "POST", f"{url}/v1/traces", what, data=body, headers=headers
            ) as response:
                return response.headers.get(RECORDINGS) != ENOUGH

        return await self._ask(message.manifest, one)

    async def clear(self, manifest: str) -> None:
        """See `TraceKeeper`."""

        async def one(url: str, headers: dict[str, str]) -> None:
            async with http.request(
                self._client.session, "DELETE", f"{url}/v1/traces", "clearing a startup trace",
                params={"manifest": manifest}, headers=headers,
            ):  # fmt: skip
                return

        await self._ask(manifest, one)

    async def _ask(self, manifest: str, one: Callable[[str, dict[str, str]], Awaitable[T]]) -> T:
        tokens = self._client.tokens

        async def asked(url: str) -> T:
            shown = tokens.text(manifest)
            try:
                return await one(url, tokens.headers(manifest))
            except TokenRefused:
                if not await tokens.renewed(manifest, shown):
                    raise
            return await one(url, tokens.headers(manifest))

        return await self._client.ask(manifest, asked)
