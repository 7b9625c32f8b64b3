"""Which images are meant: from a name to the manifests of the platforms that were asked for, each verified.

    source      RegistryImage       a reference; pinned to its digest by the first request
                LocalImage          an image in an OCI layout or a docker archive
    selection   the manifest itself, or the entries of the index that the name leads to

Everything after `select` goes by digest: what becomes of the tag meanwhile changes nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

import msgspec

from dadi.errors import DigestMismatch, Malformed
from dadi.oci import manifest as manifests
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor, Index, Manifest
from dadi.oci.platforms import Platform
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.publish.local import FileExtent, LocalImages, stream

_MAX_DEPTH = 3
"""Indexes within indexes."""
_MAX_CONFIG = 8 << 20


class Origin(Protocol):
    """One place that a blob can be read from."""

    @property
    def extent(self) -> FileExtent | None:
        """Where the blob stands in a file of this machine, if it does."""
        ...

    def open(self) -> AsyncGenerator[bytes, None]:
        """Yield the bytes of the blob, unverified."""
        ...


class ImageSource(Protocol):
    """Where an image comes from. Documents are verified, layers are not."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    async def top(self) -> tuple[Descriptor, bytes]:
        """Return the manifest or index that the name leads to."""
        ...

    async def manifest(self, descriptor: Descriptor) -> bytes:
        """Return a manifest or index."""
        ...

    async def config(self, descriptor: Descriptor) -> bytes:
        """Return an image's config."""
        ...

    async def origins(self, layer: Descriptor) -> list[Origin]:
        """Return where a layer can be read from, in the order in which to try."""
        ...


class _FromFile:
    def __init__(self, extent: FileExtent) -> None:
        self.extent: FileExtent | None = extent
        self._extent = extent

    def open(self) -> AsyncGenerator[bytes, None]:
        return stream(self._extent)


class _FromRegistry:
    extent: FileExtent | None = None

    def __init__(self, client: RegistryClient, ref: Reference, layer: Descriptor, mirrors: bool) -> None:
        self._client, self._ref, self._layer, self._mirrors = client, ref, layer, mirrors

    def open(self) -> AsyncGenerator[bytes, None]:
        return self._client.blob(self._ref, self._layer, mirrors=self._mirrors)


class RegistryImage:
    """An image in a registry; its layers are taken from `local` where that has them."""

    def __init__(self, client: RegistryClient, reference: Reference, local: LocalImages | None = None) -> None:
        self.client, self.reference, self._local = client, reference, local

    @property
    def name(self) -> str:
        return str(self.reference)

    async def top(self) -> tuple[Descriptor, bytes]:
        return await self.client.manifest(self.reference)

    async def manifest(self, descriptor: Descriptor) -> bytes:
        return (await self.client.manifest(self.reference, descriptor.digest))[1]

    async def config(self, descriptor: Descriptor) -> bytes:
        return await self.client.blob_bytes(self.reference, descriptor, _MAX_CONFIG)

    async def origins(self, layer: Descriptor) -> list[Origin]:
        found: list[Origin] = []
        if self._local is not None and (extent := await asyncio.to_thread(self._local.blob, layer.digest)):
            found.append(_FromFile(extent))
        return [*found, *(_FromRegistry(self.client, self.reference, layer, mirrors) for mirrors in (True, False))]


class LocalImage:
    """An image in a layout or an archive."""

    def __init__(self, images: LocalImages, *names: str) -> None:
        self.images = images
        self._entry = images.named(*names)
        self.name = f"{images.where}:{next((n for n in names if n), '')}".rstrip(":")

    async def top(self) -> tuple[Descriptor, bytes]:
        raw = await self.manifest(self._entry)
        media_type = manifests.parse(raw, expected=self._entry.media_type).media_type
        return Descriptor(media_type, self._entry.digest, len(raw)), raw

    async def manifest(self, descriptor: Descriptor) -> bytes:
        return await asyncio.to_thread(self.images.read, descriptor, manifests.MAX_SIZE)

    async def config(self, descriptor: Descriptor) -> bytes:
        return await asyncio.to_thread(self.images.read, descriptor, _MAX_CONFIG)

    async def origins(self, layer: Descriptor) -> list[Origin]:
        extent = await asyncio.to_thread(self.images.blob, layer.digest)
        return [_FromFile(extent)] if extent is not None else []


class SourceImage(msgspec.Struct, frozen=True):
    """One image for one platform, verified. `entry` is how the index names it (the top itself if there is none)."""

    entry: Descriptor
    raw: bytes
    manifest: Manifest
    config: bytes
    platform: Platform
    diff_ids: tuple[str, ...]

    @property
    def subject(self) -> Descriptor:
        """The manifest, as an artifact's subject names it."""
        return Descriptor(self.manifest.media_type, self.entry.digest, len(self.raw))

    @property
    def layers(self) -> list[tuple[Descriptor, str]]:
        """The distinct layers with their diff IDs, in the image's order."""
        pairs = zip(self.manifest.layers, self.diff_ids, strict=True)
        return list({layer.digest: (layer, diff_id) for layer, diff_id in pairs}.values())


class Selection(msgspec.Struct, frozen=True):
    """What a name leads to (`top`, byte for byte `raw`), and the images in it that are meant.

    `left_out` are the other platforms that the index has; `others` its entries that are no images at all.
    """

    top: Descriptor
    raw: bytes
    images: tuple[SourceImage, ...]
    left_out: tuple[str, ...] = ()
    others: int = 0

    @property
    def is_index(self) -> bool:
        return self.top.media_type in media_types.INDEXES


async def select(
    source: ImageSource, wanted: Sequence[Platform], machine: Platform, *, every: bool = False
) -> Selection:
    """Return the images of `source` for the platforms in `wanted`, for all platforms, or for `machine`'s by default.

    An image that is not in an index is taken whatever its platform, unless platforms are asked for. Raises
    NoSuchPlatform, and whatever the source raises.
    """
    top, raw = await source.top()
    document = manifests.parse(raw, expected=top.media_type)
    if isinstance(document, Manifest):
        single = await _image(source, top, raw, document)
        for platform in wanted:
            if single.platform.known and not single.platform.runs_on(platform):
                raise manifests.no_such_platform(platform, (single.platform,))
        return Selection(top, raw, (single,))
    entries = await _entries(source, document, depth=1)
    if every:
        loaded = [await _load(source, entry) for entry in entries]
        images = [image for image in loaded if image is not None]
        return Selection(top, raw, tuple(images), (), len(document.manifests) - len(entries))
    flat = Index(document.media_type, tuple(entries))
    found: dict[str, SourceImage] = {}
    for platform in wanted or (machine,):
        suited = await _for(source, flat, platform)
        found[suited.entry.digest] = suited
    rest = {str(entry.platform) for entry in entries if entry.digest not in found and entry.platform}
    return Selection(top, raw, tuple(found.values()), tuple(sorted(rest)))


async def _entries(source: ImageSource, index: Index, depth: int) -> list[Descriptor]:
    """Return the image manifests in an index and in the indexes within it."""
    if depth > _MAX_DEPTH:
        raise Malformed(f"indexes within indexes, more than {_MAX_DEPTH} deep")
    found: list[Descriptor] = []
    for entry in manifests.images(index):
        if entry.media_type in media_types.MANIFESTS:
            found.append(entry)
            continue
        inner = manifests.parse(await source.manifest(entry), expected=entry.media_type)
        assert isinstance(inner, Index)
        found += await _entries(source, inner, depth + 1)
        if len(found) > manifests.MAX_ENTRIES:
            raise Malformed(f"indexes with more than {manifests.MAX_ENTRIES} entries")
    return found


async def _for(source: ImageSource, index: Index, platform: Platform) -> SourceImage:
    """Return the image that suits a platform best; entries that name none are judged by their config."""
    there: list[Platform] = []
    for entry in manifests.candidates(index, platform):
        image = await _load(source, entry)
        if image is None:
            continue
        if entry.platform or not image.platform.known or image.platform.runs_on(platform):
            return image
        there.append(image.platform)
    raise manifests.no_such_platform(platform, there)


async def _load(source: ImageSource, entry: Descriptor) -> SourceImage | None:
    """Return the image of an entry; None if it names no platform and turns out to be no image."""
    raw = await source.manifest(entry)
    if len(raw) != entry.size:
        raise Malformed(f"{source.name}: manifest {entry.digest} has {len(raw)} bytes, not {entry.size}")
    document = manifests.parse(raw, expected=entry.media_type)
    assert isinstance(document, Manifest)
    if entry.platform is None and document.config.media_type not in media_types.CONFIGS:
        return None
    return await _image(source, entry, raw, document)


async def _image(source: ImageSource, entry: Descriptor, raw: bytes, manifest: Manifest) -> SourceImage:
    manifest.check_is_image()
    config = await source.config(manifest.config)
    if len(config) != manifest.config.size:
        raise DigestMismatch(f"{source.name}: its config has {len(config)} bytes, not {manifest.config.size}")
    parsed = manifests.parse_config(config, manifest)
    return SourceImage(entry, raw, manifest, config, parsed.platform, parsed.diff_ids)
