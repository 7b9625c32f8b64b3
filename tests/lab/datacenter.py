"""Superpeers that know each other, over loopback, in the test's own process; each can be killed and started again.

What lives here: `Datacenter`, a node's client of one, and layers of which each superpeer owns its share. What never
does: what goes wrong between them (tests/integration/test_siblings.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, Protocol

from aiohttp import web

from dadi import digest as digests
from dadi.fallbacks import Fallbacks
from dadi.index import image as image_index
from dadi.index.image import ImageIndex
from dadi.peers.owners import owners
from dadi.peers.superpeer import SuperpeerClient, image_answer
from tests.contracts.store import content
from tests.fakes.registry import FakeRegistry
from tests.lab.network import free_ports
from tests.lab.services import PLATFORM, Running, running, tar_of
from tests.lab.waiting import until


class Client:
    """What a node asks of superpeers."""

    def __init__(self, client: SuperpeerClient) -> None:
        self.client = client

    async def index(self, reference: str) -> ImageIndex:
        async with contextlib.aclosing(self.client.resolve(reference, PLATFORM)) as events:
            async for event in events:
                if event["event"] == "image":
                    answer = image_answer(event)
        return image_index.decode(await self.client.whole(answer.index_digest, answer.index_size))

    async def read(self, index: ImageIndex) -> list[bytes]:
        """Return all layers' tars, as a node reads them."""
        tars = []
        for layer in index.layers:
            table = layer.table
            parts = [part for at in range(0, table.count, 5)
                     for part in await self.client.source.read(layer.blob, range(at, min(at + 5, table.count)))]
            tars.append(b"".join(parts))
        return tars

    async def small(self, index: ImageIndex) -> None:
        """Read all that a mount needs."""
        metadata = index.metadata
        await self.client.source.read(metadata, range(metadata.table.count))
        for layer in index.layers:
            await self.client.whole(layer.index_digest, layer.index_size)


@contextlib.asynccontextmanager
async def a_node(*urls: str, **options: Any) -> AsyncIterator[Client]:
    """A node that has just started: it knows of nobody who is away."""
    client = SuperpeerClient(urls, Fallbacks(), connect=1, read=10, **options)
    try:
        yield Client(client)
    finally:
        await client.close()


class Datacenter(Client):
    """Superpeers that know each other, each of which can be killed and started again; a node's client of all."""

    def __init__(self, directory: Path, host: str, count: int, options: dict[str, Any]) -> None:
        self.directory = directory
        self.host = host
        self.options = {"authorization": "open", **options}
        self.urls = [f"http://127.0.0.1:{port}" for port in free_ports(count)]
        self.running: dict[str, Running] = {}
        self.fallbacks = Fallbacks()
        super().__init__(SuperpeerClient(self.urls, self.fallbacks, connect=1, read=10))
        self._stacks: dict[str, contextlib.AsyncExitStack] = {}

    async def start(self, url: str) -> Running:
        stack = self._stacks[url] = contextlib.AsyncExitStack()
        port = int(url.rpartition(":")[2])
        run = running(self.directory / str(self.urls.index(url)), self.host, port=port, url=url,
                      siblings=tuple(self.urls), **self.options)  # fmt: skip
        self.running[url] = await stack.enter_async_context(run)
        return self.running[url]

    async def kill(self, url: str) -> None:
        del self.running[url]
        await self._stacks.pop(url).aclose()

    def siblings(self, name: str) -> list[int]:
        return [run.superpeer.siblings.statistics()[name] for run in self.running.values() if run.superpeer.siblings]

    async def know(self, digest: str) -> None:
        """Wait until all have learnt of an image."""
        await until(lambda: all(run.superpeer.catalog.record_of(digest) for run in self.running.values()))


@contextlib.asynccontextmanager
async def datacenter(directory: Path, host: str, count: int = 2, **options: Any) -> AsyncIterator[Datacenter]:
    """Run superpeers for the registry at `host`; `options` are those of `running` (tests/lab/services.py)."""
    made = Datacenter(directory, host, count, options)
    try:
        for url in made.urls:
            await made.start(url)
        yield made
    finally:
        await made.client.close()
        for url in list(made.running):
            await made.kill(url)


class Sibling(Protocol):
    """A superpeer of a test's own."""

    async def serve(self, port: int) -> web.AppRunner:
        """Begin to serve."""


@contextlib.asynccontextmanager
async def beside(directory: Path, host: str, sibling: Sibling) -> AsyncIterator[Running]:
    """A superpeer for the registry at `host` whose only sibling is a test's own."""
    theirs, ours = free_ports(2)
    runner = await sibling.serve(theirs)
    try:
        async with running(directory, host, port=ours, url=f"http://127.0.0.1:{ours}", authorization="open",
                           siblings=(f"http://127.0.0.1:{theirs}",)) as run:  # fmt: skip
            yield run
    finally:
        await runner.cleanup()


def layers_owned_by_both(urls: list[str], count: int = 4) -> list[bytes]:
    """Return tars, half of which each superpeer owns."""
    found: dict[str, list[bytes]] = {url: [] for url in urls}
    seed = 0
    while any(len(tars) < count // 2 for tars in found.values()):
        seed += 1
        tar = tar_of(**{f"file-{seed}": content(150_000, seed)})
        mine = found[owners(digests.of(tar), urls)[0]]
        if len(mine) < count // 2:
            mine.append(tar)
    return [tar for tars in found.values() for tar in tars]


def copies(registry: FakeRegistry, layers: list[str]) -> list[int]:
    """Return how often each of these layers was asked for."""
    return [len(registry.asked(f"/blobs/{digest}", "GET")) for digest in layers]
