"""Verify what an untrusted source gives, before anybody else sees it; count and blame.

One around each source that is asked (`dadi/peers/superpeer.py`): a liar then fails alone, and another one answers the
read. Where nodes ask each other it is the line that verifies, chunk by chunk as they come (`dadi/peers/line.py`).
"""

from __future__ import annotations

import asyncio

import structlog

from dadi.blobs.source import Source, Urgency
from dadi.errors import DigestMismatch
from dadi.index.chunks import Blob

log = structlog.get_logger()


class Verified:
    """A source each of whose chunks was checked against the blob's chunk table.

    `name` is what the source is called in errors, logs and statistics ("superpeer", "peer 10.0.0.7").
    """

    def __init__(self, name: str, source: Source) -> None:
        self.name = name
        self.source = source
        self.chunks = 0
        self.bytes = 0
        self.wrong = 0

    def __repr__(self) -> str:
        return f"Verified({self.source!r})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run; raise DigestMismatch, naming the source, if any chunk of it is wrong."""
        parts = await self.source.read(blob, chunks, urgency)
        try:
            await asyncio.to_thread(self._verify, blob, chunks, parts)
        except DigestMismatch as error:
            self.wrong += 1
            log.error("wrong bytes, thrown away", source=self.name, blob=blob.digest, why=str(error))
            raise
        self.chunks += len(parts)
        self.bytes += sum(map(len, parts))
        return parts

    def _verify(self, blob: Blob, chunks: range, parts: list[bytes]) -> None:
        if len(parts) != len(chunks):
            why = f"{len(parts)} chunks of {blob.digest} came from {self.name} instead of {len(chunks)}"
            raise DigestMismatch(why, source=self.name, hint="are the versions alike?")
        for chunk, part in zip(chunks, parts, strict=True):
            blob.verify(chunk, part, source=self.name)
