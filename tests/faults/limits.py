"""Limits of the machine: clocks that jump, no descriptor left, no loop device left, ten thousand mounts; memory."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dadi.errors import DadiError
from tests.faults.frame import Bounds, Case, Run
from tests.faults.scene import InjuredNode, Setting
from tests.lab.cleanup import loops
from tests.lab.processes import LabFailed

_DAY = 86400.0
_MIB = 1 << 20
_LIMIT = 256 * _MIB
PLAIN = Setting(layers=4, size=2 << 20)
UNMOUNTED = Setting(layers=1, size=1 << 20, mounted=False)
MEMORY = Setting(layers=1, size=1 << 20, mounted=False, backfill="quiet = 0")


def clock(run: Run) -> int:
    """The wall clock of the node jumps by minutes, days and years, forwards and back."""
    node = _injured(run, "clock")
    jumps = [700.0, -3600.0, _DAY, -_DAY, 3650 * _DAY, -10_000 * _DAY, 0.0]
    with run.load(node):
        run.reads_go_on()
        for jump in jumps:
            node.injure({"clock": jump})
            run.reads_go_on()
    return len(jumps)


def descriptors(run: Run) -> int:
    """The node may open no file and no connection more, for some seconds."""
    node = run.scene.nodes[0]
    assert node.process is not None
    pid, times = node.process.popen.pid, run.pick(2, 20)
    with run.load():
        run.reads_go_on(reads=1)
        for _ in range(times):
            before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
            resource.prlimit(pid, resource.RLIMIT_NOFILE, (_open(pid), before[1]))
            time.sleep(run.chance.uniform(0.5, run.pick(1.5, 10.0)))
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
            run.reads_go_on()
    run.note = f"noted: {', '.join(sorted(node.noted())) or 'nothing'}"
    return times


def no_loop(run: Run) -> int:
    """No loop device is to be had: a mount says so, what is mounted goes on, and afterwards all is as before."""
    node = _injured(run, "loops")
    other, refused = node.directory / "other", ""
    with run.load(node):
        run.reads_go_on()
        node.injure({"loops": 0})
        try:
            node.mount(run.scene.supply.image("churn", layers=2, size=100_000).reference, other)
        except DadiError as error:
            refused = error.message
        assert "loop" in refused, f"a mount without loop devices: {refused!r}"
        assert not other.is_mount()
        run.reads_go_on()
        node.injure({})
        node.mount(run.scene.supply.image("churn", layers=2, size=100_000).reference, other)
        run.reads_go_on()
    node.unmount(other)
    return 1


def mounts(run: Run) -> int:
    """Many mounts and unmounts: no descriptor, loop device, thread or memory stays behind."""
    node, image = run.scene.nodes[0], run.scene.supply.image("churn", layers=2, size=100_000)
    directory, rounds = node.directory / "again", run.pick(40, 10_000)
    assert node.process is not None
    pid, before = node.process.popen.pid, _Held(0, 0, 0)
    for number in range(rounds):
        node.mount(image.reference, directory)
        if number % 20 == 0:
            with run.load_files(image.files(directory, range(2)), readers=1, pace=0.0):
                run.wait_for(lambda: run.counts().right > 0, 30, "something is read")
        node.unmount(directory)
        if number == rounds // 4:  # what is made once has been made by then
            before = _held(pid, node.directory)
    after = _held(pid, node.directory)
    grown = f"before {before}, after {rounds} mounts {after}"
    assert (after.descriptors, after.loops) == (before.descriptors, before.loops), grown
    # Pools of threads grow as they are needed, to their bounds; what is made for each mount would come to more.
    assert after.threads < before.threads + min(rounds // 2, 64), grown
    run.note = f"{rounds} mounts; {before}"
    return rounds


def memory(run: Run) -> int:
    """Many images and readers in 256 MiB, mounted and unmounted all the time: it lives, and does not grow."""
    node, count = run.scene.nodes[0], run.pick(10, 50)
    images = [run.scene.supply.image(f"memory{n}", layers=1, size=400_000) for n in range(count)]
    places = [node.directory / f"m{n}" for n in range(count)]
    assert node.process is not None
    pid, sizes, end = node.process.popen.pid, [], time.monotonic() + run.pick(8, 3600)
    with _confined(pid, _LIMIT):
        for image, place in zip(images, places, strict=True):
            node.mount(image.reference, place)
        steady = max(1, count // 2)
        files = [pair for image, place in zip(images[:steady], places, strict=False)
                 for pair in image.files(place, range(1))]  # fmt: skip
        with run.load_files(files, readers=run.pick(12, 200), pace=run.pick(0.02, 0.5)):
            while time.monotonic() < end:
                for image, place in zip(images[steady:], places[steady:], strict=True):
                    node.unmount(place)
                    node.mount(image.reference, place)
                sizes.append(_resident(pid))
            run.reads_go_on(reads=1)
        assert node.alive
        for place in places:
            node.unmount(place)
    quarter = sizes[len(sizes) // 4]
    run.note = f"{count} images; resident {quarter / _MIB:.0f} MiB, at the end {sizes[-1] / _MIB:.0f} MiB"
    assert sizes[-1] < quarter * 1.25 + 16 * _MIB, f"it grows: {[size // _MIB for size in sizes]}"
    return len(sizes) * (count - steady)


def _injured(run: Run, name: str) -> InjuredNode:
    node = InjuredNode(run.scene, name, run.scene.urls)
    run.scene.nodes.append(node)
    node.start()
    node.mount(run.scene.content.reference, node.image)
    return node


@contextlib.contextmanager
def _confined(pid: int, limit: int) -> Iterator[None]:
    """Put a process into a memory cgroup of its own, of version 1 or 2."""
    first, base = Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")
    group = (first if first.is_dir() else base) / f"dadi-faults-{os.getpid()}"
    file = group / ("memory.limit_in_bytes" if first.is_dir() else "memory.max")
    try:
        group.mkdir()
        if not first.is_dir():
            (base / "cgroup.subtree_control").write_text("+memory")
        file.write_text(str(limit))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise LabFailed(f"no memory cgroup can be made here: {error}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            (group.parent / "cgroup.procs").write_text(str(pid))
        with contextlib.suppress(OSError):
            group.rmdir()


def _open(pid: int) -> int:
    """Return the number below which all descriptors of a process lie."""
    return max(int(name) for name in os.listdir(f"/proc/{pid}/fd")) + 1


@dataclass(frozen=True)
class _Held:
    """What a process holds that could be forgotten; connections come and go."""

    descriptors: int
    loops: int
    threads: int

    def __str__(self) -> str:
        return f"{self.descriptors} descriptors, {self.loops} loop devices, {self.threads} threads"


def _held(pid: int, directory: Path) -> _Held:
    found = 0
    for entry in os.scandir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            found += not os.readlink(entry.path).startswith("socket:")
    mine = sum(file.startswith(f"{directory}/") for file in loops().values())
    return _Held(found, mine, len(os.listdir(f"/proc/{pid}/task")))


def _resident(pid: int) -> int:
    """Return the bytes of its own memory, without files."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    raise LabFailed("no RssAnon")


CASES = [
    Case("limit-clock", "limits: clock jumps", clock, PLAIN, layers=4),
    Case("limit-descriptors", "limits: no descriptors left", descriptors, PLAIN, layers=4),
    Case("limit-loops", "limits: no loop devices left", no_loop, PLAIN, layers=4),
    Case("limit-mounts", "limits: mounted and unmounted", mounts, UNMOUNTED, Bounds(longest=60), layers=0),
    Case("memory", "memory: 256 MiB, churn", memory, MEMORY, Bounds(longest=60), layers=0, alone=True),
]
