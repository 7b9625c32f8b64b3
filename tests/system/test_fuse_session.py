"""The FUSE session with the real kernel: hits, misses, interrupts, aborts, unmounting, and loop devices on top.

Files of the mount are read in threads of the test's own: a read may hang, and must not keep the event loop from ending
it. Longer than 400 lines: the behaviour of one session, in the order of its life.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import mmap
import os
import random
import subprocess
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import pytest

from dadi.errors import Conflict, NotFound, StoreFull, Unavailable
from dadi.node import kernel, loop
from fuse import connection, device
from fuse.session import Session
from tests.fakes.backed_file import Broken, FakeFile
from tests.lab.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

CHUNK = 4096
CONTENT = random.Random(11).randbytes(64 * CHUNK)
READERS = ThreadPoolExecutor(80)
T = TypeVar("T")


class Mounted:
    """A session on a directory, and its files."""

    def __init__(self, directory: Path, session: Session) -> None:
        self.directory, self.session = directory, session
        self.files: list[FakeFile] = []

    def add(self, name: str = "blob", present: set[int] | None = None, content: bytes = CONTENT) -> FakeFile:
        file = FakeFile(self.directory.parent / f"{len(self.files)}-{name}", content, present)
        file.name = name
        self.files.append(file)
        self.session.add(file)
        return file

    def path(self, name: str = "blob") -> Path:
        return self.directory / name


@pytest.fixture
async def mounted(tmp_path: Path) -> AsyncIterator[Mounted]:
    directory = tmp_path / "mnt"
    directory.mkdir()
    session = Session(directory, asyncio.get_running_loop())
    await in_thread(session.mount)
    made = Mounted(directory, session)
    try:
        yield made
    finally:
        await in_thread(session.close)
        for file in made.files:
            file.close()
        still = await in_thread(kernel.is_mounted, directory)
        await in_thread(kernel.umount_all, directory)
        assert not still


@pytest.fixture(autouse=True)
def no_loop_device_stays(tmp_path: Path) -> Iterator[None]:
    yield
    assert [found for found in loop.attached() if found.backing_file.startswith(str(tmp_path))] == []


def in_thread(work: Callable[..., T], *args: Any) -> asyncio.Future[T]:
    return asyncio.get_running_loop().run_in_executor(READERS, work, *args)


def read_at(path: Path | str, offset: int, length: int) -> bytes:
    """Return what one pread gives."""
    fd = os.open(path, os.O_RDONLY)
    try:
        return os.pread(fd, length, offset)
    finally:
        os.close(fd)


def read_direct(path: str, offset: int, length: int) -> bytes:
    """Return what one read without the page cache gives; all numbers are multiples of 512."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length) as buffer:
            got = os.preadv(fd, [buffer], offset)
            return buffer[:got]
    finally:
        os.close(fd)


def errno_of(work: Callable[..., Any], *args: Any) -> int | None:
    """Return the errno that a call fails with; None if it does not fail."""
    try:
        work(*args)
    except OSError as error:
        return error.errno
    return None


# ---- names


async def test_files_are_listed_with_their_sizes_and_nothing_can_be_changed(mounted: Mounted) -> None:
    mounted.add("a" * 64)
    mounted.add("b" * 64, content=CONTENT[:CHUNK])

    def look() -> dict[str, tuple[int, int]]:
        return {entry.name: (entry.stat().st_size, entry.stat().st_mode) for entry in os.scandir(mounted.directory)}

    assert await in_thread(look) == {"a" * 64: (len(CONTENT), 0o100400), "b" * 64: (CHUNK, 0o100400)}
    assert (await in_thread(os.statvfs, mounted.directory)).f_blocks == 65
    assert await in_thread(errno_of, os.open, mounted.path("new"), os.O_CREAT | os.O_WRONLY) == errno.EROFS
    assert await in_thread(errno_of, os.open, mounted.path("a" * 64), os.O_RDWR) == errno.EROFS
    assert await in_thread(errno_of, os.unlink, mounted.path("a" * 64)) == errno.EROFS
    assert await in_thread(errno_of, os.stat, mounted.path("nothing")) == errno.ENOENT
    assert await in_thread(errno_of, os.getxattr, mounted.path("a" * 64), "user.x") == errno.EOPNOTSUPP


async def test_a_directory_of_many_files_is_listed_whole(mounted: Mounted) -> None:
    names = {f"{number:064x}" for number in range(300)}
    for name in names:
        mounted.add(name, content=CONTENT[:CHUNK])
    assert set(await in_thread(os.listdir, mounted.directory)) == names


async def test_nobody_but_root_can_look(mounted: Mounted, tmp_path: Path) -> None:
    mounted.add()
    for directory in (tmp_path, *tmp_path.parents[:2]):
        directory.chmod(0o755)
    for command in (["cat", mounted.path()], ["ls", mounted.directory]):
        done = await in_thread(lambda command=command: subprocess.run(command, user=65534, group=65534,
                                                                       capture_output=True, check=False))  # fmt: skip
        assert done.returncode != 0
        assert b"Permission denied" in done.stderr


async def test_a_removed_file_is_gone_at_once_and_its_name_can_come_back(mounted: Mounted) -> None:
    mounted.add()
    fd = await in_thread(os.open, mounted.path(), os.O_RDONLY)
    assert await in_thread(os.pread, fd, 10, 0) == CONTENT[:10]
    mounted.session.remove("blob")
    mounted.session.remove("blob")
    assert await in_thread(errno_of, os.stat, mounted.path()) == errno.ENOENT
    assert await in_thread(os.listdir, mounted.directory) == []
    assert await in_thread(errno_of, os.pread, fd, 10, 0) == device.GONE
    mounted.add()
    assert await in_thread(read_at, mounted.path(), 0, 10) == CONTENT[:10]
    assert await in_thread(os.pread, fd, 10, 0) == CONTENT[:10], "a name is the digest of the bytes: the same file"
    os.close(fd)


# ---- hits and misses


async def test_hits_give_the_bytes_of_the_file_wherever_and_however_long(mounted: Mounted) -> None:
    content = random.Random(3).randbytes((1 << 20) + 3 * CHUNK)
    file = mounted.add(content=content)
    chance = random.Random(5)
    for _ in range(50):
        offset, length = chance.randrange(len(content) + CHUNK), chance.randrange(2 << 20)
        assert await in_thread(read_at, mounted.path(), offset, length) == content[offset : offset + length]
    assert file.asked == []
    statistics = mounted.session.statistics()
    assert statistics["misses"] == statistics["errors"] == 0
    assert statistics["hits"] >= 50


async def test_a_miss_is_asked_from_the_file_once_it_is_here_it_is_a_hit(mounted: Mounted) -> None:
    file = mounted.add(present={0})
    assert await in_thread(read_at, mounted.path(), 100, 2 * CHUNK) == CONTENT[100 : 100 + 2 * CHUNK]
    assert file.asked == [(100, 2 * CHUNK)]
    file.keep(1)
    file.keep(2)
    assert await in_thread(read_at, mounted.path(), 100, 2 * CHUNK) == CONTENT[100 : 100 + 2 * CHUNK]
    assert file.asked == [(100, 2 * CHUNK)]
    statistics = mounted.session.statistics()
    assert (statistics["hits"], statistics["misses"]) == (1, 1)
    assert statistics["hit_bytes"] == statistics["miss_bytes"] == 2 * CHUNK
    assert statistics["requests"] >= 4
    assert (statistics["pending"], statistics["oldest_pending"], statistics["errors"]) == (0, 0.0, 0)


async def test_a_miss_at_the_end_asks_for_nothing_beyond_it(mounted: Mounted) -> None:
    file = mounted.add(present=set())
    size = len(CONTENT)
    assert await in_thread(read_at, mounted.path(), size - 10, 1000) == CONTENT[-10:]
    assert await in_thread(read_at, mounted.path(), size + CHUNK, 1000) == b""
    assert file.asked == [(size - 10, 10)]


async def test_present_bytes_that_are_not_in_memory_are_read_from_disk_by_another_thread(
    mounted: Mounted, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = mounted.add()
    os.fsync(file.fd)
    readers = set()
    read_cold = device.read_cold

    def watched(*args: Any) -> bytearray:
        readers.add(threading.current_thread().name)
        return read_cold(*args)

    monkeypatch.setattr(device, "read_cold", watched)
    rounds = 0
    while not readers:
        rounds += 1
        # Not once: pages that a processor has still to put on the kernel's lists stay where they are.
        while in_memory(file.fd):
            Path("/proc/sys/vm/drop_caches").write_text("1\n")
        # A read that must not wait has the disk asked; where that is done before it looks again, it need not wait.
        assert await in_thread(read_at, mounted.path(), 0, len(CONTENT)) == CONTENT
        assert rounds < 20, "each time the disk was faster"
    assert all(name.startswith("fuse-disk") for name in readers)
    statistics = mounted.session.statistics()
    assert (statistics["hits"] > 0, statistics["hit_bytes"], statistics["misses"]) == (True, rounds * len(CONTENT), 0)


async def test_a_hit_does_not_wait_for_misses_that_hang(mounted: Mounted) -> None:
    file = mounted.add(present={0})
    file.go.clear()
    hanging = [in_thread(read_at, mounted.path(), chunk * CHUNK, CHUNK) for chunk in range(1, 60)]
    await file.reads(59)
    assert mounted.session.statistics()["pending"] == 59
    assert mounted.session.statistics()["oldest_pending"] > 0
    async with asyncio.timeout(20):
        assert await in_thread(read_at, mounted.path(), 0, CHUNK) == CONTENT[:CHUNK]
    assert mounted.session.statistics()["pending"] == 59
    file.go.set()
    assert b"".join(await asyncio.gather(*hanging)) == CONTENT[CHUNK : 60 * CHUNK]


async def test_random_reads_of_many_threads_while_chunks_arrive_give_the_right_bytes(mounted: Mounted) -> None:
    file = mounted.add(present=set(range(0, 64, 3)))

    def hammer(seed: int) -> None:
        chance = random.Random(seed)
        with open(mounted.path(), "rb", buffering=0) as opened:
            for _ in range(150):
                offset, length = chance.randrange(len(CONTENT)), chance.randrange(1, 5 * CHUNK)
                assert os.pread(opened.fileno(), length, offset) == CONTENT[offset : offset + length]
                if chance.random() < 0.05:
                    file.keep(chance.randrange(64))

    await asyncio.gather(*(in_thread(hammer, seed) for seed in range(8)))
    assert mounted.session.statistics()["errors"] == 0


# ---- errors


@pytest.mark.parametrize(
    ("error", "expected"),
    [(Unavailable("away"), errno.EIO), (StoreFull("full"), errno.ENOSPC), (Broken("odd"), 71),
     (ZeroDivisionError("bug"), errno.EIO)],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
async def test_an_error_of_the_file_reaches_the_reader_and_the_next_read_may_succeed(
    mounted: Mounted, error: Exception, expected: int
) -> None:
    file = mounted.add(present=set())
    file.error = error
    assert await in_thread(errno_of, read_at, mounted.path(), 0, 10) == expected
    file.error = None
    assert await in_thread(read_at, mounted.path(), 0, 10) == CONTENT[:10]
    assert mounted.session.statistics()["errors"] == 1


async def test_too_few_bytes_are_an_error(mounted: Mounted) -> None:
    file = mounted.add(present=set())
    file.cut = 1
    assert await in_thread(errno_of, read_at, mounted.path(), 0, 10) == errno.EIO


async def test_a_local_file_that_was_cut_off_gives_no_zeros_what_it_lacks_is_fetched(mounted: Mounted) -> None:
    file = mounted.add()
    os.ftruncate(file.fd, CHUNK)
    assert await in_thread(read_at, mounted.path(), CHUNK, 10) == CONTENT[CHUNK : CHUNK + 10]
    assert file.asked[0][0] == CHUNK
    assert await in_thread(read_at, mounted.path(), 0, 10) == CONTENT[:10]


async def test_a_serving_thread_survives_its_own_errors(mounted: Mounted, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted.add()
    with monkeypatch.context() as patch:
        patch.setattr(device.Device, "answer", lambda self, request: 1 // 0)
        assert await in_thread(errno_of, os.stat, mounted.path()) == errno.EIO
    assert (await in_thread(os.stat, mounted.path())).st_size == len(CONTENT)
    assert await in_thread(read_at, mounted.path(), 0, 10) == CONTENT[:10]


# ---- readers that give up, files that are given up


async def test_a_reader_that_is_interrupted_ends_and_so_does_its_read(mounted: Mounted) -> None:
    file = mounted.add(present=set())
    file.go.clear()
    command = ["dd", f"if={mounted.path()}", "of=/dev/null", "bs=4k", "count=1"]
    reader = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        await file.reads(1)
        reader.terminate()
        async with asyncio.timeout(20):
            assert await in_thread(reader.wait) == -15
            await file.reads(1)
    finally:
        reader.kill()
        reader.wait()
    assert file.cancelled == 1
    await until(lambda: mounted.session.statistics()["interrupted"])  # counted after the reader was told
    assert mounted.session.statistics()["pending"] == 0


async def test_an_aborted_file_fails_those_who_wait_and_those_who_would_until_it_is_added_again(
    mounted: Mounted,
) -> None:
    file, other = mounted.add(present={0}), mounted.add("other", present=set())
    file.go.clear()
    other.go.clear()
    fd = await in_thread(os.open, mounted.path(), os.O_RDONLY)
    hanging = [in_thread(errno_of, os.pread, fd, 10, chunk * CHUNK) for chunk in range(1, 9)]
    unharmed = in_thread(read_at, mounted.path("other"), 0, 10)
    await file.reads(8)
    await other.reads(1)
    mounted.session.abort("blob")
    mounted.session.abort("no such file")
    assert await asyncio.gather(*hanging) == [errno.EIO] * 8
    await file.reads(8)
    assert file.cancelled == 8
    assert await in_thread(errno_of, os.pread, fd, 10, CHUNK) == errno.EIO
    assert await in_thread(os.pread, fd, 10, 0) == CONTENT[:10], "what is here does no harm"
    assert len(file.asked) == 8
    file.go.set()
    mounted.session.add(file)
    assert await in_thread(os.pread, fd, 10, CHUNK) == CONTENT[CHUNK : CHUNK + 10]
    os.close(fd)
    assert not unharmed.done()
    other.go.set()
    assert await unharmed == CONTENT[:10]


async def test_removing_a_file_fails_those_who_wait(mounted: Mounted) -> None:
    file = mounted.add(present=set())
    file.go.clear()
    hanging = in_thread(errno_of, read_at, mounted.path(), 0, 10)
    await file.reads(1)
    await in_thread(mounted.session.remove, "blob")
    assert await hanging == errno.EIO


async def test_a_reader_whose_task_was_cancelled_by_others_is_not_left_waiting(mounted: Mounted) -> None:
    file = mounted.add(present=set())
    file.go.clear()
    hanging = in_thread(errno_of, read_at, mounted.path(), 0, 10)
    await file.reads(1)
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()
    assert await hanging == errno.EIO


# ---- life cycle


async def test_unmounting_while_reads_hang_fails_them_and_ends_everything(mounted: Mounted) -> None:
    file = mounted.add(present=set())
    file.go.clear()
    hanging = [in_thread(errno_of, read_at, mounted.path(), chunk * CHUNK, 10) for chunk in range(20)]
    await file.reads(20)
    async with asyncio.timeout(30):
        await in_thread(mounted.session.unmount)
        assert set(await asyncio.gather(*hanging)) <= {errno.EIO, errno.ECONNABORTED, errno.ENOTCONN}
    assert not await in_thread(kernel.is_mounted, mounted.directory)
    assert mounted.session.fd == -1
    assert not [thread for thread in threading.enumerate() if thread.name == "fuse-0"]
    mounted.session.unmount()
    assert "unmounted" in repr(mounted.session)
    with pytest.raises(Conflict, match="make a new one"):
        await in_thread(mounted.session.mount)


async def test_unmounting_works_while_a_file_is_open_and_its_reads_fail_from_then_on(mounted: Mounted) -> None:
    mounted.add()
    fd = await in_thread(os.open, mounted.path(), os.O_RDONLY)
    async with asyncio.timeout(30):
        await in_thread(mounted.session.close)
    assert not await in_thread(kernel.is_mounted, mounted.directory)
    assert errno_of(os.pread, fd, 10, 0) in (errno.ENOTCONN, errno.ECONNABORTED, errno.EIO)
    with contextlib.suppress(OSError):  # closing is told that the connection is gone, too
        os.close(fd)


async def test_requests_wait_for_whoever_serves_the_descriptor(tmp_path: Path) -> None:
    file = FakeFile(tmp_path / "blob", CONTENT)
    directory = tmp_path / "mnt"
    directory.mkdir()
    session = Session(directory, asyncio.get_running_loop())
    await in_thread(session.connect)
    try:
        assert session.can_resend == (kernel_version() >= (6, 9))
        session.add(file)
        reader = in_thread(read_at, directory / "blob", 0, 10)
        session.serve()
        assert await reader == CONTENT[:10]
    finally:
        await in_thread(session.close)
        file.close()


def kernel_version() -> tuple[int, ...]:
    return tuple(map(int, os.uname().release.split(".")[:2]))


async def test_a_directory_that_is_not_there_is_not_found(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    session = Session(tmp_path / "nothing", asyncio.get_running_loop())
    with pytest.raises(NotFound, match="nothing"):
        await in_thread(session.mount)
    session.close()
    assert len(os.listdir("/proc/self/fd")) == before


def test_the_kernel_tells_its_version_of_the_protocol() -> None:
    before = kernel.mounts()
    major, minor = connection.offered()
    assert (major, minor >= 36) == (7, True)
    assert kernel.mounts() == before


# ---- loop devices on top


async def test_through_a_loop_device_hits_do_not_wait_for_misses_that_hang(mounted: Mounted) -> None:
    file = mounted.add(present={0, 1, 2})
    file.go.clear()
    attached = await in_thread(loop.attach, mounted.path())
    try:
        assert (await in_thread(attached.status)).direct_io
        hanging = [in_thread(read_direct, attached.path, chunk * CHUNK, CHUNK) for chunk in range(3, 43)]
        await file.reads(40)
        async with asyncio.timeout(20):
            assert await in_thread(read_direct, attached.path, 512, 2 * CHUNK) == CONTENT[512 : 512 + 2 * CHUNK]
        assert mounted.session.statistics()["pending"] == 40
        file.go.set()
        assert b"".join(await asyncio.gather(*hanging)) == CONTENT[3 * CHUNK : 43 * CHUNK]
    finally:
        mounted.session.abort("blob")
        await in_thread(attached.close)


async def test_a_loop_device_whose_reads_hang_can_be_closed_after_an_abort(mounted: Mounted) -> None:
    file = mounted.add(present=set())
    file.go.clear()
    attached = await in_thread(loop.attach, mounted.path())
    hanging = [in_thread(errno_of, read_direct, attached.path, chunk * CHUNK, CHUNK) for chunk in range(8)]
    await file.reads(8)
    mounted.session.abort("blob")
    async with asyncio.timeout(30):
        assert await asyncio.gather(*hanging) == [errno.EIO] * 8
        await in_thread(attached.close)
    assert await in_thread(loop.backing_file, attached.path) is None


@pytest.mark.programs("mkfs.erofs")
async def test_a_mounted_file_system_is_swapped_to_the_local_file_and_outlives_the_session(
    mounted: Mounted, tmp_path: Path
) -> None:
    image, target = tmp_path / "image.erofs", tmp_path / "target"
    tree = {f"dir{number % 5}/file{number}": random.Random(number).randbytes(number * 977) for number in range(60)}
    for name, data in tree.items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(data)
    target.mkdir()
    make = ["mkfs.erofs", "-T0", str(image), str(tmp_path / "tree")]
    await in_thread(lambda: subprocess.run(make, check=True, capture_output=True))
    content = image.read_bytes()
    content += bytes(-len(content) % CHUNK)
    local = tmp_path / "local"
    local.write_bytes(content)

    def contents() -> dict[str, bytes]:
        return {str(path.relative_to(target)): path.read_bytes() for path in target.rglob("*") if path.is_file()}

    file = mounted.add(present=set(), content=content)
    attached = await in_thread(loop.attach, mounted.path())
    try:
        await in_thread(kernel.mount_erofs, attached.path, target, [])
        try:
            assert await in_thread(contents) == tree
            assert file.asked, "it was lazy"
            held = await in_thread((target / "dir1/file1").open, "rb")
            asked = len(file.asked)
            await in_thread(attached.swap, local)
            assert await in_thread(attached.status) == (attached.path, str(local), True, True, True, len(content))
            await in_thread(mounted.session.close)
            await in_thread(drop_caches)
            assert await in_thread(contents) == tree
            assert await in_thread(held.read) == tree["dir1/file1"]
            held.close()
            assert len(file.asked) == asked
        finally:
            await in_thread(lambda: kernel.umount(target, detach=True))
    finally:
        await in_thread(attached.close)


def in_memory(fd: int) -> bool:
    """Whether any page of a file is in memory; a read that must not wait would have some brought there."""
    with mmap.mmap(fd, 0, mmap.MAP_PRIVATE) as view:
        pages = ctypes.create_string_buffer(-(-len(view) // mmap.PAGESIZE))
        start = ctypes.c_char.from_buffer(view)
        try:
            failed = ctypes.CDLL(None, use_errno=True).mincore(
                ctypes.byref(start), ctypes.c_size_t(len(view)), pages
            )
            assert not failed, os.strerror(ctypes.get_errno())
        finally:
            del start
        return any(page & 1 for page in pages.raw)


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("3")
