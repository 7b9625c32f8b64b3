"""Devices, without the kernel's: what was left to us, and calls that end after nobody waits for them."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

import pytest

from dadi.fallbacks import Fallbacks
from dadi.index.chunks import blob_of
from dadi.node import devices, loop
from dadi.node.devices import Devices
from dadi.node.in_kernel import in_kernel, under_way

BLOB = blob_of(b"x" * 4096, 4096)
PLACE = "/run/x/fuse"


class FuseSession:
    """Notes which files disappear, and where from: it is not to be called on the event loop."""

    directory = PLACE

    def __init__(self) -> None:
        self.removed: list[tuple[str, bool]] = []

    def remove(self, name: str) -> None:
        self.removed.append((name, threading.current_thread() is threading.main_thread()))


class Left:
    name, blob, file = BLOB.digest[7:], BLOB, None


class Loop:
    """A device that is attached."""

    path = "/dev/loop9"

    def __init__(self) -> None:
        self.closed = threading.Event()

    def close(self) -> None:
        self.closed.set()


async def test_what_is_left_is_not_taken_away_from_a_mount_that_is_just_claiming_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    session: Any = FuseSession()
    node: Any = Devices(None, None, session, None, Fallbacks())
    left: Any = Left()
    node._left[BLOB.digest] = devices._Left("/dev/loop9", left, contextlib.ExitStack())
    node._place = PLACE
    looking, go_on = threading.Event(), threading.Event()

    def backing_file(path: str) -> str:
        looking.set()
        go_on.wait(10)
        return f"{PLACE}/{BLOB.digest[7:]}"

    monkeypatch.setattr(loop, "backing_file", backing_file)
    monkeypatch.setattr(loop, "adopt", lambda path: Loop())
    claiming = asyncio.create_task(node.acquire(BLOB))
    await in_kernel(looking.wait, 10)
    ending = asyncio.create_task(node.end_left(set()))
    await asyncio.sleep(0)
    go_on.set()
    device = await claiming
    await ending
    assert device.lazy_file is left
    assert (session.removed, node._left) == ([], {})
    await node.release(device)
    assert device.loop.closed.is_set()


async def test_what_nobody_claims_disappears_and_the_event_loop_does_not_wait_for_it() -> None:
    session: Any = FuseSession()
    node: Any = Devices(None, None, session, None, Fallbacks())
    left: Any = Left()
    for number, digest in enumerate(("claimed", BLOB.digest)):
        node._left[digest] = devices._Left(f"/dev/loop{number}", left, contextlib.ExitStack())
    await node.end_left({"/dev/loop0"})
    assert list(node._left) == ["claimed"]
    assert session.removed == [(Left.name, False)]


@pytest.mark.parametrize("late", [True, False])
async def test_a_device_that_comes_when_nobody_waits_for_it_any_more_is_closed(late: bool) -> None:
    made, attaching, go_on = Loop(), threading.Event(), threading.Event()

    def attach() -> Loop:
        attaching.set()
        go_on.wait(10)
        return made

    before = under_way()
    task = asyncio.create_task(in_kernel(attach))
    await in_kernel(attaching.wait, 10)
    if late:
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        go_on.set()
    else:  # it has come, and the event loop has not heard of it yet
        go_on.set()
        while under_way() > before:  # nothing may run on the event loop meanwhile
            pass
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert await in_kernel(made.closed.wait, 10)


async def test_a_device_that_reads_its_local_file_by_buffered_io_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    class Store:
        def data_path(self, blob: object) -> str:
            return "/store/data"

        def has(self, digest: str) -> bool:
            return True

    fallbacks = Fallbacks()
    session: Any = FuseSession()
    store: Any = Store()
    node: Any = Devices(store, None, session, None, fallbacks)
    device: Any = devices.BlobDevice(BLOB)
    device.users = 1
    device.loop = loop.LoopDevice("/dev/loop9", -1)
    monkeypatch.setattr(loop.LoopDevice, "swap", lambda self, path: False)
    await node._swap(device)
    assert device.state is devices.DeviceState.LOCAL
    assert [row["kind"] for row in fallbacks.statistics()] == ["device reads its local file by buffered I/O"]
