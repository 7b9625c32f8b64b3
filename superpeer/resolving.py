"""Finding out what a reference is for a platform, with the image's index in the store at the end; once at a time.

    known and young enough    its record; a digest never grows old
    known and old             the registry is asked (HEAD): the same manifest confirms it. It is away, or does not
                              answer soon: the record, however old, said aloud
    unknown here              a sibling's, if one knows the manifest; else it is indexed (`indexing.py`), the siblings
                              are told, and a startup trace is looked for

Whoever asks while an image is resolved waits for the same; a prefetch job's pace is lifted by who is in a hurry
(`jobs_pace.py`).
"""

from __future__ import annotations

import asyncio

import msgspec

from dadi.errors import StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index import image
from dadi.index.image import ImageIndex
from dadi.oci import platforms
from dadi.oci.manifest import Descriptor
from dadi.oci.platforms import Platform
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient, ResolvedImage
from superpeer.catalog import Catalog, ImageRecord
from superpeer.indexing import Indexer, Progress
from superpeer.jobs_pace import PACE, Pace
from superpeer.refused import Refused
from superpeer.siblings import Siblings
from superpeer.traces_shipped import ShippedTraces

_PATIENCE, _REST = 5.0, 10.0
"""Seconds that a registry may take where an older answer would do; and for which it is then not asked again."""
FULL_FOR = 10.0
"""Seconds that a full store is believed to stay full."""


class Resolving(msgspec.Struct):
    """An image that is being resolved for whoever asks meanwhile."""

    task: asyncio.Task[ImageRecord]
    progress: Progress
    pace: Pace | None = None
    """A job's, until somebody else comes to wait for it."""


class Resolver:
    """See the head of this file. `tag_ttl`: seconds for which a tag is believed without asking."""

    def __init__(self, catalog: Catalog, registry: RegistryClient, indexer: Indexer, refused: Refused,
                 siblings: Siblings | None, shipped: ShippedTraces, fallbacks: Fallbacks, *,
                 tag_ttl: float) -> None:  # fmt: skip
        self._catalog = catalog
        self._registry = registry
        self._indexer = indexer
        self._refused = refused
        self._siblings = siblings
        self._shipped = shipped
        self._fallbacks = fallbacks
        self._tag_ttl = tag_ttl
        self._under_way: dict[tuple[str, str], Resolving] = {}
        """By reference and platform."""
        self._no_room: dict[str, tuple[float, StoreFull]] = {}
        """Manifests whose layers did not fit, until when that is believed, and what was said."""
        self._hangs: dict[str, float] = {}
        """Registries that let us wait, and until when they are not asked where an older answer would do."""

    def __repr__(self) -> str:
        return f"Resolver({len(self)} under way)"

    def __len__(self) -> int:
        """How many images are being resolved."""
        return len(self._under_way)

    def resolve(self, reference: str, platform: str) -> Resolving:
        """Begin (or join) finding out what `reference` is for `platform`, with its index in the store at the end.

        Raises InvalidRequest for a malformed reference at once; the task raises the rest.
        """
        ref, wanted = Reference.parse(reference), platforms.parse(platform)
        key = (str(ref), str(wanted))
        resolving = self._under_way.get(key)
        pace = PACE.get()
        if resolving is not None and resolving.pace is not None:
            if pace is None:
                resolving.pace.lift()
            else:
                resolving.pace.also(pace)
        if resolving is None:
            progress = Progress()
            part = pace.part() if pace else None
            work = self._resolve(ref, wanted, progress)
            task = asyncio.create_task(work, context=part.begins() if part else None)
            resolving = self._under_way[key] = Resolving(task, progress, part)
            task.add_done_callback(lambda done: self._resolved(key, done))
        return resolving

    def _resolved(self, key: tuple[str, str], task: asyncio.Task[ImageRecord]) -> None:
        del self._under_way[key]
        if not task.cancelled():
            task.exception()  # looked at: every asker may have gone

    async def _resolve(self, reference: Reference, platform: Platform, progress: Progress) -> ImageRecord:
        record = self._catalog.find(str(reference), str(platform))
        if record and (reference.digest or self._catalog.age(record) <= self._tag_ttl):
            return record
        try:
            if record:
                # A HEAD: most of the time nothing has changed.
                top = await self._look_again(reference)
                # It may have been withdrawn meanwhile.
                still = self._catalog.find(str(reference), str(platform)) is record
                if still and top.digest == record.top_digest:
                    return await self._catalog.confirm(record, str(reference), str(platform), top.digest)
            resolved = await self._registry.image(reference, platform)
        except Unavailable as error:
            if record is None or self._catalog.find(str(reference), str(platform)) is not record:
                raise
            self._fallbacks.note("registry away, answered from the cache", f"{reference}: {error}")
            return record
        top_digest = resolved.index_digest or resolved.descriptor.digest
        known = self._catalog.by_manifest(resolved.descriptor.digest, reference.name)
        if known is None and self._siblings is not None and await self._siblings.knows(resolved.descriptor.digest):
            known = self._catalog.by_manifest(resolved.descriptor.digest, reference.name)
        if known is not None:
            record = await self._catalog.confirm(known, str(reference), str(platform), top_digest)
        else:
            index = await self._index(reference, resolved, progress)
            record = await self._catalog.add(str(reference), str(platform), top_digest, index, image.encode(index))
            if self._siblings is not None:
                self._siblings.announce(record.index_digest)
        await self._look_for_trace(record)
        return record

    async def _look_for_trace(self, record: ImageRecord) -> None:
        """Have a startup trace looked for beside an image that is new here; a prefetch job needs to know at once."""
        if PACE.get() is not None:
            await self._shipped.wait(record)
        else:
            self._shipped.begin(record)

    async def _look_again(self, reference: Reference) -> Descriptor:
        """Return what a reference leads to now, if the registry says so soon: there is an older answer. Unavailable."""
        loop, registry = asyncio.get_running_loop(), reference.registry
        if loop.time() < self._hangs.get(registry, 0.0):
            raise Unavailable(f"{registry} did not answer a moment ago")
        try:
            async with asyncio.timeout(_PATIENCE):
                return await self._registry.resolve(reference)
        except TimeoutError:
            self._hangs[registry] = loop.time() + _REST
            raise Unavailable(f"{registry} did not answer in {_PATIENCE:.0f} s") from None

    async def _index(self, reference: Reference, resolved: ResolvedImage, progress: Progress) -> ImageIndex:
        loop = asyncio.get_running_loop()
        until, full = self._no_room.get(resolved.descriptor.digest, (0.0, None))
        if full is not None and loop.time() < until:
            raise full  # whoever waits asks again soon; to stream its layers each time would be a storm
        self._no_room.pop(resolved.descriptor.digest, None)
        try:
            index = await self._indexer.image(reference, resolved, progress)
            if index.artifact and self._refused.has(index.artifact):  # found out meanwhile
                index = await self._indexer.on_first_sight(reference, resolved, progress)
            return index
        except StoreFull as error:
            self._no_room[resolved.descriptor.digest] = (loop.time() + FULL_FOR, error)
            raise

    def stop(self) -> list[asyncio.Task[ImageRecord]]:
        """Break off what is under way; return the tasks, for who waits for their end."""
        tasks = [resolving.task for resolving in self._under_way.values()]
        for task in tasks:
            task.cancel()
        return tasks
