"""Startup traces on the real kernel: what one node's container has read is there before another one's reads it."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi.errors import InvalidRequest
from dadi.node import traces
from dadi.node.config import TraceConfig
from dadi.node.node import Node
from dadi.oci.config import RegistryConfig
from dadi.prefetch import trace
from dadi.prefetch.trace import Trace
from tests.fakes.registry import FakeRegistry
from tests.lab.mounting import mounted, node_of, read
from tests.lab.services import CHUNK, running, tar_of
from tests.lab.waiting import until

pytestmark = pytest.mark.root

FILES = {f"file{number}": random.Random(number).randbytes(40 * CHUNK) for number in range(8)}
READ = ["file5", "file1", "file6"]
QUICK = TraceConfig(quiet=0.5)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        halves = (dict(list(FILES.items())[at : at + 4]) for at in (0, 4))
        fake.add_image("team/app", "1", [tar_of(**half) for half in halves])
        yield fake


def target(directory: Path, name: str) -> Path:
    made = directory / name
    made.mkdir()
    return made


async def replayed(node: Node) -> None:
    await until(lambda: node.startups.counts["replays"] > 0 and not node.demand.replays)


async def over(node: Node) -> None:
    await until(lambda: not node.startups._tasks)


async def test_the_second_node_has_what_the_first_one_has_read(tmp_path: Path, registry: FakeRegistry) -> None:
    reference = f"{registry.host}/team/app:1"
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path / "one", run.url, trace=QUICK) as one:
            row = await mounted(one, reference, target(tmp_path, "m1"))
            manifest = row["manifest_digest"]
            for name in READ:
                assert await read(tmp_path / "m1" / name) == FILES[name]
            cold = one.statistics()["reads"]["misses"]
            assert cold >= 3
            await over(one)
            assert one.statistics()["trace"]["recordings"] == 1
            found = trace.decode(run.superpeer.traces.given(manifest), Trace)
            size = len(found.groups[0].steps) * CHUNK
            assert sum(len(FILES[name]) for name in READ) <= size < sum(map(len, FILES.values()))
            async with node_of(tmp_path / "two", run.url, trace=QUICK) as two:
                await mounted(two, reference, target(tmp_path, "m2"))
                await replayed(two)
                before = two.statistics()["reads"]["misses"]
                for name in READ:
                    assert await read(tmp_path / "m2" / name) == FILES[name]
                assert two.statistics()["reads"]["misses"] - before <= 1, "the same reads find their chunks"
                assert await read(tmp_path / "m2" / "file0") == FILES["file0"], "and what is in no trace comes as ever"
                await over(two)
                told = two.statistics()["trace"]
                assert told["hit_ratio"] > 0.9
                assert told["images"][0]["covered"] < 1.0
            assert trace.decode(run.superpeer.traces.given(manifest), Trace).groups[0].recordings == 2
            await verbs(one, reference)


async def verbs(node: Node, reference: str) -> None:
    """What `dadi trace` does: export, clear, import; a trace of another image is refused."""
    shown = await traces.show(node, reference, node.platform)
    exported = shown["trace"]
    assert exported["groups"][0]["recordings"] == 2
    await traces.clear(node, reference, node.platform)
    assert (await traces.show(node, reference, node.platform))["trace"] is None
    brought = (await traces.bring(node, reference, node.platform, exported))["trace"]
    assert brought["groups"][0]["steps"] == exported["groups"][0]["steps"]
    with pytest.raises(InvalidRequest):
        await traces.bring(node, reference, node.platform, {**exported, "manifest": "sha256:" + "0" * 64})
    wrong = [[exported["blobs"][0][0], 2 * exported["blobs"][0][1]], *exported["blobs"][1:]]
    with pytest.raises(InvalidRequest):
        await traces.bring(node, reference, node.platform, {**exported, "blobs": wrong})


async def test_without_a_superpeer_the_second_start_of_the_node_itself_is_helped(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    allowed = RegistryConfig(allowed=(registry.host,), plain_http=(registry.host,))
    async with node_of(tmp_path, registry=allowed, trace=QUICK) as node:
        row = await mounted(node, f"{registry.host}/team/app:1", target(tmp_path, "m1"))
        await read(tmp_path / "m1" / "file1")
        await asyncio.wait_for(over(node), 20)
        assert node.embedded is not None
        # An embedded superpeer has streamed the layers into the node's own store: all is local, nothing is seen.
        assert bool(node.embedded.traces.given(row["manifest_digest"])) == (row["state"] == "lazy")
