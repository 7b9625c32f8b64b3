"""Where the proxy's answers come from: superpeers, or straight from the registry where there are none.

    Direct       the registries themselves, with a store of this proxy's own (`dadi/originals`)
    Shared       the same where somebody else keeps originals already: the superpeer that a node embeds
    Superpeers   `dadi/originals/client.py`: the superpeer asks the registry, checks who may, and keeps; blobs come
                 chunk by chunk where it knows their chunk tables, else as a stream, into a store of this proxy's own

All are an `ProxyUpstream`, so that the HTTP (`app.py`) does not know which it is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from dadi.blobs.disk import DiskBlobs
from dadi.fallbacks import Fallbacks
from dadi.oci.config import RegistryConfig
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.originals.caller import Caller
from dadi.originals.config import OriginalsConfig
from dadi.originals.documents import Document
from dadi.originals.original import Original
from dadi.originals.service import Originals


class ProxyUpstream(Protocol):
    """What the proxy needs. All methods raise errors of the tree: LoginRequired where other credentials are wanted."""

    async def manifest(self, ref: Reference, caller: Caller) -> Document:
        """Return a manifest or index by tag or digest, verified."""
        ...

    async def tags(self, ref: Reference, parameters: dict[str, str], caller: Caller) -> Document:
        """Return a page of the repository's tags as JSON."""
        ...

    async def referrers(self, ref: Reference, artifact_type: str, caller: Caller) -> Document:
        """Return the index of what refers to the reference's digest."""
        ...

    async def blob(self, ref: Reference, digest: str, caller: Caller) -> Original:
        """Return a blob of the repository."""
        ...

    async def changed(self, ref: Reference) -> None:
        """Hear that a manifest was pushed or deleted by us: what the registry said before is to be asked anew."""
        ...

    async def challenge(self, registry: str) -> str | None:
        """Return how the registry meets whom it does not know (WWW-Authenticate); None: it lets him in."""
        ...

    def statistics(self) -> dict[str, Any]:
        """Return counts for status and metrics."""
        ...

    async def close(self) -> None:
        """Break off what is under way, let go of connections."""
        ...


class Shared:
    """See the head of this file. `originals` and `registry` are started and closed by who made them."""

    def __init__(self, originals: Originals, registry: RegistryClient) -> None:
        self.registry = registry
        self.originals = originals

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.originals!r})"

    async def manifest(self, ref: Reference, caller: Caller) -> Document:
        """See `ProxyUpstream`."""
        return await self.originals.manifest(ref, caller)

    async def tags(self, ref: Reference, parameters: dict[str, str], caller: Caller) -> Document:
        """See `ProxyUpstream`."""
        return await self.originals.tags(ref, parameters, caller)

    async def referrers(self, ref: Reference, artifact_type: str, caller: Caller) -> Document:
        """See `ProxyUpstream`."""
        return await self.originals.referrers(ref, artifact_type, caller)

    async def blob(self, ref: Reference, digest: str, caller: Caller) -> Original:
        """See `ProxyUpstream`."""
        return await self.originals.blob(ref, digest, caller)

    async def changed(self, ref: Reference) -> None:
        """See `ProxyUpstream`."""
        self.originals.changed(ref)

    async def challenge(self, registry: str) -> str | None:
        """See `ProxyUpstream`."""
        return await self.originals.challenge(registry)

    def statistics(self) -> dict[str, Any]:
        """See `ProxyUpstream`."""
        return {"originals": self.originals.statistics(), "registry": self.registry.statistics()}

    async def close(self) -> None:
        """See `ProxyUpstream`."""


class Direct(Shared):
    """See the head of this file. `store` is closed by who opened it."""

    def __init__(self, registry: RegistryConfig, originals: OriginalsConfig, state: Path, store: DiskBlobs,
                 fallbacks: Fallbacks) -> None:  # fmt: skip
        client = RegistryClient(registry)
        super().__init__(Originals(originals, state, store, client, fallbacks), client)

    async def start(self) -> None:
        """Read what earlier runs left."""
        await self.originals.start()

    async def close(self) -> None:
        """See `ProxyUpstream`."""
        await self.originals.close()
        await self.registry.close()
