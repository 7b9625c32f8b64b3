"""`dadi umount --force` frees a mount whatever else is under way: here, an unmount that waits in the kernel."""

from __future__ import annotations

import asyncio
import contextlib
import random
from functools import partial
from pathlib import Path

import pytest

from dadi.node import kernel
from dadi.node.config import ReadConfig
from tests.fakes.registry import FakeRegistry
from tests.lab.mounting import begin_to_read, in_thread, loops_below, mounted, node_of
from tests.lab.services import CHUNK, running, tar_of
from tests.lab.waiting import until, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]


async def test_an_unmount_that_waits_for_reads_which_nobody_answers_is_ended_by_one_with_force(
    tmp_path: Path, target: Path
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        registry = await stack.enter_async_context(FakeRegistry())
        registry.add_image("team/app", "1", [tar_of(data=random.Random(1).randbytes(40 * CHUNK))])
        superpeer = contextlib.AsyncExitStack()
        run = await superpeer.enter_async_context(running(tmp_path / "superpeer", registry.host))
        node = await stack.enter_async_context(node_of(tmp_path, run.url, read=ReadConfig(patience=300.0)))
        await mounted(node, f"{registry.host}/team/app:1", target)
        await superpeer.aclose()
        await in_thread(partial(begin_to_read, target / "data"))
        await until(lambda: node.statistics()["waiting"]["for_upstream"] > 0)
        plain = asyncio.create_task(node.mounts.unmount(str(target)))
        await in_thread(lambda: wait_until(lambda: not kernel.is_mounted(target)))
        assert not plain.done(), "the kernel waits for the reads: this is what the test is about"
        async with asyncio.timeout(30):
            await node.mounts.unmount(str(target), force=True)
            await plain
        assert node.statistics()["mounts"] == []
        assert loops_below(tmp_path) == []
