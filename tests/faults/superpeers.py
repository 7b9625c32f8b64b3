"""Superpeers and peers that are killed while they are asked, and superpeers that hang: they take what they are sent,
and say nothing (SIGSTOP; their kernel still answers for them)."""

from __future__ import annotations

import signal
import time
from collections.abc import Sequence

from dadi.peers import owners
from tests.faults.frame import Bounds, Case, Run
from tests.faults.scene import Node, Setting, Superpeer

SETTING = Setting(superpeers=2, nodes=4, peers=True, layers=14, size=2 << 20,
                  superpeer_sections="[peers]\nroot_slots = 1\nheartbeat = 1\nexpiry = 3\n")  # fmt: skip
ALONE = Setting(superpeers=2, layers=2, size=2 << 20)
"""A node that has no peers."""


def _fetched(node: Node) -> int:
    """Return how many reads of this node had to be fetched; without an answer there are no more."""
    return int(node.status()["reads"]["misses"])


def _in_order(run: Run) -> list[Superpeer]:
    """Return who owns the first of the case's layers, and who stands in."""
    order = owners.owners(run.scene.content.diff_ids[run.layers[0]], run.scene.urls)
    return [run.scene.superpeers[run.scene.urls.index(url)] for url in order]


def _killed(run: Run, *victims: Superpeer) -> int:
    """Kill superpeers, begin to read what nobody has read yet, and start them again after a while."""
    node = run.scene.nodes[-1]  # the deepest in the trees
    before = _fetched(node)
    for victim in victims:
        victim.kill()
    with run.load(node):
        if len(victims) < len(run.scene.superpeers):
            run.reads_go_on(run.pick(10, 100))
            run.wait_for(lambda: _fetched(node) > before, 60, "reads without the superpeer that is dead")
        else:
            time.sleep(run.pick(3, 30))
        for victim in victims:
            victim.start()
        run.reads_go_on(run.pick(10, 100))
    run.note = f"{_fetched(node) - before} reads of the kernel had to be fetched"
    return len(victims) if _fetched(node) > before else 0


def superpeer(run: Run) -> int:
    return _killed(run, _in_order(run)[0])


def stand_in(run: Run) -> int:
    return _killed(run, _in_order(run)[1])


def both(run: Run) -> int:
    return _killed(run, *run.scene.superpeers)


def _stopped(run: Run, *victims: Superpeer) -> int:
    """Have superpeers hang, begin to read what nobody has read yet, and let them go on after a while."""
    node = run.scene.nodes[-1]
    before, until = _fetched(node), time.monotonic() + run.pick(3, 30)
    try:
        _signal(signal.SIGSTOP, victims)
        with run.load(node):
            if len(victims) < len(run.scene.superpeers):
                run.reads_go_on(run.pick(10, 100))
                run.wait_for(lambda: _fetched(node) > before, 60, "reads without the superpeer that hangs")
            time.sleep(max(0.0, until - time.monotonic()))
            _signal(signal.SIGCONT, victims)
            run.reads_go_on(run.pick(10, 100))
    finally:
        _signal(signal.SIGCONT, victims)
    run.note = f"{_fetched(node) - before} reads of the kernel had to be fetched"
    return len(victims) if _fetched(node) > before else 0


def _signal(number: int, superpeers: Sequence[Superpeer]) -> None:
    for superpeer in superpeers:
        assert superpeer.process is not None
        superpeer.process.signal(number)


def hangs(run: Run) -> int:
    return _stopped(run, _in_order(run)[0])


def both_hang(run: Run) -> int:
    return _stopped(run, *run.scene.superpeers)


def half_the_peers(run: Run) -> int:
    """Those that are parents die: nodes joined one after the other."""
    nodes = run.scene.nodes
    victims, readers = nodes[0::2], nodes[1::2]
    before = [_fetched(node) for node in readers]
    with run.load(readers[0], readers=3), run.load(readers[1], readers=3, manners=("walk", "random", "mmap")):
        run.reads_go_on(1)
        for victim in victims:
            victim.kill()
        run.reads_go_on(run.pick(20, 200))
    needed = all(_fetched(node) > was for node, was in zip(readers, before, strict=True))
    for victim in victims:
        victim.start()
    return len(victims) if needed else 0


CASES = [
    Case("superpeer-killed", "superpeer: kill -9", superpeer, SETTING, Bounds(longest=45), layers=2),
    Case("superpeer-stand-in", "its only stand-in: kill -9", stand_in, SETTING, Bounds(longest=45), layers=2),
    Case("superpeer-both", "superpeer and stand-in: kill -9", both, SETTING, Bounds(longest=90), layers=2),
    Case("superpeer-hangs", "superpeer: hangs", hangs, SETTING, Bounds(longest=20), layers=2),
    Case("superpeer-both-hang", "superpeer and stand-in: hang", both_hang, SETTING, Bounds(longest=90), layers=2),
    Case("superpeer-peers", "half the peers: kill -9", half_the_peers, SETTING, Bounds(longest=45), layers=4),
    Case("superpeer-hangs-alone", "superpeer: hangs, no peers", hangs, ALONE, Bounds(longest=20), layers=2),
]  # fmt: skip
