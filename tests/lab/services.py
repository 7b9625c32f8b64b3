"""Our services inside the test's own process and event loop, over real sockets: for tests that look into them."""

from __future__ import annotations

import contextlib
import io
import tarfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from dadi import http
from dadi.blobs.config import StoreConfig
from dadi.blobs.disk import DiskBlobs
from dadi.fallbacks import Fallbacks
from dadi.index import image as image_index
from dadi.index.image import ImageIndex
from dadi.oci.config import RegistryConfig
from dadi.peers.access import FindCredentials
from dadi.peers.superpeer import ImageAnswer, SuperpeerClient, image_answer
from superpeer import app
from superpeer.config import IndexingConfig, SuperpeerConfig
from superpeer.service import Superpeer
from superpeer.who_may import WhoMay

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

    def __init__(self, superpeer: Superpeer, url: str, who_may: WhoMay, credentials: FindCredentials | None,
                 **options: Any) -> None:  # fmt: skip
        """Its client has the superpeer's own TLS, if that has any."""
        self.who_may = who_may
        self.superpeer = superpeer
        self.url = url
        self.fallbacks = Fallbacks()
        self.client = SuperpeerClient([url], self.fallbacks, connect=3, read=10, tls=superpeer.tls,
                                      credentials=credentials, **options)  # fmt: skip

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
async def running(directory: Path, *hosts: str, **options: object) -> AsyncIterator[Running]:
    limit, port = options.pop("limit", 0), options.pop("port", 0)
    docker_config = options.pop("docker_config", "")
    credentials, clock = options.pop("credentials", None), options.pop("clock", time.time)
    of_client = {name: options.pop(name) for name in ("refused",) if name in options}
    indexing = options.pop("indexing", IndexingConfig(chunk_size=CHUNK))
    config = SuperpeerConfig(
        state=str(directory),
        store=StoreConfig(limit=limit),
        indexing=indexing,
        registry=RegistryConfig(
            allowed=hosts, plain_http=hosts, retries=3, backoff=0.001, docker_config=str(docker_config)
        ),
        **options,
    )
    store = DiskBlobs(directory / "store", limit=limit)
    superpeer = Superpeer(config, store, Fallbacks())
    await superpeer.start()
    who_may = await WhoMay.open(config, superpeer.fallbacks, clock)
    runner, address = await http.serve_tcp(app.create(superpeer, who_may), f"127.0.0.1:{port}", superpeer.tls)
    run = Running(superpeer, f"{'https' if superpeer.tls else 'http'}://{address}", who_may, credentials,
                  **of_client)  # fmt: skip
    try:
        yield run
    finally:
        await run.client.close()
        await runner.cleanup()
        await who_may.close()
        await superpeer.close()
        await store.close()
