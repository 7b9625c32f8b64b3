"""Startup traces: time from `ctr run` to ready, without a trace, with one, and with everything local.

Three images from Debian's docker-registry by containerd and runc; a relay between node and superpeer adds a round trip
of 1 ms and of 20 ms. Each start is that of a node and a containerd that are new; the image is pulled before (its index
and metadata are there, no byte of its layers). "with trace": another node has started the image once. "local": all
layers were fetched before and lie in the page cache, as plain files under new devices. Backfill is off, so that nothing
but the trace is ahead of the reads; ranges come uncompressed, as is right where links are faster than processors.

The cost of recording is calculated: what a look, a hit's mark and a miss cost (measured here), times how often a start
has them; it is far below what two starts differ in by themselves. As a check on it, the processor time that the node
takes from `ctr run` to ready (all its threads, by the scheduler's own nanoseconds: not its waiting) is measured of
starts that only record beside starts that do nothing, in turn.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.harness import Bench, Row
from dadi.index.chunks import blob_of
from dadi.prefetch.record import Recorder, Window
from tests.lab import images, server_images
from tests.lab.cleanup import Lab
from tests.lab.containerd import Containerd
from tests.lab.network import Host, Network
from tests.lab.oci_layout import Image
from tests.lab.processes import LabFailed, Node, Process, Registry, Superpeer

_IMAGES: tuple[tuple[str, Callable[..., Image]], ...] = (
    ("interpreter", images.debian_python), ("web server", server_images.web_server),
    ("database", server_images.database),
)  # fmt: skip
_TRIPS = (1, 20)
_KINDS = ("without", "recording", "with", "local")
_NEAR_LOCAL, _SOONER, _COST = 1 / 1.3, 3.0, 0.02
_PLAIN = "[read]\ncompress = false\n"
_LAZY = f"{_PLAIN}[backfill]\nenabled = false\n[trace]\nquiet = 1.0\nenabled = "
_RECORDING = "true\nreplay = false\n"
_EAGER = "[backfill]\nquiet = 0\n[trace]\nenabled = false\n"


def run(bench: Bench) -> None:
    """Measure the images at both distances."""
    bench.ours, bench.theirs = "with trace", "compared with"
    made = {name: make(report=bench.say) for name, make in _IMAGES}
    for trip in _TRIPS:
        seconds: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in made for kind in _KINDS}
        processor: dict[tuple[str, str], list[float]] = {(name, kind): [] for name in made for kind in _KINDS}
        told: dict[str, dict[str, Any]] = {}
        for number in range(1 if bench.quick else 3):
            bench.say(f"{trip} ms, round {number + 1}")
            with Lab("bench") as lab:
                _round(bench, lab, made, trip, seconds, processor, told)
        for name in made:
            ours, without, local = (seconds[name, kind] for kind in ("with", "without", "local"))
            bench.add(Row(f"{trip} ms, {name}: ready, against without a trace", "s", ours, without, better="less",
                          target=_SOONER if trip == 20 else None))  # fmt: skip
            bench.add(Row(f"{trip} ms, {name}: ready, against all local", "s", ours, local, better="less",
                          target=_NEAR_LOCAL if trip == 1 else None))  # fmt: skip
            row = told[name]
            bench.note(f"{trip} ms, {name}: {row['used_chunks']} of the {row['trace_chunks']} chunks of the trace were "
                       f"read; it had {row['covered']:.1%} of what was read.")  # fmt: skip
            if trip == _TRIPS[0]:
                share = _cost(row["read_chunks"]) / min(local)
                bench.add(Row(f"{name}: recording, share of the start's time (calculated)", "", [share], limit=_COST))
                bench.add(Row(f"{name}: the node's processor time in a start, recording against not", "s",
                              processor[name, "recording"], processor[name, "without"], better="less"))  # fmt: skip


def _round(bench: Bench, lab: Lab, made: dict[str, Image], trip: int, seconds: dict[tuple[str, str], list[float]],
           processor: dict[tuple[str, str], list[float]], told: dict[str, dict[str, Any]]) -> None:  # fmt: skip
    network = Network(lab)
    registry_host, near = network.host("registry"), network.host("superpeer")
    registry = Registry(lab, registry_host)
    superpeer = Superpeer(lab, near, [registry.address])
    far = _relay(lab, near, trip)
    for number, (name, image) in enumerate(made.items()):
        reference = f"{registry.address}/bench/image{number}:latest"
        image.push(reference, prefix=registry_host.prefix)
        start = _Starts(lab, network, number, image, reference)
        # Also indexes the image, and has all that a start reads brought to the superpeer.
        start("teacher", superpeer.url, _LAZY + "true\n")
        _wait_for_traces(superpeer, number + 1)
        for kind, sections in (("without", _LAZY + "false\n"), ("recording", _LAZY + _RECORDING),
                               ("with", _LAZY + "true\n"), ("local", _EAGER)):  # fmt: skip
            if kind == "recording" and trip != _TRIPS[0]:
                continue
            took, row = start(kind, far, sections)
            bench.say(f"{trip} ms, {name}, {kind}: {took:.2f} s, of the node's processor {start.processor:.2f} s")
            seconds[name, kind].append(took)
            processor[name, kind].append(start.processor)
            if kind == "with":
                told[name] = row


class _Starts:
    """Starts of one image, each on a machine of its own. `processor`: seconds that the last start took of its node."""

    def __init__(self, lab: Lab, network: Network, number: int, image: Image, reference: str) -> None:
        self._lab = lab
        self._network = network
        self._number = number
        self._image = image
        self._reference = reference
        self.processor = 0.0

    def __call__(self, kind: str, url: str, sections: str) -> tuple[float, dict[str, Any]]:
        """Return the seconds from `ctr run` to the first line, and what the node says of the trace."""
        name = f"{kind[:5]}{self._number}"
        host = self._network.host(name)
        node = Node(self._lab, host, [url], name=name, sections=sections, options="unmount_on_stop = true")
        if kind == "local":
            self._bring_all(node, name)
        containerd = Containerd(self._lab, host, f"c-{name}", snapshotter=node.socket.parent / "snapshotter.sock")
        containerd.pull_lazily(self._reference)
        before, begun = _processor(node), time.monotonic()
        with containerd.running(self._reference, f"run-{name}", self._image.command, "dadi") as line:
            took = time.monotonic() - begun
            self.processor = _processor(node) - before
        if line != self._image.facts["first_line"]:
            raise LabFailed(f"the container said {line!r}")
        if kind in ("with", "teacher"):
            _wait(node, lambda: bool(node.status()["trace"]["images"]))
        rows = node.status()["trace"]["images"]
        containerd.ctr("image", "rm", "--sync", self._reference)
        containerd.stop()
        node.stop()
        return took, rows[0] if rows else {}

    def _bring_all(self, node: Node, name: str) -> None:
        directory = self._lab.root / f"all-{name}"
        directory.mkdir()
        node.dadi("mount", self._reference, str(directory))
        _wait(node, lambda: [mount["state"] for mount in node.status()["mounts"]] == ["local"])
        node.dadi("umount", str(directory))


def _processor(node: Node) -> float:
    """Return the seconds that a node's threads have run (proc_pid_schedstat: nanoseconds first)."""
    total = 0
    for task in Path(f"/proc/{node.popen.pid}/task").iterdir():
        with contextlib.suppress(OSError):  # it has ended
            total += int((task / "schedstat").read_text().split()[0])
    return total / 1e9


def _relay(lab: Lab, host: Host, trip: int) -> str:
    port = 7170
    command = [sys.executable, "-m", "tests.lab.relay", f"{host.address}:{port}", f"{host.address}:7070",
               str(trip / 1000)]  # fmt: skip
    relay = Process(lab, "relay", command, host=host)
    relay.wait_until(lambda: host.get(host.address, port, "/healthz")[0] == 200)
    return f"http://{host.address}:{port}"


def _wait(process: Process, ready: Callable[[], bool]) -> None:
    process.wait_until(ready, timeout=120)


def _wait_for_traces(superpeer: Superpeer, images: int) -> None:
    _wait(superpeer, lambda: superpeer.status()["traces"]["images"] >= images)


def _cost(chunks: int) -> float:
    """Return the seconds that recording takes of a start that reads so many chunks, and then of a quiet second."""
    blobs = [blob_of(bytes([number]) * 4096 * 4000, 4096) for number in range(10)]
    marks = {blob.digest: bytearray(4000) for blob in blobs}
    recorder = Recorder(marks.get)
    window = Window(blobs, time.monotonic())
    recorder._windows.append(window)
    recorder._by_blob = {blob.digest: [window] for blob in blobs}
    rounds = 2000
    begun = time.process_time()
    for _ in range(rounds):
        recorder.look()
    look = (time.process_time() - begun) / rounds
    begun = time.process_time()
    for number in range(rounds):
        recorder.missed(blobs[number % 10], range(number // 10, number // 10 + 1))
    miss = (time.process_time() - begun) / rounds
    flags, reads = bytearray(4000), 64 * chunks  # of 4 KiB: more than the kernel asks for
    begun = time.process_time()
    for number in range(reads):
        flags[number % 4000] = 1
    hits = time.process_time() - begun
    return look * 80 + miss * chunks + hits  # a look every 25 ms, for two seconds
