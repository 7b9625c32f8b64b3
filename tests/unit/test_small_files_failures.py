"""Small files on a disk that breaks: what cannot be read, written or removed fails nobody who can do without it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dadi.blobs import layout
from dadi.blobs.disk import DiskBlobs
from dadi.errors import StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.node import records as mount_records
from dadi.node.records import MountRecord, MountRecords
from dadi.node.released import Released
from dadi.originals.records import Records
from dadi.peers.superpeer import ImageAnswer
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Request, canonical, job_id
from superpeer.catalog import Catalog
from superpeer.job_store import JobStore
from superpeer.shown_layers import ShownLayers

ANSWER = ImageAnswer("r/app:1", "linux/amd64", "sha256:1", "sha256:2", 3)


def refuses(error: int) -> Callable[..., Any]:
    def refused(*arguments: Any, **options: Any) -> None:
        raise OSError(error, os.strerror(error))

    return refused


@pytest.fixture
def nothing_goes(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Removing a file fails, as on a file system that the kernel has made read-only; `undo` ends that."""
    monkeypatch.setattr(Path, "unlink", refuses(errno.EROFS))
    return monkeypatch


def mounts(tmp_path: Path) -> MountRecords:
    return MountRecords(tmp_path / "state" / "mounts", Released(tmp_path / "run"))


async def test_a_mount_that_has_ended_is_not_made_again_when_its_record_could_not_be_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = mounts(tmp_path)
    assert await records.all() == []
    await records.write(MountRecord("/mnt/app", ANSWER))
    monkeypatch.setattr(Path, "unlink", refuses(errno.EROFS))
    await records.remove("/mnt/app")
    monkeypatch.undo()
    (record,) = await mounts(tmp_path).all()
    assert (record.directory, record.step) == ("/mnt/app", "unmounting")


async def test_a_damaged_mount_record_goes_one_that_cannot_be_read_stays_and_the_others_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = mounts(tmp_path)
    await records.all()
    good, unreadable, damaged = (MountRecord(f"/mnt/{name}", ANSWER) for name in ("good", "unreadable", "damaged"))
    for record in (good, unreadable, damaged):
        await records.write(record)
    directory = tmp_path / "state" / "mounts"
    records._file("/mnt/damaged").write_bytes(bytes(200))
    (directory / "half.json.1-2.new").write_bytes(b"{")
    bad, real = records._file("/mnt/unreadable"), Path.read_bytes

    def read(path: Path) -> bytes:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_bytes", read)
        assert await mounts(tmp_path).all() == [good]
    assert {path.name for path in directory.iterdir()} == {records._file(r.directory).name for r in (good, unreadable)}
    assert len(await mounts(tmp_path).all()) == 2, "a disk that reads again has all of it"


@pytest.mark.parametrize(("error", "told"), [(errno.ENOSPC, StoreFull), (errno.EIO, Unavailable)])
async def test_a_mount_record_that_cannot_be_written_is_an_error_and_the_old_one_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int, told: type[Exception]
) -> None:
    records = mounts(tmp_path)
    await records.all()
    await records.write(MountRecord("/mnt/app", ANSWER))
    with monkeypatch.context() as patch:
        patch.setattr(mount_records, "write_durably", refuses(error))
        with pytest.raises(told):
            await records.write(MountRecord("/mnt/app", ANSWER, step="unmounting"))
    assert [record.step for record in await records.all()] == [""]


async def test_what_a_registry_said_is_forgotten_and_pushed_out_though_its_files_stay(
    tmp_path: Path, nothing_goes: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path, most=2)
    await records.load()
    for name in ("a", "b", "c"):
        await records.learn(name, "sha256:1", 1)
    await records.forget("b")
    assert [records.find(name) is not None for name in ("a", "b", "c")] == [False, False, True]
    (tmp_path / "damaged.json").write_bytes(bytes(9))
    again = Records(tmp_path, most=10)
    await again.load()
    assert len(again) == 3


async def test_what_a_registry_said_is_believed_though_it_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path / "originals", most=2)
    await records.load()
    (tmp_path / "originals").rmdir()
    assert await records.learn("a", "sha256:1", 1) == records.find("a")


async def test_a_damaged_record_of_an_image_that_stays_stops_no_start(
    tmp_path: Path, nothing_goes: pytest.MonkeyPatch
) -> None:
    store = DiskBlobs(tmp_path / "store")
    shown = ShownLayers(tmp_path / "shown.json", Fallbacks())
    catalog = Catalog(tmp_path / "images", store, most=9, has_shown=lambda layer: shown.proof(layer) is not None,
                      is_pinned=lambda record: False, on_adopted=lambda layer: None)  # fmt: skip
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "damaged.json").write_bytes(b"{")
    await catalog.load()
    assert (tmp_path / "images" / "damaged.json").exists()
    await store.close()


async def test_a_prefetch_job_that_cannot_be_removed_stops_nobody(
    tmp_path: Path, nothing_goes: pytest.MonkeyPatch
) -> None:
    request = canonical(Request("nginx", "linux/amd64"))
    job = Job(id=job_id(request), request=request, created=1.0, state=State.WARMING)
    store = JobStore(tmp_path)
    await store.save(job)
    await store.remove(job)
    (tmp_path / "damaged.json").write_bytes(b"{")
    assert await store.load() == [job]


def test_a_small_file_is_the_old_one_where_the_new_one_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    layout.write_durably(file, b"old")
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", refuses(errno.EIO))
        with pytest.raises(OSError, match=os.strerror(errno.EIO)):
            layout.write_durably(file, b"new")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("file", b"old")]
