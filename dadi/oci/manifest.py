"""Manifests, indexes and image configs: bytes in, frozen structures out. Pure.

    document     JSON of at most `limit` bytes, schemaVersion 2, and either `manifests` (an index) or `config` and
                 `layers` (a manifest); never both, because two readers could then see two images behind one digest
    its type     the body's mediaType; the Content-Type where the body has none; the shape where neither says. They
                 must agree, and agree with the descriptor that led here
    descriptor   mediaType, digest (sha256), size (0 to 2^63 - 1), and optional fields
    config       rootfs.type "layers" and one diff ID for each layer, in their order

OCI image specification, "Image Manifest", "Image Index", "Image Configuration"; Docker "Image Manifest V2, Schema 2".
What a descriptor's `urls` name is never contacted: the registry is asked, as for any other blob.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sized
from typing import Any

import msgspec

from dadi import digest as digests
from dadi.errors import Malformed, NoSuchPlatform, TooLarge, Unsupported
from dadi.oci import media_types, platforms
from dadi.oci.platforms import Platform

MAX_SIZE = 4 << 20
"""Bytes of a manifest; registries need not accept more (OCI distribution specification, "Pushing manifests")."""
MAX_LAYERS = 1000
MAX_ENTRIES = 1000
_MAX_BLOB = (1 << 63) - 1
_ATTESTATION = "vnd.docker.reference.type"
_DIGEST_FORM = re.compile(r"[a-z0-9]+(?:[+._-][a-z0-9]+)*:[A-Za-z0-9=_-]+")


class Descriptor(msgspec.Struct, frozen=True):
    """What a blob is called, how many bytes it has, and what it claims to be."""

    media_type: str
    digest: str
    size: int
    platform: Platform | None = None
    annotations: dict[str, str] = {}
    artifact_type: str = ""

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Descriptor({digests.short(self.digest)}, {self.size} bytes, {self.media_type})"


class Manifest(msgspec.Struct, frozen=True):
    """One image, or an artifact that borrows the form. `layers` begins with the lowest."""

    media_type: str
    config: Descriptor
    layers: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}
    artifact_type: str = ""
    subject: Descriptor | None = None

    def check_is_image(self) -> Manifest:
        """Return self; raise Unsupported if this is not a container image whose layers dadi can read."""
        if self.config.media_type not in media_types.CONFIGS:
            what = self.artifact_type or self.config.media_type
            raise Unsupported(f"not a container image but an artifact of type {what[:100]!r}")
        for layer in self.layers:
            media_types.compression(layer.media_type)
        return self


class Index(msgspec.Struct, frozen=True):
    """A list of manifests, as a rule the same image for several platforms."""

    media_type: str
    manifests: tuple[Descriptor, ...]
    annotations: dict[str, str] = {}
    subject: Descriptor | None = None


class ImageConfig(msgspec.Struct, frozen=True):
    """The part of an image's config that dadi reads. `platform` is not `known` where the config does not say."""

    platform: Platform
    diff_ids: tuple[str, ...]


class _WirePlatform(msgspec.Struct):
    os: str | None = None
    architecture: str | None = None
    variant: str | None = None


class _WireDescriptor(msgspec.Struct, rename="camel"):
    media_type: str
    digest: str
    size: int
    platform: _WirePlatform | None = None
    annotations: dict[str, str] | None = None
    artifact_type: str | None = None


class _Document(msgspec.Struct, rename="camel"):
    schema_version: int
    media_type: str | None = None
    artifact_type: str | None = None
    config: _WireDescriptor | None = None
    layers: list[_WireDescriptor] | None = None
    manifests: list[_WireDescriptor] | None = None
    subject: _WireDescriptor | None = None
    annotations: dict[str, str] | None = None


class _RootFS(msgspec.Struct):
    type: str = ""
    diff_ids: list[str] | None = None


class _WireConfig(_WirePlatform):
    rootfs: _RootFS | None = None


_document = msgspec.json.Decoder(_Document)
_config = msgspec.json.Decoder(_WireConfig)
_entry = msgspec.json.Decoder(_WireDescriptor)


def parse(data: bytes, content_type: str = "", *, expected: str = "", limit: int = MAX_SIZE) -> Manifest | Index:
    """Return what the bytes of a manifest say.

    `content_type` is the header they came with, `expected` the media type of the descriptor that named them; "" where
    there is none. Raises TooLarge above `limit` bytes, MAX_LAYERS layers or MAX_ENTRIES entries; Unsupported for
    Docker's schema 1, for other digests than sha256 and for unknown types of manifest; Malformed for all else that is
    wrong.
    """
    if len(data) > limit:
        raise TooLarge(f"a manifest of {len(data)} bytes; the limit is {limit}")
    document = _decode(_document, data, "manifest")
    if document.schema_version != 2:
        raise _old_schema(document.schema_version)
    media_type = _media_type_of(document, media_types.bare(content_type), expected)
    annotations = document.annotations or {}
    subject = _descriptor(document.subject) if document.subject else None
    if media_type in media_types.INDEXES:
        _check_count("an index", "entries", document.manifests, MAX_ENTRIES)
        entries = tuple(map(_descriptor, document.manifests or ()))
        return Index(media_type, entries, annotations, subject)
    if document.config is None:
        raise Malformed("a manifest without a config")
    _check_count("an image", "layers", document.layers, MAX_LAYERS)
    layers = tuple(map(_descriptor, document.layers or ()))
    config = _descriptor(document.config)
    _check_sizes_agree((config, *layers))
    return Manifest(media_type, config, layers, annotations, document.artifact_type or "", subject)


def parse_config(data: bytes, manifest: Manifest) -> ImageConfig:
    """Return what dadi needs of an image's config; raise Malformed if it does not fit the manifest."""
    config = _decode(_config, data, "image config")
    rootfs = config.rootfs or _RootFS()
    diff_ids = tuple(rootfs.diff_ids or ())
    if rootfs.type not in ("layers", ""):
        raise Malformed(f"an image config whose rootfs is of type {rootfs.type[:40]!r}, not 'layers'")
    if len(diff_ids) != len(manifest.layers):
        raise Malformed(f"an image config of {len(diff_ids)} diff IDs for a manifest of {len(manifest.layers)} layers")
    for diff_id in diff_ids:
        _check_digest(diff_id)
    by_layer: dict[str, str] = {}
    for layer, diff_id in zip(manifest.layers, diff_ids, strict=True):
        if by_layer.setdefault(layer.digest, diff_id) != diff_id:
            raise Malformed(f"layer {layer.digest} stands twice in the manifest, with different diff IDs")
    return ImageConfig(_platform(config), diff_ids)


def parse_descriptor(data: bytes) -> Descriptor:
    """Return one descriptor; raise Malformed, or Unsupported for a digest of another kind than sha256."""
    return _descriptor(_decode(_entry, data, "descriptor"))


def candidates(index: Index, platform: Platform) -> list[Descriptor]:
    """Return the entries to look at for a platform, the best first; raise NoSuchPlatform if there is none.

    An entry that names a platform is taken at its word. Where none of them suits, entries that name no platform come
    into question: only the image's config says what they are for. Attestations and other artifacts are left out.
    """
    offers = images(index)
    distances = [(platforms.distance(entry.platform, platform), entry) for entry in offers if entry.platform]
    suitable = [(distance, entry) for distance, entry in distances if distance is not None]
    if suitable:
        return [min(suitable, key=lambda pair: pair[0])[1]]
    silent = [entry for entry in offers if entry.platform is None]
    if not silent:
        raise no_such_platform(platform, (entry.platform for entry in offers if entry.platform))
    return silent


def images(index: Index) -> list[Descriptor]:
    """Return the entries that are images (or indexes of images): no attestations, no other artifacts."""
    return [entry for entry in index.manifests if _is_image_entry(entry)]


def no_such_platform(wanted: Platform, available: Iterable[Platform]) -> NoSuchPlatform:
    """Return the error that says what there is instead."""
    names = sorted({str(platform) for platform in available})
    shown = ", ".join(names[:20]) + (" and more" if len(names) > 20 else "")
    return NoSuchPlatform(f"no image for {wanted}", hint=f"there is {shown}" if names else "it lists no image at all")


def _decode(decoder: msgspec.json.Decoder[Any], data: bytes, what: str) -> Any:
    try:
        return decoder.decode(data)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise Malformed(f"not a valid {what}: {error}") from None


def _media_type_of(document: _Document, header: str, expected: str) -> str:
    """Return the one type on which body, header, descriptor and shape agree; see the head of this file."""
    known = media_types.INDEXES | media_types.MANIFESTS
    if document.manifests is not None and (document.layers is not None or document.config is not None):
        raise Malformed("a document with both manifests and layers is neither an index nor a manifest")
    is_index = document.manifests is not None
    shape = media_types.OCI_INDEX if is_index else media_types.OCI_MANIFEST
    claims = [document.media_type or "", header if header in known else "", expected]
    media_type = next((claim for claim in claims if claim), shape)
    if media_type in media_types.DOCKER_SCHEMA_1:
        raise _old_schema(1)
    if media_type not in known:
        raise Unsupported(f"a manifest of media type {media_type[:100]!r}")
    for claim in claims:
        if claim and claim != media_type:
            raise Malformed(f"a manifest of media type {media_type!r} that was announced as {claim[:100]!r}")
    if is_index != (media_type in media_types.INDEXES):
        raise Malformed(f"a manifest of media type {media_type!r} with the content of {shape!r}")
    return media_type


def _check_count(what: str, of: str, items: Sized | None, limit: int) -> None:
    if items is not None and len(items) > limit:
        raise TooLarge(f"{what} of {len(items)} {of}; the limit is {limit}")


def _old_schema(version: int) -> Unsupported:
    return Unsupported(
        f"a manifest of schema version {version}",
        hint="push the image again with a current tool: schema 1 was given up by its makers",
    )


def _descriptor(wire: _WireDescriptor) -> Descriptor:
    if not 0 <= wire.size <= _MAX_BLOB:
        raise Malformed(f"a descriptor of {wire.size} bytes")
    _check_digest(wire.digest)
    platform = _platform(wire.platform) if wire.platform else None
    return Descriptor(
        wire.media_type, wire.digest, wire.size, platform, wire.annotations or {}, wire.artifact_type or ""
    )


def _platform(wire: _WirePlatform) -> Platform:
    return platforms.normalized(wire.os or "", wire.architecture or "", wire.variant or "")


def _check_digest(text: str) -> None:
    if not _DIGEST_FORM.fullmatch(text):
        raise Malformed(f"not a digest: {text[:100]!r}")
    algorithm = text.partition(":")[0]
    if algorithm != "sha256":
        raise Unsupported(f"a digest by {algorithm[:20]!r}; only sha256 is supported")
    if not re.fullmatch(r"[0-9a-f]{64}", text[7:]):
        raise Malformed(f"not a sha256 digest: {text[:100]!r}")


def _check_sizes_agree(descriptors: tuple[Descriptor, ...]) -> None:
    """The same blob may stand in an image several times, but it has one size."""
    sizes: dict[str, int] = {}
    for descriptor in descriptors:
        if sizes.setdefault(descriptor.digest, descriptor.size) != descriptor.size:
            raise Malformed(f"blob {descriptor.digest} stands twice in the manifest, with different sizes")


def _is_image_entry(entry: Descriptor) -> bool:
    if entry.media_type not in media_types.MANIFESTS | media_types.INDEXES or _ATTESTATION in entry.annotations:
        return False
    return entry.platform is None or entry.platform.known
