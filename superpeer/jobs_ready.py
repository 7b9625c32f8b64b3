"""What this superpeer's share of an image is, and whether all of it is here: what a prefetch job's success means.

    tag        the reference is known for the platform: at its owner and its stand-in (they answer for it)
    index      image index, layer indexes, seek tables and metadata are in the store, whole
    layers     every chunk of the scope, of the layers that this superpeer owns or stands in for; what an unclean stop
               left in doubt is hashed again

When all superpeers of a datacenter say so, a start needs nothing from the registry. Nothing is asked of anybody here.
Without a trace nobody knows what a start reads: then the scope "startup" is all of the image, and that is said.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from dadi.blobs.single_flight import runs
from dadi.errors import Unavailable
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex
from dadi.oci import platforms
from dadi.oci.reference import Reference
from dadi.peers.owners import owners
from dadi.prefetch import plan
from dadi.prefetch.messages import MOST_LACKING, Job, Lacking, Readiness, Scope
from dadi.prefetch.plan import Wanted
from superpeer.catalog import ImageRecord

if TYPE_CHECKING:
    from superpeer.service import Superpeer

StartupChunks = Callable[[ImageRecord], Mapping[Blob, Sequence[range]] | None]
"""What a container of the image reads at its start, by the trace that is kept with it; None: there is no trace."""
NO_TRACE = "no startup trace of this image is known: all of it is the scope"


class Shares:
    """See the head of this file."""

    def __init__(self, superpeer: Superpeer, startup_chunks: StartupChunks) -> None:
        self._superpeer = superpeer
        self.startup_chunks = startup_chunks

    @property
    def url(self) -> str:
        """This superpeer's name among its siblings; "" where it is alone."""
        return self._superpeer.config.url.rstrip("/") if self._superpeer.siblings else ""

    async def superpeers(self) -> tuple[str, ...]:
        """Return the names of all superpeers of the datacenter, ours among them; none where it is alone."""
        siblings = self._superpeer.siblings
        if siblings is None:
            return ()
        try:
            await siblings.superpeers.ready()
        except Unavailable:
            return ()  # noted where the names are asked for
        return siblings.superpeers.names

    async def answers_for(self, reference: str) -> str:
        """Return who indexes an image: the superpeer that answers for its reference; `url` where there is one only."""
        superpeers = await self.superpeers()
        return owners(reference, superpeers)[0] if superpeers else self.url

    async def of(self, record: ImageRecord, scope: Scope) -> tuple[list[Wanted], str]:
        """Return what of an image belongs here, owned blobs first; and a note where the scope is more than it says."""
        index, superpeers = self._superpeer.catalog.image(record), await self.superpeers()
        if scope == "full":
            return plan.share(index, superpeers, self.url), ""
        chunks = self.startup_chunks(record)
        if chunks is None:
            return plan.share(index, superpeers, self.url), NO_TRACE
        return plan.share(index, superpeers, self.url, chunks), ""

    def startup_named(self, job: Job) -> Mapping[Blob, Sequence[range]] | None:
        """Return what starts of a job's image read; None if that is not known: all of it then."""
        name = Reference.parse(job.request.reference).name
        record = self._superpeer.catalog.by_manifest(job.manifest_digest, name)
        return self.startup_chunks(record) if record else None

    async def missing(self, wanted: Wanted) -> list[range]:
        """Return the runs of chunks that are not here."""
        store, blob = self._superpeer.store, wanted.layer.blob
        return [run for part in wanted.runs for run in runs(await store.missing(blob, part))]

    async def readiness(self, reference: str, platform: str, scope: Scope, *, manifest: str = "") -> Readiness:
        """Return what is here, and what is not; of the image `manifest`, though the reference has moved meanwhile.

        Raises InvalidRequest for what is no reference or platform.
        """
        ref, wanted_platform = Reference.parse(reference), platforms.parse(platform)
        superpeers = await self.superpeers()
        answers_for_it = self.url not in superpeers or self.url in owners(str(ref), superpeers)[: plan.COPIES]
        record = self._superpeer.catalog.find(str(ref), str(wanted_platform))
        if record is not None and manifest not in ("", record.manifest_digest):
            record = self._superpeer.catalog.by_manifest(manifest, ref.name)
        lacking: list[Lacking] = []
        size = chunks = 0
        note = ""
        if record is None:
            lacking.append(Lacking("tag" if answers_for_it else "index", str(ref)))
        else:
            index = self._superpeer.catalog.image(record)
            lacking += [Lacking("index", digest) for digest in small(record, index) if not self._has(digest)]
            mine, note = await self.of(record, scope)
            for wanted in mine:
                size += wanted.size
                chunks += sum(map(len, wanted.runs))
                if missing := await self.missing(wanted):
                    blob = wanted.layer.blob
                    told = tuple((run.start, run.stop - 1) for run in missing)
                    lacking.append(Lacking("layer", blob.digest, plan.size_of(blob, missing), told))
        requests = sum(max(1, len(each.chunks)) for each in lacking)
        told_of = tuple(_bounded(each) for each in lacking[:MOST_LACKING])
        return Readiness(
            reference=str(ref), platform=str(wanted_platform), scope=scope, url=self.url, superpeers=superpeers,
            manifest_digest=record.manifest_digest if record else "", chunks=chunks, size=size,
            registry_requests=requests, lacking=told_of, note=note, proven="full" if note else scope,
        )  # fmt: skip

    def _has(self, digest: str) -> bool:
        return self._superpeer.store.has(digest)


def small(record: ImageRecord, index: ImageIndex) -> list[str]:
    """Return what a mount needs besides the layers."""
    layers = [layer.index_digest for layer in index.layers]
    seeks = [layer.seek_digest for layer in index.layers if layer.seek_digest]
    return list(dict.fromkeys([record.index_digest, index.metadata.digest, *layers, *seeks]))


def _bounded(lacking: Lacking) -> Lacking:
    return Lacking(lacking.what, lacking.name, lacking.size, lacking.chunks[:MOST_LACKING])
