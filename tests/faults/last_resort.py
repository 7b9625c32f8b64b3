"""When nobody can answer: reads fail in the end, and say so; a mount can always be taken away, whoever hangs."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import time

from dadi.node import kernel
from tests.faults import door, registries
from tests.faults.frame import Bounds, Case, Run
from tests.faults.load import Counts
from tests.faults.scene import Node, Setting
from tests.lab.processes import REPOSITORY, LabFailed

_MANNERS = ("walk", "random", "direct", "whole")
"""Without "mmap": who maps a page that cannot be read is killed by SIGBUS, and reads no more."""
IMPATIENT = Setting(patience=2.0, layers=2)
_REGISTRY = dataclasses.replace(registries.SETTING, patience=2.0)
PATIENT = Setting(patience=300.0, layers=2)
_NAMED = "read failed, nobody could answer"
_ANY = Bounds(longest=60, failed=None)


def _dadi(node: Node, *arguments: str) -> str:
    """Run the command line, as an operator does. Raises LabFailed."""
    environment = {**node.scene.lab.environment, "PYTHONPATH": str(REPOSITORY), "DADI_NODE_SOCKET": str(node.socket)}
    command = [sys.executable, "-m", "dadi.cli", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, timeout=60)
    if done.returncode:
        raise LabFailed(f"dadi {' '.join(arguments)}: {done.stderr}")
    return done.stdout + done.stderr


def nobody_answers(run: Run) -> int:
    (node,), (superpeer,) = run.scene.nodes, run.scene.superpeers
    superpeer.kill()
    with run.load(manners=_MANNERS, readers=4):
        run.wait_for(lambda: run.counts().failed >= 4, 60, "reads fail when nobody can answer")
        failed, status, shown = run.counts().failed, node.status(), _dadi(node, "status")
        superpeer.start()
        run.wait_for(lambda: run.counts().right > 0, 60, "reads work again")
        run.reads_go_on()
    (why,) = [row["why"] for row in status["fallbacks"] if row["kind"] == _NAMED]
    assert status["reads"]["errors"] > 0
    assert "was given up after 2 s" in why
    assert "was given up after 2 s" in shown.replace("\n", " ")  # of a later read, perhaps
    assert " 0 failed" not in shown
    return failed


def registry_is_gone(run: Run) -> int:
    """The superpeer lives, and has nothing: it says why, and the node says so."""
    (node,), there = run.scene.nodes, run.scene.supply.door
    there.fault = door.Status(503)
    with run.load(manners=_MANNERS, readers=4):
        run.wait_for(lambda: run.counts().failed >= 4, 60, "reads fail when nobody can answer")
        failed, status = run.counts().failed, node.status()
        there.fault = None
        run.wait_for(lambda: run.counts().right > 0, 60, "reads work again")
        run.reads_go_on()
    (why,) = [row["why"] for row in status["fallbacks"] if row["kind"] == _NAMED]
    assert "503" in why
    return failed


def _all_wait(run: Run, counts: Counts) -> None:
    """Wait until reads have hung for a second."""
    run.wait_for(lambda: run.counts().longest > counts.longest + 1, 30, "readers wait for what nobody has")


def _taken_away(run: Run, node: Node) -> float:
    """`dadi umount --force`; return the seconds it took."""
    began = time.monotonic()
    _dadi(node, "umount", "--force", str(node.image))
    took = time.monotonic() - began
    assert not kernel.is_mounted(node.image)
    return took


def umount_of_a_hanging_mount(run: Run) -> int:
    """Readers hang, the node lives: they get EIO."""
    (node,), (superpeer,) = run.scene.nodes, run.scene.superpeers
    with run.load(manners=_MANNERS, readers=4):
        run.reads_go_on(1)
        superpeer.kill()
        _all_wait(run, run.counts())
        took = _taken_away(run, node)
        run.reads_go_on()  # they fail
    assert run.counts().failed >= 1
    assert node.status()["mounts"] == []
    run.note = f"taken away after {took:.1f} s"
    return 1


def umount_without_a_node(run: Run) -> int:
    """Readers hang, the node is dead: the mount goes at once, the readers when there is a node again; it stays away."""
    (node,), (superpeer,) = run.scene.nodes, run.scene.superpeers
    with run.load(manners=_MANNERS, readers=4):
        run.reads_go_on(1)
        superpeer.kill()
        _all_wait(run, run.counts())
        node.kill()
        took = _taken_away(run, node)
        node.start()
        run.reads_go_on()  # they fail
    assert run.counts().failed >= 1
    run.wait_for(lambda: not list((node.directory / "state" / "mounts").iterdir()), 30, "it is forgotten")
    assert node.status()["mounts"] == []
    assert not kernel.is_mounted(node.image)
    assert list((node.socket.parent / "released").iterdir()) == []
    run.note = f"taken away after {took:.1f} s"
    return 1


CASES = [
    Case("last-eio", "nobody answers within the limit: EIO", nobody_answers, IMPATIENT, _ANY, 2),
    Case("last-registry", "the registry is away for longer than it", registry_is_gone, _REGISTRY, _ANY, 1),
    Case("last-umount", "umount --force while reads hang", umount_of_a_hanging_mount, PATIENT, _ANY, 2, alone=True),
    Case("last-umount-dead", "the same, node dead", umount_without_a_node, PATIENT, _ANY, 2, alone=True),
]
