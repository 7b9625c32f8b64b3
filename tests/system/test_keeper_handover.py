"""What a node finds that an earlier process has left: what cannot be taken over, what was half done, who is dying yet.

In this process, where one can look inside; with processes of their own: `test_keeper_restarts.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from dadi import locks
from dadi.errors import Unavailable, Unsupported
from dadi.keeper import client
from dadi.keeper.client import KeeperProcess
from dadi.keeper.store import close_all
from dadi.node import fuse_mount, handover, kernel, loop
from dadi.node.config import BackfillConfig, ReadConfig
from dadi.node.records import MountRecord
from fuse.session import Session
from tests.fakes.registry import FakeRegistry
from tests.lab.mounting import in_thread, loops_below, mounted, node_of, read
from tests.lab.restarts import keepers
from tests.lab.services import CHUNK, running, tar_of
from tests.lab.waiting import until, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(240)]

FILE = random.Random(0).randbytes(1200 * CHUNK + 77)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "0", [tar_of(small=b"small"), tar_of(data=FILE)])
        yield fake


def change_text(tmp_path: Path, change: Callable[[bytes], bytes]) -> None:
    keeper = KeeperProcess.connect(tmp_path / "node/run/keeper.sock")
    taken = keeper.take()
    fd, text = taken["fuse"]
    keeper.put("fuse", fd, change(text))
    close_all(taken)
    keeper.close()


async def test_a_state_that_is_damaged_is_refused_aloud_and_all_is_mounted_anew(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:0", target)
        await in_thread(lambda: change_text(tmp_path, lambda _: b"\xff\x00"))
        async with node_of(tmp_path, run.url) as again:
            (note,) = [row for row in again.fallbacks.statistics() if row["kind"] == "lazy mounts not taken over"]
            assert "damaged" in note["why"]
            assert again.statistics()["taken_over"] == {"mounts": 0, "devices": 0}
            assert again.statistics()["mounts"][0]["state"] == "lazy"
            assert await read(target / "data") == FILE


async def test_a_version_that_is_too_old_refuses_to_start_and_readers_go_on_with_the_one_that_is_not(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    def of_version(version: int, since: int) -> Callable[[bytes], bytes]:
        return lambda text: msgspec.json.encode(
            {**msgspec.json.decode(text), "version": version, "since": since, "new": [1]}
        )

    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:0", target)
        reader = asyncio.create_task(read(target / "data"))
        await in_thread(lambda: change_text(tmp_path, of_version(3, 2)))
        with pytest.raises(Unsupported, match="version 3, for version 2 or newer; this dadi knows version 1"):
            async with node_of(tmp_path, run.url):
                pass
        assert not reader.done()
        await in_thread(lambda: change_text(tmp_path, of_version(2, 1)))  # one step: what it adds may be ignored
        async with node_of(tmp_path, run.url) as again:
            assert again.statistics()["taken_over"] == {"mounts": 1, "devices": 2}
            assert await reader == FILE


async def test_what_cannot_be_taken_over_fails_its_readers_although_somebody_still_has_its_descriptor(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    """A process that is dying, or an orphaned keeper: nobody would ever answer them."""
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:0", target)
        reader = asyncio.create_task(read(target / "data"))
        keeper = await in_thread(lambda: KeeperProcess.connect(tmp_path / "node/run/keeper.sock"))
        orphaned = await in_thread(keeper.take)
        await in_thread(lambda: change_text(tmp_path, lambda _: b"damaged"))
        try:
            async with node_of(tmp_path, run.url) as again:
                with pytest.raises(OSError, match="Input/output error"):
                    await reader
                assert again.statistics()["mounts"][0]["state"] == "lazy"
                assert await read(target / "data") == FILE
        finally:
            close_all(orphaned)
            keeper.close()


async def test_a_keeper_that_does_not_answer_is_waited_for_and_its_mount_never_mounted_over(
    tmp_path: Path, registry: FakeRegistry, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PATIENCE", 0.2)
    monkeypatch.setattr(handover, "_AGAIN", 0.05)
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:0", target)
        place = tmp_path / "node/run/fuse"
        stood = await in_thread(lambda: kernel.mounted_at(place))
        (keeper,) = keepers(tmp_path)
        os.kill(keeper, signal.SIGSTOP)
        try:
            with monkeypatch.context() as patch:
                patch.setattr(handover, "_PATIENCE", 0.3)
                with pytest.raises(Unavailable, match="a FUSE mount stands on"):
                    async with node_of(tmp_path, run.url):
                        pass
            assert await in_thread(lambda: kernel.mounted_at(place)) == stood
            stack = contextlib.AsyncExitStack()
            starting = asyncio.create_task(stack.enter_async_context(node_of(tmp_path, run.url)))
            done, _ = await asyncio.wait([starting], timeout=1)
            assert not done
        finally:
            os.kill(keeper, signal.SIGCONT)
        async with stack:
            again = await starting
            assert again.statistics()["taken_over"]["mounts"] == 1
            assert "dadi-keeper does not answer" in {row["kind"] for row in again.fallbacks.statistics()}
            assert await read(target / "data") == FILE


async def test_a_mount_that_a_dying_process_makes_after_we_looked_is_undone_too(
    tmp_path: Path, registry: FakeRegistry, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:0", target)
        (file,) = (tmp_path / "node/state/mounts").glob("*.json")
        record = msgspec.json.decode(file.read_bytes(), type=MountRecord)
        file.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, step="mounting")))
        dying = True
        monkeypatch.setattr(locks.Lock, "predecessor_is_dying", property(lambda lock: dying))
        async with contextlib.AsyncExitStack() as held:
            for name in record.devices:  # its call in the kernel has them open
                held.callback((await in_thread(partial(loop.adopt, name))).close)
            again = await held.enter_async_context(node_of(tmp_path, run.url))
            await in_thread(lambda: wait_until(lambda: not kernel.is_mounted(target)))
            assert list(again.mounts.table.unfinished) == [str(target)]
            await in_thread(lambda: kernel.mount_erofs(record.devices[0], target, record.devices[1:]))
            dying = False
            await until(lambda: not again.mounts.table.unfinished)
            assert not await in_thread(lambda: kernel.is_mounted(target))
            assert list(file.parent.iterdir()) == []
        assert loops_below(tmp_path) == []


async def test_what_a_dying_process_may_have_taken_is_asked_for_while_it_is_dying(
    tmp_path: Path, registry: FakeRegistry, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The read that another thread of it waits for may be the one that it took."""
    monkeypatch.setattr(fuse_mount, "_RESEND_AFTER", 0.1)
    resent: list[bool] = []
    dying = True
    real = Session.resend

    def resend(session: Session) -> None:
        resent.append(dying)
        real(session)

    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:0", target)
        monkeypatch.setattr(Session, "resend", resend)
        monkeypatch.setattr(locks.Lock, "predecessor_is_dying", property(lambda lock: dying))
        async with node_of(tmp_path, run.url):
            await until(lambda: len(resent) >= 3)
            dying = False
            await until(lambda: not resent[-1])
            assert await read(target / "data") == FILE
        assert resent[:3] == [True] * 3


async def test_adopted_blobs_are_known_to_other_nodes_before_the_first_heartbeat(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:0", target)
            blobs = {device.blob.digest for device in node.devices.all()}
        async with node_of(tmp_path, run.url) as again:
            assert again.statistics()["taken_over"]["mounts"] == 1
            assert again.peering is not None
            assert blobs <= set(again.peering.parents.membership.blobs)


@pytest.mark.parametrize(("step", "stays"), [("mounting", False), ("unmounting", False), ("unmounting", True)])
async def test_what_a_killed_process_had_half_done_is_undone_or_ended(
    tmp_path: Path, registry: FakeRegistry, target: Path, step: str, stays: bool
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:0", target)
        (file,) = (tmp_path / "node/state/mounts").glob("*.json")
        record = msgspec.json.decode(file.read_bytes(), type=MountRecord)
        file.write_bytes(msgspec.json.encode(msgspec.structs.replace(record, step=step)))
        (file.parent / "x.json.1-2.new").write_bytes(b"half")
        user = await in_thread(lambda: os.open(target, os.O_RDONLY | os.O_DIRECTORY)) if stays else -1
        async with node_of(tmp_path, run.url) as again:
            await until(lambda: not again.mounts.table.unfinished)
            assert [row["directory"] for row in again.statistics()["mounts"]] == [str(target)] * stays
            assert await in_thread(lambda: kernel.is_mounted(target)) is stays
            assert len(list(file.parent.iterdir())) == stays, "and nothing half-written"
            if stays:
                assert await read(target / "data") == FILE
                os.close(user)
        assert loops_below(tmp_path) == []


async def test_what_came_whole_while_nobody_was_left_to_swap_is_swapped_by_the_next(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:0", target)
            for device in node.devices.lazy():
                await node.chain.read(device.blob, range(device.blob.table.count))
                await node.store.finish(device.blob)
        async with node_of(tmp_path, run.url, backfill=BackfillConfig(enabled=False)) as again:
            assert again.statistics()["taken_over"]["mounts"] == 1
            assert again.statistics()["mounts"][0]["state"] == "local"
            assert again.session.statistics()["files"] == 0
            assert await read(target / "data") == FILE


async def test_patience_counts_from_when_the_new_process_has_the_read(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with running(tmp_path / "superpeer", registry.host) as run:
            node = await stack.enter_async_context(node_of(tmp_path, run.url, unmount_on_stop=False))
            await mounted(node, f"{registry.host}/team/app:0", target)
        reader = asyncio.create_task(read(target / "data"))
        await until(lambda: node.statistics()["waiting"]["for_upstream"] > 0)
        await stack.aclose()
    done, _ = await asyncio.wait([reader], timeout=0.6)
    assert not done, "nobody is there to be impatient"
    async with node_of(tmp_path, run.url, read=ReadConfig(patience=0.3, connect=0.1)) as again:
        with pytest.raises(OSError, match="Input/output error"):
            await reader
        assert again.statistics()["reads"]["resent"] >= 1
