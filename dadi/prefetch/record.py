"""What a container reads first, as its node sees it: recorded at next to no cost, for one window after each mount.

    a miss    is told at once (`missed`), on the event loop: it waits for the network anyway
    a hit     is answered by a thread that never passes here. It sets the chunk's byte in the device's `touched`, and
              nothing else; while a window is open these are looked at every `_LOOK_EVERY`, and cleared

    a window  waits for the first read (`_ARMED`: a container may be started minutes after its image was mounted), and
              ends when no chunk was read for the first time in the last `quiet` seconds, or after `longest`

What our process does not serve it does not see: reads of devices that are plain local files, and what is in the
kernel's page cache already. So only blobs are watched that nothing on this node had in use before (`Recording.blobs`);
and one that becomes local in the middle, as backfill has completed it, was watched in part (`Recording.partial`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable

import structlog

from dadi.index.chunks import Blob
from dadi.prefetch.trace import MOST_STEPS, Chunk, Recording

log = structlog.get_logger()
_LOOK_EVERY = 0.025
_LOOK_IDLE = 0.25
_ARMED = 600.0
"""Seconds: between two looks in a window, and while nothing was read yet; until that is given up."""
MOST_WINDOWS = 32

Touched = Callable[[str], bytearray | None]
"""Digest of a blob → a byte for each chunk, not 0 if a hit has touched it since it was cleared; None: not watched."""


class Window:
    """One start under observation. `chunks`: milliseconds since the first read, by chunk, in order."""

    def __init__(self, blobs: Iterable[Blob], now: float) -> None:
        self.blobs = {blob.digest: blob for blob in blobs}
        self.chunks: dict[Chunk, int] = {}
        self.closed = asyncio.Event()
        self.had_device = False
        self.partial: set[str] = set()
        """Blobs whose device is local by now."""
        self._opened = now
        self._first = self._last = now

    def __repr__(self) -> str:
        return f"Window({len(self.chunks)} chunks of {len(self.blobs)} blobs)"

    def saw(self, digest: str, chunk: int, now: float) -> None:
        """Take in a read."""
        key = digest, chunk
        if key not in self.chunks and len(self.chunks) < MOST_STEPS:
            if not self.chunks:
                self._first = now
            self._last = now
            self.chunks[key] = int(1000 * (now - self._first))

    def is_over(self, now: float, quiet: float, longest: float) -> bool:
        """Say whether nothing more is to be expected."""
        if not self.chunks:
            return now - self._opened >= _ARMED
        return now - self._last >= quiet or now - self._first >= longest

    def recording(self, node: str) -> Recording:
        """Return what was seen."""
        blobs = sorted(self.blobs)
        places = {digest: place for place, digest in enumerate(blobs)}
        sizes = tuple((digest, self.blobs[digest].table.chunk_size) for digest in blobs)
        steps = tuple((places[digest], chunk, at) for (digest, chunk), at in self.chunks.items())
        return Recording(node, sizes, steps, tuple(sorted(places[digest] for digest in self.partial)))

    @property
    def watched(self) -> set[str]:
        """The blobs that were watched to the end."""
        return set(self.blobs) - self.partial


class Recorder:
    """All windows of a node. See the head of this file; times are seconds of `clock`."""

    def __init__(self, touched: Touched, *, is_local: Callable[[str], bool] = lambda digest: False,
                 quiet: float = 2.0, longest: float = 30.0,
                 clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:  # fmt: skip
        """`is_local`: whether a blob's device is a plain local file now."""
        self._touched = touched
        self._is_local = is_local
        self._quiet = quiet
        self._longest = longest
        self._clock = clock
        self._sleep = sleep
        self._windows: list[Window] = []
        self._by_blob: dict[str, list[Window]] = {}
        self._task: asyncio.Task[None] | None = None
        self.looks = 0

    def __repr__(self) -> str:
        return f"Recorder({len(self._windows)} windows)"

    def open(self, blobs: Iterable[Blob]) -> Window | None:
        """Begin to watch blobs that are about to be read; None if too many are being watched."""
        if len(self._windows) >= MOST_WINDOWS:
            return None
        window = Window(blobs, self._clock())
        self._windows.append(window)
        for digest in window.blobs:
            if digest not in self._by_blob and (flags := self._touched(digest)) is not None:
                flags[:] = bytes(len(flags))  # of before
            self._by_blob.setdefault(digest, []).append(window)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._watch())
            self._task.add_done_callback(_look_at)
        return window

    def missed(self, blob: Blob, chunks: range) -> None:
        """A program waits for these chunks."""
        windows = self._by_blob.get(blob.digest)
        if windows:
            now = self._clock()
            for window in windows:
                for chunk in chunks:
                    window.saw(blob.digest, chunk, now)

    def look(self) -> None:
        """Take in the hits since the last look, and close what is over."""
        self.looks += 1
        now = self._clock()
        watched: set[Window] = set()
        for digest, windows in self._by_blob.items():
            flags = self._touched(digest)
            if flags is None:
                for window in windows:
                    if digest not in window.partial and self._is_local(digest):
                        window.partial.add(digest)
                continue
            watched.update(windows)
            at = flags.find(1)
            while at >= 0:
                flags[at] = 0
                for window in windows:
                    window.saw(digest, at, now)
                at = flags.find(1, at + 1)
        for window in list(self._windows):
            gone = window.had_device and window not in watched  # unmounted, or local by now: there is no more to see
            window.had_device = window.had_device or window in watched
            if gone or window.is_over(now, self._quiet, self._longest):
                self.close_window(window)

    def close_window(self, window: Window) -> None:
        """Watch no longer for it."""
        if window not in self._windows:
            return
        self._windows.remove(window)
        for digest in window.blobs:
            self._by_blob[digest].remove(window)
            if not self._by_blob[digest]:
                del self._by_blob[digest]
        window.closed.set()

    async def _watch(self) -> None:
        while self._windows:
            active = any(window.chunks for window in self._windows)
            await self._sleep(_LOOK_EVERY if active else _LOOK_IDLE)
            self.look()

    async def close(self) -> None:
        """Stop; open windows end as they are."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for window in list(self._windows):
            self.close_window(window)


def _look_at(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("recording startup traces failed", why=repr(error))
