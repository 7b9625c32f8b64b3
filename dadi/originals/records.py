"""What registries have said, kept on disk: a small JSON file for each fact, all of them in memory.

    manifest NAME:TAG            the digest, size and media type of what a tag leads to
    manifest NAME@DIGEST         that a repository has a manifest
    blob NAME@DIGEST             that a repository has a blob, and its size
    tags NAME …, referrers …     the digest of the list as it was
    came NAME@DIGEST             that all of a blob has come from a repository, and was what its digest says
    public NAME                  that everybody may read a repository

A digest proves the bytes, not that a repository has them: who may read one repository must not get another's blobs by
their digests. So each place of a blob is a fact of its own, learned from the registry.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from dadi.blobs.layout import remove_or_log, write_durably

log = structlog.get_logger()


_BEGAN = time.time() - time.clock_gettime(time.CLOCK_BOOTTIME)


def steady() -> float:
    """Return seconds since 1970, counted on from what the clock said when this program began, also while suspended.

    A clock that is put back would make old answers young again, and those of today older than what is known.
    """
    return _BEGAN + time.clock_gettime(time.CLOCK_BOOTTIME)


class Record(msgspec.Struct, frozen=True):
    """One fact. `checked_at`: seconds since 1970 when the registry last said so."""

    key: str
    digest: str
    size: int
    media_type: str
    checked_at: float
    following: dict[str, str] = {}


class Records:
    """At most `most` records below `directory`; those that were looked at or confirmed last stay."""

    def __init__(self, directory: Path, *, most: int, clock: Callable[[], float] = steady) -> None:
        self._directory = directory
        self._most = most
        self._clock = clock
        self._records: OrderedDict[str, Record] = OrderedDict()

    def __repr__(self) -> str:
        return f"Records({len(self._records)})"

    def __len__(self) -> int:
        return len(self._records)

    async def load(self) -> None:
        """Read what earlier runs left; what is damaged is dropped: the registry can be asked again.

        What is from a clock that was ahead of ours is taken for new, or it would be believed until ours is there.
        """
        found, now = await asyncio.to_thread(self._load), self._clock()
        for record in sorted(found, key=lambda record: record.checked_at):
            at = min(record.checked_at, now)
            self._records[record.key] = msgspec.structs.replace(record, checked_at=at)

    def _load(self) -> list[Record]:
        self._directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = []
        for path in self._directory.glob("*.json"):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=Record))
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                log.warning("dropped what a registry has said", file=str(path), why=str(error))
                remove_or_log(path)
        return found

    def find(self, key: str) -> Record | None:
        """Return the record, however old."""
        record = self._records.get(key)
        if record is not None:
            self._records.move_to_end(key)
        return record

    def with_prefix(self, prefix: str) -> list[Record]:
        """Return the records whose keys begin so."""
        return [record for key, record in self._records.items() if key.startswith(prefix)]

    def now(self) -> float:
        """Return the time as records have it."""
        return self._clock()

    def age(self, record: Record) -> float:
        """Return the seconds since the registry was asked."""
        return max(0.0, self._clock() - record.checked_at)

    async def learn(self, key: str, digest: str, size: int, media_type: str = "",
                    following: dict[str, str] | None = None, *, asked_at: float | None = None) -> Record:  # fmt: skip
        """Remember what the registry said to who asked at `asked_at`, or now; not what a later answer has overtaken."""
        old = self._records.get(key)
        if asked_at is not None and old is not None and old.checked_at > asked_at:
            return old
        asked_at = self._clock() if asked_at is None else asked_at
        record = Record(key, digest, size, media_type, asked_at, following or {})
        self._records[key] = record
        self._records.move_to_end(key)
        # Facts that never change are not written again only because they were confirmed.
        if old is None or "@" not in key or old.digest != digest:
            await self._write(record)
        while len(self._records) > self._most:
            gone, _ = self._records.popitem(last=False)
            await asyncio.to_thread(remove_or_log, self._file(gone))
        return record

    async def forget(self, key: str) -> None:
        """Drop a record."""
        if self._records.pop(key, None) is not None:
            await asyncio.to_thread(remove_or_log, self._file(key))

    async def _write(self, record: Record) -> None:
        try:
            await asyncio.to_thread(write_durably, self._file(record.key), msgspec.json.encode(record))
        except OSError as error:
            log.error("could not write what a registry has said", key=record.key, why=str(error))

    def _file(self, key: str) -> Path:
        return self._directory / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
