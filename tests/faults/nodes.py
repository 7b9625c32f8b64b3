"""`dadi-node` killed again and again: while it starts, serves, mounts, fetches the rest, and swaps devices."""

from __future__ import annotations

import contextlib
import threading
import time

from dadi.errors import DadiError
from tests.faults.frame import Bounds, Case, Run
from tests.faults.scene import Node, Setting

_LAYERS, _SIZE = 8, 2 << 20
_RATE = 2_000_000
"""Bytes a second of backfill: what makes one round about as long as it takes to become local, layer by layer."""
SETTING = Setting(layers=_LAYERS, size=_SIZE, backfill=f"quiet = 0\nrate = {_RATE}", mounted=False)
_KILLS = 5
"""In one round, which has an image of its own."""


class _Churn:
    """Mounts and unmounts a small image, whatever comes of it, so that kills meet what is half made."""

    def __init__(self, run: Run, node: Node) -> None:
        self._node, self._directory = node, node.directory / "coming"
        self._reference = run.scene.supply.image("churn", layers=2, size=100_000).reference
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *exception: object) -> None:
        self._stop.set()
        self._thread.join(60)

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            with contextlib.suppress(DadiError):
                self._node.mount(self._reference, self._directory)
            with contextlib.suppress(DadiError):
                self._node.unmount(self._directory)


def killed(run: Run) -> int:
    node, rounds = run.scene.nodes[0], run.pick(2, 9)
    kills = starting = adopted = local = devices = 0
    for number in range(rounds):
        image = run.scene.supply.image(f"killed{number}", layers=_LAYERS, size=_SIZE)
        # Two mounts, which share their devices.
        directories = [node.directory / f"image{number}", node.directory / f"again{number}"]
        for directory in directories:
            node.mount(image.reference, directory)
        files = [file for directory in directories for file in image.files(directory, range(_LAYERS))]
        with run.load_files(files), _Churn(run, node):
            for turn in range(_KILLS):
                time.sleep(run.chance.uniform(0.0, 1.5))
                node.kill()
                kills += 1
                if turn % 3 == 2:
                    node.begin()
                    time.sleep(run.chance.uniform(0.0, 0.6))
                    node.kill()
                    kills, starting = kills + 1, starting + 1
                node.start()
                taken_over = node.status()["taken_over"]["mounts"]
                assert taken_over >= len(directories), taken_over
                adopted += taken_over
            run.reads_go_on()
        rows = node.status()["mounts"]
        assert {row["state"] for row in rows} <= {"lazy", "local"}, rows
        assert {str(directory) for directory in directories} <= {row["directory"] for row in rows}, rows
        assert "lazy mounts not taken over" not in node.noted()
        row = next(row for row in rows if row["directory"] == str(directories[0]))
        local += sum(device["state"] == "local" for device in row["devices"])
        devices += len(row["devices"])
        for directory in directories:
            node.unmount(directory)
    run.note = f"{starting} of them at a start; {adopted} mounts taken over; {local} of {devices} devices swapped"
    return kills


CASES = [
    Case("node-killed", "node: kill -9, again and again", killed, SETTING, Bounds(longest=60), layers=0, alone=True)
]
