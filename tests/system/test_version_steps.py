"""One step of versions up and down, while programs read: each version takes over what the other one has left.

The versions are this code's with the numbers of the next: what a step is, is what `dadi/versions.py` makes of numbers.
What their formats may add is in tests/unit/test_state_versions.py.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from dadi import state_version
from dadi.errors import Unsupported
from fuse import state
from tests.fakes.registry import FakeRegistry
from tests.lab.mounting import in_thread, mounted, node_of, read
from tests.lab.services import CHUNK, running, tar_of

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

FILES = {name: random.Random(name).randbytes(40 * CHUNK + 77) for name in ("a", "b", "c", "d")}
Become = Callable[[int, int], None]


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [tar_of(**FILES)])
        yield fake


@pytest.fixture
def become(monkeypatch: pytest.MonkeyPatch) -> Become:
    """Let the next node be of a version, which versions from `since` on understand."""

    def become(version: int, since: int) -> None:
        for module in (state_version, state):
            monkeypatch.setattr(module, "VERSION", version)
            monkeypatch.setattr(module, "SINCE", since)

    return become


def left(tmp_path: Path) -> dict[str, bytes]:
    """Return the small files of the state."""
    root = tmp_path / "node" / "state"
    return {str(file.relative_to(root)): file.read_bytes() for file in root.rglob("*.json") if file.is_file()} | {
        "version": (root / "version").read_bytes()
    }


async def test_readers_go_on_over_a_step_forward_and_the_step_back(
    tmp_path: Path, registry: FakeRegistry, target: Path, become: Become
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        become(1, 1)
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:1", target)
            assert await read(target / "a") == FILES["a"]
        for name, version in (("b", 2), ("c", 1), ("d", 2)):
            reader = asyncio.create_task(read(target / name))  # there is no node now: it waits
            become(version, 1)
            async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
                assert node.statistics()["taken_over"] == {"mounts": 1, "devices": 1}, version
                assert await reader == FILES[name]
                assert "lazy mounts not taken over" not in {row["kind"] for row in node.fallbacks.statistics()}
            assert json.loads(left(tmp_path)["version"])["version"] == 2, "who was newest is told so when he is back"
        async with node_of(tmp_path, run.url) as node:
            assert node.statistics()["taken_over"]["mounts"] == 1


async def test_after_a_step_that_cannot_be_taken_back_the_old_version_refuses_to_start_and_touches_nothing(
    tmp_path: Path, registry: FakeRegistry, target: Path, become: Become
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        become(2, 2)
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:1", target)
        before = await in_thread(lambda: left(tmp_path))
        reader = asyncio.create_task(read(target / "b"))
        become(1, 1)
        with pytest.raises(Unsupported, match="this dadi knows version 1"):
            async with node_of(tmp_path, run.url):
                pass
        assert await in_thread(lambda: left(tmp_path)) == before
        assert not reader.done(), "it waits for the version that can go on, and does not fail"
        become(2, 2)
        async with node_of(tmp_path, run.url) as node:
            assert node.statistics()["taken_over"]["mounts"] == 1
            assert await reader == FILES["b"]
