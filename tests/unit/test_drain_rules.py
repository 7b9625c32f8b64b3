"""What a drain refuses, what it waits for, and what makes it hopeless; on the real kernel: `test_drain.py`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dadi.errors import ConfigError, Conflict, Unavailable
from dadi.node.devices import DeviceState
from dadi.node.drain import Drain


class World:
    """Everything around a drain: what is mounted, and what was done to the others."""

    def __init__(self) -> None:
        self.devices: list[Any] = []
        self.files = 0
        self.settled = True
        self.here: set[str] = set()
        self.done: list[str] = []
        self.refusing = False
        self.state = "idle"
        self.lost: list[str] = []
        me: Any = self
        self.drain = Drain(me, me, me, me, files=lambda: self.files, settled=lambda: self.settled,
                           lost=lambda: self.lost)  # fmt: skip

    def add(self, state: DeviceState, error: str | None = None) -> None:
        blob = SimpleNamespace(digest="sha256:aa", size=10)
        self.devices.append(SimpleNamespace(blob=blob, state=state, path="/dev/loop7", error=error))
        self.files += state is not DeviceState.LOCAL

    def lazy(self) -> list[Any]:
        return [device for device in self.devices if device.state is DeviceState.LAZY]

    def all(self) -> list[Any]:
        return self.devices

    def has(self, digest: str) -> bool:
        return digest in self.here

    def present_bytes(self, blob: Any) -> int:
        return 4

    async def hurry(self, on: bool) -> None:
        self.done.append("hurry" if on else "no hurry")

    async def stop_serving(self) -> None:
        self.done.append("left")

    async def resume(self) -> None:
        self.done.append("back")


async def events(world: World, timeout: float = 0.0) -> list[Any]:
    return [event async for event in world.drain.watch(timeout)]


async def test_with_nothing_lazy_it_only_leaves_the_others_and_comes_back() -> None:
    world = World()
    world.add(DeviceState.LOCAL)
    assert (await events(world))[-1]["state"] == "drained"
    assert (world.refusing, world.drain.state) == (True, "drained")
    await world.drain.end()
    await world.drain.end()
    assert (world.refusing, world.drain.state) == (False, "no")
    assert world.done == ["hurry", "left", "no hurry", "back"]


async def test_a_broken_device_cannot_be_drained_and_is_named() -> None:
    world = World()
    world.add(DeviceState.BROKEN, "it lied")
    with pytest.raises(Conflict, match=r"/dev/loop7 .*: it lied"):
        await events(world)
    assert "left" not in world.done, "the others may still need what is here"
    await world.drain.end()
    assert world.done == ["hurry", "no hurry"]


async def test_a_mount_that_is_being_made_is_waited_for_and_said() -> None:
    world = World()
    world.settled = False
    with pytest.raises(Unavailable, match="not drained after"):
        await events(world, 0.01)
    async for event in world.drain.watch(0):
        assert event["stage"] == "waiting for mounts that are being made, ended or restored"
        break
    world.settled = True
    assert (await events(world))[-1]["event"] == "drained"
    await world.drain.close()


async def test_only_what_is_all_here_may_be_mounted_meanwhile() -> None:
    world = World()
    index: Any = SimpleNamespace(device_blobs=lambda: [SimpleNamespace(digest="sha256:aa")])
    world.drain.admit(index)
    await world.drain.begin()
    with pytest.raises(Unavailable, match="being drained"):
        world.drain.admit(index)
    world.here.add("sha256:aa")
    world.drain.admit(index)
    await world.drain.close()


async def test_who_ends_it_ends_it_for_those_who_watch() -> None:
    world = World()
    world.add(DeviceState.LAZY)
    watching = world.drain.watch(0)
    assert (await anext(watching))["lazy_devices"] == 1
    await world.drain.end()
    with pytest.raises(Conflict, match="ended by somebody else"):
        await anext(watching)


async def test_a_lost_mount_whose_device_still_reads_through_us_is_named() -> None:
    world = World()
    world.files, world.lost = 1, ["the mount at /images/1 is lost: no upstream"]
    with pytest.raises(Conflict, match="/images/1 is lost: no upstream"):
        await events(world)
    assert world.drain.state == "draining", "it goes on: the mount may come back"
    world.files = 0
    assert (await events(world))[-1]["state"] == "drained", "nothing depends on us"
    await world.drain.close()


async def test_others_that_cannot_be_left_in_order_do_not_keep_it_from_its_end() -> None:
    world = World()

    async def fails() -> None:
        raise RuntimeError("a fault of ours")

    world.stop_serving = fails
    assert (await events(world))[-1]["state"] == "drained"
    await world.drain.close()


async def test_a_drain_is_over_though_the_others_cannot_be_served_again_at_once() -> None:
    world = World()
    await events(world)

    async def fails() -> None:
        raise ConfigError("its address has gone")

    world.resume = fails
    with pytest.raises(ConfigError, match="its address has gone"):
        await world.drain.end()
    assert (world.drain.state, world.refusing) == ("no", False)
    await world.drain.end()
