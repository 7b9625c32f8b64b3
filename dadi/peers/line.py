"""One request to one upstream, a peer or a superpeer; its answer is handed on chunk by chunk, while it comes.

    →  GET /v1/blobs/sha256:… HTTP/1.1        ←  206 and the bytes, or the first chunks of them: ask again for the rest
       Range: bytes=A-B      whole chunks        202 and `Dadi-Waiting: 1`: has none of it yet, has asked for it
       Accept-Encoding: zstd                     404 will never have it       401, 403 no (good) token
       Dadi-Urgency: see `Urgency`               429, 503 with Retry-After: takes no more requests now; may name
       Dadi-Hops: N                                     another peer in `Dadi-Try`
       Dadi-Peer: the asker's id
       Authorization: Bearer …

       Dadi-Stream: 1                            200 and each chunk as it comes to it (`stream.py`): what nodes answer
       Dadi-Chunks: A-B,C,D-E                    (of several runs of neighbours, if it is known to answer that)

A stream, or else a shorter answer than was asked for, is what lets a node pass on what it has, while the rest is still
coming to it. As with `dadi/blobs/remote.py` the range counts the blob's own bytes, and compressed bodies are a zstd
frame a chunk. Each chunk is verified here: what is wrong raises DigestMismatch, and goes nowhere.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

import aiohttp

from dadi import http
from dadi.blobs.single_flight import runs
from dadi.blobs.source import Urgency
from dadi.errors import DadiError, DigestMismatch, TokenRefused, Unavailable, Unreachable
from dadi.index.chunks import Blob
from dadi.peers import hops as hop_count
from dadi.peers import stream
from dadi.peers.frames import longest, unpacked
from dadi.peers.incoming import Alive, Body, FrameBody
from dadi.peers.tokens import Tokens
from dadi.wire import URGENCY, error_in

WAITING, TRY, PEER = "Dadi-Waiting", "Dadi-Try", "Dadi-Peer"
_MAX_ERROR = 64 << 10
_AT_ONCE = 512 << 10
"""Chunks of up to so many bytes are verified on the event loop: a thread would cost more than the third of a
millisecond that it takes."""
_SIGNS, _SIGNS_A_SECOND = 64, 20
"""How often a peer may say that it waits: each time costs us a little."""


class Busy(Unavailable):
    """A peer takes no more requests for `retry_after` seconds; `instead` is the id of one that it thinks may."""

    def __init__(self, message: str, *, retry_after: float, instead: str = "") -> None:
        super().__init__(message, retry_after=retry_after)
        self.instead = instead


class RefusedAnew(TokenRefused):
    """An upstream refuses a token that a superpeer has renewed just now: it does not know the keys, or the time."""


class Heard(Protocol):
    """Who is told what comes."""

    def begins(self, chunk: int | None = None) -> None:
        """The upstream begins to send, one of the chunks or all of them."""
        ...

    def waits(self) -> None:
        """The upstream has asked for what is left of the run itself; it will be sent as it comes."""
        ...

    def chunk(self, chunk: int, data: bytes, frame: bytes | None) -> None:
        """A chunk has come, and is right; with its zstd frame if it came as one.

        b"" if it could have come as one and did not: whoever sent it has found that this does not pay.
        """
        ...


class Line(Protocol):
    """The way to one upstream."""

    wire_bytes: int
    """Bytes of bodies as they crossed the network."""
    scattered: bool
    """It takes requests for chunks that are not neighbours."""

    async def ask(self, blob: Blob, chunks: Sequence[int], urgency: Urgency, hops: int, heard: Heard) -> bool:
        """Ask for chunks, ascending, a range of them unless `scattered`; tell `heard` of what comes.

        Returns False if the upstream has nothing of it yet; what has not come is to be asked for again.

        Raises DigestMismatch for wrong bytes; Busy; NotFound; AccessDenied; Unavailable for all else that fails.
        """
        ...


class HttpLine:
    """The way to the upstream at `where()`, a URL; `session` is shared, and closed by who made it."""

    def __init__(self, where: Callable[[], str], session: aiohttp.ClientSession, *, me: str = "", compress: bool = True,
                 read: float | None = None, tokens: Tokens | None = None) -> None:  # fmt: skip
        """`read`: seconds without a byte after which a request has failed."""
        self._where = where
        self.wire_bytes = 0
        self.scattered = False
        self._session = session
        self._fixed = {"Accept-Encoding": "zstd" if compress else "identity", PEER: me,
                       stream.HEADER: "1"}  # fmt: skip
        self._sends_frames = False
        """It has shown that it compresses; else that a chunk comes plain says nothing of the chunk."""
        self._tokens = tokens
        # aiohttp would set its clock anew for each few KiB.
        self._read = session.timeout.sock_read if read is None else read
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=session.timeout.sock_connect)

    def __repr__(self) -> str:
        return f"HttpLine({self.url})"

    @property
    def url(self) -> str:
        """Where it is now."""
        return self._where().rstrip("/")

    async def ask(self, blob: Blob, chunks: Sequence[int], urgency: Urgency, hops: int, heard: Heard) -> bool:
        """See `Line`."""
        shown = self._tokens.text(blob.digest) if self._tokens else None
        try:
            return await self._ask(blob, chunks, urgency, hops, heard, shown)
        except TokenRefused:
            if self._tokens is None:
                raise
            try:
                if not await self._tokens.renewed(blob.digest, shown):
                    raise
            except Unavailable as error:  # no fault of the upstream's: others are asked, and this one again soon
                raise Busy(error.message, retry_after=error.retry_after or 1.0) from None
        try:
            return await self._ask(blob, chunks, urgency, hops, heard, self._tokens.text(blob.digest))
        except TokenRefused as error:
            raise RefusedAnew(error.message, hint=error.hint) from None

    async def _ask(self, blob: Blob, chunks: Sequence[int], urgency: Urgency, hops: int, heard: Heard,
                   token: str | None) -> bool:  # fmt: skip
        try:
            async with asyncio.timeout(self._read) as limit:
                return await self._exchange(blob, chunks, urgency, hops, heard, token, Alive(limit, self._read))
        except TimeoutError:
            text = f"reading a blob: nothing came from {self.url} for {self._read} s"
            raise Unreachable(text, hint="is it up, and reachable from here?") from None

    async def _exchange(self, blob: Blob, chunks: Sequence[int], urgency: Urgency, hops: int, heard: Heard,
                        token: str | None, alive: Alive) -> bool:  # fmt: skip
        run, *more = runs(chunks)
        offset, length = blob.table.span(run)
        headers = {"Range": f"bytes={offset}-{offset + length - 1}", hop_count.HEADER: str(hops), **self._fixed}
        if more:
            headers[stream.CHUNKS] = stream.chunks_text((run, *more))
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        if urgency != Urgency.DEMAND:
            headers[URGENCY] = urgency.word
        url = f"{self.url}/v1/blobs/{blob.digest}"
        async with http.request(
            self._session, "GET", url, "reading a blob", headers=headers, accept=(429, 503), timeout=self._timeout
        ) as response:
            if response.status in (429, 503):
                raise _refusal(response, self.url, error_in(await response.content.read(_MAX_ERROR)))
            if response.status == 202:
                return False
            self.scattered = stream.CHUNKS in response.headers
            # Not `content_type`, which has Python's e-mail package parse it.
            if response.status == 200 and response.headers.get("Content-Type") == stream.TYPE:
                await self._stream(response, blob, chunks if self.scattered else run, heard, alive)
                return True
            coming = self._granted(response, blob, run, offset)
            heard.begins()
            await self._body(response, blob, coming, heard, alive)
        return True

    def _granted(self, response: aiohttp.ClientResponse, blob: Blob, run: range, offset: int) -> range:
        """Return the chunks that an answer holds: the first ones of the run, at least one, each of them whole."""
        said = response.headers.get("Content-Range", "")
        if response.status == 206:
            for stop in range(run.stop, run.start, -1):
                granted = range(run.start, stop)
                if said == f"bytes {offset}-{offset + blob.table.span(granted)[1] - 1}/{blob.size}":
                    return granted
        told = f"{response.status} with {said[:100] or 'no range'}"
        raise DigestMismatch(f"{self.url} answered {told} to a request for the chunks {run} of {blob}", source=self.url)

    async def _body(self, response: aiohttp.ClientResponse, blob: Blob, run: range, heard: Heard,
                    alive: Alive) -> None:  # fmt: skip
        lengths = [blob.table.extent(chunk)[1] for chunk in run]
        compressed = response.headers.get("Content-Encoding") == "zstd"
        pieces = FrameBody(response, self.url, alive) if compressed else None
        body = Body(response, alive)
        for chunk, length in zip(run, lengths, strict=True):
            frame = await pieces.next(length) if pieces else None
            data = frame if frame is not None else await body.exactly(length)
            await self._came(blob, chunk, data, frame is not None, heard)
        if (pieces and pieces.rest) or await body.more():
            raise DigestMismatch(f"{self.url} sent more than the range it was asked for", source=self.url)

    async def _stream(self, response: aiohttp.ClientResponse, blob: Blob, chunks: Sequence[int], heard: Heard,
                      alive: Alive) -> None:  # fmt: skip
        """Take chunks as they come, until all have."""
        missing = set(chunks)
        body = Body(response, alive)
        loop = asyncio.get_running_loop()
        began, signs = loop.time(), 0
        while missing:
            kind, chunk, length = stream.parse(await body.exactly(stream.SIZE))
            if kind == stream.WAITS:
                signs += 1
                if signs > _SIGNS + _SIGNS_A_SECOND * (loop.time() - began):
                    raise DigestMismatch(f"{self.url} says that it waits, and nothing else, all the time")
                heard.waits()
                continue
            if kind == stream.ERROR:
                error, after, instead = stream.error_of(await body.exactly(length), self.url)
                raise Busy(error.message, retry_after=after, instead=instead) if after is not None else error
            size = blob.table.extent(chunk)[1] if chunk in missing else -1
            most = longest(size) if kind == stream.FRAME and size > 0 else size
            if length > most or not length or (kind == stream.PLAIN and length != size):
                told = f"{length} bytes as chunk {chunk} in answer to a request for others of {blob}"
                raise DigestMismatch(f"{self.url} sent {told}", source=self.url)
            heard.begins(chunk)
            data = await body.exactly(length)
            missing.discard(chunk)
            await self._came(blob, chunk, data, kind == stream.FRAME, heard)
        if await body.more():
            raise DigestMismatch(f"{self.url} sent more than it was asked for", source=self.url)

    async def _came(self, blob: Blob, chunk: int, sent: bytes, compressed: bool, heard: Heard) -> None:
        """Verify a chunk, and hand it on."""
        self.wire_bytes += len(sent)
        if blob.table.chunk_size <= _AT_ONCE:
            data = _verified(blob, chunk, sent, compressed, self.url)
        else:
            data = await asyncio.to_thread(_verified, blob, chunk, sent, compressed, self.url)
        self._sends_frames |= compressed
        # A superpeer compresses a range as a whole, also the chunks in it for which that does not pay.
        frame = sent if compressed and len(sent) < len(data) else b""
        heard.chunk(chunk, data, frame if self._sends_frames else None)


def _verified(blob: Blob, chunk: int, data: bytes, compressed: bool, where: str) -> bytes:
    if compressed:
        try:
            data = unpacked(data, blob.table.extent(chunk)[1])
        except DigestMismatch as error:
            raise DigestMismatch(f"{where}: {error.message}", source=where) from None
    blob.verify(chunk, data, source=where)
    return data


def _refusal(response: aiohttp.ClientResponse, where: str, error: DadiError | None) -> Unavailable:
    asked = http.asked_to_wait(response)
    text = f"{where}: {error.message if error else response.status}"
    if asked is None:
        return Unavailable(text)
    return Busy(text, retry_after=asked, instead=response.headers.get(TRY, "")[:200])
