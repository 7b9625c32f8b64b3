"""`dadi-registry-proxy`: the process. Opens the store, starts the proxy, serves HTTP until it is told to stop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from dadi import http, program
from dadi.blobs.disk import DiskBlobs
from dadi.fallbacks import Fallbacks
from dadi.notify import notify
from registry_proxy.config import ProxyConfig
from registry_proxy.proxy import Proxy

log = structlog.get_logger()


async def serve(config: ProxyConfig, stop: asyncio.Event) -> None:
    """Run a proxy until `stop` is set."""
    store = await asyncio.to_thread(DiskBlobs.of_state, Path(config.state), config.store.limit)
    try:
        proxy = await Proxy.start(config, store, Fallbacks())
        try:
            runner, address = await http.serve_tcp(proxy.application(), config.listen, proxy.tls)
            try:
                log.info("registry proxy is ready", address=address, upstream=repr(proxy.upstream))
                notify.ready()
                await stop.wait()
            finally:
                await runner.cleanup()
        finally:
            await proxy.close()
    finally:
        await store.close()


main = program.daemon(
    "dadi-registry-proxy",
    "Serve container engines as a mirror of any registry: each blob is fetched once, and shared.",
    ProxyConfig,
    serve,
)

if __name__ == "__main__":
    main()
