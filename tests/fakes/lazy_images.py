"""Lazy images without a node: an image is a list of layers, a mount is a directory in which they lie merged."""

from __future__ import annotations

import asyncio
import hashlib
import shutil
from collections import Counter
from functools import partial
from pathlib import Path

from dadi.errors import Conflict, DadiError, NotFound, Unsupported
from dadi.snapshotter.images import LazyImage

Layer = dict[str, bytes | None]
"""Path → content; None deletes what is below."""


def sha(text: str) -> str:
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()


def chain_ids(layers: list[Layer]) -> list[str]:
    """Return the chain ID of each prefix, the diff IDs being hashes of what the layers hold."""
    found: list[str] = []
    for layer in layers:
        diff_id = sha(repr(sorted(layer.items())))
        found.append(sha(f"{found[-1]} {diff_id}") if found else diff_id)
    return found


class FakeImages:
    """An implementation of `LazyImages`. `gate`: when given, `resolve` and `mount` wait for it."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls: Counter[str] = Counter()
        self.gate: asyncio.Event | None = None
        self.failure: DadiError | None = None
        """Raised by all methods instead of what they do."""
        self.in_use: set[tuple[str, int]] = set()
        """Cannot be released now."""
        self.origins: list[tuple[str, str | None, str]] = []
        """What each `mount` was told of where the image came from."""
        self.kept: set[str] | None = None
        """What the last sweep wanted to be kept."""
        self._images: dict[str, list[Layer]] = {}
        self._keys: dict[str, str] = {}

    def add(self, reference: str, layers: list[Layer]) -> list[str]:
        """Add an image; return its chain IDs."""
        key = sha(f"index of {chain_ids(layers)}")
        self._images[key] = layers
        self._keys[reference] = key
        return chain_ids(layers)

    def key(self, reference: str) -> str:
        return self._keys[reference]

    @property
    def mounted(self) -> list[str]:
        """What is mounted: the beginning of a key, and how many layers."""
        return sorted(path.name for path in self.directory.iterdir()) if self.directory.exists() else []

    async def resolve(self, reference: str, manifest_digest: str | None, layer_digests: list[str]) -> LazyImage:
        await self._called("resolve")
        if reference not in self._keys:
            raise NotFound(f"there is no image {reference}")
        key = self._keys[reference]
        return LazyImage(key, chain_ids(self._images[key]))

    async def mount(
        self, key: str, layers: int, reference: str = "", manifest: str | None = None, chain_id: str = ""
    ) -> str:
        self.origins.append((reference, manifest, chain_id))
        await self._called("mount")
        directory = self.directory / f"{key[7:19]}-{layers}"
        self.calls["made"] += await asyncio.to_thread(_merge, self._images[key][:layers], directory)
        return str(directory)

    async def release(self, key: str, layers: int) -> None:
        await self._called("release")
        if (key, layers) in self.in_use:
            raise Conflict("it is in use")
        directory = self.directory / f"{key[7:19]}-{layers}"
        await asyncio.to_thread(partial(shutil.rmtree, directory, ignore_errors=True))

    async def usage(self, key: str, layer: int) -> int:
        await self._called("usage")
        return sum(len(content or b"") for content in self._images[key][layer].values())

    async def keep_only(self, keys: set[str]) -> None:
        self.kept = keys

    async def _called(self, name: str) -> None:
        self.calls[name] += 1
        if self.failure is not None:
            raise self.failure
        if self.gate is not None and name in ("resolve", "mount"):
            await self.gate.wait()


def _merge(layers: list[Layer], directory: Path) -> bool:
    """Write the layers on top of each other; say whether that was still to be done."""
    if directory.exists():  # it may be there from before a restart
        return False
    directory.mkdir(parents=True)
    for layer in layers:
        for name, content in layer.items():
            path = directory / name
            if content is None:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
    return True


def labels_for(chain_id: str, reference: str = "", manifest: str = "", layers: tuple[str, ...] = ()) -> dict[str, str]:
    """Return the labels that a client with remote snapshots gives to the Prepare of a layer."""
    labels = {"containerd.io/snapshot.ref": chain_id}
    if reference:
        labels["containerd.io/snapshot/cri.image-ref"] = reference
    if manifest:
        labels["containerd.io/snapshot/cri.manifest-digest"] = manifest
    if layers:
        labels["containerd.io/snapshot/cri.layer-digest"] = layers[0]
        labels["containerd.io/snapshot/cri.image-layers"] = ",".join(layers)
    return labels


class NoImages:
    """Nothing is lazy: a plain overlay snapshotter."""

    async def resolve(self, reference: str, manifest_digest: str | None, layer_digests: list[str]) -> LazyImage:
        """Raise Unsupported."""
        raise Unsupported("this snapshotter has no lazy images")

    async def mount(
        self, key: str, layers: int, reference: str = "", manifest: str | None = None, chain_id: str = ""
    ) -> str:
        """Raise Unsupported."""
        raise Unsupported("this snapshotter has no lazy images")

    async def release(self, key: str, layers: int) -> None:
        """Do nothing."""

    async def usage(self, key: str, layer: int) -> int:
        """Return 0."""
        return 0

    async def keep_only(self, keys: set[str]) -> None:
        """Do nothing."""
