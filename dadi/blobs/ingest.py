"""Whole blobs on their way into the disk store: a file of their own, which becomes the blob at once or not at all.

    STORE/incoming/N ── write … write ── seal: padded, synced ── move_in: renamed to `data`; `table`; `complete`

Blocking, in worker threads; knows nothing of the store's state. `DiskBlobs.commit` decides what becomes of one.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from threading import Lock

from dadi.blobs.files import NO_SPACE, RAISE_LIMIT, full_or_broken
from dadi.blobs.layout import BlobDirectory, padded, remove_or_log, sync_directory
from dadi.errors import Conflict, StoreFull
from dadi.index.chunks import Blob


class DiskIngest:
    """See `dadi.blobs.store.Ingest`. Written by one worker thread at a time."""

    def __init__(self, path: Path, make_room: Callable[[], bool], limit: int) -> None:
        self.path = path
        self.size = 0
        self._make_room = make_room
        self._limit = limit
        self._sealed = False
        self._moved = False
        self._lock = Lock()  # a caller that was cancelled may abort while a thread still seals
        try:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        except OSError as error:
            raise full_or_broken(path, error) from None

    def write(self, data: bytes | memoryview) -> None:
        """Append; on a full disk old blobs are evicted first."""
        if self._fd < 0:
            raise Conflict("this ingest has ended")
        view = memoryview(data)
        if self._limit and self.size + len(view) > self._limit:
            raise StoreFull(f"a blob of more than {self._limit} bytes does not fit the store", hint=RAISE_LIMIT)
        while view:
            try:
                written = os.write(self._fd, view)
            except OSError as error:
                if error.errno in NO_SPACE and self._make_room():
                    continue
                raise full_or_broken(self.path, error) from None
            view = view[written:]
            self.size += written

    def seal(self) -> None:
        """Pad, sync and close; in a worker thread."""
        with self._lock:
            self._seal()

    def _seal(self) -> None:
        if self._fd < 0:
            raise Conflict("this ingest has ended")
        os.ftruncate(self._fd, padded(self.size))
        os.fdatasync(self._fd)
        os.close(self._fd)
        self._fd = -1
        self._sealed = True

    def move_to(self, path: Path) -> None:
        """Seal, and give the file its name; done once, however often it is called."""
        with self._lock:
            if not self._sealed:
                self._seal()
            if not self._moved:
                os.rename(self.path, path)
                self._moved = True

    def abort(self) -> None:
        """Throw away."""
        with self._lock:
            if self._fd >= 0:
                os.close(self._fd)
                self._fd = -1
        remove_or_log(self.path)  # the next start does it


def move_in(ingest: DiskIngest, directory: BlobDirectory, blob: Blob) -> None:
    """Make an ingested file the blob, durably. Raises OSError; may be called again where that was a full disk."""
    directory.path.mkdir(mode=0o700, exist_ok=True)
    ingest.move_to(directory.data)
    directory.write_table(blob)
    directory.mark_complete()
    sync_directory(directory.path.parent)
