"""The directory of a superpeer over real HTTP: what nodes are believed, what not, and what a restart leaves."""

from __future__ import annotations

import asyncio
import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest

from dadi import http
from dadi.errors import Conflict
from dadi.fallbacks import Fallbacks
from dadi.peers.directory_client import DirectoryClient
from dadi.peers.places import Fault, Heartbeat, Join, Leave, Peer, Place, Told
from dadi.peers.superpeers import Superpeers
from superpeer import rush
from superpeer.config import PeersConfig
from superpeer.peers import _Pace
from tests.lab.services import Running, running

BLOB = "sha256:" + "1" * 64
OTHER = "sha256:" + "2" * 64


def peer(name: str, rack: str = "r1", slots: int = 2, host: str = "192.0.2.1") -> Peer:
    return Peer(name, f"{host}:7071", "z1", rack, slots)


class Node:
    """A client of the directory that tells truthfully what places it was given."""

    def __init__(self, run: Running, me: Peer) -> None:
        self.me = me
        self.places: dict[str, Place] = {}
        self._superpeers = Superpeers([run.url], Fallbacks(), clock=lambda: 0.0)
        self._session = http.client(connect=1, read=5)
        self.client = DirectoryClient(self._superpeers, self._session, Fallbacks())

    async def join(self, *blobs: str, **options: Any) -> Place:
        self.places.update(await self.client.join(self.me, blobs, **options))
        return self.places[blobs[0]]

    async def beat(self, **more: Any) -> None:
        told = (
            Told(blob, place.order, place.depth, tuple(parent.id for parent in place.parents))
            for blob, place in self.places.items()
        )
        self.places.update(await self.client.heartbeat(Heartbeat(self.me, blobs=tuple(told), **more)))

    async def close(self) -> None:
        await self._superpeers.close()
        await self._session.close()


@contextlib.asynccontextmanager
async def directory(path: Path, **options: Any) -> AsyncIterator[Running]:
    port = options.pop("port", 0)
    async with running(path, "registry.invalid", peers=PeersConfig(**options), port=port, authorization="open") as run:
        yield run


@contextlib.asynccontextmanager
async def nodes(run: Running, *peers: Peer) -> AsyncIterator[list[Node]]:
    made = [Node(run, each) for each in peers]
    try:
        yield made
    finally:
        for node in made:
            await node.close()


async def post(run: Running, verb: str, body: bytes | msgspec.Struct) -> tuple[int, dict[str, Any]]:
    data = body if isinstance(body, bytes) else msgspec.json.encode(body)
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{run.url}/v1/peers/{verb}", data=io.BytesIO(data)) as response,
    ):
        return response.status, await response.json()


async def statistics(run: Running) -> dict[str, Any]:
    async with aiohttp.ClientSession() as session, session.get(f"{run.url}/v1/status") as response:
        found: dict[str, Any] = (await response.json())["peers"]
        return found


async def test_parents_are_named_with_the_address_that_the_superpeer_saw(tmp_path: Path) -> None:
    async with directory(tmp_path, root_slots=1) as run, nodes(run, peer("a"), peer("b")) as (a, b):
        assert (await a.join(BLOB, OTHER)).parents == ()
        (parent,) = (await b.join(BLOB, OTHER)).parents
        assert parent == peer("a", host="127.0.0.1"), "what it said of its host is not believed"
        trees = await a.client.trees([BLOB, OTHER])
        assert [(row["id"], row["parent"]) for row in trees[BLOB]] == [("a", ""), ("b", "a")]
        assert (await statistics(run))["memberships"] == 4


async def test_with_trust_addresses_what_a_node_says_counts(tmp_path: Path) -> None:
    async with directory(tmp_path, root_slots=1, trust_addresses=True) as run:
        async with nodes(run, peer("a"), peer("b")) as (a, b):
            await a.join(BLOB)
            (parent,) = (await b.join(BLOB)).parents
            assert parent.address == "192.0.2.1:7071"


async def test_who_comes_over_loopback_is_no_parent_of_nodes_on_other_machines(tmp_path: Path) -> None:
    here = [msgspec.structs.replace(peer(name), address=f"127.0.0.1:{n}") for n, name in enumerate("ab", 7071)]
    async with directory(tmp_path, root_slots=1, trust_addresses=True) as run:
        async with nodes(run, *here, peer("c"), peer("d", host="192.0.2.2")) as (a, b, c, d):
            await a.join(BLOB)
            assert [parent.id for parent in (await b.join(BLOB)).parents] == ["a"]
            assert (await c.join(BLOB)).parents == ()
            assert [parent.id for parent in (await d.join(BLOB)).parents] == ["c"]
            await a.beat(reports=(("c", Fault.FAILED),))
            await d.beat()  # it must leave its parent, and all that is left is on loopback
            assert d.places[BLOB].parents == ()


async def test_a_node_that_says_no_address_to_be_reached_at_is_nobodys_parent(tmp_path: Path) -> None:
    async with directory(tmp_path, root_slots=1, trust_addresses=True) as run:
        async with nodes(run, peer("a", host="0.0.0.0"), peer("b")) as (a, b):
            await a.join(BLOB)
            assert (await b.join(BLOB)).parents == ()


@pytest.mark.parametrize(("slots", "children"), [(1, 1), (2, 2), (8, 2)])
async def test_as_many_children_as_nodes_take_but_two_at_most(tmp_path: Path, slots: int, children: int) -> None:
    peers = [peer(str(number), slots=slots) for number in range(4)]
    async with directory(tmp_path) as run, nodes(run, *peers) as made:
        for number, node in enumerate(made):
            node.me = msgspec.structs.replace(node.me, rack=f"r{number}", zone=f"z{number}")
            await node.join(BLOB)
        assert (await statistics(run))["root_children"] == children


async def test_reports_come_with_joins_and_heartbeats_and_are_acted_on(tmp_path: Path) -> None:
    async with directory(tmp_path, root_slots=1) as run, nodes(run, peer("a"), peer("b"), peer("c")) as (a, b, c):
        await a.join(BLOB)
        await b.join(BLOB)
        place = await c.join(BLOB, without=["a"], reports=[("a", Fault.FAILED)])
        assert "a" not in [parent.id for parent in place.parents]
        await b.beat(reports=(("a", Fault.SLOW),))
        assert b.places[BLOB].parents == ()
        assert (await statistics(run))["suspended"] == 1


async def test_trees_are_back_one_heartbeat_after_a_restart(tmp_path: Path) -> None:
    peers = [peer(str(number), rack=f"r{number % 3}") for number in range(9)]
    async with directory(tmp_path) as run:
        port = int(run.url.rpartition(":")[2])
        async with nodes(run, *peers) as made:
            for node in made:
                await node.join(BLOB, OTHER)
            before = await made[0].client.trees([BLOB, OTHER])
            places = [dict(node.places) for node in made]
    async with directory(tmp_path, port=port) as run, nodes(run, *peers, peer("new")) as (*again, new):
        assert (await statistics(run))["nodes"] == 0
        for node, place in zip(again, places, strict=True):
            node.places = dict(place)
        # Children may well be heard of before their parents.
        await asyncio.gather(*(node.beat() for node in reversed(again)))
        after = await again[0].client.trees([BLOB, OTHER])
        assert {blob: parents(rows) for blob, rows in after.items()} == {b: parents(r) for b, r in before.items()}
        assert [node.places for node in again] == places, "nobody was moved"
        await new.join(BLOB)
        assert new.places[BLOB].order > max(place[BLOB].order for place in places)


def parents(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["id"]: row["parent"] for row in rows}


async def test_a_node_that_is_not_heard_of_is_forgotten_while_others_stay(tmp_path: Path) -> None:
    async with directory(tmp_path, heartbeat=0.2, expiry=0.4) as run, nodes(run, peer("a"), peer("b")) as (a, b):
        await a.join(BLOB)
        await b.join(BLOB)
        async with asyncio.timeout(10):
            while (await statistics(run))["expired"] == 0:
                await b.beat()
        assert [row["id"] for row in (await b.client.trees([BLOB]))[BLOB]] == ["b"]
        await b.client.leave()
        assert (await statistics(run))["nodes"] == 0


async def test_nobody_speaks_for_a_node_at_another_address(tmp_path: Path) -> None:
    async with directory(tmp_path, root_slots=1) as run, nodes(run, peer("a"), peer("b")) as (a, b):
        await a.join(BLOB)
        connector = aiohttp.TCPConnector(local_addr=("127.0.0.2", 0))
        async with aiohttp.ClientSession(connector=connector) as stranger:
            for verb, message in (("join", Join(peer("a"), (BLOB,))), ("heartbeat", Heartbeat(peer("a"))),
                                  ("leave", Leave("a"))):  # fmt: skip
                url = f"{run.url}/v1/peers/{verb}"
                async with stranger.post(url, data=msgspec.json.encode(message)) as response:
                    assert response.status == Conflict.status, verb
        (parent,) = (await b.join(BLOB)).parents
        assert parent.address == "127.0.0.1:7071"
        assert (await statistics(run))["refused"] == 3


def huge() -> bytes:
    return msgspec.json.encode(Heartbeat(peer("a"), blobs=(Told(BLOB, 1, 1),) * 30_000))


BROKEN = [
     b"", b"{}", b"[]", b"\xff\xfe", b"[" * 10_000, b'{"id": ""}', huge(),
     msgspec.json.encode({"peer": {"id": "x" * 200, "address": ":1"}, "blobs": [BLOB]}),
     msgspec.json.encode({"peer": {"id": "a", "address": "host:99999"}, "blobs": []}),
     msgspec.json.encode({"peer": {"id": "a", "address": "http://x/y"}, "blobs": []}),
     msgspec.json.encode({"peer": {"id": "a", "slots": 10**9}, "blobs": []}),
     msgspec.json.encode({"peer": {"id": "a"}, "blobs": ["sha256:zz"]}),
     msgspec.json.encode({"peer": {"id": "a"}, "blobs": [BLOB] * 300, "load": "NaN"}),
]  # fmt: skip


@pytest.mark.parametrize("verb", ["join", "heartbeat", "leave"])
async def test_a_message_that_breaks_a_limit_is_refused_and_changes_nothing(tmp_path: Path, verb: str) -> None:
    async with directory(tmp_path) as run:
        for body in BROKEN:
            status, answer = await post(run, verb, body)
            assert (status, answer["error"]) == (400, "invalid"), body[:100]
        assert run.superpeer.fallbacks.statistics() == []
        assert (await statistics(run))["nodes"] == 0


async def test_trees_are_asked_for_by_digests_and_not_too_many(tmp_path: Path) -> None:
    async with directory(tmp_path) as run, aiohttp.ClientSession() as session:
        for query in ("", "?blob=x", "?" + "&".join([f"blob={BLOB}"] * 65)):
            async with session.get(f"{run.url}/v1/peers{query}") as response:
                assert response.status == 400
        async with session.get(f"{run.url}/v1/peers?blob={BLOB}") as response:
            assert await response.json() == {"trees": {BLOB: []}}
        async with session.get(f"{run.url}/metrics") as response:
            assert "dadi_superpeer_peers_nodes 0.0" in await response.text()


async def test_two_hundred_nodes_join_at_once_and_make_one_tree(tmp_path: Path) -> None:
    async with directory(tmp_path) as run, aiohttp.ClientSession() as session:

        async def join(number: int) -> None:
            body = msgspec.json.encode(Join(peer(str(number), rack=f"r{number % 8}"), (BLOB, OTHER)))
            async with session.post(f"{run.url}/v1/peers/join", data=body) as response:
                assert response.status == 200

        await asyncio.gather(*map(join, range(200)))
        async with session.get(f"{run.url}/v1/peers?blob={BLOB}") as response:
            rows = (await response.json())["trees"][BLOB]
        children = [row for row in rows if not row["parent"]]
        assert (len(rows), len(children)) == (200, 2)


def test_many_nodes_are_heard_of_less_often_and_forgotten_later() -> None:
    pace = _Pace(5.0, 15.0)
    pace.update(1000, 0.0)
    assert (pace.heartbeat, pace.expiry) == (5.0, 15.0)
    pace.update(10_000, 100.0)
    assert (pace.heartbeat, pace.expiry) == (40.0, 120.0)
    pace.update(10, 179.0)
    assert (pace.heartbeat, pace.expiry) == (40.0, 120.0), "not all nodes may know yet"
    pace.update(10, 180.0)
    assert (pace.heartbeat, pace.expiry) == (5.0, 120.0)
    pace.update(10, 259.0)
    assert pace.expiry == 120.0, "who keeps to the old pace is not forgotten"
    pace.update(10, 260.0)
    assert (pace.heartbeat, pace.expiry) == (5.0, 15.0)


async def test_joins_of_a_crowd_are_put_off_while_all_else_is_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rush, "SHARE", 0.01)  # the crowd has the same process: it cannot come any faster
    async with directory(tmp_path, trust_addresses=True) as run, aiohttp.ClientSession() as session:

        async def join(name: str) -> tuple[int, str]:
            body = msgspec.json.encode(Join(peer(name), (BLOB,)))
            async with session.post(f"{run.url}/v1/peers/join", data=io.BytesIO(body)) as response:
                await response.read()
                return response.status, response.headers.get("Retry-After", "")

        assert await join("first") == (200, "")
        peers = await status_of(session, run)
        assert peers["put_off"] == 0
        answers = await asyncio.gather(*(join(f"n{n}") for n in range(300)))
        taken = sum(code == 200 for code, _ in answers)
        assert {code for code, _ in answers} == {200, 503}
        assert all(1 <= int(after) <= 61 for code, after in answers if code == 503)
        peers = await status_of(session, run)
        assert (peers["put_off"], peers["nodes"]) == (300 - taken, taken + 1)
        beat = msgspec.json.encode(Heartbeat(peer("first"), blobs=(Told(BLOB, 1, 1),)))
        async with session.post(f"{run.url}/v1/peers/heartbeat", data=io.BytesIO(beat)) as response:
            assert response.status == 200


async def status_of(session: aiohttp.ClientSession, run: Running) -> dict[str, Any]:
    async with session.get(f"{run.url}/v1/status") as response:
        found: dict[str, Any] = (await response.json())["peers"]
        return found
