"""Starts of images on this node: their traces replayed as the mount is made, what is read recorded, told to superpeers.

    begin(index) ──► a window of the recorder is opened (`dadi/prefetch/record.py`)
                 ──► the trace is asked for ──► replayed (`replay.py`) while the image is being mounted and started
                     window over ──► the replay ends ──► report (how much of the trace was read) and recording are sent,
                                     if the superpeer wants to hear of this start, or the trace was of no use

Nobody waits for any of this, and nothing of it can fail a mount or a read. A trace that was found useless here (fewer
than `trace.drop_below` of its chunks were read) is not replayed again. Where all of an image is local there is nothing
to fetch and nothing to see.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import structlog

from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.errors import DadiError, Malformed
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex
from dadi.node.config import TraceConfig
from dadi.node.demand import Demand
from dadi.node.devices import Devices, DeviceState
from dadi.prefetch import trace
from dadi.prefetch.client import TraceKeeper
from dadi.prefetch.rate import Bucket
from dadi.prefetch.record import Recorder, Window
from dadi.prefetch.replay import Replay
from dadi.prefetch.trace import Message, Report, Trace

log = structlog.get_logger()
_ASK = 5.0
"""Seconds that a trace may take to come: later, the program is ahead of it."""
_SEND = 20.0
_MOST_ROWS = 100
_ENOUGH, _NEARLY_ALL = 0.9, 0.95
"""A trace of many starts that is as good as this needs no further recording."""


class _Asked(NamedTuple):
    """What a superpeer said of an image: its trace, what that is called in reports, whether it wants to be told."""

    name: str
    trace: Trace | None
    wanted: bool


class Startups:
    """See the head of this file."""

    def __init__(self, config: TraceConfig, store: DiskBlobs, chain: Chain, devices: Devices, demand: Demand,
                 keeper: TraceKeeper, fallbacks: Fallbacks, *, name: Callable[[], str]) -> None:  # fmt: skip
        """`name`: what this node calls itself in recordings."""
        self._config = config
        self._store = store
        self._chain = chain
        self._devices = devices
        self._demand = demand
        self.keeper = keeper
        self._fallbacks = fallbacks
        self._name = name
        self.recorder = Recorder(devices.touched, is_local=self._is_local, quiet=config.quiet, longest=config.longest)
        demand.on_miss = self.recorder.missed
        self._bucket = Bucket(config.rate, time.monotonic())
        """What all replays together may fetch."""
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._useless: OrderedDict[str, None] = OrderedDict()
        self._rows: OrderedDict[str, dict[str, Any]] = OrderedDict()
        """By manifest: how the last start went."""
        self.counts: Counter[str] = Counter(
            recordings=0, replays=0, chunks=0, used=0, fetched_chunks=0, bytes=0, useless=0
        )

    def __repr__(self) -> str:
        return f"Startups({len(self._tasks)} under way)"

    def begin(self, index: ImageIndex, made: asyncio.Event) -> None:
        """An image is being mounted, and will be started.

        `made`: set when it is mounted. What is replayed sooner could take the room on the disk that the mount needs.
        """
        manifest = index.manifest_digest
        if not self._config.enabled or manifest in self._tasks:
            return
        lacking = {blob.digest: blob for blob in index.device_blobs() if not self._store.has(blob.digest)}
        in_use = {device.blob.digest for device in self._devices.all()}
        # What is in use already is in the kernel's cache in part: not all reads of it would be seen.
        watched = [blob for digest, blob in lacking.items() if digest not in in_use]
        if not lacking:
            return
        window = self.recorder.open(watched) if watched else None
        task = self._tasks[manifest] = asyncio.create_task(self._start(manifest, lacking, window, made))
        task.add_done_callback(lambda done: self._ended(manifest, done))

    def _is_local(self, digest: str) -> bool:
        return any(each.blob.digest == digest and each.state is DeviceState.LOCAL for each in self._devices.all())

    def _ended(self, manifest: str, task: asyncio.Task[None]) -> None:
        del self._tasks[manifest]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("a startup trace failed", manifest=manifest, why=repr(error))
            self._fallbacks.note("startup trace failed", f"{manifest}: {error!r}")

    async def _start(self, manifest: str, blobs: dict[str, Blob], window: Window | None, made: asyncio.Event) -> None:
        replay = None
        try:
            asked = await self._trace(manifest)
            if self._config.replay and asked.trace is not None and asked.name not in self._useless:
                replay = Replay(asked.trace, asked.name, blobs, self._store, self._chain, self._fallbacks,
                                seen=lambda: window.chunks if window else (), bucket=self._bucket)  # fmt: skip
                await made.wait()
                await self._replayed(manifest, replay, window)
            if window is not None:
                await window.closed.wait()
        finally:
            if window is not None:
                self.recorder.close_window(window)
        if window is not None and window.chunks:
            await self._tell(manifest, window, replay, asked)

    async def _trace(self, manifest: str) -> _Asked:
        """Return what the superpeer has."""
        try:
            async with asyncio.timeout(_ASK):
                given = await self.keeper.fetch(manifest)
            if not given.data:
                return _Asked("", None, given.wanted)
            found = trace.decode(given.data, Trace)
            if found.manifest != manifest:
                raise Malformed(f"a startup trace of {found.manifest}, where that of {manifest} was asked for")
        except TimeoutError:
            self._fallbacks.note("no startup trace", f"{manifest}: it did not come in {_ASK:.0f} s")
            return _Asked("", None, True)
        except DadiError as error:
            self._fallbacks.note("no startup trace", f"{manifest}: {error}")
            return _Asked("", None, True)
        return _Asked(trace.name_of(given.data), found, given.wanted)

    async def _replayed(self, manifest: str, replay: Replay, window: Window | None) -> None:
        """Replay; until the window is over, if there is one."""
        self.counts["replays"] += 1
        with self._demand.replaying():
            work = asyncio.create_task(replay.run())
            over = asyncio.create_task(window.closed.wait()) if window else None
            try:
                await asyncio.wait([work, over] if over else [work], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (work, over):
                    if task is not None and not task.done():
                        task.cancel()
                        await asyncio.gather(task, return_exceptions=True)
        self.counts.update(fetched_chunks=replay.fetched_chunks, bytes=replay.bytes)
        log.info("startup trace replayed", manifest=manifest, chunks=len(replay.taken),
                 fetched=replay.fetched_chunks, bytes=replay.bytes)  # fmt: skip
        if not work.cancelled():
            work.result()

    async def _tell(self, manifest: str, window: Window, replay: Replay | None, asked: _Asked) -> None:
        # Of what became local meanwhile nobody knows whether it was read.
        report = replay.report(window.chunks, window.watched) if replay else None
        if report is not None and not report.chunks:
            report = None
        recording = None if self._is_known(asked.trace, report) else window.recording(self._name())
        self._remember(manifest, window, replay, report)
        if not asked.wanted:
            # Others tell of starts like this one; but that a trace is of no use must not be left to chance.
            recording = None
            if report is not None and (trace.ratio([report]) or 0.0) >= self._config.drop_below:
                report = None
        if recording is None and report is None:
            return
        try:
            async with asyncio.timeout(_SEND):
                taken = await self.keeper.send(Message(manifest, recording, report))
            self.counts["recordings"] += taken and recording is not None
        except TimeoutError:
            self._fallbacks.note("startup trace not sent", f"{manifest}: no answer in {_SEND:.0f} s")
        except DadiError as error:
            self._fallbacks.note("startup trace not sent", f"{manifest}: {error}")

    @staticmethod
    def _is_known(found: Trace | None, report: Report | None) -> bool:
        """Say whether a recording would tell nothing new."""
        if found is None or report is None or found.groups[0].recordings < trace.MOST_IN_GROUP:
            return False
        return report.used >= _ENOUGH * report.chunks and report.used >= _NEARLY_ALL * report.read

    def _remember(self, manifest: str, window: Window, replay: Replay | None, report: Report | None) -> None:
        row: dict[str, Any] = {"manifest_digest": manifest, "read_chunks": len(window.chunks), "replayed": False}
        if replay is not None and report is not None:
            ratio = trace.ratio([report]) or 0.0
            self.counts.update(chunks=report.chunks, used=report.used)
            if ratio < self._config.drop_below:
                self.counts["useless"] += 1
                self._useless[replay.name] = None
                self._fallbacks.note("startup trace useless", f"{manifest}: {ratio:.0%} of it was read")
                if len(self._useless) > _MOST_ROWS:
                    self._useless.popitem(last=False)
            row |= {"replayed": True, "trace": replay.name, "trace_chunks": report.chunks, "used_chunks": report.used,
                    "fetched_chunks": replay.fetched_chunks, "fetched_bytes": replay.bytes, "hit_ratio": ratio,
                    "covered": report.used / report.read if report.read else 1.0}  # fmt: skip
        self._rows[manifest] = row
        self._rows.move_to_end(manifest)
        if len(self._rows) > _MOST_ROWS:
            self._rows.popitem(last=False)

    def row(self, manifest: str) -> dict[str, Any] | None:
        """Return how the last start of an image went."""
        return self._rows.get(manifest)

    def statistics(self) -> dict[str, Any]:
        """Return counts (chunks, bytes), rows of the last starts; `hit_ratio`: -1 where nothing was replayed yet."""
        ratio = self.counts["used"] / self.counts["chunks"] if self.counts["chunks"] else -1.0
        return {"enabled": self._config.enabled, "under_way": len(self._tasks), **self.counts, "hit_ratio": ratio,
                "images": list(self._rows.values())}  # fmt: skip

    async def close(self) -> None:
        """Break off what is under way: nothing is told of it."""
        tasks = list(self._tasks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.recorder.close()
