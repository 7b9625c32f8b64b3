"""Peers that do harm: a node's first parent is one; the superpeer is there as well. (Killed ones: superpeers.py.)"""

from __future__ import annotations

from collections.abc import Callable

from tests.faults.frame import Bounds, Case, Run
from tests.faults.scene import Node, Setting, free_ports
from tests.lab import images
from tests.lab.forking import Forked

SETTING = Setting(peers=True, mounted=False, superpeer_sections="[peers]\nroot_slots = 1\n")


def _parents(node: Node) -> list[str]:
    parents: list[str] = node.status()["peers"]["parents"]
    return parents


def _with(manner: str) -> Callable[[Run], int]:
    """Return an injury: an image of its own, whose trees the bad peer joins first; so it is the parent of the node."""

    def injure(run: Run) -> int:
        scene, (port,), (node,) = run.scene, free_ports(1), run.scene.nodes
        image = scene.supply.image(f"bad-{manner}", layers=run.pick(1, 8), size=2 << 20)
        told, platform, directory = scene.directory / manner, f"linux/{images.ARCHITECTURE}", node.directory / manner
        place = [f"bad-{manner}", str(port), "zone", "rack", "1"]
        arguments = [manner, scene.urls[0], image.reference, platform, *place, str(told)]
        bad = Forked(scene.forks, f"{scene.directory.name}-{manner}", "tests.faults.bad_peer", arguments)
        bad.wait_until(told.exists)
        try:
            node.mount(image.reference, directory)
            # Its place may come late; that it was left again means that it was asked (for the metadata).
            run.wait_for(lambda: told.stat().st_size > 0 or place[0] in _parents(node), 30, "the bad peer is a parent")
            with run.load_files(image.files(directory, range(len(image.layers)))):
                run.reads_go_on(run.pick(20, 200))
        finally:
            bad.kill()
        return told.stat().st_size

    return injure


CASES = [
    Case(f"peers-{manner}", f"a peer: {title}", _with(manner), SETTING, Bounds(longest=30), layers=0)
    for manner, title in (
        ("wrong", "wrong bytes"),
        ("silent", "no answer"),
        ("trickle", "one byte a second"),
        ("length", "a wrong length"),
        ("refuse", "a connection for every request refused"),
    )
]
