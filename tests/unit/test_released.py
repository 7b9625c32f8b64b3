"""What is freed while no node answers: only images; and the next node hears of it, once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from dadi.errors import Conflict, NotFound, Unavailable
from dadi.node import kernel, loop, released
from dadi.node.records import MountRecord, MountRecords
from dadi.node.released import Released
from dadi.peers.superpeer import ImageAnswer

RECORD = MountRecord("/mnt/app", ImageAnswer("r/app:1", "linux/amd64", "sha256:1", "sha256:2", 3))


def test_where_nothing_is_mounted_nothing_is_freed(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        released.free(tmp_path, str(tmp_path))
    assert not (tmp_path / "released").exists()


def test_what_is_no_image_stays(tmp_path: Path) -> None:
    with pytest.raises(Conflict, match="is not this node's"):
        released.free(tmp_path, "/proc")
    assert kernel.is_mounted("/proc")
    assert not (tmp_path / "released").exists()


def test_what_the_kernel_keeps_is_not_called_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (proc,) = [mount for mount in kernel.mounts() if mount.target == "/proc"][:1]
    image = proc._replace(kind="erofs", source="/dev/loop0", target="/nowhere/at/all")
    monkeypatch.setattr(kernel, "mounted_at", lambda directory: image)
    monkeypatch.setattr(kernel, "mounts", lambda: [image])
    monkeypatch.setattr(loop, "backing_file", lambda device: f"{tmp_path}/fuse/{64 * 'a'}")
    with pytest.raises(Unavailable, match="does not let go of /nowhere/at/all"):
        released.free(tmp_path, "/nowhere/at/all")
    assert list((tmp_path / "released").iterdir()) == []


def test_a_run_directory_that_is_full_keeps_no_mount_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "released").write_bytes(b"in the way")
    (proc,) = [mount for mount in kernel.mounts() if mount.target == "/proc"][:1]
    image, detached = proc._replace(kind="erofs", source="/dev/loop0", target="/nowhere/at/all"), list[str]()
    monkeypatch.setattr(kernel, "mounted_at", lambda directory: image)
    monkeypatch.setattr(released, "_detach", lambda path, mount_id: detached.append(path))
    monkeypatch.setattr(loop, "backing_file", lambda device: f"{tmp_path}/fuse/{64 * 'a'}")
    with pytest.raises(Unavailable, match="was taken away, but the next dadi-node does not know"):
        released.free(tmp_path, "/nowhere/at/all")
    assert detached == ["/nowhere/at/all"]


async def test_the_next_node_ends_what_was_freed(tmp_path: Path) -> None:
    known = Released(tmp_path)
    records = MountRecords(tmp_path / "mounts", known)
    await records.all()
    await records.write(RECORD)
    await asyncio.to_thread(known.add, RECORD.directory)
    assert [record.step for record in await records.all()] == ["unmounting"]
    await records.remove(RECORD.directory)
    assert list((tmp_path / "released").iterdir()) == []
    assert await records.all() == []


async def test_a_place_that_is_used_again_is_not_freed_any_more(tmp_path: Path) -> None:
    known = Released(tmp_path)
    records = MountRecords(tmp_path / "mounts", known)
    await records.all()
    await asyncio.to_thread(known.add, RECORD.directory)
    await records.write(RECORD)
    assert [record.step for record in await records.all()] == [""]
