"""Index artifacts that were found to lie: never used again, also after a restart. One small JSON file."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import structlog

from dadi.blobs.layout import write_durably
from dadi.errors import DigestMismatch

log = structlog.get_logger()
_MOST = 10_000


class Refused:
    """The digests, and what was wrong with each; the oldest go first above 10,000."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._why: dict[str, str] = {}

    def __len__(self) -> int:
        return len(self._why)

    async def load(self) -> None:
        """Read what earlier runs found."""
        try:
            raw = await asyncio.to_thread(self._path.read_bytes)
            self._why = msgspec.json.decode(raw, type=dict[str, str])
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.error("could not read which indexes lied", file=str(self._path), why=str(error))

    def check(self, digest: str) -> None:
        """Raise DigestMismatch if this artifact has lied before."""
        why = self._why.get(digest)
        if why is not None:
            hint = "`dadi index --force` makes an honest one, of another digest"
            raise DigestMismatch(f"it was found to lie: {why}", hint=hint)

    def has(self, digest: str) -> bool:
        """Whether this artifact has lied before."""
        return digest in self._why

    async def add(self, digest: str, why: str) -> None:
        """Remember that it lied."""
        self._why[digest] = why[:500]
        while len(self._why) > _MOST:
            del self._why[next(iter(self._why))]
        try:
            await asyncio.to_thread(write_durably, self._path, msgspec.json.encode(self._why))
        except OSError as error:
            log.error("could not write which indexes lied", file=str(self._path), why=str(error))
