"""Sudden power loss: a node's state as a disk may have it afterwards, and a new node that starts on it.

While a node writes, its state is copied twice, a moment apart. Of what differs, a disk may have got any part: each page
of 4 KiB is taken from the newer copy or the older one, files that have come are there, empty, torn or not there, files
that have gone may be there again. That drops even most of what had been synced; what is kept is what the store relies
on (dadi/blobs/layout.py): where `complete` is there, the data that were synced before it. The new node serves the same
image; every byte is compared.
"""

from __future__ import annotations

import filecmp
import random
import shutil
import subprocess
import time
from pathlib import Path

from tests.faults.frame import Bounds, Case, Run
from tests.faults.scene import Node, Setting
from tests.faults.supply import Content

_PAGE = 4096
_LAYERS, _SIZE = 6, 2 << 20
SETTING = Setting(layers=_LAYERS, size=_SIZE, backfill="quiet = 0\nrate = 3000000", mounted=False)


def lost(run: Run) -> int:
    node, losses, again, torn = run.scene.nodes[0], 0, 0, 0
    for number in range(run.pick(2, 12)):
        image = run.scene.supply.image(f"power{number}", layers=_LAYERS, size=_SIZE)
        directory = node.directory / f"image{number}"
        node.mount(image.reference, directory)
        with run.load_files(image.files(directory, range(_LAYERS)), readers=3):
            for _ in range(run.pick(3, 5)):
                time.sleep(run.chance.uniform(0.1, 0.8))
                older = _copy(node.directory / "state", run.scene.directory / "older")
                time.sleep(run.chance.uniform(0.0, 0.4))
                newer = _copy(node.directory / "state", run.scene.directory / "newer")
                for complete in newer.glob("store/blobs/*/complete"):  # it may have come after `data` was copied
                    synced = (complete.parent / "data").relative_to(newer)
                    shutil.copyfile(node.directory / "state" / synced, newer / synced)
                losses += 1
                after = _Fallen(run, f"n{losses:04}")
                torn += merge(older, newer, after.directory / "state", run.chance)
                after.renamed()
                (after.directory / directory.name).mkdir()
                after.start()
                again += sum(row["directory"] == str(after.directory / directory.name)
                             for row in after.status()["mounts"])  # fmt: skip
                _check(run, after, after.directory / directory.name, image)
        node.unmount(directory)
    run.note = f"{losses} losses, {torn} pages and files that differed; the mount was found again {again} times"
    assert torn, "nothing was being written"
    return losses


class _Fallen(Node):
    """A node on a state that somebody else has written: paths in it, of the same length, are made its own."""

    def __init__(self, run: Run, name: str) -> None:
        self._run = run
        super().__init__(run.scene, name, run.scene.urls)

    def renamed(self) -> None:
        """Let the state speak of this node's directory where it speaks of the other's."""
        old, new = f"/{self._run.scene.nodes[0].name}/".encode(), f"/{self.name}/".encode()
        assert len(old) == len(new), "the same length, so that what is torn stays torn"
        for file in (self.directory / "state").rglob("*.json"):
            file.write_bytes(file.read_bytes().replace(old, new))


def _check(run: Run, node: Node, directory: Path, image: Content) -> None:
    """Mount the image if it is not, compare all of it, and take the node down."""
    if not any(row["directory"] == str(directory) for row in node.status()["mounts"]):
        node.mount(image.reference, directory)
    run.wait_for(directory.is_mount, 30, f"{directory} is mounted again: {node.status()['mounts']}")
    files = image.files(directory, range(_LAYERS))
    with run.load_files(files, readers=3, pace=0.0):
        for path, known in files:
            assert filecmp.cmp(path, known, shallow=False), f"{path} is not what it was"
    node.unmount(directory)
    assert node.stop() == 0


def _copy(source: Path, to: Path) -> Path:
    """Copy a directory that is being written; what goes while it is copied has gone."""
    shutil.rmtree(to, ignore_errors=True)
    subprocess.run(["cp", "-a", "--sparse=always", source, to], check=False, stderr=subprocess.DEVNULL)
    return to


def merge(older: Path, newer: Path, to: Path, chance: random.Random) -> int:
    """Make what a disk may have between two states; return how many pages and files differed."""
    differed = 0
    names = {file.relative_to(base) for base in (older, newer) for file in base.rglob("*")}
    for name in sorted(names):
        old, new, target = older / name, newer / name, to / name
        if old.is_dir() or new.is_dir():
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        before = old.read_bytes() if old.exists() else None
        after = new.read_bytes() if new.exists() else None
        synced = name.name == "data" and (to / name).with_name("complete").exists()
        if before == after or synced:
            if after is not None:  # else a link to who holds the lock
                shutil.copy2(new, target)
            continue
        differed += 1
        if before is None or after is None:
            there = before if after is None else after
            how = chance.choice(["as it is", "not there", "empty", "torn"])
            if how == "not there":
                continue
            kept, changed = _torn(bytes(len(there or b"")), there or b"", chance)
            target.write_bytes({"as it is": there or b"", "empty": b"", "torn": kept}[how])
        else:
            data, changed = _torn(before, after, chance)
            target.write_bytes(data)
        differed += changed
        shutil.copystat(new if new.exists() else old, target)
    return differed


def _torn(before: bytes, after: bytes, chance: random.Random) -> tuple[bytes, int]:
    """Return a mixture of two contents of a file, page by page, and how many pages differed."""
    size = chance.choice([len(before), len(after)])
    pages, changed = [], 0
    for at in range(0, size, _PAGE):
        one, other = before[at : at + _PAGE], after[at : at + _PAGE]
        changed += one != other
        pages.append((one if chance.random() < 0.5 else other).ljust(min(_PAGE, size - at), b"\0"))
    return b"".join(pages)[:size], changed


CASES = [Case("power-lost", "power: lost while the store is written", lost, SETTING, Bounds(longest=60), layers=0,
              alone=True)]  # fmt: skip
