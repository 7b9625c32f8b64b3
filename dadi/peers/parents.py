"""The node's upstream: its parents in the blob's tree, then the superpeers. A `Source` of verified chunks.

    read ──► wait (2 s at most) for the blob's place ──► a flight for each chunk (`asking.py`) ──► chunks

Of one another the parts know this: `membership.py` joins and beats, `asking.py` drives the choice of whom to ask,
`pipe.py` sends to one upstream, `line.py` is one request, `server.py` answers those of others. Without peers
(`join=False`) it asks superpeers only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any

import aiohttp

from dadi.blobs.source import Urgency
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.peers.asking import Asking
from dadi.peers.frames import Frames
from dadi.peers.health import Health
from dadi.peers.hops import HOPS
from dadi.peers.lanes import Wish
from dadi.peers.line import HttpLine, Line
from dadi.peers.membership import Condition, JoiningDirectory, Membership, well
from dadi.peers.patience import PEER_READ
from dadi.peers.places import Peer
from dadi.peers.tokens import Tokens


class Parents:
    """See the head of this file. Make it on the event loop; `start`, then `close`."""

    name = "parents"

    def __init__(self, peer: Peer, directory: JoiningDirectory, order: Callable[[str], Sequence[str]],
                 session: aiohttp.ClientSession, health: Health, frames: Frames, fallbacks: Fallbacks, *,
                 in_use: Callable[[], Iterable[Blob]], present: Callable[[Blob], tuple[int, bool]],
                 condition: Callable[[], Awaitable[Condition]] = well, compress: bool = True, scheme: str = "http",
                 tokens: Tokens | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        """`order` gives a blob's superpeers (URLs), the owner first; `tokens` what requests show.

        `in_use`, `present`, `condition`: see `Membership`.
        """
        self.peer = peer
        self.frames = frames
        self.health = health
        self._fallbacks = fallbacks
        self._session = session
        self._compress = compress
        self._scheme = scheme
        self._tokens = tokens
        self._clock = clock
        self.asking = Asking(self._ordered(order), self._line, health, frames, fallbacks, clock=clock,
                             on_drops=self._again, on_lacks=self._lacks)  # fmt: skip
        self.membership = Membership(peer, directory, self.asking, fallbacks, in_use=in_use, present=present,
                                     condition=condition, clock=clock)  # fmt: skip
        self._unplaced: set[Wish] = set()
        """Chunks that wait for their blob's place, and are not in flight yet."""
        self._rates: dict[str, tuple[float, int, float]] = {}

    def __repr__(self) -> str:
        return f"Parents({self.asking!r}, {self.membership!r})"

    def start(self) -> None:
        """Begin to join what is expected."""
        self.membership.start()

    async def close(self) -> None:
        """Leave the trees, cancel what is in flight."""
        await self.membership.close()
        await self.asking.close()

    def expect(self, blobs: Iterable[Blob]) -> None:
        """An image with these blobs is being mounted."""
        self.membership.expect(blobs)

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run."""
        if not chunks:
            return []
        hops = HOPS.get()
        wishes = [Wish(blob, chunk, urgency, hops) for chunk in chunks]
        self._unplaced.update(wishes)
        try:
            await self.membership.placed(blob.digest)
        finally:
            self._unplaced.difference_update(wishes)
        flights = [self.asking.want(blob, wish.chunk, wish.urgency, hops) for wish in wishes]
        if len(flights) == 1:  # the way of nearly all: `gather` would cost two turns of the event loop
            return [await asyncio.shield(flights[0])]
        return list(await asyncio.gather(*map(asyncio.shield, flights)))

    def hurry(self, blob: Blob, chunks: range, urgency: Urgency) -> None:
        """Somebody more urgent waits for chunks that may be in flight."""
        for wish in self._unplaced:
            same = wish.blob.digest == blob.digest and wish.blob.table.chunk_size == blob.table.chunk_size
            if same and wish.chunk in chunks:
                wish.urgency = min(wish.urgency, urgency)
        for chunk in chunks:
            self.asking.hurry(blob, chunk, urgency)

    def parent_of(self, digest: str) -> str:
        """Return the id of the first parent of a blob that may be asked; "" if there is none."""
        chooser = self.asking.choosers.get(digest)
        now = self._clock()
        parents = chooser.parents if chooser else ()
        return next((parent for parent in parents if self.health.may_ask(parent, now)), "")

    # ---- how

    def _ordered(self, order: Callable[[str], Sequence[str]]) -> Callable[[str], Sequence[str]]:
        def ordered(digest: str) -> Sequence[str]:
            names = order(digest)
            self.health.trust(names)
            return names

        return ordered

    def _line(self, upstream: str) -> Line:
        is_peer = upstream in self.membership.addresses

        def url() -> str:
            # Looked up each time: a peer may come back at another port.
            return f"{self._scheme}://{self.membership.addresses.get(upstream, '')}" if is_peer else upstream

        return HttpLine(url, self._session, me=self.peer.id, compress=self._compress, tokens=self._tokens,
                        read=PEER_READ if is_peer else None)  # fmt: skip

    def _again(self, digests: list[str]) -> None:
        self.membership.again(digests)

    def _lacks(self, digest: str, peer: str) -> None:
        self.membership.lacks(digest, peer)

    # ---- what it looks like

    def statistics(self) -> dict[str, Any]:
        """Return counts; bytes by kind of upstream, in `asking`; a row for each upstream, in `upstreams`."""
        now = self._clock()
        first = {place.parents[0].id for place in self.membership.places.values() if place.parents}
        return {
            "id": self.peer.id,
            "address": self.peer.address,
            "membership": self.membership.statistics(),
            "asking": self.asking.statistics(),
            "parents": sorted(first),
            "upstreams": [self._row(name, now) for name in self.asking.pipes],
            "liars": self.health.liars(),
        }

    def _row(self, name: str, now: float) -> dict[str, Any]:
        pipe = self.asking.pipes[name]
        address = self.membership.addresses.get(name)
        return {
            "name": name, "kind": "peer" if address else "superpeer", "address": address or "",
            "state": self.health.state(name, now).value, "bytes": pipe.bytes, "wire_bytes": pipe.line.wire_bytes,
            "requests": pipe.requests, "wrong": pipe.wrong,
            "wasted_bytes": pipe.wasted_bytes, "rate": self._rate(name, pipe.bytes, now),
        }  # fmt: skip

    def _rate(self, name: str, total: int, now: float) -> float:
        """Return bytes a second since the last look, if that was some time ago; else what it was then."""
        at, before, rate = self._rates.get(name, (now, total, 0.0))
        if now - at >= 1.0 or name not in self._rates:
            rate = (total - before) / (now - at) if now > at else 0.0
            self._rates[name] = (now, total, rate)
        return rate
