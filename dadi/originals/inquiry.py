"""Questions about originals: to the superpeer that is responsible, or to who stands in; none waits for one that hangs.

    cannot be reached, or hangs       the next one is asked, and it is away for a while (`Superpeers`)
    is wrong by what it sends         away for a while; the error goes to who asked
    says that its registry was wrong  it has answered: that is no reason to ask a stand-in, which would ask the same
    cuts off what it has begun        the same: it says so of what its registry sent

Where nobody else can be asked, `_LOOKS` looks in a row must show that it hangs: it may have much to do. An engine that
is told so goes to the registry by itself: it need not wait as long as a read of a container does.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator

import aiohttp

from dadi import http
from dadi.errors import DigestMismatch, Unreachable
from dadi.fallbacks import Fallbacks
from dadi.originals.caller import Caller
from dadi.peers.hanging import Hanging
from dadi.peers.health import Event, State
from dadi.peers.shown import HEADER
from dadi.peers.superpeers import Superpeers
from dadi.tls import Tls

_LOOKS = 3
_LEAST = 20.0
"""Seconds without a byte until a superpeer that is well is given up, whatever is configured: it waits for its registry
for almost as long (`away.py`), and says so then."""


class Inquiry:
    """See the head of this file. `session` and `known` are closed by who made them."""

    def __init__(self, known: Superpeers, session: aiohttp.ClientSession, fallbacks: Fallbacks,
                 tls: Tls | None) -> None:  # fmt: skip
        self._known = known
        self._session = session
        self._fallbacks = fallbacks
        self._hanging = Hanging(tls)
        timeout = session.timeout
        read = max(timeout.sock_read, _LEAST) if timeout.sock_read else None
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=timeout.sock_connect, sock_read=read)

    def __repr__(self) -> str:
        return f"Inquiry({self._known!r})"

    @contextlib.asynccontextmanager
    async def ask(self, key: str, path: str, parameters: dict[str, str], caller: Caller,
                  headers: dict[str, str] | None = None, *, first: int = 0
                  ) -> AsyncIterator[aiohttp.ClientResponse]:  # fmt: skip
        """Ask the superpeer that owns `key`, or who stands in for it; `first`: begin so many places later.

        Raises what it says; Unreachable if nobody answers.
        """
        sent = dict(headers or {})
        if caller.authorization:
            sent[HEADER] = caller.authorization
        await self._known.ready()
        urls = self._known.to_ask(key)
        urls = urls[first % len(urls) :] + urls[: first % len(urls)]
        for url in urls:
            request = http.request(self._session, "GET", url + path, f"asking for {key}", params=parameters,
                                   headers=sent, timeout=self._timeout)  # fmt: skip
            async with contextlib.AsyncExitStack() as held:
                try:
                    response = await self._begun(url, request, held, last=url == urls[-1])
                except Unreachable as error:
                    if url == urls[-1]:
                        raise
                    self._fallbacks.note("superpeer passed over", f"{url}: {error}")
                    continue
                try:
                    yield response
                except (Unreachable, DigestMismatch):  # that it has cut something off is neither, here
                    self._known.health.happened(url, Event.FAILED, self._known.clock())
                    raise
                return

    async def _begun(self, url: str, request: contextlib.AbstractAsyncContextManager[aiohttp.ClientResponse],
                     held: contextlib.AsyncExitStack, *, last: bool) -> aiohttp.ClientResponse:  # fmt: skip
        well = self._known.state(url) == State.GOOD.value
        async with self._known.asking(url):
            looks = _LOOKS if last and well else 1
            async with self._hanging.watched(url, first=not (well or last), looks=looks):
                try:
                    return await held.enter_async_context(request)
                except DigestMismatch as error:
                    wrong = error
        raise wrong

    async def piece(self, response: aiohttp.ClientResponse) -> bytes:
        """Return the next bytes of an answer, none at its end. Watched one by one: who takes them has time."""
        async with self.watched(response):
            return await response.content.readany()

    def watched(self, response: aiohttp.ClientResponse) -> contextlib.AbstractAsyncContextManager[None]:
        """Around reading of an answer: raises Unreachable inside once the superpeer is known to hang."""
        looks = 1 if len(self._known.names) > 1 else _LOOKS
        return self._hanging.watched(str(response.url.origin()), looks=looks)

    async def close(self) -> None:
        """Break off looks that are under way."""
        await self._hanging.close()
