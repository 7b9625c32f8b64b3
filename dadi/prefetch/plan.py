"""What one superpeer warms of an image, and whether that can be done in time. Pure.

    share     of each blob, the superpeer that owns it and the one that stands in for it (`owners.py`); where there is
              one superpeer only, everything. Owned blobs first: nobody is waited for while others wait for us
    in time   what must come from the registry / the rate ≤ the deadline - the start
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from dadi.errors import InvalidRequest
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex, ImageLayer
from dadi.peers.owners import owners

COPIES = 2
"""Superpeers that have each blob: its owner and its stand-in."""
_MARGIN = 1.05
"""On a rate that would do: whoever reads of it needs a while to ask again."""


class Wanted(msgspec.Struct, frozen=True):
    """Runs of chunks of a layer's tar. `order`: the superpeers that may have it, the owner first; `place`: ours."""

    layer: ImageLayer
    runs: tuple[range, ...]
    order: tuple[str, ...] = ()
    place: int = 0

    @property
    def size(self) -> int:
        """Bytes of the runs."""
        return size_of(self.layer.blob, self.runs)


def size_of(blob: Blob, runs: Iterable[range]) -> int:
    """Return the bytes of runs of chunks."""
    return sum(blob.table.span(run)[1] for run in runs if run)


def share(
    index: ImageIndex, superpeers: Sequence[str], own: str, chunks: Mapping[Blob, Sequence[range]] | None = None
) -> list[Wanted]:
    """Return what the superpeer `own` warms of an image; of `chunks` only, if they are given.

    Layers that no file refers to are no devices: nobody reads them, and they are left out.
    """
    mine: list[Wanted] = []
    for layer in {layer.diff_id: layer for layer in devices(index)}.values():
        blob = layer.blob
        runs = (range(blob.table.count),) if chunks is None else tuple(chunks.get(blob, ()))
        runs = tuple(run for run in (bounded(run, blob) for run in runs) if run)
        order = tuple(owners(blob.digest, superpeers)[:COPIES]) if own in superpeers else ()
        if runs and (not order or own in order):
            mine.append(Wanted(layer, runs, order, order.index(own) if order else 0))
    return sorted(mine, key=lambda wanted: wanted.place)


def devices(index: ImageIndex) -> list[ImageLayer]:
    """Return the layers that are read when the image is used."""
    return [index.layers[number] for number in index.devices]


def bounded(run: range, blob: Blob) -> range:
    """Return the part of a run that the blob has: a trace may be of something else."""
    return range(max(0, run.start), min(run.stop, blob.table.count))


def steps(run: range, blob: Blob, most: int) -> Iterable[range]:
    """Cut a run into steps of at most `most` bytes, one chunk at least."""
    count = max(1, most // blob.table.chunk_size)
    return (run[at : at + count] for at in range(0, len(run), count))


def cost(layer: ImageLayer, size: int) -> int:
    """Return what bytes of a layer's tar cost the registry, about: compressed they are fewer."""
    return math.ceil(size * layer.layer_size / layer.table.size) if layer.table.size else 0


def check_deadline(size: int, rate: float, *, at: float, deadline: float, now: float) -> None:
    """Raise InvalidRequest, with the rate that would do, if `size` bytes do not come in time at `rate` (0: any)."""
    if not deadline:
        return
    left = deadline - max(at, now)
    if left <= 0:
        hint = "give a later --deadline, or an earlier --at"
        raise InvalidRequest("the deadline is over before it begins", hint=hint)
    if rate and size > rate * left:
        takes, has = math.ceil(size / rate), math.floor(left)
        raise InvalidRequest(f"{size} bytes take {takes} s at {bits(rate)}, and there are {has} s until the deadline",
                             hint=f"--rate {bits(_MARGIN * size / left)} would do")  # fmt: skip


def bits(rate: float) -> str:
    """Return a rate (bytes per second) as `--rate` takes it, rounded up: it must do."""
    for unit, size in (("Gbit", 125_000_000), ("Mbit", 125_000), ("kbit", 125)):
        if rate >= size:
            return f"{math.ceil(rate / size * 100) / 100:.10g}{unit}"
    return f"{math.ceil(rate)}B"
