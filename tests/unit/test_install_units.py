"""The units are what systemd understands, are installed once, and never over somebody's edits."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dadi.cli.main import cli
from dadi.errors import InvalidRequest
from dadi.node.config import NodeConfig
from dadi.notify import Notify
from dadi.units import texts
from dadi.units.install import PLACE
from registry_proxy.config import ProxyConfig
from superpeer.config import SuperpeerConfig

NAMESPACED = ("Protect", "Private", "ReadOnly", "ReadWrite", "Inaccessible", "Bind", "Temporary", "MountFlags", "Root",
              "DynamicUser")  # fmt: skip


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli, ["install-units", *map(str, arguments)])


@pytest.mark.parametrize("systemd", [252, 254])
@pytest.mark.parametrize("program", texts.PROGRAMS)
def test_systemd_finds_no_fault_with_a_unit(tmp_path: Path, program: str, systemd: int) -> None:
    if shutil.which("systemd-analyze") is None:
        pytest.skip("systemd-analyze is missing (Debian's systemd)")
    binaries = tmp_path / f"{systemd} of {{mine}} 100%n"
    binaries.mkdir()
    (binaries / program).write_text("#!/bin/sh\n")
    (binaries / program).chmod(0o755)
    unit = tmp_path / f"{program}.service"
    text = texts.unit(program, systemd, str(binaries))
    if _version() < texts.KEEPS_DESCRIPTORS:
        text = text.replace("FileDescriptorStorePreserve=yes\n", "")  # it does not know that one
    unit.write_text(text)
    command = ["systemd-analyze", "verify", "--man=no", "--recursive-errors=no", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def _version() -> int:
    line = subprocess.run(["systemd-analyze", "--version"], capture_output=True, text=True, check=True).stdout
    return int(line.split()[1])


@pytest.mark.parametrize(
    ("program", "state"),
    list(zip(texts.PROGRAMS, (NodeConfig().state, SuperpeerConfig().state, ProxyConfig().state), strict=True)),
)
def test_a_unit_may_write_where_its_program_keeps_its_state(program: str, state: str) -> None:
    lines = texts.unit(program, 252, "/usr/bin").splitlines()
    assert f"StateDirectory={state.removeprefix('/var/lib/')}" in lines


def test_a_directory_that_systemd_would_not_find_is_refused() -> None:
    for directory in ("bin", "/bin\nExecStartPre=/bin/false", '/opt/"mine"', "/opt/a\\b"):
        with pytest.raises(InvalidRequest, match="not an absolute path"):
            texts.unit("dadi-node", 252, directory)


@pytest.mark.parametrize("systemd", [252, 254])
def test_nothing_gives_the_node_a_mount_namespace_of_its_own(systemd: int) -> None:
    lines = texts.unit("dadi-node", systemd, "/usr/bin").splitlines()
    assert [line for line in lines if line.startswith(NAMESPACED)] == []
    assert "RuntimeDirectoryPreserve=yes" in lines, "the FUSE mount is below it"


ALWAYS = {
    "Type=notify", "NotifyAccess=main", "Restart=always", "WatchdogSec=60", "OOMPolicy=continue", "NoNewPrivileges=yes",
    "StartLimitIntervalSec=0", "RestrictNamespaces=yes", "SystemCallArchitectures=native", "StateDirectoryMode=0700",
}  # fmt: skip
SERVERS = {
    "OOMScoreAdjust=-500", "KillMode=mixed", "ProtectSystem=strict", "PrivateTmp=yes", "PrivateDevices=yes",
    "ProtectKernelModules=yes", "SystemCallFilter=@system-service", "RestrictSUIDSGID=yes",
    "CapabilityBoundingSet=CAP_NET_BIND_SERVICE CAP_DAC_OVERRIDE",
}  # fmt: skip


@pytest.mark.parametrize("systemd", [252, 254])
@pytest.mark.parametrize("program", texts.PROGRAMS)
def test_each_unit_keeps_its_program_running_and_leaves_it_little(program: str, systemd: int) -> None:
    lines = texts.unit(program, systemd, "/usr/bin").splitlines()
    own = {"OOMScoreAdjust=-900", "Before=containerd.service"} if program == "dadi-node" else SERVERS
    assert sorted((ALWAYS | own) - set(lines)) == []
    settings = [line.partition("=")[0] for line in lines if "=" in line and not line.startswith("#")]
    assert len(settings) == len(set(settings)), "none twice: the last would count"
    bounding = next(line for line in lines if line.startswith("CapabilityBoundingSet="))
    assert "CAP_SYS_PTRACE" not in bounding
    assert "CAP_SYS_MODULE" not in bounding


def test_a_stop_leaves_the_fuse_mount_to_systemd_where_that_can_else_to_the_keeper() -> None:
    old, new = (texts.unit("dadi-node", version, "/usr/bin").splitlines() for version in (252, 254))
    assert "KillMode=process" in old
    assert not any("FileDescriptorStore" in line for line in old), "252 lets go of it when the unit is stopped"
    assert {"KillMode=mixed", "FileDescriptorStoreMax=8", "FileDescriptorStorePreserve=yes"} <= set(new)


def test_it_installs_says_what_it_changes_and_changes_nothing_twice(tmp_path: Path) -> None:
    root = ("--root", tmp_path, "--bin", "/usr/bin")
    done = run(*root, "--systemd", 252, "--superpeer", "--node")
    assert done.exit_code == 0
    assert sorted(path.name for path in (tmp_path / PLACE).iterdir()) == ["dadi-node.service", "dadi-superpeer.service"]
    assert "dadi-node.service: new" in done.output
    again = run(*root, "--systemd", 252, "--node")
    assert (again.exit_code, again.stdout) == (0, f"{tmp_path / PLACE}/dadi-node.service: unchanged\n")
    newer = run(*root, "--systemd", 254)
    assert "dadi-node.service: replaced" in newer.stdout
    assert {"-KillMode=process", "+KillMode=mixed"} <= set(newer.stdout.splitlines())
    assert (tmp_path / PLACE / "dadi-node.service").stat().st_mode & 0o777 == 0o644


def test_an_edited_unit_is_left_as_it_is_unless_it_is_forced(tmp_path: Path) -> None:
    root = ("--root", tmp_path, "--bin", "/usr/bin", "--systemd", 252)
    run(*root)
    unit = tmp_path / PLACE / "dadi-node.service"
    edited = unit.read_text().replace("RestartSec=1", "RestartSec=7")
    unit.write_text(edited)
    done = run(*root)
    assert done.exit_code == 1
    assert "1 units were edited by somebody" in str(done.exception)
    assert "-RestartSec=7" in done.stdout
    assert unit.read_text() == edited
    assert run(*root, "--force").exit_code == 0
    assert "RestartSec=1\n" in unit.read_text()
    unit.unlink()
    unit.symlink_to("/dev/null")  # masked
    assert run(*root).exit_code == 1
    assert unit.is_symlink()


def test_print_writes_nothing(tmp_path: Path) -> None:
    done = run("--print", "--root", tmp_path, "--registry-proxy")
    assert "ExecStart=" in done.stdout
    assert "dadi-registry-proxy --config /etc/dadi/registry-proxy.toml" in done.stdout
    assert list(tmp_path.iterdir()) == []


async def test_the_event_loop_gives_signs_of_life_and_says_when_it_is_ready_and_when_it_stops(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.setblocking(False)
        loop = asyncio.get_running_loop()

        async def told() -> str:
            return (await asyncio.wait_for(loop.sock_recv(systemd, 1000), 10)).decode()

        notify = Notify({"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "30000",
                         "WATCHDOG_PID": str(os.getpid())})  # fmt: skip
        living = asyncio.create_task(notify.live())
        assert (await told()).startswith("EXTEND_TIMEOUT_USEC=")
        notify.ready()
        assert [await told() for _ in range(3)] == ["READY=1", "WATCHDOG=1", "WATCHDOG=1"]
        living.cancel()
        notify.stopping()
        while await told() != "STOPPING=1":
            pass


async def test_a_start_that_never_ends_is_not_excused_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told = 0.0, list[tuple[float, str]]()

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds
        if 7200 < now < 7201:
            notify.ready()
        if now > 7300:
            raise asyncio.CancelledError

    notify = Notify({"NOTIFY_SOCKET": "/nowhere", "WATCHDOG_USEC": "30000000"}, clock=lambda: now, sleep=sleep)
    monkeypatch.setattr(notify, "send", lambda message: told.append((now, message)))
    with pytest.raises(asyncio.CancelledError):
        await notify.live()
    asked = [(at, int(said.partition("=")[2]) / 1e6) for at, said in told if said.startswith("EXTEND_TIMEOUT_USEC=")]
    assert asked[0] == (0.0, 60.0)
    assert all(later < at + seconds for (at, seconds), (later, _) in pairwise(asked)), "none comes too late"
    assert max(at + seconds for at, seconds in asked) == 1800
    assert [said for at, said in told if at > 1800][:2] == ["READY=1", "WATCHDOG=1"]


async def test_without_systemd_and_with_one_that_is_gone_nothing_is_told_and_nothing_fails(tmp_path: Path) -> None:
    silent = Notify({"WATCHDOG_USEC": "1000000", "WATCHDOG_PID": "1"})
    silent.ready()
    await asyncio.wait_for(silent.live(), 10)
    assert silent.watchdog == 0.0, "somebody else's"
    Notify({"NOTIFY_SOCKET": str(tmp_path / "nobody")}).ready()
