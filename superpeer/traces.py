"""Startup traces of images: what nodes send is merged, kept on disk, handed out with the image; without HTTP.

    STATE/traces/HEX.trace     a file an image (HEX: its manifest's SHA-256), see `KeptTrace` (`prefetch/trace.py`)

    asked     the merged trace, from memory: `traces.most` images and `traces.size` bytes, those learnt last stay
    learn     a recording joins those of other nodes; reports say how much of what was fetched ahead was read. Where
              that is less than `traces.drop_below`, of all of two reports and more and of the last one, the trace is
              dropped: learning begins anew
    sampling  of a crowd's recordings only some are wanted (`traces_sampling.py`); what comes while others are being
              merged is merged together, in a thread: a crowd costs a few merges, not one for each node
    borrow    a trace that was pushed beside the image (`traces_shipped.py`): until it is known how it starts here

Nothing here says who may: `traces_http.py`. What is learnt was checked against the image's index.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from dadi import digest as digests
from dadi.blobs.layout import remove_or_log, write_durably
from dadi.blobs.single_flight import runs
from dadi.errors import DadiError, InvalidRequest, Malformed, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex
from dadi.prefetch import trace
from dadi.prefetch.trace import Given, KeptTrace, Message, Recording, Report, Trace
from superpeer.catalog import Catalog, ImageRecord
from superpeer.config import TracesConfig
from superpeer.traces_sampling import Sampling

log = structlog.get_logger()
_MAX_FILE = trace.MOST_RECORDINGS * trace.MAX_SIZE
_ENOUGH_REPORTS = 2
_MOST_STEPS_WAITING = 1 << 19
"""Chunks of all recordings that wait to be merged: some 64 MiB of memory."""
_MOST_NAMES = 32
"""Of an image's traces that were handed out lately: a report on another one is too late."""
_MOST_RUNS = 64
"""Images whose trace is kept as runs, for who asks every few seconds."""

Look = Callable[[str], Awaitable[None]]


class _Batch:
    """What is merged together. `task` ends when all of it is kept."""

    def __init__(self) -> None:
        self.recordings: list[Recording] = []
        self.reports: list[Report] = []
        self.steps = 0
        self.task: asyncio.Task[None] | None = None


class Traces:
    """See the head of this file.

    `look` has a trace that was pushed beside an image borrowed, if there is none of our own; it may take a moment.
    `never_look` is told of an image whose trace was cleared.
    """

    def __init__(self, directory: Path, config: TracesConfig, catalog: Catalog, fallbacks: Fallbacks, *,
                 look: Look, never_look: Callable[[str], None],
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self._catalog = catalog
        self._directory = directory
        self._config = config
        self._fallbacks = fallbacks
        self._given: OrderedDict[str, bytes] = OrderedDict()
        """By manifest, those learnt last being last; b"" for an image of which only reports are kept."""
        self._size = 0
        self._names: dict[str, deque[str]] = {}
        self._runs: OrderedDict[str, tuple[bytes, str, Mapping[Blob, list[range]]]] = OrderedDict()
        """By manifest: of which trace and image index, and what `startup_chunks` says of it."""
        self._waiting: dict[str, _Batch] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._steps = 0
        self._sampling = Sampling(config.recordings, clock)
        self._counts: Counter[str] = Counter(recordings=0, reports=0, chunks=0, used=0, dropped=0, refused=0, given=0,
                                             sampled_out=0, merges=0, borrowed=0)  # fmt: skip
        self._changing = asyncio.Lock()
        self._look = look
        self._never_look = never_look

    def __repr__(self) -> str:
        return f"Traces({len(self._given)} images, {self._size} bytes)"

    async def load(self) -> None:
        """Read what earlier runs kept; what is damaged is dropped, it is learnt again."""
        for manifest, data in await asyncio.to_thread(self._read_all):
            self._remember(manifest, data)
        await self._make_room()

    def _read_all(self) -> list[tuple[str, bytes]]:
        self._directory.mkdir(parents=True, exist_ok=True)
        for left in self._directory.glob("*.new"):
            remove_or_log(left)
        found = []
        for path in sorted(self._directory.glob("*.trace"), key=lambda path: path.stat().st_mtime_ns):
            try:
                kept = self._read(path)
                found.append((kept.manifest, _encoded(kept)))
            except (OSError, DadiError) as error:
                log.warning("dropped a startup trace", file=str(path), why=str(error))
                remove_or_log(path)
        return found

    def _read(self, path: Path) -> KeptTrace:
        with path.open("rb") as file:
            kept = trace.decode(file.read(_MAX_FILE), KeptTrace)
        if self._file(kept.manifest) != path:
            raise Malformed(f"{path} is of another image")
        return kept

    # ---- what nodes want

    async def asked(self, manifest: str) -> Given:
        """Return what a node gets that is about to start an image."""
        if not self.has(manifest):
            await self._look(manifest)
        return Given(self.given(manifest), self._sampling.ask(manifest))

    def has(self, manifest: str) -> bool:
        """Say whether there is a trace of an image."""
        return bool(self._given.get(manifest))

    def given(self, manifest: str) -> bytes:
        """Return the encoded trace of an image; b"" if there is none."""
        data = self._given.get(manifest, b"")
        self._counts["given"] += bool(data)
        return data

    def startup_chunks(self, record: ImageRecord) -> Mapping[Blob, list[range]] | None:
        """Return what starts of an image read, of all ways it is started, as runs; None if there is no trace."""
        data = self._given.get(record.manifest_digest)
        if not data:
            return None
        known = self._runs.get(record.manifest_digest)
        if known is not None and known[0] is data and known[1] == record.index_digest:
            return known[2]
        found = trace.decode(data, Trace)
        blobs = {blob.digest: blob for blob in self._catalog.image(record).device_blobs()}
        wanted: dict[Blob, set[int]] = {}
        sizes = dict(found.blobs)
        for digest, chunk in itertools.chain.from_iterable(map(found.chunks, found.groups)):
            blob = blobs.get(digest)
            if blob is not None and blob.table.chunk_size == sizes[digest] and chunk < blob.table.count:
                wanted.setdefault(blob, set()).add(chunk)
        made = {blob: runs(sorted(chunks)) for blob, chunks in wanted.items()}
        self._runs[record.manifest_digest] = data, record.index_digest, made
        if len(self._runs) > _MOST_RUNS:
            self._runs.popitem(last=False)
        return made

    # ---- what nodes tell

    async def learn(self, message: Message, index: ImageIndex) -> bool:
        """Take in what a node tells of an image with this index; return False if its recording is one too many now.

        Raises InvalidRequest for what does not fit the index, Unavailable if more is being merged than memory is for.
        """
        manifest, recording, report = message.manifest, message.recording, message.report
        taken = recording is None or self._sampling.take(manifest)
        if recording is not None and not taken:
            self._counts["sampled_out"] += 1
        elif recording is not None:
            self._check(recording, index)
        if report is not None:
            self._counts.update(reports=1, chunks=report.chunks, used=min(report.used, report.chunks))
            if report.trace not in self._names.get(manifest, ()):
                report = None  # on a trace that is no more: what has come in its place may be better
        steps = recording.steps if taken and recording is not None else ()
        if steps or report is not None:
            self._counts["recordings"] += bool(steps)
            await self._wait_for(manifest, [recording] if steps and recording else [], [report] if report else [])
        return taken

    async def borrow(self, found: Trace, index: ImageIndex) -> None:
        """Start with a trace that is not of our own learning. Raises InvalidRequest for what does not fit the index."""
        recordings = trace.borrowed(found)
        for recording in recordings:
            self._check(recording, index)
        self._counts["borrowed"] += 1
        await self._wait_for(found.manifest, recordings, [])

    def _check(self, recording: Recording, index: ImageIndex) -> None:
        try:
            trace.check_fits(recording, {blob.digest: blob for blob in index.device_blobs()})
        except Malformed as error:
            self._counts["refused"] += 1
            raise InvalidRequest(error.message) from None

    async def _wait_for(self, manifest: str, recordings: list[Recording], reports: list[Report]) -> None:
        """Have it merged, together with what else comes while others are; whoever waits may go away."""
        steps = sum(len(each.steps) for each in recordings)
        if self._steps + steps > _MOST_STEPS_WAITING:
            raise Unavailable("too many startup traces are being merged", retry_after=5)
        batch = self._waiting.get(manifest)
        if batch is None:
            batch = self._waiting[manifest] = _Batch()
            batch.task = asyncio.create_task(self._merge(manifest, batch))
            self._tasks.add(batch.task)
            batch.task.add_done_callback(self._looked_at)
        batch.recordings += recordings
        batch.reports = [*batch.reports, *reports][-trace.MOST_REPORTS :]
        batch.steps += steps
        self._steps += steps
        assert batch.task is not None
        await asyncio.shield(batch.task)

    def _looked_at(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            task.exception()  # whoever waited has got it, or has gone

    async def _merge(self, manifest: str, batch: _Batch) -> None:
        try:
            async with self._changing:
                del self._waiting[manifest]  # what comes from now on is the next batch
                kept = await asyncio.to_thread(self._kept, manifest)
                kept, data, why = await asyncio.to_thread(_merged, kept, batch, self._config.drop_below)
                self._counts["merges"] += 1
                if why:
                    self._fallbacks.note("startup trace dropped", f"{manifest}: {why}")
                    self._counts["dropped"] += 1
                    self._names.pop(manifest, None)
                await self._write(kept)
                self._remember(manifest, data)
                await self._make_room()
        finally:
            self._steps -= batch.steps

    def _kept(self, manifest: str) -> KeptTrace:
        path = self._file(manifest)
        try:
            return self._read(path)
        except FileNotFoundError:
            return KeptTrace(manifest)
        except (OSError, DadiError) as error:
            self._fallbacks.note("startup trace lost", f"{path}: {error}")
            return KeptTrace(manifest)

    async def kept(self, manifest: str) -> KeptTrace:
        """Return all that is kept of an image."""
        return await asyncio.to_thread(self._kept, manifest)

    async def clear(self, manifest: str) -> None:
        """Forget what was learnt of an image; and do not look elsewhere for it."""
        self._never_look(manifest)
        async with self._changing:
            await self._drop(manifest)

    async def _drop(self, manifest: str) -> None:
        self._size -= len(self._given.pop(manifest, b""))
        self._names.pop(manifest, None)
        self._runs.pop(manifest, None)
        await asyncio.to_thread(remove_or_log, self._file(manifest))

    async def _write(self, kept: KeptTrace) -> None:
        try:
            await asyncio.to_thread(write_durably, self._file(kept.manifest), trace.encode(kept))
        except OSError as error:
            # Handed out until the next restart: good enough.
            self._fallbacks.note("startup trace not written", f"{kept.manifest}: {error.strerror}")

    def _remember(self, manifest: str, data: bytes) -> None:
        self._size += len(data) - len(self._given.pop(manifest, b""))
        self._given[manifest] = data
        name, names = trace.name_of(data), self._names.setdefault(manifest, deque(maxlen=_MOST_NAMES))
        if data and name not in names:
            names.append(name)

    async def _make_room(self) -> None:
        while len(self._given) > 1 and (len(self._given) > self._config.most or self._size > self._config.size):
            with contextlib.suppress(OSError):
                await self._drop(next(iter(self._given)))

    def _file(self, manifest: str) -> Path:
        return self._directory / f"{digests.raw(manifest).hex()}.trace"

    def statistics(self) -> dict[str, Any]:
        """Return counts; `hit_ratio`: of chunks that nodes fetched ahead, which share was read (-1: nothing yet)."""
        counts = self._counts
        ratio = counts["used"] / counts["chunks"] if counts["chunks"] else -1.0
        return {"images": len(self._given), "bytes": self._size, **counts, "hit_ratio": ratio}

    async def close(self) -> None:
        """Break off what is being merged."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _merged(kept: KeptTrace, batch: _Batch, drop_below: float) -> tuple[KeptTrace, bytes, str]:
    """Return what is kept with a batch, what is handed out then, and why the trace was dropped, if so. For threads."""
    why = ""
    for report in batch.reports:
        reports = (*kept.reports, report)[-trace.MOST_REPORTS :]
        ratio = trace.ratio(reports)
        # A trace gets better with each recording: the last report must be a bad one too.
        ratios = (ratio, trace.ratio([report]))
        if len(reports) < _ENOUGH_REPORTS or any(each is None or each >= drop_below for each in ratios):
            kept = msgspec.structs.replace(kept, reports=reports)
            continue
        why = f"{ratio:.0%} of what it said was read"
        kept = KeptTrace(kept.manifest, dropped=min(kept.dropped + 1, 1 << 31))
        break  # the others are on the same trace
    for recording in batch.recordings:
        kept = trace.added(kept, recording)
    return kept, _encoded(kept), why


def _encoded(kept: KeptTrace) -> bytes:
    """Return what is handed out: the merged trace; b"" if there is none, or one too large."""
    merged = trace.merged(kept)
    data = trace.encode(merged) if merged is not None else b""
    return data if len(data) <= trace.MAX_SIZE else b""
