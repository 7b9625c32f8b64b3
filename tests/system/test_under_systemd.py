"""Our programs under a real systemd, by the units that `dadi install-units` writes: whatever happens, reads go on.

The systemd is this machine's, usually older than `FileDescriptorStorePreserve=`: so `dadi-keeper` holds the FUSE mount
by the one unit, and systemd's own store by the other, over restarts (which older ones do, too) but not over a stop.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

import pytest

from dadi.cli.client import NodeClient
from dadi.fallbacks import Fallbacks
from dadi.index.image import decode
from dadi.peers.superpeer import SuperpeerClient, image_answer
from dadi.units import texts
from tests.fakes.registry import FakeRegistry
from tests.lab import systemd
from tests.lab.cleanup import Lab
from tests.lab.mounting import in_thread
from tests.lab.network import free_ports
from tests.lab.processes import REPOSITORY, LabFailed
from tests.lab.restarts import Readers
from tests.lab.services import CHUNK, PLATFORM, running, tar_of
from tests.lab.systemd import Systemd
from tests.lab.waiting import until, wait_until

pytestmark = [
    pytest.mark.root, pytest.mark.timeout(240),
    pytest.mark.skipif(bool(systemd.lacking()), reason=f"no systemd to run under: {systemd.lacking()}"),
]  # fmt: skip
DATA = random.Random(1).randbytes(300 * CHUNK + 77)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [tar_of(data=DATA)])
        yield fake


class Machine:
    """A systemd with the unit of one of our programs. What it needs, our source too, is below /opt: units hide /tmp."""

    def __init__(self, lab: Lab, program: str, change: Callable[[str], str], version: int, configuration: str) -> None:
        opt, state = lab.root / "opt", lab.root / "state"
        (opt / "source").mkdir(parents=True)
        python = sys.executable.replace(f"{REPOSITORY}/", "/opt/source/")
        (state / "dadi").mkdir(parents=True)
        module = {"dadi-node": "dadi.node", "dadi-superpeer": "superpeer.main",
                  "dadi-registry-proxy": "registry_proxy.main"}[program]  # fmt: skip
        (opt / program).write_text(f'#!/bin/sh\nPYTHONPATH=/opt/source exec {python} -m {module} "$@"\n')
        (opt / program).chmod(0o755)
        (opt / "config.toml").write_text(configuration)
        place = f"/etc/dadi/{program.removeprefix('dadi-')}.toml"
        text = changed((place, "/opt/config.toml"))(texts.unit(program, version, "/opt"))
        self.unit = f"{program}.service"
        self.systemd = Systemd(lab, {self.unit: change(text)}, {
            "/var/lib": state, "/opt": opt, "/opt/source": REPOSITORY})  # fmt: skip
        self.mounted = lab.root / "mnt"
        self.mounted.mkdir()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have systemd run, and the unit started: `systemctl start` returns when it is ready, as it says itself."""
        try:
            await in_thread(self.systemd.__enter__)
        except LabFailed as error:
            pytest.skip(f"no systemd can be run here: {str(error)[-300:]}")
        try:
            await in_thread(lambda: self.ctl("start", self.unit))
            yield
            await in_thread(lambda: self.ctl("stop", self.unit))
        finally:
            await in_thread(self.systemd.__exit__)

    def ctl(self, *arguments: str) -> str:
        return self.systemd.run("systemctl", *arguments)

    def show(self, name: str) -> str:
        return self.ctl("show", "--value", "-p", name, self.unit)

    def client(self) -> NodeClient:
        return NodeClient(str(self.systemd.inside("/run/dadi/node.sock")))

    def mount(self, reference: str) -> None:
        for _ in self.client().events("POST", "/v1/mounts", body={"image": reference, "directory": str(self.mounted)}):
            pass

    def unmount(self) -> None:
        self.client().call("DELETE", "/v1/mounts", {"directory": str(self.mounted), "force": "0"})

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = self.client().call("GET", "/v1/status")
        return found

    def hurt(self, *signal: str) -> None:
        """Send the node's own process a signal, and wait until systemd has started another one that serves."""
        before = self.show("MainPID")
        self.ctl("kill", "--kill-who=main", *signal, self.unit)
        wait_until(lambda: (self.show("MainPID"), self.show("ActiveState"))[0] not in ("0", before)
                   and self.show("ActiveState") == "active")  # fmt: skip


def changed(*changes: tuple[str, str]) -> Callable[[str], str]:
    def change(text: str) -> str:
        for old, new in changes:
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        return text

    return change


QUICK = (("WatchdogSec=60", "WatchdogSec=2"), ("RestartSec=1", "RestartSec=100ms"))


async def _goes_on(readers: Readers) -> None:
    before = readers.reads
    await until(lambda: readers.reads > before + 20)


async def _reads_go_on_over(
    lab: Lab, registry: FakeRegistry, change: Callable[[str], str], version: int, holds: int,
    *hurts: Callable[[Machine], object],
) -> None:  # fmt: skip
    async with running(lab.root / "superpeer", registry.host) as run:
        configuration = (f'superpeers = ["{run.url}"]\n[backfill]\nenabled = false\n[read]\npatience = 60\n'
                         "[snapshotter]\nenabled = false\n[peers]\nenabled = false\n")  # fmt: skip
        machine = await in_thread(lambda: Machine(lab, "dadi-node", change, version, configuration))
        async with machine.running():
            assert await in_thread(lambda: machine.show("OOMScoreAdjust")) == "-900"
            await in_thread(lambda: machine.mount(f"{registry.host}/team/app:1"))
            async with Readers({machine.systemd.inside(machine.mounted / "data"): DATA}, 3) as readers:
                await _goes_on(readers)
                assert await in_thread(lambda: machine.show("NFileDescriptorStore")) == str(holds)
                for hurt in hurts:
                    await in_thread(partial(hurt, machine))
                    await _goes_on(readers)
                    status = await in_thread(machine.status)
                    assert (status["taken_over"]["mounts"], status["mounts"][0]["state"]) == (1, "lazy")
            assert (readers.failed, readers.wrong) == ([], [])
            await in_thread(machine.unmount)


def _restart(machine: Machine) -> None:
    machine.ctl("restart", machine.unit)


def _stop_and_start(machine: Machine) -> None:
    machine.ctl("stop", machine.unit)
    assert machine.show("ActiveState") == "inactive"
    machine.ctl("start", machine.unit)


def _kill(machine: Machine) -> None:
    machine.hurt("--signal=KILL")


def _hang(machine: Machine) -> None:
    """It is alive, and its event loop does not run: the watchdog's affair."""
    machine.hurt("--signal=STOP")


async def test_reads_go_on_over_a_restart_a_hang_and_a_stop_by_the_unit_whose_descriptors_dadi_keeper_holds(
    lab: Lab, registry: FakeRegistry
) -> None:
    old = texts.KEEPS_DESCRIPTORS - 1
    await _reads_go_on_over(lab, registry, changed(*QUICK), old, 0, _restart, _hang, _stop_and_start)


async def test_reads_go_on_over_a_kill_and_a_restart_by_the_unit_whose_descriptors_systemd_holds(
    lab: Lab, registry: FakeRegistry
) -> None:
    # What newer ones do by themselves: say how many descriptors the store takes.
    change = changed(*QUICK, ("FileDescriptorStorePreserve=yes", "Environment=FDSTORE=8"))
    await _reads_go_on_over(lab, registry, change, texts.KEEPS_DESCRIPTORS, 2, _kill, _restart)


async def test_a_superpeer_needs_no_more_than_its_unit_leaves_it(lab: Lab, registry: FakeRegistry) -> None:
    (port,) = free_ports(1)
    configuration = (f'listen = "127.0.0.1:{port}"\n[registry]\nallowed = ["{registry.host}"]\n'
                     f'plain_http = ["{registry.host}"]\n')  # fmt: skip
    machine = await in_thread(
        lambda: Machine(lab, "dadi-superpeer", lambda text: text, texts.KEEPS_DESCRIPTORS - 1, configuration)
    )
    client = SuperpeerClient([f"http://127.0.0.1:{port}"], Fallbacks(), connect=3, read=30)
    async with contextlib.AsyncExitStack() as stack:
        stack.push_async_callback(client.close)
        await stack.enter_async_context(machine.running())
        async with contextlib.aclosing(client.resolve(f"{registry.host}/team/app:1", PLATFORM)) as events:
            (answer,) = [image_answer(event) async for event in events if event["event"] == "image"]
        index = decode(await client.whole(answer.index_digest, answer.index_size))
        blob = index.layers[0].blob
        tar = b"".join(await client.source.read(blob, range(blob.table.count)))
        assert DATA in tar
