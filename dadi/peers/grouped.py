"""The directory as a node of a group sees it: its group's delegates first, then the superpeers. Rules: `group.py`.

    join        blobs without a place ──► delegate ──► next delegate ──┐ it is the root, or nobody can say
                blobs with a place of the superpeer ───────────────────┴──► superpeers (`directory_client.py`)
    heartbeat   places by delegates to these, places by superpeers to both; who has lost its delegate tells the next,
                and joins at the superpeers where that does not take it either
    introduce   POST /v1/peers/group at the superpeer that is responsible for the rack, each heartbeat: who are my mates

A delegate has `_PATIENCE` to answer: what it is asked is a dictionary lookup, but its link may be full, and a busy one
that is passed over splits the group's tree; a read waits for its place a little longer than for three of them. Each one
that is passed over is noted.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import aiohttp
import msgspec
import structlog

from dadi import http
from dadi.errors import DadiError, Malformed, Unavailable, Unreachable
from dadi.fallbacks import Fallbacks
from dadi.peers import group as groups
from dadi.peers.desk import Desk
from dadi.peers.directory_client import DirectoryClient, Report, Trees
from dadi.peers.group import SUPERPEER
from dadi.peers.health import Event, Health
from dadi.peers.places import MAX_JOINED, Changed, Heartbeat, Join, JoinAnswer, Leave, Peer, Place, Told
from dadi.peers.superpeers import SETTINGS
from dadi.peers.tokens import Tokens

log = structlog.get_logger()
_PATIENCE = 0.6
_FOR_OTHERS = 2.0
"""Seconds; for others than joins there is time until the next heartbeat."""
_MAX_ANSWER = 4 << 20
_SOON = 0.3
"""Seconds between two introductions, at least: when somebody comes that is not known as a mate."""

T = TypeVar("T", bound=msgspec.Struct)


class GroupedDirectory:
    """See the head of this file. `start` once it is known where the node serves others, then `close`."""

    def __init__(self, superpeers: DirectoryClient, desk: Desk, session: aiohttp.ClientSession, fallbacks: Fallbacks, *,
                 me: Callable[[], Peer], scheme: str = "http", tokens: Tokens | None = None,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self.desk = desk
        self.waits: dict[str, float] = {}
        self.joins = 0
        """Blobs that a delegate has placed."""
        self.passed_over = 0
        """Delegates that did not answer, or refused."""
        self._group = desk.group
        self._superpeers = superpeers
        self._session = session
        self._fallbacks = fallbacks
        self._me = me
        self._scheme = scheme
        self._tokens = tokens
        self._clock = clock
        self._health = Health(SETTINGS)
        self._told: set[str] = set()
        self._joining: set[str] = set()
        """Blobs that may have a place here, and none yet with who asked for it."""
        self._soon = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        desk.unknown = self._soon.set

    def __repr__(self) -> str:
        return f"GroupedDirectory({self._group!r}, {self._superpeers!r})"

    @property
    def heartbeat_every(self) -> float:
        """Seconds between heartbeats, as the superpeers want it."""
        return self._superpeers.heartbeat_every

    # ---- who the mates are

    def start(self) -> None:
        """Begin to say who we are, now and with each heartbeat."""
        self._soon.set()
        if self._task is None:
            self._task = asyncio.create_task(self._introducing())

    async def close(self) -> None:
        """Stop it."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None

    async def introduce(self) -> None:
        """Say who we are; learn who our mates are. While no superpeer answers those that are known stay."""
        me = self._me()
        if not (me.rack and me.slots):
            return
        answer = await self._superpeers.group(groups.outward(me), self._group.version)
        if answer is not None:
            self._group.learn(answer.version, answer.mates)
            self.desk.pace(answer.heartbeat)
            self.desk.learned()

    async def _introducing(self) -> None:
        while True:
            self._soon.clear()
            try:
                await self.introduce()
            except DadiError as error:
                self._fallbacks.note("group not asked for", str(error))
            except Exception as error:  # a mistake of ours must not end it
                log.exception("introducing failed")
                self._fallbacks.note("group not asked for", repr(error))
            await asyncio.sleep(_SOON)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(0.0, self.heartbeat_every * random.uniform(0.9, 1.0) - _SOON)):
                    await self._soon.wait()

    # ---- what a membership asks for

    async def join(self, peer: Peer, blobs: Sequence[str], without: Iterable[str] = (),
                   reports: Iterable[Report] = ()) -> dict[str, Place]:  # fmt: skip
        """Return the node's places; see `DirectoryClient.join`."""
        unwanted, said = tuple(without), tuple(reports)
        self._group.expect(blobs)
        places: dict[str, Place] = {}
        to_place = [blob for blob in blobs if not self._group.has_outer_place(blob)]
        self._joining.update(blobs)
        try:
            for delegates, some in self._by_delegates(to_place):
                places.update(await self._join_group(delegates, some, unwanted, said))
            outer = [blob for blob in blobs if blob not in places]
            self.waits = {}
            if outer:
                places.update(await self._join_superpeers(peer, outer, unwanted, said))
        finally:
            self._joining.difference_update(blobs)
        return places

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Place]:
        """Tell what `beat` says to who gave each place; return the places that have changed."""
        self._group.keep([*(told.blob for told in beat.blobs), *self._joining])
        outer = tuple(told for told in beat.blobs if self._group.placed_by(told.blob) == SUPERPEER)
        changed, lost = await self._tell_delegates(beat)
        told = msgspec.structs.replace(beat, peer=self._as_outer(beat.peer), blobs=outer)
        changed.update(await self._superpeers.heartbeat(told))
        if lost:
            changed.update(await self._join_superpeers(beat.peer, lost, (), ()))
        return changed

    async def leave(self) -> None:
        """Give up everything."""
        me = Leave(self._me().id)
        told = [mate for mate in self._told if mate in self._group.mates]
        self._told.clear()
        work = (self._post(mate, "leave", me, dict[str, Any]) for mate in told)
        await asyncio.gather(self._superpeers.leave(), *work, return_exceptions=True)
        self.desk.leave(me.id)

    # ---- delegates

    def _by_delegates(self, blobs: Iterable[str]) -> list[tuple[tuple[str, ...], list[str]]]:
        """Return blobs in groups: of the same delegates, and opened by the same token."""
        found: dict[tuple[tuple[str, ...], str], list[str]] = {}
        for blob in blobs:
            if delegates := self._group.delegates(blob):
                found.setdefault((delegates, self._token(blob)), []).append(blob)
        return [(delegates, some[at : at + MAX_JOINED]) for (delegates, _), some in found.items()
                for at in range(0, len(some), MAX_JOINED)]  # fmt: skip

    async def _join_group(self, delegates: Iterable[str], blobs: Sequence[str], without: tuple[str, ...],
                          reports: tuple[Report, ...]) -> dict[str, Place]:  # fmt: skip
        """Return the places that the first delegate that answers gives; what is not among them is for superpeers."""
        me = self._me()
        orders = {blob: order for blob in blobs if (order := self._group.order(blob))}
        said = Join(me, tuple(blobs), without, reports, self._proof(blobs[0]), orders)
        for delegate in delegates:
            if delegate in without:
                continue
            answer = await self._ask(delegate, "join", said, JoinAnswer)
            if answer is not None:
                return self._taken(answer, blobs, delegate)
        return {}

    def _taken(self, answer: JoinAnswer | Changed, blobs: Iterable[str], delegate: str) -> dict[str, Place]:
        """Return those of a delegate's places that can be used."""
        places: dict[str, Place] = {}
        for blob in blobs:
            if blob not in answer.places:
                continue
            shown, token = answer.proofs.get(blob, {}), self._token(blob)

            def proven(peer: str, proof: str, token: str = token) -> bool:
                # Without a token none is shown to anybody: the network itself says who may.
                return not token or groups.proves(token, peer, proof)

            place = self._group.believed(answer.places[blob], shown, proven)
            if place is not None:
                places[blob] = place
                self.joins += 1
                self._group.took(blob, delegate, place.order)
        return places

    async def _tell_delegates(self, beat: Heartbeat) -> tuple[dict[str, Place], list[str]]:
        """Tell delegates of all blobs; return new places, and the blobs that superpeers are to be asked about."""
        changed: dict[str, Place] = {}
        lost: dict[str, None] = {}
        left = {told.blob: self._as_told(told) for told in beat.blobs}
        for turn in range(1 + groups.MOST_ASKED):
            asked: dict[str, list[Told]] = {}
            for blob, told in left.items():
                if delegate := self._delegate_of(blob, turn):
                    asked.setdefault(delegate, []).append(told)
                elif self._group.placed_by(blob) != SUPERPEER and turn:
                    lost[blob] = None
            answers = await asyncio.gather(*(self._beat(mate, beat, told) for mate, told in asked.items()))
            for (mate, told_there), answer in zip(asked.items(), answers, strict=True):
                if answer is None:
                    continue
                for told in told_there:
                    del left[told.blob]
                inner = [told.blob for told in told_there if self._group.placed_by(told.blob) != SUPERPEER]
                for blob in inner:
                    self._group.took(blob, mate)
                found = self._taken(answer, inner, mate)
                changed.update(found)
                lost.update(dict.fromkeys(blob for blob in inner if blob in answer.places and blob not in found))
            left = {blob: told for blob, told in left.items() if blob not in lost}
            if not left:
                break
        lost.update(dict.fromkeys(blob for blob in left if self._group.placed_by(blob) != SUPERPEER))
        return changed, list(lost)

    async def _beat(self, delegate: str, beat: Heartbeat, told: list[Told]) -> Changed | None:
        return await self._ask(delegate, "heartbeat", msgspec.structs.replace(beat, blobs=tuple(told)), Changed)

    def _delegate_of(self, blob: str, turn: int) -> str | None:
        """Return who is to hear of a blob: first who gave the place, then the others in order."""
        given, order = self._group.placed_by(blob), self._group.delegates(blob)
        ordered = [*([given] if given != SUPERPEER else []), *(each for each in order if each != given)]
        return ordered[turn] if turn < len(ordered) else None

    def _as_told(self, told: Told) -> Told:
        """Return what delegates are told of a blob: a place of the superpeer makes us a root."""
        outer = self._group.placed_by(told.blob) == SUPERPEER
        depth, parents = (1, ()) if outer else (told.depth, told.parents)
        return msgspec.structs.replace(told, depth=depth, parents=parents, proof=self._proof(told.blob))

    async def _ask(self, delegate: str, verb: str, said: Join | Heartbeat, kind: type[T]) -> T | None:
        """Return what a delegate answers; None, and noted, if it does not."""
        me = self._me()
        try:
            if delegate == me.id:
                mate = self._mate(delegate)
                done = self.desk.join(mate, said) if isinstance(said, Join) else self.desk.heartbeat(mate, said)
                assert isinstance(done, kind)
                return done
            if not self._health.may_ask(delegate, self._clock()):
                raise Unavailable("it did not answer lately")
            self._told.add(delegate)
            answer: T = await self._post(delegate, verb, said, kind)
            return answer
        except DadiError as error:
            self.passed_over += 1
            self._fallbacks.note("delegate passed over", f"{delegate}: {error}")
            return None

    async def _post(self, delegate: str, verb: str, said: msgspec.Struct, kind: Any) -> Any:
        mate = self._mate(delegate)
        data = bytearray()
        timeout = aiohttp.ClientTimeout(total=_PATIENCE if verb == "join" else _FOR_OTHERS)
        self._health.asked(delegate)
        try:
            async with http.request(
                self._session, "POST", f"{self._scheme}://{mate.address}/v1/peers/{verb}", "asking a delegate",
                data=msgspec.json.encode(said), headers={"Content-Type": "application/json"}, timeout=timeout,
            ) as response:  # fmt: skip
                async for piece in response.content.iter_any():
                    data += piece
                    if len(data) > _MAX_ANSWER:
                        raise Malformed(f"an answer of more than {_MAX_ANSWER} bytes")
            answer = msgspec.json.decode(data, type=kind)
        except (Unreachable, Malformed, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._health.happened(delegate, Event.FAILED, self._clock())
            if isinstance(error, DadiError):
                raise
            raise Malformed(f"it answered what cannot be used: {error}", hint="are the versions alike?") from None
        else:
            self._health.happened(delegate, Event.ANSWERED, self._clock())
            return answer
        finally:
            self._health.ended(delegate)

    def _mate(self, delegate: str) -> Peer:
        mate = self._group.mates.get(delegate)
        if mate is None:
            raise Unavailable("it is no mate any more")
        return mate

    # ---- superpeers

    async def _join_superpeers(self, peer: Peer, blobs: Sequence[str], without: Iterable[str],
                               reports: Iterable[Report]) -> dict[str, Place]:  # fmt: skip
        places = await self._superpeers.join(self._as_outer(peer), blobs, without, reports)
        self.waits = self._superpeers.waits
        for blob in places:
            self._group.took(blob, SUPERPEER)
        return places

    def _as_outer(self, peer: Peer) -> Peer:
        return groups.outward(peer) if self._group.stands else peer

    def _token(self, blob: str) -> str:
        return (self._tokens.text(blob) if self._tokens is not None else None) or ""

    def _proof(self, blob: str) -> str:
        token = self._token(blob)
        return groups.proof(token, self._me().id) if token else ""

    # ---- what it looks like

    async def trees(self, blobs: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of the blobs' trees: the superpeers', and below them those of our group's delegates."""
        found = await self._superpeers.trees(blobs)
        asked: dict[str, list[str]] = {}
        for blob in blobs:
            if delegate := self._delegate_of(blob, 0):
                asked.setdefault(delegate, []).append(blob)
        for delegate, some in asked.items():
            inner = self.desk.trees(some) if delegate == self._me().id else await self._trees_of(delegate, some)
            for blob, rows in inner.items():
                outer = found.setdefault(blob, [])
                known = {row["id"] for row in outer}
                outer.extend(row for row in rows if row["id"] not in known)
        return found

    async def _trees_of(self, delegate: str, blobs: list[str]) -> dict[str, list[dict[str, Any]]]:
        query = [("id", self._me().id), *(("blob", blob) for blob in blobs[:32])]
        try:
            mate = self._mate(delegate)
            async with http.request(
                self._session, "GET", f"{self._scheme}://{mate.address}/v1/peers", "asking a delegate", params=query,
                timeout=aiohttp.ClientTimeout(total=2.0),
            ) as response:  # fmt: skip
                return msgspec.json.decode(await response.content.read(_MAX_ANSWER), type=Trees).trees
        except (DadiError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            self._fallbacks.note("delegate's tree not shown", f"{delegate}: {error}")
            return {}

    def statistics(self) -> dict[str, Any]:
        """Return counts: what superpeers and delegates were asked, and what mates have asked here."""
        return {**self._superpeers.statistics(), "by_delegates": self.joins, "passed_over": self.passed_over,
                "group": self.desk.statistics()}  # fmt: skip
