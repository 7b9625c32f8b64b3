"""The directory as a node sees it: join, heartbeat, leave, over HTTP. The messages are in `places.py`.

    POST /v1/peers/join         Join       →  Joined
    POST /v1/peers/heartbeat    Heartbeat  →  Changed
    POST /v1/peers/leave        Leave      →  {}
    POST /v1/peers/group        Introduce  →  Grouped     at the superpeer that is responsible for the rack
    GET  /v1/peers?blob=D…                 →  {"trees": {digest: rows}}

A blob's tree is kept by the superpeer that owns the blob (`owners.py`), by the next in order where that one is away:
what is said of several blobs goes to several superpeers. Nothing here raises because a superpeer is away: a node
without a place asks superpeers only, and says in its next heartbeat what it has, to whoever is there. Every blob that
nobody took is noted.

A superpeer that ten thousand nodes join in one second is slow, or asks to be asked later (503 with Retry-After). It is
not away for that: a stand-in would begin a second tree. It is waited for longer than for a read, it is asked again when
it said (`waits`), and what is learnt here of who is away is kept apart from what reads go by.
"""

from __future__ import annotations

import asyncio
import io
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import aiohttp
import msgspec

from dadi import http
from dadi.errors import DadiError, Malformed, TokenRefused, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.peers.gate import AUTHORIZATION
from dadi.peers.health import Health
from dadi.peers.places import (
    MAX_JOINED,
    MAX_NAMED,
    Changed,
    Fault,
    Grouped,
    Heartbeat,
    Introduce,
    Join,
    JoinAnswer,
    Leave,
    Peer,
    Place,
    Told,
)  # fmt: skip
from dadi.peers.superpeers import SETTINGS, Superpeers
from dadi.peers.tokens import Tokens

_MAX_ANSWER = 8 << 20
_REPORTS = 256
_LONGEST = 120.0
"""Seconds; whatever a superpeer says, it is asked again after these."""
HEARTBEAT = 5.0
"""Seconds, until a superpeer has said something else."""
_LATE_BEAT = 10.0
"""Seconds that a heartbeat may take: the next one is due, and a stand-in may take over."""

T = TypeVar("T")
Report = tuple[str, Fault]


class DirectoryClient:
    """See the head of this file; `session` and `superpeers` are closed by who made them. `timeout` in seconds."""

    def __init__(self, superpeers: Superpeers, session: aiohttp.ClientSession, fallbacks: Fallbacks, *,
                 timeout: float = 30.0, tokens: Tokens | None = None) -> None:  # fmt: skip
        self._superpeers = superpeers
        self._session = session
        self._fallbacks = fallbacks
        self._timeout = timeout
        self._health = Health(SETTINGS)
        """Not that of reads; see the head of this file."""
        self._tokens = tokens
        self._id: str | None = None
        self._told: set[str] = set()
        """Superpeers that may know of us."""
        self._unsaid: list[Report] = []
        """Reports that reached nobody."""
        self.heartbeat_every = HEARTBEAT
        """Seconds between heartbeats, as the superpeers want it."""
        self.waits: dict[str, float] = {}
        """Of the last join: blobs whose superpeer takes no more joins now, and the seconds to wait."""
        self.joins = 0
        self.heartbeats = 0
        self.failures = 0
        """Blobs, joined or told, that no superpeer took."""

    def __repr__(self) -> str:
        return f"DirectoryClient({self._superpeers!r})"

    async def join(self, peer: Peer, blobs: Sequence[str], without: Iterable[str] = (),
                   reports: Iterable[Report] = ()) -> dict[str, Place]:  # fmt: skip
        """Return the places of `peer` for the blobs, in as few requests as there are superpeers that own them.

        A blob that no superpeer took is not among them: see `waits`. `reports` go along, once.
        """
        self.waits = {}
        self._id = peer.id
        unwanted, said = tuple(without)[:MAX_NAMED], self._with_unsaid(reports)
        places: dict[str, Place] = {}

        async def ask(url: str, some: Sequence[str]) -> None:
            for part in self._parts(some, MAX_JOINED):
                answer = await self._post(url, "join", Join(peer, tuple(part), unwanted, said), JoinAnswer, part)
                self.heartbeat_every = answer.heartbeat
                places.update((blob, answer.places[blob]) for blob in part if blob in answer.places)

        self.joins += 1
        left = await self._by_owner({blob: blob for blob in blobs}, ask, "join", self.waits)
        self._unsaid = list(said) if left and len(left) == len(blobs) else []
        return places

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Place]:
        """Tell what `beat` says, to each superpeer of its own blobs; return the places that have changed."""
        self._id = beat.peer.id
        said = self._with_unsaid(beat.reports)
        places: dict[str, Place] = {}

        async def ask(url: str, some: Sequence[Told]) -> None:
            message = msgspec.structs.replace(beat, blobs=tuple(some), reports=said, liars=beat.liars[-MAX_NAMED:])
            blobs = {told.blob for told in some}
            answer = await self._post(url, "heartbeat", message, Changed, sorted(blobs))
            self.heartbeat_every = answer.heartbeat or self.heartbeat_every
            places.update((blob, place) for blob, place in answer.places.items() if blob in blobs)
            # It has forgotten us: told again with the tokens that open what it did not believe.
            again = msgspec.structs.replace(message, reports=())
            for part in self._proven(sorted(blobs.intersection(answer.unproven))):
                answer = await self._post(url, "heartbeat", again, Changed, part)
                places.update((blob, place) for blob, place in answer.places.items() if blob in blobs)

        self.heartbeats += 1
        left = await self._by_owner({told.blob: told for told in beat.blobs}, ask, "heartbeat")
        self._unsaid = list(said) if len(left) == len(beat.blobs) else []
        return places

    async def leave(self) -> None:
        """Give up everything; superpeers that cannot be reached forget us by themselves."""
        if self._id is None:
            return
        message = Leave(self._id)
        names = [name for name in self._told if name in self._superpeers.names]
        self._told.clear()
        work = (self._post(name, "leave", message, dict[str, Any], ()) for name in names)
        for name, failed in zip(names, await asyncio.gather(*work, return_exceptions=True), strict=True):
            if isinstance(failed, TokenRefused) and not self.joins:
                continue  # it has joined nothing, so holds no token: the superpeer has forgotten its group all the same
            if isinstance(failed, DadiError):
                self._superpeers.passed_over(name, failed)
            elif isinstance(failed, BaseException):
                raise failed
        self._told.difference_update(names)

    async def trees(self, blobs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of the blobs' trees (see `Tree.rows`); a blob of which nobody answered is not among them."""
        found: dict[str, list[dict[str, Any]]] = {}

        async def ask(url: str, some: Sequence[str]) -> None:
            for part in self._parts(some, 32):  # a request line has a limit
                answer = await self._request("GET", f"{url}/v1/peers", Trees, part, params=[("blob", b) for b in part])
                found.update(answer.trees)

        await self._by_owner({blob: blob for blob in blobs}, ask, "trees")
        return found

    async def group(self, me: Peer, known: int) -> Grouped | None:
        """Return the group of a node, by the superpeer that is responsible for its rack; None if nobody answered."""
        self._id = me.id
        found: list[Grouped] = []

        async def ask(url: str, _: Sequence[str]) -> None:
            found.append(await self._post(url, "group", Introduce(me, known), Grouped, ()))

        rack = f"rack {me.zone}/{me.rack}"
        await self._by_owner({rack: rack}, ask, "the group")
        if not found:
            return None
        self.heartbeat_every = found[0].heartbeat
        return found[0]

    def statistics(self) -> dict[str, Any]:
        """Return counts, and the superpeers with their states."""
        return {
            "joins": self.joins, "heartbeats": self.heartbeats, "failures": self.failures,
            "superpeers": {name: self.state(name) for name in self._superpeers.names},
        }  # fmt: skip

    def state(self, name: str) -> str:
        """Return "good", "dropped" or "probing", of a superpeer as a directory."""
        return self._health.state(name, self._superpeers.clock()).value

    # ---- how

    async def _by_owner(self, items: Mapping[str, T], ask: Callable[[str, Sequence[T]], Any], what: str,
                        waits: dict[str, float] | None = None) -> list[T]:  # fmt: skip
        """Ask, for each item (by its blob), the blob's first superpeer that answers; return those nobody took.

        `waits`: filled with blobs whose superpeer wants to be asked later, and the seconds.
        """
        try:
            await self._superpeers.ready()
        except DadiError as error:
            self._give_up(list(items), what, error)
            return list(items.values())
        queues = {blob: self._superpeers.to_ask(blob, self._health) for blob in items}
        left, later = dict(items), dict[str, T]()
        last: DadiError | None = None
        while left:
            groups: dict[str, dict[str, T]] = {}
            for blob, item in left.items():
                if queues[blob]:
                    groups.setdefault(queues[blob].pop(0), {})[blob] = item
            if not groups:
                self._give_up(list(left), what, last)
                break
            results = await asyncio.gather(*(self._try(url, group, ask) for url, group in groups.items()))
            for group, failed in zip(groups.values(), results, strict=True):
                last = failed or last
                if failed is None or isinstance(failed, _Later):
                    for blob in group:
                        item = left.pop(blob)
                        if failed is not None:
                            later[blob] = item
                            if waits is not None:
                                waits[blob] = failed.seconds
        return [*left.values(), *later.values()]

    async def _try(self, url: str, group: Mapping[str, T], ask: Callable[[str, Sequence[T]], Any]) -> DadiError | None:
        try:
            async with self._superpeers.asking(url, self._health):
                await ask(url, list(group.values()))
        except _Later as error:
            self._fallbacks.note("directory asked later", f"{url}: in {error.seconds:g} s: {error}")
            return error
        except DadiError as error:
            self._superpeers.passed_over(url, error)
            return error
        return None

    def _give_up(self, blobs: Sequence[str], what: str, error: DadiError | None) -> None:
        if blobs:
            self.failures += len(blobs)
            why = error.message if error else "nobody to ask"
            self._fallbacks.note("no directory for blobs", f"{what} of {len(blobs)} blobs, {blobs[0]}: {why}")

    def _with_unsaid(self, reports: Iterable[Report]) -> tuple[Report, ...]:
        return tuple([*self._unsaid, *reports][-_REPORTS:])

    def _parts(self, blobs: Sequence[str], most: int) -> Iterator[list[str]]:
        """Yield the blobs, `most` at a time, those together that one token opens."""
        groups = self._tokens.groups(blobs) if self._tokens is not None else [({}, list(blobs))]
        for _, group in groups:
            yield from (group[at : at + most] for at in range(0, len(group), most))

    def _proven(self, blobs: Sequence[str]) -> list[list[str]]:
        """Return those of the blobs that we have tokens for, those together that one token opens."""
        groups = self._tokens.groups(blobs) if self._tokens is not None else []
        return [group for headers, group in groups if headers]

    async def _post(self, url: str, verb: str, message: msgspec.Struct, kind: type[T], blobs: Sequence[str]) -> T:
        self._told.add(url)
        body = msgspec.json.encode(message)
        return await self._request("POST", f"{url}/v1/peers/{verb}", kind, blobs, data=body)

    async def _request(self, method: str, url: str, kind: type[T], blobs: Sequence[str], **options: Any) -> T:
        """`blobs`: those of a token that is shown; none: any token will do."""
        if self._tokens is None:
            return await self._request_once(method, url, kind, {}, **options)
        headers = self._tokens.headers(*blobs)
        try:
            return await self._request_once(method, url, kind, headers, **options)
        except TokenRefused:
            shown = headers.get(AUTHORIZATION, "").removeprefix("Bearer ") or None
            if not blobs or not await self._tokens.renewed(blobs[0], shown):
                raise
            return await self._request_once(method, url, kind, self._tokens.headers(*blobs), **options)

    async def _request_once(self, method: str, url: str, kind: type[T], headers: dict[str, str], **options: Any) -> T:
        headers = {"Content-Type": "application/json", **headers}
        if "data" in options:
            options["data"] = io.BytesIO(options["data"])  # a large one is sent piece by piece
        what = "talking to the directory"
        total = min(self._timeout, _LATE_BEAT) if kind is Changed else self._timeout
        timeout = aiohttp.ClientTimeout(total=total, sock_connect=min(total, 3.0))
        try:
            async with http.request(
                self._session, method, url, what, headers=headers, timeout=timeout, **options
            ) as response:
                data = bytearray()
                async for piece in response.content.iter_any():
                    data += piece
                    if len(data) > _MAX_ANSWER:
                        raise Malformed(f"{url} answers with more than {_MAX_ANSWER} bytes")
        except Unavailable as error:
            if error.retry_after is None:
                raise
            raise _Later(error.message, error.retry_after) from None
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise Malformed(f"{url} answered what cannot be used: {error}", hint="are the versions alike?") from None


class _Later(Unavailable):
    """A superpeer is there, and takes no more of this for some seconds."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message, retry_after=seconds)
        # It tells whole seconds, and the same to many.
        self.seconds = min(seconds, _LONGEST) + random.random()


class Trees(msgspec.Struct, frozen=True):
    """The rows of trees, by blob."""

    trees: dict[str, list[dict[str, Any]]]
