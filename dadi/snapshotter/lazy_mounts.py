"""Lazy layers: which layers can be one, and the mounts of images that snapshots stand on.

    mount      noted in the database, then made by the node; before that the snapshot that needs it is in the database
    release    only in a sweep: at once when no lazy snapshot of that image and depth is left, else when nothing has
               stood on it for `keep_idle` seconds (its bytes can then be evicted; the next container mounts it again)

For each mount making and releasing exclude each other; so a sweep either sees the snapshot, or the mount is made anew.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import Callable

import structlog

from dadi.errors import DadiError, Malformed, Unavailable, Unsupported
from dadi.fallbacks import Fallbacks
from dadi.snapshotter.database_thread import DatabaseThread
from dadi.snapshotter.db import Database
from dadi.snapshotter.flights import Flights
from dadi.snapshotter.images import LazyImage, LazyImages
from dadi.snapshotter.model import LazyLayer, Request, request_in

log = structlog.get_logger()
NOT_LAZY = "layer not lazy"
PATIENCE = 600.0
"""Seconds for which layers wait for one image to be resolved (at first sight its index is made), all of them together:
those that come later do not begin to wait anew."""
_Place = tuple[str, int]
"""An image index's digest, and how many of its layers."""


class LazyMounts:
    """See the head of this file."""

    def __init__(self, images: LazyImages, kept: DatabaseThread, fallbacks: Fallbacks, *, keep_idle: float,
                 clock: Callable[[], float] = time.monotonic) -> None:  # fmt: skip
        self.images = images
        self.made = {"lazy": 0, "ordinary": 0}
        """Layers since the start, as containerd asked for them by chain ID."""
        self._kept = kept
        self._fallbacks = fallbacks
        self._keep_idle = keep_idle
        self._clock = clock
        self._resolving: Flights[tuple[str, str | None], LazyImage] = Flights()
        self._resolving_since: dict[tuple[str, str | None], float] = {}
        self._mounting: Flights[_Place, str] = Flights()
        self._alone: defaultdict[_Place, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._noted: set[_Place] = set()
        self._idle_since: dict[_Place, float] = {}

    def __repr__(self) -> str:
        return f"LazyMounts({len(self._noted)} mounts)"

    # ---- deciding

    async def layer(self, chain_id: str, parent: str, labels: dict[str, str]) -> LazyLayer | None:
        """Return the layer of this chain ID; None, noted as a fallback, if it has to be an ordinary one.

        Raises NotFound for a parent that is not there.
        """
        below = (await self._kept(Database.get, parent)).lazy if parent else None
        request = request_in(labels)
        try:
            if request is None:
                hint = "its configuration of dadi is not in force? `dadi doctor`; for `ctr`: `dadi pull`"
                raise Unsupported("containerd does not say of which image it is", hint=hint)
            image = await self._resolved(request)
            found = _layer_of(image, chain_id, bool(parent), below, request)
        except DadiError as error:
            self.refused(chain_id, str(error), request)
            return None
        except Exception as error:  # a pull must not fail for it
            log.exception("a fault of ours", chain_id=chain_id)
            self.refused(chain_id, f"a fault of ours: {type(error).__name__}; the log has its trace", request)
            return None
        self.made["lazy"] += 1
        return found

    async def _resolved(self, request: Request) -> LazyImage:
        asked = (request.reference, request.manifest)

        async def work() -> LazyImage:
            try:
                return await self.images.resolve(request.reference, request.manifest, list(request.layers))
            finally:
                self._resolving_since.pop(asked, None)

        since = self._resolving_since.setdefault(asked, self._clock())
        try:
            async with asyncio.timeout(since + PATIENCE - self._clock()):
                return await self._resolving.join(asked, work)
        except TimeoutError:
            hint = "`dadi status` says for what superpeer and registry it waits; pull again when they answer"
            raise Unavailable(f"its image is still not resolved after {PATIENCE:.0f} s", hint=hint) from None

    def refused(self, chain_id: str, why: str, request: Request | None = None) -> None:
        """Note that a layer becomes an ordinary one."""
        self.made["ordinary"] += 1
        self._fallbacks.note(NOT_LAZY, f"{request.reference if request else 'layer'} {chain_id[:19]}: {why}")

    # ---- mounts

    async def directory(self, image: str, layers: int) -> str:
        """Return where this much of the image is mounted; the snapshot that wants it must be in the database."""
        place = (image, layers)
        return await self._mounting.join(place, lambda: self._mount(place))

    async def _mount(self, place: _Place) -> str:
        async with self._alone[place]:
            if place not in self._noted:
                await self._kept(Database.note_mount, *place)
                self._noted.add(place)
            self._idle_since.pop(place, None)
            layer = await self._kept(Database.lazy_layer, *place)
            if layer is None:  # its snapshot was removed meanwhile
                directory = await self.images.mount(*place)
            else:
                directory = await self.images.mount(*place, layer.reference, layer.manifest or None, layer.chain_id)
        if not directory.startswith("/") or any(character in directory for character in ':,\\"'):
            raise Malformed(f"{directory!r} cannot be a lower directory of an overlay")
        return directory

    async def sweep(self) -> None:
        """Release the mounts that are not needed any more; what fails is noted and tried again at the next sweep."""
        for mount in await self._kept(Database.mounts):
            place = (mount.image, mount.layers)
            self._noted.add(place)
            if mount.used:
                self._idle_since.pop(place, None)
                continue
            since = self._idle_since.setdefault(place, self._clock())
            if not mount.wanted or self._clock() - since >= self._keep_idle:
                try:
                    await self._release(place)
                except Exception as error:  # the others are not to wait for it
                    await asyncio.to_thread(log.error, "could not release an image", image=place[0], exc_info=error)
        await self.images.keep_only(await self._kept(Database.images))

    async def _release(self, place: _Place) -> None:
        async with self._alone[place]:
            # Once more: a snapshot may have come since, and its mount would wait for us.
            if any((mount.image, mount.layers) == place and mount.used for mount in await self._kept(Database.mounts)):
                return
            try:
                await self.images.release(*place)
            except DadiError as error:
                log.warning("could not release an image", image=place[0], layers=place[1], why=str(error))
                return
            await self._kept(Database.forget_mount, *place)
            self._noted.discard(place)
            self._idle_since.pop(place, None)
        if place not in self._mounting:  # who else would wait for the lock
            del self._alone[place]

    async def close(self) -> None:
        """Stop what is under way; mounts stay."""
        await self._resolving.close()
        await self._mounting.close()


def _layer_of(
    image: LazyImage, chain_id: str, has_parent: bool, below: LazyLayer | None, request: Request
) -> LazyLayer:
    """Return the layer of `image` that has this chain ID; raise Malformed if that does not fit what is below it."""
    if chain_id not in image.chain_ids:
        raise Malformed(f"the image that was found ({image.key}) has no such layer", hint="its tag may have moved")
    place = image.chain_ids.index(chain_id)
    if has_parent != (place > 0):
        raise Malformed(f"it is layer {place + 1} of its image, but {'has' if has_parent else 'lacks'} a parent")
    if below is not None and below.chain_id != image.chain_ids[place - 1]:
        raise Malformed("its parent is another layer than in the image that was found")
    layer = request.layers[0] if request.layers else ""
    return LazyLayer(image.key, place + 1, chain_id, request.reference, request.manifest or "", layer)
