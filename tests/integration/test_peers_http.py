"""Several nodes' parents and servers over loopback, with a superpeer: each chunk comes down each edge once, whatever
goes wrong with one of them. No FUSE: a node here is what is between its store and the network.

Longer than 400 lines: the same few nodes, through all that peers can do to each other.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from dadi import http
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.serving import BlobServer, Compressor
from dadi.blobs.source import Urgency
from dadi.errors import Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from dadi.peers import health, patience
from dadi.peers.frames import Frames
from dadi.peers.health import Health, State
from dadi.peers.parents import Parents
from dadi.peers.places import Fault, Heartbeat, Peer, Place
from dadi.peers.pressure import Pressure
from dadi.peers.server import PeerServer
from dadi.peers.tries import Settings as Waiting
from dadi.peers.upload import Upload
from tests.contracts.store import content
from tests.lab.waiting import until

C = 64 << 10
DATA = content(40 * C + 777)
TEXT = b"".join(b"%d bottles of beer on the wall\n" % n for n in range(60_000))
BLOB, TEXT_BLOB = blob_of(DATA, C), blob_of(TEXT, C)
OF = {BLOB.digest: DATA, TEXT_BLOB.digest: TEXT}


class Root:
    """A superpeer's part: blobs over HTTP, and how often each chunk left."""

    def __init__(self, store: DiskBlobs) -> None:
        self.store = store
        self.chunks: Counter[int] = Counter()
        self.gate = asyncio.Event()
        self.gate.set()
        self.url = ""

    def find(self, digest: str) -> Blob:
        blob = self.store.find(digest)
        assert blob is not None
        return blob

    async def bring(self, blob: Blob, chunks: range, urgency: Urgency) -> None:
        self.chunks.update(chunks)
        await self.gate.wait()


class Tree:
    """A directory with a script: whose child each node is."""

    heartbeat_every = 0.2

    def __init__(self, parents: Sequence[Peer]) -> None:
        self.waits: dict[str, float] = {}
        self.parents = tuple(parents)
        self.joins: list[tuple[Sequence[str], list[str], list[tuple[str, Fault]]]] = []
        self.beats: list[Heartbeat] = []
        self.gone = 0
        self.silent = False

    async def join(self, peer: Peer, blobs: Sequence[str], without: Iterable[str] = (),
                   reports: Iterable[tuple[str, Fault]] = ()) -> dict[str, Place]:  # fmt: skip
        self.joins.append((blobs, list(without), list(reports)))
        if self.silent:
            await asyncio.get_running_loop().create_future()
        parents = tuple(parent for parent in self.parents if parent.id not in without)
        return {blob: Place(1, 1, parents) for blob in blobs}

    async def heartbeat(self, beat: Heartbeat) -> dict[str, Place]:
        self.beats.append(beat)
        return {}

    async def leave(self) -> None:
        self.gone += 1

    def reports(self) -> list[tuple[str, Fault]]:
        """Return what was said of others, in joins or in heartbeats."""
        said = [*(reports for _, _, reports in self.joins), *(beat.reports for beat in self.beats)]
        return [report for reports in said for report in reports]


class Node:
    """Store, chain, parents and server of one node."""

    def __init__(self, world: World, name: str, above: Sequence[Node | Peer], **options: Any) -> None:
        self.name = name
        self.fallbacks = Fallbacks()
        self.blobs = list(world.blobs)
        self.store = DiskBlobs(world.directory / name)
        self.session = http.client(connect=1, read=5)
        self.tree = Tree([node.peer if isinstance(node, Node) else node for node in above])
        # Where nothing is to go wrong, a busy machine is no reason to ask others.
        calm = health.Settings(margin=5.0, longest=5.0)
        self.health = Health(calm if options.pop("calm", False) else patience.upstreams())
        self.frames = Frames(options.pop("frames", 1 << 20))
        self.parents = Parents(
            Peer(name), self.tree, lambda digest: [world.root.url], self.session, self.health, self.frames,
            self.fallbacks, in_use=lambda: self.blobs,
            present=lambda blob: (self.store.present_bytes(blob) // C, self.store.has(blob.digest)),
        )  # fmt: skip
        self.chain = Chain(self.store, self.parents, patience=options.pop("patience", 5.0), fallbacks=self.fallbacks,
                           hurry=self.parents.hurry)  # fmt: skip
        self.upload = Upload(rate=options.pop("rate", 0), children=options.pop("children", 0))
        self.server = PeerServer(
            self.store, self.chain, self.frames, self.upload, Pressure(memory=0, cpu=0),
            known=self.parents.membership.blobs.get, instead=self.parents.parent_of,
        )  # fmt: skip
        self.before: Any = None
        self.answers: Counter[int] = Counter()
        self.peer = Peer(name)

    async def start(self, blobs: Iterable[Blob]) -> None:
        app = self.server.application()

        @web.middleware
        async def watched(request: web.Request, handler: Any) -> web.StreamResponse:
            if self.before is not None:
                await self.before(request)
            response: web.StreamResponse = await handler(request)
            self.answers[response.status] += 1
            return response

        app.middlewares.append(watched)
        self.runner, address = await http.serve_tcp(app, "127.0.0.1:0")
        self.peer = self.parents.peer = self.parents.membership.peer = Peer(self.name, address)
        self.parents.start()
        self.parents.expect(blobs)

    async def stop_serving(self) -> None:
        await self.runner.cleanup()

    async def close(self) -> None:
        await self.parents.membership.close()
        await self.runner.cleanup()
        await self.chain.close()
        await self.parents.close()
        await self.session.close()
        await self.store.close()

    async def read(self, blob: Blob = BLOB, step: int = 16, urgency: Urgency = Urgency.DEMAND) -> bytes:
        parts = []
        for at in range(0, blob.table.count, step):
            parts += await self.chain.read(blob, range(at, min(at + step, blob.table.count)), urgency)
        return b"".join(parts)

    def came_from(self) -> dict[str, int]:
        return {row["name"]: row["bytes"] for row in self.parents.statistics()["upstreams"] if row["bytes"]}


class World:
    def __init__(self, directory: Path, root: Root) -> None:
        self.directory = directory
        self.root = root
        self.blobs = [BLOB, TEXT_BLOB]
        self.nodes: list[Node] = []

    async def node(self, name: str, *above: Node | Peer, **options: Any) -> Node:
        node = Node(self, name, above, **options)
        self.nodes.append(node)
        await node.start(self.blobs)
        return node


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    store = DiskBlobs(tmp_path / "root")
    for blob, data in ((BLOB, DATA), (TEXT_BLOB, TEXT)):
        await store.keep(blob, 0, [data[at : at + C] for at in range(0, len(data), C)])
        await store.finish(blob)
    root = Root(store)
    app = http.application()
    server = BlobServer(root, Compressor(cache=1 << 20))
    app.router.add_get("/v1/blobs/{digest}", server.handle)
    runner, address = await http.serve_tcp(app, "127.0.0.1:0")
    root.url = f"http://{address}"
    world = World(tmp_path, root)
    async with asyncio.timeout(30):
        yield world
    for node in reversed(world.nodes):
        await node.close()
    await runner.cleanup()
    await store.close()


async def test_eight_nodes_in_a_tree_take_each_chunk_from_the_superpeer_once(world: World) -> None:
    top = await world.node("n0", calm=True)
    nodes = [top]
    for number in range(1, 8):
        nodes.append(await world.node(f"n{number}", nodes[(number - 1) // 2], *nodes[:1], calm=True))
    for blob in world.blobs:
        read = await asyncio.gather(*(node.read(blob, step=1 + number) for number, node in enumerate(nodes)))
        assert all(data == OF[blob.digest] for data in read)
    assert set(world.root.chunks.values()) <= {1, 2}, "two blobs, each of their chunks once"
    total = len(DATA) + len(TEXT)
    assert top.came_from() == {world.root.url: total}
    for number, node in enumerate(nodes[1:], 1):
        assert node.came_from() == {nodes[(number - 1) // 2].name: total}
        assert node.parents.statistics()["asking"]["peer_bytes"] == total


async def test_a_chain_of_nodes_is_passed_on_chunk_by_chunk(world: World) -> None:
    nodes = [await world.node("n0", calm=True)]
    for number in range(1, 6):
        nodes.append(await world.node(f"n{number}", nodes[-1], calm=True))
    world.root.gate.clear()
    reading = asyncio.create_task(nodes[-1].read())
    await until(lambda: nodes[-1].parents.asking.counts["waits"] >= 2)
    assert nodes[-1].server.waits == 0
    assert nodes[-2].server.waits > 0, "a node that waits says so"
    world.root.gate.set()
    assert await reading == DATA
    assert set(world.root.chunks.values()) == {1}
    assert all(node.parents.asking.statistics()["hedges"] == 0 for node in nodes)


async def test_compressed_chunks_are_passed_on_as_they_came(world: World) -> None:
    top = await world.node("n0", calm=True)
    low = await world.node("n1", top, calm=True)
    assert await low.read(TEXT_BLOB) == TEXT
    (upstream,) = low.parents.statistics()["upstreams"]
    assert 0 < upstream["wire_bytes"] < len(TEXT) // 4
    first, last = TEXT_BLOB.table.count - 2, TEXT_BLOB.table.count - 1
    assert low.frames.get(TEXT_BLOB, first) == top.frames.get(TEXT_BLOB, first)
    assert low.frames.get(TEXT_BLOB, last) is not None


async def test_a_chunk_that_does_not_compress_among_others_that_do_is_no_fault_of_the_superpeer(world: World) -> None:
    data = TEXT[: 2 * C] + DATA[:C] + TEXT[: 5 * C]
    blob = blob_of(data, C)
    await world.root.store.keep(blob, 0, [data[at : at + C] for at in range(0, len(data), C)])
    await world.root.store.finish(blob)
    world.blobs.append(blob)
    node = await world.node("n0", patience=0.3)
    assert await node.read(blob) == data
    assert node.parents.asking.counts["wrong"] == 0


async def test_that_a_chunk_comes_plain_from_who_does_not_compress_says_nothing_of_it(world: World) -> None:
    top = await world.node("top", frames=0, calm=True)
    low = await world.node("low", top, calm=True)
    assert await low.read(TEXT_BLOB) == TEXT
    assert low.came_from() == {"top": len(TEXT)}
    assert low.frames.get(TEXT_BLOB, 0) is None
    below = await world.node("below", low, calm=True)
    assert await below.read(TEXT_BLOB) == TEXT
    assert below.frames.get(TEXT_BLOB, 0), "so it is found out when it is passed on"


async def test_without_a_cache_for_frames_chunks_go_plain(world: World) -> None:
    top = await world.node("n0", frames=0, calm=True)
    low = await world.node("n1", top, calm=True)
    assert await low.read(TEXT_BLOB) == TEXT
    (upstream,) = low.parents.statistics()["upstreams"]
    assert upstream["wire_bytes"] == len(TEXT)


async def test_a_dead_parent_is_left_for_the_next_and_reported(world: World) -> None:
    top = await world.node("n0")
    dead = await world.node("dead", top)
    low = await world.node("low", dead, top)
    await low.chain.read(BLOB, range(4))
    assert low.came_from() == {"dead": 4 * C}
    await dead.stop_serving()
    assert await low.read() == DATA
    assert low.health.state("dead", asyncio.get_running_loop().time()) in (State.DROPPED, State.PROBING)
    await until(lambda: ("dead", Fault.FAILED) in low.tree.reports())
    await until(lambda: any("dead" in without for _, without, _ in low.tree.joins))


async def test_a_silent_parent_costs_a_hedge_and_not_a_timeout(world: World) -> None:
    top = await world.node("n0")
    silent = await world.node("silent", top)
    low = await world.node("low", silent, top)
    below = await world.node("below", low)
    stop = asyncio.Event()

    async def before(request: web.Request) -> None:
        await stop.wait()

    silent.before = before
    began = asyncio.get_running_loop().time()
    assert await below.read() == DATA
    took = asyncio.get_running_loop().time() - began
    stop.set()
    assert took < 3.0
    assert low.parents.asking.statistics()["hedges"] >= 1
    assert below.parents.asking.statistics()["hedges"] == 0, "only the one right below hedges"
    assert set(below.came_from()) == {"low"}


async def test_a_crawling_parent_is_left(world: World) -> None:
    top = await world.node("n0")
    slow = await world.node("slow", top, rate=C)
    slow.upload._free_at = 0.0
    low = await world.node("low", slow, top)
    assert await low.read(step=4) == DATA
    assert low.came_from()["n0"] > len(DATA) // 2


async def test_a_liar_is_barred_and_nobody_reads_what_it_says(world: World) -> None:
    top = await world.node("n0")
    liar = web.Application()

    async def lie(request: web.Request) -> web.Response:
        first, last = (int(n) for n in request.headers["Range"].removeprefix("bytes=").split("-"))
        said = {"Content-Range": f"bytes {first}-{last}/{BLOB.size}"}
        return web.Response(status=206, body=b"\xff" * (last - first + 1), headers=said)

    liar.router.add_get("/v1/blobs/{digest}", lie)
    runner, address = await http.serve_tcp(liar, "127.0.0.1:0")
    low = await world.node("low", Peer("liar", address), top)
    try:
        assert await low.read() == DATA
        assert low.health.state("liar", 1e12) is State.BARRED
        assert low.parents.asking.statistics()["wrong"] >= 1
        await until(lambda: low.tree.beats)
        assert low.tree.beats[-1].liars == ("liar",)
    finally:
        await runner.cleanup()


async def test_a_loop_of_parents_ends(world: World) -> None:
    a = await world.node("a")
    b = await world.node("b", a)
    a.tree.parents = (b.peer,)
    a.parents.membership.places.clear()
    a.parents.asking.learn(BLOB.digest, Place(9, 1, (b.peer,)))
    a.parents.membership.addresses["b"] = b.peer.address
    assert await asyncio.wait_for(a.chain.read(BLOB, range(2)), 15) == [DATA[:C], DATA[C : 2 * C]]


async def test_a_parent_without_a_free_place_sends_its_children_to_others(world: World) -> None:
    top = await world.node("n0")
    full = await world.node("full", top, children=1)
    full.upload.admit("somebody")
    low = await world.node("low", full, top)
    assert await low.read() == DATA
    assert full.answers[429] >= 1
    assert set(low.came_from()) == {"n0"}
    assert low.parents.asking.counts["busy"] >= 1


async def test_a_blob_that_a_parent_left_is_asked_of_others(world: World) -> None:
    top = await world.node("n0")
    left = await world.node("left", top)
    left.blobs.clear()
    left.parents.membership.blobs.clear()
    low = await world.node("low", left, top)
    assert await low.read() == DATA
    assert left.answers[206] == 0
    assert low.health.state("left", asyncio.get_running_loop().time()) is State.GOOD, "that is no fault"
    assert any("left" in without for _, without, _ in low.tree.joins)


async def test_reads_go_to_the_superpeer_while_no_place_comes(world: World) -> None:
    node = Node(world, "late", ())
    world.nodes.append(node)
    node.tree.silent = True
    await node.start(world.blobs)
    assert await node.read() == DATA
    assert node.parents.membership.late >= 1
    assert "no parents in time, superpeer read" in {row["kind"] for row in node.fallbacks.statistics()}


async def test_demand_overtakes_backfill_that_waits_in_the_queue(world: World) -> None:
    node = await world.node("n0")
    world.root.gate.clear()
    bulk = asyncio.create_task(node.read(step=BLOB.table.count, urgency=Urgency.BACKFILL))
    last = BLOB.table.count - 1
    await until(lambda: world.root.chunks)
    assert not world.root.chunks[last]
    wanted = asyncio.create_task(node.chain.read(BLOB, range(last, last + 1)))
    await until(lambda: world.root.chunks[last])
    world.root.gate.set()
    assert await wanted == [DATA[last * C :]]
    assert await bulk == DATA
    assert set(world.root.chunks.values()) == {1}


async def test_demand_hurries_what_backfill_wants_of_a_blob_that_has_no_place_yet(world: World) -> None:
    node = await world.node("n0")
    node.tree.silent = True
    node.parents.membership.places.clear()
    node.parents.membership._joined[BLOB.digest] = asyncio.Event()
    node.parents.membership._expected_at[BLOB.digest] = time.monotonic()
    asked: list[Urgency] = []
    bring = world.root.bring

    async def watched(blob: Blob, chunks: range, urgency: Urgency) -> None:
        asked.append(urgency)
        await bring(blob, chunks, urgency)

    world.root.bring = watched
    backfill = asyncio.ensure_future(node.chain.read(BLOB, range(1), Urgency.BACKFILL))
    while not node.parents._unplaced:
        await asyncio.sleep(0)
    assert await node.chain.read(BLOB, range(1)) == await backfill
    assert asked == [Urgency.DEMAND]
    assert not node.parents._unplaced


async def test_when_everybody_is_away_a_read_fails_in_time_and_says_why(world: World) -> None:
    node = await world.node("n0", patience=0.3)
    world.root.url = "http://127.0.0.1:1"
    with pytest.raises(Unavailable, match="cannot connect"):
        await node.chain.read(BLOB, range(1))


@pytest.mark.parametrize("status", [302, 403, 404])
async def test_while_another_program_has_the_superpeers_port_reads_wait(world: World, status: int) -> None:
    async def other(request: web.Request) -> web.Response:
        return web.Response(status=status, text="it works", headers={"Location": "/index.html"})

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", other)
    runner, address = await http.serve_tcp(app, "127.0.0.1:0")
    node = await world.node("n0", patience=30.0)
    ours, world.root.url = world.root.url, f"http://{address}"
    wanted = asyncio.ensure_future(node.chain.read(BLOB, range(1)))
    while not node.chain.patient.waiting:
        assert not wanted.done()
        await asyncio.sleep(0.01)
    for chooser in node.parents.asking.choosers.values():
        chooser.superpeers = (ours,)
    assert await wanted == [DATA[:C]]
    await runner.cleanup()


async def test_a_parent_that_is_the_node_itself_is_soon_left(world: World) -> None:
    node = await world.node("n0")
    node.parents.asking.chooser(BLOB.digest).lateness.settings = Waiting(waiting_most=0.5, waiting_suspect=0.2)
    await node.parents.membership.placed(BLOB.digest)
    node.parents.membership.addresses["ghost"] = node.peer.address
    node.parents.asking.learn(BLOB.digest, Place(1, 1, (Peer("ghost", node.peer.address),)))
    assert await node.read(step=1) == DATA
    assert node.health.state("ghost", time.monotonic()) in (State.DROPPED, State.PROBING)  # its second may be over
    assert node.parents.asking.counts["waits"]


async def test_a_heartbeat_says_what_is_here_and_leaving_is_said(world: World) -> None:
    node = await world.node("n0")
    await node.chain.read(BLOB, range(3))
    await until(lambda: node.tree.beats)
    told = {told.blob: told for told in node.tree.beats[-1].blobs}
    assert told[BLOB.digest].chunks == 3
    assert not told[BLOB.digest].complete
    node.blobs = [TEXT_BLOB]
    node.parents.membership._expected_at[BLOB.digest] -= 100
    count = len(node.tree.beats)
    await until(lambda: len(node.tree.beats) >= count + 2)
    assert [told.blob for told in node.tree.beats[-1].blobs] == [TEXT_BLOB.digest]
    await node.parents.membership.close()
    assert node.tree.gone == 1


async def test_readers_that_go_away_leave_nothing_behind(world: World) -> None:
    node = await world.node("n0")
    low = await world.node("n1", node)
    world.root.gate.clear()
    tasks = [asyncio.create_task(low.chain.read(BLOB, range(n, n + 4))) for n in range(0, 40, 4)]
    await until(lambda: low.parents.asking.statistics()["in_flight"])
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    world.root.gate.set()
    await until(lambda: low.parents.asking.statistics()["in_flight"] == 0)
