"""Loop devices with the real kernel: attach, swap, let go, and the race for a free one."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dadi.errors import Conflict, InvalidRequest, Malformed, NotFound
from dadi.node import kernel, loop
from dadi.node.loop import LoopDevice

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

CONTENT = random.Random(1).randbytes(64 << 10)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    yield
    for mount in reversed(kernel.mounts()):
        if mount.target.startswith(str(tmp_path)):
            kernel.umount(mount.target, detach=True)
    left = [found for found in loop.attached() if found.backing_file.startswith(str(tmp_path))]
    for found in left:
        subprocess.run(["losetup", "-d", found.path], check=False)
    assert left == []


def bytes_of(device: LoopDevice) -> bytes:
    return Path(device.path).read_bytes()


def test_an_attached_device_is_the_file_read_only_and_not_cached_twice(file: Path) -> None:
    device = loop.attach(file)
    try:
        assert bytes_of(device) == CONTENT
        assert device.status() == (device.path, str(file), True, True, True, len(CONTENT))
        assert device.status() in loop.attached()
        assert loop.backing_file(device.path) == kernel.loop_backing(device.path) == str(file)
        assert Path("/sys/block", Path(device.path).name, "queue/logical_block_size").read_text() == "512\n"
        assert str(file) in repr(device)
        with pytest.raises(PermissionError), open(device.path, "wb", buffering=0) as writer:
            writer.write(bytes(512))
    finally:
        device.close()


def test_a_device_ends_when_it_is_closed(file: Path) -> None:
    device = loop.attach(file)
    device.close()
    device.close()
    assert loop.backing_file(device.path) != str(file)


def test_a_device_may_be_buffered(file: Path) -> None:
    device = loop.attach(file, direct_io=False)
    try:
        assert not device.status().direct_io
        assert bytes_of(device) == CONTENT
    finally:
        device.close()


def test_a_swapped_device_gives_the_bytes_of_the_other_file(file: Path, tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(CONTENT[::-1])
    device = loop.attach(file)
    try:
        assert bytes_of(device) == CONTENT
        device.swap(tmp_path / "other")
        assert bytes_of(device) == CONTENT[::-1]
        assert device.status() == (device.path, str(tmp_path / "other"), True, True, True, len(CONTENT))
    finally:
        device.close()


def test_a_swap_to_a_file_of_another_size_is_refused_and_changes_nothing(file: Path, tmp_path: Path) -> None:
    (tmp_path / "longer").write_bytes(CONTENT + bytes(512))
    device = loop.attach(file)
    try:
        with pytest.raises(InvalidRequest, match="same size"):
            device.swap(tmp_path / "longer")
        with pytest.raises(NotFound, match="nothing"):
            device.swap(tmp_path / "nothing")
        assert bytes_of(device) == CONTENT
        assert loop.backing_file(device.path) == str(file)
    finally:
        device.close()


def test_many_who_want_a_device_at_once_get_one_each(file: Path) -> None:
    with ThreadPoolExecutor(12) as pool:
        devices = list(pool.map(lambda _: loop.attach(file), range(24)))
    try:
        assert len({device.path for device in devices}) == 24
        assert all(loop.backing_file(device.path) == str(file) for device in devices)
    finally:
        for device in devices:
            device.close()


def test_a_device_that_somebody_else_took_is_left_to_them(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loop.attach(file)
    free = loop._free
    offers = iter([lambda: loop.adopt(first.path), lambda: loop.adopt(first.path), free])
    monkeypatch.setattr(loop, "_free", lambda: next(offers)())
    second = loop.attach(file)
    try:
        assert second.path != first.path
        assert bytes_of(first) == bytes_of(second) == CONTENT
    finally:
        first.close()
        second.close()


def test_when_no_device_is_ever_free_that_is_said(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = loop.attach(file)
    monkeypatch.setattr(loop, "_TRIES", 2)
    monkeypatch.setattr(loop, "_free", lambda: loop.adopt(first.path))
    try:
        with pytest.raises(Conflict, match="no loop device was free"):
            loop.attach(file)
    finally:
        first.close()


def test_a_device_node_that_is_missing_is_made(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[str, int]] = []
    monkeypatch.setattr(os.path, "exists", lambda path: False)
    monkeypatch.setattr(os, "mknod", lambda path, mode, device: made.append((path, device)))
    device = loop.attach(file)
    device.close()
    assert made == [(device.path, os.makedev(7, int(device.path.removeprefix("/dev/loop"))))]


def test_a_device_outlives_its_maker_while_it_is_mounted_and_can_be_adopted(file: Path) -> None:
    device = loop.attach(file)
    holder = os.open(device.path, os.O_RDONLY)
    try:
        device.close()
        adopted = loop.adopt(device.path)
        assert bytes_of(adopted) == CONTENT
        adopted.close()
    finally:
        os.close(holder)
    with pytest.raises(NotFound, match="not an attached loop device"):
        loop.adopt(device.path)
    assert loop.backing_file(device.path) is None


def test_what_is_no_loop_device_or_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match=r"opening .*nothing"):
        loop.attach(tmp_path / "nothing")
    with pytest.raises(InvalidRequest, match="no loop device"):
        loop.adopt("/dev/null")
    with pytest.raises(NotFound):
        loop.adopt("/dev/loop-nothing")


# ---- mounts over loop devices


@pytest.mark.programs("mkfs.erofs")
def test_a_file_system_is_mounted_and_unmounted_and_the_device_ends_with_it(tmp_path: Path) -> None:
    tree, image, target = tmp_path / "tree", tmp_path / "image", tmp_path / "a target"
    for directory in (tree, target):
        directory.mkdir()
    (tree / "file").write_bytes(CONTENT)
    subprocess.run(["mkfs.erofs", str(image), str(tree)], check=True, capture_output=True)
    device = loop.attach(image)
    kernel.mount_erofs(device.path, target, [])
    device.close()
    assert (target / "file").read_bytes() == CONTENT
    mount = next(found for found in kernel.mounts() if found.target == str(target))
    assert (mount.kind, mount.source, "ro" in mount.options) == ("erofs", device.path, True)
    assert kernel.is_mounted(target)
    with (target / "file").open("rb"):
        with pytest.raises(Conflict, match="in use"):
            kernel.umount(target)
    kernel.umount(target)
    assert not kernel.is_mounted(target)
    assert loop.backing_file(device.path) is None
    with pytest.raises(NotFound, match="nothing is mounted"):
        kernel.umount(target)


def test_what_cannot_be_mounted_says_why(file: Path, tmp_path: Path) -> None:
    device = loop.attach(file)
    try:
        with pytest.raises(Malformed, match="erofs: Invalid argument") as caught:
            kernel.mount_erofs(device.path, tmp_path, [])
        assert "dmesg" in str(caught.value)
        with pytest.raises(NotFound):
            kernel.mount_erofs(device.path, tmp_path / "nowhere", [])
        with pytest.raises(InvalidRequest, match="too many layers"):
            kernel.mount_erofs(device.path, tmp_path, ["/dev/loop1"] * 400)
    finally:
        device.close()


def test_mounts_on_top_of_each_other_are_all_unmounted(tmp_path: Path) -> None:
    for _ in range(3):
        kernel.mount("none", tmp_path, "tmpfs")
    assert kernel.is_mounted(tmp_path)
    kernel.umount_all(tmp_path)
    assert not kernel.is_mounted(tmp_path)
    kernel.umount_all(tmp_path)
