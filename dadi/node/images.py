"""Lazy images for the snapshotter (`dadi/snapshotter/images.py` has the contract): resolved, remembered, mounted.

    STATE/images/KEY.json         what an image was resolved to: found again after a restart, without upstream
    STATE/snapshotter/images/     where images are mounted: KEY's first 16 digits, "-", the number of layers

A mount of the lowest n layers is a mount like any other of this node (`mounts.py`): recorded, found again, backfilled.
For fewer layers than the image has, the EROFS metadata is made here, from the layer indexes.

KEY is the digest of the image's index when it was resolved first. An image that had to be resolved again (its record
was lost) may have got another index, made anew; it is kept under the key that snapshots know it by.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import Iterator
from pathlib import Path
from weakref import WeakValueDictionary

import msgspec
import structlog

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.files import full_or_broken
from dadi.blobs.layout import write_durably
from dadi.containerd.labels import chain_ids
from dadi.errors import Conflict, DadiError, Malformed, NotFound, Unavailable
from dadi.index.image import ImageIndex
from dadi.node.mounts import Mounts
from dadi.oci.reference import Reference
from dadi.peers.superpeer import ImageAnswer, Upstream, image_answer
from dadi.snapshotter.images import LazyImage

log = structlog.get_logger()
_BELIEVED = 30.0
_FAILED = 5.0
"""Seconds for which a tag is not resolved anew, and what failed is not tried again: a pull asks for each of its layers.
"""
_Asked = tuple[str, str | None]


class _Record(msgspec.Struct, frozen=True):
    """What is kept of an image; `resolved_at`, for people, in seconds since 1970."""

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
        self._incomplete: set[str] = set()
        """Of these, not all that should be held was here at the start."""
        self._touched: dict[str, float] = {}
        """When an image was resolved last, by the monotonic clock."""
        self._alone: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """For each image one remembers or forgets it at a time; a lock lives for as long as somebody uses it."""
        self._names: dict[_Asked, tuple[float, str]] = {}
        self._failed: dict[_Asked, tuple[float, DadiError]] = {}

    def __repr__(self) -> str:
        return f"NodeImages({len(self._images)})"

    async def load(self) -> None:
        """Read what earlier runs left; a damaged record is dropped: the image is resolved again when it is needed."""
        with _told(self._records):
            for directory in (self._records, self.directory):
                await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
            found = await asyncio.to_thread(lambda: sorted(self._records.iterdir()))
        for path in found:
            try:
                if path.suffix == ".new":  # we were killed while it was written
                    await asyncio.to_thread(path.unlink, missing_ok=True)
                elif path.suffix == ".json":
                    await self._load(path)
            except OSError as error:
                log.error("could not read what an image is", file=str(path), why=str(error))

    async def _load(self, path: Path) -> None:
        key = f"sha256:{path.stem}"
        try:
            record = msgspec.json.decode(await asyncio.to_thread(path.read_bytes), type=_Record)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            log.warning("dropped what was known of an image", file=str(path), why=str(error))
            await asyncio.to_thread(path.unlink, missing_ok=True)
            return
        self._images[key], self._touched[key] = record, time.monotonic()
        held = self._held[key] = contextlib.ExitStack()
        self._incomplete.add(key)
        try:
            await self._hold(record.answer, await self._index(key, record.answer), held)
            self._incomplete.discard(key)
        except DadiError as error:
            log.warning("an image is known, not all of it is here", file=str(path), why=error.message)

    # ---- the contract

    async def resolve(self, reference: str, manifest_digest: str | None, layer_digests: list[str]) -> LazyImage:
        """Return the image that `reference` leads to, or `manifest_digest` in its repository."""
        with _told(self._records):
            key = await self._resolved((reference, manifest_digest))
            self._touched[key] = time.monotonic()  # a pull is under way: see `keep_only`
            index = await self._index(key, self._images[key].answer)
            self._mounts.admit(index)
        return LazyImage(key, chain_ids([layer.diff_id for layer in index.layers]))

    async def _resolved(self, asked: _Asked) -> str:
        """Return the key of the image, which is in `_images`."""
        now = time.monotonic()
        failed_at, failure = self._failed.get(asked, (0.0, None))
        if failure is not None and now - failed_at < _FAILED:
            raise failure.with_traceback(None)
        asked_at, key = self._names.get(asked, (0.0, ""))
        if key in self._images and (asked[1] is not None or now - asked_at <= _BELIEVED):
            return key
        try:
            answer = await self._ask(*asked)
            key = answer.index_digest
            await self._remember(key, answer)
        except DadiError as error:
            now = time.monotonic()
            self._failed = {who: what for who, what in self._failed.items() if now - what[0] < _FAILED}
            self._failed[asked] = (now, error)
            raise
        self._names[asked] = (now, key)
        return key

    async def mount(
        self, key: str, layers: int, reference: str = "", manifest: str | None = None, chain_id: str = ""
    ) -> str:
        """Return where the lowest `layers` layers are mounted."""
        directory = self._directory(key, layers)
        try:
            with _told(directory):
                if key not in self._images:
                    await self._resolve_again(key, layers, reference, manifest, chain_id)
                answer = self._images[key].answer
                index = await self._index(key, answer)
                if not 0 < layers <= len(index.layers):
                    hint = "remove its containers and the image, then pull it again"
                    raise Conflict(f"{answer.reference} has {len(index.layers)} layers, not {layers}", hint=hint)
                await asyncio.to_thread(directory.mkdir, parents=True, exist_ok=True)
                await self._mounts.ensure(answer, str(directory), 0 if layers == len(index.layers) else layers)
        except NotFound as error:
            raise Unavailable(f"cannot mount {reference or key}: {error.message}", hint=error.hint) from error
        return str(directory)

    async def _resolve_again(self, key: str, layers: int, reference: str, manifest: str | None, chain_id: str) -> None:
        """Have an image known again by the key that it had; raise Conflict if it is another one by now."""
        hint = "remove its containers and the image, then pull it again"
        if not reference:
            raise Conflict(f"the image with index {key} is not known (any more)", hint=hint)
        image = await self.resolve(reference, manifest, [])
        if image.key == key:
            return
        if not 0 < layers <= len(image.chain_ids) or image.chain_ids[layers - 1] != chain_id:
            raise Conflict(f"{reference} has other layers by now than the image with index {key}", hint=hint)
        log.warning("an image was resolved again, to another index", image=reference, key=key, now=image.key)
        record = self._images.get(image.key)
        if record is None:  # nothing protects it from a sweep where images are not kept for a while
            raise Unavailable(f"{reference} was forgotten while it was resolved", hint="try again")
        await self._remember(key, record.answer)

    async def release(self, key: str, layers: int) -> None:
        """Unmount; Conflict if it is in use."""
        directory = self._directory(key, layers)
        with _told(directory):
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
        for key in self._images.keys() - keys:
            lock = self._lock(key)
            if lock.locked():  # being resolved
                continue
            async with lock:
                # Looked at only here: the one before us in this loop may have taken its time.
                if key not in self._images or time.monotonic() - self._touched[key] < self._young:
                    continue
                record = self._forget(key)
                try:
                    await asyncio.to_thread(self._file(key).unlink, missing_ok=True)
                except OSError as error:  # it is forgotten again after the next start
                    log.error("could not delete what an image is", file=str(self._file(key)), why=str(error))
            log.info("image forgotten", image=record.answer.reference, key=key)
        now, oldest = time.monotonic(), max(_BELIEVED, self._young)
        for asked, (asked_at, key) in list(self._names.items()):
            if key not in self._images or now - asked_at > oldest:
                del self._names[asked]

    # ---- what is known

    async def _ask(self, reference: str, manifest_digest: str | None) -> ImageAnswer:
        ref = Reference.parse(reference)
        if manifest_digest is not None:
            ref = ref.at(manifest_digest)
        async for event in self._upstream.resolve(str(ref), self._platform):
            if event.get("event") == "image":
                return image_answer(event)
        raise Malformed(f"the superpeer did not say what {ref} is", hint="its log may; are the versions alike?")

    async def _remember(self, key: str, answer: ImageAnswer) -> None:
        """Have all here and held that a reboot without upstream will need, and the record on disk; else nothing."""
        async with self._lock(key):
            if key in self._images and key not in self._incomplete:
                self._touched[key] = time.monotonic()
                return
            with contextlib.ExitStack() as holds:
                index = await self._mounts.metadata.index(answer)
                await self._hold(answer, index, holds)
                record = _Record(answer, time.time())
                file = self._file(key)
                try:
                    await asyncio.to_thread(write_durably, file, msgspec.json.encode(record))
                except OSError as error:
                    raise full_or_broken(file, error) from None
                if key in self._images:
                    self._forget(key)
                self._images[key], self._indexes[key], self._touched[key] = record, index, time.monotonic()
                self._held[key] = holds.pop_all()

    def _forget(self, key: str) -> _Record:
        self._indexes.pop(key, None)
        self._touched.pop(key, None)
        self._incomplete.discard(key)
        if (held := self._held.pop(key, None)) is not None:
            held.close()
        return self._images.pop(key)

    async def _index(self, key: str, answer: ImageAnswer) -> ImageIndex:
        index = self._indexes.get(key)
        if index is None:
            index = await self._mounts.metadata.index(answer)
            if key in self._images:
                self._indexes[key] = index
        return index

    async def _hold(self, answer: ImageAnswer, index: ImageIndex, holds: contextlib.ExitStack) -> None:
        """Have index, metadata and layer indexes here, and keep them: a reboot without upstream must find them."""
        await self._mounts.metadata.hold(answer, index, holds)
        await self._mounts.metadata.hold_layer_indexes(index, holds)

    def _lock(self, key: str) -> asyncio.Lock:
        lock = self._alone.get(key)
        if lock is None:
            lock = self._alone[key] = asyncio.Lock()
        return lock

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
    try:
        directory.rmdir()
    except FileNotFoundError:
        pass
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise
        raise Conflict(f"{directory} is not empty, or something is mounted there: {error.strerror}",
                       hint=f"look at it, and `umount {directory}` if nothing needs it") from None  # fmt: skip


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """Let only DadiError out."""
    try:
        yield
    except OSError as error:
        raise full_or_broken(path, error) from None
