"""The nodes of a rack without FUSE, in the test's own process: directory, parents, server; and a superpeer.

What lives here: `Rack` and its `Node`s, over loopback. What never does: what a delegate does to its mates
(tests/integration/test_grouped.py).
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
from aiohttp import web

from dadi import http
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.serving import BlobServer, Compressor
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from dadi.peers.desk import Desk
from dadi.peers.directory_client import DirectoryClient
from dadi.peers.frames import Frames
from dadi.peers.group import Group
from dadi.peers.grouped import GroupedDirectory
from dadi.peers.health import Health
from dadi.peers.health import Settings as Patience
from dadi.peers.parents import Parents
from dadi.peers.places import Peer, Place
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


@contextlib.asynccontextmanager
async def rack_of(path: Path) -> AsyncIterator[Rack]:
    """A rack without nodes, below `path`; whoever gives the bytes has `BLOB` and `OTHER`."""
    async with contextlib.AsyncExitStack() as stack:
        store = DiskBlobs(path / "root")
        stack.push_async_callback(store.close)
        for blob, data in ((BLOB, DATA), (OTHER, MORE)):
            await store.keep(blob, 0, [data[at : at + C] for at in range(0, len(data), C)])
            await store.finish(blob)
        app = http.application()
        app.router.add_get("/v1/blobs/{digest}", BlobServer(_Root(store), Compressor(cache=1 << 20)).handle)
        runner, address = await http.serve_tcp(app, "127.0.0.1:0")
        stack.push_async_callback(runner.cleanup)
        made = Rack(path, f"http://{address}")
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
