"""Which repository has shown that it has which layer. Kept on disk: one JSON file, STATE/shown-layers.json.

    HASHED    its bytes came from there, and are the layer that the digest names and the tar that the diff ID names
    PUBLIC    when it was looked at, anybody could have the layer from a repository that had shown it
    TOLD      its registry said so, to who may read it (HEAD): good among repositories of that registry only

That an image *names* a layer is none of these (`Catalog.claims`). What follows from them: `shared_layers.py`.

The oldest go first above `most`, of the registry that has most of them: who shows many layers of his own does not have
those of others forgotten.
"""

from __future__ import annotations

import asyncio
import enum
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import msgspec
import structlog

from dadi.blobs.layout import write_durably
from dadi.fallbacks import Fallbacks
from dadi.oci.reference import Reference
from dadi.peers.token import NAME

log = structlog.get_logger()
_MOST = 50_000
_PREFIX = len("sha256:") + 2 * NAME
"""Characters of a digest that blobs are found by: those that tokens name."""


class Proof(enum.IntEnum):
    """See the head of this file; the greater one stays."""

    TOLD = 1
    PUBLIC = 2
    HASHED = 3


class Layer(msgspec.Struct, frozen=True):
    """A layer in a repository (with its registry): the digest that it has there, and the diff ID that it is said to
    have. The two together: that somebody has the one says nothing of the other."""

    repository: str
    layer_digest: str
    diff_id: str

    @property
    def registry(self) -> str:
        """The registry of the repository."""
        return self.repository.partition("/")[0]

    @property
    def blobs(self) -> frozenset[str]:
        """What who may have the layer is given."""
        return frozenset((self.layer_digest, self.diff_id))

    def is_same(self, other: Layer) -> bool:
        """Whether it is the same layer, in whatever repository."""
        return (self.layer_digest, self.diff_id) == (other.layer_digest, other.diff_id)


def place(blob: str) -> str:
    """Return what a blob is found by: its digest, or as much of it as a token names."""
    return blob[:_PREFIX]


class _Known(msgspec.Struct, array_like=True):
    """`reference`: one that leads to the repository."""

    layer: Layer
    reference: str
    proof: Proof


class ShownLayers:
    """See the head of this file. `load` it, `close` it. `on_shown` is told of each new proof before `add` returns."""

    def __init__(self, path: Path, fallbacks: Fallbacks, on_shown: Callable[[Layer], None] = lambda layer: None, *,
                 most: int = _MOST) -> None:  # fmt: skip
        self._path = path
        self._fallbacks = fallbacks
        self._most = most
        self._known: dict[Layer, _Known] = {}
        self._hashed: dict[str, dict[Layer, None]] = {}
        """By blob."""
        self._of_registry: Counter[str] = Counter()
        self._dirty = False
        self._writing: asyncio.Task[None] | None = None
        self._on_shown = on_shown

    def __repr__(self) -> str:
        return f"ShownLayers({len(self._known)})"

    async def load(self) -> None:
        """Read what earlier runs have seen."""
        try:
            raw = await asyncio.to_thread(self._path.read_bytes)
            for known in await asyncio.to_thread(msgspec.json.decode, raw, type=list[_Known]):
                self._enter(known)
        except FileNotFoundError:
            return
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            # What repositories have shown is to be shown again: dear, and safe.
            self._fallbacks.note("what repositories have shown was lost", f"{self._path}: {type(error).__name__}")

    def proof(self, layer: Layer) -> Proof | None:
        """Return what is known of a layer in a repository."""
        known = self._known.get(layer)
        return known.proof if known else None

    def hashed(self, blob: str) -> list[Layer]:
        """Return the layers, with their repositories, that are this blob in one form or the other, and were HASHED."""
        return list(self._hashed.get(place(blob), ()))

    def reference(self, layer: Layer) -> Reference:
        """Return a reference into the repository of a layer that was shown."""
        return Reference.parse(self._known[layer].reference)

    def add(self, reference: Reference, layer_digest: str, diff_id: str, proof: Proof) -> None:
        """Remember a proof, and write it down soon."""
        layer = Layer(reference.name, layer_digest, diff_id)
        known = self._known.get(layer)
        if known is not None and known.proof >= proof:
            return
        self._enter(_Known(layer, str(reference), proof))
        while len(self._known) > self._most:
            ((registry, _),) = self._of_registry.most_common(1)
            self._drop(next(each for each in self._known if each.registry == registry))
        self._dirty = True
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write())
        self._on_shown(layer)

    def _enter(self, known: _Known) -> None:
        layer = known.layer
        if layer not in self._known:
            self._of_registry[layer.registry] += 1
        self._known[layer] = known
        if known.proof is Proof.HASHED:
            for blob in layer.blobs:
                self._hashed.setdefault(place(blob), {})[layer] = None

    def _drop(self, layer: Layer) -> None:
        del self._known[layer]
        self._of_registry[layer.registry] -= 1
        for blob in layer.blobs:
            holders = self._hashed.get(place(blob), {})
            holders.pop(layer, None)
            if not holders:
                self._hashed.pop(place(blob), None)

    async def _write(self) -> None:
        while self._dirty:
            self._dirty = False
            known = list(self._known.values())
            try:
                raw = await asyncio.to_thread(msgspec.json.encode, known)
                await asyncio.to_thread(write_durably, self._path, raw)
            except OSError as error:
                log.error("could not write which layers were shown", file=str(self._path), why=error.strerror)

    async def close(self) -> None:
        """Write what is not written yet."""
        if self._writing is not None:
            await self._writing
