"""Which mounts there are, and which somebody is at: the facts that `mounts.py` and `restoring.py` share. No I/O.

    standing      mounted: lazy, local or broken, by its devices
    lost          recorded, and could not be restored: tried again, shown by `dadi status` with its error
    unfinished    a killed process was making or unmounting it: being undone or ended; its devices are left alone
    busy          being made, restored or unmounted just now: nobody else may begin

A directory is in one of the first three at most, but while a lost one is being mounted anew.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from dadi.errors import Conflict
from dadi.index.image import ImageIndex
from dadi.node.devices import BlobDevice, DeviceState
from dadi.node.records import MountRecord


class Mount:
    """One mounted image: its record, its index, and its devices (metadata first)."""

    def __init__(self, record: MountRecord, index: ImageIndex, devices: list[BlobDevice]) -> None:
        self.record = record
        self.index = index
        self.devices = devices
        self.holds = contextlib.ExitStack()
        """The image index and the metadata, for as long as it is mounted."""

    def __repr__(self) -> str:
        return f"Mount({self.record.answer.reference} at {self.record.directory}, {self.state})"

    @property
    def state(self) -> str:
        """lazy, local, or broken."""
        states = {device.state for device in self.devices}
        for state in (DeviceState.BROKEN, DeviceState.LAZY):
            if state in states:
                return str(state.value)
        return str(DeviceState.LOCAL.value)


class Lost(NamedTuple):
    """A mount that could not be restored, and the error."""

    record: MountRecord
    why: str


class MountTable:
    """See the head of this file. All keys are real paths of mount points."""

    def __init__(self) -> None:
        self.standing: dict[str, Mount] = {}
        self.lost: dict[str, Lost] = {}
        self.unfinished: dict[str, MountRecord] = {}
        self.busy: dict[str, asyncio.Event] = {}

    def __repr__(self) -> str:
        return f"MountTable({len(self.standing)} standing, {len(self.lost)} lost, {len(self.unfinished)} unfinished)"

    @contextlib.contextmanager
    def alone(self, directory: str) -> Iterator[None]:
        """Be the only one at a directory. Raises Conflict if somebody is at it."""
        self.check_idle(directory)
        done = self.busy[directory] = asyncio.Event()
        try:
            yield
        finally:
            del self.busy[directory]
            done.set()

    async def until_idle(self, directory: str, seconds: float) -> None:
        """Wait until nobody is at a directory; so long at most."""
        if (done := self.busy.get(directory)) is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(done.wait(), seconds)

    def check_idle(self, directory: str) -> None:
        """Raise Conflict if somebody is at a directory."""
        if directory in self.busy:
            raise Conflict(f"{directory} is being mounted or unmounted already", hint="try again in a moment")

    def check_free(self, directory: str) -> None:
        """Raise Conflict if an image is mounted at a directory."""
        mount = self.standing.get(directory)
        if mount is not None:
            hint = "`dadi umount` it first, or choose another directory"
            raise Conflict(f"{mount.record.answer.reference} is mounted at {directory} already", hint=hint)

    def wanted_devices(self) -> set[str]:
        """Return the devices, by path, that mounts which do not stand may still need."""
        wanted = [*self.unfinished.values(), *(lost.record for lost in self.lost.values())]
        return {device for record in wanted for device in record.devices}

    def lost_rows(self) -> list[dict[str, Any]]:
        """Return the rows of the status of what is lost."""
        return [
            {"reference": record.answer.reference, "platform": record.answer.platform, "directory": directory,
             "manifest_digest": record.answer.manifest_digest, "state": "lost", "error": why, "bytes": 0,
             "bytes_present": 0, "devices": []}
            for directory, (record, why) in self.lost.items()
        ]  # fmt: skip
