"""A node answers other nodes: what it has, at once; what it lacks, as soon as it comes. Its own TCP port, 7071.

The requests and answers are in `line.py`. What a child asks for counts as a read of this node's: it is fetched once,
whoever else wants it, kept, and passed on.

    `Dadi-Stream: 1`               200: each chunk of the run as soon as it is here (`stream.py`)
    without it:
      the first chunk is here      206 with it, and the chunks behind it that are here too: the rest is asked for again
      it does not come in 0.1 s    202: it goes on being fetched
    not mounted, and not here      404
    too many children, the rate is used up: 429; short of memory or processor time: 503; with `Retry-After`

The chunks of a 206 are all zstd frames (those that this node got itself, as they were) or all plain (`sendfile`); in a
stream each is what suits it.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from aiohttp import web

from dadi import digest as digests
from dadi import http
from dadi.blobs.answering import Answer
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.serving import requested, urgency_of
from dadi.blobs.single_flight import runs
from dadi.blobs.source import Urgency
from dadi.errors import DadiError, InvalidRequest, NotFound, Unavailable
from dadi.index.chunks import Blob
from dadi.peers import hops as hop_count
from dadi.peers import stream
from dadi.peers.frames import Frames
from dadi.peers.gate import OPEN, Doorman
from dadi.peers.line import PEER, TRY, WAITING
from dadi.peers.packing import Packing
from dadi.peers.patience import FIRST_SIGN, SIGN_EVERY
from dadi.peers.pressure import Pressure
from dadi.peers.streaming import Arrivals, ChunkStream
from dadi.peers.upload import Upload, child_of
from dadi.wire import error_fields

_LARGEST = 8 << 20
"""Bytes that one request may ask for, at least one chunk."""
_UNDER_PRESSURE = 5.0


class PeerServer:
    """See the head of this file. `chain` is what the node itself reads by, over `store`."""

    def __init__(self, store: DiskBlobs, chain: Chain, frames: Frames, upload: Upload, pressure: Pressure, *,
                 known: Callable[[str], Blob | None], instead: Callable[[str], str] = lambda digest: "",
                 waiting: Callable[[], AbstractContextManager[None]] = contextlib.nullcontext,
                 gate: Doorman = OPEN) -> None:  # fmt: skip
        """`known`: blobs that may be fetched (of mounted images); `instead`: who else to ask for a blob, by id.

        `waiting`: around the fetch of what somebody's program waits for: this node's own backfill stands aside.
        """
        self.upload = upload
        self.pressure = pressure
        self._store = store
        self._chain = chain
        self._frames = frames
        self._packing = Packing(store, frames)
        self._known = known
        self._instead = instead
        self._waiting = waiting
        self._gate = gate
        self._phase = random.random()  # not the same moment on all machines
        self._fetching: set[tuple[str, int]] = set()
        """Digests and chunks that are being fetched for others."""
        self.requests = 0
        self.bytes = 0
        self.wire_bytes = 0
        self.waits = 0

    def __repr__(self) -> str:
        return f"PeerServer({self.upload!r})"

    def application(self) -> web.Application:
        """Return what is to be served."""
        app = http.application()
        app.router.add_get("/v1/blobs/{digest}", self.handle, allow_head=False)
        return app

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        digest = digests.parse(request.match_info["digest"])
        await self._gate.admit(request.headers, digest)
        self.requests += 1
        name = request.headers.get(PEER, "")[:128] or str(request.remote)
        try:
            short_of = await self.pressure.why()
            if short_of:
                text = f"this node is short of {short_of}"
                return self._refused(digest, 503, Unavailable(text, retry_after=_UNDER_PRESSURE))
            self.upload.admit(_child(request), name)
            return await self._answer(request, digest)
        except ConnectionError:  # a write that waits raises no ConnectionResetError, but this one
            # It has what it wanted from somebody else: that is how hedges end.
            if request.transport is not None:
                request.transport.abort()
            return web.Response(status=499)
        except Unavailable as error:
            if error.retry_after is None:
                raise
            return self._refused(digest, 429, error)

    def _refused(self, digest: str, status: int, error: Unavailable) -> web.Response:
        headers = {"Retry-After": str(int((error.retry_after or 0) + 1))}
        if instead := self._instead(digest):
            headers[TRY] = instead
        return web.json_response(error_fields(error), status=status, headers=headers)

    async def _answer(self, request: web.Request, digest: str) -> web.StreamResponse:
        known = self._known(digest)
        blob = known or self._store.find(digest)
        if blob is None:
            raise NotFound(f"this node has no blob {digest}")
        chunks = _whole_chunks(request, blob)
        urgency, hops = urgency_of(request.headers), hop_count.hops_of(request.headers.get(hop_count.HEADER))
        if request.headers.get(stream.HEADER) != "1":
            with self.upload.asked(_child(request), blob.table.span(chunks)[1]):
                return await self._give(request, blob, chunks, urgency, hops, may_fetch=known is not None)
        wanted: Sequence[int] = chunks
        if (text := request.headers.get(stream.CHUNKS)) is not None:
            wanted = stream.chunks_of(text, blob.table.count, max(1, _LARGEST // blob.table.chunk_size))
        with self.upload.asked(_child(request), sum(blob.table.extent(chunk)[1] for chunk in wanted)):
            return await self._stream(request, blob, wanted, urgency, hops, may_fetch=known is not None)

    async def _give(
        self, request: web.Request, blob: Blob, chunks: range, urgency: Urgency, hops: int, *, may_fetch: bool
    ) -> web.StreamResponse:
        here, passing = await self._here(blob, chunks, urgency, hops, _child(request), may_fetch=may_fetch)
        if not here:
            self.waits += 1
            return web.Response(status=202, headers={WAITING: "1"})
        frames: list[bytes] = []
        if self._frames and "zstd" in request.headers.get("Accept-Encoding", ""):
            frames = await self._packing.frames(blob, here, compress=not passing)
            here = range(here.start, here.start + len(frames)) if frames else self._packing.plain_ones(blob, here)
        offset, length = blob.table.span(here)
        headers = {
            "Content-Length": str(sum(map(len, frames)) if frames else length),
            "Content-Type": "application/octet-stream",
            "Content-Range": f"bytes {offset}-{offset + length - 1}/{blob.size}",
        }
        if frames:
            headers["Content-Encoding"] = "zstd"
        answer = Answer(request, 206, headers)
        wire = int(headers["Content-Length"])
        async with self.upload.sending(wire, urgency == Urgency.DEMAND):
            if frames or passing:
                await answer.begin()
                await answer.write(b"".join(frames) or passing)
            else:
                await self._send_plain(answer, blob, here)
        self.bytes += length
        self.wire_bytes += wire
        return answer

    # ---- what is here

    async def _here(
        self, blob: Blob, chunks: range, urgency: Urgency, hops: int, child: str, *, may_fetch: bool
    ) -> tuple[range, bytes]:
        """Return the first chunks of the run, as many as are here; have the others fetched. Waits a little for one.

        With the bytes of the first if it has come just now, and nothing else: so they do not take the way by the disk,
        and a full store stops nobody below.
        """
        missing = await self._store.missing(blob, chunks)
        if not missing:
            return chunks, b""
        if not may_fetch:
            if missing[0] == chunks.start:
                raise NotFound(f"{blob} is not mounted on this node, and not all here")
            return range(chunks.start, missing[0]), b""
        fetches = self._fetch(blob, missing, urgency, hops, child)
        if missing[0] != chunks.start:
            return range(chunks.start, missing[0]), b""
        first = fetches[chunks.start]
        await asyncio.wait([first], timeout=FIRST_SIGN)
        missing = await self._store.missing(blob, chunks)
        here = range(chunks.start, missing[0] if missing else chunks.stop)
        if first.done() and len(here) <= 1:
            return range(chunks.start, chunks.start + 1), first.result()  # or raise what went wrong
        return here, b""

    def _fetch(
        self, blob: Blob, missing: list[int], urgency: Urgency, hops: int, child: str
    ) -> dict[int, asyncio.Future[bytes]]:
        """Have chunks fetched, whether or not who asks for them goes on waiting; return the future of each."""
        new = [(blob.digest, chunk) for chunk in missing if (blob.digest, chunk) not in self._fetching]
        give_back = self.upload.fetched(child, sum(blob.table.extent(chunk)[1] for _, chunk in new)) if new else None
        before = hop_count.HOPS.set(hops + 1)  # for the tasks that this starts
        try:
            found: dict[int, asyncio.Future[bytes]] = {}
            for run in runs(missing):
                found.update(zip(run, self._chain.begin(blob, run, urgency), strict=True))
        finally:
            hop_count.HOPS.reset(before)
        if give_back:
            self._fetching.update(new)
            for key in new:
                found[key[1]].add_done_callback(partial(self._fetched, key))
            _after_all([found[chunk] for _, chunk in new], give_back)
        if urgency == Urgency.DEMAND:
            waiting = contextlib.ExitStack()
            waiting.enter_context(self._waiting())
            _after_all(found.values(), waiting.close)
        return found

    def _fetched(self, key: tuple[str, int], _: asyncio.Future[bytes]) -> None:
        self._fetching.discard(key)

    # ---- a stream

    async def _stream(self, request: web.Request, blob: Blob, chunks: Sequence[int], urgency: Urgency, hops: int, *,
                      may_fetch: bool) -> web.StreamResponse:  # fmt: skip
        """Send each chunk as soon as it is here, and signs of life while none comes."""
        missing = [chunk for run in runs(chunks) for chunk in await self._store.missing(blob, run)]
        lacks = NotFound(f"{blob} is not mounted on this node, and not all here")
        if missing and not may_fetch and missing[0] == chunks[0]:
            raise lacks
        gone = set(missing)
        coming = Arrivals(chunk for chunk in chunks if chunk not in gone)
        if may_fetch and missing:
            self.waits += 1
            coming.expect(self._fetch(blob, missing, urgency, hops, _child(request)))
        answer = ChunkStream(Answer(request, 200, stream.HEADERS, chunked=True))
        frames = bool(self._frames) and "zstd" in request.headers.get("Accept-Encoding", "")
        urgent = urgency == Urgency.DEMAND
        await answer.begin()
        said = False
        try:
            while coming.left:
                came = await coming.next(self._until_sign(said))
                if came is None:
                    said = True
                    await answer.sign()
                else:
                    await self._send_chunk(answer, blob, *came, frames=frames, urgent=urgent)
            if missing and not may_fetch:
                raise lacks
        except DadiError as error:
            await answer.error(error, self._instead(blob.digest))
        await answer.end()
        return answer.answer

    def _until_sign(self, said: bool) -> float:
        """Return the seconds until a stream shows that it is alive: the first time soon, then all streams at once.

        On a busy machine each waking costs more than what is done in it.
        """
        if not said:
            return FIRST_SIGN
        return SIGN_EVERY - (asyncio.get_running_loop().time() + self._phase) % SIGN_EVERY

    async def _send_chunk(self, response: ChunkStream, blob: Blob, chunk: int, data: bytes, *, frames: bool,
                          urgent: bool) -> None:  # fmt: skip
        """Send one chunk: `data` if it has come just now, else from the store."""
        body, kind = data, stream.PLAIN
        if frames and (found := await self._packing.frames(blob, range(chunk, chunk + 1), compress=not data)):
            body, kind = found[0], stream.FRAME
        size = blob.table.extent(chunk)[1]
        async with self.upload.sending(len(body) or size, urgent):
            if body:
                await response.chunk(kind, chunk, body)
            else:
                await response.stored(self._store, blob, chunk)
        self.bytes += size
        self.wire_bytes += len(body) or size

    # ---- how it is sent

    async def _send_plain(self, answer: Answer, blob: Blob, run: range) -> None:
        with self._store.open_device(blob) as file:
            if await self._store.missing(blob, run):
                raise NotFound(f"{blob} is not all here any more")
            offset, length = blob.table.span(run)
            await answer.begin()
            await answer.file(file.fd, offset, length)
            await answer.end()

    def statistics(self) -> dict[str, Any]:
        """Return counts, bytes of blobs and of bodies as sent; `children`: ids of those served lately."""
        return {
            "requests": self.requests, "bytes": self.bytes, "wire_bytes": self.wire_bytes, "waits": self.waits,
            "refused": self.upload.refused, "children": sorted(self.upload.children()),
            "pressure": self.pressure.seen() or "", "frames_bytes": self._frames.bytes,
        }  # fmt: skip


def _after_all(futures: Collection[asyncio.Future[bytes]], then: Callable[[], None]) -> None:
    """Call `then` when all of them are done; there is at least one."""
    left = len(futures)

    def done(_: asyncio.Future[bytes]) -> None:
        nonlocal left
        left -= 1
        if not left:
            then()

    for future in futures:
        future.add_done_callback(done)


def _child(request: web.Request) -> str:
    return child_of(request.remote, request.headers.get(PEER, "")[:128])


def _whole_chunks(request: web.Request, blob: Blob) -> range:
    """Return the chunks that a request names; raise InvalidRequest unless they are whole, and not too many."""
    offset, length, status = requested(request, blob.size)
    chunks = blob.table.covering(offset, length)
    if status != 206 or not chunks or blob.table.span(chunks) != (offset, length):
        raise InvalidRequest("a node gives whole chunks, by `Range: bytes=A-B`", hint="ask a superpeer for other bytes")
    return chunks[: max(1, _LARGEST // blob.table.chunk_size)]
