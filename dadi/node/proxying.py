"""The node's registry proxy: part of the composition root, and beside `node.py` the only file that knows all its parts.

    no superpeers       the embedded superpeer's originals: one store, one copy from the registry, for lazy and plain
    superpeers          theirs; blobs come chunk by chunk from the node's parents, and are served to other nodes

It shares the node's store, fallbacks and TLS. What plain pulls have brought is named in the node's heartbeats for as
long as it is in the store, so that others come for it; a token for each blob comes with its chunk table, and is renewed
by asking for the table again, as somebody who has asked for the blob lately (`dadi/originals/asked.py`): where there is
nobody any more, or all are refused, the node leaves the blob's tree.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import structlog
from aiohttp import web

from dadi import http
from dadi.blobs.disk import DiskBlobs
from dadi.errors import Conflict, DadiError
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.node.config import NodeConfig
from dadi.oci.reference import Reference
from dadi.originals.client import FromSuperpeers
from dadi.peers.tokens import ImageTokens
from dadi.tls import Tls
from registry_proxy.config import ProxyConfig
from registry_proxy.proxy import Proxy
from registry_proxy.upstream import ProxyUpstream, Shared

if TYPE_CHECKING:
    from dadi.node.node import Node

log = structlog.get_logger()
_AGAIN = 1.0
"""Seconds until a port that was taken is tried again."""
_MOST_SERVED = 256
"""Blobs of plain pulls that a heartbeat names."""
_ORIGINAL = "original"
"""What stands for the platform where `Tokens` has the token of a blob of a plain pull."""


class Served:
    """The blobs of plain pulls that are in the store, for the node's heartbeats; see `Membership`, `in_use`."""

    def __init__(self, store: DiskBlobs) -> None:
        self._store = store
        self._blobs: OrderedDict[str, Blob] = OrderedDict()

    def __call__(self) -> list[Blob]:
        """Return those of which something is here."""
        for digest in [digest for digest in self._blobs if self._store.find(digest) is None]:
            del self._blobs[digest]
        return [blob for blob in self._blobs.values() if self._store.present_bytes(blob)]

    def add(self, blob: Blob) -> None:
        """Take one more; of too many the one that was asked for longest ago goes."""
        self._blobs[blob.digest] = blob
        self._blobs.move_to_end(blob.digest)
        if len(self._blobs) > _MOST_SERVED:
            self._blobs.popitem(last=False)

    def drop(self, digest: str) -> None:
        """Serve it no longer."""
        self._blobs.pop(digest, None)


class PlainPulls:
    """See the head of this file. `start` it when the node stands, `close` it before the node."""

    def __init__(self, config: NodeConfig, proxy: Proxy, tls: Tls | None, fallbacks: Fallbacks) -> None:
        self.config = config
        self.proxy = proxy
        self.address = ""
        """host:port, once it serves."""
        self._tls = tls
        self._fallbacks = fallbacks
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"PlainPulls({self.address or 'not serving'}, {self.proxy.upstream!r})"

    @classmethod
    async def start(cls, node: Node) -> PlainPulls:
        """Begin to serve; where the port is taken (by a process before us), as soon as it is free.

        Raises ConfigError, InvalidRequest.
        """
        config, wanted, fallbacks = node.config, node.config.proxy, node.fallbacks
        made = ProxyConfig(
            listen=wanted.listen, state=str(Path(config.state) / "proxy"), registry=config.registry,
            front=wanted,
        )  # fmt: skip
        proxy = await Proxy.start(made, node.store, fallbacks, upstream=_upstream(node))
        proxying = cls(config, proxy, node.tls, fallbacks)
        try:
            await proxying._listen()
        except Conflict as error:
            fallbacks.note("not serving plain pulls yet", str(error))
            proxying._listening = asyncio.create_task(proxying._listen_later())
        except BaseException:
            await proxying.proxy.close()
            raise
        return proxying

    async def _listen(self) -> None:
        listen = self.config.proxy.listen
        self._runner, self.address = await http.serve_tcp(self.proxy.application(), listen, self._tls)
        log.info("serving plain pulls", address=self.address, upstream=repr(self.proxy.upstream))

    async def _listen_later(self) -> None:
        while True:
            await asyncio.sleep(_AGAIN)
            try:
                return await self._listen()
            except Conflict as error:
                self._fallbacks.note("not serving plain pulls yet", str(error))

    async def close(self) -> None:
        """Serve nobody any more, break off what is under way."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        if self._runner is not None:
            await self._runner.cleanup()
        await self.proxy.close()

    def statistics(self) -> dict[str, Any]:
        """Return where it serves, what it has answered, what it has fetched. The store's counts are the node's."""
        counts = {**self.proxy.front.statistics(), **self.proxy.upstream.statistics()}
        counts.pop("store", None)
        return {"address": self.address, **counts}


def _upstream(node: Node) -> ProxyUpstream:
    if node.embedded is not None:
        return Shared(node.embedded.originals, node.embedded.registry)
    peering, tokens, served, read, client = node.peering, node.tokens, node.originals, node.config.read, node.client
    assert client is not None

    async def on_table(ref: Reference, blob: Blob, token: str) -> None:
        if peering is None:
            return
        if not (token or tokens.text(blob.digest) or peering.config.authorization == "open"):
            return  # the superpeer has it no more: nobody would be let into its tree
        if token and tokens.text(blob.digest) != token:
            await tokens.learn(ImageTokens(f"{ref.name}@{blob.digest}", _ORIGINAL, (token,)))
        served.add(blob)
        peering.parents.expect([blob])

    upstream = FromSuperpeers(
        node.config.superpeers, node.store, node.fallbacks, connect=read.connect, read=read.stall, tls=node.tls,
        source=peering.upstream.source if peering else None, on_table=on_table, known=client.superpeers,
    )  # fmt: skip

    async def renew(image: ImageTokens) -> ImageTokens:
        digest = image.reference.rpartition("@")[2]
        try:
            return msgspec.structs.replace(image, tokens=(await upstream.token(digest),))
        except DadiError as error:
            if not error.retryable:
                served.drop(digest)
            raise

    tokens.renew_by[_ORIGINAL] = renew
    return upstream
