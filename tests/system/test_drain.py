"""Draining on the real kernel: in the end nothing depends on us, not even when all of us is killed."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi.errors import Unavailable
from dadi.node.config import BackfillConfig
from tests.fakes.registry import FakeRegistry
from tests.lab.cleanup import Lab
from tests.lab.mounting import in_thread, mounted, node_of, read
from tests.lab.processes import LabFailed
from tests.lab.restarts import Machine, Readers, keepers
from tests.lab.services import CHUNK, running, tar_of
from tests.lab.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

DATA, SHARED = random.Random(1).randbytes(150 * CHUNK + 77), random.Random(2).randbytes(50 * CHUNK)
OTHER = random.Random(3).randbytes(9 * CHUNK)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [tar_of(shared=SHARED), tar_of(data=DATA)])
        fake.add_image("team/other", "1", [tar_of(other=OTHER)])
        yield fake


async def test_after_a_drain_readers_go_on_though_node_and_keeper_are_killed(lab: Lab, registry: FakeRegistry) -> None:
    first, second, other = (lab.root / name for name in ("first", "second", "other"))
    for directory in (first, second, other):
        directory.mkdir()
    async with running(lab.root / "superpeer", registry.host) as run:
        machine = await in_thread(lambda: Machine(lab, run.url))  # backfill is switched off there

        async def dadi(*arguments: str) -> str:
            return await in_thread(lambda: machine.node.dadi(*arguments))

        await dadi("mount", f"{registry.host}/team/app:1", str(first))
        async with Readers({first / "data": DATA, first / "shared": SHARED}, 4) as readers:
            assert "drained: " in await dadi("drain")
            status = await in_thread(machine.node.status)
            assert (status["drain"]["state"], status["reads"]["files"]) == ("drained", 0)
            assert "DRAINED" in await dadi("status")
            await dadi("mount", f"{registry.host}/team/app:1", str(second))  # all of it is here
            with pytest.raises(LabFailed, match="being drained"):
                await dadi("mount", f"{registry.host}/team/other:1", str(other))
            (keeper,) = keepers(lab.root)
            os.kill(keeper, signal.SIGSTOP)  # it could be of no use either
            machine.kill()
            os.kill(keeper, signal.SIGKILL)
            await in_thread(machine.node.popen.wait)
            before = readers.reads
            await until(lambda: readers.reads > before + 100)
        assert (readers.failed, readers.wrong) == ([], [])
        assert await read(second / "data") == DATA
        await in_thread(machine.start)
        status = await in_thread(machine.node.status)
        assert status["drain"]["state"] == "no", "a restart ends it"
        assert [row["state"] for row in status["mounts"]] == ["local", "local"]
        for directory in (first, second):
            await dadi("umount", str(directory))


async def test_a_drain_keeps_to_the_rate_goes_on_after_its_time_out_and_can_be_undone(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    slow = BackfillConfig(enabled=False, rate=1)
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url, backfill=slow) as node:
        await mounted(node, f"{registry.host}/team/app:1", target)
        with pytest.raises(Unavailable, match=r"not drained after 0 s: lazy devices: [12],"):
            async for _ in node.drain.watch(0.2):
                pass
        assert node.statistics()["drain"]["state"] == "draining", "the time-out ends the waiting only"
        with pytest.raises(Unavailable, match="being drained"):
            await node.images.resolve(f"{registry.host}/team/app:1", None, [])
        assert await read(target / "data") == DATA, "reads do not wait for it"
        await node.drain.end()
        await until(lambda: node.backfill.state == "disabled")
        assert node.statistics()["drain"]["state"] == "no"
        await node.images.resolve(f"{registry.host}/team/other:1", None, [])


async def test_a_drained_node_leaves_the_trees_and_comes_back_when_it_is_undone(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        assert node.peering is not None
        await mounted(node, f"{registry.host}/team/app:1", target)
        stages = [event["event"] async for event in node.drain.watch(0)]
        assert (stages[0], stages[-1]) == ("progress", "drained")
        assert (await node.peering._condition()).refuses
        port = int(node.peering.parents.peer.address.rpartition(":")[2])
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        trees = await node.peering.trees([device.blob for device in node.devices.all()])
        assert not any(row["tree"] and row["tree"]["peers"] for row in trees["blobs"])
        await node.drain.end()
        await node.peering.parents.membership.beat()
        _, writer = await asyncio.open_connection("127.0.0.1", int(node.peering.parents.peer.address.split(":")[1]))
        writer.close()
        assert not (await node.peering._condition()).refuses
