"""Registry proxies: inside the test's own process and event loop with a client that is only HTTP; or as processes."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from dadi import http
from dadi.blobs.config import StoreConfig
from dadi.blobs.disk import DiskBlobs
from dadi.fallbacks import Fallbacks
from dadi.oci import media_types
from dadi.oci.config import RegistryConfig
from dadi.originals.config import OriginalsConfig
from dadi.tls import TlsConfig
from registry_proxy.config import FrontConfig, ProxyConfig
from registry_proxy.proxy import Proxy
from tests.lab.cleanup import Lab
from tests.lab.network import Host
from tests.lab.processes import Process

ACCEPT = {"Accept": media_types.ACCEPT}


class RunningProxy:
    """A proxy that serves at `url`. `get` and the like read the whole answer."""

    def __init__(self, proxy: Proxy, store: DiskBlobs, url: str, session: aiohttp.ClientSession) -> None:
        self.proxy, self.store, self.url, self.session = proxy, store, url, session

    @property
    def host(self) -> str:
        return self.url.removeprefix("http://")

    async def ask(self, method: str, path: str, **options: Any) -> tuple[aiohttp.ClientResponse, bytes]:
        async with self.session.request(method, self.url + path, allow_redirects=False, **options) as response:
            return response, await response.read()

    async def get(self, path: str, **options: Any) -> tuple[aiohttp.ClientResponse, bytes]:
        return await self.ask("GET", path, **options)

    def fallbacks(self) -> list[str]:
        return [row["kind"] for row in self.proxy.fallbacks.statistics()]


def config(directory: Path, registry: str, **options: Any) -> ProxyConfig:
    """Return a configuration for a proxy of a registry on loopback."""
    return ProxyConfig(
        state=str(directory),
        listen="127.0.0.1:0",
        superpeers=options.get("superpeers", ()),
        front=FrontConfig(upstream=registry, **options.get("front", {})),
        store=StoreConfig(limit=options.get("limit", 0)),
        originals=OriginalsConfig(**options.get("originals", {})),
        tls=options.get("tls", TlsConfig()),
        registry=RegistryConfig(allowed=(registry, *options.get("allowed", ())),
                                plain_http=(registry, *options.get("allowed", ())),
                                retries=options.get("retries", 2), backoff=0.001,
                                docker_config=options.get("docker_config", ""),
                                mirrors=options.get("mirrors", {})),
    )  # fmt: skip


@contextlib.asynccontextmanager
async def proxied(directory: Path, registry: str, **options: Any) -> AsyncIterator[RunningProxy]:
    """Run a proxy whose default upstream is `registry` (host:port, plain HTTP)."""
    made = config(directory, registry, **options)
    store = DiskBlobs(directory / "store", limit=made.store.limit)
    try:
        proxy = await Proxy.start(made, store, Fallbacks(), options.get("source"))
        try:
            runner, address = await http.serve_tcp(proxy.application(), made.listen, proxy.tls)
            try:
                async with aiohttp.ClientSession(auto_decompress=False) as session:
                    yield RunningProxy(proxy, store, f"http://{address}", session)
            finally:
                await runner.cleanup()
        finally:
            await proxy.close()
    finally:
        await store.close()


class ProxyProcess(Process):
    """`dadi-registry-proxy` on `host`, for one registry (host:port, plain HTTP); through superpeers if there are any.

    Its store is in the lab's directory.
    """

    def __init__(self, lab: Lab, host: Host, registry: str, superpeers: Sequence[str] = (), *, port: int = 7072,
                 name: str = "proxy", front: str = "", sections: str = "") -> None:  # fmt: skip
        directory = lab.root / name
        directory.mkdir(exist_ok=True)
        self.address = f"{host.address}:{port}"
        self._port = port
        file = directory / "proxy.toml"
        file.write_text(
            f'listen = "{self.address}"\nstate = "{directory / "state"}"\nlog_json = true\n'
            f"superpeers = {json.dumps(list(superpeers))}\n[front]\nupstream = {json.dumps(registry)}\n{front}\n"
            f"[registry]\nallowed = [{json.dumps(registry)}]\nplain_http = [{json.dumps(registry)}]\n{sections}\n"
        )
        super().__init__(lab, name, [sys.executable, "-m", "registry_proxy", "--config", str(file)], host=host)
        self.wait_until(lambda: host.get(host.address, port, "/healthz")[0] == 200)

    def status(self) -> dict[str, Any]:
        """Return GET /v1/status."""
        assert self.host is not None
        value: dict[str, Any] = json.loads(self.host.get(self.host.address, self._port, "/v1/status")[1])
        return value
