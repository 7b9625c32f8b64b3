"""A superpeer in the node's own process, where none is configured: over the node's own store, nothing is kept twice.

The only file of a node that imports `superpeer`. No decisions here: the contracts that the node's parts have with
superpeers (`Upstream`, `TraceKeeper`), passed on by calls instead of HTTP.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Source
from dadi.blobs.verified import Verified
from dadi.errors import DigestMismatch
from dadi.fallbacks import Fallbacks
from dadi.node.config import NodeConfig
from dadi.oci.keychain import Keychain
from dadi.prefetch.trace import Given, Message
from dadi.wire import Event
from superpeer.app import resolving
from superpeer.config import IndexingConfig, SuperpeerConfig
from superpeer.service import Superpeer


def embed(config: NodeConfig, store: DiskBlobs, fallbacks: Fallbacks, keychain: Keychain) -> Superpeer:
    """Return a node's own superpeer, not started yet."""
    made = SuperpeerConfig(state=str(Path(config.state) / "superpeer"), registry=config.registry,
                           originals=config.originals,
                           indexing=IndexingConfig(keep_compressed=config.proxy.enabled))  # fmt: skip
    return Superpeer(made, store, fallbacks, keychain)


class EmbeddedSuperpeer:
    """Where a node's chunks and images come from: its own superpeer. See `Upstream`."""

    def __init__(self, superpeer: Superpeer) -> None:
        self._superpeer = superpeer
        self._verified = Verified("embedded superpeer", superpeer)
        self.source: Source = self._verified

    def __repr__(self) -> str:
        return f"EmbeddedSuperpeer({self._superpeer!r})"

    async def resolve(self, reference: str, platform: str) -> AsyncGenerator[Event, None]:
        """See `Upstream`."""
        async for event in resolving(self._superpeer, reference, platform):
            yield event

    async def whole(self, digest: str, size: int) -> bytes:
        """See `Upstream`."""
        data = await self._superpeer.store.get(digest)
        if await asyncio.to_thread(digests.of, data) != digest:
            hint = "check the disk; `dadi verify` throws away what is damaged"
            raise DigestMismatch(f"{digest} in the store is not what its digest says", source="embedded superpeer",
                                 hint=hint)  # fmt: skip
        return data

    def statistics(self) -> list[dict[str, Any]]:
        """See `Upstream`."""
        origin = self._superpeer.origin
        return [{"name": "registry", "bytes": origin.bytes, "wire_bytes": origin.bytes, "requests": origin.layers,
                 "wrong": self._verified.wrong}]  # fmt: skip

    async def close(self) -> None:
        """See `Upstream`."""
        await self._superpeer.close()


class EmbeddedTraces:
    """The startup traces of the superpeer in this process. See `TraceKeeper`."""

    def __init__(self, superpeer: Superpeer) -> None:
        self._superpeer = superpeer

    async def fetch(self, manifest: str) -> Given:
        """See `TraceKeeper`."""
        return await self._superpeer.traces.asked(manifest)

    async def send(self, message: Message) -> bool:
        """See `TraceKeeper`."""
        catalog = self._superpeer.catalog
        record = catalog.record_of(message.manifest)
        return record is not None and await self._superpeer.traces.learn(message, catalog.image(record))

    async def clear(self, manifest: str) -> None:
        """See `TraceKeeper`."""
        await self._superpeer.traces.clear(manifest)
