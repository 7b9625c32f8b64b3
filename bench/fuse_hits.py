"""FUSE hits (chunks present, before the swap) against the same reads of the local file in the page cache.

A real node with backfill off, all chunks of one layer read once: every read is then a hit, answered by our process out
of the page cache. fio reads with O_DIRECT, so that each of its reads reaches our process as it is: from the blob's file
in the node's FUSE mount, and from the loop device over that file, which is what EROFS reads.

What "the local file in the page cache" costs depends on the way to it, so there are two baselines: fio reading the
store's file without O_DIRECT (with it, it would read the disk and not the page cache), and fio reading, with O_DIRECT,
a buffered loop device over it.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from bench.harness import Bench, Row, alternately, fio
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.network import Network
from tests.lab.oci_layout import Image
from tests.lab.processes import Node, Registry, Superpeer

_LAZY = "[backfill]\nenabled = false\n"


def run(bench: Bench) -> None:
    """Measure random 4 KiB by 8 threads and one, and sequential 1 MiB."""
    bench.ours, bench.theirs = "FUSE hits", "local"
    size, seconds, rounds = (256 << 20, 2, 1) if bench.quick else (1 << 30, 4, 5)
    with Lab("bench", images.CACHE) as lab:
        image = images.synthetic(lab.root / "image", layers=1, files=4, size=size, compressible=0, whiteouts=False)
        node, device = _mounted_lazily(lab, image)
        in_mount = node.socket.parent / "fuse" / device["blob"].removeprefix("sha256:")
        local = _store_file(node, in_mount.name)
        bench.say("reading all chunks once")
        _read(in_mount)
        _read(local)
        misses = node.status()["reads"]["misses"]
        with _loop(local) as local_loop:
            for what, kind, block, jobs, unit, target in (
                ("4 KiB random, 8 threads", "randread", "4k", 8, "iops", 0.25),
                ("4 KiB random, 1 thread", "randread", "4k", 1, "iops", None),
                ("1 MiB sequential", "read", "1M", 1, "bytes", 0.5),
            ):
                measure = partial(_measure, kind=kind, block=block, jobs=jobs, unit=unit, seconds=seconds)
                file, loop, plain, plain_loop = alternately(
                    rounds,
                    partial(measure, in_mount, direct=True),
                    partial(measure, Path(device["device"]), direct=True),
                    partial(measure, local, direct=False),
                    partial(measure, local_loop, direct=True),
                )
                shown = "MB/s" if unit == "bytes" else "/s"
                bench.add(Row(f"{what}: FUSE file, local file", shown, file, plain, target=target))
                bench.add(Row(f"{what}: loop over either", shown, loop, plain_loop, target=target))
            _cost_of_one(bench, node, in_mount, seconds)
        if missed := node.status()["reads"]["misses"] - misses:
            bench.note(f"Not all reads were hits: {missed} missed. These numbers are worth nothing.")
        node.dadi("umount", str(lab.root / "mount"))
        bench.note(f"All by fio (psync, {seconds} s each, {rounds} rounds), of one file of {size >> 20} MiB.")


def _mounted_lazily(lab: Lab, image: Image) -> tuple[Node, dict[str, str]]:
    """Return a node that has mounted the image, and the row of its largest device in the status."""
    network = Network(lab)
    host = network.host("registry")
    registry = Registry(lab, host)
    reference = f"{registry.address}/bench/blob:latest"
    image.push(reference, prefix=host.prefix)
    superpeer = Superpeer(lab, network.host("superpeer"), [registry.address])
    node = Node(lab, network.host("node"), [superpeer.url], sections=_LAZY)
    (lab.root / "mount").mkdir()
    node.dadi("mount", reference, str(lab.root / "mount"))
    return node, max(node.status()["mounts"][0]["devices"], key=lambda row: int(row["bytes"]))


def _measure(path: Path, *, kind: str, block: str, jobs: int, unit: str, seconds: int, direct: bool) -> float:
    value = fio(path, kind=kind, block=block, jobs=jobs, seconds=seconds, direct=direct)[unit]
    return value / 1e6 if unit == "bytes" else value


def _cost_of_one(bench: Bench, node: Node, path: Path, seconds: int) -> None:
    """Say what one hit costs our process: the reason for whatever the ratios of small reads are."""
    before, requests = _cpu_seconds(node), node.status()["reads"]["requests"]
    fio(path, kind="randread", block="4k", jobs=8, seconds=seconds, direct=True)
    user, system = (after - b for after, b in zip(_cpu_seconds(node), before, strict=True))
    count = node.status()["reads"]["requests"] - requests
    bench.note("A 1 MiB hit is copied twice on its way, from the page cache "
               "to our buffer and from there to the reader; a local read once.")
    bench.note(f"One 4 KiB hit costs our process {user / count * 1e6:.1f} µs of CPU in Python and its libraries and "
               f"{system / count * 1e6:.1f} µs in the kernel (three system calls: take the request, read the page "
               "cache, answer), beside the reader's own; a read of a cached local file is one system call and no "
               "change of process.")  # fmt: skip


def _cpu_seconds(node: Node) -> tuple[float, float]:
    """Return the user and system time of a process so far (fields 14 and 15 of proc_pid_stat(5))."""
    fields = Path(f"/proc/{node.popen.pid}/stat").read_text().rpartition(")")[2].split()
    tick = os.sysconf("SC_CLK_TCK")
    return int(fields[11]) / tick, int(fields[12]) / tick


@contextmanager
def _loop(file: Path) -> Iterator[Path]:
    """Give a buffered read-only loop device over a file."""
    command = ["losetup", "--find", "--show", "--read-only", str(file)]
    device = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    try:
        yield Path(device)
    finally:
        subprocess.run(["losetup", "--detach", device], check=True)


def _store_file(node: Node, hexadecimal: str) -> Path:
    """Return the local sparse file that the blob's chunks are kept in."""
    found = [path for path in node.state.rglob("*") if hexadecimal in str(path) and path.is_file()]
    return max(found, key=lambda path: path.stat().st_size)


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
