"""The node, put together: the composition root. What everything is made of and in which order it starts and stops.

Beside `proxying.py` (the registry proxy in here) only this file knows all parts. `__init__` makes them and does no I/O,
each from those above it; what a part wants of a later one it is given as a function, right there. `start` and `close`
are numbered steps. Who serves our sockets, around all this: `main.py`.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import structlog

from dadi import __version__, locks
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.errors import DadiError
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex
from dadi.node.backfill import Backfill
from dadi.node.config import NodeConfig
from dadi.node.demand import Demand
from dadi.node.devices import Devices
from dadi.node.drain import Drain
from dadi.node.embedded import EmbeddedSuperpeer, EmbeddedTraces, embed
from dadi.node.fuse_mount import FuseMount
from dadi.node.handover import Handover
from dadi.node.images import NodeImages
from dadi.node.mounts import Mounts
from dadi.node.peering import Peering
from dadi.node.proxying import PlainPulls, Served
from dadi.node.records import MountRecords
from dadi.node.released import Released
from dadi.node.startup import Startups
from dadi.node.verifying import Verifying
from dadi.node.warm import Warmer
from dadi.oci import platforms
from dadi.oci.keychain import Keychain, PullSecrets
from dadi.oci.reference import Reference
from dadi.peers.superpeer import SuperpeerClient, Upstream
from dadi.peers.tokens import Needed, Tokens
from dadi.prefetch.client import TraceClient, TraceKeeper
from dadi.snapshotter.snapshots import Snapshots
from dadi.tls import Tls
from fuse.session import Session

log = structlog.get_logger()


class Node:
    """Everything a `dadi-node` is, but its sockets. Make it by `await Node.start(config)`, end it by `close`."""

    def __init__(self, config: NodeConfig, store: DiskBlobs, lock: locks.Lock) -> None:
        state, run = Path(config.state), Path(config.run)
        self.config = config
        self._lock = lock
        self._stands = False
        self._retrying: asyncio.Task[None] | None = None
        self.platform = config.platform or str(platforms.of_machine(os.uname().machine))

        # Who we are, whom we believe, and where bytes come from.
        self.fallbacks = Fallbacks()
        self.tls = Tls.of(config.tls, self.fallbacks)
        pulls = PullSecrets(most=config.cri.most, lifetime=config.cri.remember)
        self.keychain = Keychain.of(config.registry, config.credentials, self.fallbacks, pulls)
        self.tokens = Tokens(self.fallbacks, file=state / "tokens.json")
        self.store = store
        self.demand = Demand()
        self.originals = Served(store)
        self.embedded = None if config.superpeers else embed(config, store, self.fallbacks, self.keychain)
        self.client = self._client() if config.superpeers else None
        self.peering = self._peering(self.client) if self.client is not None and config.peers.enabled else None
        self.upstream = self._upstream()
        self.chain = Chain(store, self.upstream.source, patience=config.read.patience, fallbacks=self.fallbacks,
                           hurry=self.peering.parents.hurry if self.peering else None,
                           in_turns=self.peering is None)  # fmt: skip

        # What the kernel reads.
        self.session = Session(str(run / "fuse"), asyncio.get_running_loop(), threads=config.fuse_threads)
        self.devices = Devices(store, self.chain, self.session, self.demand, self.fallbacks)
        self.fuse = FuseMount(self.session, Handover(run, self.fallbacks), self.devices,
                              predecessor_is_dying=lambda: lock.predecessor_is_dying)  # fmt: skip
        self.backfill = Backfill(config.backfill, store, self.chain, self.devices, self.demand, self.fallbacks)
        self.startups = Startups(config.trace, store, self.chain, self.devices, self.demand, self._traces(),
                                 self.fallbacks, name=self._own_name)  # fmt: skip
        self.mounts = Mounts(
            MountRecords(state / "mounts", Released(run)), store, self.devices, self.upstream, self.fallbacks,
            on_index=self._expect, admit=lambda index: self.drain.admit(index), on_start=self.startups.begin,
            on_mount=self.backfill.wake, predecessor_is_dying=lambda: lock.predecessor_is_dying,
        )  # fmt: skip

        # What is done with mounts.
        self.drain = Drain(store, self.devices, self.backfill, self.peering, settled=self.mounts.settled,
                           lost=self.mounts.lost, files=lambda: self.session.statistics()["files"])  # fmt: skip
        self.verifying = Verifying(self)
        self.warmer = self._warmer(self.client) if self.client is not None else None
        self.images = NodeImages(state, store, self.mounts, self.upstream, self.platform,
                                 young=config.snapshotter.keep_idle)  # fmt: skip
        self.snapshots: Snapshots | None = None
        self.snapshotter_error: str | None = None
        self.proxying: PlainPulls | None = None
        """Begun by who serves our sockets, ended by `close`."""

    def _client(self) -> SuperpeerClient:
        config, read = self.config, self.config.read
        return SuperpeerClient(config.superpeers, self.fallbacks, connect=read.connect, read=read.stall,
                               compress=read.compress, tls=self.tls, tokens=self.tokens,
                               refresh=config.superpeers_refresh,
                               credentials=self.keychain.credential,
                               refused=self.keychain.refused,
                               keys_file=Path(config.state) / "superpeers-keys.json")  # fmt: skip

    def _peering(self, client: SuperpeerClient) -> Peering:
        config = self.config
        return Peering(config.peers, client, self.store, self.fallbacks, Path(config.state),
                       compress=config.read.compress, tls=self.tls, in_use=self._in_use)  # fmt: skip

    def _upstream(self) -> Upstream:
        """Return what the chain ends in: parents and superpeers, superpeers alone, or the superpeer in here."""
        if self.peering is not None:
            return self.peering.upstream
        if self.client is not None:
            return self.client
        assert self.embedded is not None
        return EmbeddedSuperpeer(self.embedded)

    def _in_use(self) -> list[Blob]:
        return [*filter(self._is_others_too, (device.blob for device in self.devices.all())), *self.originals()]

    def _is_others_too(self, blob: Blob) -> bool:
        """Say whether other nodes may have a blob: not the metadata of a prefix, which this node has made itself."""
        return self.config.peers.authorization == "open" or self.tokens.image_with(blob.digest) is not None

    def _traces(self) -> TraceKeeper:
        if self.client is not None:
            return TraceClient(self.client)
        assert self.embedded is not None
        return EmbeddedTraces(self.embedded)

    def _warmer(self, client: SuperpeerClient) -> Warmer:
        def place() -> tuple[str, str, str]:
            peer = self.peering.parents.peer if self.peering else None
            return self._own_name(), peer.zone if peer else "", peer.rack if peer else ""

        return Warmer(client, self.upstream, self.store, self.chain, self.demand, self.fallbacks, place=place,
                      platform=self.platform, expect=self._expect)  # fmt: skip

    def _own_name(self) -> str:
        return (self.peering.parents.peer.id if self.peering else os.uname().nodename)[:128]

    def _expect(self, index: ImageIndex) -> None:
        if self.peering:
            self.peering.parents.expect(filter(self._is_others_too, [index.metadata, *index.device_blobs()]))

    @classmethod
    async def start(cls, config: NodeConfig) -> Node:
        """Open the store, mount FUSE or take it over, restore the mounts, backfill. Raises Conflict, …"""
        run = Path(config.run)
        await asyncio.to_thread(run.mkdir, parents=True, exist_ok=True)
        lock = await asyncio.to_thread(_locked, run)
        try:
            store = await asyncio.to_thread(DiskBlobs.of_state, Path(config.state), config.store.limit)
        except BaseException:
            lock.release()
            raise
        node = cls(config, store, lock)
        try:
            await node._start()
        except BaseException:
            await node.close()
            raise
        log.info("block reads go", chain=repr(node.chain))
        return node

    async def _start(self) -> None:
        # 1. Certificates, credentials, tokens: nobody is asked for anything before.
        if self.tls:
            self.tls.check_urls("superpeers", self.config.superpeers)
            await self.tls.start()
        await self.keychain.load()
        await self.tokens.load()
        # 2. Where bytes come from; other nodes are answered from here on.
        if self.embedded:
            await self.embedded.start()
        if self.peering:
            await self.peering.start(self.chain, self.demand)
        # 3. The kernel's reads are answered: first those that the process before has left waiting.
        await self.fuse.serve()
        # 4. The mounts of the process before; only now is it known what this node has.
        await self.mounts.restore()
        if self.peering:
            self.peering.restored = True
        self._stands = True
        # 5. What goes on in the background, for mounts that stand.
        if self.embedded is None:
            self.tokens.start(self._needed)
        await self._open_snapshots()
        self.backfill.start()
        if self.warmer:
            self.warmer.start()
        self._retrying = asyncio.create_task(self.mounts.retry())

    def _needed(self) -> list[Needed]:
        """Return the images whose tokens must stay good: what is mounted and not all here."""
        needed = []
        for mount in self.mounts.lazy():
            answer, index = mount.record.answer, mount.index
            pinned = str(Reference.parse(answer.reference).at(answer.manifest_digest))
            needed.append(Needed(pinned, answer.platform, tuple(blob.digest for blob in index.device_blobs())))
        return needed

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

    async def close(self) -> None:
        """Stop everything, in the opposite order."""
        # 1. Nothing new begins: no pull, no retry, no snapshot, nothing in the background.
        if self.proxying is not None:
            await self.proxying.close()
        await self.fuse.stop_resending()
        if self._retrying is not None:
            self._retrying.cancel()
            await asyncio.gather(self._retrying, return_exceptions=True)
        if self.snapshots is not None:
            await self.snapshots.close()
        if self.warmer:
            await self.warmer.close()
        await self.startups.close()
        await self.drain.close()
        await self.backfill.close()
        # 2. Other nodes are sent away; what is being mounted ends.
        if self.peering:
            await self.peering.stop_serving()
        await self.mounts.settle()
        # 3. FUSE and the mounts are left to the next process, if one can go on; else lazy ones are unmounted first.
        left = not (self.config.unmount_on_stop and self._stands) and await self.fuse.leave()
        await self.mounts.close(unmount=self.config.unmount_on_stop, lazy_stay=left)
        self.images.close()
        # 4. Nobody reads any more: the chain, then FUSE itself, then whom it asked.
        await self.chain.close()
        if self.peering:
            await self.peering.close()
        if not left:
            await self.fuse.end()
        await self.fuse.close()
        await self.upstream.close()
        await self.keychain.close()
        if self.tls:
            await self.tls.close()
        # 5. The store, and at the very end the lock that the next process waits for.
        await self.store.close()
        self._lock.release()

    def statistics(self) -> dict[str, Any]:
        """Return what `dadi status` shows; all sizes in bytes. `reads`: what the kernel asked for, by who answered."""
        kernel_reads = self.session.statistics()
        return {
            "version": __version__,
            "platform": self.platform,
            "superpeers": list(self.config.superpeers) or ["embedded"],
            "mounts": self.mounts.statistics(),
            "taken_over": {"mounts": self.mounts.adopted, "devices": self.fuse.taken_over},
            "reads": kernel_reads,
            "waiting": {"reads": self.demand.pending, "for_upstream": self.chain.patient.waiting},
            "bytes": {
                "local": self.chain.kept.local_bytes,
                "fetched": self.chain.kept.fetched_bytes,
                "backfilled": self.backfill.bytes,
                **self._bytes_by_source(),
            },
            "sources": self.upstream.statistics(),
            "peers": self.peering.statistics() if self.peering else None,
            "proxy": self.proxying.statistics() if self.proxying else None,
            "tokens": self.tokens.statistics(),
            "backfill": self.backfill.statistics(),
            "drain": self.drain.statistics(),
            "trace": self.startups.statistics(),
            "prefetch": self.warmer.statistics() if self.warmer else None,
            "snapshots": self.snapshots.statistics() if self.snapshots else None,
            "snapshotter_error": self.snapshotter_error,
            "store": self.store.statistics(),
            "pull_secrets": len(self.keychain.pulls),
            "tls": self.tls.statistics() if self.tls else None,
            "fallbacks": self.fallbacks.statistics(),
        }

    def _bytes_by_source(self) -> dict[str, int]:
        """Return bytes of chunks that came from peers, superpeers, and (a superpeer is embedded) the registry."""
        rows = {row["name"]: row["bytes"] for row in self.upstream.statistics()}
        peer, registry = rows.pop("peers", 0), rows.pop("registry", 0)
        return {"peer": peer, "superpeer": sum(rows.values()), "registry": registry}


def _private(directory: Path) -> None:
    """Make a directory that only our user can enter: images have setuid programs, and files not for everybody."""
    directory.mkdir(parents=True, exist_ok=True)
    directory.chmod(0o700)


def _locked(run: Path) -> locks.Lock:
    """Return the lock on a run directory; raise Conflict if another process has it.

    Taken before anything below it is touched: two nodes with one run directory would pull each other's FUSE mount away.
    """
    lock = locks.take(run, "two nodes need two `run` directories")
    if lock.predecessor_is_dying:  # then these still seem to have somebody who listens
        for name in ("node.sock", "snapshotter.sock", "cri.sock"):
            (run / name).unlink(missing_ok=True)
    return lock
