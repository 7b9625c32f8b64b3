"""Chunks from another dadi program by HTTP: `GET /v1/blobs/{digest}` with `Range`.

    →  GET /v1/blobs/sha256:… HTTP/1.1          ←  206 Partial Content
       Range: bytes=A-B                            Content-Range: bytes A-B/SIZE
       Accept-Encoding: zstd                       exactly B-A+1 bytes
       Dadi-Urgency: prefetch (see `Urgency`)   or Content-Encoding: zstd, frames of exactly B-A+1 bytes together
       Authorization: Bearer TOKEN              or 401: the token is renewed, once, and the run asked for again

The range always counts the blob's own bytes, also where they come compressed. A run of chunks is one request. A 200,
another range, another size or a short body is an error: the bytes are dropped.
What comes from here is unverified: only a `Verified` may ask it.
"""

from __future__ import annotations

import asyncio

import aiohttp
import zstandard

from dadi import http
from dadi.blobs.source import Urgency
from dadi.errors import DigestMismatch, TokenRefused
from dadi.index.chunks import MAX_CHUNK_SIZE, Blob
from dadi.peers.tokens import Tokens
from dadi.wire import URGENCY


class Remote:
    """A source on the machine at `url` ("http://host:port")."""

    def __init__(self, url: str, session: aiohttp.ClientSession, *, compress: bool = True,
                 tokens: Tokens | None = None) -> None:  # fmt: skip
        """`compress`: take the bytes compressed where the other side offers it. `tokens`: what the node holds."""
        self._tokens = tokens
        self.url = url.rstrip("/")
        self._session = session
        self._accept = "zstd" if compress else "identity"
        self.requests = 0
        self.wire_bytes = 0
        """Bytes of bodies as they crossed the network."""

    def __repr__(self) -> str:
        return f"Remote({self.url})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run, unverified; raise Unavailable if it does not come whole."""
        if not chunks:
            return []
        shown = self._tokens.text(blob.digest) if self._tokens else None
        try:
            return await self._read(blob, chunks, urgency, shown)
        except TokenRefused:
            if self._tokens is None or not await self._tokens.renewed(blob.digest, shown):
                raise
        return await self._read(blob, chunks, urgency, self._tokens.text(blob.digest))

    async def _read(self, blob: Blob, chunks: range, urgency: Urgency, token: str | None) -> list[bytes]:
        offset, length = blob.table.span(chunks)
        last = offset + length - 1
        headers = {"Range": f"bytes={offset}-{last}", "Accept-Encoding": self._accept}
        if urgency != Urgency.DEMAND:
            headers[URGENCY] = urgency.word
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        self.requests += 1
        url = f"{self.url}/v1/blobs/{blob.digest}"
        async with http.request(self._session, "GET", url, "reading a blob", headers=headers) as response:
            said = response.headers.get("Content-Range", "")
            if response.status != 206 or said != f"bytes {offset}-{last}/{blob.size}":
                told = f"{response.status} with {said or 'no range'}"
                raise DigestMismatch(f"{url} answered {told} to bytes={offset}-{last}", source=self.url)
            lengths = [blob.table.extent(chunk)[1] for chunk in chunks]
            if response.headers.get("Content-Encoding") == "zstd":
                announced = response.content_length or 0
                if not 0 < announced <= length:
                    raise DigestMismatch(f"{url} sends {announced} compressed bytes for {length}", source=self.url)
                body = await response.content.readexactly(announced)
                self.wire_bytes += len(body)
                return await asyncio.to_thread(self._decompress, url, body, lengths)
            try:
                parts = [await response.content.readexactly(size) for size in lengths]
            except asyncio.IncompleteReadError as error:
                raise aiohttp.ClientPayloadError(f"body cut short: {error}") from None
            if await response.content.read(1):
                raise DigestMismatch(f"{url} sent more than the range it was asked for", source=self.url)
            self.wire_bytes += length
            return parts

    def _decompress(self, url: str, body: bytes, lengths: list[int]) -> list[bytes]:
        """Return chunks of these lengths; memory is bounded by them, whatever the frames claim."""
        try:
            frames = zstandard.ZstdDecompressor(max_window_size=MAX_CHUNK_SIZE)
            with frames.stream_reader(body, read_across_frames=True) as reader:
                parts = [reader.read(size) for size in lengths]
                more = reader.read(1)
        except zstandard.ZstdError as error:
            raise DigestMismatch(f"{url} sent what is no zstd frame: {error}", source=self.url) from None
        if more or [len(part) for part in parts] != lengths:
            raise DigestMismatch(f"{url} sent frames of another length than the range", source=self.url)
        return parts
