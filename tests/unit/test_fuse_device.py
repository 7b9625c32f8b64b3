"""Files, names and errno: the decisions of the FUSE device, without a kernel."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from dadi.errors import Conflict, InvalidRequest, Malformed, NotFound, StoreFull, Unavailable
from fuse import wire
from fuse.device import GONE, Device, errno_of, fetch, read_cold
from tests.fakes.backed_file import Broken, FakeFile

CHUNK = 4096
CONTENT = random.Random(7).randbytes(16 * CHUNK)


@pytest.fixture
def files(tmp_path: Path) -> Iterator[list[FakeFile]]:
    made: list[FakeFile] = []
    yield made
    for file in made:
        file.close()


@pytest.fixture
def blob(tmp_path: Path, files: list[FakeFile]) -> FakeFile:
    files.append(FakeFile(tmp_path / "blob", CONTENT, {0, 1, 2, 5}))
    return files[0]


def asked(device: Device, opcode: int, body: bytes = b"", node: int = 1) -> bytes | int:
    return device.answer(wire.Request(opcode, 9, node, memoryview(body)))


def test_a_local_file_that_got_shorter_gives_an_error_and_no_zeros(blob: FakeFile) -> None:
    device = Device(1 << 20)
    node = device.add(blob)
    os.ftruncate(blob.fd, CHUNK + 10)
    with pytest.raises(Malformed, match="ends at 4106"):
        read_cold(node, CHUNK, CHUNK)


def test_what_is_on_disk_is_read_whole_by_a_patient_reader(blob: FakeFile) -> None:
    assert read_cold(Device(1 << 20).add(blob), 100, 2 * CHUNK) == CONTENT[100 : 100 + 2 * CHUNK]


async def test_a_fetch_gives_exactly_what_was_asked_for_or_an_error(blob: FakeFile) -> None:
    node = Device(1 << 20).add(blob)
    assert await fetch(node, 7 * CHUNK, 10) == CONTENT[7 * CHUNK : 7 * CHUNK + 10]
    blob.cut = 1
    with pytest.raises(Malformed, match="9 bytes came for the 10"):
        await fetch(node, 7 * CHUNK, 10)


def test_a_file_is_readable_although_its_owner_closed_it_and_closed_when_the_last_reader_is_gone(
    blob: FakeFile,
) -> None:
    device = Device(1 << 20)
    node = device.add(blob)
    blob.close()
    assert read_cold(node, 0, CHUNK) == CONTENT[:CHUNK]
    fd = node.fd
    device.remove("blob")
    assert os.fstat(fd).st_size == len(CONTENT), "somebody still holds the node"
    del node
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_removed_file_is_found_neither_by_name_nor_by_id(blob: FakeFile) -> None:
    device = Device(1 << 20)
    node = device.add(blob)
    assert device.remove("blob") is node
    assert device.remove("blob") is None
    assert device.find(node.id) is None
    assert asked(device, wire.LOOKUP, b"blob\0") == errno.ENOENT
    assert asked(device, wire.GETATTR, node=node.id) == asked(device, wire.OPEN, bytes(8), node.id) == GONE


def test_an_id_means_the_same_name_for_ever_in_every_process(blob: FakeFile) -> None:
    ids = set()
    for _ in range(3):
        device = Device(1 << 20)
        for _ in range(2):
            ids.add(device.add(blob).id)
            device.remove("blob")
    assert len(ids) == 1


def test_two_names_with_one_id_are_refused(
    tmp_path: Path, files: list[FakeFile], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fuse.device.id_of", lambda name: 1 << 61)
    files += [FakeFile(tmp_path / "blob", CONTENT), FakeFile(tmp_path / "other", CONTENT)]
    device = Device(1 << 20)
    node = device.add(files[0])
    with pytest.raises(Conflict, match="whose node id is that of other"):
        device.add(files[1])
    assert device.find(1 << 61) is node


def test_a_file_that_was_failed_comes_back_under_its_id(tmp_path: Path, blob: FakeFile) -> None:
    device = Device(1 << 20)
    node = device.add(blob)
    with pytest.raises(Conflict, match="blob already"):
        device.add(blob)
    assert device.fail("blob") is node
    assert node.failed
    assert device.find(node.id) is node
    again = device.add(blob)
    assert (again.id, again.failed) == (node.id, False)
    assert device.fail("nothing") is None


def test_a_failed_file_does_not_come_back_with_another_size(tmp_path: Path, files: list[FakeFile]) -> None:
    device = Device(1 << 20)
    files += [FakeFile(tmp_path / "blob", CONTENT), FakeFile(tmp_path / "other", CONTENT[:CHUNK])]
    device.add(files[0])
    device.fail("blob")
    files[1].name = "blob"
    with pytest.raises(Conflict):
        device.add(files[1])


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "a\0b", "x" * 256])
def test_a_name_that_is_none_is_refused(blob: FakeFile, name: str) -> None:
    blob.name = name
    with pytest.raises(InvalidRequest, match="not a name"):
        Device(1 << 20).add(blob)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"size": 100}, "cannot be a block device"),
        ({"size": 0}, "cannot be a block device"),
        ({"chunk_shift": 9, "present": bytearray(128)}, "cannot be a block device"),
        ({"present": bytearray(15)}, "15 presence marks for 16 chunks"),
        ({"size": 15 * CHUNK, "present": bytearray(15)}, "the local file has 65536 bytes"),
    ],
)
def test_a_file_that_could_show_bytes_it_has_not_is_refused(
    blob: FakeFile, change: dict[str, int | bytearray], why: str
) -> None:
    for name, value in change.items():
        setattr(blob, name, value)
    with pytest.raises(InvalidRequest, match=why):
        Device(1 << 20).add(blob)


def test_everything_that_would_change_something_is_refused(blob: FakeFile) -> None:
    device = Device(1 << 20)
    node = device.add(blob)
    for opcode in (wire.WRITE, wire.CREATE, wire.UNLINK, wire.RENAME, wire.SETATTR, wire.MKDIR, wire.SETXATTR):
        assert asked(device, opcode, bytes(64)) == errno.EROFS
    assert asked(device, wire.OPEN, os.O_RDWR.to_bytes(8, "little"), node.id) == errno.EROFS
    assert isinstance(asked(device, wire.OPEN, os.O_RDONLY.to_bytes(8, "little"), node.id), bytes)


@pytest.mark.parametrize("opcode", [0, 22, 39, 51, 52, 4096, 2**32 - 1])
def test_a_request_that_we_do_not_know_is_not_implemented(opcode: int) -> None:
    assert asked(Device(1 << 20), opcode, bytes(64)) == errno.ENOSYS


def test_a_file_is_no_directory(blob: FakeFile) -> None:
    device = Device(1 << 20)
    assert asked(device, wire.LOOKUP, b"blob\0", device.add(blob).id) == errno.ENOENT


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (Unavailable("x"), errno.EIO), (StoreFull("x"), errno.ENOSPC), (NotFound("x"), errno.ENOENT), (Broken("x"), 71),
        (OSError(errno.EACCES, "x"), errno.EIO), (ZeroDivisionError(), errno.EIO), (KeyError("x"), errno.EIO),
    ],
)  # fmt: skip
def test_the_kernel_is_told_the_errno_of_our_errors_and_eio_for_all_others(error: Exception, expected: int) -> None:
    assert errno_of(error) == expected
