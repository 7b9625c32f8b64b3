"""A node as its group's delegate: it gives its mates their places, by the superpeer's own `Directory` (`group.py`).

    POST /v1/peers/join         Join       →  Joined
    POST /v1/peers/heartbeat    Heartbeat  →  Changed
    POST /v1/peers/leave        Leave      →  {}
    GET  /v1/peers?blob=D…                 →  {"trees": {digest: rows}}

On the port where the node serves chunks. It listens to members of its group, at the address that the superpeer has
vouched for, and hears of whom it does not know by asking the superpeer anew, which it lets a stranger wait for: nodes
that come up and start an image at once would go to the superpeer else, each by itself. No token is shown here: what a
mate joins is its own business, and what it has shown as `proof` goes to those that are told of it as a parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import time
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import web

from dadi import digest as digests
from dadi.errors import Conflict, InvalidRequest, Unavailable
from dadi.peers.bodies import answer, message
from dadi.peers.directory import Directory, Settings
from dadi.peers.group import Group
from dadi.peers.places import Changed, Heartbeat, Join, JoinAnswer, Leave, Peer, Place, Proofs
from dadi.peers.pressure import Pressure

_MAX_BODY = 1 << 20
_MOST_BLOBS = 1024
_MOST_ASKED = 32
_PRESSED = 5.0
_EXPIRY = 3.0
"""Heartbeats after which a mate is forgotten."""
_TIDY_EVERY = 1.0
_STRANGER = 0.4
"""Seconds that who is not known may wait until the superpeer has been asked; less than mates wait for an answer."""
_MOST_STRANGERS = 256


class Desk:
    """See the head of this file. `group` is the node's; `unknown` is called when somebody is not in it."""

    def __init__(self, group: Group, pressure: Pressure, *, unknown: Callable[[], None] = lambda: None,
                 clock: Callable[[], float] = time.time) -> None:  # fmt: skip
        self.group = group
        self.unknown = unknown
        self.joins = 0
        self.heartbeats = 0
        self.refused = 0
        self._pressure = pressure
        self._clock = clock
        self._last = clock()
        self._every = Settings().heartbeat
        self._tidied = float("-inf")
        self._proofs: dict[str, dict[str, str]] = {}
        self._learned = asyncio.Event()
        self._strangers = 0
        self.directory = Directory(Settings(root_slots=1, most_blobs=_MOST_BLOBS), now=self._now())

    def __repr__(self) -> str:
        return f"Desk({self.group!r}, {self.directory!r})"

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add what the head of this file lists."""
        router.add_post("/v1/peers/join", self._join)
        router.add_post("/v1/peers/heartbeat", self._heartbeat)
        router.add_post("/v1/peers/leave", self._leave)
        router.add_get("/v1/peers", self._trees)

    def pace(self, every: float) -> None:
        """Mates will be heard of every so many seconds."""
        self._every = every

    def learned(self) -> None:
        """The superpeer has said who is in the group."""
        self._learned.set()
        self._learned = asyncio.Event()

    # ---- what mates ask, and this node itself

    def join(self, peer: Peer, said: Join) -> JoinAnswer:
        """Return the places of a mate."""
        now = self._tidy()
        self.joins += 1
        places: dict[str, Place] = {}
        for blob in said.blobs:
            self._proofs.setdefault(blob, {})[peer.id] = said.proof
            places[blob] = self.directory.join(peer, blob, now, said.without, said.orders.get(blob, 0))
        if said.reports and said.blobs:
            for about, fault in said.reports:
                self.directory.report(peer.id, about, fault, now)
            places = {blob: self.directory.join(peer, blob, now, said.without) for blob in said.blobs}
        return JoinAnswer(places, self._every, self._proofs_of(places))

    def heartbeat(self, peer: Peer, said: Heartbeat) -> Changed:
        """Take in what a mate says; return its new places."""
        now = self._tidy()
        self.heartbeats += 1
        for told in said.blobs:
            self._proofs.setdefault(told.blob, {})[peer.id] = told.proof
        changed = self.directory.heartbeat(msgspec.structs.replace(said, peer=peer), now)
        for about, fault in said.reports:
            self.directory.report(peer.id, about, fault, now)
        return Changed(changed, self._every, proofs=self._proofs_of(changed))

    def leave(self, peer_id: str) -> None:
        """A mate gives up everything."""
        self.directory.leave(peer_id)

    def _proofs_of(self, places: dict[str, Place]) -> Proofs:
        return {blob: {peer.id: shown for peer in place.parents if (shown := self._proofs.get(blob, {}).get(peer.id))}
                for blob, place in places.items() if place.parents}  # fmt: skip

    def _tidy(self) -> float:
        """Forget who is gone; return the time."""
        now = self._now()
        if now < self._tidied + _TIDY_EVERY:
            return now
        self._tidied = now
        self.directory.settings = msgspec.structs.replace(
            self.directory.settings, heartbeat=self._every, expiry=_EXPIRY * self._every
        )
        self.directory.expire(now)
        for peer_id in self.directory.ids() - self.group.mates.keys():
            self.directory.leave(peer_id)
        for blob in [blob for blob in self._proofs if not self.directory.has_tree(blob)]:
            del self._proofs[blob]
        return now

    # ---- over HTTP

    async def _join(self, request: web.Request) -> web.Response:
        short_of = await self._pressure.why()
        if short_of:
            raise Unavailable(f"this node is short of {short_of}", retry_after=_PRESSED)
        said = await message(request, Join, _MAX_BODY)
        return answer(self.join(await self._heard_of(said.peer.id, request), said))

    async def _heartbeat(self, request: web.Request) -> web.Response:
        said = await message(request, Heartbeat, _MAX_BODY)
        return answer(self.heartbeat(await self._heard_of(said.peer.id, request), said))

    async def _leave(self, request: web.Request) -> web.Response:
        said = await message(request, Leave, _MAX_BODY)
        self.leave(self._mate(said.id, request).id)
        return web.json_response({})

    async def _trees(self, request: web.Request) -> web.Response:
        blobs = [digests.parse(text) for text in request.query.getall("blob", [])]
        if not 0 < len(blobs) <= _MOST_ASKED:
            raise InvalidRequest(f"ask for 1 to {_MOST_ASKED} blobs, not {len(blobs)}", hint="?blob=sha256:…")
        self._mate(request.query.get("id", ""), request)
        body = msgspec.json.encode({"trees": self.trees(blobs)})
        return web.Response(body=body, content_type="application/json")

    def trees(self, blobs: list[str]) -> dict[str, list[dict[str, Any]]]:
        """Return the rows of the group's trees."""
        return {blob: self.directory.tree(blob) for blob in blobs}

    async def _heard_of(self, peer_id: str, request: web.Request) -> Peer:
        """Do as `_mate`, after the superpeer was asked if it is not known."""
        if peer_id not in self.group.mates and self._strangers < _MOST_STRANGERS:
            learned = self._learned
            self._strangers += 1
            self.unknown()
            try:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_STRANGER):
                        await learned.wait()
            finally:
                self._strangers -= 1
        return self._mate(peer_id, request)

    def _mate(self, peer_id: str, request: web.Request) -> Peer:
        """Return who asks, as the superpeer vouches for it. Raises Conflict for who is no mate of ours."""
        mate = self.group.mates.get(peer_id)
        if mate is None:
            self.unknown()
        elif _same_host(mate.address, request.remote):
            return mate
        self.refused += 1
        raise Conflict(f"{peer_id} is not known as a member of this node's group, at {request.remote}")

    def _now(self) -> float:
        self._last = max(self._last, self._clock())
        return self._last

    def statistics(self) -> dict[str, Any]:
        """Return counts: of the group's members, and what they were given here."""
        counts = self.directory.statistics()
        return {"members": len(self.group.mates), "placed": counts["nodes"], "blobs": counts["blobs"],
                "joins": self.joins, "heartbeats": self.heartbeats, "refused": self.refused}  # fmt: skip


def _same_host(address: str, remote: str | None) -> bool:
    """Whether host:port is at the address that a connection comes from."""
    try:
        known = ipaddress.ip_address(address.rpartition(":")[0].strip("[]"))
        seen = ipaddress.ip_address(remote or "")
    except ValueError:
        return False
    return (getattr(known, "ipv4_mapped", None) or known) == (getattr(seen, "ipv4_mapped", None) or seen)
