"""The node, put together: the composition root. What everything is made of and in which order it starts and stops.

Only this file knows all parts. It alone imports `superpeer`, to embed one where none is configured; `fuse` is used
by `devices.py`, which gives it files, and by `handover.py` too. The registry proxy is put together in `proxying.py`.

Longer than most files here: this is where the parts of a node meet.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import structlog

from dadi import __version__, locks, state_version
from dadi import digest as digests
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.source import Source
from dadi.blobs.verified import Verified
from dadi.errors import DadiError, DigestMismatch
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex
from dadi.node import kernel
from dadi.node.backfill import Backfill
from dadi.node.config import NodeConfig
from dadi.node.demand import Demand
from dadi.node.devices import Devices
from dadi.node.drain import Drain
from dadi.node.handover import Handover
from dadi.node.images import NodeImages
from dadi.node.in_kernel import in_kernel
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
from dadi.prefetch.trace import Given, Message
from dadi.snapshotter.snapshots import Snapshots
from dadi.tls import Tls
from dadi.wire import Event
from fuse.session import Session
from superpeer.app import resolving
from superpeer.config import SuperpeerConfig
from superpeer.service import Superpeer

log = structlog.get_logger()
_LOOK_EVERY, _RESEND_AFTER, _RESEND_AT_LEAST_EVERY = 0.05, 1.0, 60.0
"""Seconds: between two looks at a process that is dying; until what it may have taken is asked for, first and then."""


class EmbeddedSuperpeer:
    """A superpeer in this process, over the node's own store: nothing is kept twice. See `Upstream`."""

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


class Node:
    """Everything a `dadi-node` is, but its sockets. Make it by `await Node.start(config)`, end it by `close`."""

    def __init__(self, config: NodeConfig, store: DiskBlobs, lock: locks.Lock) -> None:
        loop = asyncio.get_running_loop()
        self.config = config
        self._lock = lock
        self._background: list[asyncio.Task[None]] = []
        self._stands = False
        self.platform = config.platform or str(platforms.of_machine(os.uname().machine))
        self.fallbacks = Fallbacks()
        self.tls = Tls.of(config.tls, self.fallbacks)
        pulls = PullSecrets(most=config.cri.most, lifetime=config.cri.remember)
        self.keychain = Keychain.of(config.registry, config.credentials, self.fallbacks, pulls)
        self.store = store
        self.demand = Demand()
        self.embedded: Superpeer | None = None
        self.tokens = Tokens(self.fallbacks, file=Path(config.state) / "tokens.json")
        self.originals = Served(store)
        self.proxying: PlainPulls | None = None
        """Begun by who serves our sockets, ended by `close`."""
        self.upstream, self.peering = self._upstream()
        self.chain = Chain(store, self.upstream.source, patience=config.read.patience, fallbacks=self.fallbacks,
                           hurry=self.peering.parents.hurry if self.peering else None,
                           in_turns=self.peering is None)  # fmt: skip
        self.session = Session(str(Path(config.run) / "fuse"), loop, threads=config.fuse_threads)
        self.handover = Handover(Path(config.run), self.fallbacks)
        self.taken_over = 0
        """FUSE files of an earlier process that went on with this one."""
        self.devices = Devices(store, self.chain, self.session, self.demand, self.fallbacks)
        self.backfill = Backfill(config.backfill, store, self.chain, self.devices, self.demand, self.fallbacks)
        records = MountRecords(Path(config.state) / "mounts", Released(Path(config.run)))
        self.mounts = Mounts(
            records, store, self.devices, self.upstream, self.fallbacks, self.backfill.wake, self._expect
        )

        self.mounts.predecessor_is_dying = lambda: lock.predecessor_is_dying

        self.drain = Drain(store, self.devices, self.backfill, self.peering, settled=self.mounts.settled,
                           lost=self.mounts.lost, files=lambda: self.session.statistics()["files"])  # fmt: skip
        self.mounts.admit = self.drain.admit
        self.verifying = Verifying(self)
        self.startups = Startups(config.trace, store, self.chain, self.devices, self.demand, self._traces(),
                                 self.fallbacks, name=self._own_name)  # fmt: skip
        self.mounts.on_start = self.startups.begin
        self.warmer = self._warmer()
        self.images = NodeImages(Path(config.state), store, self.mounts, self.upstream, self.platform,
                                 young=config.snapshotter.keep_idle)  # fmt: skip
        self.snapshots: Snapshots | None = None
        self.snapshotter_error: str | None = None

    def _upstream(self) -> tuple[Upstream, Peering | None]:
        config = self.config
        if config.superpeers:
            read = config.read
            client = SuperpeerClient(config.superpeers, self.fallbacks, connect=read.connect, read=read.stall,
                                     compress=read.compress, tls=self.tls, tokens=self.tokens,
                                     refresh=config.superpeers_refresh,
                                     credentials=self.keychain.credential,
                                     refused=self.keychain.refused,
                                     keys_file=Path(config.state) / "superpeers-keys.json")  # fmt: skip
            if not config.peers.enabled:
                return client, None
            peering = Peering(config.peers, client, self.store, self.fallbacks, Path(config.state),
                              compress=read.compress, tls=self.tls, in_use=self._in_use)
            return peering.upstream, peering
        embedded = SuperpeerConfig(state=str(Path(config.state) / "superpeer"), registry=config.registry,
                                   originals=config.originals)  # fmt: skip
        self.embedded = Superpeer(embedded, self.store, self.fallbacks, self.keychain)
        return EmbeddedSuperpeer(self.embedded), None

    def _in_use(self) -> list[Blob]:
        return [*filter(self._is_others_too, (device.blob for device in self.devices.all())), *self.originals()]

    def _is_others_too(self, blob: Blob) -> bool:
        """Say whether other nodes may have a blob: not the metadata of a prefix, which this node has made itself."""
        return self.config.peers.authorization == "open" or self.tokens.image_with(blob.digest) is not None

    def _traces(self) -> TraceKeeper:
        if self.embedded is not None:
            return EmbeddedTraces(self.embedded)
        client = self.peering.client if self.peering else self.upstream
        assert isinstance(client, SuperpeerClient)
        return TraceClient(client)

    def _warmer(self) -> Warmer | None:
        if self.embedded is not None:
            return None
        client = self.peering.client if self.peering else self.upstream
        assert isinstance(client, SuperpeerClient)

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
        state, run = Path(config.state), Path(config.run)
        for path in (state, run):
            await asyncio.to_thread(path.mkdir, parents=True, exist_ok=True)
        lock = await asyncio.to_thread(_locked, run)
        try:
            await asyncio.to_thread(state_version.check, state)
            store = await asyncio.to_thread(lambda: DiskBlobs(state / "store", limit=config.store.limit))
        except BaseException:
            lock.release()
            raise
        node = cls(config, store, lock)
        try:
            if node.tls:
                node.tls.check_urls("superpeers", config.superpeers)
                await node.tls.start()
            await node.keychain.load()
            await node.tokens.load()
            if node.embedded:
                await node.embedded.start()
            if node.peering:
                await node.peering.start(node.chain, node.demand)
            await node._serve_fuse()
            await node.mounts.restore()
            if node.peering:
                node.peering.restored = True
            node._stands = True
            if node.embedded is None:
                node.tokens.start(node._needed)
            await node._open_snapshots()
            node.backfill.start()
            if node.warmer:
                node.warmer.start()
            node._background.append(asyncio.create_task(node.mounts.retry()))
        except BaseException:
            await node.close()
            raise
        log.info("block reads go", chain=repr(node.chain))
        return node

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

    async def _serve_fuse(self) -> None:
        left = await self.handover.take(self.session.directory)
        if left is None:
            await in_kernel(self._mount_fuse)
            await self.handover.keep(self.session)
            return
        try:
            self.taken_over = await self.devices.reopen()
        except BaseException:
            os.close(left.fd)
            raise
        self.session.take_over(left.fd, left.state)
        await self.devices.hold_left()
        await self.handover.keep(self.session)
        dying = self._lock.predecessor_is_dying
        log.info("taken over: the FUSE mount of the process before", devices=self.taken_over, still_dying=dying)
        if dying:
            self._background.append(asyncio.create_task(self._resend_again()))

    async def _resend_again(self) -> None:
        """A thread of the process before may have been taking a request when we asked for those that it had.

        Not only once it is gone: it may be that request which another thread of it waits for. Ever less often, since
        each time all reads that wait are begun once more.
        """
        every, waited = _RESEND_AFTER, 0.0
        while self._lock.predecessor_is_dying:
            await asyncio.sleep(_LOOK_EVERY)
            waited += _LOOK_EVERY
            if waited >= every:
                await in_kernel(self.session.resend)
                every, waited = min(every * 2, _RESEND_AT_LEAST_EVERY), 0.0
        await in_kernel(self.session.resend)

    async def _leave(self) -> bool:
        """Stop to serve FUSE and leave all mounts standing, if a successor can go on; say whether it can."""
        wanted = not (self.config.unmount_on_stop and self._stands)
        if not wanted or self.session.fd < 0 or not self.session.statistics()["files"]:
            return False
        if not await self.handover.keep(self.session):
            return False
        waiting = self.session.statistics()["pending"]
        await in_kernel(self.session.leave)
        log.info("left to the next process: the FUSE mount", devices=len(self.devices.lazy()), reads_waiting=waiting)
        return True

    def _mount_fuse(self) -> None:
        directory = self.session.directory
        # Of a process that was killed: looking at it would fail. By force: whoever still has its descriptor (a process
        # that is dying, an orphaned keeper) answers nothing, and its readers would wait for ever.
        kernel.umount_all(directory, force=True)
        Path(directory).mkdir(parents=True, exist_ok=True)
        self.session.mount()

    async def close(self) -> None:
        """Stop everything, in the opposite order."""
        if self.proxying is not None:
            await self.proxying.close()
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        if self.snapshots is not None:
            await self.snapshots.close()
        if self.warmer:
            await self.warmer.close()
        await self.startups.close()
        await self.drain.close()
        await self.backfill.close()
        if self.peering:
            await self.peering.stop_serving()
        await self.mounts.settle()
        left = await self._leave()
        await self.mounts.close(unmount=self.config.unmount_on_stop, lazy_stay=left)
        self.images.close()
        await self.chain.close()
        if self.peering:
            await self.peering.close()
        if not left:
            served = self.session.fd >= 0  # else what may be held is still an earlier process's
            await in_kernel(self.session.close)
            if served and self.session.fd < 0:
                await self.handover.drop()
        await self.handover.close()
        await self.upstream.close()
        await self.keychain.close()
        if self.tls:
            await self.tls.close()
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
            "taken_over": {"mounts": self.mounts.adopted, "devices": self.taken_over},
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
