"""The node's FUSE mount over its life: made, or taken over from the process before; left to the next one, or ended.

    serve      a mount that the process before has left is taken over, with all its files; else one is made, and its
               descriptor is given to keep (`handover.py`)
    leave      if mounts still need us and somebody keeps the descriptor: their reads wait for the next process
    end        else: the mount is gone, and so is what was kept

What the files are: `devices.py`. How the kernel's requests are answered: `fuse/`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import structlog

from dadi.node import kernel
from dadi.node.devices import Devices
from dadi.node.handover import Handover
from dadi.node.in_kernel import in_kernel
from fuse.session import Session

log = structlog.get_logger()
_LOOK_EVERY, _RESEND_AFTER, _RESEND_AT_LEAST_EVERY = 0.05, 1.0, 60.0
"""Seconds: between two looks at a process that is dying; until what it may have taken is asked for, first and then."""


class FuseMount:
    """See the head of this file. `predecessor_is_dying`: whether a killed process may still take requests."""

    def __init__(self, session: Session, handover: Handover, devices: Devices,
                 predecessor_is_dying: Callable[[], bool]) -> None:  # fmt: skip
        self._session = session
        self._handover = handover
        self._devices = devices
        self._predecessor_is_dying = predecessor_is_dying
        self._resending: asyncio.Task[None] | None = None
        self.taken_over = 0
        """FUSE files of an earlier process that went on with this one."""

    def __repr__(self) -> str:
        return f"FuseMount({self._session.directory}, {self.taken_over} taken over)"

    async def serve(self) -> None:
        """Answer the kernel's reads from now on. Raises what the kernel refuses, and what `Devices.reopen` raises."""
        left = await self._handover.take(self._session.directory)
        if left is None:
            await in_kernel(self._mount)
            await self._handover.keep(self._session)
            return
        try:
            self.taken_over = await self._devices.reopen()
        except BaseException:
            os.close(left.fd)
            raise
        self._session.take_over(left.fd, left.state)
        await self._devices.hold_left()
        await self._handover.keep(self._session)
        dying = self._predecessor_is_dying()
        log.info("taken over: the FUSE mount of the process before", devices=self.taken_over, still_dying=dying)
        if dying:
            self._resending = asyncio.create_task(self._resend_again())

    def _mount(self) -> None:
        directory = self._session.directory
        # Of a process that was killed: looking at it would fail. By force: whoever still has its descriptor (a process
        # that is dying, an orphaned keeper) answers nothing, and its readers would wait for ever.
        kernel.umount_all(directory, force=True)
        Path(directory).mkdir(parents=True, exist_ok=True)
        self._session.mount()

    async def _resend_again(self) -> None:
        """A thread of the process before may have been taking a request when we asked for those that it had.

        Not only once it is gone: it may be that request which another thread of it waits for. Ever less often, since
        each time all reads that wait are begun once more.
        """
        every, waited = _RESEND_AFTER, 0.0
        while self._predecessor_is_dying():
            await asyncio.sleep(_LOOK_EVERY)
            waited += _LOOK_EVERY
            if waited >= every:
                await in_kernel(self._session.resend)
                every, waited = min(every * 2, _RESEND_AT_LEAST_EVERY), 0.0
        await in_kernel(self._session.resend)

    async def stop_resending(self) -> None:
        """Ask for nothing any more that the process before may have taken."""
        if self._resending is not None:
            self._resending.cancel()
            await asyncio.gather(self._resending, return_exceptions=True)

    async def leave(self) -> bool:
        """Stop to serve FUSE and leave all mounts standing, if a successor can go on; say whether it can."""
        if self._session.fd < 0 or not self._session.statistics()["files"]:
            return False
        if not await self._handover.keep(self._session):
            return False
        waiting = self._session.statistics()["pending"]
        await in_kernel(self._session.leave)
        log.info("left to the next process: the FUSE mount", devices=len(self._devices.lazy()), reads_waiting=waiting)
        return True

    async def end(self) -> None:
        """Unmount FUSE; nobody is to go on with it."""
        served = self._session.fd >= 0  # else what may be held is still an earlier process's
        await in_kernel(self._session.close)
        if served and self._session.fd < 0:
            await self._handover.drop()

    async def close(self) -> None:
        """Let go of the keeper, once `leave` or `end` has been."""
        await self._handover.close()
