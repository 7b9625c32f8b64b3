"""How a store lies on disk; byte tables and paths, and the reading and writing of the two small files. No policy.

    STORE/lock                      flock()ed by the one process that uses the store
    STORE/running                   there while a process uses the store: if it is there at the start, the last one
                                    did not stop cleanly
    STORE/incoming/N                whole blobs on their way in; deleted at the start
    STORE/blobs/HEX/data            the bytes, sparse, padded with zeros to a multiple of 4096 (PAD)
    STORE/blobs/HEX/table           8 bytes "DADIBLB1", then MessagePack of `Blob`
    STORE/blobs/HEX/present         a byte a chunk: 1 present, 0 not; absent when complete (who has both is)
    STORE/blobs/HEX/complete        there once all of `data` was hashed and synced; 16 bytes: xxh3-128 of `table`, which
                                    says nothing wrong of bytes that are right, to whoever is given it; or empty, as
                                    older versions left it

HEX is the blob's SHA-256. `table` is made durable before the first chunk is kept, `data` before `complete`. After an
unclean stop the ones in `present` are claims: each chunk is hashed again before it is believed.
"""

from __future__ import annotations

import itertools
import os
import re
from pathlib import Path

import msgspec
import structlog
from xxhash import xxh3_128_digest

from dadi.errors import DadiError, Malformed
from dadi.index.chunks import Blob

PAD = 4096
MAGIC = b"DADIBLB1"
log = structlog.get_logger()
_writes = itertools.count()
_HEX = re.compile(r"[0-9a-f]{64}")
_decoder = msgspec.msgpack.Decoder(Blob)


def padded(size: int) -> int:
    """Return the size of the data file (and of the device) of a blob of `size` bytes."""
    return -(-size // PAD) * PAD


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def write_durably(path: Path, data: bytes) -> None:
    """Replace a small file all at once: after a crash, or an OSError, it is the old one or the new one."""
    # A name of its own: of two writers at once neither may rename what the other is still writing.
    temporary = path.with_name(f"{path.name}.{os.getpid()}-{next(_writes)}.new")
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.rename(temporary, path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)


def remove_or_log(path: Path) -> bool:
    """Remove a small file; say whether it is gone. On a disk that lets nothing go, what it says comes back at a start.

    That is no reason to fail for who is done with it: the disk will be told of by who writes.
    """
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        log.error("could not remove a file", file=str(path), why=str(error))
        return False
    return True


class BlobDirectory:
    """The paths of one blob, and its two small files."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data = path / "data"
        self.table = path / "table"
        self.present = path / "present"
        self.complete = path / "complete"

    @classmethod
    def of(cls, store: Path, digest: str) -> BlobDirectory:
        """Return the directory for a digest."""
        return cls(store / "blobs" / digest[7:])

    def create(self, blob: Blob) -> None:
        """Make the directory of a blob that has no chunk yet."""
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        # Should an earlier life's removal have failed half-way: nothing of it may vouch for the new file.
        self.complete.unlink(missing_ok=True)
        sync_directory(self.path)
        with open(self.data, "wb") as data:
            data.truncate(padded(blob.size))
        self.present.write_bytes(bytes(blob.table.count))
        self.write_table(blob)

    def write_table(self, blob: Blob) -> None:
        """Write `table` durably."""
        write_durably(self.table, MAGIC + msgspec.msgpack.encode(blob))

    def mark_complete(self) -> None:
        """Write `complete` durably; the data must be synced before, and the table be written."""
        write_durably(self.complete, xxh3_128_digest(self.table.read_bytes()))
        self.present.unlink(missing_ok=True)

    def read(self) -> tuple[Blob, bytearray | None]:
        """Return the blob and its `present` (None: complete); raise Malformed if this is not what we wrote."""
        if not _HEX.fullmatch(self.path.name):
            raise Malformed(f"{self.path} is not a blob of ours")
        try:
            raw = self.table.read_bytes()
            if raw[: len(MAGIC)] != MAGIC:
                raise Malformed(f"{self.table} has the wrong magic")
            blob = _decoder.decode(memoryview(raw)[len(MAGIC) :])
            blob.table.check()
            complete = self.complete.exists()
            if complete and self.complete.read_bytes() not in (b"", xxh3_128_digest(raw)):
                raise Malformed(f"{self.table} has been damaged")
            present = None if complete else bytearray(self.present.read_bytes())
            size = self.data.stat().st_size
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError, DadiError) as error:
            raise Malformed(f"{self.path}: {error}") from None
        if blob.digest != "sha256:" + self.path.name or size != padded(blob.size):
            raise Malformed(f"{self.path}: the table or the data is not this blob's")
        if present is not None and len(present) != blob.table.count:
            raise Malformed(f"{self.path}: `present` does not fit the chunk table")
        return blob, present
