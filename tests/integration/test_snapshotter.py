"""The snapshotter over gRPC on a real socket: the contract, and what is ours: sockets, restarts, cleaning up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import grpc
import pytest

from dadi.errors import Conflict, DadiError
from dadi.fallbacks import Fallbacks
from dadi.snapshotter import service
from dadi.snapshotter.images import LazyImages
from dadi.snapshotter.snapshots import Snapshots
from tests.contracts.snapshots import Client, Code, SnapshotFilesContract, SnapshotsContract, fails, mounted
from tests.fakes.lazy_images import FakeImages, NoImages, labels_for


@contextlib.asynccontextmanager
async def serving(directory: Path, images: LazyImages | None = None, **options: object) -> AsyncIterator[Client]:
    """Serve the snapshots below a directory, and give a client of it."""
    snapshots = await Snapshots.open(directory / "root", images or NoImages(), Fallbacks(), **options)
    try:
        serving = await service.serve(directory / "run" / "sock", snapshots)
        try:
            async with grpc.aio.insecure_channel(f"unix:{serving.path}") as channel:
                yield Client(channel)
        finally:
            await serving.stop(1)
    finally:
        await snapshots.close()


@pytest.fixture
async def client(tmp_path: Path) -> AsyncIterator[Client]:
    async with serving(tmp_path) as client:
        yield client


class TestSnapshots(SnapshotsContract):
    """Ours, over gRPC."""


@pytest.mark.root
class TestFiles(SnapshotFilesContract):
    """Ours, mounted."""


def directories(root: Path) -> list[str]:
    return sorted(os.listdir(root / "root" / "snapshots"))


async def test_everything_is_there_again_after_a_restart(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await client.committed("c", labels={"l": "1"})
        mounts = await client.prepare("a", "c")
        before, usage = await client.list(), await client.usage("c")
    for _ in range(2):
        async with serving(tmp_path) as client:
            assert await client.list() == before
            assert await client.mounts("a") == mounts
            assert await client.usage("c") == usage
    async with serving(tmp_path) as client:
        await client.prepare("b", "c")
        assert await client.mounts("b") != mounts


async def test_remove_touches_no_file_and_cleanup_deletes(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await client.committed("c")
        await client.prepare("a", "c")
        assert directories(tmp_path) == ["1", "2"]
        await client.remove("a")
        assert directories(tmp_path) == ["1", "2"]
        await client.cleanup()
        assert directories(tmp_path) == ["1"]
        await client.remove("c")
        await client.cleanup()
        assert directories(tmp_path) == []


async def test_what_an_earlier_process_left_is_swept_at_the_start(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await client.prepare("kept")
        await client.prepare("removed")
        await client.remove("removed")
    (tmp_path / "root/snapshots/77/fs").mkdir(parents=True)
    (tmp_path / "root/snapshots/not ours").mkdir()
    async with serving(tmp_path) as client:
        while directories(tmp_path) != ["1", "not ours"]:
            await asyncio.sleep(0.01)
        await client.prepare("new")
        assert directories(tmp_path) == ["1", "78", "not ours"], "a number is not used twice"


async def test_a_prepare_that_fails_leaves_no_directory(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        with fails(Code.NOT_FOUND):
            await client.prepare("key", "none")
        assert directories(tmp_path) == []


async def test_a_commit_can_give_a_parent_to_one_without(client: Client) -> None:
    await client.committed("parent")
    await client.prepare("key")
    await client.commit("name", "key", parent="parent")
    assert (await client.stat("name")).parent == "parent"
    await client.prepare("other", "parent")
    await client.commit("same", "other", parent="parent")
    await client.prepare("third", "parent")
    with fails(Code.INVALID_ARGUMENT):
        await client.commit("different", "third", parent="name")
    await client.prepare("fourth")
    with fails(Code.NOT_FOUND):
        await client.commit("orphan", "fourth", parent="none")
    with fails(Code.FAILED_PRECONDITION):
        await client.commit("child", "fourth", parent="third")


async def test_an_empty_name_and_a_filter_that_is_none_are_invalid(client: Client) -> None:
    with fails(Code.INVALID_ARGUMENT):
        await client.prepare("")
    await client.prepare("key")
    with fails(Code.INVALID_ARGUMENT):
        await client.commit("", "key")
    with fails(Code.INVALID_ARGUMENT):
        await client.list("name==")


@pytest.mark.root
async def test_mounts_are_as_overlayfs_of_containerd_has_them(tmp_path: Path, client: Client) -> None:
    snapshots = f"{tmp_path}/root/snapshots"
    (bind,) = await client.prepare("c1-active")
    assert (bind.type, bind.source, list(bind.options)) == ("bind", f"{snapshots}/1/fs", ["rw", "rbind"])
    await client.commit("c1", "c1-active")
    (one,) = await client.view("v1", "c1")
    assert (one.type, one.source, list(one.options)) == ("bind", f"{snapshots}/1/fs", ["ro", "rbind"])
    (overlay,) = await client.prepare("c2-active", "c1")
    own = [f"workdir={snapshots}/3/work", f"upperdir={snapshots}/3/fs"]
    assert (overlay.type, overlay.source) == ("overlay", "overlay")
    assert list(overlay.options) == [*own, f"lowerdir={snapshots}/1/fs", "index=off"]
    await client.commit("c2", "c2-active")
    (two,) = await client.view("v2", "c2")
    assert list(two.options) == [f"lowerdir={snapshots}/3/fs:{snapshots}/1/fs", "index=off"]
    with mounted([two], tmp_path) as root:
        assert list(root.iterdir()) == []


async def test_the_socket_is_for_our_user_only_and_goes_with_us(tmp_path: Path) -> None:
    path = tmp_path / "run" / "sock"
    async with serving(tmp_path):
        status = path.stat()
        assert stat.S_ISSOCK(status.st_mode)
        assert status.st_mode & 0o777 == 0o600
    assert not path.exists()


async def test_a_socket_that_was_left_behind_is_replaced_and_a_live_one_is_not(tmp_path: Path) -> None:
    path = tmp_path / "run" / "sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    async with serving(tmp_path) as client:
        assert await client.names() == []
        snapshots = await Snapshots.open(tmp_path / "other", NoImages(), Fallbacks())
        try:
            with pytest.raises(Conflict, match="another process listens"):
                await service.serve(path, snapshots)
        finally:
            await snapshots.close()
        assert await client.names() == []


async def test_a_file_in_the_socket_s_place_is_not_deleted(tmp_path: Path) -> None:
    path = tmp_path / "run" / "sock"
    path.parent.mkdir()
    path.write_text("precious")
    with pytest.raises(Conflict, match="no socket"):
        async with serving(tmp_path):
            pass
    assert path.read_text() == "precious"


async def test_a_root_belongs_to_one_process(tmp_path: Path) -> None:
    async with serving(tmp_path):
        with pytest.raises(Conflict, match="used by another"):
            await Snapshots.open(tmp_path / "root", NoImages(), Fallbacks())


async def test_a_damaged_file_is_an_error_and_nothing_is_deleted_on_the_way_back(tmp_path: Path) -> None:
    async with serving(tmp_path) as client:
        await client.prepare("key")
    file = tmp_path / "root/snapshots/1/fs/precious"
    file.write_text("of a running container")
    (tmp_path / "root/metadata.db").write_bytes(b"not a database" * 1000)
    with pytest.raises(DadiError, match=r"damaged.*replace_damaged"):
        async with serving(tmp_path):
            pass
    (tmp_path / "root/metadata.db").unlink()
    with pytest.raises(DadiError, match=r"is gone.*replace_damaged"):
        async with serving(tmp_path):
            pass
    async with serving(tmp_path, replace_damaged=True) as client:
        assert await client.names() == []
        await client.prepare("new")
        await client.cleanup()
    (kept,) = (tmp_path / "root").glob("snapshots.damaged-*/1/fs/precious")
    assert kept.read_text() == "of a running container"


async def test_stopping_twice_and_closing_twice_is_harmless(tmp_path: Path) -> None:
    snapshots = await Snapshots.open(tmp_path / "root", NoImages(), Fallbacks())
    serving = await service.serve(tmp_path / "sock", snapshots)
    await serving.stop(0)
    await serving.stop(0)
    await snapshots.close()
    await snapshots.close()
    assert not (tmp_path / "sock").exists()


async def test_a_call_whose_client_has_gone_leaves_nothing_and_hurts_nobody(tmp_path: Path) -> None:
    images = FakeImages(tmp_path / "images")
    (chain_id,) = images.add("image", [{"file": b"content"}])
    async with serving(tmp_path, images) as client:
        with fails(Code.ALREADY_EXISTS):
            await client.prepare("k", labels=labels_for(chain_id, "image"))
        (lazy,) = await client.list()
        images.gate = asyncio.Event()
        calls = [asyncio.create_task(client.prepare(f"c{number}", lazy.name)) for number in range(3)]
        while len(await client.names("kind==active")) < 3 or not images.calls["mount"]:
            await asyncio.sleep(0.01)
        calls[0].cancel()
        while len(await client.names("kind==active")) == 3:
            await asyncio.sleep(0.01)
        images.gate.set()
        assert len(await calls[1]) == len(await calls[2]) == 1
        assert await client.names("kind==active") == ["c1", "c2"]
        assert images.calls["made"] == 1
        assert len(directories(tmp_path)) == 2


async def test_a_socket_whose_path_is_too_long_is_told(tmp_path: Path) -> None:
    snapshots = await Snapshots.open(tmp_path / "root", NoImages(), Fallbacks())
    try:
        with pytest.raises(DadiError, match="107 bytes"):
            await service.serve(tmp_path / ("x" * 120) / "sock", snapshots)
    finally:
        await snapshots.close()
