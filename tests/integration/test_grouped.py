"""The nodes of a rack join by one of themselves: a real superpeer's directory, real nodes without FUSE, over loopback.

What delegates do wrong costs no read: all nodes get all bytes whatever happens to the one that is asked.

Longer than 400 lines: one rack, through all that a delegate can do to it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from aiohttp import web

from dadi import http
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.serving import BlobServer, Compressor
from dadi.errors import Conflict, TokenRefused, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from dadi.peers import desk as desks
from dadi.peers import group as groups
from dadi.peers import grouped
from dadi.peers.desk import Desk
from dadi.peers.directory_client import DirectoryClient
from dadi.peers.frames import Frames
from dadi.peers.group import Group
from dadi.peers.grouped import GroupedDirectory
from dadi.peers.health import Health
from dadi.peers.health import Settings as Patience
from dadi.peers.parents import Parents
from dadi.peers.places import Heartbeat, Join, JoinAnswer, Peer, Place, Told
from dadi.peers.pressure import Pressure
from dadi.peers.server import PeerServer
from dadi.peers.superpeers import Superpeers
from dadi.peers.upload import Upload
from superpeer.config import PeersConfig
from superpeer.peers import Peers
from tests.contracts.store import content

C = 16 << 10
DATA, MORE = content(24 * C + 5), content(9 * C, 7)
BLOB, OTHER = blob_of(DATA, C), blob_of(MORE, C)
ALL = 8


class FixedTokens:
    """Tokens as far as a directory's client asks for them; nobody checks them here."""

    def __init__(self, text: str) -> None:
        self._text = text

    def text(self, digest: str) -> str:
        return self._text

    def headers(self, *blobs: str) -> dict[str, str]:
        return {}

    def groups(self, blobs: Any) -> list[tuple[dict[str, str], list[str]]]:
        return [({}, list(blobs))]


class Node:
    """A node's directory, parents and server, as `dadi/node/peering.py` puts them together."""

    def __init__(self, rack: Rack, name: str, token: str = "") -> None:
        self.name = name
        self.peer = Peer(name, "", "z", "r", 2)
        self.fallbacks = Fallbacks()
        self.store = DiskBlobs(rack.path / name)
        self.session = http.client(connect=1, read=5)
        self.superpeers = Superpeers([rack.superpeer], self.fallbacks)
        tokens: Any = FixedTokens(token) if token else None
        self.desk = Desk(Group(), Pressure(memory=0, cpu=0))
        outer = DirectoryClient(self.superpeers, self.session, self.fallbacks, tokens=tokens)
        self.directory = GroupedDirectory(outer, self.desk, self.session, self.fallbacks, me=lambda: self.peer,
                                          tokens=tokens)  # fmt: skip
        self.parents = Parents(
            self.peer, self.directory, lambda digest: [rack.root], self.session,
            Health(Patience(margin=5.0, longest=5.0)), Frames(0), self.fallbacks, in_use=lambda: (),
            present=lambda blob: (0, self.store.has(blob.digest)),
        )  # fmt: skip
        self.chain = Chain(self.store, self.parents, patience=10.0, fallbacks=self.fallbacks)
        self.server = PeerServer(self.store, self.chain, Frames(0), Upload(rate=0, children=0),
                                 Pressure(memory=0, cpu=0), known=self.parents.membership.blobs.get)  # fmt: skip
        self.asked: list[str] = []
        self.before: Callable[[web.Request], Awaitable[web.Response | None]] | None = None
        """Answers in place of the desk."""
        self.runner: web.AppRunner | None = None

    async def serve(self) -> None:
        app = self.server.application()
        self.desk.add_routes(app.router)

        @web.middleware
        async def watched(request: web.Request, handler: Any) -> Any:
            if request.path.startswith("/v1/peers"):
                assert "Authorization" not in request.headers, "a delegate is shown a token"
                self.asked.append(request.path.rpartition("/")[2])
                if self.before is not None and (said := await self.before(request)) is not None:
                    return said
            return await handler(request)

        app.middlewares.append(watched)
        port = self.peer.address.rpartition(":")[2] or "0"
        self.runner, address = await http.serve_tcp(app, f"127.0.0.1:{port}")
        self.peer = self.parents.peer = self.parents.membership.peer = msgspec.structs.replace(
            self.peer, address=address
        )

    async def hang_up(self) -> None:
        if self.runner is not None:
            await self.runner.cleanup()
            self.runner = None

    def expect(self, *blobs: Blob) -> None:
        self.parents.membership.expect(blobs)

    async def beat(self) -> None:
        await self.parents.membership.beat()

    async def read(self, blob: Blob = BLOB) -> bytes:
        return b"".join(await self.chain.read(blob, range(blob.table.count)))

    def place(self, blob: Blob = BLOB) -> Place:
        return self.parents.membership.places[blob.digest]

    def kinds(self) -> Counter[str]:
        return Counter({row["kind"]: row["count"] for row in self.fallbacks.statistics()})

    async def close(self) -> None:
        await self.directory.close()
        await self.parents.membership.close()
        await self.hang_up()
        await self.chain.close()
        await self.parents.close()
        await self.superpeers.close()
        await self.session.close()
        await self.store.close()


class Rack:
    """Nodes of one rack, a superpeer for their trees, and who gives the bytes."""

    def __init__(self, path: Path, root: str) -> None:
        self.path = path
        self.root = root
        self.nodes: dict[str, Node] = {}
        self.superpeer = ""

    async def superpeer_starts(self) -> None:
        self.peers = Peers(PeersConfig())
        app = http.application()
        self.peers.add_routes(app.router)
        app.cleanup_ctx.append(self.peers.running)
        port = self.superpeer.rpartition(":")[2] or "0"
        self.runner, address = await http.serve_tcp(app, f"127.0.0.1:{port}")
        self.superpeer = f"http://{address}"

    @property
    def joins(self) -> int:
        return self.peers.directory.joins

    async def add(self, count: int, token: str = "") -> None:
        for number in range(count):
            node = self.nodes[f"n{number}"] = Node(self, f"n{number}", token)
            await node.serve()
        await self.introduce()

    async def introduce(self) -> None:
        for _ in range(2):  # the first is told of nobody else
            for node in self.nodes.values():
                await node.directory.introduce()

    def delegates(self, blob: Blob = BLOB) -> list[Node]:
        group = next(iter(self.nodes.values())).desk.group
        return [self.nodes[name] for name in group.delegates(blob.digest)]

    def others(self, *without: Node) -> list[Node]:
        return [node for node in self.nodes.values() if node not in without]

    async def start(self, *nodes: Node) -> None:
        """Begin to join, one after the other so that what follows is the same each time."""
        for node in nodes or self.nodes.values():
            node.parents.membership.start()
            node.expect(BLOB, OTHER)
            await node.parents.membership._joined[BLOB.digest].wait()

    async def read(self, *nodes: Node) -> None:
        found = await asyncio.gather(*(node.read() for node in nodes or self.nodes.values()))
        assert all(data == DATA for data in found)

    def check_no_cycle(self) -> None:
        above = {name: [p.id for p in node.parents.membership.places[BLOB.digest].parents]
                 for name, node in self.nodes.items() if BLOB.digest in node.parents.membership.places}  # fmt: skip
        for start in above:
            way, at = [start], start
            while above.get(at):
                at = above[at][0]
                assert at not in way
                way.append(at)


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grouped, "_PATIENCE", 10.0)  # a busy machine is no silent delegate


@pytest.fixture
async def rack(tmp_path: Path) -> AsyncIterator[Rack]:
    async with contextlib.AsyncExitStack() as stack:
        store = DiskBlobs(tmp_path / "root")
        stack.push_async_callback(store.close)
        for blob, data in ((BLOB, DATA), (OTHER, MORE)):
            await store.keep(blob, 0, [data[at : at + C] for at in range(0, len(data), C)])
            await store.finish(blob)
        app = http.application()
        app.router.add_get("/v1/blobs/{digest}", BlobServer(_Root(store), Compressor(cache=1 << 20)).handle)
        runner, address = await http.serve_tcp(app, "127.0.0.1:0")
        stack.push_async_callback(runner.cleanup)
        made = Rack(tmp_path, f"http://{address}")
        await made.superpeer_starts()
        async with asyncio.timeout(60):
            yield made
        await asyncio.gather(*(node.close() for node in made.nodes.values()))
        await made.runner.cleanup()


class _Root:
    def __init__(self, store: DiskBlobs) -> None:
        self.store = store

    def find(self, digest: str) -> Blob:
        blob = self.store.find(digest)
        assert blob is not None
        return blob

    async def bring(self, blob: Blob, chunks: range, urgency: Any) -> None:
        """All is here."""


async def test_a_rack_joins_by_one_of_its_nodes_and_the_superpeer_sees_one_join(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    await rack.read()
    assert rack.joins == 2, "one for each blob"
    delegate, second = rack.delegates()
    assert set(delegate.asked) == {"join"}
    assert len(delegate.asked) == ALL - 1
    assert not second.asked
    assert sum(not node.place().parents for node in rack.nodes.values()) == 1
    for node in rack.nodes.values():
        assert not node.kinds(), "nothing fell back"
        for parent in node.place().parents:
            assert parent.address == rack.nodes[parent.id].peer.address
    rack.check_no_cycle()
    for node in rack.nodes.values():
        await node.beat()
    assert delegate.asked.count("heartbeat") == ALL - 1
    assert rack.peers.heartbeats == 1, "of the root, which is all that the superpeer hears"


async def test_a_delegate_that_is_gone_is_passed_over_and_said(rack: Rack) -> None:
    await rack.add(ALL)
    first, second = rack.delegates()
    await first.hang_up()
    others = rack.others(first)
    await rack.start(*others)
    await rack.read(*others)
    assert rack.joins == 2
    assert all(node.kinds() == {"delegate passed over": 1} for node in others)
    assert len(second.asked) == ALL - 2


async def test_without_any_delegate_all_join_at_the_superpeer(rack: Rack) -> None:
    await rack.add(ALL)
    for delegate in rack.delegates():
        await delegate.hang_up()
    others = rack.others(*rack.delegates())
    await rack.start(*others)
    await rack.read(*others)
    assert rack.joins == 2 * len(others)
    rack.check_no_cycle()


async def test_a_delegate_that_dies_later_is_followed_by_the_next_which_is_told_all(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    first, second = rack.delegates()
    before = {name: node.place().parents[:1] for name, node in rack.nodes.items()}
    await first.hang_up()
    others = rack.others(first)
    for node in others:
        await node.beat()
    for node in others:
        assert node.place().parents[:1] == before[node.name], "nobody moves because of it"
    assert second.desk.directory.statistics()["nodes"] == len(others)
    await rack.read(*others)
    rack.check_no_cycle()


async def test_when_the_last_delegate_dies_its_mates_join_at_the_superpeer(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    delegates = rack.delegates()
    for delegate in delegates:
        await delegate.hang_up()
    others = rack.others(*delegates)
    for node in others:
        await node.beat()
    assert all(node.desk.group.has_outer_place(BLOB.digest) for node in others)
    peers = rack.peers
    assert {row["id"] for row in peers.directory.tree(BLOB.digest)} >= {node.name for node in others}
    await rack.read(*others)
    rack.check_no_cycle()


async def test_a_delegate_that_is_restarted_knows_all_again_after_a_heartbeat(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    first = rack.delegates()[0]
    before = {name: node.place() for name, node in rack.nodes.items()}
    first.desk.directory = type(first.desk.directory)(first.desk.directory.settings, now=time.time())
    for node in rack.nodes.values():
        await node.beat()
    assert {name: node.place() for name, node in rack.nodes.items()} == before
    rows = {row["id"]: row["parent"] for row in first.desk.directory.tree(BLOB.digest)}
    assert rows == {name: (place.parents[0].id if place.parents else "") for name, place in before.items()}
    assert rack.joins == 2


async def _refuse(request: web.Request) -> web.Response | None:
    raise Unavailable("short of memory", retry_after=5)


async def _nonsense(request: web.Request) -> web.Response | None:
    return web.Response(body=b'{"places": 7}')


async def _silence(request: web.Request) -> web.Response | None:
    await asyncio.sleep(30)
    return None


@pytest.mark.parametrize("how", [_refuse, _nonsense, _silence], ids=["refuses", "nonsense", "silence"])
async def test_a_delegate_that_is_of_no_use_costs_a_moment_and_no_read(
    rack: Rack, how: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if how is _silence:
        monkeypatch.setattr(grouped, "_PATIENCE", 0.3)
    await rack.add(5)
    first, second = rack.delegates()
    first.before = how
    others = rack.others(first)
    await rack.start(*others)
    await rack.read(*others)
    assert all(node.kinds()["delegate passed over"] for node in others)
    assert second.asked


async def test_a_delegate_that_lies_leads_nowhere_but_to_mates(rack: Rack) -> None:
    await rack.add(5)
    first = rack.delegates()[0]
    strangers = (Peer("stranger", "127.0.0.1:9"), Peer("n0", "127.0.0.1:9"), Peer("n1", "127.0.0.1:9"))

    async def lie(request: web.Request) -> web.Response:
        said = msgspec.json.decode(await request.read(), type=Join)
        places = {blob: Place(9, 2, strangers) for blob in said.blobs}
        return web.Response(body=msgspec.json.encode(JoinAnswer(places, 3600.0)), content_type="application/json")

    first.before = lie
    others = rack.others(first)
    for node in others:  # they may now wait for each other: nobody does so for long
        node.parents.health.settings = Patience(margin=0.2, longest=0.3)
    await rack.start(*others)
    for node in others:
        assert node.directory.heartbeat_every < 60, "the pace is the superpeer's"
        for parent in node.place().parents:
            assert parent.address == rack.nodes[parent.id].peer.address
    await rack.read(*others)


async def test_parents_are_shown_no_token_unless_they_have_proved_that_they_hold_it(rack: Rack) -> None:
    await rack.add(6, token="the token of all")
    first = rack.delegates()[0]
    odd, *others = rack.others(first)
    odd.directory._tokens = FixedTokens("another token")
    await rack.start(odd, *others, first)
    assert odd.desk.group.has_outer_place(BLOB.digest), "it is the first, so the root"
    inner = [node for node in (*others, first) if not node.desk.group.has_outer_place(BLOB.digest)]
    assert inner, "who is asked for a place after the first that could not check its parent"
    for node in inner:
        assert odd.name not in {parent.id for parent in node.place().parents}, "the superpeer may say so, no mate"
    proofs = first.desk._proofs[BLOB.digest]
    assert proofs[others[0].name] == groups.proof("the token of all", others[0].name)
    await rack.read()


async def test_nobody_but_mates_at_their_own_address_is_heard(rack: Rack) -> None:
    await rack.add(4)
    desk = rack.nodes["n0"].desk
    url = f"http://{rack.nodes['n0'].peer.address}/v1/peers"
    stranger = Peer("stranger", "127.0.0.1:9", "z", "r")
    async with http.client() as session:

        async def post(verb: str, said: msgspec.Struct) -> None:
            async with http.request(session, "POST", f"{url}/{verb}", "asking", data=msgspec.json.encode(said)):
                pass

        for verb, said in (("join", Join(stranger, (BLOB.digest,))), ("heartbeat", Heartbeat(stranger))):
            with pytest.raises(Conflict, match="not known as a member"):
                await post(verb, said)
        assert rack.nodes["n0"].directory._soon.is_set(), "it asks the superpeer whether that is a new mate"
        desk.group.learn(9, [*desk.group.mates.values(), Peer("far", "10.1.1.1:1")])
        with pytest.raises(Conflict):
            await post("join", Join(Peer("far"), (BLOB.digest,)))
    assert desk.directory.statistics()["nodes"] == 0


async def test_who_has_just_come_up_waits_until_its_delegate_has_heard_of_it(
    rack: Rack, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(desks, "_STRANGER", 10.0)
    await rack.add(5)
    await rack.start()
    asking: list[asyncio.Task[None]] = []
    for node in rack.nodes.values():
        node.desk.unknown = lambda node=node: asking.append(asyncio.create_task(node.directory.introduce()))
    late = rack.nodes["late"] = Node(rack, "late")
    await late.serve()
    await late.directory.introduce()
    assert all("late" not in node.desk.group.mates for node in rack.others(late))
    before = rack.joins
    await rack.start(late)
    assert rack.joins == before, "it is no second root"
    assert late.place().parents
    assert not late.kinds()
    assert await late.read() == DATA
    await asyncio.gather(*asking)


async def test_strangers_do_not_wait_in_any_number(rack: Rack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(desks, "_STRANGER", 60.0)
    monkeypatch.setattr(desks, "_MOST_STRANGERS", 0)
    await rack.add(4)
    late = rack.nodes["late"] = Node(rack, "late")
    await late.serve()
    await late.directory.introduce()
    await rack.start(late)
    assert late.kinds()["delegate passed over"]
    assert late.place() is not None, "of the superpeer"


async def test_a_delegate_that_is_in_another_group_now_takes_nobodys_word_and_its_mates_go_on(rack: Rack) -> None:
    await rack.add(6)
    await rack.start()
    first = rack.delegates()[0]
    left = [node.peer for node in rack.others(first)]
    for node in rack.nodes.values():
        node.desk.group.learn(99, left)
    for node in rack.nodes.values():
        await node.beat()
        rows = (await node.directory.trees([BLOB.digest]))[BLOB.digest]
        assert node.name in {row["id"] for row in rows}
    inner = [node for node in rack.nodes.values() if not node.desk.group.has_outer_place(BLOB.digest)]
    assert inner
    assert all(node.desk.group.placed_by(BLOB.digest) != first.name for node in inner)
    await rack.read()
    rack.check_no_cycle()


@pytest.mark.parametrize("verb", ["join", "heartbeat", "leave"])
async def test_what_is_no_message_is_refused_and_changes_nothing(rack: Rack, verb: str) -> None:
    await rack.add(4)
    node = rack.nodes["n0"]
    url = f"http://{node.peer.address}/v1/peers/{verb}"
    hostile = [b"", b"{", b"[]", b'{"id": 7}', b"\xff", b"[" * 5000, b'{"peer": {"id": ""}, "blobs": []}',
               b" " * (2 << 20), b'{"peer": {"id": "n1"}, "blobs": ["../etc"]}']  # fmt: skip
    async with http.client() as session:
        for body in hostile:
            async with session.post(url, data=io.BytesIO(body)) as response:
                assert response.status == 400, body[:50]
    assert node.desk.directory.statistics()["nodes"] == 0


async def test_a_node_that_has_joined_nothing_leaves_its_group_without_a_token(rack: Rack) -> None:
    await rack.add(4)

    async def no_token(headers: Any, *blobs: str) -> None:
        raise TokenRefused("a token is needed, and none was shown")

    rack.peers.gate = SimpleNamespace(admit=no_token)
    node = rack.nodes["n0"]
    await node.directory.leave()
    assert len(rack.peers.groups) == 3
    assert not node.kinds()


async def test_groups_are_back_one_introduction_after_the_superpeer_was_restarted(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.runner.cleanup()
    await rack.superpeer_starts()
    for node in rack.nodes.values():
        await node.directory.introduce()
    assert len(rack.peers.groups) == ALL
    for node in rack.nodes.values():
        await node.directory.introduce()
        assert len(node.desk.group.mates) == ALL
    await rack.start()
    assert rack.joins == 2


async def test_groups_stay_while_no_superpeer_answers(rack: Rack) -> None:
    await rack.add(4)
    node = rack.nodes["n1"]
    node.superpeers._static = ["http://127.0.0.1:9"]
    node.superpeers._update()
    await node.directory.introduce()
    assert len(node.desk.group.mates) == 4
    assert node.kinds()


async def test_a_node_says_who_it_is_when_it_starts_and_leaves_when_it_stops(rack: Rack) -> None:
    await rack.add(0)
    node = rack.nodes["n0"] = Node(rack, "n0")
    await node.serve()
    node.directory.start()
    peers = rack.peers
    while not len(peers.groups):
        await asyncio.sleep(0.01)
    assert node.peer.id in {mate.id for mate in (peers.groups.find("n0"),) if mate}
    await node.directory.close()
    await node.directory.leave()
    assert len(peers.groups) == 0


async def test_two_nodes_of_a_rack_join_at_the_superpeer_as_ever(rack: Rack) -> None:
    await rack.add(2)
    await rack.start()
    await rack.read()
    assert rack.joins == 4
    assert not any(node.asked for node in rack.nodes.values())
    one, two = rack.nodes.values()
    assert [parent.id for parent in two.place().parents] == [one.name]


async def test_what_is_shown_of_a_tree_is_the_superpeers_part_and_that_of_the_rack(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    for node in rack.others(*rack.delegates())[:1] + rack.delegates():
        rows = (await node.directory.trees([BLOB.digest]))[BLOB.digest]
        assert {row["id"] for row in rows} == set(rack.nodes)
        assert Counter(row["parent"] for row in rows)[""] == 1
    told = rack.delegates()[0].directory.statistics()
    assert told["group"]["members"] == ALL
    assert told["group"]["joins"] == ALL


async def test_a_parent_that_dies_is_replaced_by_the_delegate(rack: Rack) -> None:
    await rack.add(ALL)
    await rack.start()
    root = next(node for node in rack.nodes.values() if not node.place().parents)
    child = next(node for node in rack.nodes.values() if node.place().parents[:1] == (node_peer(root),))
    await root.hang_up()
    await rack.read(child)
    while root.name in {parent.id for parent in child.place().parents}:
        await asyncio.sleep(0.01)
    rack.check_no_cycle()


def node_peer(node: Node) -> Peer:
    return groups.outward(node.peer)


async def test_what_a_delegate_is_told_of_a_superpeers_place_is_a_root(rack: Rack) -> None:
    await rack.add(4)
    await rack.start()
    first = rack.delegates()[0]
    root = next(node for node in rack.nodes.values() if not node.place().parents)
    beat = Heartbeat(root.peer, blobs=(Told(BLOB.digest, 5, 4, ("n9",)),))
    await root.directory.heartbeat(beat)
    row = next(row for row in first.desk.directory.tree(BLOB.digest) if row["id"] == root.name)
    assert (row["parent"], row["depth"]) == ("", 1)
