"""The store on disk keeps the contract, and keeps its word over restarts, crashes and damage."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import shutil
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.layout import BlobDirectory
from dadi.errors import Conflict, DigestMismatch, NotFound, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from tests.contracts.store import LIMIT, C, StoreContract, content, parts_of, take_in
from tests.fakes.sources import ScriptedSource


class TestDiskStore(StoreContract):
    @pytest.fixture
    async def store(self, tmp_path: Path) -> AsyncIterator[DiskBlobs]:
        # A clock that always moves, so that "least recently" never depends on the machine's speed.
        ticks = iter(range(10**9))
        store = DiskBlobs(tmp_path, limit=LIMIT, clock=lambda: float(next(ticks)))
        yield store
        await store.close()


@pytest.fixture
def data() -> bytes:
    return content(8 * C + 77)


@pytest.fixture
def blob(data: bytes) -> Blob:
    return blob_of(data, C)


def crash(store: DiskBlobs) -> None:
    """End a store as a killed process does: its lock goes, nothing is synced, nothing is tidied."""
    store._lock.release()
    store._space._threads.shutdown()
    store._space._removals.shutdown()


async def test_complete_and_partial_blobs_are_there_after_a_clean_stop(tmp_path: Path, data: bytes, blob: Blob) -> None:
    store = DiskBlobs(tmp_path)
    await store.keep(blob, 2, [data[2 * C : 3 * C]])
    whole = await take_in(store, content(C, seed=1))
    await store.close()
    again = DiskBlobs(tmp_path)
    assert again.statistics()["unverified_chunks"] == 0
    assert again.has(whole.digest)
    assert await again.missing(blob) == [0, 1, 3, 4, 5, 6, 7, 8]
    assert await again.read(blob, range(2, 3)) == [data[2 * C : 3 * C]]
    assert again.statistics()["bytes"] == 2 * C
    await again.close()


async def test_after_a_crash_a_present_chunk_is_verified_before_it_is_believed(
    tmp_path: Path, data: bytes, blob: Blob
) -> None:
    store = DiskBlobs(tmp_path)
    await store.keep(blob, 0, parts_of(blob, data)[:4])
    crash(store)
    with open(BlobDirectory.of(tmp_path, blob.digest).data, "r+b") as file:
        file.seek(C + 5)
        file.write(b"torn")
    again = DiskBlobs(tmp_path)
    assert again.statistics()["unverified_chunks"] == 4
    assert again._space.blobs[blob.digest].present.count(1) == 0, "the kernel's readers must not see claims"
    assert await again.missing(blob, range(4)) == [1]
    assert await again.read(blob, range(2, 4)) == parts_of(blob, data)[2:4]
    assert again.statistics()["bytes"] == 3 * C
    await again.close()


async def test_what_was_found_torn_stays_missing_after_a_clean_stop(tmp_path: Path, data: bytes, blob: Blob) -> None:
    store = DiskBlobs(tmp_path)
    await store.keep(blob, 0, parts_of(blob, data)[:2])
    crash(store)
    with open(BlobDirectory.of(tmp_path, blob.digest).data, "r+b") as file:
        file.write(b"torn")
    for _ in range(2):
        again = DiskBlobs(tmp_path)
        assert await again.missing(blob, range(2)) == [0]
        await again.close()


async def test_a_bad_claim_on_a_disk_that_became_read_only_is_fetched_again_and_stays_a_claim(
    tmp_path: Path, data: bytes, blob: Blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed = DiskBlobs(tmp_path)
    await killed.keep(blob, 0, [data[:C]])
    with killed.data_path(blob).open("r+b") as file:
        file.write(b"torn")
    crash(killed)
    store = DiskBlobs(tmp_path)
    chain = Chain(store, ScriptedSource((blob, data)), patience=1, fallbacks=Fallbacks())
    real = os.open

    def read_only(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)
        return real(path, flags, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", read_only)
        assert await chain.read(blob, range(1)) == [data[:C]]
    await chain.close()
    await store.close()
    again = DiskBlobs(tmp_path)
    assert await again.missing(blob, range(1)) == [0], "a clean stop makes no fact of what could not be withdrawn"
    await again.close()


async def test_a_stop_on_a_read_only_disk_is_a_stop(
    tmp_path: Path, data: bytes, blob: Blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskBlobs(tmp_path)
    await store.keep(blob, 0, [data[:C]])

    def read_only(path: Path, missing_ok: bool = False) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", read_only)
        await store.close()
    again = DiskBlobs(tmp_path)
    assert again.statistics()["unverified_chunks"] == 1
    await again.close()


async def test_claims_that_nobody_looked_at_stay_claims_over_a_clean_stop(
    tmp_path: Path, data: bytes, blob: Blob
) -> None:
    store = DiskBlobs(tmp_path)
    await store.keep(blob, 0, parts_of(blob, data)[:2])
    crash(store)
    middle = DiskBlobs(tmp_path)
    await middle.close()
    with open(BlobDirectory.of(tmp_path, blob.digest).data, "r+b") as file:
        file.write(b"torn")
    again = DiskBlobs(tmp_path)
    assert await again.missing(blob, range(2)) == [0]
    await again.close()


@pytest.mark.parametrize("seed", range(12))
async def test_no_state_that_power_loss_can_leave_makes_a_wrong_byte_readable(
    tmp_path: Path, data: bytes, blob: Blob, seed: int
) -> None:
    """Drop and tear recent writes at the file level, in every small file too, and read all that is said to be there."""
    rng = random.Random(seed)
    store = DiskBlobs(tmp_path / "a")
    for chunk, part in enumerate(parts_of(blob, data)):
        await store.keep(blob, chunk, [part])
    if seed % 3 == 0:
        await store.finish(blob)
    crash(store)
    shutil.copytree(tmp_path / "a", tmp_path / "b", symlinks=True)
    directory = BlobDirectory.of(tmp_path / "b", blob.digest)
    if not directory.complete.exists():
        for path in (directory.data, directory.present, directory.table):
            raw = bytearray(path.read_bytes())
            for _ in range(rng.randrange(3)):
                at = rng.randrange(len(raw))
                if rng.random() < 0.3 and path != directory.data:
                    del raw[at:]
                    break
                raw[at : at + 600] = rng.choice([bytes(600), rng.randbytes(600)])[: max(0, len(raw) - at)]
            path.write_bytes(raw)
    again = DiskBlobs(tmp_path / "b")
    missing = set(await again.missing(blob))
    for chunk, part in enumerate(parts_of(blob, data)):
        if chunk not in missing:
            assert await again.read(blob, range(chunk, chunk + 1)) == [part]
    await again.close()


async def test_half_made_and_foreign_things_in_the_store_are_thrown_away(tmp_path: Path, data: bytes) -> None:
    store = DiskBlobs(tmp_path)
    blob = await take_in(store, data)
    ingest = store.ingest()
    await asyncio.to_thread(ingest.write, b"half")
    crash(store)
    ingest.path.with_name("left").touch()
    (tmp_path / "blobs" / "not-a-digest").mkdir()
    (tmp_path / "blobs" / ("ab" * 32)).mkdir()
    again = DiskBlobs(tmp_path)
    assert again.statistics()["blobs"] == 1
    assert await again.get(blob.digest) == data
    assert sorted(path.name for path in (tmp_path / "blobs").iterdir()) == [blob.digest[7:]]
    assert list((tmp_path / "incoming").iterdir()) == []
    await again.close()
    os.close(ingest._fd)


async def test_two_processes_cannot_use_one_store(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path)
    with pytest.raises(Conflict, match="used by another process"):
        DiskBlobs(tmp_path)
    await store.close()
    await DiskBlobs(tmp_path).close()


async def test_a_device_file_shows_chunks_as_they_are_kept(tmp_path: Path, data: bytes, blob: Blob) -> None:
    store = DiskBlobs(tmp_path)
    await store.prepare(blob)
    with store.open_device(blob) as file:
        assert (file.size, file.chunk_shift) == (9 * C, 12)
        assert file.present == bytearray(9)
        await store.keep(blob, 8, [data[8 * C :]])
        assert file.present == bytearray(8) + b"\x01"
        assert os.pread(file.fd, 2 * C, 8 * C) == data[8 * C :].ljust(C, b"\0"), "padded with zeros to 4096"
    await store.close()


async def test_a_data_file_cut_short_by_hand_is_an_error_and_not_zeros(tmp_path: Path, data: bytes, blob: Blob) -> None:
    store = DiskBlobs(tmp_path)
    await take_in(store, data)
    os.truncate(BlobDirectory.of(tmp_path, blob.digest).data, C)
    with pytest.raises(Exception, match="shorter than its blob"):
        await store.read(blob, range(9))
    await store.close()


async def test_removing_refuses_what_is_in_use(tmp_path: Path, data: bytes) -> None:
    store = DiskBlobs(tmp_path)
    blob = await take_in(store, data)
    with store.hold(blob):
        assert not await store.remove(blob.digest)
    assert await store.remove(blob.digest)
    with pytest.raises(NotFound):
        await store.get(blob.digest)
    await store.close()


async def test_a_sync_that_fails_withdraws_every_mark(
    tmp_path: Path, data: bytes, blob: Blob, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel reports a failed write-back once: what is in its cache may never get to the disk."""
    store = DiskBlobs(tmp_path)
    await store.keep(blob, 0, parts_of(blob, data))

    def fails(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as broken:
        broken.setattr(os, "fdatasync", fails)
        with pytest.raises(Unavailable):
            await store.finish(blob)
    assert await store.missing(blob) == list(range(9))
    with pytest.raises(NotFound):
        await store.finish(blob)
    await store.keep(blob, 0, parts_of(blob, data))
    await store.finish(blob)
    assert await store.get(blob.digest) == data
    await store.close()


async def test_nothing_is_kept_by_a_table_that_has_lied(tmp_path: Path, data: bytes, blob: Blob) -> None:
    wrong = content(len(data), seed=5)
    lie = Blob(blob.digest, blob_of(wrong, C).table)
    store = DiskBlobs(tmp_path)
    await store.keep(lie, 0, parts_of(lie, wrong))
    with pytest.raises(DigestMismatch):
        await store.finish(lie)
    await store.keep(lie, 0, parts_of(lie, wrong))
    assert await store.missing(lie) == list(range(9))
    await store.keep(blob, 0, parts_of(blob, data))
    await store.finish(blob)
    assert await store.get(blob.digest) == data
    await store.close()


async def test_what_an_earlier_life_left_vouches_for_nothing(tmp_path: Path, data: bytes, blob: Blob) -> None:
    store = DiskBlobs(tmp_path)
    directory = BlobDirectory.of(store.root, blob.digest)
    directory.path.mkdir(parents=True)
    directory.complete.touch()
    await store.prepare(blob)
    await store.close()
    again = DiskBlobs(tmp_path)
    assert not again.has(blob.digest)
    assert await again.missing(blob) == list(range(9))
    await again.close()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    directory = tmp_path / "small"
    directory.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", directory], check=True)
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


@pytest.mark.root
async def test_on_a_full_disk_blobs_in_nobodys_use_make_room(small_disk: Path) -> None:
    store = DiskBlobs(small_disk)
    for seed in range(20):
        await take_in(store, content(20 * C, seed))
    assert 0 < store.statistics()["evicted"] < 20
    data = content(30 * C, seed=100)
    blob = blob_of(data, C)
    for chunk, part in enumerate(parts_of(blob, data)):
        await store.keep(blob, chunk, [part])
    await store.finish(blob)
    assert await store.get(blob.digest) == data
    await store.close()


@pytest.mark.root
async def test_many_writers_on_a_full_disk_do_not_wait_for_each_other_for_ever(small_disk: Path) -> None:
    store = DiskBlobs(small_disk)
    for seed in range(12):
        await take_in(store, content(20 * C, seed))
    async with asyncio.timeout(30):
        blobs = await asyncio.gather(*(store.put(content(10 * C, 50 + seed)) for seed in range(8)))
    assert sum(store.has(blob.digest) for blob in blobs) >= 1
    await store.close()


@pytest.mark.root
async def test_a_disk_full_of_what_is_in_use_is_an_error_and_nothing_is_marked(small_disk: Path) -> None:
    store = DiskBlobs(small_disk)
    held = await take_in(store, content(180 * C))
    with store.hold(held):
        data = content(100 * C, seed=1)
        blob = blob_of(data, C)
        with pytest.raises(StoreFull, match="no space left"):
            await store.keep(blob, 0, parts_of(blob, data))
        assert await store.missing(blob) == list(range(100))
    await store.close()
