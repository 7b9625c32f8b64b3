"""Startup traces of images: what nodes send is merged, kept on disk, handed out with the image; without HTTP.

    STATE/traces/HEX.trace     a file an image (HEX: its manifest's SHA-256), see `Kept` in `dadi/prefetch/trace.py`

    learn     a recording joins those of other nodes; reports say how much of what was fetched ahead was read. Where
              that is less than `traces.drop_below`, of all of two reports and more and of the last one, the trace is
              dropped: learning begins anew
    given     the merged trace, from memory: `traces.most` images and `traces.size` bytes, those learnt last stay

Nothing here says who may: `traces_http.py`. What is learnt was checked against the image's index.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter, OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import structlog

from dadi import digest as digests
from dadi.blobs.layout import write_durably
from dadi.blobs.single_flight import runs
from dadi.errors import DadiError, InvalidRequest, Malformed
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex
from dadi.prefetch import trace
from dadi.prefetch.trace import Kept, Message, Trace
from superpeer.catalog import Catalog, ImageRecord
from superpeer.config import TracesConfig

log = structlog.get_logger()
_MAX_FILE = trace.MOST_RECORDINGS * trace.MAX_SIZE
_ENOUGH_REPORTS = 2


class Traces:
    """See the head of this file."""

    def __init__(self, directory: Path, config: TracesConfig, catalog: Catalog, fallbacks: Fallbacks) -> None:
        self._catalog = catalog
        self._directory = directory
        self._config = config
        self._fallbacks = fallbacks
        self._given: OrderedDict[str, bytes] = OrderedDict()
        """By manifest, those learnt last being last; b"" for an image of which only reports are kept."""
        self._size = 0
        self._counts: Counter[str] = Counter(recordings=0, reports=0, chunks=0, used=0, dropped=0, refused=0, given=0)
        self._changing = asyncio.Lock()

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
            left.unlink(missing_ok=True)
        found = []
        for path in sorted(self._directory.glob("*.trace"), key=lambda path: path.stat().st_mtime_ns):
            try:
                kept = self._read(path)
                found.append((kept.manifest, _encoded(kept)))
            except (OSError, DadiError) as error:
                log.warning("dropped a startup trace", file=str(path), why=str(error))
                path.unlink(missing_ok=True)
        return found

    def _read(self, path: Path) -> Kept:
        with path.open("rb") as file:
            kept = trace.decode(file.read(_MAX_FILE), Kept)
        if self._file(kept.manifest) != path:
            raise Malformed(f"{path} is of another image")
        return kept

    # ---- what nodes want

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
        found = trace.decode(data, Trace)
        blobs = {blob.digest: blob for blob in self._catalog.image(record).device_blobs()}
        wanted: dict[Blob, set[int]] = {}
        sizes = dict(found.blobs)
        for digest, chunk in itertools.chain.from_iterable(map(found.chunks, found.groups)):
            blob = blobs.get(digest)
            if blob is not None and blob.table.chunk_size == sizes[digest] and chunk < blob.table.count:
                wanted.setdefault(blob, set()).add(chunk)
        return {blob: runs(sorted(chunks)) for blob, chunks in wanted.items()}

    # ---- what nodes tell

    async def learn(self, message: Message, index: ImageIndex) -> None:
        """Take in what a node tells of an image with this index. Raises InvalidRequest for what does not fit it."""
        recording = message.recording
        if recording is not None:
            try:
                trace.check_fits(recording, {blob.digest: blob for blob in index.device_blobs()})
            except Malformed as error:
                self._counts["refused"] += 1
                raise InvalidRequest(error.message) from None
        async with self._changing:
            kept = await asyncio.to_thread(self._kept, message.manifest)
            if message.report is not None:
                kept = self._reported(kept, message)
            if recording is not None and recording.steps:
                self._counts["recordings"] += 1
                kept = await asyncio.to_thread(trace.added, kept, recording)
            data = await asyncio.to_thread(_encoded, kept)
            await self._write(kept)
            self._remember(kept.manifest, data)
            await self._make_room()

    def _reported(self, kept: Kept, message: Message) -> Kept:
        report = message.report
        assert report is not None
        self._counts.update(reports=1, chunks=report.chunks, used=min(report.used, report.chunks))
        reports = (*kept.reports, report)[-trace.MOST_REPORTS :]
        ratio = trace.ratio(reports)
        # A trace gets better with each recording: the last report must be a bad one too.
        ratios = (ratio, trace.ratio([report]))
        if len(reports) < _ENOUGH_REPORTS or any(each is None or each >= self._config.drop_below for each in ratios):
            return msgspec.structs.replace(kept, reports=reports)
        why = f"{kept.manifest}: {ratio:.0%} of what it said was read"
        self._fallbacks.note("startup trace dropped", why)
        self._counts["dropped"] += 1
        return Kept(kept.manifest, dropped=min(kept.dropped + 1, 1 << 31))

    def _kept(self, manifest: str) -> Kept:
        path = self._file(manifest)
        try:
            return self._read(path)
        except FileNotFoundError:
            return Kept(manifest)
        except (OSError, DadiError) as error:
            self._fallbacks.note("startup trace lost", f"{path}: {error}")
            return Kept(manifest)

    async def kept(self, manifest: str) -> Kept:
        """Return all that is kept of an image."""
        return await asyncio.to_thread(self._kept, manifest)

    async def clear(self, manifest: str) -> None:
        """Forget what was learnt of an image."""
        async with self._changing:
            await self._drop(manifest)

    async def _drop(self, manifest: str) -> None:
        self._size -= len(self._given.pop(manifest, b""))
        await asyncio.to_thread(self._file(manifest).unlink, missing_ok=True)

    async def _write(self, kept: Kept) -> None:
        try:
            await asyncio.to_thread(write_durably, self._file(kept.manifest), trace.encode(kept))
        except OSError as error:
            # Handed out until the next restart: good enough.
            self._fallbacks.note("startup trace not written", f"{kept.manifest}: {error.strerror}")

    def _remember(self, manifest: str, data: bytes) -> None:
        self._size += len(data) - len(self._given.pop(manifest, b""))
        self._given[manifest] = data

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


def _encoded(kept: Kept) -> bytes:
    """Return what is handed out: the merged trace; b"" if there is none, or one too large."""
    merged = trace.merged(kept)
    data = trace.encode(merged) if merged is not None else b""
    return data if len(data) <= trace.MAX_SIZE else b""
