"""A node that was asked to bring an image before its start has all of it, and reads nothing from anywhere then."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi.prefetch.life import State
from dadi.prefetch.messages import Request, canonical
from tests.fakes.registry import FakeRegistry
from tests.lab.mounting import mounted, node_of, read
from tests.lab.services import CHUNK, running, tar_of

pytestmark = pytest.mark.root

BIG = random.Random(1).randbytes(40 * CHUNK + 123)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [tar_of(big=BIG), tar_of(app=b"print('hi')")])
        yield fake


async def test_a_warm_node_mounts_and_reads_without_a_byte_from_outside(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    reference = f"{registry.host}/team/app:1"
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        prefetcher = run.superpeer.prefetch
        job = await prefetcher.submit(canonical(Request(reference, node.platform, nodes="all", pin_until=1e10)))
        async for _ in prefetcher.follow(job.id):
            pass
        assert job.state is State.READY
        assert node.warmer is not None
        await node.warmer.once()
        assert job.nodes == {"ready": 1}
        before = [row["bytes"] for row in node.upstream.statistics()]
        await mounted(node, reference, target)
        assert await read(target / "big") == BIG
        assert [row["bytes"] for row in node.upstream.statistics()] == before
        assert node.statistics()["prefetch"]["warmed"] == 1
        await node.mounts.unmount(str(target))
