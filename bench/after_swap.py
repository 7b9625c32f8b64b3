"""After the swap: a mounted image against the same tree unpacked on the same disk.

The mount is EROFS over loop devices over local files, the other side is what `umoci unpack` makes of the same image,
on the same file system. Cold: the machine's page, dentry and inode caches have been emptied. Warm: the same act right
after it has been done once. Sides and rounds alternate.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.harness import Bench, Row, alternately, drop_caches, fio
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.compare import unpacked
from tests.lab.network import Network
from tests.lab.processes import LabFailed, Node, Registry, Superpeer

_NOW = '[backfill]\nquiet = "0s"\n'
_TARGET = 0.95
_COLD = (
    "Where cold reads fall short: each passes the loop device before it is a read of the local file, "
    "and a tar's data begins at multiples of 512, so that a page of 4 KiB mostly lies across two blocks of the disk. "
    "When this was written, fio read a bare loop device (O_DIRECT, 8 threads) 51,000 times a second at aligned offsets "
    "and 40,000 to 49,000 times at such offsets, the file itself 55,000 times."
)


def run(bench: Bench) -> None:
    """Measure find and tar of the Debian tree, sequential and random reads of one large file."""
    bench.ours, bench.theirs = "mounted", "unpacked"
    rounds, seconds, size = (2, 2, 128 << 20) if bench.quick else (5, 4, 512 << 20)
    tree = images.debian_python(report=bench.say, zstd=False)
    with Lab("bench", images.CACHE) as lab:
        large = images.synthetic(lab.root / "large", layers=1, files=1, size=size, compressible=0, whiteouts=False)
        bench.say("mounting, back-filling and unpacking")
        network = Network(lab)
        host = network.host("registry")
        registry = Registry(lab, host)
        superpeer = Superpeer(lab, network.host("superpeer"), [registry.address])
        node = Node(lab, network.host("node"), [superpeer.url], sections=_NOW)
        sides: dict[str, list[Path]] = {}
        for name, image in (("tree", tree), ("large", large)):
            reference = f"{registry.address}/bench/{name}:latest"
            image.push(reference, prefix=host.prefix)
            sides[name] = [_mounted(lab, node, name, reference), unpacked(image, lab.root / f"{name}-unpacked")]
        node.wait_until(lambda: all(row["state"] == "local" for row in node.status()["mounts"]), timeout=300)
        node.stop()  # what follows must not need it
        for what, act in (("find", _find), ("tar", _tar)):
            for warm in (False, True):
                measure = [partial(_timed, act, side, warm) for side in sides["tree"]]
                ours, theirs = alternately(rounds, *measure)
                label = f"{what} of the Debian tree, {'warm' if warm else 'cold'}"
                bench.add(Row(label, "s", ours, theirs, better="less", target=_TARGET))
        for what, kind, block, jobs, unit in (
            ("sequential 1 MiB", "read", "1M", 1, "bytes"),
            ("random 4 KiB, 8 threads", "randread", "4k", 8, "iops"),
        ):
            for warm in (False, True):
                read = partial(_fio, kind=kind, block=block, jobs=jobs, unit=unit, seconds=seconds if warm else None)
                ours, theirs = alternately(rounds, *(partial(read, side / "data/0/0") for side in sides["large"]))
                label = f"{what}, {'warm' if warm else 'cold, each block once'}"
                bench.add(Row(label, "MB/s" if unit == "bytes" else "/s", ours, theirs, target=_TARGET))
        for name in sides:
            subprocess.run(["umount", str(sides[name][0])], check=True)
    bench.note(f"The Debian tree: {tree.files:,} paths, {tree.unpacked_size / 1e6:.0f} MB; the large file: "
               f"{size >> 20} MiB of random bytes. dadi-node was stopped before measuring.")  # fmt: skip
    if any(row.met is False and "cold" in row.what for row in bench.rows):
        bench.note(_COLD)


def _mounted(lab: Lab, node: Node, name: str, reference: str) -> Path:
    directory = lab.root / f"{name}-mounted"
    directory.mkdir()
    node.dadi("mount", reference, str(directory))
    return directory


def _fio(file: Path, *, kind: str, block: str, jobs: int, unit: str, seconds: int | None) -> float:
    drop_caches()
    if seconds is not None:
        _read(file)
    value = fio(file, kind=kind, block=block, jobs=jobs, seconds=seconds)[unit]
    return value / 1e6 if unit == "bytes" else value


def _timed(act: Callable[[Path], None], path: Path, warm: bool) -> float:
    drop_caches()
    if warm:
        act(path)
    start = time.perf_counter()
    act(path)
    return time.perf_counter() - start


def _find(directory: Path) -> None:
    command = ["find", str(directory), "-xdev", "-printf", "%s %m %T@ %l\n"]
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)


def _tar(directory: Path) -> None:
    # through a pipe: GNU tar does not read file contents when it sees that it writes to /dev/null
    with subprocess.Popen(["tar", "-C", str(directory), "-cf", "-", "."], stdout=subprocess.PIPE) as tar:
        subprocess.run(["cat"], stdin=tar.stdout, stdout=subprocess.DEVNULL, check=True)
    if tar.returncode != 0:
        raise LabFailed(f"tar of {directory} ended with status {tar.returncode}")


def _read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        while file.read(1 << 20):
            pass
