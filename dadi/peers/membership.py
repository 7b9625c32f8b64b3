"""A node's part in the trees of its blobs: joining, heartbeats, leaving. What comes of it goes to the choosers.

    expect ──► join, all blobs of one moment in one request ──► places ──► Asking.learn
    the directory takes no more joins now ──► join again when it said; known parents stay
    a parent cannot be asked any more, or lacks the blob ──► join again, without it
    every heartbeat: which blobs there are, how much of each; new places come back
    a blob that is not in use any more is left out of the heartbeat: that ends its membership

Nobody waits long for a place: a read that finds none after `_PATIENCE` goes to the superpeer meanwhile, and is counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec
import structlog

from dadi.errors import DadiError
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.peers.asking import Asking
from dadi.peers.places import Fault, Heartbeat, Peer, Place, Told, is_loopback, is_unspecified

log = structlog.get_logger()
_ADDRESS = re.compile(r"([A-Za-z0-9._-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\]):[0-9]{1,5}")
_PATIENCE = 2.0
"""Seconds. A superpeer that takes long to give places has much to do: reads of it would make that longer still."""
_GATHER = 0.05
"""Seconds for which blobs whose parents have failed are gathered: one dead parent is the parent of many blobs."""
_YOUNG = 60.0
"""Seconds for which a blob is kept that was expected and is not in use (yet, or any more)."""
_WITHOUT_FOR = 60.0


class JoiningDirectory(Protocol):
    """What of `grouped.GroupedDirectory` is needed here; a `directory_client.DirectoryClient` has it, too."""

    waits: dict[str, float]
    """Blobs of the last join that are to be joined later, and in how many seconds."""

    @property
    def heartbeat_every(self) -> float:
        """Seconds."""
        ...

    async def join(self, peer: Peer, blobs: Sequence[str], without: Iterable[str] = (),
                   reports: Iterable[tuple[str, Fault]] = ()) -> dict[str, Place]:  # fmt: skip
        """Return the node's places."""
        ...

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Place]:
        """Return the places that have changed."""
        ...

    async def leave(self) -> None:
        """Give up everything."""
        ...


class Condition(msgspec.Struct, frozen=True):
    """How a node does: see `Heartbeat`."""

    load: float = 0.0
    refuses: bool = False


async def well() -> Condition:
    """Return that a node has nothing to complain of."""
    return Condition()


class Membership:
    """See the head of this file."""

    def __init__(self, peer: Peer, directory: JoiningDirectory, asking: Asking, fallbacks: Fallbacks, *,
                 in_use: Callable[[], Iterable[Blob]], present: Callable[[Blob], tuple[int, bool]],
                 condition: Callable[[], Awaitable[Condition]] = well,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        """`in_use`: the blobs that are mounted; `present`: how many chunks of one are here, and whether it is whole."""
        self.peer = peer
        self.places: dict[str, Place] = {}
        self.blobs: dict[str, Blob] = {}
        """Those that were expected, by digest, whether they have a place or not."""
        self.addresses: dict[str, str] = {}
        """Of parents, by id, as superpeers have given them."""
        self.late = 0
        """Reads that went to the superpeer since no place had come in time."""
        self._directory = directory
        self._asking = asking
        self._fallbacks = fallbacks
        self._in_use = in_use
        self._present = present
        self._condition = condition
        self._clock = clock
        self._expected_at: dict[str, float] = {}
        self._joined: dict[str, asyncio.Event] = {}
        self._to_join: dict[str, None] = {}
        self._later: dict[str, asyncio.TimerHandle] = {}
        """Blobs that the directory wants to be asked about later."""
        self._without: dict[tuple[str, str], float] = {}
        """(blob, peer) → until when a peer that lacks a blob is not wanted as its parent."""
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    def __repr__(self) -> str:
        return f"Membership({self.peer.id}: {len(self.places)} of {len(self.blobs)} blobs have a place)"

    def start(self) -> None:
        """Begin to join and to beat."""
        self._tasks = [asyncio.create_task(self._joining()), asyncio.create_task(self._beating())]

    async def close(self) -> None:
        """Leave everything."""
        for timer in self._later.values():
            timer.cancel()
        self._later.clear()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._tasks:
            self._tasks = []
            with contextlib.suppress(DadiError, TimeoutError):
                async with asyncio.timeout(2.0):
                    await self._directory.leave()

    # ---- what others say

    def expect(self, blobs: Iterable[Blob]) -> None:
        """These are about to be read: join them, in one request."""
        now = self._clock()
        for blob in blobs:
            self._expected_at[blob.digest] = now
            if blob.digest not in self.blobs:
                self.blobs[blob.digest] = blob
                self._joined[blob.digest] = asyncio.Event()
                self._to_join[blob.digest] = None
                self._wake.set()

    def again(self, digests: Iterable[str]) -> None:
        """The parents of these blobs cannot all be asked any more: get others."""
        mine = [digest for digest in digests if digest in self.places]
        self._to_join.update(dict.fromkeys(mine))
        if mine:
            self._wake.set()

    def lacks(self, digest: str, peer: str) -> None:
        """A parent has a blob no more."""
        self._without[digest, peer] = self._clock() + _WITHOUT_FOR
        self.again([digest])

    async def placed(self, digest: str) -> None:
        """Return when the blob has its place, it is clear that it gets none now, or it was waited for long enough."""
        joined = self._joined.get(digest)
        if joined is None or joined.is_set():
            return
        left = self._expected_at[digest] + _PATIENCE - self._clock()
        if left > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left):
                    await joined.wait()
        if not joined.is_set():
            self.late += 1
            self._fallbacks.note("no parents in time, superpeer read", digest)

    # ---- joining

    async def _joining(self) -> None:
        while True:
            await self._wake.wait()
            if all(digest in self.places for digest in self._to_join):
                await asyncio.sleep(_GATHER)
            self._wake.clear()
            digests = [digest for digest in self._to_join if digest in self.blobs]
            self._to_join.clear()
            if digests:
                await self._join(digests)

    async def _join(self, digests: list[str]) -> None:
        now = self._clock()
        health = self._asking.health
        without = set(health.unwanted(now))
        without |= {peer for (blob, peer), until in self._without.items() if blob in digests and until > now}
        try:
            places = await self._directory.join(self.peer, digests, sorted(without), health.reports())
            self._learn(places)
        except DadiError as error:
            self._fallbacks.note("join failed", str(error))
        except Exception as error:  # a mistake of ours must not end it for all blobs
            log.exception("joining failed")
            self._fallbacks.note("join failed", repr(error))
        for digest in digests:
            if (wait := self._directory.waits.get(digest)) is not None:
                self._join_later(digest, wait)
            if (joined := self._joined.get(digest)) is not None:
                joined.set()

    def _join_later(self, digest: str, seconds: float) -> None:
        def due() -> None:
            del self._later[digest]
            if digest in self.blobs:
                self._to_join[digest] = None
                self._wake.set()

        if digest not in self._later:
            self._later[digest] = asyncio.get_running_loop().call_later(seconds, due)

    def _learn(self, places: dict[str, Place]) -> None:
        now = self._clock()
        for digest, place in places.items():
            if digest not in self.blobs:
                continue
            lacking = {peer for (blob, peer), until in self._without.items() if blob == digest and until > now}
            parents = tuple(p for p in place.parents if p.id not in lacking and self._usable(p))
            self.addresses.update((parent.id, parent.address) for parent in parents)
            self.places[digest] = place = msgspec.structs.replace(place, parents=parents)
            self._asking.learn(digest, place)

    def _usable(self, peer: Peer) -> bool:
        # Superpeers are known by their URLs, and trusted: no peer may go by such a name.
        named = _ADDRESS.fullmatch(peer.address) is not None and peer.id != self.peer.id and "://" not in peer.id
        return named and not self._leads_here(peer.address)

    def _leads_here(self, address: str) -> bool:
        """Would who asks there ask this node itself? It would wait for itself, for ever."""
        own = self.peer.address
        if is_unspecified(address) or address == own:
            return True
        if not is_loopback(address):
            return False
        if not own or is_unspecified(own):  # with superpeers on this machine others here are at loopback addresses too
            return address.rpartition(":")[2] == own.rpartition(":")[2]
        return not is_loopback(own)

    # ---- heartbeats

    async def _beating(self) -> None:
        while True:
            every = self._directory.heartbeat_every
            await asyncio.sleep(every * random.uniform(0.9, 1.0))
            try:
                await self.beat()
            except DadiError as error:
                self._fallbacks.note("heartbeat failed", str(error))
            except Exception as error:  # see `_join`
                log.exception("heartbeat failed")
                self._fallbacks.note("heartbeat failed", repr(error))

    async def beat(self) -> None:
        """Look at what is in use, say so, and take in what has changed."""
        self._look_at_use()
        told = []
        for digest, place in self.places.items():
            chunks, complete = self._present(self.blobs[digest])
            parents = tuple(parent.id for parent in place.parents)
            told.append(Told(digest, place.order, place.depth, parents, chunks=chunks, complete=complete))
        health, condition = self._asking.health, await self._condition()
        beat = Heartbeat(self.peer, load=condition.load, refuses=condition.refuses, blobs=tuple(told),
                         liars=tuple(health.liars()), reports=tuple(health.reports()))  # fmt: skip
        self._learn(await self._directory.heartbeat(beat))
        known = self.places.keys() | self._later.keys()
        self._to_join.update(dict.fromkeys(digest for digest in self.blobs if digest not in known))
        if self._to_join:
            self._wake.set()
        await self._asking.tidy(set(self.blobs))
        named = {parent.id for place in self.places.values() for parent in place.parents} | set(self._asking.pipes)
        self.addresses = {peer: address for peer, address in self.addresses.items() if peer in named}

    def _look_at_use(self) -> None:
        now = self._clock()
        used = {blob.digest: blob for blob in self._in_use()}
        self.expect(blob for digest, blob in used.items() if digest not in self.blobs)
        for digest in list(self.blobs):
            young = now - self._expected_at[digest] < _YOUNG
            if digest in used:
                self._expected_at[digest] = now - _YOUNG  # once it is out of use it is left at once
            elif not young and not self._asking.in_flight(digest):
                for known in (self.blobs, self.places, self._joined, self._expected_at):
                    known.pop(digest, None)
        self._without = {key: until for key, until in self._without.items() if until > now}

    def statistics(self) -> dict[str, Any]:
        """Return counts."""
        return {"blobs": len(self.blobs), "places": len(self.places), "late_places": self.late,
                "waiting": len(self._later)}  # fmt: skip
