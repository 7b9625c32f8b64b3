"""The node's part among the others, put together: its upstream (`Parents`) and what it serves (`PeerServer`).

Where an embedded superpeer is the upstream there is nothing of this: such a node is alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import structlog
from aiohttp import web

from dadi import http
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.layout import write_durably
from dadi.blobs.source import Source, Urgency
from dadi.errors import Conflict, NotFound, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.node.config import PeersConfig
from dadi.node.demand import Demand
from dadi.oci.reference import Reference
from dadi.peers import link, patience
from dadi.peers.desk import Desk
from dadi.peers.directory_client import DirectoryClient
from dadi.peers.frames import Frames
from dadi.peers.gate import OPEN, Gate
from dadi.peers.group import Group
from dadi.peers.grouped import GroupedDirectory
from dadi.peers.health import Health
from dadi.peers.known_again import KnownAgain
from dadi.peers.membership import Condition
from dadi.peers.parents import Parents
from dadi.peers.places import Peer
from dadi.peers.pressure import Pressure
from dadi.peers.server import PeerServer
from dadi.peers.superpeer import SuperpeerClient
from dadi.peers.upload import Upload
from dadi.tls import Tls
from dadi.wire import Event

log = structlog.get_logger()
_AGAIN = 1.0
"""Seconds until a port that was taken is tried again."""
_STARTING = 1.0
"""Seconds until a child that came too early is to come again."""


class PeeredUpstream:
    """An `Upstream` whose chunks come from parents first; superpeers resolve images, and give small blobs."""

    def __init__(self, client: SuperpeerClient, parents: Parents) -> None:
        self._client = client
        self._parents = parents
        self.source: Source = KnownAgain(_Ready(client, parents), client.known_again)

    def __repr__(self) -> str:
        return f"PeeredUpstream({self._client!r}, {self.source!r})"

    async def resolve(self, reference: str, platform: str) -> AsyncGenerator[Event, None]:
        """See `Upstream`."""
        async with contextlib.aclosing(self._client.resolve(reference, platform)) as events:
            async for event in events:
                yield event

    async def whole(self, digest: str, size: int) -> bytes:
        """See `Upstream`."""
        return await self._client.whole(digest, size)

    def statistics(self) -> list[dict[str, Any]]:
        """See `Upstream`. A row for each superpeer, and one for all peers together."""
        asking = self._parents.asking
        rows = self._client.statistics()
        for row in rows:
            pipe = asking.pipes.get(row["name"].removeprefix("superpeer "))
            if pipe is not None:
                row["bytes"] += pipe.bytes
                row["wire_bytes"] += pipe.line.wire_bytes
                row["requests"] += pipe.requests
                row["wrong"] += pipe.wrong
        peers = [pipe for name, pipe in asking.pipes.items() if "://" not in name]
        gone = asking.gone
        rows.append({"name": "peers", "bytes": gone["bytes"] + sum(pipe.bytes for pipe in peers),
                     "wire_bytes": gone["wire_bytes"] + sum(pipe.line.wire_bytes for pipe in peers),
                     "requests": gone["requests"] + sum(pipe.requests for pipe in peers),
                     "wrong": gone["wrong"] + sum(pipe.wrong for pipe in peers)})  # fmt: skip
        return rows

    async def close(self) -> None:
        """See `Upstream`."""
        await self._client.close()


class Peering:
    """See the head of this file. `start` once there is a chain; what is read before goes to superpeers."""

    def __init__(self, config: PeersConfig, client: SuperpeerClient, store: DiskBlobs, fallbacks: Fallbacks,
                 state: Path, *, compress: bool, tls: Tls | None,
                 in_use: Callable[[], Iterable[Blob]]) -> None:  # fmt: skip
        self.config = config
        self.client = client
        self._store = store
        self._state = state
        self._tls = tls
        self._fallbacks = fallbacks
        self.link = config.link
        self.frames = Frames(config.compressed_cache if compress else 0)
        self.upload = Upload(rate=config.upload_rate, children=config.children)
        self.pressure = Pressure(memory=config.memory_pressure, cpu=config.cpu_pressure)
        scheme = "https" if tls else "http"
        self.desk = Desk(Group(), self.pressure)
        self.directory = GroupedDirectory(
            DirectoryClient(client.superpeers, client.session, fallbacks, tokens=client.tokens), self.desk,
            client.session, fallbacks, me=lambda: self.parents.peer, scheme=scheme, tokens=client.tokens,
        )  # fmt: skip
        self.parents = Parents(
            self._peer("-", ""), self.directory, self._order, client.session,
            # What a virtual interface says of itself is no measure for a parent.
            Health(patience.upstreams(config.link)), self.frames, fallbacks, in_use=in_use,
            present=self._present, condition=self._condition, compress=compress, scheme=scheme,
            tokens=client.tokens,
        )  # fmt: skip
        self.upstream = PeeredUpstream(client, self.parents)
        self.server: PeerServer | None = None
        self._runner: web.AppRunner | None = None
        self._listening: asyncio.Task[None] | None = None
        self._joined = False
        self.refusing = False
        """Whether this node wants no new children: it is being drained."""
        self.restored = False
        """Whether all mounts of the process before are known: until then a blob that is not may be one of theirs."""

    def __repr__(self) -> str:
        return f"Peering({self.parents!r}, {self.server!r})"

    def _peer(self, name: str, address: str) -> Peer:
        config = self.config
        slots = config.slots or (2 if self.link >= link.FAST else 1)
        zone, rack = config.zone or os.environ.get("DADI_ZONE", ""), config.rack or os.environ.get("DADI_RACK", "")
        return Peer(name, address, zone[:128], rack[:128], slots)

    def _order(self, digest: str) -> Sequence[str]:
        return self.client.superpeers.order(digest)

    def _present(self, blob: Blob) -> tuple[int, bool]:
        whole = self._store.has(blob.digest)
        return blob.table.count if whole else self._store.present_bytes(blob) // blob.table.chunk_size, whole

    def _known(self, digest: str) -> Blob | None:
        blob = self.parents.membership.blobs.get(digest)
        if blob is None and not self.restored and not self._store.has(digest):
            hint = "it comes again by itself"
            raise Unavailable("this node has just started", retry_after=_STARTING, hint=hint)
        return blob

    async def _condition(self) -> Condition:
        # A look of its own: nobody asks a node that said once that it refuses, and then nobody else looks.
        refuses = await self.pressure.why() is not None or self.upload.full or self.refusing
        return Condition(self.upload.load(self.link), refuses)

    async def start(self, chain: Chain, demand: Demand) -> None:
        """Begin to serve others and to join. Raises ConfigError."""
        self.link = self.link or await asyncio.to_thread(link.rate)
        gate = OPEN if self.config.authorization == "open" else Gate(self.client.keys)
        self.server = PeerServer(
            self._store, chain, self.frames, self.upload, self.pressure, known=self._known,
            instead=self.parents.parent_of, waiting=demand.waiting, gate=gate,
        )  # fmt: skip
        try:
            await self._listen(self.server)
        except Conflict as error:  # a process before us may still be ending: no reason to let reads wait
            self._fallbacks.note("not serving other nodes yet", str(error))
            await self._join(self.config.listen, serves=False)
            self._listening = asyncio.create_task(self._listen_later(self.server))

    async def _listen_later(self, server: PeerServer) -> None:
        while True:
            await asyncio.sleep(_AGAIN)
            try:
                return await self._listen(server)
            except Conflict as error:
                self._fallbacks.note("not serving other nodes yet", str(error))

    async def _listen(self, server: PeerServer) -> None:
        application = server.application()
        self.desk.add_routes(application.router)
        self._runner, address = await http.serve_tcp(application, self.config.listen, self._tls)
        peer = await self._join(address, serves=True)
        log.info("serving other nodes", address=address, id=peer.id, zone=peer.zone, rack=peer.rack, slots=peer.slots)

    async def _join(self, address: str, *, serves: bool) -> Peer:
        """Be known to others by this address, from now on or from the next heartbeat on; nobody's parent if not."""
        parents = self.parents
        peer = self._peer(await asyncio.to_thread(_peer_id, self._state / "peer-id"), self.config.address or address)
        if not serves:
            peer = msgspec.structs.replace(peer, slots=0)
        parents.peer = parents.membership.peer = peer
        if not self._joined:
            self._joined = True
            if self.config.authorization != "open":
                self.client.keys.start()
            parents.start()
        self.directory.start()
        return peer

    async def stop_serving(self) -> None:
        """Leave the trees, and serve nobody any more; reads of our own go on."""
        if self._listening is not None:
            self._listening.cancel()
            await asyncio.gather(self._listening, return_exceptions=True)
        await self.directory.close()
        await self.parents.membership.close()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def resume(self) -> None:
        """Serve again, and be in the trees again."""
        if self.server is None:
            return
        self.parents.membership.start()
        try:
            await self._listen(self.server)
        except Conflict as error:
            self._fallbacks.note("not serving other nodes yet", str(error))
            self._listening = asyncio.create_task(self._listen_later(self.server))

    async def close(self) -> None:
        """Stop everything."""
        await self.stop_serving()
        await self.parents.close()

    async def trees(self, blobs: Sequence[Blob]) -> dict[str, Any]:
        """Return what `dadi peers` shows of these blobs: the directory's rows, and what this node knows itself."""
        trees = await self.directory.trees([blob.digest for blob in blobs])
        rows = []
        for blob in blobs:
            chooser = self.parents.asking.choosers.get(blob.digest)
            chunks, complete = self._present(blob)
            rows.append({
                "blob": blob.digest, "bytes": blob.size, "chunks": blob.table.count, "present_chunks": chunks,
                "complete": complete, "parents": list(chooser.parents) if chooser else [],
                "superpeers": list(chooser.superpeers) if chooser else list(self._order(blob.digest)),
                "tree": trees.get(blob.digest),
            })  # fmt: skip
        return {"id": self.parents.peer.id, "blobs": rows, **self.statistics()}

    def statistics(self) -> dict[str, Any]:
        """Return what is asked for (see `Parents`), and what is served."""
        return {
            **self.parents.statistics(), "directory": self.directory.statistics(),
            "served": self.server.statistics() if self.server else None,
        }  # fmt: skip


class _Ready:
    """Parents, once it is known which superpeers there are (by DNS)."""

    def __init__(self, client: SuperpeerClient, parents: Parents) -> None:
        self._client = client
        self._parents = parents

    def __repr__(self) -> str:
        return repr(self._parents)

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run."""
        if not self._client.superpeers.names:
            await self._client.superpeers.ready()
        return await self._parents.read(blob, chunks, urgency)


def _peer_id(file: Path) -> str:
    """Return this node's id among the others: the same after a restart, so that nobody waits for one who is gone."""
    try:
        known = file.read_text().strip()
        if 0 < len(known) <= 128 and known.isprintable() and "://" not in known:
            return known
    except (OSError, UnicodeDecodeError):
        pass
    made = f"{os.uname().nodename[:60]}-{secrets.token_hex(6)}"
    with contextlib.suppress(OSError):  # then it is another one after the next start
        write_durably(file, made.encode())
    return made


def image_blobs(image: str, mounts: Iterable[Mapping[str, Any]], in_use: Iterable[Blob]) -> list[Blob]:
    """Return the blobs of a mounted image that nodes share: metadata and devices. Raises NotFound, InvalidRequest."""
    wanted = str(Reference.parse(image))
    for row in mounts:
        if wanted in (row["reference"], f"{row['reference']}@{row['manifest_digest']}"):
            digests = [device["blob"] for device in row["devices"]]
            blobs = {blob.digest: blob for blob in in_use}
            return [blobs[digest] for digest in digests if digest in blobs]
    raise NotFound(f"{image} is not mounted on this node", hint="`dadi status` lists what is")
