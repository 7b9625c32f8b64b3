"""The node, put together: the composition root. What everything is made of and in which order it starts and stops.

Only this file knows all parts; with `devices.py`, which gives files to it, it alone in `dadi/` imports `fuse`, and it
alone imports `superpeer`, to embed one where none is configured.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import structlog

from dadi import __version__
from dadi import digest as digests
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Source
from dadi.blobs.verified import Verified
from dadi.errors import Conflict, DadiError, DigestMismatch
from dadi.fallbacks import Fallbacks
from dadi.node import kernel
from dadi.node.backfill import Backfill
from dadi.node.config import NodeConfig
from dadi.node.demand import Demand
from dadi.node.devices import Devices
from dadi.node.images import NodeImages
from dadi.node.in_kernel import in_kernel
from dadi.node.mounts import Mounts
from dadi.node.records import MountRecords
from dadi.oci import platforms
from dadi.peers.superpeer import SuperpeerClient, Upstream
from dadi.snapshotter.snapshots import Snapshots
from dadi.wire import Event
from fuse.session import Session
from superpeer.app import resolving
from superpeer.config import SuperpeerConfig
from superpeer.service import Superpeer

log = structlog.get_logger()


class EmbeddedSuperpeer:
    """A superpeer in this process, over the node's own store: nothing is kept twice. See `Upstream`."""

    def __init__(self, superpeer: Superpeer) -> None:
        self._superpeer = superpeer
        self._verified = Verified("embedded superpeer", superpeer)
        self.source: Source = self._verified

    def __repr__(self) -> str:
        return f"EmbeddedSuperpeer({self._superpeer!r})"

    async def resolve(self, reference: str, platform: str) -> AsyncIterator[Event]:
        """See `Upstream`."""
        async for event in resolving(self._superpeer, reference, platform):
            yield event

    async def whole(self, digest: str, size: int) -> bytes:
        """See `Upstream`."""
        data = await self._superpeer.store.get(digest)
        if await asyncio.to_thread(digests.of, data) != digest:
            raise DigestMismatch(f"{digest} in the store is not what its digest says", source="embedded superpeer")
        return data

    def statistics(self) -> list[dict[str, Any]]:
        """See `Upstream`."""
        origin = self._superpeer.origin
        return [{"name": "registry", "bytes": origin.bytes, "wire_bytes": origin.bytes, "requests": origin.layers,
                 "wrong": self._verified.wrong}]  # fmt: skip

    async def close(self) -> None:
        """See `Upstream`."""
        await self._superpeer.close()


class Node:
    """Everything a `dadi-node` is, but its sockets. Make it by `await Node.start(config)`, end it by `close`."""

    def __init__(self, config: NodeConfig, store: DiskBlobs, lock: int) -> None:
        loop = asyncio.get_running_loop()
        self.config = config
        self._lock = lock
        self._retrying: asyncio.Task[None] | None = None
        self.platform = config.platform or str(platforms.of_machine(os.uname().machine))
        self.fallbacks = Fallbacks()
        self.store = store
        self.demand = Demand()
        self.embedded: Superpeer | None = None
        self.upstream = self._upstream()
        self.chain = Chain(store, self.upstream.source, patience=config.read.patience, fallbacks=self.fallbacks)
        self.session = Session(str(Path(config.run) / "fuse"), loop, threads=config.fuse_threads)
        self.devices = Devices(store, self.chain, self.session, self.demand, self.fallbacks)
        self.backfill = Backfill(config.backfill, store, self.chain, self.devices, self.demand, self.fallbacks)
        records = MountRecords(Path(config.state) / "mounts")
        self.mounts = Mounts(
            records, store, self.devices, self.upstream, self.fallbacks, self.backfill.wake
        )

        self.images = NodeImages(Path(config.state), store, self.mounts, self.upstream, self.platform,
                                 young=config.snapshotter.keep_idle)  # fmt: skip
        self.snapshots: Snapshots | None = None
        self.snapshotter_error: str | None = None

    def _upstream(self) -> Upstream:
        config = self.config
        if config.superpeers:
            read = config.read
            return SuperpeerClient(config.superpeers, self.fallbacks, connect=read.connect, read=read.stall,
                                   compress=read.compress)  # fmt: skip
        embedded = SuperpeerConfig(state=str(Path(config.state) / "superpeer"), registry=config.registry)
        self.embedded = Superpeer(embedded, self.store, self.fallbacks)
        return EmbeddedSuperpeer(self.embedded)

    @classmethod
    async def start(cls, config: NodeConfig) -> Node:
        """Open the store, mount FUSE, restore the mounts, begin to backfill. Raises Conflict, MissingFeature …"""
        state, run = Path(config.state), Path(config.run)
        for path in (state, run):
            await asyncio.to_thread(path.mkdir, parents=True, exist_ok=True)
        lock = await asyncio.to_thread(_locked, run)
        try:
            store = await asyncio.to_thread(lambda: DiskBlobs(state / "store", limit=config.store.limit))
        except BaseException:
            os.close(lock)
            raise
        node = cls(config, store, lock)
        try:
            if node.embedded:
                await node.embedded.start()
            await in_kernel(node._mount_fuse)
            await node.mounts.restore()
            await node._open_snapshots()
            node.backfill.start()
            node._retrying = asyncio.create_task(node.mounts.retry())
        except BaseException:
            await node.close()
            raise
        log.info("block reads go", chain=repr(node.chain))
        return node

    async def _open_snapshots(self) -> None:
        config = self.config.snapshotter
        if not config.enabled:
            return
        root = Path(self.config.state) / "snapshotter"
        await asyncio.to_thread(_private, root)
        await self.images.load()
        try:
            self.snapshots = await Snapshots.open(
                root, self.images, self.fallbacks, replace_damaged=config.replace_damaged, sweep_every=config.sweep,
                keep_idle=config.keep_idle,
            )  # fmt: skip
        except DadiError as error:
            # Mounts, and containers that run, must not suffer for it; containerd is told that nobody answers.
            self.snapshotter_error = str(error)
            self.fallbacks.note("snapshotter not started", str(error))
            log.error("the snapshotter cannot start; all else goes on", why=str(error),
                      hint="snapshotter.enabled = false says that none is wanted")  # fmt: skip

    def _mount_fuse(self) -> None:
        directory = self.session.directory
        kernel.umount_all(directory)  # of a process that was killed: looking at it would fail
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.session.mount()

    async def close(self) -> None:
        """Stop everything, in the opposite order."""
        if self._retrying:
            self._retrying.cancel()
            await asyncio.gather(self._retrying, return_exceptions=True)
        if self.snapshots is not None:
            await self.snapshots.close()
        await self.backfill.close()
        await self.mounts.close(unmount=self.config.unmount_on_stop)
        self.images.close()
        await self.chain.close()
        await in_kernel(self.session.close)
        await self.upstream.close()
        await self.store.close()
        os.close(self._lock)

    def statistics(self) -> dict[str, Any]:
        """Return what `dadi status` shows; all sizes in bytes. `reads`: what the kernel asked for, by who answered."""
        kernel_reads = self.session.statistics()
        return {
            "version": __version__,
            "platform": self.platform,
            "superpeers": list(self.config.superpeers) or ["embedded"],
            "mounts": self.mounts.statistics(),
            "reads": kernel_reads,
            "waiting": {"reads": self.demand.pending, "for_upstream": self.chain.patient.waiting},
            "bytes": {
                "local": self.chain.kept.local_bytes,
                "fetched": self.chain.kept.fetched_bytes,
                "backfilled": self.backfill.bytes,
            },
            "sources": self.upstream.statistics(),
            "backfill": self.backfill.statistics(),
            "snapshots": self.snapshots.statistics() if self.snapshots else None,
            "snapshotter_error": self.snapshotter_error,
            "store": self.store.statistics(),
            "fallbacks": self.fallbacks.statistics(),
        }


def _private(directory: Path) -> None:
    """Make a directory that only our user can enter: images have setuid programs, and files not for everybody."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)


def _locked(run: Path) -> int:
    """Return a descriptor that holds the lock on a run directory; raise Conflict if another process has it.

    Taken before anything below it is touched: two nodes with one run directory would pull each other's FUSE mount away.
    """
    lock = os.open(run / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(lock)
        raise Conflict(f"{run} is used by another process", hint="two nodes need two `run` directories") from None
    return lock
