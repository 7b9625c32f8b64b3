"""Index artifacts that were found to lie: never used again, also after a restart. One small JSON file.

Those that are only doubted (`Lie.proven` in `ranged.py`: it may be the bytes' way that is bad) are not used for a
while: ten minutes, twice as long each time that it happens again, a day at most; and in memory only.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from dadi.blobs.layout import write_durably
from dadi.errors import DigestMismatch

log = structlog.get_logger()
_MOST = 10_000
_DOUBTED, _LONGEST_DOUBTED = 600.0, 86_400.0
"""Seconds."""


class _Doubt(msgspec.Struct):
    why: str
    until: float
    seconds: float


class Refused:
    """The digests, and what was wrong with each; the oldest go first above 10,000. `clock`: seconds."""

    def __init__(self, path: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._path = path
        self._clock = clock
        self._why: dict[str, str] = {}
        self._doubts: dict[str, _Doubt] = {}

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
        """Raise DigestMismatch if this artifact has lied before, or seemed to a while ago."""
        why = self._why.get(digest)
        if why is not None:
            hint = "`dadi index --force` makes an honest one, of another digest"
            raise DigestMismatch(f"it was found to lie: {why}", hint=hint)
        if (doubt := self._doubt(digest)) is not None:
            left = doubt.until - self._clock()
            hint = "do the registry's bytes come as they are, or is there something on their way that spoils them?"
            raise DigestMismatch(f"it or its registry lied; not used for {left:.0f} s: {doubt.why}", hint=hint)

    def has(self, digest: str) -> bool:
        """Whether this artifact has lied before, or seemed to a while ago."""
        return digest in self._why or self._doubt(digest) is not None

    def _doubt(self, digest: str) -> _Doubt | None:
        doubt = self._doubts.get(digest)
        return doubt if doubt is not None and self._clock() < doubt.until else None

    def doubt(self, digest: str, why: str) -> None:
        """Do not use it for a while: it lied, or its registry did."""
        if self._doubt(digest) is not None:
            return  # of another image that has it, too
        before = self._doubts.pop(digest, None)
        seconds = min(2 * before.seconds, _LONGEST_DOUBTED) if before else _DOUBTED
        self._doubts[digest] = _Doubt(why[:500], self._clock() + seconds, seconds)
        while len(self._doubts) > _MOST:
            del self._doubts[next(iter(self._doubts))]

    async def add(self, digest: str, why: str) -> None:
        """Remember that it lied."""
        self._why[digest] = why[:500]
        while len(self._why) > _MOST:
            del self._why[next(iter(self._why))]
        try:
            await asyncio.to_thread(write_durably, self._path, msgspec.json.encode(self._why))
        except OSError as error:
            log.error("could not write which indexes lied", file=str(self._path), why=str(error))
