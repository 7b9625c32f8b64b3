"""Our services inside the test's own process and event loop, over real sockets: for tests that look into them."""

from __future__ import annotations

import contextlib
import io
import tarfile
from collections.abc import AsyncIterator
from pathlib import Path

from dadi import http
from dadi.blobs.disk import DiskBlobs
from dadi.fallbacks import Fallbacks
from dadi.index import image as image_index
from dadi.index.image import ImageIndex
from dadi.oci.config import RegistryConfig
from dadi.peers.superpeer import ImageAnswer, SuperpeerClient, image_answer
from superpeer import app
from superpeer.config import IndexingConfig, StoreConfig, SuperpeerConfig
from superpeer.service import Superpeer

PLATFORM = "linux/amd64"
CHUNK = 16 << 10


def tar_of(**files: bytes) -> bytes:
    """Return an uncompressed layer."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


class Running:
    """A superpeer that serves, and a client of it."""

    def __init__(self, superpeer: Superpeer, url: str) -> None:
        self.superpeer = superpeer
        self.url = url
        self.fallbacks = Fallbacks()
        self.client = SuperpeerClient([url], self.fallbacks, connect=3, read=10)

    async def image(self, reference: str, platform: str = PLATFORM) -> ImageAnswer:
        async with contextlib.aclosing(self.client.resolve(reference, platform)) as events:
            async for event in events:
                if event["event"] == "image":
                    return image_answer(event)
        raise AssertionError("no image event")

    async def index(self, reference: str) -> ImageIndex:
        answer = await self.image(reference)
        return image_index.decode(await self.client.whole(answer.index_digest, answer.index_size))


@contextlib.asynccontextmanager
async def running(directory: Path, host: str, **options: object) -> AsyncIterator[Running]:
    limit, port = options.pop("limit", 0), options.pop("port", 0)
    indexing = options.pop("indexing", IndexingConfig(chunk_size=CHUNK))
    config = SuperpeerConfig(
        state=str(directory),
        store=StoreConfig(limit=limit),
        indexing=indexing,
        registry=RegistryConfig(allowed=(host,), plain_http=(host,), retries=3, backoff=0.001),
        **options,
    )
    store = DiskBlobs(directory / "store", limit=limit)
    superpeer = Superpeer(config, store, Fallbacks())
    await superpeer.start()
    runner, address = await http.serve_tcp(app.create(superpeer), f"127.0.0.1:{port}")
    run = Running(superpeer, f"http://{address}")
    try:
        yield run
    finally:
        await run.client.close()
        await runner.cleanup()
        await superpeer.close()
        await store.close()
