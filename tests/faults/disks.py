"""The node's disk: full, with blocks that cannot be read or written, read-only, and a state that is damaged.

The full one is a file system of its own, in a file; I/O errors and a disk that may not be written come from a layer
below the node (injured.py), since few kernels have a device that can be told to fail.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

from dadi.errors import DadiError
from tests.faults.frame import Case, Run
from tests.faults.injured import READS, WRITES
from tests.faults.scene import InjuredNode, Node, Setting
from tests.lab.processes import LabFailed

_LAYERS, _SIZE = 4, 3 << 20
SETTING = Setting(layers=_LAYERS, size=_SIZE, mounted=False)


@contextlib.contextmanager
def _disk(node: Node, size: int) -> Iterator[None]:
    """Give a node a disk of its own for its state. The node is not started."""
    state, file = node.directory / "state", node.directory / "disk"
    state.mkdir()
    with file.open("wb") as out:
        out.truncate(size)
    _run("mkfs.ext4", "-q", "-m", "0", "-O", "^has_journal", "-E", "lazy_itable_init=0", str(file))
    _run("mount", "-o", "loop", str(file), str(state))
    try:
        yield
    finally:
        with contextlib.suppress(DadiError):
            node.unmount(node.image, force=True)
        node.stop()
        _run("umount", "-l", str(state))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabFailed(f"{' '.join(command)}: {done.stderr.strip()}")


def full(run: Run) -> int:
    """The disk has room for less than half of the image, and then somebody else fills it to the last byte."""
    node = Node(run.scene, "full", run.scene.urls)
    with _disk(node, _LAYERS * _SIZE // 2):
        node.start()
        node.mount(run.scene.content.reference, node.image)
        with run.load(node, layers=range(_LAYERS)):
            run.reads_go_on()
            with contextlib.suppress(OSError), (node.directory / "state" / "other").open("wb", 0) as other:
                while True:
                    other.write(bytes(1 << 16))
            run.reads_go_on(reads=3)
        free = os.statvfs(node.directory / "state").f_bavail
        run.note = f"{free} blocks free; noted: {', '.join(sorted(node.noted()))}"
        (node.directory / "state" / "other").unlink()
        with run.load(node, layers=range(_LAYERS)):
            run.reads_go_on(reads=3)
    return 1


def _injured(run: Run, title: str, injury: dict[str, object], reads: int) -> int:
    """Have calls on the files of the state fail while programs read what is there, and what is not."""
    node = InjuredNode(run.scene, title, run.scene.urls)
    run.scene.nodes.append(node)
    node.start()
    node.mount(run.scene.content.reference, node.image)
    with run.load(node, layers=range(_LAYERS // 2)):
        run.reads_go_on()
        node.injure(injury)
        run.reads_go_on(reads=reads)
    with run.load(node, layers=range(_LAYERS)):
        run.reads_go_on(reads=reads)
        node.injure({})
        run.reads_go_on(reads=reads)
    run.note = f"noted: {', '.join(sorted(node.noted()))}"
    return 1


def failing(run: Run) -> int:
    """Every third call on the state's files fails with an I/O error, reads as well as writes."""
    return _injured(run, "eio", {"errno": "EIO", "share": 0.3, "calls": [*READS, *WRITES]}, 3)


def read_only(run: Run) -> int:
    """Nothing can be written from one moment to the next: what is there is served, the rest passes by."""
    return _injured(run, "ro", {"errno": "EROFS", "share": 1.0, "calls": WRITES}, 3)


def damaged(run: Run) -> int:
    """Files of the state are cut off, emptied, filled with something else, or from a version to come."""
    node, hurt = run.scene.nodes[0], 0
    state = node.directory / "state"
    node.mount(run.scene.content.reference, node.image)
    for turn in range(run.pick(4, 40)):
        with run.load(layers=range(_LAYERS)):
            run.reads_go_on(reads=10)
        node.unmount(node.image)
        node.stop()
        # Not the data of a blob that is whole: they were verified when it became so, `dadi verify` does it again.
        files = sorted(file for file in state.rglob("*") if file.is_file() and not file.is_symlink()
                       and not (file.name == "data" and file.with_name("complete").exists()))  # fmt: skip
        for file in run.chance.sample(files, min(len(files), 5)):
            data = file.read_bytes()
            how = ("cut", "empty", "noise", "later")[(turn + hurt) % 4]
            at = run.chance.randrange(len(data) + 1)
            file.write_bytes({
                "cut": data[:at], "empty": b"", "noise": data[:at] + run.chance.randbytes(64) + data[at + 64 :],
                "later": data.replace(b'"version":1', b'"version":99').replace(b"DADIBLB1", b"DADIBLB9"),
            }[how])  # fmt: skip
            hurt += 1
        (state / "store" / "running").touch()  # whoever damages it so is not somebody who stops cleanly
        node.start()
        node.mount(run.scene.content.reference, node.image)
    with run.load(layers=range(_LAYERS)):
        run.reads_go_on(reads=3)
    run.note = f"noted: {', '.join(sorted(node.noted())) or 'nothing'}"
    return hurt


CASES = [
    Case("disk-full", "disk: full", full, SETTING, layers=0),
    Case("disk-failing", "disk: I/O errors", failing, SETTING, layers=0),
    Case("disk-read-only", "disk: read-only", read_only, SETTING, layers=0),
    Case("disk-damaged", "disk: state damaged, or from the future", damaged, SETTING, layers=0, alone=True),
]  # fmt: skip
