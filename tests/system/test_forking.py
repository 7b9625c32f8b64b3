"""Forked daemons: processes like any other, and nothing left of them."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cleanup import Lab, leak_check
from tests.lab.forking import Forked, Forks
from tests.lab.network import Network
from tests.lab.processes import unix_get

pytestmark = [pytest.mark.root, pytest.mark.programs("ip", "tc", "nsenter", "unshare")]


@pytest.fixture
def lab() -> Iterator[Lab]:
    # not pytest's own: the path of a unix socket must not be longer than 107 bytes
    with tempfile.TemporaryDirectory(prefix="fork") as directory:
        with leak_check(Path(directory)) as leaks, Lab("forking", Path(directory)) as lab:
            yield lab
        assert leaks.found == []


def node(lab: Lab, forks: Forks, number: int, network: Network) -> Forked:
    directory = lab.root / f"n{number}"
    directory.mkdir()
    (directory / "node.toml").write_text(
        f'run = "{directory}/run"\nstate = "{directory}/state"\nsuperpeers = ["http://10.231.0.9:7070"]\n'
        "[snapshotter]\nenabled = false\n"
    )
    return Forked(forks, f"n{number}", "dadi.node.main", ["--config", str(directory / "node.toml")],
                  host=network.host(f"n{number}"))  # fmt: skip


def test_a_forked_node_is_a_process_of_its_own_on_its_own_host(lab: Lab) -> None:
    network = Network(lab)
    with Forks(lab) as forks:
        nodes = [node(lab, forks, number, network) for number in range(2)]
        for number, forked in enumerate(nodes):
            socket = lab.root / f"n{number}" / "run" / "node.sock"
            forked.wait_until(lambda socket=socket: unix_get(socket, "/healthz")[0] == 200)
            assert os.getpgid(forked.popen.pid) == forked.popen.pid
            assert f"10.231.0.{number + 1}/24" in subprocess.run(
                ["nsenter", f"--net=/proc/{forked.popen.pid}/ns/net", "ip", "-4", "addr"],
                capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
        assert nodes[0].stop() == 0, nodes[0].tail()
        assert nodes[1].alive
        assert nodes[1].kill() == -signal.SIGKILL
        assert "node is ready" in nodes[0].tail()


def test_a_program_that_fails_says_so_in_its_log_and_by_its_status(lab: Lab) -> None:
    with Forks(lab) as forks:
        failing = Forked(forks, "failing", "dadi.node.main", ["--config", "/nonexistent"])
        assert failing.popen.wait(20) == 1
        assert "/nonexistent" in failing.tail()
