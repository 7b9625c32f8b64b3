"""What a case is, how it is run, and what comes of it: one row of the table.

What lives here: `Case`, `Bounds`, `Run` (what a case has in its hands), `Row`, `Stage`, the list of all cases. What
never does: a case.
"""

from __future__ import annotations

import contextlib
import importlib
import random
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dadi.errors import DadiError
from tests.faults.engines import Engines
from tests.faults.load import Counts, Load
from tests.faults.scene import Node, Scene, Setting
from tests.faults.supply import Supply
from tests.lab.cleanup import Lab
from tests.lab.forking import Forks
from tests.lab.processes import LabFailed

MODULES: tuple[str, ...] = ("nodes", "superpeers", "registries", "peers", "disks", "power", "limits", "last_resort",
                            "pulls", "pulls_ill")  # fmt: skip
"""Where the cases are, in the table's order."""
_PROGRAMS = ("superpeer.main", "registry_proxy.main", "tests.faults.bad_peer", "tests.faults.bad_original")


@dataclass(frozen=True)
class Bounds:
    """What must hold; never a wrong byte. `failed`: reads that may fail (None: any number); `longest`: seconds."""

    longest: float = 60.0
    failed: int | None = 0


@dataclass(frozen=True)
class Case:
    """One row: `name` selects it, `title` is for people. `layers`: how many that nobody has read it needs.

    `alone`: its scene is used by no other case.
    """

    name: str
    title: str
    injure: Callable[[Run], int]
    setting: Setting
    bounds: Bounds = Bounds()
    layers: int = 1
    alone: bool = False


@dataclass(frozen=True)
class Row:
    """What came of a case. `hurt`: how often it was injured; `broken`: what does not hold, empty when all does."""

    name: str
    title: str
    counts: Counts
    hurt: int
    seconds: float
    note: str
    broken: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


class Run:
    """One case being run."""

    def __init__(self, scene: Scene, case: Case, *, long: bool, seed: int) -> None:
        self.scene, self.case, self.long = scene, case, long
        self.chance = random.Random(f"{case.name} {seed}")
        self.layers = scene.take(case.layers)
        self.note = ""
        """What else the row should say."""
        self._loads: list[Load | Engines] = []

    def pick(self, short: Any, long: Any) -> Any:
        """Return one of the two, by the form that is run."""
        return long if self.long else short

    def load(self, node: Node | None = None, *, layers: range | None = None, **options: Any) -> Load:
        """Return readers (a context manager) of the case's layers, on the first node or another."""
        node = node or self.scene.nodes[0]
        files = self.scene.content.files(node.image, self.layers if layers is None else layers)
        return self.load_files(files, **options)

    def load_files(self, files: Sequence[tuple[Any, Any]], **options: Any) -> Load:
        """Return readers of (path, path of the known bytes)."""
        name = f"{self.case.name}-{len(self._loads)}"
        end = max(60.0, self.case.bounds.longest)
        load = Load(self.scene.lab, name, files, seed=self.chance.randrange(1 << 30), end=end, **options)
        self._loads.append(load)
        return load

    def count(self, load: Engines) -> None:
        """Let what somebody else counts be the case's, too."""
        self._loads.append(load)

    def wait_for(self, true: Callable[[], bool], limit: float, what: str) -> None:
        """Poll until `true`; OSError means "not yet". Raises LabFailed."""
        deadline = time.monotonic() + limit
        while True:
            with contextlib.suppress(OSError):
                if true():
                    return
            if time.monotonic() > deadline:
                raise LabFailed(f"{what}: not within {limit:.0f} s")
            time.sleep(0.02)

    def reads_go_on(self, reads: int = 3, limit: float = 90.0) -> None:
        """Wait until each reader has ended so many reads from now on. Raises LabFailed."""
        for load in [load for load in self._loads if load.running]:
            before = load.done()
            self.wait_for(lambda: all(now >= was + reads for now, was in zip(load.done(), before, strict=True)), limit,  # noqa: B023
                          "reads go on")  # fmt: skip

    def counts(self) -> Counts:
        """Return what all readers of this case have counted so far."""
        return sum((load.counts() for load in self._loads), Counts())

    def errors(self) -> str:
        return "".join(load.errors() for load in self._loads)


class Stage:
    """Runs cases one after the other; a context manager. A scene stays for the next case, if that can use it."""

    def __init__(self, supply: Supply, base: Path, *, long: bool = False, seed: int = 1) -> None:
        """`base`: where its labs are made."""
        self._supply, self._base, self._long, self._seed = supply, base, long, seed
        self._exits = contextlib.ExitStack()
        self._lab: Lab | None = None
        self._scene: Scene | None = None
        self._scenes = 0

    def __enter__(self) -> Stage:
        return self

    def __exit__(self, *exception: object) -> None:
        self._abandon()

    def run(self, case: Case, *, last: bool = True) -> Row:
        """Run a case. `last`: its scene is closed after it, and what is left of that is a fault of this case."""
        began = time.monotonic()
        broken, hurt, run = "", 0, None
        try:
            run = Run(self._scene_for(case), case, long=self._long, seed=self._seed)
            began = time.monotonic()
            hurt = case.injure(run)
            broken = judged(case.bounds, run.counts(), hurt)
        except (LabFailed, DadiError, OSError, RuntimeError, AssertionError) as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            broken = f"{type(error).__name__}: {error} ({place.filename.rpartition('/')[2]}:{place.lineno})"
        took = time.monotonic() - began
        self._supply.door.fault = None
        counts = run.counts() if run else Counts()
        if run and broken:
            broken += f"\n{run.errors()}\n{run.scene.warnings()}"
        broken = broken or (self._close() if last or case.alone else "")
        if broken:
            self._abandon()
        return Row(case.name, case.title, counts, hurt, took, run.note if run else "", broken.strip())

    def _scene_for(self, case: Case) -> Scene:
        scene = self._scene
        if scene is not None and (case.alone or scene.setting != case.setting or scene.left < case.layers):
            left = self._close()
            if left:
                raise LabFailed(f"of the case before: {left}")
        if self._scene is None:
            if self._lab is None:
                self._lab = self._exits.enter_context(Lab("stage", self._base))
                self._forks = self._exits.enter_context(Forks(self._lab, _PROGRAMS))
            self._scenes += 1
            self._scene = Scene(self._lab, self._forks, self._supply, case.setting, f"s{self._scenes}")
        return self._scene

    def _close(self) -> str:
        """Close the scene that stands; return what is left of it."""
        scene, self._scene = self._scene, None
        return "; ".join(scene.close()) if scene else ""

    def _abandon(self) -> None:
        """Throw everything away: after a failure nothing of it is believed."""
        self._scene = self._lab = None
        self._exits.close()


def judged(bounds: Bounds, counts: Counts, hurt: int) -> str:
    """Return what does not hold; empty if all does."""
    found = []
    if counts.wrong:
        found.append(f"{counts.wrong} WRONG BYTES")
    if bounds.failed is not None and counts.failed > bounds.failed:
        found.append(f"{counts.failed} reads failed")
    if counts.longest > bounds.longest:
        found.append(f"a read took {counts.longest:.1f} s, {bounds.longest:.0f} s at most are meant")
    if not counts.right:
        found.append("nobody has read anything")
    if not hurt:
        found.append("nothing was injured")
    return "; ".join(found)


def all_cases() -> list[Case]:
    """Return all cases, in the table's order."""
    return [case for name in MODULES for case in importlib.import_module(f"tests.faults.{name}").CASES]


def shares(case: Case, following: Case | None) -> bool:
    """Say whether the next case may use this one's scene."""
    return following is not None and not (case.alone or following.alone) and case.setting == following.setting
