"""What others do to a node's mount points and files: said, survived, and never taken for the image."""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from dadi.errors import Conflict, NotFound
from dadi.node import control, kernel
from dadi.node.records import MountRecord
from tests.fakes.registry import FakeRegistry
from tests.lab.mounting import in_thread, loops_below, mounted, node_of, read
from tests.lab.services import running, tar_of
from tests.lab.waiting import until

pytestmark = pytest.mark.root


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [tar_of(a=b"a"), tar_of(b=b"b")])
        yield fake


async def test_something_else_on_the_mount_point_is_not_taken_for_the_image(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        key = (await node.images.resolve(f"{registry.host}/team/app:1", None, [])).key
        directory = await node.images.mount(key, 2)
        await in_thread(lambda: kernel.mount("none", directory, "tmpfs"))
        with pytest.raises(Conflict, match="something else is mounted"):
            await node.images.mount(key, 2)
        with pytest.raises(Conflict, match="something else is mounted"):
            await node.images.release(key, 2)
        await in_thread(lambda: kernel.umount(directory))
        assert await node.images.mount(key, 2) == directory
        await node.images.release(key, 2)
        assert loops_below(tmp_path) == []


async def test_what_somebody_else_unmounted_is_mounted_again_and_said(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        key = (await node.images.resolve(f"{registry.host}/team/app:1", None, [])).key
        directory = await node.images.mount(key, 1)
        await in_thread(lambda: kernel.umount(directory))
        assert await node.images.mount(key, 1) == directory
        assert await read(Path(directory) / "a") == b"a"
        assert [row["kind"] for row in node.fallbacks.statistics()] == ["mount was gone, mounted again"]
        await node.images.release(key, 1)
        assert loops_below(tmp_path) == []


async def test_a_mount_without_a_record_is_replaced_and_nothing_of_it_is_left(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    """A process was killed after mount(2) and before its record was written."""
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            key = (await node.images.resolve(f"{registry.host}/team/app:1", None, [])).key
            directory = await node.images.mount(key, 2)
            for device in node.devices.all():
                for chunk in range(device.blob.table.count):
                    await node.chain.read(device.blob, range(chunk, chunk + 1))
                await node.devices.complete(device)
        assert await in_thread(lambda: kernel.is_mounted(directory)), "local: it stays"
        for record in (tmp_path / "node/state/mounts").iterdir():
            record.unlink()
        async with node_of(tmp_path, run.url) as node:
            assert await node.images.mount(key, 2) == directory
            await node.images.release(key, 2)
            assert not await in_thread(lambda: kernel.is_mounted(directory))
        assert loops_below(tmp_path) == []


async def test_an_image_index_that_the_disk_spoilt_is_fetched_again(tmp_path: Path, registry: FakeRegistry) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url) as node:
            row = await mounted(node, f"{registry.host}/team/app:1", directory)
            answer = next(iter(node.mounts.table.standing.values())).record.answer
            path = node.store.data_path(node.store.find(answer.index_digest))
        with path.open("r+b") as file:
            file.write(b"spoilt")
        async with node_of(tmp_path, run.url) as node:
            assert node.mounts.statistics()[0]["reference"] == row["reference"]
            assert node.mounts.statistics()[0]["state"] != "lost"
            assert "our own disk spoilt bytes, fetched again" in {r["kind"] for r in node.fallbacks.statistics()}
            assert await read(directory / "a") == b"a"


@pytest.mark.parametrize("content", [b"not a database" * 1000, b""], ids=["something else", "cut off to nothing"])
async def test_a_damaged_snapshot_database_costs_containerd_and_nothing_else(
    tmp_path: Path, registry: FakeRegistry, content: bytes
) -> None:
    directory, written = tmp_path / "mnt", tmp_path / "node/state/snapshotter/snapshots/1/fs"
    directory.mkdir()
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url) as node:
            await mounted(node, f"{registry.host}/team/app:1", directory)
        written.mkdir(parents=True)  # by a container that runs
        (tmp_path / "node/state/snapshotter/metadata.db").write_bytes(content)
        async with node_of(tmp_path, run.url) as node:
            assert await read(directory / "b") == b"b"
            assert node.snapshots is None
            status = node.statistics()
            assert "damaged" in status["snapshotter_error"]
            assert written.exists()
            assert "snapshotter not started" in {row["kind"] for row in status["fallbacks"]}


async def test_nobody_else_can_enter_what_containers_run_from(tmp_path: Path, registry: FakeRegistry) -> None:
    root = tmp_path / "node/state/snapshotter"
    root.mkdir(parents=True, mode=0o755)
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        key = (await node.images.resolve(f"{registry.host}/team/app:1", None, [])).key
        directory = await node.images.mount(key, 1)
        assert os.stat(root).st_mode & 0o777 == 0o700
        os.chmod(tmp_path, 0o755)
        done = await in_thread(lambda: subprocess.run(
            ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "cat", f"{directory}/a"],
            capture_output=True, check=False, timeout=20,
        ))  # fmt: skip
        assert done.returncode != 0
        assert done.stdout == b""


async def test_umount_does_not_take_a_containers_image_away_unless_forced(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    from aiohttp.test_utils import TestClient, TestServer

    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        key = (await node.images.resolve(f"{registry.host}/team/app:1", None, [])).key
        directory = await node.images.mount(key, 1)
        async with TestClient(TestServer(control.create(node))) as client:
            refused = await client.delete("/v1/mounts", params={"directory": directory})
            assert refused.status == 409
            assert "belongs to containerd" in (await refused.json())["message"]
            assert await in_thread(lambda: kernel.is_mounted(directory))
            assert (await client.delete("/v1/mounts", params={"directory": directory, "force": "1"})).status == 200
        with pytest.raises(NotFound):
            await node.mounts.unmount(directory)


async def lose(node_directory: Path) -> None:
    """Change the one record so that what stands can be neither adopted nor made anew: its index is nowhere."""
    (file,) = (node_directory / "state/mounts").glob("*.json")
    record = msgspec.json.decode(file.read_bytes(), type=MountRecord)
    answer = msgspec.structs.replace(record.answer, index_digest="sha256:" + "0" * 64)
    file.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, answer=answer)))


@pytest.mark.parametrize("force", [False, True])
async def test_a_lost_mount_that_still_stands_is_unmounted_before_it_is_forgotten(
    tmp_path: Path, registry: FakeRegistry, force: bool
) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:1", directory)
        await lose(tmp_path / "node")
        async with node_of(tmp_path, run.url) as node:
            assert [row["state"] for row in node.statistics()["mounts"]] == ["lost"]
            assert await in_thread(lambda: kernel.is_mounted(directory)), "it stands all the same"
            user = await in_thread(lambda: os.open(directory, os.O_RDONLY | os.O_DIRECTORY))
            if not force:
                with pytest.raises(Conflict, match="in use"):
                    await node.mounts.unmount(str(directory))
                assert [row["state"] for row in node.statistics()["mounts"]] == ["lost"], "and not forgotten"
                os.close(user)
            await node.mounts.unmount(str(directory), force=force)
            if force:
                os.close(user)
            assert node.statistics()["mounts"] == []
            assert not await in_thread(lambda: kernel.is_mounted(directory))
            assert list((tmp_path / "node/state/mounts").iterdir()) == []
            await until(lambda: loops_below(tmp_path) == [])


async def test_an_image_is_mounted_instead_of_a_lost_one_and_not_on_top_of_it(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    directory = tmp_path / "mnt"
    directory.mkdir()
    registry.add_image("team/other", "1", [tar_of(c=b"c")])
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:1", directory)
        await lose(tmp_path / "node")
        async with node_of(tmp_path, run.url) as node:
            await mounted(node, f"{registry.host}/team/other:1", directory)
            there = [mount.target for mount in await in_thread(kernel.mounts)]
            assert there.count(str(directory)) == 1
            assert [row["state"] for row in node.statistics()["mounts"]] == ["lazy"]
            assert await read(directory / "c") == b"c"
            devices = {row["device"] for row in node.statistics()["mounts"][0]["devices"]}
            await until(lambda: len(loops_below(tmp_path)) == len(devices))
            await node.mounts.unmount(str(directory))
        assert loops_below(tmp_path) == []
