"""What one process leaves in a store for the next: how a store is found when it is opened, and left when it is closed.

    STORE/running there at the start     the last process did not stop cleanly: its marks are claims
    marks read as claims, not looked at  `running` stays at the stop too: they must not become facts by it
    a file could not be synced, or says  likewise
    more than is known

Blocks: at the start in whatever thread opens the store, at the stop in a worker.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import structlog

from dadi.blobs import files
from dadi.blobs.layout import BlobDirectory, sync_directory
from dadi.blobs.stored import Stored
from dadi.errors import Malformed

log = structlog.get_logger()


def found(root: Path) -> list[tuple[Stored, float]]:
    """Return the blobs that are here, each with when it was used last; throw away what is no whole blob of ours."""
    running = root / "running"
    clean = not running.exists()
    shutil.rmtree(root / "incoming", ignore_errors=True)
    (root / "incoming").mkdir(mode=0o700)
    blobs = []
    for path in (root / "blobs").iterdir():
        directory = BlobDirectory(path)
        try:
            blob, present = directory.read()
        except Malformed as error:
            # A blob that was being made, or a damaged one: it can be had again.
            log.warning("threw away what is not a whole blob", path=str(path), why=str(error))
            shutil.rmtree(path, ignore_errors=True)
            continue
        blobs.append((Stored(directory, blob, present, trusted=clean), directory.data.stat().st_atime))
    claims = sum(len(stored.claimed) for stored, _ in blobs)
    if claims:
        log.warning("the last stop was not clean: chunks will be verified again", chunks=claims)
    running.touch(mode=0o600)
    sync_directory(root)
    return blobs


def leave(root: Path, partial: list[Stored]) -> None:
    """Make durable what is partly here, and say that this stop was clean, if it was."""
    clean = True
    for stored in partial:
        try:
            if stored.unmarked:
                files.withdraw_or_doom(stored.directory, stored.blob, bytes(stored.present))
            files.sync_partial(stored.directory)
            os.utime(stored.directory.data, (stored.used_at, stored.used_at))
        except OSError as error:
            clean = False
            log.warning("could not sync a blob", blob=stored.blob.digest, why=str(error))
        # Claims that nobody has looked at must not become facts by this stop.
        clean = clean and not stored.claimed and not stored.in_doubt
    if clean:
        try:
            (root / "running").unlink(missing_ok=True)
            sync_directory(root)
        except OSError as error:
            log.warning("could not say that this stop was clean", root=str(root), why=str(error))
