"""Does a superpeer that says nothing have much to do, or does it hang? It is asked beside a request that takes long.

    a request ── `SILENT` s ──► GET /healthz ── answered within `PATIENCE` s ──► it waits on, and looks again
                                             └─ not answered ──► Unreachable: somebody else can be asked

A first byte may take minutes: a layer is streamed from its registry. A process that is stopped, or starved, takes
connections and requests all the same, by its kernel; without this each request would wait for all of `read.stall`.
Requests to one superpeer share one look. One that was away is looked at before it is asked anything (`first`): only an
answer at once counts. Where nobody else can be asked, `looks` in a row must fail: it may have much to do. Peers need
none of this: they say that they wait (`tries.py`).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import aiohttp

from dadi import http
from dadi.errors import DadiError, Unreachable
from dadi.tls import Tls

SILENT = 0.5
"""Seconds that a request takes before the first look, and between two."""
PATIENCE = 1.5
"""Seconds that the answer to a look may take; a busy event loop has its share of that."""
AT_ONCE = 0.3
"""Seconds that a look may take where somebody else can be asked meanwhile."""


class Hanging:
    """See the head of this file. Make it on the event loop; `close` it."""

    def __init__(self, tls: Tls | None = None) -> None:
        # Connections of its own: those of the requests may all be in use, by requests that wait.
        self._session = http.client(connect=PATIENCE, read=PATIENCE, tls=tls)
        self._looks: dict[str, asyncio.Task[bool]] = {}

    @contextlib.asynccontextmanager
    async def watched(self, url: str, *, first: bool = False, looks: int = 1) -> AsyncIterator[None]:
        """Around a request to a superpeer; raises Unreachable inside once it is known to hang.

        `first`: look before; raises Unreachable at once unless it is well. `looks`: after so many without an answer.
        """
        loop = asyncio.get_running_loop()
        if first:
            look = self._look(url)
            await asyncio.wait((look,), timeout=AT_ONCE)
            if not look.done() or look.cancelled() or not look.result():
                raise Unreachable(f"{url} did not answer a moment ago, and still does not")
        watch: asyncio.Task[None] | None = None
        limit = asyncio.timeout(None)

        def begin() -> None:
            nonlocal watch
            watch = loop.create_task(self._watch(url, limit, looks))

        timer = loop.call_later(SILENT, begin)
        try:
            async with limit:
                yield
        except TimeoutError:
            if not limit.expired():
                raise
            text = f"{url} hangs: it takes requests, and does not answer whether it is well for {PATIENCE:g} s"
            raise Unreachable(text, hint="is its process stopped, or its machine out of memory?") from None
        finally:
            timer.cancel()
            if watch is not None:
                watch.cancel()

    async def _watch(self, url: str, limit: asyncio.Timeout, looks: int) -> None:
        silent = 0
        while True:
            silent = 0 if await asyncio.shield(self._look(url)) else silent + 1
            if silent >= looks:
                limit.reschedule(asyncio.get_running_loop().time())
                return
            await asyncio.sleep(SILENT)

    def _look(self, url: str) -> asyncio.Task[bool]:
        look = self._looks.get(url)
        if look is None:
            look = self._looks[url] = asyncio.create_task(self._answers(url))
            look.add_done_callback(lambda done: self._looks.pop(url, None))
        return look

    async def _answers(self, url: str) -> bool:
        timeout = aiohttp.ClientTimeout(total=PATIENCE)
        try:
            async with http.request(self._session, "GET", f"{url}/healthz", "is it well", timeout=timeout):
                return True
        except Unreachable:
            return False
        except DadiError:
            return True  # whatever it says, it is there

    async def close(self) -> None:
        """Break off looks under way, let go of connections."""
        looks = list(self._looks.values())
        for look in looks:
            look.cancel()
        await asyncio.gather(*looks, return_exceptions=True)
        await self._session.close()
