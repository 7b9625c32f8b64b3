"""The store and the link that keeps in it, on a disk that fails a write: the read goes on, nothing half-made stays."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dadi.blobs import disk, files
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.kept import Kept
from dadi.blobs.layout import BlobDirectory
from dadi.errors import StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from tests.contracts.store import C, content, parts_of
from tests.fakes.sources import ScriptedSource

DATA = content(3 * C + 5)
BLOB = blob_of(DATA, C)
PARTS = parts_of(BLOB, DATA)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DiskBlobs]:
    store = DiskBlobs(tmp_path)
    yield store
    await store.close()


def blobs(store: DiskBlobs) -> list[Path]:
    return list((store.root / "blobs").iterdir())


def failing(error: int) -> Any:
    def fails(*arguments: Any, **options: Any) -> None:
        raise OSError(error, os.strerror(error))

    return fails


@pytest.mark.parametrize(
    ("error", "kind"), [(errno.ENOSPC, "not kept: store full"), (errno.EIO, "not kept: disk failed")]
)
async def test_a_chunk_that_the_disk_does_not_take_is_read_all_the_same(
    store: DiskBlobs, monkeypatch: pytest.MonkeyPatch, error: int, kind: str
) -> None:
    source, fallbacks = ScriptedSource((BLOB, DATA)), Fallbacks()
    kept = Kept(store, source, fallbacks)
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", failing(error))
        assert await kept.read(BLOB, range(2)) == PARTS[:2]
    assert [row["kind"] for row in fallbacks.statistics()] == [kind]
    assert await store.missing(BLOB) == [0, 1, 2, 3], "nothing is marked that was not written"
    assert await kept.read(BLOB, range(2)) == PARTS[:2]
    assert await store.missing(BLOB) == [2, 3]
    assert source.chunks_asked == [0, 1, 0, 1]


async def test_a_write_that_the_disk_cuts_short_marks_nothing(
    store: DiskBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", lambda fd, data, at: real(fd, data[: len(data) // 2], at))
        with pytest.raises(StoreFull):
            await store.keep(BLOB, 0, PARTS[:1])
    assert await store.missing(BLOB) == [0, 1, 2, 3]


@pytest.mark.parametrize(("error", "told"), [(errno.ENOSPC, StoreFull), (errno.EROFS, Unavailable)])
async def test_a_blob_whose_files_cannot_be_made_leaves_none(
    store: DiskBlobs, monkeypatch: pytest.MonkeyPatch, error: int, told: type[Exception]
) -> None:
    create = BlobDirectory.create

    def half(directory: BlobDirectory, blob: Blob) -> None:
        create(directory, blob)
        raise OSError(error, os.strerror(error))

    with monkeypatch.context() as patch:
        patch.setattr(BlobDirectory, "create", half)
        with pytest.raises(told):
            await store.prepare(BLOB)
    assert blobs(store) == []
    await store.keep(BLOB, 0, PARTS)
    await store.finish(BLOB)


@pytest.mark.parametrize(("error", "told"), [(errno.ENOSPC, StoreFull), (errno.EIO, Unavailable)])
async def test_a_whole_blob_that_cannot_be_moved_in_is_no_blob_and_leaves_no_file(
    store: DiskBlobs, monkeypatch: pytest.MonkeyPatch, error: int, told: type[Exception]
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(BlobDirectory, "mark_complete", failing(error))
        with pytest.raises(told):
            await store.put(DATA)
    assert not store.has(blob_of(DATA).digest)
    assert blobs(store) == list((store.root / "incoming").iterdir()) == []
    assert await store.get((await store.put(DATA)).digest) == DATA


@pytest.mark.parametrize("step", ["fdatasync", "rename", "write_table", "mark_complete"])
async def test_a_whole_blob_that_meets_a_full_disk_on_its_last_steps_takes_the_place_of_one_in_nobodys_use(
    store: DiskBlobs, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    old = await store.put(content(C, seed=1))
    where: Any = os if hasattr(os, step) else BlobDirectory
    real = getattr(where, step)

    def full_until_the_old_one_is_gone(*arguments: Any) -> Any:
        if BlobDirectory.of(store.root, old.digest).path.exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(where, step, full_until_the_old_one_is_gone)
        blob = await store.put(DATA)
    assert not store.has(old.digest)
    assert await store.get(blob.digest) == DATA
    await store.close()
    again = DiskBlobs(store.root)
    assert again.digests() == [blob.digest]
    assert await again.get(blob.digest) == DATA
    await again.close()


@pytest.mark.parametrize(("error", "told"), [(errno.ENOSPC, StoreFull), (errno.EIO, Unavailable)])
async def test_where_it_cannot_be_written_down_that_a_blob_is_complete_its_bytes_stay_and_it_is_finished_later(
    store: DiskBlobs, monkeypatch: pytest.MonkeyPatch, error: int, told: type[Exception]
) -> None:
    await store.keep(BLOB, 0, PARTS)
    with monkeypatch.context() as patch, store.hold(BLOB):
        patch.setattr(BlobDirectory, "mark_complete", failing(error))
        with pytest.raises(told):
            await store.finish(BLOB)
        assert await store.missing(BLOB, range(BLOB.table.count)) == []
    assert not store.has(BLOB.digest)
    await store.finish(BLOB)
    assert store.has(BLOB.digest)


async def test_a_blob_that_the_disk_does_not_let_go_vouches_for_nothing(
    store: DiskBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = await store.put(DATA)
    with monkeypatch.context() as patch:
        patch.setattr(disk.files.shutil, "rmtree", failing(errno.EIO))
        assert await store.remove(blob.digest)
    assert not store.has(blob.digest)
    assert not (blobs(store)[0] / "complete").exists()
    await store.close()
    again = DiskBlobs(store.root)
    assert not again.has(blob.digest)
    await again.close()


async def test_who_is_cancelled_while_a_blob_is_finished_leaves_a_whole_blob_and_a_clean_stop(
    store: DiskBlobs, monkeypatch: pytest.MonkeyPatch
) -> None:
    await store.keep(BLOB, 0, PARTS)
    begun, go_on, complete = threading.Event(), threading.Event(), files.complete

    def held_up(directory: BlobDirectory, blob: Blob) -> bool:
        begun.set()
        assert go_on.wait(10)
        return complete(directory, blob)

    monkeypatch.setattr(files, "complete", held_up)
    finishing = asyncio.create_task(store.finish(BLOB))
    await asyncio.to_thread(begun.wait, 10)
    finishing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await finishing
    assert not await store.remove(BLOB.digest), "a thread is at work on it"
    go_on.set()
    await store.close()
    assert store.has(BLOB.digest)
    assert not (store.root / "running").exists()
    again = DiskBlobs(store.root)
    assert await again.get(BLOB.digest) == DATA
    await again.close()
