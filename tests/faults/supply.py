"""What all cases share: one docker-registry, the door before it, images whose every byte is known.

What lives here: `Supply` and the contents of its images. What never does: anything of ours but `dadi index`.

    …-indexed    layers of random bytes with seek points beside them: a superpeer takes ranges of them
    …-plain      the same kind of layers without an index: a superpeer streams each of them as a whole

Each layer has the files NN/data and NN/small-K; KNOWN/IMAGE/NN/… has the same bytes. Random, so that neither a block of
one file nor a hole can pass for a block of another.
"""

from __future__ import annotations

import contextlib
import io
import random
import subprocess
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from tests.faults.door import Door
from tests.lab import images, pushing
from tests.lab.cleanup import Lab
from tests.lab.oci_layout import Layer, Layout
from tests.lab.processes import LabFailed
from tests.lab.registry import DockerRegistry

SMALL = 12
"""Small files in each layer, of up to 40 KiB."""


@dataclass(frozen=True)
class Content:
    """One image: its reference (through the door), and for each layer the paths of its files below a mount."""

    reference: str
    known: Path
    layers: tuple[tuple[str, ...], ...]
    diff_ids: tuple[str, ...]

    def files(self, mounted_at: Path, layers: range) -> list[tuple[Path, Path]]:
        """Return (path in the mount, path of the known bytes) of the files of some layers."""
        return [(mounted_at / name, self.known / name) for layer in layers for name in self.layers[layer]]


class Supply:
    """See the head of this file; a context manager. `lab` holds its files, and is not used for anything else."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self._exits = contextlib.ExitStack()
        self._made: dict[str, Content] = {}

    def __enter__(self) -> Supply:
        with contextlib.ExitStack() as undo:
            directory = self.lab.root / "registry"
            directory.mkdir()
            self.registry = undo.enter_context(DockerRegistry(directory, environment=self.lab.environment))
            self.door = undo.enter_context(Door(self.registry.host))
            self._exits = undo.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._exits.close()

    def image(self, name: str, *, layers: int, size: int, indexed: bool = False) -> Content:
        """Return an image of `layers` layers with a file of `size` bytes each, made and pushed when first asked for."""
        key = f"{name}-{layers}-{size}-{'indexed' if indexed else 'plain'}"
        if key not in self._made:
            self._made[key] = self._make(key, layers, size, indexed)
        return self._made[key]

    def _make(self, name: str, layers: int, size: int, indexed: bool) -> Content:
        known = self.lab.root / "known" / name
        layout, made, names = Layout(self.lab.root / "layout" / name), [], []
        for number in range(layers):
            layer, files = _layer(layout, known, random.Random(f"{name} {number}"), number, size)
            made.append(layer)
            names.append(files)
        image = layout.add_image("latest", made, command=["/bin/true"], environment={}, files=layers * (SMALL + 1),
                                 unpacked_size=layers * size, architecture=images.ARCHITECTURE)  # fmt: skip
        pushing.push(image, self.registry.host, f"faults/{name}", "latest")
        if indexed:
            self._index(f"{self.registry.host}/faults/{name}:latest")
        return Content(f"{self.door.host}/faults/{name}:latest", known, tuple(names),
                       tuple(layer.diff_id for layer in made))  # fmt: skip

    def _index(self, reference: str) -> None:
        command = [sys.executable, "-m", "dadi.cli", "index", reference, "--plain-http", "--spacing", "128KiB"]
        done = subprocess.run([*command, "--json"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise LabFailed(f"dadi index {reference}: {done.stderr.strip()}")


def _layer(layout: Layout, known: Path, chance: random.Random, number: int, size: int) -> tuple[Layer, tuple[str, ...]]:
    directory = known / f"{number:02}"
    directory.mkdir(parents=True)
    contents = {f"{number:02}/data": chance.randbytes(size)}
    contents |= {f"{number:02}/small-{n:02}": chance.randbytes(chance.randrange(1, 40 << 10)) for n in range(SMALL)}
    with layout.layer("fast-gzip") as writer:
        for name, data in contents.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            writer.tar.addfile(info, io.BytesIO(data))
            (known / name).write_bytes(data)
    return writer.result, tuple(contents)
