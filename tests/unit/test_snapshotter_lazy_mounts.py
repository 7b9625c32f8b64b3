"""Lazy layers: when they are made, what stands on them, when images are mounted and released, and bad days.

Longer than 400 lines: the life of a lazy layer from Prepare to its release, in that order.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from dadi.errors import AlreadyExists, InvalidRequest, NotFound, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.snapshotter.db import Database
from dadi.snapshotter.lazy_mounts import NOT_LAZY
from dadi.snapshotter.model import Kind, LazyLayer, Usage
from dadi.snapshotter.snapshots import Snapshots
from tests.fakes.lazy_images import FakeImages, Layer, NoImages, chain_ids, labels_for, sha

REF = "registry.example/team/app:1"
LAYERS: list[Layer] = [{"a": b"1", "gone": b"x"}, {"gone": None, "b": b"22"}, {"c": b"333"}]
CHAIN = chain_ids(LAYERS)


class World:
    """Snapshots with fake images, that can be opened anew."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.images = FakeImages(root / "images")
        self.images.add(REF, LAYERS)
        self.fallbacks = Fallbacks()
        self.options: dict[str, float] = {"keep_idle": 0.0}
        self.snapshots: Snapshots

    async def open(self) -> None:
        self.snapshots = await Snapshots.open(self.root, self.images, self.fallbacks, **self.options)
        await self.snapshots.cleanup()  # after the first sweep, so that tests know when one is

    async def restart(self) -> None:
        await self.snapshots.close()
        await self.open()

    async def pull(self, chain: list[str], reference: str = REF, namespace: str = "ns") -> list[str]:
        """Prepare the layers as containerd does; return the backend names, as containerd finds them."""
        parent, names = "", []
        for number, chain_id in enumerate(chain):
            with pytest.raises(AlreadyExists):
                await self.snapshots.prepare(
                    f"{namespace}/{number}/extract-{number} {chain_id}", parent, labels_for(chain_id, reference)
                )
            ask = f'labels."containerd.io/snapshot.ref"=={chain_id},parent=="{parent}"'
            (found,) = await self.snapshots.list([ask])
            assert found.kind is Kind.COMMITTED
            parent = found.name
            names.append(parent)
        return names

    def why(self) -> str:
        """Return why the last layer was not lazy."""
        (row,) = [row for row in self.fallbacks.statistics() if row["kind"] == NOT_LAZY]
        return str(row["why"])

    def image_directory(self, layers: int, reference: str = REF) -> str:
        return str(self.images.directory / f"{self.images.key(reference)[7:19]}-{layers}")

    def directories(self) -> list[str]:
        return sorted(os.listdir(self.root / "snapshots"))


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.open()
    yield world
    await world.snapshots.close()


def lowers(mounts: list[object]) -> list[str]:
    (mount,) = mounts
    (found,) = [option for option in mount.options if option.startswith("lowerdir=")]
    return found.removeprefix("lowerdir=").split(":")


async def until(true: Callable[[], bool]) -> None:
    while not true():
        await asyncio.sleep(0)


# ---- making


async def test_a_lazy_layer_is_committed_with_all_that_is_known_before_it_exists(world: World) -> None:
    labels = labels_for(CHAIN[0], REF, "sha256:m", ("sha256:l1", "sha256:l2"))
    with pytest.raises(AlreadyExists):
        await world.snapshots.prepare("ns/1/extract", "", labels)
    await world.restart()
    (info,) = await world.snapshots.list([])
    assert (info.kind, info.parent, info.labels) == (Kind.COMMITTED, "", labels)
    stored = await world.snapshots._kept(Database.get, info.name)
    assert stored.lazy == LazyLayer(world.images.key(REF), 1, CHAIN[0], REF, "sha256:m", "sha256:l1")
    assert world.images.mounted == [], "nothing is mounted before something stands on it"
    assert world.directories() == []
    assert world.snapshots.statistics()["lazy"] == 1


async def test_asking_again_finds_it_without_asking_the_node(world: World) -> None:
    names = await world.pull(CHAIN)
    assert world.images.calls["resolve"] == 3
    await world.restart()
    assert await world.pull(CHAIN) == names
    assert world.images.calls["resolve"] == 3
    assert len(await world.snapshots.list([])) == 3


async def test_a_layer_whose_label_was_changed_is_made_again(world: World) -> None:
    (name,) = await world.pull(CHAIN[:1])
    await world.snapshots.update(name, {}, ["labels"])
    (other,) = await world.pull(CHAIN[:1])
    assert other != name


async def test_the_same_layer_on_another_parent_is_another_snapshot(world: World) -> None:
    await world.snapshots.prepare("p", "", {})
    await world.snapshots.commit("ns/1/ordinary", "p", {})
    lazily = await world.pull(CHAIN[:2])
    with pytest.raises(AlreadyExists):
        await world.snapshots.prepare("k", "ns/1/ordinary", labels_for(CHAIN[1], REF))
    parents = {info.parent for info in await world.snapshots.list([f'labels."containerd.io/snapshot.ref"=={CHAIN[1]}'])}
    assert parents == {"ns/1/ordinary", lazily[0]}


@pytest.mark.parametrize(
    ("labels", "parent", "why"),
    [
        (labels_for(CHAIN[0]), "", "does not say of which image"),
        (labels_for(CHAIN[0], "registry.example/none"), "", "there is no image"),
        (labels_for(sha("another"), REF), "", "has no such layer"),
        (labels_for(CHAIN[1], REF), "", "lacks a parent"),
        (labels_for(CHAIN[0], REF), "base", "has a parent"),
        (labels_for(CHAIN[2], REF), "lazy", "another layer than in the image"),
    ],
)
async def test_what_cannot_be_lazy_is_an_ordinary_layer_and_said_so(
    world: World, labels: dict[str, str], parent: str, why: str
) -> None:
    await world.snapshots.prepare("base-active", "", {})
    await world.snapshots.commit("base", "base-active", {})
    names = {"": "", "base": "base"}
    if parent == "lazy":
        (names["lazy"],) = await world.pull(CHAIN[:1])
    before = world.snapshots.statistics()["layers"]["ordinary"]
    (mount,) = await world.snapshots.prepare("key", names[parent], labels)
    assert mount.type == ("overlay" if parent else "bind")
    assert (await world.snapshots.stat("key")).kind is Kind.ACTIVE
    assert why in world.why()
    assert world.snapshots.statistics()["layers"]["ordinary"] == before + 1


async def test_a_client_that_does_not_ask_for_lazy_layers_is_noted(world: World) -> None:
    await world.snapshots.prepare(f"ns/1/extract-123-ab {CHAIN[0]}", "", {})
    assert "the client does not ask" in world.why()
    await world.snapshots.prepare("ns/2/container", "", {})
    assert world.snapshots.statistics()["layers"] == {"lazy": 0, "ordinary": 1}


async def test_a_parent_that_is_not_there_or_not_committed_is_an_error_and_no_fallback(world: World) -> None:
    await world.snapshots.prepare("active", "", {})
    with pytest.raises(NotFound):
        await world.snapshots.prepare("key", "none", labels_for(CHAIN[1], REF))
    with pytest.raises(InvalidRequest):
        await world.snapshots.prepare("key", "active", labels_for(CHAIN[1], REF))
    assert world.fallbacks.statistics() == []


async def test_a_fault_in_the_node_does_not_fail_the_pull(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> None:
        raise RuntimeError("a fault")

    monkeypatch.setattr(world.images, "resolve", broken)
    with capture_logs() as logs:
        assert await world.snapshots.prepare("key", "", labels_for(CHAIN[0], REF))
    assert logs[0]["exc_info"]
    assert "a fault of ours: RuntimeError" in world.why()


async def test_without_a_node_everything_is_ordinary(tmp_path: Path) -> None:
    fallbacks = Fallbacks()
    snapshots = await Snapshots.open(tmp_path, NoImages(), fallbacks)
    assert await snapshots.prepare("key", "", labels_for(CHAIN[0], REF))
    assert fallbacks.statistics()[0]["kind"] == NOT_LAZY
    await snapshots.close()


# ---- standing on lazy layers


async def test_a_container_has_one_lower_directory_whatever_the_number_of_layers(world: World) -> None:
    names = await world.pull(CHAIN)
    assert lowers(await world.snapshots.prepare("container", names[-1], {})) == [world.image_directory(3)]
    (view,) = await world.snapshots.view("view", names[-1], {})
    assert (view.type, view.source, view.options) == ("bind", world.image_directory(3), ("ro", "rbind"))
    assert sorted(path.name for path in Path(world.image_directory(3)).iterdir()) == ["a", "b", "c"]
    assert world.images.calls["made"] == 1


async def test_a_part_of_a_chain_is_a_mount_of_just_these_layers(world: World) -> None:
    names = await world.pull(CHAIN)
    assert lowers(await world.snapshots.prepare("container", names[0], {})) == [world.image_directory(1)]
    assert sorted(path.name for path in Path(world.image_directory(1)).iterdir()) == ["a", "gone"]


async def test_ordinary_layers_above_lazy_ones_come_first(world: World) -> None:
    names = await world.pull(CHAIN)
    await world.snapshots.prepare("k1", names[1], {})
    await world.snapshots.commit("o1", "k1", {})
    await world.snapshots.prepare("k2", "o1", {})
    await world.snapshots.commit("o2", "k2", {})
    upper = [str(world.root / "snapshots" / number / "fs") for number in ("5", "4")]
    assert lowers(await world.snapshots.prepare("container", "o2", {})) == [*upper, world.image_directory(2)]
    assert lowers(await world.snapshots.view("view", "o2", {})) == [*upper, world.image_directory(2)]


async def test_an_image_from_another_stands_on_its_own_mount_only(world: World) -> None:
    more = [*LAYERS, {"d": b"4"}]
    world.images.add("registry.example/derived", more)
    base = await world.pull(CHAIN)
    with pytest.raises(AlreadyExists):
        await world.snapshots.prepare("k", base[-1], labels_for(chain_ids(more)[-1], "registry.example/derived"))
    (top,) = await world.snapshots.list([f'parent=="{base[-1]}"'])
    directory = world.image_directory(4, "registry.example/derived")
    assert lowers(await world.snapshots.prepare("container", top.name, {})) == [directory]
    assert len(world.images.mounted) == 1


async def test_a_lazy_layer_above_ordinary_ones_hides_them(world: World) -> None:
    await world.snapshots.prepare("p", "", {})
    await world.snapshots.commit("ordinary", "p", {})
    with pytest.raises(AlreadyExists):
        await world.snapshots.prepare("k", "ordinary", labels_for(CHAIN[1], REF))
    (lazy,) = await world.snapshots.list(["parent==ordinary"])
    assert lowers(await world.snapshots.prepare("container", lazy.name, {})) == [world.image_directory(2)]


async def test_a_hundred_containers_share_one_mount(world: World) -> None:
    names = await world.pull(CHAIN)
    await asyncio.gather(*(world.snapshots.prepare(f"c{number}", names[-1], {}) for number in range(100)))
    assert world.images.calls["made"] == 1
    assert len(world.images.mounted) == 1
    assert world.snapshots.statistics()["active"] == 100


async def test_usage_of_a_lazy_layer_is_what_the_node_has_of_it(world: World) -> None:
    names = await world.pull(CHAIN)
    assert [await world.snapshots.usage(name) for name in names] == [Usage(2, 0), Usage(2, 0), Usage(3, 0)]
    world.images.failure = Unavailable("not now")
    assert await world.snapshots.usage(names[0]) == Usage(0, 0)


# ---- mounts come and go


async def test_mounts_are_found_again_after_a_restart_and_made_again_after_a_reboot(world: World) -> None:
    names = await world.pull(CHAIN)
    mounts = await world.snapshots.prepare("container", names[-1], {})
    await world.restart()
    assert await world.snapshots.mounts("container") == mounts
    assert world.images.calls["made"] == 1
    await world.images.release(world.images.key(REF), 3)  # what a reboot does
    await world.restart()
    assert await world.snapshots.mounts("container") == mounts
    assert world.images.calls["made"] == 2


async def test_nothing_is_left_when_all_is_removed(world: World) -> None:
    names = await world.pull(CHAIN)
    await world.snapshots.prepare("k", names[1], {})
    await world.snapshots.commit("o", "k", {})
    await world.snapshots.prepare("container", "o", {})
    await world.snapshots.view("view", names[2], {})
    await world.snapshots.cleanup()
    assert len(world.images.mounted) == 2
    for name in ("container", "o", "view", *reversed(names)):
        await world.snapshots.remove(name)
    assert len(world.images.mounted) == 2, "only clean-up takes down"
    await world.snapshots.cleanup()
    assert world.images.mounted == []
    assert world.directories() == []
    assert await world.snapshots._kept(Database.mounts) == []


async def test_a_mount_on_which_nothing_stands_is_kept_for_a_while(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.options["keep_idle"] = 1000
    await world.open()
    now = [0.0]
    world.snapshots.lazy._clock = lambda: now[0]
    names = await world.pull(CHAIN)
    await world.snapshots.prepare("container", names[-1], {})
    await world.snapshots.remove("container")
    await world.snapshots.cleanup()
    now[0] = 999
    await world.snapshots.cleanup()
    assert len(world.images.mounted) == 1
    await world.snapshots.prepare("again", names[-1], {})
    await world.snapshots.remove("again")
    now[0] = 1500
    await world.snapshots.cleanup()
    assert len(world.images.mounted) == 1, "the time began anew"
    now[0] = 2500
    await world.snapshots.cleanup()
    assert world.images.mounted == []
    await world.snapshots.prepare("and again", names[-1], {})
    assert len(world.images.mounted) == 1
    for name in ("and again", *reversed(names)):
        await world.snapshots.remove(name)
    await world.snapshots.cleanup()
    assert world.images.mounted == [], "at once when the image is gone"
    await world.snapshots.close()


async def test_a_mount_that_is_busy_is_released_by_a_later_sweep(world: World) -> None:
    names = await world.pull(CHAIN[:1])
    await world.snapshots.prepare("container", names[0], {})
    place = (world.images.key(REF), 1)
    world.images.in_use.add(place)
    await world.snapshots.remove("container")
    await world.snapshots.cleanup()
    assert len(world.images.mounted) == 1
    world.images.in_use.clear()
    await world.restart()
    assert world.images.mounted == []


async def test_an_image_that_is_being_released_is_mounted_anew_for_a_container_that_comes(world: World) -> None:
    names = await world.pull(CHAIN)
    await world.snapshots.prepare("first", names[-1], {})
    await world.snapshots.remove("first")
    async with asyncio.TaskGroup() as group:
        group.create_task(world.snapshots.cleanup())
        second = group.create_task(world.snapshots.prepare("second", names[-1], {}))
    await world.snapshots.cleanup()
    assert lowers(second.result()) == [world.image_directory(3)]
    assert len(world.images.mounted) == 1


# ---- bad days


async def test_a_mount_that_fails_leaves_no_snapshot(world: World) -> None:
    names = await world.pull(CHAIN)
    world.images.failure = Unavailable("the superpeer is away")
    with pytest.raises(Unavailable):
        await world.snapshots.prepare("container", names[-1], {})
    with pytest.raises(NotFound):
        await world.snapshots.stat("container")
    assert world.directories() == []
    world.images.failure = None
    await world.snapshots.prepare("container", names[-1], {})


async def cancelled(task: asyncio.Task[object]) -> None:
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task
    assert task.cancelled()


async def test_a_prepare_that_is_cancelled_while_resolving_leaves_nothing_and_does_not_harm_others(
    world: World,
) -> None:
    world.images.gate = asyncio.Event()
    tasks = [
        asyncio.create_task(world.snapshots.prepare(f"k{number}", "", labels_for(CHAIN[0], REF))) for number in range(3)
    ]
    await until(lambda: world.images.calls["resolve"] == 1 and world.snapshots.lazy._resolving.joined == 2)
    await cancelled(tasks[0])
    world.images.gate.set()
    done = await asyncio.gather(*tasks[1:], return_exceptions=True)
    assert [type(result) for result in done] == [AlreadyExists, AlreadyExists]
    assert world.images.calls["resolve"] == 1
    assert world.directories() == []


async def test_a_prepare_that_is_cancelled_while_mounting_leaves_nothing_and_does_not_harm_others(world: World) -> None:
    names = await world.pull(CHAIN)
    world.images.gate = asyncio.Event()
    tasks = [asyncio.create_task(world.snapshots.prepare(f"c{number}", names[-1], {})) for number in range(3)]
    await until(lambda: world.images.calls["mount"] == 1)
    while world.snapshots.statistics()["active"] != 3:
        await asyncio.sleep(0)
    await cancelled(tasks[0])
    assert world.snapshots.statistics()["active"] == 2
    world.images.gate.set()
    assert lowers(await tasks[1]) == lowers(await tasks[2]) == [world.image_directory(3)]
    with pytest.raises(NotFound):
        await world.snapshots.stat("c0")
    assert len(world.directories()) == 2


@pytest.mark.parametrize("steps", range(12))
async def test_a_prepare_that_is_cancelled_anywhere_leaves_all_or_nothing(world: World, steps: int) -> None:
    (name,) = await world.pull(CHAIN[:1])
    task = asyncio.create_task(world.snapshots.prepare("container", name, {}))
    for _ in range(steps):
        await asyncio.sleep(0.0005 if steps % 2 else 0)
    task.cancel()
    done = await asyncio.gather(task, return_exceptions=True)
    there = await world.snapshots.list(["name==container"])
    assert len(there) == (0 if isinstance(done[0], asyncio.CancelledError) else 1)
    await world.snapshots.cleanup()
    assert len(world.directories()) == len(there)


async def test_a_full_disk_fails_the_prepare_and_leaves_nothing(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        with pytest.raises(StoreFull):
            await world.snapshots.prepare("key", "", {})
    assert world.directories() == []
    assert await world.snapshots.prepare("key", "", {})


async def test_a_node_whose_directory_cannot_be_an_option_is_refused(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = await world.pull(CHAIN)

    async def colon(*_: object) -> str:
        return "/run/image:1"

    monkeypatch.setattr(world.images, "mount", colon)
    with pytest.raises(Exception, match="cannot be a lower directory"):
        await world.snapshots.prepare("container", names[-1], {})
    assert world.directories() == []


async def test_a_mount_is_told_from_what_its_image_can_be_resolved_again(world: World) -> None:
    with pytest.raises(AlreadyExists):
        await world.snapshots.prepare("ns/1/extract", "", labels_for(CHAIN[0], REF, "sha256:m"))
    (info,) = await world.snapshots.list([])
    await world.snapshots.prepare("container", info.name, {})
    assert world.images.origins == [(REF, "sha256:m", CHAIN[0])]


async def test_a_release_that_fails_by_a_fault_stops_neither_the_others_nor_the_sweeps(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = await world.pull(CHAIN[:2])
    for name in names:
        await world.snapshots.prepare(f"on {name}", name, {})
        await world.snapshots.remove(f"on {name}")
    release = world.images.release

    async def broken(key: str, layers: int) -> None:
        if layers == 1:
            raise OSError(16, "busy")
        await release(key, layers)

    monkeypatch.setattr(world.images, "release", broken)
    world.images.kept = None
    with capture_logs() as logs:
        await world.snapshots.cleanup()
    assert [row["exc_info"].errno for row in logs if row.get("exc_info")] == [16]
    assert [Path(name).name[-2:] for name in world.images.mounted] == ["-1"]
    assert world.images.kept == {world.images.key(REF)}


async def test_sweeps_go_on_after_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    swept = asyncio.Event()
    calls = []

    async def broken(self: Snapshots) -> None:
        calls.append(self)
        if len(calls) == 1:
            raise RuntimeError("a fault")
        swept.set()

    monkeypatch.setattr(Snapshots, "cleanup", broken)
    with capture_logs() as logs:
        snapshots = await Snapshots.open(tmp_path, NoImages(), Fallbacks(), sweep_every=0)
        await asyncio.wait_for(swept.wait(), 5)
        await snapshots.close()
    assert logs[0]["exc_info"]


async def test_a_layer_does_not_wait_for_ever_for_its_image_nor_the_next_one_anew(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    world.images.gate = asyncio.Event()
    monkeypatch.setattr("dadi.snapshotter.lazy_mounts.PATIENCE", 0.01)
    await world.snapshots.prepare("k0", "", labels_for(CHAIN[0], REF))
    assert "still not resolved" in world.why()
    monkeypatch.setattr("dadi.snapshotter.lazy_mounts.PATIENCE", 600.0)
    world.snapshots.lazy._clock = lambda: asyncio.get_running_loop().time() + 700
    await world.snapshots.prepare("k1", "", labels_for(CHAIN[0], REF))
    assert world.images.calls["resolve"] == 1
    world.images.gate.set()
    await until(lambda: not world.snapshots.lazy._resolving_since)
    for key in ("k0", "k1"):
        await world.snapshots.remove(key)
    await world.pull(CHAIN)


async def test_closing_ends_what_is_under_way(world: World) -> None:
    world.images.gate = asyncio.Event()
    waiting: Awaitable[object] = asyncio.create_task(world.snapshots.prepare("k", "", labels_for(CHAIN[0], REF)))
    await until(lambda: world.images.calls["resolve"] == 1)
    await world.snapshots.close()
    with pytest.raises(asyncio.CancelledError):
        await waiting
