"""dadi-node is stopped and started under load, and its keeper killed: no read fails, no byte is wrong.

Several readers compare every byte with what they know it to be, without the page cache's help, while the node comes and
goes. A node that was killed is not waited for: a thread of it may hang in the kernel until its successor serves. That
it is killed again and again is a case of the fault suite (tests/faults/nodes.py).
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi.node import kernel
from tests.fakes.registry import FakeRegistry
from tests.lab.cleanup import Lab
from tests.lab.mounting import begin_to_read, in_thread, loops_below
from tests.lab.restarts import Machine, Readers, keepers
from tests.lab.services import CHUNK, running, tar_of
from tests.lab.waiting import until, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

FILE = random.Random(0).randbytes(1200 * CHUNK + 77)
SHARED = random.Random(99).randbytes(100 * CHUNK)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "0", [tar_of(shared=SHARED), tar_of(data=FILE)])
        yield fake


def files_of(directory: Path) -> dict[Path, bytes]:
    return {directory / "data": FILE, directory / "shared": SHARED}


async def test_a_stop_and_a_start_under_load_are_not_noticed(lab: Lab, registry: FakeRegistry) -> None:
    directory = lab.root / "mnt0"
    directory.mkdir()
    async with running(lab.root / "superpeer", registry.host) as run:
        machine = await in_thread(lambda: Machine(lab, run.url))
        await in_thread(lambda: machine.node.dadi("mount", f"{registry.host}/team/app:0", str(directory)))
        async with Readers(files_of(directory), 4) as readers:
            for _ in range(3):
                before = readers.reads
                await until(lambda: readers.reads > before + 5)  # noqa: B023
                assert await in_thread(machine.node.stop) == 0
                assert len(keepers(lab.root)) == 1
                await in_thread(machine.start)
        assert (readers.failed, readers.wrong) == ([], [])
        shown = await in_thread(lambda: machine.node.dadi("status"))
        assert "taken over from the process before: 1 mounts, 2 lazy devices" in shown
        assert machine.told()["taken over: the FUSE mount of the process before"] == 3
        await in_thread(lambda: machine.node.dadi("umount", str(directory)))
        assert await in_thread(machine.node.stop) == 0
        await in_thread(lambda: wait_until(lambda: not keepers(lab.root)))


async def test_a_keeper_that_is_killed_is_replaced_and_then_does_its_work(lab: Lab, registry: FakeRegistry) -> None:
    directory = lab.root / "mnt0"
    directory.mkdir()
    async with running(lab.root / "superpeer", registry.host) as run:
        machine = await in_thread(lambda: Machine(lab, run.url))
        await in_thread(lambda: machine.node.dadi("mount", f"{registry.host}/team/app:0", str(directory)))
        async with Readers(files_of(directory), 2) as readers:
            (first,) = keepers(lab.root)
            os.kill(first, signal.SIGKILL)
            said = "dadi-keeper was gone, replaced"
            await in_thread(lambda: wait_until(lambda: said in [f["kind"] for f in machine.node.status()["fallbacks"]]))
            assert keepers(lab.root) not in ([], [first])
            machine.kill()
            await in_thread(machine.start)
            before = readers.reads
            await until(lambda: readers.reads > before + 20)
        assert (readers.failed, readers.wrong) == ([], [])
        await in_thread(lambda: machine.node.dadi("umount", str(directory)))


async def test_a_process_that_hangs_in_the_kernel_after_it_was_killed_does_not_keep_the_next_from_serving(
    lab: Lab, registry: FakeRegistry
) -> None:
    """Its unmount waits for reads that only the next process answers, and it has its locks until then."""
    directory = lab.root / "mnt0"
    directory.mkdir()
    async with running(lab.root / "superpeer", registry.host) as run:
        machine = await in_thread(lambda: Machine(lab, run.url))
        await in_thread(lambda: machine.node.dadi("mount", f"{registry.host}/team/app:0", str(directory)))
    await in_thread(lambda: begin_to_read(directory / "data"))
    await in_thread(lambda: wait_until(lambda: machine.node.status()["waiting"]["for_upstream"] > 0))
    umount = asyncio.ensure_future(in_thread(lambda: machine.node.dadi("umount", str(directory), check=False)))
    await in_thread(lambda: wait_until(lambda: not kernel.is_mounted(directory)))
    killed = machine.node.popen
    machine.kill()
    stat = Path(f"/proc/{killed.pid}/stat")
    await in_thread(lambda: wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z"))
    assert killed.poll() is None, "its unmount hangs: this is what the test is about"
    await in_thread(machine.start)
    assert [e["still_dying"] for e in machine.node.events() if e["event"].startswith("taken over")] == [True]
    async with running(lab.root / "superpeer", registry.host, port=int(run.url.rpartition(":")[2])):
        assert await in_thread(lambda: killed.wait(60)) == -signal.SIGKILL
        await umount  # it hung up with its node
        await in_thread(lambda: wait_until(lambda: machine.node.status()["mounts"] == [] == loops_below(lab.root)))
        assert list((machine.node.state / "mounts").iterdir()) == []
        assert await in_thread(machine.node.stop) == 0
