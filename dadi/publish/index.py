"""`index_image`: an index for an image, put beside it. The image itself is not touched.

    1. the name is pinned to a digest, and the manifests of the platforms are read
    2. for each: is there an index of our version already? Then nothing is done
    3. each distinct layer that is left: the layer index of another image if there is one, else the layer is read once
    4. blobs, the artifact, its signature, the list of known layers
    5. does the tag still lead where it led?
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi.errors import DadiError, Unsupported
from dadi.index import signature
from dadi.index.artifact import ORIGIN_INDEX, Artifact, IndexedLayer
from dadi.index.build import Limits
from dadi.index.chunks import DEFAULT_CHUNK_SIZE
from dadi.oci import platforms as oci_platforms
from dadi.oci.manifest import Descriptor
from dadi.oci.platforms import Platform
from dadi.publish import layer as layers
from dadi.publish.artifacts import bring_artifact, bring_empty, bring_layer
from dadi.publish.images import ImageSource, LocalImage, RegistryImage, SourceImage, select
from dadi.publish.known import Known
from dadi.publish.layer import Made
from dadi.publish.progress import Progress
from dadi.publish.target import RegistryTarget, Target
from dadi.publish.work import LAYERS_AT_ONCE, all_of, workspace

MADE, PRESENT = "made", "present"
READ, REUSED = "read", "reused"


class LayerReport(msgspec.Struct, frozen=True):
    """One layer; sizes in bytes. `how`: READ, or REUSED (the index of another image's layer)."""

    digest: str
    diff_id: str
    how: str
    compressed_bytes: int
    unpacked_bytes: int
    files: int
    chunks: int
    seek_points: int
    index_bytes: int
    seek_bytes: int
    seconds: float


class PlatformReport(msgspec.Struct, frozen=True):
    """One platform's manifest and its index. `how`: MADE, or PRESENT (nothing was done); `key_id`: who signed it."""

    platform: str
    manifest_digest: str
    artifact_digest: str
    how: str
    key_id: str
    layers: tuple[LayerReport, ...] = ()


class IndexReport(msgspec.Struct, frozen=True):
    """`digest` is what the name led to; `moved_to` what its tag leads to now, if that is something else."""

    image: str
    digest: str
    target: str
    platforms: tuple[PlatformReport, ...]
    left_out: tuple[str, ...] = ()
    moved_to: str | None = None


def this_machine() -> Platform:
    """Return the platform that we run on."""
    return oci_platforms.of_machine(os.uname().machine)


async def index_image(
    source: ImageSource,
    target: Target,
    *,
    platforms: Sequence[Platform] = (),
    every: bool = False,
    key: Ed25519PrivateKey | None = None,
    force: bool = False,
    spacing: int | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> IndexReport:
    """Make the indexes of an image and bring them to `target`; return what was done.

    `platforms`: which ones, by default this machine's; `every`: all. `force`: also where there is an index, and read
    every layer. `spacing`: bytes of output between two seek points. Raises what the registry, the layers and the disk
    raise; then nothing was pushed but blobs that nobody refers to, or the artifacts of some platforms.
    """
    progress = progress or Progress()
    progress.stage("looking the image up")
    if isinstance(source, LocalImage) and source.images.made:
        raise Unsupported(
            f"{source.images.where} has no manifest to which an index could belong",
            hint="name the image in its registry, or make the archive with a newer Docker, or an OCI layout",
        )
    selection = await select(source, platforms, this_machine(), every=every)
    known = None
    if isinstance(source, RegistryImage):
        known = Known(source.client, source.reference, key.public_key() if key else None, progress)
    async with workspace() as directory:
        run = _Run(source, target, None if force else known, directory, spacing, limits, progress)
        reports = await run.images(selection.images, key, known)
    moved = await _moved(source, selection.top.digest)
    return IndexReport(source.name, selection.top.digest, target.name, reports, selection.left_out, moved)


class _Run:
    """One call of `index_image`: what all its layers share."""

    def __init__(
        self,
        source: ImageSource,
        target: Target,
        known: Known | None,
        directory: Path,
        spacing: int | None,
        limits: Limits | None,
        progress: Progress,
    ) -> None:
        self._source, self._target, self._known = source, target, known
        self._directory, self._spacing, self._limits, self._progress = directory, spacing, limits, progress
        self._turns = asyncio.Semaphore(LAYERS_AT_ONCE)

    async def images(
        self, images: Sequence[SourceImage], key: Ed25519PrivateKey | None, registry: Known | None
    ) -> tuple[PlatformReport, ...]:
        """Return a report for each image."""
        distinct = {image.subject.digest: image for image in images}
        done = {digest: report for digest, image in distinct.items() if (report := await self._present(image))}
        todo = {digest: image for digest, image in distinct.items() if digest not in done}
        wanted = {layer.digest: (layer, diff_id) for image in todo.values() for layer, diff_id in image.layers}
        self._progress.expect(layers=len(wanted), size=sum(layer.size for layer, _ in wanted.values()))
        if todo:
            self._progress.stage("reading layers")
            await bring_empty(self._target, self._progress)
        made = dict(zip(wanted, await all_of(self._layer(*pair) for pair in wanted.values()), strict=True))
        for digest, image in todo.items():
            self._progress.stage("bringing the index")
            parts = [made[layer.digest] for layer, _ in image.layers]
            artifact = Artifact(image.subject, tuple(item for item, _ in parts), DEFAULT_CHUNK_SIZE, ORIGIN_INDEX)
            described = await bring_artifact(self._target, artifact, key, self._progress)
            if registry is not None and isinstance(self._target, RegistryTarget):
                await registry.remember(described, artifact)
            done[digest] = self._report(image, described, MADE, key, tuple(report for _, report in parts))
        return tuple(done[digest] for digest in distinct)

    async def _present(self, image: SourceImage) -> PlatformReport | None:
        """Return the report of an image that needs nothing. What is to be in a directory is made in any case."""
        if self._known is None or not isinstance(self._target, RegistryTarget):
            return None
        found = await self._known.index_of(image.subject, image.layers)
        if found is None:
            return None
        return PlatformReport(
            str(image.platform), image.subject.digest, found.descriptor.digest, PRESENT, found.key_id
        )

    async def _layer(self, wanted: Descriptor, diff_id: str) -> tuple[IndexedLayer, LayerReport]:
        async with self._turns:
            made = await self._known.layer(wanted, diff_id) if self._known is not None else None
            how = READ if made is None else REUSED
            if made is None:
                origins = await self._source.origins(wanted)
                made = await layers.indexed(
                    wanted, diff_id, origins, self._directory, self._progress,
                    spacing=self._spacing, limits=self._limits,
                )  # fmt: skip
            else:
                self._progress.advance(wanted.size)
            item = await bring_layer(self._target, made, self._progress)
        report = _layer_report(made, how)
        self._progress.layer(wanted.digest, f"{how}, {report.files} files, {report.seek_points} seek points")
        return item, report

    @staticmethod
    def _report(
        image: SourceImage,
        described: Descriptor,
        how: str,
        key: Ed25519PrivateKey | None,
        parts: tuple[LayerReport, ...],
    ) -> PlatformReport:
        signed = signature.key_id(key.public_key()) if key else ""
        return PlatformReport(str(image.platform), image.subject.digest, described.digest, how, signed, parts)


def _layer_report(made: Made, how: str) -> LayerReport:
    index, table = made.index, made.table
    return LayerReport(
        index.layer_digest, index.diff_id, how, index.layer_size, index.table.size, made.files, index.table.count,
        len(table.points), len(made.index_blob), len(made.seek_blob), round(made.seconds, 3),
    )  # fmt: skip


async def _moved(source: ImageSource, digest: str) -> str | None:
    """Return what the tag leads to now, if that is not `digest`."""
    if not isinstance(source, RegistryImage) or source.reference.digest is not None:
        return None
    try:
        now = (await source.client.resolve(source.reference)).digest
    except DadiError:
        return None  # the work is done; that the tag is gone meanwhile is no failure of it
    return None if now == digest else now
