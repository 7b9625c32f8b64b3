"""The node's lazy images for the snapshotter: prefixes of layers on the real kernel, restarts, nothing left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi.errors import Conflict, NotFound, StoreFull, Unavailable
from dadi.node import images as images_module
from dadi.node import kernel
from dadi.node.config import SnapshotterConfig
from dadi.node.node import Node
from dadi.oci.config import RegistryConfig
from tests.fakes.registry import FakeRegistry
from tests.lab.mounting import in_thread, loops_below, node_of, read
from tests.lab.services import running, tar_of

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
        with pytest.raises(Conflict, match="has 3 layers, not 4"):
            await node.images.mount(key, 4)
        assert await node.images.usage(key, 0) > 0


async def test_a_release_waits_for_who_uses_it_and_then_leaves_nothing(tmp_path: Path, registry: FakeRegistry) -> None:
    async with (
        running(tmp_path / "superpeer", registry.host) as run,
        node_of(tmp_path, run.url, snapshotter=NOW) as node,
    ):
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
        with pytest.raises(Conflict, match="pull it again"):
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


async def test_an_image_that_somebody_else_unmounted_is_mounted_again(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        key = await app(node, registry)
        directory = await node.images.mount(key, 1)
        await in_thread(lambda: kernel.umount(directory))
        assert await node.images.mount(key, 1) == directory
        assert await tree(directory) == {"a": b"base a", "b": b"base b", "dir/x": b"x"}


async def test_an_image_whose_record_is_lost_is_resolved_again_from_what_its_snapshot_says(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    reference = f"{registry.host}/team/app:1"
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url) as node:
            key = await app(node, registry)
        (record,) = (tmp_path / "node/state/images").iterdir()
        record.write_bytes(b"{rotten")
        (tmp_path / "node/state/images/half.json.1-1.new").touch()
        async with node_of(tmp_path, run.url) as node:
            assert list((tmp_path / "node/state/images").iterdir()) == []
            with pytest.raises(Conflict, match="not known"):
                await node.images.mount(key, 2)
            directory = await node.images.mount(key, 2, reference)
            assert await tree(directory) == {"b": b"middle b", "dir/y": b"y"}
            assert record.exists()


async def test_an_image_whose_index_was_made_anew_keeps_its_old_key_if_its_layers_are_the_same(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    reference, old = f"{registry.host}/team/app:1", "sha256:" + "0" * 64
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, snapshotter=NOW) as node:
            chain = (await node.images.resolve(reference, None, [])).chain_ids
            with pytest.raises(Conflict, match="other layers by now"):
                await node.images.mount(old, 2, reference, None, chain[0])
            with pytest.raises(Unavailable, match="cannot mount"):
                await node.images.mount(old, 2, f"{registry.host}/team/none:1", None, chain[1])
            directory = await node.images.mount(old, 2, reference, None, chain[1])
            assert "0000-2" in directory
            await node.images.keep_only({old})
        async with node_of(tmp_path, run.url) as node:
            assert await node.images.mount(old, 2) == directory
            assert await tree(directory) == {"b": b"middle b", "dir/y": b"y"}
            assert await node.images.usage(old, 1) > 0


async def test_what_was_resolved_just_now_is_kept_even_if_nothing_was_asked(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with (
        running(tmp_path / "superpeer", registry.host) as run,
        node_of(tmp_path, run.url, snapshotter=SnapshotterConfig(keep_idle=1000)) as node,
    ):
        key = await app(node, registry)
        node.images._touched[key] -= 2000
        assert await app(node, registry) == key
        await node.images.keep_only(set())
        assert await node.images.usage(key, 0) >= 0
        node.images._touched[key] -= 2000
        await node.images.keep_only(set())
        assert node.images._names == {}
        assert node.store.statistics()["held"] == 0


async def test_tags_of_one_image_that_are_resolved_at_once_hold_it_once(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add_image("team/app", "2", [BASE, MIDDLE, TOP])
    async with (
        running(tmp_path / "superpeer", registry.host) as run,
        node_of(tmp_path, run.url, snapshotter=NOW) as node,
    ):
        tags = [f"{registry.host}/team/app:{tag}" for tag in (1, 2, 1)]
        one, *others = await asyncio.gather(*(node.images.resolve(tag, None, []) for tag in tags))
        assert others == [one, one]
        held = node.store.statistics()["held"]
        assert held >= 5, "index, metadata, and the indexes of three layers"
        await node.images.keep_only({one.key})
        assert node.store.statistics()["held"] == held
        await node.images.keep_only(set())
        assert node.store.statistics()["held"] == 0


async def test_a_record_that_cannot_be_written_leaves_nothing_held_and_is_not_tried_at_once_again(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    writes = []

    def full(path: Path, _: bytes) -> None:
        writes.append(path)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(images_module, "write_durably", full)
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        for _ in range(3):
            with pytest.raises(StoreFull):
                await app(node, registry)
        assert len(writes) == 1
        assert node.store.statistics()["held"] == 0
        assert (node.images._images, node.images._indexes, node.images._held) == ({}, {}, {})


async def test_a_directory_that_is_not_empty_is_a_conflict(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        key = await app(node, registry)
        directory = node.images._directory(key, 1)
        (directory / "x").mkdir(parents=True)
        with pytest.raises(Conflict, match="not empty"):
            await node.images.release(key, 1)
