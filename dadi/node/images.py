"""Lazy images for the snapshotter (`dadi/snapshotter/images.py` has the contract): resolved, remembered, mounted.

    STATE/images/KEY.json         what an image was resolved to: found again after a restart, without upstream
    STATE/snapshotter/images/     where images are mounted: KEY's first 16 digits, "-", the number of layers

A mount of the lowest n layers is a mount like any other of this node (`mounts.py`): recorded, found again, backfilled.
For fewer layers than the image has, the EROFS metadata is made here, from the layer indexes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from pathlib import Path

import msgspec
import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.files import full_or_broken
from dadi.blobs.layout import write_durably
from dadi.containerd.labels import chain_ids
from dadi.errors import DadiError, Malformed, NotFound
from dadi.index.image import ImageIndex
from dadi.node.mounts import Mounts
from dadi.oci.reference import Reference
from dadi.peers.superpeer import ImageAnswer, Upstream, image_answer
from dadi.snapshotter.images import LazyImage

log = structlog.get_logger()
_BELIEVED = 30.0
"""Seconds for which a tag is not resolved anew: a pull asks for each of its layers."""


class _Record(msgspec.Struct, frozen=True):
    """What is kept of an image; `resolved_at` in seconds since 1970."""

    answer: ImageAnswer
    resolved_at: float


class NodeImages:
    """The node's lazy images; see `LazyImages`."""

    def __init__(self, state: Path, store: DiskBlobs, mounts: Mounts, upstream: Upstream, platform: str, *,
                 young: float) -> None:  # fmt: skip
        """`young`: seconds for which an image is remembered though no snapshot stands on it (yet)."""
        self._young = young
        self.directory = state / "snapshotter" / "images"
        self._records = state / "images"
        self._store = store
        self._mounts = mounts
        self._upstream = upstream
        self._platform = platform
        self._images: dict[str, _Record] = {}
        self._indexes: dict[str, ImageIndex] = {}
        self._held: dict[str, contextlib.ExitStack] = {}
        self._names: dict[tuple[str, str | None], tuple[float, str]] = {}

    def __repr__(self) -> str:
        return f"NodeImages({len(self._images)})"

    async def load(self) -> None:
        """Read what earlier runs left; a damaged record is dropped: the image is resolved again when it is pulled."""
        for directory in (self._records, self.directory):
            await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
        for path in await asyncio.to_thread(lambda: sorted(self._records.glob("*.json"))):
            try:
                record = msgspec.json.decode(await asyncio.to_thread(path.read_bytes), type=_Record)
                self._images[record.answer.index_digest] = record
                await self._hold(record.answer)
            except OSError as error:
                log.error("could not read what an image is", file=str(path), why=str(error))
            except (msgspec.MsgspecError, UnicodeDecodeError) as error:
                log.warning("dropped what was known of an image", file=str(path), why=str(error))
                await asyncio.to_thread(path.unlink, missing_ok=True)
            except DadiError as error:
                log.warning("an image is known, its index is not here", file=str(path), why=error.message)

    # ---- the contract

    async def resolve(self, reference: str, manifest_digest: str | None, layer_digests: list[str]) -> LazyImage:
        """Return the image that `reference` leads to, or `manifest_digest` in its repository."""
        now = time.monotonic()
        asked, key = self._names.get((reference, manifest_digest), (0.0, ""))
        if key not in self._images or (manifest_digest is None and now - asked > _BELIEVED):
            answer = await self._ask(reference, manifest_digest)
            key = answer.index_digest
            await self._remember(answer)
            self._names[reference, manifest_digest] = (now, key)
        record = self._images[key]
        index = await self._index(record.answer)
        return LazyImage(key, chain_ids([layer.diff_id for layer in index.layers]))

    async def mount(self, key: str, layers: int) -> str:
        """Return where the lowest `layers` layers are mounted."""
        directory = self._directory(key, layers)
        record = self._images.get(key)
        if record is None:
            raise NotFound(f"the image with index {key} is not known (any more)", hint="pull it again")
        index = await self._index(record.answer)
        if not 0 < layers <= len(index.layers):
            raise NotFound(f"{record.answer.reference} has {len(index.layers)} layers, not {layers}")
        await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
        await self._mounts.ensure(record.answer, str(directory), 0 if layers == len(index.layers) else layers)
        return str(directory)

    async def release(self, key: str, layers: int) -> None:
        """Unmount; Conflict if it is in use."""
        directory = self._directory(key, layers)
        with contextlib.suppress(NotFound):
            await self._mounts.unmount(str(directory))
        await asyncio.to_thread(_remove_directory, directory)

    async def usage(self, key: str, layer: int) -> int:
        """Return the bytes of a layer that are here."""
        index = self._indexes.get(key)
        if index is None or not 0 <= layer < len(index.layers):
            raise NotFound(f"layer {layer} of {key} is not known")
        return self._store.present_bytes(index.layers[layer].blob)

    async def keep_only(self, keys: set[str]) -> None:
        """Forget the images on which no snapshot stands, but for those that were resolved just now."""
        for key, record in list(self._images.items()):
            if key in keys or time.time() - record.resolved_at < self._young:
                continue
            await asyncio.to_thread(self._file(key).unlink, missing_ok=True)
            del self._images[key]
            self._indexes.pop(key, None)
            if (held := self._held.pop(key, None)) is not None:
                held.close()
            log.info("image forgotten", image=record.answer.reference, key=key)

    # ---- what is known

    async def _ask(self, reference: str, manifest_digest: str | None) -> ImageAnswer:
        ref = Reference.parse(reference)
        if manifest_digest is not None:
            ref = ref.at(manifest_digest)
        async for event in self._upstream.resolve(str(ref), self._platform):
            if event.get("event") == "image":
                return image_answer(event)
        raise Malformed(f"the superpeer did not say what {ref} is")

    async def _remember(self, answer: ImageAnswer) -> None:
        await self._index(answer)
        await self._hold(answer)
        record = _Record(answer, time.time())
        file = self._file(answer.index_digest)
        try:
            await asyncio.to_thread(write_durably, file, msgspec.json.encode(record))
        except OSError as error:
            raise full_or_broken(file, error) from None
        self._images[answer.index_digest] = record

    async def _index(self, answer: ImageAnswer) -> ImageIndex:
        index = self._indexes.get(answer.index_digest)
        if index is None:
            index = self._indexes[answer.index_digest] = await self._mounts.index(answer)
        return index

    async def _hold(self, answer: ImageAnswer) -> None:
        """Have index and metadata here, and keep them: a reboot without upstream must find them."""
        key = answer.index_digest
        if key in self._held:
            return
        index = await self._index(answer)
        with contextlib.ExitStack() as holds:
            await self._mounts.hold_metadata(answer, index, holds)
            self._held[key] = holds.pop_all()

    def _directory(self, key: str, layers: int) -> Path:
        return self.directory / f"{key.removeprefix('sha256:')[:16]}-{layers}"

    def _file(self, key: str) -> Path:
        return self._records / f"{key.removeprefix('sha256:')}.json"

    def close(self) -> None:
        """Let go of what is held."""
        for held in self._held.values():
            held.close()
        self._held.clear()


def _remove_directory(directory: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        directory.rmdir()
