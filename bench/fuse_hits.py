"""FUSE hits (chunks present, before the swap) against the same reads of the local file in the page cache.

A real node with backfill off, all chunks of one layer read once: every read is then a hit, answered by our process out
of the page cache. fio reads the blob's file in the node's FUSE mount, and the loop device over it that EROFS uses, by
O_DIRECT, so that each read reaches our process; the baseline reads the store's file, cached, without O_DIRECT (with it,
it would read the disk).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from bench.harness import Bench, Row, alternately, fio
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.network import Network
from tests.lab.processes import Node, Registry, Superpeer

_LAZY = "[backfill]\nenabled = false\n"


def run(bench: Bench) -> None:
    """Measure random 4 KiB by 8 threads and one, and sequential 1 MiB."""
    bench.ours, bench.theirs = "FUSE hits", "local file, cached"
    size, seconds, rounds = (256 << 20, 2, 1) if bench.quick else (1 << 30, 4, 3)
    with Lab("bench", images.CACHE) as lab:
        image = images.synthetic(lab.root / "image", layers=1, files=4, size=size, compressible=0, whiteouts=False)
        network = Network(lab)
        host = network.host("registry")
        registry = Registry(lab, host)
        reference = f"{registry.address}/bench/blob:latest"
        image.push(reference, prefix=host.prefix)
        superpeer = Superpeer(lab, network.host("superpeer"), [registry.address])
        node = Node(lab, network.host("node"), [superpeer.url], sections=_LAZY)
        (lab.root / "mount").mkdir()
        node.dadi("mount", reference, str(lab.root / "mount"))
        device = max(node.status()["mounts"][0]["devices"], key=lambda row: int(row["bytes"]))
        hexadecimal = device["blob"].removeprefix("sha256:")
        in_mount = node.socket.parent / "fuse" / hexadecimal
        bench.say("reading all chunks once")
        for path in (in_mount, local := _store_file(node, hexadecimal)):
            _read(path)
        before = node.status()["reads"]["misses"]
        for what, kind, block, jobs, unit, target in (
            ("4 KiB random, 8 threads", "randread", "4k", 8, "iops", 0.25),
            ("4 KiB random, 1 thread", "randread", "4k", 1, "iops", None),
            ("1 MiB sequential", "read", "1M", 1, "bytes", 0.5),
        ):
            def measure(path: Path, direct: bool, kind: str = kind, block: str = block, jobs: int = jobs,
                        unit: str = unit) -> float:  # fmt: skip
                value = fio(path, kind=kind, block=block, jobs=jobs, seconds=seconds, direct=direct)[unit]
                return value / 1e6 if unit == "bytes" else value

            ours, loop, theirs = alternately(
                rounds,
                partial(measure, in_mount, True),
                partial(measure, Path(device["device"]), True),
                partial(measure, local, False),
            )
            shown = "MB/s" if unit == "bytes" else "/s"
            bench.add(Row(f"{what}, FUSE file", shown, ours, theirs, target=target))
            bench.add(Row(f"{what}, loop device over it", shown, loop, theirs))
        missed = node.status()["reads"]["misses"] - before
        if missed:
            bench.note(f"Not all reads were hits: {missed} missed. These numbers are worth nothing.")
        bench.note(f"All reads by fio (psync, {seconds} s each) of one file of {size >> 20} MiB.")


def _store_file(node: Node, hexadecimal: str) -> Path:
    """Return the local sparse file that the blob's chunks are kept in."""
    found = [path for path in node.state.rglob("*") if hexadecimal in str(path) and path.is_file()]
    return max(found, key=lambda path: path.stat().st_size)


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
