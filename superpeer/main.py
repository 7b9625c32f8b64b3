"""`dadi-superpeer`: the process. Opens the store, starts the service, serves HTTP until it is told to stop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from dadi import http, program
from dadi.blobs.disk import DiskBlobs
from dadi.fallbacks import Fallbacks
from dadi.notify import notify
from superpeer import app
from superpeer.config import SuperpeerConfig
from superpeer.service import Superpeer
from superpeer.who_may import WhoMay

log = structlog.get_logger()


async def serve(config: SuperpeerConfig, stop: asyncio.Event) -> None:
    """Run a superpeer until `stop` is set."""
    store = await asyncio.to_thread(DiskBlobs.of_state, Path(config.state), config.store.limit)
    superpeer = Superpeer(config, store, Fallbacks())
    who_may: WhoMay | None = None
    try:
        await superpeer.start()
        who_may = await WhoMay.open(config, superpeer.fallbacks)
        if config.authorization == "open":
            log.warning("whoever reaches this superpeer may have every image", authorization="open")
        runner, address = await http.serve_tcp(app.create(superpeer, who_may), config.listen, superpeer.tls)
        try:
            log.info("superpeer is ready", address=address, state=config.state, images=len(superpeer.catalog.records()))
            notify.ready()
            await stop.wait()
        finally:
            await runner.cleanup()
    finally:
        if who_may is not None:
            await who_may.close()
        await superpeer.close()
        await store.close()


main = program.daemon(
    "dadi-superpeer",
    "Cache a datacenter's image blobs: fetch each from the registry once, index images, serve ranges to nodes.",
    SuperpeerConfig,
    serve,
)

if __name__ == "__main__":
    main()
