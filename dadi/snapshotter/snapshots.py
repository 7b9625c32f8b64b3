"""The life cycle of snapshots: what each of containerd's calls does, with containerd's semantics.

    Prepare of a layer    (1) is the lazy layer there?  (2) can it be one?  (3) commit it, durably  (4) "exists already"
                          else as below
    Prepare, View         (1) directories  (2) a row in the database  (3) the image's mount, if it stands on lazy layers
                          whatever fails, or a cancelled call, undoes the steps before it
    Commit                the space is measured, then one transaction
    Remove                one transaction: no file is touched
    Cleanup               directories without a row are deleted, mounts that nothing needs are released

Also done at the start and every now and then: Cleanup, for what a process that was killed has left.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import structlog

from dadi.errors import AlreadyExists, Conflict, DadiError
from dadi.fallbacks import Fallbacks
from dadi.snapshotter import filters, overlay
from dadi.snapshotter.database_thread import DatabaseThread
from dadi.snapshotter.db import Database, Lineage
from dadi.snapshotter.directories import Directories, overlay_options
from dadi.snapshotter.images import LazyImages
from dadi.snapshotter.lazy_mounts import LazyMounts
from dadi.snapshotter.model import REF, Info, Kind, Mount, Usage, checked_labels, checked_name, unpacked_layer

log = structlog.get_logger()


class Snapshots:
    """All snapshots of one containerd. Make it by `await Snapshots.open(…)`, end it by `close`.

    Names are containerd's backend keys; `parent` "" means none. Besides what the methods say, all raise StoreFull and
    Unavailable for the disk, and Malformed for a damaged database.
    """

    def __init__(self, root: Path, lazy: LazyMounts, kept: DatabaseThread) -> None:
        self.root = root
        self.lazy = lazy
        self._kept = kept
        self._directories = Directories(root)
        self._options: tuple[str, ...] = ()
        self._next = 1
        self._making: set[int] = set()
        """Ids whose directories may be there before their rows are."""
        self._cleaning = asyncio.Lock()
        self._sweeping: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"Snapshots({self.root}, {self._kept.counts()})"

    @classmethod
    async def open(
        cls,
        root: Path,
        images: LazyImages,
        fallbacks: Fallbacks,
        *,
        replace_damaged: bool = False,
        sweep_every: float = 600.0,
        keep_idle: float = 600.0,
    ) -> Snapshots:
        """Open the snapshots below `root`. Raises as `open_database` does, and ConfigError for a path with ":" or ",".

        `keep_idle`: an image on which nothing stands stays mounted for so long, in seconds.
        """
        kept = DatabaseThread()
        self = cls(root, LazyMounts(images, kept, fallbacks, keep_idle=keep_idle), kept)
        try:
            await asyncio.to_thread(partial(root.mkdir, mode=0o700, parents=True, exist_ok=True))
            await kept.open(root, replace_damaged=replace_damaged)
            await asyncio.to_thread(self._directories.prepare)
            self._options = await asyncio.to_thread(overlay_options, root)
            present = await asyncio.to_thread(self._directories.present)
            self._next = max(await kept(Database.last_id), *present, 0) + 1
        except BaseException:
            await kept.close()
            raise
        self._sweeping = asyncio.create_task(self._sweep(sweep_every))
        return self

    async def close(self) -> None:
        """Stop; everything stays as it is. Harmless when called again."""
        if self._sweeping:
            self._sweeping.cancel()
            await asyncio.gather(self._sweeping, return_exceptions=True)
        await self.lazy.close()
        await self._kept.close()

    async def _sweep(self, every: float) -> None:
        while True:
            try:
                await self.cleanup()
            except DadiError as error:
                log.error("could not clean up", why=str(error))
            except Exception as error:  # the next one may do better
                await asyncio.to_thread(log.error, "could not clean up: a fault of ours", exc_info=error)
            await asyncio.sleep(every)

    # ---- making

    async def prepare(self, key: str, parent: str, labels: dict[str, str]) -> list[Mount]:
        """Make an active snapshot, and return its mounts.

        With containerd's label for a layer, the lazy layer is made instead if it can be: AlreadyExists says so.
        Raises AlreadyExists; NotFound, InvalidRequest for the parent, and what mounting an image raises.
        """
        labels = checked_labels(labels)
        if chain_id := labels.get(REF):
            await self._lazy_layer(chain_id, parent, labels)
        elif chain_id := unpacked_layer(key):
            self.lazy.refused(chain_id, "the client does not ask for lazy layers")
        return await self._create(Kind.ACTIVE, key, parent, labels)

    async def view(self, key: str, parent: str, labels: dict[str, str]) -> list[Mount]:
        """Make a view, a snapshot that cannot be written to, and return its mounts. Raises as `prepare` does."""
        return await self._create(Kind.VIEW, key, parent, checked_labels(labels))

    async def _lazy_layer(self, chain_id: str, parent: str, labels: dict[str, str]) -> None:
        there = await self._kept(Database.find_lazy, chain_id, parent)
        # containerd looks for it by that label: one whose label was changed would not be found
        if there is None or there.labels.get(REF) != chain_id:
            layer = await self.lazy.layer(chain_id, parent, labels)
            if layer is None:
                return
            number = self._number()
            # A name of our own: the same layer may stand on different parents.
            await self._kept(Database.add_lazy, number, f"lazy/{number}/{chain_id}", parent, labels, layer)
        raise AlreadyExists(f"the layer {chain_id} is there, lazily")

    async def _create(self, kind: Kind, key: str, parent: str, labels: dict[str, str]) -> list[Mount]:
        checked_name(key, "the key of a snapshot")
        number = self._number()
        self._making.add(number)
        try:
            await _to_its_end(partial(self._directories.make, number, work=kind is Kind.ACTIVE))
            lineage = await self._kept(Database.create, number, kind, key, parent, labels)
            lowers = await self._lowers(lineage)
            if lowers:
                await asyncio.to_thread(self._directories.take_owner, number, lowers[0])
            return self._mounts(lineage, lowers)
        except BaseException:
            await self._undo(number)
            raise
        finally:
            self._making.discard(number)

    async def _undo(self, number: int) -> None:
        """Remove what `_create` has made; should that fail, the next sweep or containerd's next collection does it."""
        with contextlib.suppress(DadiError):
            await self._kept(Database.discard, number)
        await asyncio.to_thread(self._directories.delete, number)

    def _number(self) -> int:
        number, self._next = self._next, self._next + 1
        return number

    # ---- mounts

    async def mounts(self, key: str) -> list[Mount]:
        """Return the mounts of an active snapshot or a view. Raises NotFound, Conflict for a committed one."""
        lineage = await self._kept(Database.lineage, key)
        if lineage.kind is Kind.COMMITTED:
            raise Conflict(f"the snapshot {key!r} is committed: it has no mounts of its own", hint="make a view of it")
        return self._mounts(lineage, await self._lowers(lineage))

    async def _lowers(self, lineage: Lineage) -> list[str]:
        """Return the lower directories, topmost first; the image that the snapshot stands on is mounted for it."""
        lowers = [self._directories.upper(number) for number in lineage.ordinary]
        if lineage.image is not None:
            lowers.append(await self.lazy.directory(lineage.image, lineage.depth))
        return lowers

    def _mounts(self, lineage: Lineage, lowers: list[str]) -> list[Mount]:
        upper, work = self._directories.upper(lineage.id), self._directories.work(lineage.id)
        return overlay.mounts(lineage.kind, upper, work, lowers, self._options)

    # ---- committing and removing

    async def commit(self, name: str, key: str, labels: dict[str, str], parent: str = "") -> None:
        """Make the active snapshot `key` the committed one `name`; see `Database.commit`."""
        checked_name(name, "the name of a snapshot")
        labels = checked_labels(labels)
        stored = await self._kept(Database.get, key)
        usage = Usage(0, 0)
        if stored.info.kind is Kind.ACTIVE:
            usage = await asyncio.to_thread(self._directories.usage, stored.id)
        await self._kept(Database.commit, key, name, parent, labels, usage)

    async def remove(self, key: str) -> None:
        """Forget a snapshot; `cleanup` deletes it. Raises NotFound, Conflict if another one stands on it."""
        await self._kept(Database.remove, key)

    async def cleanup(self) -> None:
        """Delete and release all that no snapshot needs any more."""
        async with self._cleaning:
            # In this order: what is being made meanwhile is either still in `_making` or already has its row.
            present = await asyncio.to_thread(self._directories.present)
            making = set(self._making)
            for number in present - making - await self._kept(Database.ids):
                await asyncio.to_thread(self._directories.delete, number)
            await self.lazy.sweep()

    # ---- looking

    async def stat(self, name: str) -> Info:
        """Return what there is to know of a snapshot; raise NotFound."""
        return (await self._kept(Database.get, name)).info

    async def update(self, name: str, labels: dict[str, str], paths: list[str]) -> Info:
        """Change labels (`paths`: "labels", "labels.KEY"; none: all). Raises NotFound, InvalidRequest."""
        return await self._kept(Database.update, name, labels, paths)

    async def list(self, wanted: list[str]) -> list[Info]:
        """Return the snapshots that match any of the filters (none: all), oldest first. Raises InvalidRequest."""
        matches: Callable[[Info], bool] = filters.parse(wanted)
        return await self._kept(lambda database: [info for info in database.all() if matches(info)])

    async def usage(self, name: str) -> Usage:
        """Return what a snapshot itself takes on disk; measured where it can still change. Raises NotFound."""
        stored = await self._kept(Database.get, name)
        if stored.lazy is not None:
            return Usage(await self._lazy_bytes(stored.lazy.image, stored.lazy.depth - 1), 0)
        if stored.info.kind is Kind.ACTIVE:
            return await asyncio.to_thread(self._directories.usage, stored.id)
        return stored.usage

    async def _lazy_bytes(self, image: str, layer: int) -> int:
        try:
            return await self.lazy.images.usage(image, layer)
        except DadiError:
            return 0  # its bytes are not here (any more)

    def statistics(self) -> dict[str, Any]:
        """Return the snapshots by kind, and the layers since the start: how many became lazy, how many ordinary."""
        return {**self._kept.counts(), "layers": dict(self.lazy.made)}


async def _to_its_end(work: Callable[[], None]) -> None:
    """Run in a thread; when cancelled, wait until it is done all the same: what it makes can be undone only then."""
    thread = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        await asyncio.shield(thread)
    except asyncio.CancelledError:
        await asyncio.wait([thread])
        raise
