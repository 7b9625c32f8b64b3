"""A crowd: time until the last of N nodes has the startup set, with and without nodes serving each other.

N hosts behind links of the same rate, in network namespaces; a superpeer that has never seen the image; Debian's
docker-registry with the image and its index (`dadi index`). On each host a dadi-node, with store, parents and peer
server, that fetches the startup set in the order of a trace, eight runs of at most 1 MiB at a time; there is no FUSE
mount and no program, which thirty-two times would be more than two processors can do (tests/lab/prefetching.py). All
begin at the same moment, which is when the clock starts: all are up then, and idle. What it measures is the same for
each N: asking the superpeer for the image (and it the registry), token and image index, joining, the first connections,
and then the startup set, until the last node has all of it in its store. The baseline is the same with
`peers.enabled = false`: N readers of one superpeer.
"""

from __future__ import annotations

import os
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from bench.harness import Bench, Row
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.crowd import Crowd, Setting
from tests.lab.crowd_image import Material, material
from tests.lab.processes import LabFailed

_RATE, _WORDS = "100mbit", "100 Mbit/s"
_SLOW_RATE, _SLOW_WORDS = "25mbit", "25 Mbit/s"
"""Where two processors are less of a limit."""
_NUMBERS = (1, 2, 4, 8, 16, 32)
_LIMIT = 1.6
_SIZE, _SHARE = 40 << 20, 0.6


@dataclass(frozen=True)
class Run:
    """One crowd. Seconds; copies; `busy`: the share of all processors' time that was used meanwhile."""

    last: float
    registry: float
    superpeer: float
    busy: float


def run(bench: Bench) -> None:
    """Measure all N with and without, then the first and the last at a lower rate."""
    bench.ours, bench.theirs = "with peers", "one superpeer"
    numbers = (1, 8) if bench.quick else _NUMBERS
    rounds = 1 if bench.quick else 2
    with Lab("bench", images.CACHE) as lab:
        made = material(lab, size=_SIZE, startup=_SHARE)
        runs = _measure(bench, made, _RATE, numbers, rounds, baseline=True)
        slow = _measure(bench, made, _SLOW_RATE, (numbers[0], numbers[-1]), rounds, baseline=False)
    for number in numbers:
        ours, theirs = ([r.last for r in runs[number, peers]] for peers in (True, False))
        bench.add(Row(f"{_WORDS}, N = {number}: the last has the startup set", "s", ours, theirs, better="less"))
    first, last = numbers[0], numbers[-1]
    for words, found in ((_WORDS, runs), (_SLOW_WORDS, slow)):
        once = statistics.median(r.last for r in found[first, True])
        many = found[last, True]
        bench.add(Row(f"{words}: N = {last} against N = {first}", "times", [r.last / once for r in many], limit=_LIMIT))
        bench.add(Row(f"{words}, N = {last}: processors busy", "%", [100 * r.busy for r in many]))
        bench.add(Row(f"{words}, N = {last}: copies of it that left the superpeer", "", [r.superpeer for r in many],
                      limit=4.0))  # fmt: skip
        bench.add(Row(f"{words}, N = {last}: copies of the image that left the registry", "",
                      [r.registry for r in many], limit=1.01))  # fmt: skip
    bench.note(f"The image: {made.size / 1e6:.1f} MB of incompressible files; the startup set's chunks have "
               f"{made.startup_bytes / 1e6:.1f} MB. One child a node (slots = 1).")  # fmt: skip
    bench.note("Nodes of the rack know each other before it begins, as where they were up before the image came.")
    bench.note(f"{last} nodes, superpeer, registry and the network between them share {os.cpu_count()} cores: where "
               "these are busy all the time they are what is measured.")  # fmt: skip


def _measure(bench: Bench, made: Material, rate: str, numbers: tuple[int, ...], rounds: int, *,
             baseline: bool) -> dict[tuple[int, bool], list[Run]]:  # fmt: skip
    found: dict[tuple[int, bool], list[Run]] = {}
    for turn in range(rounds):
        for number in numbers:
            for peers in (True, False) if baseline else (True,):
                with_or_without = "with" if peers else "without"
                bench.say(f"{rate}, round {turn + 1} of {rounds}: N = {number}, {with_or_without} peers")
                found.setdefault((number, peers), []).append(_run(made, rate, number, peers))
    return found


def _run(made: Material, rate: str, number: int, peers: bool) -> Run:
    setting = Setting(nodes=number, rate=rate, peers=peers, mounting=False)
    with Lab("bench", images.CACHE) as lab, Crowd(lab, made, setting) as crowd:
        if peers:
            crowd.wait_for_groups()
        crowd.go()
        time.sleep(max(0.0, crowd.began - time.monotonic()))
        before, began = _busy_seconds(), time.monotonic()
        readings = crowd.readings(timeout=600.0)
        busy = (_busy_seconds() - before) / (time.monotonic() - began) / (os.cpu_count() or 1)
        if wrong := crowd.wrong(readings):
            raise LabFailed("; ".join(wrong[:3]))
        sent = crowd.superpeer_copies() * made.size / made.startup_bytes
        return Run(max(r.startup for r in readings), crowd.registry_copies(), sent, busy)


def _busy_seconds() -> float:
    """Return the time that all processors together have not been idle."""
    fields = [int(field) for field in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    idle = fields[3] + fields[4]  # idle, iowait
    return (sum(fields[:8]) - idle) / os.sysconf("SC_CLK_TCK")
