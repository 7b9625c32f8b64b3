"""The proxy, put together: store, upstream and front; for its own program, and for a node that embeds it.

A node that embeds it gives its own store and an upstream of its own making (`dadi/node/proxying.py`).
"""

from __future__ import annotations

from pathlib import Path

from aiohttp import web

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Source
from dadi.fallbacks import Fallbacks
from dadi.originals.client import FromSuperpeers
from dadi.tls import Tls
from registry_proxy import app
from registry_proxy.app import Front
from registry_proxy.config import ProxyConfig
from registry_proxy.uploads import Uploads
from registry_proxy.upstream import Direct, ProxyUpstream


class Proxy:
    """A proxy without its socket. Make it by `start`, end it by `close`; `store` is closed by who opened it."""

    def __init__(self, config: ProxyConfig, store: DiskBlobs, fallbacks: Fallbacks, source: Source | None = None,
                 upstream: ProxyUpstream | None = None) -> None:  # fmt: skip
        """`upstream`: in place of what `config` says of superpeers, and with its own TLS; ours to close.

        `source`: where chunks are looked for before the superpeers are asked.
        """
        self.tls = Tls.of(config.tls, fallbacks)
        self._direct: Direct | None = None
        self.upstream: ProxyUpstream
        if upstream is not None:
            self.upstream = upstream
        elif config.superpeers:
            self.upstream = FromSuperpeers(config.superpeers, store, fallbacks, connect=config.connect,
                                           read=config.stall, tls=self.tls, source=source)  # fmt: skip
        else:
            self._direct = Direct(config.registry, config.originals, Path(config.state), store, fallbacks)
            self.upstream = self._direct
        self._uploads = Uploads(config.registry)
        self.front = Front(config.front, self.upstream, self._uploads)
        self.fallbacks = fallbacks

    @classmethod
    async def start(cls, config: ProxyConfig, store: DiskBlobs, fallbacks: Fallbacks,
                    source: Source | None = None, upstream: ProxyUpstream | None = None) -> Proxy:  # fmt: skip
        """Return a proxy that has read what earlier runs left. Raises ConfigError."""
        proxy = cls(config, store, fallbacks, source, upstream)
        try:
            if proxy.tls:
                proxy.tls.check_urls("superpeers", config.superpeers)
                await proxy.tls.start()
            if proxy._direct:
                await proxy._direct.start()
        except BaseException:
            await proxy.close()
            raise
        return proxy

    def application(self) -> web.Application:
        """Return what is to be served."""
        return app.create(self.front, self.upstream, self.fallbacks)

    async def close(self) -> None:
        """Break off what is under way."""
        await self._uploads.close()
        await self.upstream.close()
        if self.tls:
            await self.tls.close()
