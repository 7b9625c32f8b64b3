"""What is found wrong is withdrawn, and told, while all around goes wrong: a full disk, no descriptors, a restart."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import resource
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from dadi.blobs import files
from dadi.blobs.disk import DiskBlobs
from dadi.blobs.layout import BlobDirectory
from dadi.blobs.serving import Compressor
from dadi.blobs.verifying import ReadingPace, verify
from dadi.errors import Conflict, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from dadi.node import verifying
from dadi.node.devices import BlobDevice, Devices, DeviceState
from dadi.node.state_files import check
from dadi.node.verifying import Verifying
from dadi.peers.packing import _packed_if_right
from tests.contracts.store import C, content, parts_of, take_in
from tests.integration.test_verify_store import BLOB, DATA, flip, found, store

__all__ = ["store"]


def no_space(*arguments: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


async def test_on_a_full_disk_nothing_is_lost_and_the_marks_are_written_when_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DiskBlobs(tmp_path / "store")
    await take_in(store, DATA)
    flip(store.data_path(BLOB), 3 * C)
    directory = BlobDirectory.of(tmp_path / "store", BLOB.digest)
    with store.hold(BLOB), monkeypatch.context() as full:
        full.setattr(files, "write_durably", no_space)
        (checked,) = await found(store)
        assert (checked.bad, "no space left" in checked.why) == ((3,), True)
        assert (store.has(BLOB.digest), await store.missing(BLOB)) == (False, [3])
        assert (directory.complete.exists(), directory.present.exists()) == (True, False)
        with pytest.raises(StoreFull):
            await store.keep(BLOB, 3, parts_of(BLOB, DATA)[3:4])
    await store.keep(BLOB, 3, parts_of(BLOB, DATA)[3:4])
    assert (directory.complete.exists(), directory.present.read_bytes()) == (False, b"\1" * 9)
    await store.finish(BLOB)
    assert directory.complete.exists()
    await store.close()


async def test_a_stop_leaves_no_blob_complete_that_had_chunks_withdrawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for full, there in ((False, [3]), (True, None)):
        store = DiskBlobs(tmp_path / "store")
        await take_in(store, DATA)
        with monkeypatch.context() as broken:
            broken.setattr(files, "write_durably", no_space)
            with store.hold(BLOB), pytest.raises(StoreFull):
                await store.withdraw(BLOB, [3])
            if full:
                await store.close()
        await store.close()
        again = DiskBlobs(tmp_path / "store")
        known = again.find(BLOB.digest)
        assert (await again.missing(known) if known else None) == there
        await again.close()


@pytest.fixture
def hashing(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Stop `finish` when it has hashed, until it may go on."""
    real, hashed, go_on = files.complete, threading.Event(), threading.Event()

    def slow(directory: BlobDirectory, blob: Blob) -> bool:
        good = real(directory, blob)
        hashed.set()
        go_on.wait(20)
        return good

    monkeypatch.setattr(files, "complete", slow)
    return SimpleNamespace(hashed=hashed, go_on=go_on)


async def test_what_is_withdrawn_while_the_whole_is_hashed_is_missing_then(store: DiskBlobs, hashing: Any) -> None:
    await store.keep(BLOB, 0, parts_of(BLOB, DATA))
    finishing = asyncio.create_task(store.finish(BLOB))
    await asyncio.to_thread(hashing.hashed.wait)
    withdrawing = asyncio.create_task(store.withdraw(BLOB, [3]))
    await asyncio.sleep(0)
    hashing.go_on.set()
    await asyncio.gather(finishing, withdrawing)
    assert (store.has(BLOB.digest), await store.missing(BLOB)) == (False, [3])
    await store.keep(BLOB, 3, parts_of(BLOB, DATA)[3:4])
    await store.finish(BLOB)
    assert store.has(BLOB.digest)


async def test_without_descriptors_nothing_is_withdrawn(store: DiskBlobs, monkeypatch: pytest.MonkeyPatch) -> None:
    await take_in(store, DATA)
    real, limits = files.bad_chunks, resource.getrlimit(resource.RLIMIT_NOFILE)

    def none_left(*arguments: Any) -> list[int]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, limits[1]))
        try:
            return real(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)

    monkeypatch.setattr(files, "bad_chunks", none_left)
    (checked,) = await found(store)
    assert (checked.bad, "Too many open files" in checked.why, store.has(BLOB.digest)) == ((), True, True)


async def test_claims_of_an_unclean_stop_that_are_wrong_are_told_at_the_pace(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path / "store")
    await store.keep(BLOB, 0, parts_of(BLOB, DATA)[:8])
    await store.close()
    await asyncio.to_thread((tmp_path / "store" / "running").touch)
    store = DiskBlobs(tmp_path / "store")
    await asyncio.to_thread(flip, store.data_path(BLOB), 3 * C)
    seen: list[int] = []
    (checked,) = [checked async for checked in verify(store, ReadingPace(0), seen.append)]
    assert (checked.bad, checked.bytes, sum(seen)) == ((3,), 8 * C, 8 * C)
    assert await store.missing(BLOB) == [3, 8]
    await store.close()


async def test_a_look_is_no_use_for_what_is_evicted_first(store: DiskBlobs) -> None:
    ticks = iter(range(100, 1000))
    store._space.clock = lambda: float(next(ticks))
    for seed in range(3):
        await take_in(store, content(3 * C, seed=seed))
    before = {digest: stored.used_at for digest, stored in store._space.blobs.items()}
    assert [checked.why for checked in await found(store)] == ["", "", ""]
    assert {digest: stored.used_at for digest, stored in store._space.blobs.items()} == before


class Loop:
    """A loop device; its next swap waits for `gate`, or fails."""

    path = "/dev/loop9"

    def __init__(self) -> None:
        self.over = ""
        self.gate = threading.Event()
        self.gate.set()
        self.error: Conflict | None = None

    def swap(self, path: str) -> bool:
        assert self.gate.wait(20)
        if self.error:
            raise self.error
        self.over = path
        return True


class Session:
    directory = "/run/fuse"

    def __init__(self) -> None:
        self.files: set[str] = set()

    def add(self, file: Any) -> None:
        self.files.add(file.name)

    def remove(self, name: str) -> None:
        self.files.discard(name)


@contextlib.asynccontextmanager
async def local_device(store: DiskBlobs, blob: Blob = BLOB) -> AsyncIterator[tuple[Devices, BlobDevice, Any]]:
    """A local device over a blob that is whole; it was made by the chunk table of `blob`."""
    await take_in(store, DATA)
    anything: Any = None
    session: Any = Session()
    devices = Devices(store, anything, session, anything, Fallbacks())
    device, loop = BlobDevice(blob), Loop()
    untyped: Any = device
    untyped.loop, device.users, device.state = loop, 1, DeviceState.LOCAL
    device.file = device.resources.enter_context(store.open_device(blob))
    devices._devices[BLOB.digest] = device
    with device.resources:
        yield devices, device, loop


async def test_a_device_that_is_demoted_and_healed_again_and_again_leaks_nothing(store: DiskBlobs) -> None:
    async with local_device(store) as (devices, device, loop):
        for round in range(4):
            await store.withdraw(BLOB, [3])
            assert await devices.demote(BLOB.digest)
            assert (device.state, loop.over) == (DeviceState.LAZY, f"/run/fuse/{BLOB.digest[7:]}")
            await store.keep(BLOB, 3, parts_of(BLOB, DATA)[3:4])
            loop.error = Conflict("not now")
            await devices.complete(device)
            assert (device.state, device.error) == (DeviceState.LAZY, "not now")
            loop.error = None
            await devices.complete(device)
            files_left = devices._session.files
            assert (device.state, device.error, files_left) == (DeviceState.LOCAL, None, set())
            if round == 0:
                held = len(os.listdir("/proc/self/fd"))
        assert (len(os.listdir("/proc/self/fd")), store._space.blobs[BLOB.digest].holds) == (held, 1)


async def test_a_device_by_another_chunk_table_is_demoted_by_the_store_s(store: DiskBlobs) -> None:
    async with local_device(store, blob_of(DATA, 2 * C)) as (devices, device, _):
        await store.withdraw(BLOB, [3])
        assert await devices.demote(BLOB.digest)
        assert (device.state, device.blob, device.lazy_file is None) == (DeviceState.LAZY, BLOB, False)
        await store.keep(BLOB, 3, parts_of(BLOB, DATA)[3:4])
        await devices.complete(device)
        assert device.state is DeviceState.LOCAL


async def test_a_demotion_is_not_cut_short_by_who_asked_for_it(store: DiskBlobs) -> None:
    async with local_device(store) as (devices, device, loop):
        await store.withdraw(BLOB, [3])
        loop.gate.clear()
        asked = asyncio.create_task(devices.demote(BLOB.digest))
        while not devices._swaps or not device.lazy_file:
            await asyncio.sleep(0)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)
        loop.gate.set()
        await devices.settle(20)
        assert device.state is DeviceState.LAZY


async def test_a_device_is_not_made_local_over_what_was_withdrawn_meanwhile(store: DiskBlobs) -> None:
    async with local_device(store) as (devices, device, loop):
        await store.withdraw(BLOB, [3])
        await devices.demote(BLOB.digest)
        await devices._swap(device)
        assert (device.state, loop.over) == (DeviceState.LAZY, f"/run/fuse/{BLOB.digest[7:]}")


async def test_a_local_device_over_a_file_with_holes_is_told_and_demoted_whatever_made_them(
    store: DiskBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "_drop_page_cache", lambda: None)
    async with local_device(store) as (devices, device, _):
        await store.withdraw(BLOB, [3])
        node: Any = SimpleNamespace(
            store=store, devices=devices, fallbacks=Fallbacks(), config=SimpleNamespace(state=str(tmp_path)),
            backfill=SimpleNamespace(wake=lambda: None),
            mounts=SimpleNamespace(statistics=lambda: [], metadata_again=lambda digest: asyncio.sleep(0, False)),
        )  # fmt: skip
        events = [event async for event in Verifying(node).run(repair=False, rate=0)]
        bad = next(event for event in events if event["event"] == "bad")
        assert (bad["blob"], bad["chunks"], device.state) == (BLOB.digest, [3], DeviceState.LAZY)
        assert (events[-1]["blobs"], events[-1]["bad_blobs"]) == (1, 1)


async def test_it_gives_signs_of_life_while_one_large_blob_is_read(
    store: DiskBlobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "_TELL_EVERY", 0.01)
    monkeypatch.setattr("dadi.blobs.verifying._RUN", C)
    await take_in(store, DATA)
    node: Any = SimpleNamespace(store=store, devices=SimpleNamespace(all=lambda: []),
                                config=SimpleNamespace(state=str(tmp_path)))  # fmt: skip
    events = [event async for event in Verifying(node).run(repair=False, rate=20 * len(DATA))]
    told = [event["bytes"] for event in events if event["event"] == "progress"]
    assert any(0 < done < len(DATA) for done in told)
    assert events[-1]["event"] == "verified"


async def test_nothing_compressed_is_made_of_wrong_bytes(store: DiskBlobs) -> None:
    text = b"all the same " * (4 * C // 13)
    blob = blob_of(text, C)
    await take_in(store, text)
    compressor = Compressor(cache=1 << 20)
    with store.open_device(blob) as file:
        await asyncio.to_thread(flip, store.data_path(blob), C + 5)
        assert await compressor.range(blob, file.fd, 10, 2 * C) is None
        await asyncio.to_thread(flip, store.data_path(blob), C + 5)
        assert await compressor.range(blob, file.fd, 10, 2 * C), "and the wrong ones were not remembered"
    with pytest.raises(Exception, match="not what its digest says"):
        _packed_if_right(blob, 1, text[:C])


def test_a_small_file_that_goes_away_meanwhile_is_not_damaged_and_an_embedded_superpeer_s_are_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in (("images/a.json", "{}"), ("images/b.json", "{}"), ("superpeer/images/x.json", "{")):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    real = Path.read_bytes

    def gone_after_the_first(path: Path) -> bytes:
        (tmp_path / "images/b.json").unlink(missing_ok=True)
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", gone_after_the_first)
    assert [damaged.path.name for damaged in check(tmp_path)] == ["x.json"]


def test_a_store_of_another_user_is_an_error_of_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dadi.cli import verify as command

    def denied(path: Path) -> bool:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "is_dir", denied)
    with pytest.raises(Unavailable, match="Permission denied"):
        next(command._offline(tmp_path, 0.0))
