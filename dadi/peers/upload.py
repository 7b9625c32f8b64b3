"""How much a node gives to others: a rate, a number of children, demand before backfill.

    take(size) ──► now | after the time that the rate asks for | Unavailable with the seconds to wait, if too long

Children are counted by the addresses that they come from: an id costs nothing. One that was not heard of for
`_CHILD_FOR` has gone. Nobody has more than `_MOST_ASKED` bytes under way, nor more than that being fetched for him; all
together no more than `_MOST_IN_ALL`. That bounds the memory that who asks and does not read can hold. Of two that are
being sent to, who has a program waiting goes first: backfill waits for as long as demand is being sent, a moment at
most, so that it goes on all the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import lru_cache

from dadi.errors import Unavailable

_CHILD_FOR = 10.0
_LONGEST_WAIT = 1.0
_MOST_ASKED, _MOST_IN_ALL = 128 << 20, 512 << 20
"""Bytes. A node that keeps to `lanes.py` asks one parent for half as much at most, in chunks of 1 MiB."""
_ASIDE = 0.2
"""Seconds for which backfill stands aside for demand, at most."""
_BURST = 0.1
"""Seconds' worth of the rate that may go at once."""


class Upload:
    """`rate`: bytes a second, 0 for no limit. `children`: how many are served at a time, 0 for any number."""

    def __init__(self, *, rate: int, children: int, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:  # fmt: skip
        self.rate = rate
        self.most = children
        self.bytes = 0
        self.refused = 0
        self._clock = clock
        self._sleep = sleep
        self._free_at = 0.0
        self._children: dict[str, tuple[float, str]] = {}
        self._asked: Counter[str] = Counter()
        self._fetched: Counter[str] = Counter()
        self._urgent = 0
        self._no_urgent = asyncio.Event()
        self._no_urgent.set()
        self._looked_at, self._looked_bytes = clock(), 0

    def __repr__(self) -> str:
        return f"Upload({len(self.children())} children, {self.bytes} bytes)"

    def children(self) -> list[str]:
        """Return the ids of those that were served lately."""
        since = self._clock() - _CHILD_FOR
        self._children = {child: seen for child, seen in self._children.items() if seen[0] > since}
        return [name for _, name in self._children.values()]

    def admit(self, child: str, name: str = "") -> None:
        """Count a request of a child (`child_of`); raise Unavailable (retry_after) if there are too many others."""
        if child not in self._children and len(self.children()) >= self.most > 0:
            self.refused += 1
            raise Unavailable(f"{self.most} nodes are served here already", retry_after=_CHILD_FOR / 2)
        self._children[child] = self._clock(), name or child

    @contextlib.contextmanager
    def asked(self, child: str, size: int) -> Iterator[None]:
        """Around a request of a child for `size` bytes; raises Unavailable if too much is under way to it or to all."""
        give_back = self._take(self._asked, child, size)
        try:
            yield
        finally:
            give_back()

    def fetched(self, child: str, size: int) -> Callable[[], None]:
        """Count bytes that are to be fetched for a child; return what ends that. Raises as `asked` does."""
        return self._take(self._fetched, child, size)

    def _take(self, counts: Counter[str], child: str, size: int) -> Callable[[], None]:
        mine, total = counts[child], counts.total()
        if (mine and mine + size > _MOST_ASKED) or (total and total + size > _MOST_IN_ALL):
            self.refused += 1
            raise Unavailable("too much is under way from here already", retry_after=_LONGEST_WAIT)
        counts[child] += size

        def give_back() -> None:
            counts[child] -= size
            if not counts[child]:
                del counts[child]

        return give_back

    @property
    def full(self) -> bool:
        """Are there as many children as are allowed?"""
        return bool(self.most) and len(self.children()) >= self.most

    @contextlib.asynccontextmanager
    async def sending(self, size: int, urgent: bool) -> AsyncIterator[None]:
        """Around the sending of `size` bytes: waits for its turn. Raises Unavailable if that would take too long."""
        await self._keep_to_rate(size)
        if not urgent and self._urgent:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ASIDE):
                    await self._no_urgent.wait()
        self._urgent += urgent
        if urgent:
            self._no_urgent.clear()
        try:
            yield
            self.bytes += size
        finally:
            self._urgent -= urgent
            if not self._urgent:
                self._no_urgent.set()

    async def _keep_to_rate(self, size: int) -> None:
        if not self.rate:
            return
        now = self._clock()
        wait = self._free_at - now
        if wait > _LONGEST_WAIT:
            self.refused += 1
            raise Unavailable("the rate at which this node gives is used up", retry_after=wait)
        self._free_at = max(self._free_at, now - _BURST) + size / self.rate
        if wait > 0:
            await self._sleep(wait)

    def load(self, capacity: float) -> float:
        """Return the share of `rate` (of `capacity`, bytes a second, if there is none) in use since the last look."""
        now = self._clock()
        seconds, sent = now - self._looked_at, self.bytes - self._looked_bytes
        self._looked_at, self._looked_bytes = now, self.bytes
        limit = self.rate or capacity
        return sent / seconds / limit if seconds > 0 and limit else 0.0


@lru_cache(1024)  # asked for each request, of a few
def child_of(remote: str | None, name: str) -> str:
    """Return what a child is counted by: its address, of IPv6 the network; on this machine the id that it gives."""
    try:
        ip = ipaddress.ip_address(remote or "")
    except ValueError:
        return name or str(remote)
    ip = (ip.ipv4_mapped or ip) if isinstance(ip, ipaddress.IPv6Address) else ip
    if ip.is_loopback:
        return name or str(ip)
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network((ip, 64), strict=False))
