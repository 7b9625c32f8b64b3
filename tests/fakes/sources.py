"""Sources that do what a test tells them: answer from bytes, wait, fail, lie. They count what they were asked."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dadi.blobs.source import Urgency
from dadi.index.chunks import Blob


class ScriptedSource:
    """Answers from `contents` (digest → bytes); `errors` are raised first, one a read; `gate` is waited for."""

    def __init__(self, *contents: tuple[Blob, bytes], name: str = "scripted") -> None:
        self.name = name
        self.contents = {blob.digest: data for blob, data in contents}
        self.errors: list[Exception] = []
        self.gate: asyncio.Event | None = None
        self.change: Callable[[bytes], bytes] = lambda part: part
        self.asked: list[range] = []
        self.cancelled = 0

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        self.asked.append(chunks)
        try:
            if self.gate:
                await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        if self.errors:
            raise self.errors.pop(0)
        data = self.contents[blob.digest]
        extents = [blob.table.extent(chunk) for chunk in chunks]
        return [self.change(data[offset : offset + length]) for offset, length in extents]

    @property
    def chunks_asked(self) -> list[int]:
        return [chunk for run in self.asked for chunk in run]
