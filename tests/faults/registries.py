"""Registries that fail: what a superpeer makes of it, and what readers notice of that.

Each time both ways are tried: ranges of an indexed layer whose chunks are nowhere yet, under readers; and an image on
first sight, whose layers are streamed while it is mounted.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable

from dadi.errors import DadiError
from tests.faults import door
from tests.faults.frame import Bounds, Case, Run
from tests.faults.scene import Setting

_REGISTRY = "retries = 5\nbackoff = 0.1\nmax_backoff = 1\nread_timeout = 2\nconnect_timeout = 2\n"
SETTING = Setting(indexed=True, layers=9, size=3 << 20, superpeer_sections=_REGISTRY)
_MOUNTED = 60.0
"""Seconds until an image must be mounted, once the registry is well."""


class _Coming:
    """An image that the superpeer has never seen, mounted while the registry is ill; what fails is tried again."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._content = run.scene.supply.image(f"cold-{run.case.name}", layers=1, size=1 << 20)
        self._node = run.scene.nodes[0]
        self._directory = self._node.directory / run.case.name
        self.mounted = threading.Event()
        self.refused = 0
        self._over = False
        threading.Thread(target=self._mount, daemon=True).start()

    def _mount(self) -> None:
        while not self._over:
            try:
                self._node.mount(self._content.reference, self._directory)
            except DadiError:
                self.refused += 1
                time.sleep(0.2)
            else:
                self.mounted.set()
                return

    def check(self) -> None:
        """Wait until it is mounted; have it read."""
        try:
            self._run.wait_for(self.mounted.is_set, _MOUNTED, "an image is mounted after its registry was ill")
        finally:
            self._over = True
        with self._run.load_files(self._content.files(self._directory, range(1)), readers=2):
            self._run.reads_go_on()


def _for(seconds: tuple[float, float], make: Callable[[Run], door.Fault]) -> Callable[[Run], int]:
    """Return an injury: the registry is ill before the readers begin, and well after some seconds (short, long)."""

    def injure(run: Run) -> int:
        there = run.scene.supply.door
        hurt, there.fault = there.hurt, make(run)
        coming = _Coming(run)
        with run.load():
            time.sleep(run.pick(*seconds))
            there.fault = None
            run.reads_go_on()
            coming.check()
        return there.hurt - hurt

    return injure


def _throughout(make: Callable[[Run], door.Fault]) -> Callable[[Run], int]:
    """Return an injury that does not end: readers must get on all the same."""

    def injure(run: Run) -> int:
        there = run.scene.supply.door
        hurt, there.fault = there.hurt, make(run)
        coming = _Coming(run)
        with run.load():
            time.sleep(run.pick(1.5, 20))
            run.reads_go_on()
            coming.check()
        return there.hurt - hurt

    return injure


def _tokens(run: Run) -> int:
    """Layer by layer, with pauses in which the token runs out."""
    there, lifetime = run.scene.supply.door, run.pick(0.3, 5.0)
    hurt, there.fault = there.hurt, door.Tokens(lifetime)
    coming = _Coming(run)
    for layer in run.layers:
        with run.load(layers=range(layer, layer + 1)):
            run.reads_go_on()
            time.sleep(lifetime)
    coming.check()
    return there.hurt - hurt


def _case(name: str, title: str, injure: Callable[[Run], int], *, layers: int = 1, alone: bool = False) -> Case:
    setting = dataclasses.replace(SETTING, layers=2) if alone else SETTING
    return Case(f"registry-{name}", f"registry: {title}", injure, setting, Bounds(longest=90), layers, alone)


# The last two alone: whole layers are streamed then, which would leave nothing to be asked for by ranges.
CASES = [
    _case("429", "429 with Retry-After", _for((2, 60), lambda run: door.Status(429, {"Retry-After": "1"}))),
    _case("503", "503", _for((3, 60), lambda run: door.Status(503))),
    _case("reset", "connections are reset", _throughout(lambda run: door.Reset(1))),
    _case("short", "bodies are cut short", _throughout(lambda run: door.Short(1))),
    _case("redirects", "a redirect loop", _for((2, 60), lambda run: door.RedirectLoop())),
    _case("tokens", "tokens that expire, unannounced", _tokens, layers=3),
    _case("trickle", "one byte a second", _for((2, 60), lambda run: door.Trickle())),
    _case("flipped", "one bit of a body is wrong", _throughout(lambda run: door.Flipped(1)), alone=True),
    _case("no-ranges", "200 to a request for a range", _throughout(lambda run: door.NoRanges(run.scene.supply.door)),
          alone=True),
]  # fmt: skip
