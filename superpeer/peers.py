"""The directory over HTTP: nodes join, say what they have, leave. What it decides is in
`dadi/peers/directory.py`.

    POST /v1/peers/join         Join       →  Joined        a place for each blob
    POST /v1/peers/heartbeat    Heartbeat  →  Changed       places that have changed
    POST /v1/peers/leave        Leave      →  {}
    POST /v1/peers/group        Introduce  →  Grouped       the mates of its rack, if they have changed
    GET  /v1/peers?blob=D…                 →  {"trees": {digest: rows of Tree.rows}}

The messages are in `dadi/peers/places.py`; a body that is too large or breaks their limits is
refused (`dadi/peers/bodies.py`). Groups are `groups.py`: who introduces itself needs no token, is believed nothing by
this, and is not in the directory.

**What it believes**: who joins a blob shows a token that names it. A node that tells of blobs which it has joined
elsewhere, or before a restart, is believed of those that the token with this heartbeat names, and told which are left.

**What a superpeer vouches for**: a node's host is the one that its connection comes from, whatever the node says; only
the port is the node's word. So nobody can send others to machines that are no nodes. An id belongs to the host that
told it first, until that is not heard of any more: else anybody could be taken for somebody else, and have him barred.
With `peers.trust_addresses` (behind a NAT or a proxy, where all nodes come from one address) both is the node's word.
A node that comes over loopback (it shares this machine) is nobody's parent but of others that do: elsewhere its address
would lead to who asks.

A heartbeat costs this process about a millisecond: where there are many nodes they are told to be heard of less often
(`_Pace`), and are forgotten later. Joins of thousands in one second are spread out: 503 with Retry-After (`rush.py`).

Times are Unix seconds: a node's number in joining order is made of them, and must grow over a restart. That clock may
be set back: this one then stands still until the other has caught up, at most by what `expiry` forgives.
"""

from __future__ import annotations

import asyncio
import ipaddress
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import structlog
from aiohttp import web

from dadi import digest as digests
from dadi.errors import Conflict, InvalidRequest, Unavailable
from dadi.peers.bodies import M, answer, message
from dadi.peers.gate import OPEN, Doorman
from dadi.peers.places import (
    Changed,
    Grouped,
    Heartbeat,
    Introduce,
    Join,
    JoinAnswer,
    Leave,
    Peer,
    Place,
    is_loopback,
    is_unspecified,
)  # fmt: skip
from superpeer.config import PeersConfig
from superpeer.directory import Directory, Settings
from superpeer.groups import HEARTBEATS_A_SECOND, Groups
from superpeer.rush import Rush

log = structlog.get_logger()
_MOST_ASKED = 64
_MOST_AT_ONE_ADDRESS = 512
"""Ids: whoever makes up any number of them must not fill the directory."""


class Peers:
    """The directory of one superpeer, and its HTTP. `gate` says who may."""

    def __init__(self, config: PeersConfig, *, gate: Doorman = OPEN,
                 clock: Callable[[], float] = time.time) -> None:  # fmt: skip
        self.config = config
        self.gate = gate
        self._clock = clock
        self._last = clock()
        settings = Settings(
            root_slots=config.root_slots, far_slots=config.far_slots, standbys=config.standbys,
            heartbeat=config.heartbeat, expiry=config.expiry,
        )  # fmt: skip
        self.directory = Directory(settings, zone=config.zone, now=self._now())
        self._pace = _Pace(config.heartbeat, config.expiry)
        self.rush = Rush()
        self.groups = Groups()
        self._at_loopback: set[str] = set()
        self.heartbeats = 0
        self.expired = 0
        self.refused = 0
        """Messages that broke a limit, or spoke for somebody else."""

    def __repr__(self) -> str:
        return f"Peers({self.directory!r})"

    async def running(self, app: web.Application) -> AsyncIterator[None]:
        """While the application runs, forget nodes that are not heard of (a `cleanup_ctx`)."""
        expiring = asyncio.create_task(self._expire())
        yield
        expiring.cancel()
        await asyncio.gather(expiring, return_exceptions=True)

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Add what the head of this file lists."""
        router.add_post("/v1/peers/join", self._join)
        router.add_post("/v1/peers/heartbeat", self._heartbeat)
        router.add_post("/v1/peers/leave", self._leave)
        router.add_post("/v1/peers/group", self._group)
        router.add_get("/v1/peers", self._trees)

    def statistics(self) -> dict[str, Any]:
        """Return counts."""
        return {**self.directory.statistics(), "heartbeats": self.heartbeats, "expired": self.expired,
                "refused": self.refused, "put_off": self.rush.put_off,
                "grouped": len(self.groups), "groups": self.groups.count,
                "heartbeat_seconds": self._pace.heartbeat}  # fmt: skip

    # ---- what nodes say

    async def _join(self, request: web.Request) -> web.Response:
        await self.gate.admit(request.headers)  # strangers take nobody's turn
        wait = self.rush.wait(time.monotonic())
        if wait:
            raise Unavailable("many nodes join just now", retry_after=wait, hint="it comes again by itself")
        join = await self._message(request, Join)
        await self.gate.admit(request.headers, *join.blobs)
        began = time.perf_counter()
        placed = answer(JoinAnswer(self._placed(join, request), self._pace.heartbeat))
        self.rush.took(time.perf_counter() - began)
        return placed

    def _placed(self, join: Join, request: web.Request) -> dict[str, Place]:
        now, directory = self._now(), self.directory
        peer = self._vouched(join.peer, request)
        without = (*join.without, *self._out_of_reach(peer))
        places: dict[str, Place] = {}
        for number, blob in enumerate(join.blobs):
            places[blob] = directory.join(peer, blob, now, without)
            if not number:  # it is known now, else nothing it says of others would be believed
                for about, fault in join.reports:
                    directory.report(peer.id, about, fault, now)
        if join.reports and join.blobs:
            # The first place was given before the reports were heard.
            places[join.blobs[0]] = directory.join(peer, join.blobs[0], now, without)
        return places

    async def _heartbeat(self, request: web.Request) -> web.Response:
        beat = await self._message(request, Heartbeat)
        await self.gate.admit(request.headers)
        now = self._now()
        unproven = self._unproven(request, beat)
        believed = tuple(told for told in beat.blobs if told.blob not in unproven)
        beat = msgspec.structs.replace(beat, peer=self._vouched(beat.peer, request), blobs=believed)
        self.heartbeats += 1
        changed = self.directory.heartbeat(beat, now)
        if without := self._out_of_reach(beat.peer):
            for blob, place in changed.items():
                if any(parent.id in without for parent in place.parents):
                    changed[blob] = self.directory.join(beat.peer, blob, now, without)
        for about, fault in beat.reports:
            self.directory.report(beat.peer.id, about, fault, now)
        return answer(Changed(changed, self._pace.heartbeat, tuple(unproven)))

    def _unproven(self, request: web.Request, beat: Heartbeat) -> dict[str, None]:
        """Return the blobs that the node tells of for the first time, and may not have as far as its token says."""
        new = [told.blob for told in beat.blobs if not self.directory.has_joined(beat.peer.id, told.blob)]
        named = self.gate.named(request.headers, new) if new else ()
        return dict.fromkeys(blob for blob in new if blob not in named)

    async def _leave(self, request: web.Request) -> web.Response:
        leave = await self._message(request, Leave)
        member = self.groups.find(leave.id)
        if member is not None:
            self._check_same(member, request)
            self.groups.leave(leave.id)
        await self.gate.admit(request.headers)
        known = self.directory.vouches_for(leave.id)
        if known is not None:
            self._check_same(known, request)
        self.directory.leave(leave.id)
        self._at_loopback.discard(leave.id)
        return web.json_response({})

    async def _group(self, request: web.Request) -> web.Response:
        wait = self.rush.wait(time.monotonic())
        if wait:
            raise Unavailable("many nodes come just now", retry_after=wait, hint="it comes again by itself")
        said = await self._message(request, Introduce)
        peer = self._vouched(said.peer, request)
        known = self.groups.find(peer.id)
        if known is not None:
            self._check_same(known, request)
        if self.directory.bars(peer.id):
            peer = msgspec.structs.replace(peer, slots=0)
        version, mates = self.groups.introduce(peer, said.known, self._now())
        return answer(Grouped(version, self._pace.heartbeat, mates))

    async def _trees(self, request: web.Request) -> web.Response:
        blobs = [digests.parse(text) for text in request.query.getall("blob", [])]
        if not 0 < len(blobs) <= _MOST_ASKED:
            raise InvalidRequest(f"ask for 1 to {_MOST_ASKED} blobs, not {len(blobs)}", hint="?blob=sha256:…")
        await self.gate.admit(request.headers, *blobs)
        trees = {blob: self.directory.tree(blob) for blob in blobs}
        return web.Response(body=msgspec.json.encode({"trees": trees}), content_type="application/json")

    # ---- how

    async def _message(self, request: web.Request, kind: type[M]) -> M:
        try:
            return await message(request, kind)
        except InvalidRequest:
            self.refused += 1
            raise

    def _vouched(self, peer: Peer, request: web.Request) -> Peer:
        """Return the peer at the address that it has by what we see of it. Raises InvalidRequest, Conflict."""
        if not self.config.trust_addresses:
            peer = msgspec.structs.replace(peer, address=f"{_bracketed(request.remote)}:{_port(peer.address)}")
            known = self.directory.vouches_for(peer.id)
            if known is not None:
                self._check_same(known, request)
            elif self.directory.nodes_at(peer) >= _MOST_AT_ONE_ADDRESS:
                self.refused += 1
                hint = "behind a NAT or a proxy the superpeer needs peers.trust_addresses"
                raise Unavailable(f"too many nodes at {request.remote}", retry_after=60, hint=hint)
        elif peer.slots:
            _port(peer.address)
        if is_unspecified(peer.address):
            if peer.slots:
                log.warning("a node says no address at which it is reached", id=peer.id, address=peer.address)
            return msgspec.structs.replace(peer, slots=0)
        if not is_loopback(peer.address):
            self._at_loopback.discard(peer.id)
        elif peer.id not in self._at_loopback:
            self._at_loopback.add(peer.id)
            log.info("serves other nodes of this machine only: it comes over loopback", id=peer.id)
        return peer

    def _out_of_reach(self, peer: Peer) -> set[str]:
        """Return the ids of those that `peer` cannot ask at the address that they have."""
        return set() if is_loopback(peer.address) else self._at_loopback

    def _check_same(self, known: Peer, request: web.Request) -> None:
        if self.config.trust_addresses or known.address.rpartition(":")[0] == _bracketed(request.remote):
            return
        self.refused += 1
        log.warning("a node speaks for another one", id=known.id, its=known.address, comes_from=request.remote)
        hint = "two nodes need two ids; one that has moved is taken again when its old address is forgotten"
        raise Conflict(f"the id {known.id} belongs to a node at another address", hint=hint)

    def _now(self) -> float:
        self._last = max(self._last, self._clock())
        return self._last

    async def _expire(self) -> None:
        while True:
            await asyncio.sleep(min(1.0, self.config.expiry / 4))
            now, directory = self._now(), self.directory
            self._pace.update(max(directory.statistics()["nodes"], len(self.groups)), now)
            self.groups.expire(now, self._pace.expiry)
            directory.settings = msgspec.structs.replace(
                directory.settings, heartbeat=self._pace.heartbeat, expiry=self._pace.expiry
            )
            gone = directory.expire(now)
            self.expired += len(gone)
            self._at_loopback.difference_update(gone)
            if gone:
                log.info("nodes not heard of any more", nodes=len(gone), first=gone[0])


class _Pace:
    """How often nodes are to be heard of (`heartbeat`), and when one is forgotten (`expiry`); seconds."""

    def __init__(self, heartbeat: float, expiry: float) -> None:
        self._least = heartbeat
        self._ratio = expiry / heartbeat
        self._changed = float("-inf")
        self.heartbeat, self.expiry = heartbeat, expiry

    def update(self, nodes: int, now: float) -> None:
        """Take in how many nodes there are."""
        wanted = max(self._least, nodes / HEARTBEATS_A_SECOND)
        if wanted > self.heartbeat:
            self.heartbeat, self._changed = wanted, now
            self.expiry = max(self.expiry, wanted * self._ratio)
        elif now >= self._changed + 2 * self.expiry / self._ratio:
            # By now every node has heard the last one: only then may who keeps to it not be forgotten any sooner.
            self.expiry = self.heartbeat * self._ratio
            self.heartbeat, self._changed = wanted, now


def _port(address: str) -> int:
    """Return the port of host:port; 0 if there is none (a node that serves nobody)."""
    port = address.rpartition(":")[2]
    if not address:
        return 0
    if not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise InvalidRequest(f"{address[:100]!r} is not host:port")
    return int(port)


def _bracketed(host: str | None) -> str:
    """Return an IP address as it stands before a port."""
    try:
        ip = ipaddress.ip_address(host or "")
    except ValueError:
        raise InvalidRequest(f"a node's connection comes from {host!r}, which is no address") from None
    if isinstance(ip, ipaddress.IPv6Address) and ip.ipv4_mapped:
        ip = ip.ipv4_mapped
    return f"[{ip}]" if ip.version == 6 else str(ip)
