"""Fetch the rest of mounted images, after their start, behind everybody else; then hand each device to the kernel.

One task for the node. It begins after a quiet period, takes the lazy devices in the order they were attached, asks
for at most `_RUN` bytes at a time, stands aside while a program waits for a chunk, and keeps to its rate. A complete
blob is verified as a whole and its device swapped to the local file. What fails is tried again, at growing intervals.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

import structlog

from dadi.blobs.chain import Chain
from dadi.blobs.single_flight import runs
from dadi.blobs.source import Urgency
from dadi.blobs.store import BlobStore
from dadi.errors import DadiError
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.node.config import BackfillConfig
from dadi.node.demand import Demand
from dadi.node.devices import BlobDevice, Devices, DeviceState

log = structlog.get_logger()
_RUN = 1 << 20
_LOOK_EVERY = 0.1
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0


class Backfill:
    """See the head of this file."""

    def __init__(self, config: BackfillConfig, store: BlobStore, chain: Chain, devices: Devices, demand: Demand,
                 fallbacks: Fallbacks, clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:  # fmt: skip
        self._config = config
        self._store = store
        self._chain = chain
        self._devices = devices
        self._demand = demand
        self._fallbacks = fallbacks
        self._clock = clock
        self._sleep = sleep
        self._wake = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._woken_at = self._first_woken_at = 0.0
        self._next_at = 0.0
        self._hurried = False
        self.bytes = 0
        self.state = "idle"

    def start(self) -> None:
        """Begin to watch for lazy devices."""
        self._task = asyncio.create_task(self._run())

    async def hurry(self, hurried: bool) -> None:
        """Go on at once, without waiting for quiet, and also where it is not enabled; or as usual again."""
        self._hurried = hurried
        await self.close()  # it may be in a long pause
        self._wake.set()
        self.start()

    def wake(self) -> None:
        """There is something new to fetch."""
        self._woken_at = self._clock()
        if not self._wake.is_set():
            self._first_woken_at = self._woken_at
        self._wake.set()

    async def close(self) -> None:
        """Stop."""
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _run(self) -> None:
        if not (self._config.enabled or self._hurried):
            self.state = "disabled"
            return
        pause = _FIRST_PAUSE
        while True:
            if not self._devices.lazy():
                self.state = "idle"
                self._wake.clear()
                await self._wake.wait()
            await self._quiet()
            try:
                progress = await self._pass()
            except Exception as error:  # the node lives on without backfill, and says so
                log.exception("backfill failed")
                self._fallbacks.note("backfill failed", repr(error))
                progress = False
            if progress:
                pause = _FIRST_PAUSE
            elif self._devices.lazy():
                self.state = "paused: nothing could be fetched or kept"
                await self._sleep(pause)
                pause = _FIRST_PAUSE if self._hurried else min(pause * 2, _LONGEST_PAUSE)

    async def _quiet(self) -> None:
        if self._hurried:
            return
        self.state = "waiting for quiet"
        # A program that has just been mounted has not read anything yet: that is no quiet.
        while min(self._demand.quiet_for(), self._clock() - self._woken_at) < self._config.quiet:
            if self._clock() - self._first_woken_at > self._config.longest_wait:
                return
            await self._sleep(_LOOK_EVERY)

    async def _pass(self) -> bool:
        """Go through the lazy devices once; say whether anything got better."""
        better = False
        for device in self._devices.lazy():
            self.state = f"fetching {device.blob.digest[7:19]}"
            before = len(await self._store.missing(device.blob))
            try:
                await self._fill(device)
                if not await self._store.missing(device.blob):
                    await self._devices.complete(device)
            except DadiError as error:
                self._fallbacks.note("backfill failed", str(error))
            except Exception as error:  # a fault with one device is no reason to leave out the others
                log.exception("backfill failed", blob=device.blob.digest)
                self._fallbacks.note("backfill failed", repr(error))
            after = len(await self._store.missing(device.blob))
            better = better or after < before or device.state is not DeviceState.LAZY
        return better

    async def _fill(self, device: BlobDevice) -> None:
        blob = device.blob
        for run in pieces(blob, await self._store.missing(blob)):
            if device.users == 0:
                return
            await self._demand.idle()
            await self._keep_to_rate(blob.table.span(run)[1])
            parts = await self._chain.read(blob, run, Urgency.BACKFILL)
            self.bytes += sum(map(len, parts))
            if await self._store.missing(blob, run):
                # A full store: to fetch on would load the superpeer for nothing, again and again.
                self._fallbacks.note("backfill paused: nothing is kept", repr(blob))
                return

    async def _keep_to_rate(self, length: int) -> None:
        if not self._config.rate:
            return
        now = self._clock()
        if self._next_at > now:
            await self._sleep(self._next_at - now)
        self._next_at = max(now, self._next_at) + length / self._config.rate

    def statistics(self) -> dict[str, object]:
        """Return state (words) and bytes."""
        return {"state": self.state, "bytes": self.bytes}


def pieces(blob: Blob, missing: list[int]) -> list[range]:
    """Return missing chunks as runs of at most `_RUN` bytes (at least one chunk)."""
    most = max(1, _RUN // blob.table.chunk_size)
    return [range(at, min(at + most, run.stop)) for run in runs(missing) for at in range(run.start, run.stop, most)]
