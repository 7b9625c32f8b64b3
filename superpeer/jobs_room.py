"""Whether what prefetch jobs bring fits here, and what would be evicted for it: said before anything is brought.

    needs     what of a job's image belongs here and is not, layer by layer: one that several images have counts once.
              Of an image without an index here only the compressed layers are known: so much at least
    check     the needs of all images of one command (`jobs_together.py`) against what is free, and what nobody uses.
              What one of them needs is never evicted for another
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from dadi.errors import StoreFull
from dadi.index.image import ImageLayer
from dadi.oci.reference import Reference
from dadi.prefetch import plan
from dadi.prefetch.messages import Job
from dadi.prefetch.plan import Wanted
from superpeer.jobs_ready import Shares

if TYPE_CHECKING:
    from superpeer.service import Superpeer


class Needs(msgspec.Struct, frozen=True):
    """What bringing one image takes. `layers`: bytes that come into the store, by the layer's digest in the registry.

    `registry`: bytes that all of the image costs the registry, about. `keep`: digests of blobs, here or to come, that
    are part of it.
    """

    layers: Mapping[str, int]
    registry: int
    keep: frozenset[str] = frozenset()

    def scaled(self, part: float) -> Needs:
        """Return what is needed when only this part of it is still to come."""
        return Needs({digest: round(size * part) for digest, size in self.layers.items()}, self.registry, self.keep)


def summed(images: Iterable[Needs]) -> tuple[int, frozenset[str]]:
    """Return the bytes that all of them need together, and what is to be kept of all."""
    layers: dict[str, int] = {}
    keep: set[str] = set()
    for each in images:
        keep |= each.keep
        for digest, size in each.layers.items():
            layers[digest] = max(size, layers.get(digest, 0))
    return sum(layers.values()), frozenset(keep)


class Room:
    """See the head of this file."""

    def __init__(self, superpeer: Superpeer, shares: Shares) -> None:
        self._superpeer = superpeer
        self._shares = shares

    async def needs(self, job: Job, layers: Mapping[str, int]) -> Needs:
        """Return what a job needs. `layers`: compressed sizes by digest, for an image without an index here."""
        name = Reference.parse(job.request.reference).name
        record = self._superpeer.catalog.by_manifest(job.manifest_digest, name)
        if record is None:
            is_ours = self._shares.url in ("", await self._shares.answers_for(job.request.reference))
            return Needs(layers if is_ours else {}, sum(layers.values()))
        mine, note = await self._shares.of(record, job.request.scope)
        everything = job.request.scope == "full" or bool(note)
        scope = {wanted.layer.diff_id: wanted for wanted in mine}
        needed: dict[str, int] = {}
        registry = 0
        for layer in {layer.diff_id: layer for layer in plan.devices(self._superpeer.catalog.image(record))}.values():
            whole = (range(layer.table.count),) if everything else ()
            wanted = scope.get(layer.diff_id, Wanted(layer, whole))
            missing = plan.size_of(layer.blob, await self._shares.missing(wanted))
            registry += plan.cost(layer, missing)
            if layer.diff_id in scope:
                packed = self._packed(layer, missing) if missing and not wanted.place else 0
                needed[layer.layer_digest] = missing + packed
        keep = frozenset(digest for each in mine for digest in (each.layer.diff_id, each.layer.layer_digest))
        return Needs(needed, registry, keep)

    def _packed(self, layer: ImageLayer, missing: int) -> int:
        """Return the bytes of a layer's compressed form that come into the store when these of its tar are brought."""
        if not layer.seek_digest or layer.layer_digest == layer.diff_id:
            return 0
        store = self._superpeer.store
        here = store.find(layer.layer_digest)
        return max(0, plan.cost(layer, missing) - (store.present_bytes(here) if here else 0))

    async def check(self, job: Job, images: Sequence[Needs]) -> str:
        """Return what is to be noted of evictions; raise StoreFull if the images do not fit, whatever is evicted.

        The job's own is one of the images.
        """
        needed, keep = summed(images)
        room = await self._superpeer.store.room(needed, keep)
        gain = sum(size for _, size in room.evicted)
        if not room.enough:
            held = self._superpeer.store.statistics()["held"]
            who = f"{job.request.reference} needs" if len(images) == 1 else (
                f"{job.request.reference} and the {len(images) - 1} that were asked for with it need")  # fmt: skip
            raise StoreFull(
                f"{who} {needed} bytes here; {room.free} are free, and {gain} more if the {len(room.evicted)} blobs "
                f"that nobody uses were evicted; {held} blobs are in use or pinned",
                hint="raise store.limit, or unpin what is not needed: dadi prefetch cancel IMAGE",
            )
        if not room.evicted:
            return ""
        names = ", ".join(digest[:19] for digest, _ in room.evicted[:5])
        return f"{len(room.evicted)} blobs ({gain} bytes) are evicted for it: {names}"
