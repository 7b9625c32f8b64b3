"""The node's lazy images for the snapshotter: prefixes of layers on the real kernel, restarts, nothing left behind."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi.errors import Conflict, NotFound, Unavailable
from dadi.node import kernel
from dadi.node.config import SnapshotterConfig
from dadi.node.node import Node
from dadi.oci.config import RegistryConfig
from tests.fakes.registry import FakeRegistry
from tests.lab.services import running, tar_of
from tests.system.test_node import in_thread, loops_below, node_of, nothing_stays_mounted, read

__all__ = ["nothing_stays_mounted"]
pytestmark = pytest.mark.root

BASE = tar_of(**{"a": b"base a", "b": b"base b", "dir/x": b"x"})
MIDDLE = tar_of(**{".wh.a": b"", "b": b"middle b", "dir/.wh..wh..opq": b"", "dir/y": b"y"})
TOP = tar_of(**{"a": b"top a"})
NOW = SnapshotterConfig(keep_idle=0)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [BASE, MIDDLE, TOP])
        yield fake


async def tree(directory: str) -> dict[str, bytes]:
    root = Path(directory)
    paths = await in_thread(lambda: sorted(path for path in root.rglob("*") if path.is_file()))
    return {str(path.relative_to(root)): await read(path) for path in paths}


def only(registry: FakeRegistry) -> RegistryConfig:
    return RegistryConfig(allowed=(registry.host,), plain_http=(registry.host,), retries=0)


async def app(node: Node, registry: FakeRegistry) -> str:
    return (await node.images.resolve(f"{registry.host}/team/app:1", None, [])).key


async def test_each_prefix_of_the_layers_is_mounted_as_an_image_of_its_own(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        key = await app(node, registry)
        one, two, three = [await node.images.mount(key, layers) for layers in (1, 2, 3)]
        assert await tree(one) == {"a": b"base a", "b": b"base b", "dir/x": b"x"}
        assert await tree(two) == {"b": b"middle b", "dir/y": b"y"}
        assert await tree(three) == {"a": b"top a", "b": b"middle b", "dir/y": b"y"}
        assert await node.images.mount(key, 2) == two, "made once"
        with pytest.raises(NotFound, match="has 3 layers, not 4"):
            await node.images.mount(key, 4)
        assert await node.images.usage(key, 0) > 0


async def test_a_release_waits_for_who_uses_it_and_then_leaves_nothing(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(
        tmp_path, run.url, snapshotter=NOW
    ) as node:
        key = await app(node, registry)
        directory = Path(await node.images.mount(key, 2))
        with (directory / "b").open("rb"):
            with pytest.raises(Conflict):
                await node.images.release(key, 2)
        await node.images.release(key, 2)
        await node.images.release(key, 2)
        assert not directory.exists()
        assert loops_below(tmp_path) == []
        held = node.store.statistics()["held"]
        await node.images.keep_only({key})
        assert node.store.statistics()["held"] == held
        await node.images.keep_only(set())
        assert node.store.statistics()["held"] == 0
        assert list((tmp_path / "node/state/images").iterdir()) == []
        with pytest.raises(NotFound, match="pull it again"):
            await node.images.mount(key, 2)


async def test_after_a_restart_images_are_known_and_mounted_without_upstream(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image("team/app", "1", [BASE, MIDDLE, TOP])
        async with node_of(tmp_path, registry=only(registry)) as node:
            key = await app(node, registry)
            before = await node.images.mount(key, 2)
            assert await tree(before) == {"b": b"middle b", "dir/y": b"y"}
    async with node_of(tmp_path, registry=only(registry)) as node:
        assert await node.images.mount(key, 2) == before
        assert await tree(before) == {"b": b"middle b", "dir/y": b"y"}
        assert await tree(await node.images.mount(key, 3)) == {"a": b"top a", "b": b"middle b", "dir/y": b"y"}
        with pytest.raises((Unavailable, NotFound)):
            await node.images.resolve(f"{registry.host}/team/unknown:1", None, [])


async def test_a_manifest_that_the_client_names_is_believed_rather_than_the_tag(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        old = await node.images.resolve(f"{registry.host}/team/app:1", None, [])
        manifest = (await run.image(f"{registry.host}/team/app:1")).manifest_digest
        registry.add_image("team/app", "1", [BASE])
        pinned = await node.images.resolve(f"{registry.host}/team/app:1", manifest, [])
        assert pinned == old
        assert len(pinned.chain_ids) == 3


async def test_an_image_that_somebody_else_unmounted_is_an_error_that_says_so(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        key = await app(node, registry)
        directory = await node.images.mount(key, 1)
        await in_thread(lambda: kernel.umount(directory))
        with pytest.raises(Conflict, match="unmounted by somebody else"):
            await node.images.mount(key, 1)
