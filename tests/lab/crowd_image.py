"""The image that a crowd starts: made once, in a registry's storage, with its index; what is in it, and its trace.

What lives here: `Material` and how it is made. What never does: who reads it (tests/lab/crowd.py).
"""

from __future__ import annotations

import random
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from dadi.index.chunks import DEFAULT_CHUNK_SIZE
from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.oci_layout import Image
from tests.lab.processes import dadi
from tests.lab.reading import Item, tree_digest
from tests.lab.registry import DockerRegistry

NAME = "crowd/image:latest"
_NEIGHBOURS = 8
"""Files that lie side by side in a layer and are read one after the other."""
_CHUNK, _RUN = DEFAULT_CHUNK_SIZE, 4


@dataclass(frozen=True)
class Material:
    """An image in a registry's storage, made once and copied for each crowd.

    `startup`: paths in the order in which a program reads them at its start; `trace`: the chunks that they are in, as
    (diff ID, first chunk, stop), each chunk once, in that order.
    """

    image: Image
    data: Path
    digest: str
    startup: tuple[str, ...]
    trace: tuple[tuple[str, int, int], ...]
    startup_bytes: int
    """Of the chunks that the startup set touches: what a node must fetch."""

    @property
    def size(self) -> int:
        """Bytes of all uncompressed layers: what one node fetches to have all."""
        return sum(layer.tar_size for layer in self.image.layers)


def material(lab: Lab, *, size: int = 24 << 20, files: int = 320, layers: int = 2, startup: float = 0.5,
             indexed: bool = True) -> Material:  # fmt: skip
    """Make an image of incompressible files, push it into a registry's storage, and index it there (`dadi index`)."""
    image = images.synthetic(lab.root / "layout", layers=layers, files=files // layers, size=size // layers,
                             compressible=0, whiteouts=False)  # fmt: skip
    with DockerRegistry(lab.root / "registry", environment=lab.environment) as registry:
        reference = f"{registry.host}/{NAME}"
        image.push(reference)
        if indexed:
            dadi(lab, "index", reference, "--plain-http", "--json")
        data = registry.data
    items, places = _contents(image)
    names = list(places)  # as they lie in the layers
    neighbours = [names[at : at + _NEIGHBOURS] for at in range(0, len(names), _NEIGHBOURS)]
    random.Random(1).shuffle(neighbours)
    first = tuple(name for some in neighbours[: round(len(neighbours) * startup)] for name in some)
    trace = tuple(_trace(image, [places[name] for name in first]))
    sizes = {layer.diff_id: layer.tar_size for layer in image.layers}
    touched = sum(min(stop * _CHUNK, sizes[diff_id]) - start * _CHUNK for diff_id, start, stop in trace)
    return Material(image, data, tree_digest(items.values()), first, trace, touched)


def _contents(image: Image) -> tuple[dict[bytes, Item], dict[str, tuple[str, int, int]]]:
    """Return what the merged tree holds, and where each file's bytes are: diff ID, offset, size.

    Read from the layers by Python's tarfile; they have no whiteouts.
    """
    items: dict[bytes, Item] = {b"": (b"", "directory", 0, "")}
    places: dict[str, tuple[str, int, int]] = {}
    for layer in image.layers:
        blob = image.layout / "blobs" / "sha256" / layer.blob.digest.removeprefix("sha256:")
        with tarfile.open(blob) as tar:
            for member in tar:
                path = member.name.encode()
                for parent in list(Path(member.name).parents)[:-1]:
                    items[str(parent).encode()] = str(parent).encode(), "directory", 0, ""
                if member.isdir():
                    items[path] = path, "directory", 0, ""
                else:
                    file = tar.extractfile(member)
                    assert file is not None
                    items[path] = path, "file", member.size, sha256(file.read()).hexdigest()
                    places[member.name] = layer.diff_id, member.offset_data, member.size
    return items, places


def _trace(image: Image, places: Sequence[tuple[str, int, int]]) -> Iterator[tuple[str, int, int]]:
    """Yield the chunks that are touched, in order, each once, as runs of at most `_RUN`."""
    seen: set[tuple[str, int]] = set()
    run: list[tuple[str, int]] = []
    for diff_id, offset, size in places:
        for chunk in range(offset // _CHUNK, -(-(offset + size) // _CHUNK)):
            if (diff_id, chunk) in seen:
                continue
            seen.add((diff_id, chunk))
            if run and (len(run) == _RUN or run[-1] != (diff_id, chunk - 1)):
                yield *run[0], run[-1][1] + 1
                run = []
            run.append((diff_id, chunk))
    if run:
        yield *run[0], run[-1][1] + 1
