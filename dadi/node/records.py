"""What is kept of mounts over a restart: a small JSON file for each, under STATE/mounts. No policy."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from pathlib import Path

import msgspec
import structlog

from dadi.blobs.files import full_or_broken
from dadi.blobs.layout import remove_or_log, write_durably
from dadi.node.released import Released
from dadi.peers.superpeer import ImageAnswer

log = structlog.get_logger()


class MountRecord(msgspec.Struct, frozen=True):
    """What is kept of a mount. `devices`: the loop devices, metadata first, as they were when it was made.

    `layers`: how many of the image's lowest layers are mounted; 0 for all. `step`: "" for a mount that stands;
    "mounting" before it is reported as made and "unmounting" once it is to end: who finds these, undoes or ends it.
    """

    directory: str
    answer: ImageAnswer
    devices: tuple[str, ...] = ()
    layers: int = 0
    step: str = ""


class MountRecords:
    """The records under `directory`."""

    def __init__(self, directory: Path, released: Released) -> None:
        """`released`: what was unmounted while there was no process; it is found as "unmounting"."""
        self._directory = directory
        self._released = released

    async def write(self, record: MountRecord) -> None:
        """Keep a record, all at once. Raises StoreFull, or Unavailable where the disk is broken."""
        file = self._file(record.directory)
        try:
            await asyncio.to_thread(self._released.forget, record.directory)
            await asyncio.to_thread(write_durably, file, msgspec.json.encode(record))
        except OSError as error:
            raise full_or_broken(file, error) from None

    async def remove(self, directory: str) -> None:
        """Forget the record of a mount point, if there is one; one that the disk does not let go is ended, too."""
        await asyncio.to_thread(self._remove, directory)

    async def all(self) -> list[MountRecord]:
        """Return all records; one that is damaged is dropped, one that cannot be read is left: both are logged.

        For a start only: what a killed process has left half-written is deleted.
        """
        await asyncio.to_thread(self._begin)
        found = []
        for file in await asyncio.to_thread(lambda: sorted(self._directory.glob("*.json"))):
            try:
                record = msgspec.json.decode(await asyncio.to_thread(file.read_bytes), type=MountRecord)
                if await asyncio.to_thread(self._released.__contains__, record.directory):
                    record = msgspec.structs.replace(record, step="unmounting")
                found.append(record)
            except OSError as error:
                log.error("could not read a mount record", file=str(file), why=str(error))
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                log.warning("dropped a damaged mount record", file=str(file), why=str(error))
                await asyncio.to_thread(remove_or_log, file)
        return found

    def _remove(self, directory: str) -> None:
        if remove_or_log(self._file(directory)):
            self._released.forget(directory)
        else:
            with contextlib.suppress(OSError):
                self._released.add(directory)

    def _begin(self) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        for file in self._directory.glob("*.new"):
            remove_or_log(file)

    def _file(self, directory: str) -> Path:
        return self._directory / f"{hashlib.sha256(os.fsencode(directory)).hexdigest()[:32]}.json"
