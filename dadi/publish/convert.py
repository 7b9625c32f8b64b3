"""`convert_image`: a copy of an image whose layers are zstd with one frame a chunk, and its index. Still an OCI image.

    what                     in the copy
    a layer                  the same tar, packed anew (`packed.py`); media type OCI_LAYER_ZSTD
    the config               byte for byte the same, so diff IDs and the image ID stay
    a manifest               its other fields and annotations kept; OCI media types
    an index                 its other fields and annotations kept; entries that are not images (attestations of the
                             manifests that were) are left out

    each layer: read, verified (digest and diff ID), packed, indexed in one pass ─► pushed if it is not there
    then, per platform: config, manifest, index artifact, signature; the tag comes last, when everything is there

The same input, level and version give the same bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi.errors import DadiError, InvalidRequest, Unsupported
from dadi.index import signature
from dadi.index.artifact import ORIGIN_CONVERT, Artifact, IndexedLayer
from dadi.index.build import Limits
from dadi.index.chunks import DEFAULT_CHUNK_SIZE, ChunkTable
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor
from dadi.oci.platforms import Platform
from dadi.publish import layer as layers
from dadi.publish.artifacts import bring_artifact, bring_empty, bring_layer
from dadi.publish.convert_report import ConvertReport, LayerReport, PlatformReport, chunk_digests, counted
from dadi.publish.documents import converted_index, converted_manifest, layer_annotations
from dadi.publish.images import ImageSource, RegistryImage, Selection, SourceImage, select
from dadi.publish.index import this_machine
from dadi.publish.known import Known
from dadi.publish.packed import DEFAULT_LEVEL, Packer
from dadi.publish.progress import Progress
from dadi.publish.target import RegistryTarget, Target
from dadi.publish.work import LAYERS_AT_ONCE, all_of, workspace


class _Packed(msgspec.Struct, frozen=True):
    """A layer of the copy: how the manifest names it, where its index is, and what its chunks are."""

    blob: Descriptor
    item: IndexedLayer
    report: LayerReport
    table: ChunkTable


async def convert_image(
    source: ImageSource,
    target: Target,
    *,
    platforms: Sequence[Platform] = (),
    every: bool = False,
    level: int = DEFAULT_LEVEL,
    key: Ed25519PrivateKey | None = None,
    limits: Limits | None = None,
    progress: Progress | None = None,
) -> ConvertReport:
    """Copy an image with its layers packed anew; return what was done.

    `platforms`: which ones, by default this machine's; `every`: all. An index stays one if all its platforms, or
    several, are copied. Raises what the registries, the layers and the disk raise; then the target's tag still leads
    where it led.
    """
    progress = progress or Progress()
    if isinstance(target, RegistryTarget) and target.reference.digest is not None:
        raise InvalidRequest(f"{target.reference}: the copy has another digest", hint="give it a tag")
    progress.stage("looking the image up")
    selection = await select(source, platforms, this_machine(), every=every)
    before = await _chunks_before(target, selection, progress)
    wanted = {layer.digest: (layer, diff_id) for image in selection.images for layer, diff_id in image.layers}
    for layer, _ in wanted.values():
        if media_types.is_foreign(layer.media_type):
            raise Unsupported(f"layer {layer.digest} may not be passed on (media type {layer.media_type})")
    progress.expect(layers=len(wanted), size=sum(layer.size for layer, _ in wanted.values()))
    progress.stage("packing layers")
    await bring_empty(target, progress)
    turns = asyncio.Semaphore(LAYERS_AT_ONCE)
    async with workspace() as directory:
        with Packer(level) as packer:
            made = await all_of(
                _layer(source, target, turns, directory, packer, layer, diff_id, limits, progress)
                for layer, diff_id in wanted.values()
            )
    by_digest = dict(zip(wanted, made, strict=True))
    progress.stage("bringing manifests and indexes")
    reports = [await _bring_image(target, image, by_digest, key, progress) for image in selection.images]
    top = await _bring_top(target, selection, [new for _, new in reports], every)
    sums = counted(((layer.report, layer.table) for layer in made), before)
    return ConvertReport(
        **msgspec.structs.asdict(sums),
        source=source.name,
        target=target.name,
        digest=top.digest,
        level=level,
        platforms=tuple(report for report, _ in reports),
        left_out=selection.left_out,
    )


async def _layer(
    source: ImageSource,
    target: Target,
    turns: asyncio.Semaphore,
    directory: Path,
    packer: Packer,
    wanted: Descriptor,
    diff_id: str,
    limits: Limits | None,
    progress: Progress,
) -> _Packed:
    """Pack one layer, and bring it and its index there."""
    async with turns:
        origins = await source.origins(wanted)
        made, path = await layers.packed(wanted, diff_id, origins, directory, progress, packer, limits=limits)
        index, table = made.index, made.index.table
        kept = layer_annotations(wanted)
        blob = Descriptor(media_types.OCI_LAYER_ZSTD, index.layer_digest, index.layer_size, annotations=kept)
        try:
            pushed = await target.blob(blob, path, progress)
        finally:
            with contextlib.suppress(OSError):  # the workspace goes away as a whole
                await asyncio.to_thread(path.unlink, missing_ok=True)
        item = await bring_layer(target, made, progress)
    report = LayerReport(
        wanted.digest, blob.digest, diff_id, wanted.size, blob.size, table.size, made.files, table.count, 0,
        len(made.index_blob), len(made.seek_blob), pushed, round(made.seconds, 3),
    )  # fmt: skip
    progress.layer(wanted.digest, f"{wanted.size} → {blob.size} bytes" + ("" if pushed else ", there already"))
    return _Packed(blob, item, report, table)


async def _bring_image(
    target: Target,
    image: SourceImage,
    made: dict[str, _Packed],
    key: Ed25519PrivateKey | None,
    progress: Progress,
) -> tuple[PlatformReport, tuple[SourceImage, bytes]]:
    """Bring a platform's config, manifest and index there; return its new manifest too."""
    await target.blob(image.manifest.config, image.config, progress)
    raw = converted_manifest(image, {digest: layer.blob for digest, layer in made.items()})
    new = await target.manifest(raw, media_types.OCI_MANIFEST, tagged=False)
    # Two layers that differ in how they were packed only are one layer now.
    items = {made[layer.digest].blob.digest: made[layer.digest].item for layer, _ in image.layers}
    artifact = Artifact(new, tuple(items.values()), DEFAULT_CHUNK_SIZE, ORIGIN_CONVERT)
    described = await bring_artifact(target, artifact, key, progress)
    if isinstance(target, RegistryTarget):
        await Known(target.client, target.reference, None, progress).remember(described, artifact)
    signed = signature.key_id(key.public_key()) if key else ""
    return PlatformReport(
        str(image.platform), image.subject.digest, new.digest, described.digest, signed, tuple(items)
    ), (image, raw)


async def _bring_top(
    target: Target, selection: Selection, images: list[tuple[SourceImage, bytes]], every: bool
) -> Descriptor:
    """Bring what the tag is to lead to there, under the tag."""
    if selection.is_index and (every or len(images) > 1):
        raw = converted_index(selection, {image.entry.digest: raw for image, raw in images})
        return await target.manifest(raw, media_types.OCI_INDEX, tagged=True)
    return await target.manifest(images[0][1], media_types.OCI_MANIFEST, tagged=True)


async def _chunks_before(target: Target, selection: Selection, progress: Progress) -> set[bytes] | None:
    """Return the digests of all chunks of the image that the target's tag leads to; None if it has no index there."""
    if not isinstance(target, RegistryTarget):
        return None
    known = Known(target.client, target.reference, None, Progress())
    wanted = [image.platform for image in selection.images if image.platform.known]
    found: set[bytes] = set()
    try:
        for image in (await select(RegistryImage(target.client, target.reference), wanted, this_machine())).images:
            index = await known.index_of(image.subject, image.layers)
            if index is None:
                return None
            for layer, diff_id in image.layers:
                item = index.artifact.layer(layer.digest)
                assert item is not None  # index_of has seen to it
                found.update(chunk_digests((await known.fetch(item, layer, diff_id)).index.table))
    except DadiError:
        return None  # it is for the report only
    return found
