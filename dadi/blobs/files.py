"""What the disk store does with files, in its worker threads: chunks read, written, hashed, withdrawn; blobs removed.

Plain blocking functions; none of them knows the store's state or the event loop. Those decide (`disk.py`,
`vouching.py`), this file moves. The order in which things become durable is in here, and in `layout.py`.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
from pathlib import Path
from typing import Protocol

import structlog

from dadi.blobs.layout import BlobDirectory, padded, sync_directory, write_durably
from dadi.errors import StoreFull, Unavailable
from dadi.index.chunks import Blob

log = structlog.get_logger()
RAISE_LIMIT = "raise store.limit, or free some space"
CHECK_DISK = "check the disk and the kernel's log; `dadi verify` throws away what is damaged"
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
_DAMAGE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EIO, errno.EUCLEAN, errno.EBADMSG)
"""What a read says where the disk, or what lies on it, is broken; the last two are file systems' own checks."""
_HASH_STEP = 4 << 20


class Hash(Protocol):
    """A hash that is fed (hashlib's)."""

    def update(self, data: bytes, /) -> None:
        """Take in."""
        ...


def full_or_broken(path: Path, error: OSError) -> StoreFull | Unavailable:
    """Return the error of the tree for an OSError met while writing `path`."""
    if error.errno in NO_SPACE:
        return StoreFull(f"no space left on the disk of {path}", hint=RAISE_LIMIT)
    return Unavailable(f"cannot write {path}: {error.strerror}", hint="check the disk and the kernel's log")


def read_chunks(path: Path, blob: Blob, chunks: range) -> list[bytes]:
    """Return the chunks' bytes as the data file has them; raise Unavailable if it cannot be read or is too short."""
    _, length = blob.table.span(chunks)
    try:
        fd = os.open(path, os.O_RDONLY)
        try:
            parts = [os.pread(fd, blob.table.extent(chunk)[1], blob.table.extent(chunk)[0]) for chunk in chunks]
        finally:
            os.close(fd)
    except OSError as error:
        raise Unavailable(f"cannot read {path}: {error.strerror}", hint=CHECK_DISK) from None
    if sum(map(len, parts)) != length:
        raise Unavailable(f"{path} is shorter than its blob", hint="was it changed by hand? `dadi verify`")
    return parts


def write_chunks(directory: BlobDirectory, blob: Blob, first: int, parts: list[bytes]) -> None:
    """Write neighbouring chunks, then say in `present` that they are there. Raises OSError."""
    fd = os.open(directory.data, os.O_WRONLY)
    try:
        offset = blob.table.extent(first)[0]
        for part in parts:
            if os.pwrite(fd, part, offset) != len(part):
                raise OSError(errno.ENOSPC, "short write")
            offset += len(part)
    finally:
        os.close(fd)
    fd = os.open(directory.present, os.O_WRONLY)
    try:
        os.pwrite(fd, b"\x01" * len(parts), first)
    finally:
        os.close(fd)


def hash_again(directory: BlobDirectory, blob: Blob, claims: list[int]) -> tuple[set[int], bool]:
    """Return which of the claimed chunks are what they should be; withdraw the claims of the others.

    Also returns whether that could be written: on a disk that is read-only by now such claims stay, and stay claims.
    """
    good = set()
    for chunk in claims:
        try:
            part = read_chunks(directory.data, blob, range(chunk, chunk + 1))[0]
        except Unavailable:
            continue
        if blob.table.matches(chunk, part):
            good.add(chunk)
    bad = [chunk for chunk in claims if chunk not in good]
    try:
        if bad:
            fd = os.open(directory.present, os.O_WRONLY)
            try:
                for chunk in bad:
                    os.pwrite(fd, b"\0", chunk)
            finally:
                os.close(fd)
    except OSError as error:
        log.warning("could not write down that chunks are bad", directory=str(directory.path), why=str(error))
        return good, False
    return good, True


def withdraw(directory: BlobDirectory, blob: Blob, chunks: list[int], marks: bytes | None) -> None:
    """Write down that chunks are not here; `marks`: those of all chunks, for a blob that was complete.

    Raises OSError, and then a blob that was complete still is for the next process: the marks are there before what
    vouches for the whole goes, since a blob with neither is thrown away.
    """
    if marks is not None:
        write_durably(directory.present, marks)
        directory.complete.unlink(missing_ok=True)
        sync_directory(directory.path)
    else:
        fd = os.open(directory.present, os.O_WRONLY)
        try:
            for chunk in chunks:
                os.pwrite(fd, b"\0", chunk)
        finally:
            os.close(fd)
    if directory.data.stat().st_size != padded(blob.size):  # it was cut off, or grew
        os.truncate(directory.data, padded(blob.size))


def withdraw_or_doom(directory: BlobDirectory, blob: Blob, marks: bytes) -> None:
    """Write the marks of a blob that is complete no more; else have the next start throw it away. Raises OSError."""
    try:
        withdraw(directory, blob, [], marks)
    except OSError:
        directory.complete.unlink(missing_ok=True)


def bad_chunks(path: Path, blob: Blob, chunks: range, whole: Hash | None) -> list[int]:
    """Return which of these chunks the disk does not have as they should be; feed what is read to `whole`.

    Leaves no trace: neither a time of access nor pages in memory. Raises Unavailable for what says nothing of the disk,
    as descriptors that are used up.
    """
    bad = []
    try:
        fd = _open_unseen(path)
    except OSError as error:
        _damage_or_raise(path, error)
        return list(chunks)
    try:
        start, total = blob.table.span(chunks)
        os.posix_fadvise(fd, start, total, os.POSIX_FADV_DONTNEED)  # the disk is asked, not the memory
        for chunk in chunks:
            offset, length = blob.table.extent(chunk)
            part = b""
            try:
                part = os.pread(fd, length, offset)
            except OSError as error:
                _damage_or_raise(path, error)
            if not blob.table.matches(chunk, part):
                bad.append(chunk)
            if whole is not None:
                whole.update(part)
        os.posix_fadvise(fd, start, total, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return bad


def _open_unseen(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_NOATIME)
    except PermissionError:  # another user's file
        return os.open(path, os.O_RDONLY)


def _damage_or_raise(path: Path, error: OSError) -> None:
    if error.errno not in _DAMAGE:
        hint = "check the disk and the kernel's log, then try again"
        raise Unavailable(f"cannot read {path}: {error.strerror}", hint=hint) from None


def hash_and_sync(directory: BlobDirectory, size: int) -> str:
    """Make the data durable and return the digest of its first `size` bytes. Raises OSError."""
    digest = hashlib.sha256()
    fd = os.open(directory.data, os.O_RDONLY)
    try:
        os.fdatasync(fd)
        buffer = memoryview(bytearray(_HASH_STEP))
        at = 0
        while at < size:
            got = os.preadv(fd, [buffer[: min(_HASH_STEP, size - at)]], at)
            if not got:
                break
            digest.update(buffer[:got])
            at += got
    finally:
        os.close(fd)
    return "sha256:" + digest.hexdigest()


def complete(directory: BlobDirectory, blob: Blob) -> bool:
    """Verify the whole and make it durable; False, all marks withdrawn, if it is another's bytes.

    Raises OSError, all marks withdrawn too: the kernel tells a failed write-back once, so the data in its cache may
    never get to the disk, and a second try would be told that all is well.
    """
    good = False
    try:
        good = hash_and_sync(directory, blob.size) == blob.digest
    finally:
        if not good:
            directory.present.write_bytes(bytes(blob.table.count))
    return good


def sync_partial(directory: BlobDirectory) -> None:
    """Make the chunks and the marks of a blob that is partly here durable. Raises OSError."""
    for path in (directory.data, directory.present):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def remove(directory: BlobDirectory) -> None:
    """Throw a blob's files away, first what vouches for them.

    A process that ends half-way leaves what the next one throws away; a file that cannot be removed is logged, and
    vouches for nothing.
    """
    try:
        directory.complete.unlink(missing_ok=True)
        shutil.rmtree(directory.path)
    except OSError as error:
        log.error("could not remove a blob's files", directory=str(directory.path), why=str(error))
