"""Chunks from another dadi program by HTTP: `GET /v1/blobs/{digest}` with `Range`.

    →  GET /v1/blobs/sha256:… HTTP/1.1          ←  206 Partial Content
       Range: bytes=A-B                            Content-Range: bytes A-B/SIZE
       Dadi-Urgency: 0                             exactly B-A+1 bytes

A run of chunks is one request. A 200, another range, another size or a short body is an error: the bytes are dropped.
What comes from here is unverified: only a `Verified` may ask it.
"""

from __future__ import annotations

import asyncio

import aiohttp

from dadi import http
from dadi.blobs.source import Urgency
from dadi.errors import DigestMismatch
from dadi.index.chunks import Blob

URGENCY = "Dadi-Urgency"


class Remote:
    """A source on the machine at `url` ("http://host:port")."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url = url.rstrip("/")
        self._session = session
        self.requests = 0

    def __repr__(self) -> str:
        return f"Remote({self.url})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run, unverified; raise Unavailable if it does not come whole."""
        if not chunks:
            return []
        offset, length = blob.table.span(chunks)
        last = offset + length - 1
        headers = {"Range": f"bytes={offset}-{last}", URGENCY: str(int(urgency))}
        self.requests += 1
        url = f"{self.url}/v1/blobs/{blob.digest}"
        async with http.request(self._session, "GET", url, "reading a blob", headers=headers) as response:
            said = response.headers.get("Content-Range", "")
            if response.status != 206 or said != f"bytes {offset}-{last}/{blob.size}":
                told = f"{response.status} with {said or 'no range'}"
                raise DigestMismatch(f"{url} answered {told} to bytes={offset}-{last}", source=self.url)
            try:
                parts = [await response.content.readexactly(blob.table.extent(chunk)[1]) for chunk in chunks]
            except asyncio.IncompleteReadError as error:
                raise aiohttp.ClientPayloadError(f"body cut short: {error}") from None
            if await response.content.read(1):
                raise DigestMismatch(f"{url} sent more than the range it was asked for", source=self.url)
            return parts
