"""Draining: from now on as little as possible depends on this process, and in the end nothing does.

    at once       no image is mounted that would be lazy (containerd is given ordinary layers); no new children
    meanwhile     backfill goes on without waiting for quiet, also where it is switched off; its rate and the programs
                  that wait still go first
    at the end    every device is a local file: the trees are left, children are refused

Plain pulls through the embedded proxy go on: who makes them goes to the registry by itself when we are gone.
It is a state of the node, in memory: whoever began it may go away, it lasts until `end`, or until the process ends.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Protocol

import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.errors import Conflict, Unavailable
from dadi.index.image import ImageIndex
from dadi.node.backfill import Backfill
from dadi.node.devices import Devices, DeviceState
from dadi.wire import Event

log = structlog.get_logger()
_LOOK_EVERY, _TELL_EVERY = 0.1, 1.0
"""Seconds between two looks at what is left, and between two events."""


class Serving(Protocol):
    """What other nodes get from this one (`Peering`)."""

    refusing: bool

    async def stop_serving(self) -> None:
        """Leave the trees, serve nobody."""
        ...

    async def resume(self) -> None:
        """The opposite."""
        ...


class Drain:
    """See the head of this file. `files`: how many files the kernel still reads through us; `settled`: no mount is
    being made or ended."""

    def __init__(self, store: DiskBlobs, devices: Devices, backfill: Backfill, serving: Serving | None,
                 *, files: Callable[[], int], settled: Callable[[], bool],
                 lost: Callable[[], list[str]] = list) -> None:  # fmt: skip
        """`lost` says which mounts could not be restored."""
        self._store = store
        self._devices = devices
        self._backfill = backfill
        self._serving = serving
        self._files = files
        self._settled = settled
        self._lost = lost
        self._task: asyncio.Task[None] | None = None
        self._changing = asyncio.Lock()
        self._leaving = False
        self._left_trees = False

    def __repr__(self) -> str:
        return f"Drain({self.state})"

    @property
    def state(self) -> str:
        """"no", "draining", or "drained": nothing depends on this process."""
        if self._task is None:
            return "no"
        return "drained" if self._left_trees and not self._depends() else "draining"

    def admit(self, index: ImageIndex) -> None:
        """Raise Unavailable if an image must not be mounted now: it would be lazy while the node is being drained."""
        if self._task is None or all(self._store.has(blob.digest) for blob in index.device_blobs()):
            return
        raise Unavailable("this node is being drained: it mounts nothing that is not all here",
                          hint="`dadi drain --undo` ends that; so does a restart of dadi-node")  # fmt: skip

    async def begin(self) -> None:
        """Drain from now on. Idempotent."""
        async with self._changing:
            if self._task is not None:
                return
            log.info("draining", devices=len(self._devices.lazy()))
            if self._serving:
                self._serving.refusing = True
            await self._backfill.hurry(True)
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while True:
            if not self._depends():
                break
            await asyncio.sleep(_LOOK_EVERY)
        self._leaving = True  # not to be cut short: `resume` begins where this ends
        if self._serving:
            try:
                await self._serving.stop_serving()
            except Exception as error:  # whatever it is: no container depends on it, and `watch` must end
                await asyncio.to_thread(log.error, "could not leave the other nodes in order", exc_info=error)
        self._left_trees = True
        log.info("drained: nothing depends on this process")

    async def end(self) -> None:
        """Be an ordinary node again. Idempotent. Raises, and it has ended, if other nodes cannot be served again."""
        async with self._changing:
            if self._task is None:
                return
            await self._stop()
            await self._backfill.hurry(False)
            left_trees = self._left_trees
            self._task, self._leaving, self._left_trees = None, False, False
            log.info("not draining any more")
            if self._serving:
                self._serving.refusing = False
                if left_trees:
                    await self._serving.resume()

    async def _stop(self) -> None:
        if self._task is not None:
            if not self._leaving:
                self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def close(self) -> None:
        """Stop; what is drained stays so."""
        async with self._changing:
            await self._stop()

    async def watch(self, timeout: float) -> AsyncGenerator[Event, None]:
        """Drain, and tell how it goes until it is done: "progress" …, "drained".

        `timeout` in seconds (0: none) ends the telling, not the draining: Unavailable. Raises Conflict if it cannot be
        done: a device is broken, a mount lost.
        """
        await self.begin()
        deadline, told = time.monotonic() + timeout, 0.0
        while self.state != "drained":
            now = time.monotonic()
            if self.state == "no":
                raise Conflict("draining was ended by somebody else")
            self._raise_if_hopeless()
            if timeout and now > deadline:
                raise Unavailable(f"not drained after {timeout:.0f} s: {self._why()}",
                                  hint="it goes on; `dadi status` shows it, `dadi drain` watches again")  # fmt: skip
            if now - told >= _TELL_EVERY:
                told = now
                yield {"event": "progress", "stage": self._stage(), **self._counts()}
            await asyncio.sleep(_LOOK_EVERY)
        yield {"event": "drained", **self.statistics()}

    def _depends(self) -> bool:
        return self._files() > 0 or bool(self._devices.lazy()) or not self._settled()

    def _raise_if_hopeless(self) -> None:
        broken = [device for device in self._devices.all() if device.state is DeviceState.BROKEN]
        what = "; ".join([f"{device.path} ({device.blob.digest}): {device.error}" for device in broken]
                         + (self._lost() if self._files() else []))  # fmt: skip
        if what and not self._devices.lazy():
            raise Conflict(f"cannot be drained: {what}", hint="unmount what has it, see `dadi status --devices`")

    def _stage(self) -> str:
        if not self._devices.lazy():
            return "waiting for mounts that are being made, ended or restored"
        state = str(self._backfill.state)
        return state if state.startswith("paused") else "fetching what is missing"

    def _why(self) -> str:
        wrong = [f"{device.path}: {device.error}" for device in self._devices.lazy() if device.error]
        return "; ".join([f"lazy devices: {len(self._devices.lazy())}, files read through dadi-node: {self._files()}",
                          f"backfill: {self._backfill.state}", *wrong])  # fmt: skip

    def _counts(self) -> dict[str, int]:
        blobs = [device.blob for device in self._devices.all()]
        return {"bytes": sum(map(self._store.present_bytes, blobs)), "total": sum(blob.size for blob in blobs),
                "lazy_devices": len(self._devices.lazy())}  # fmt: skip

    def statistics(self) -> dict[str, Any]:
        """Return state, bytes present of all that is mounted, lazy devices."""
        return {"state": self.state, **self._counts()}
