"""The index of an image as an OCI artifact: what `dadi index` puts beside the image, and a superpeer finds there. Pure.

    manifest        an OCI image manifest with
                    artifactType   application/vnd.dadi.index.v1
                    config         the empty descriptor ("{}")
                    subject        the image's manifest, for one platform
                    annotations    dev.dadi.version "1", dev.dadi.origin "index" or "convert",
                                   dev.dadi.chunk-size (bytes), dev.dadi.tool
    its layers      two for each distinct layer of the image, in the image's order, both annotated with
                    dev.dadi.layer (the layer's digest) and dev.dadi.diff-id:
                    application/vnd.dadi.layer-index.v1+zstd   `layer.encode`, one zstd frame
                    application/vnd.dadi.seek-table.v1         `seek.encode`
    a signature     another artifact, of type application/vnd.dadi.signature.v1, whose subject is the manifest above and
                    whose one layer is the signature's 64 bytes (see `signature.py`)

The same image and version of dadi give the same bytes. Everything in an artifact is somebody's word: `decode` and
`layer_index` check that it does not contradict itself, `check_layer` that it fits the image, and whoever uses it
verifies chunks and diff IDs against it. (OCI image specification 1.1, "Image Manifest", "Guidelines for Artifact
Usage".)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import zstandard

from dadi import __version__
from dadi import digest as digests
from dadi.errors import DadiError, InvalidRequest, Malformed, TooLarge, Unsupported
from dadi.index import layer, seek
from dadi.index.chunks import MAX_CHUNK_SIZE, MIN_CHUNK_SIZE, OTHER_VERSION
from dadi.index.layer import DecodeRoom, LayerIndex
from dadi.index.seek import SeekTable
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor, Manifest

VERSION = 1
_TYPE = "application/vnd.dadi.index.v"
ARTIFACT_TYPE = f"{_TYPE}{VERSION}"
LAYER_INDEX = "application/vnd.dadi.layer-index.v1+zstd"
SEEK_TABLE = "application/vnd.dadi.seek-table.v1"
SIGNATURE_TYPE = "application/vnd.dadi.signature.v1"

ORIGIN_INDEX, ORIGIN_CONVERT = "index", "convert"
A_LAYER, A_DIFF_ID = "dev.dadi.layer", "dev.dadi.diff-id"
A_VERSION, A_ORIGIN, A_CHUNK_SIZE, A_KEY = "dev.dadi.version", "dev.dadi.origin", "dev.dadi.chunk-size", "dev.dadi.key"
A_TOOL = "dev.dadi.tool"

EMPTY = b"{}"
EMPTY_CONFIG = Descriptor(media_types.OCI_EMPTY, digests.of(EMPTY), len(EMPTY))
MAX_INDEX_BLOB = 128 << 20
"""Bytes of a layer index as it is stored in the registry."""
MAX_INDEX = 256 << 20
"""Bytes of a layer index, unpacked: 2 million files with names of 80 bytes."""
_LEVEL = 12


class IndexedLayer(msgspec.Struct, frozen=True):
    """Where the index and the seek table of one layer of the image are."""

    layer_digest: str
    diff_id: str
    index: Descriptor
    seek: Descriptor


class Artifact(msgspec.Struct, frozen=True):
    """See the head of this file. `origin` is ORIGIN_INDEX or ORIGIN_CONVERT; `chunk_size` is that of all its tables."""

    subject: Descriptor
    layers: tuple[IndexedLayer, ...]
    chunk_size: int
    origin: str = ORIGIN_INDEX

    def layer(self, layer_digest: str) -> IndexedLayer | None:
        """Return what it has for a layer."""
        return next((item for item in self.layers if item.layer_digest == layer_digest), None)


def is_index(artifact_type: str) -> bool:
    """Whether this is the artifact type of an index, of whatever version."""
    return artifact_type.startswith(_TYPE)


def encode(artifact: Artifact) -> bytes:
    """Return the artifact's manifest; deterministic."""
    layers = []
    for item in artifact.layers:
        said = {A_DIFF_ID: item.diff_id, A_LAYER: item.layer_digest}
        layers += [_wire(item.index, LAYER_INDEX, said), _wire(item.seek, SEEK_TABLE, said)]
    return _manifest(ARTIFACT_TYPE, layers, artifact.subject, {
        A_CHUNK_SIZE: str(artifact.chunk_size), A_ORIGIN: artifact.origin, A_TOOL: f"dadi {__version__}",
        A_VERSION: str(VERSION),
    })  # fmt: skip


def decode(manifest: Manifest) -> Artifact:
    """Return what the manifest of an artifact says.

    Raises Unsupported if it is the index of another version or none at all, Malformed if it contradicts itself.
    """
    if manifest.artifact_type != ARTIFACT_TYPE:
        known = is_index(manifest.artifact_type)
        what = f"version {manifest.artifact_type[len(_TYPE) :][:20]}" if known else "no version"
        raise Unsupported(f"an index artifact of {what}; this dadi knows version {VERSION}", hint=OTHER_VERSION)
    if manifest.subject is None:
        raise Malformed("an index artifact without a subject")
    said = manifest.annotations
    if said.get(A_VERSION) != str(VERSION):
        version = said.get(A_VERSION, "")[:20]
        raise Unsupported(f"an index artifact of version {version!r}; known is {VERSION}", hint=OTHER_VERSION)
    size = said.get(A_CHUNK_SIZE, "")
    if not size.isascii() or not size.isdecimal() or not MIN_CHUNK_SIZE <= int(size[:12]) <= MAX_CHUNK_SIZE:
        raise Malformed(f"an index artifact with chunks of {size[:20]!r} bytes")
    if said.get(A_ORIGIN) not in (ORIGIN_INDEX, ORIGIN_CONVERT):
        raise Malformed(f"an index artifact of origin {said.get(A_ORIGIN, '')[:20]!r}")
    return Artifact(manifest.subject, tuple(_layers(manifest)), int(size), said[A_ORIGIN])


def _layers(manifest: Manifest) -> list[IndexedLayer]:
    if [item.media_type for item in manifest.layers] == [media_types.OCI_EMPTY]:
        return []  # an image without layers
    if len(manifest.layers) % 2:
        raise Malformed("an index artifact in which not every layer index has its seek table")
    found: dict[str, IndexedLayer] = {}
    for index, table in zip(manifest.layers[::2], manifest.layers[1::2], strict=True):
        layer_digest, diff_id = index.annotations.get(A_LAYER, ""), index.annotations.get(A_DIFF_ID, "")
        try:
            digests.parse(layer_digest)
            digests.parse(diff_id)
        except InvalidRequest as error:
            raise Malformed(f"an index artifact for {error.message}") from None
        if (table.annotations.get(A_LAYER), table.annotations.get(A_DIFF_ID)) != (layer_digest, diff_id):
            raise Malformed(f"an index artifact whose seek table is not that of layer {layer_digest}")
        if (index.media_type, table.media_type) != (LAYER_INDEX, SEEK_TABLE):
            raise Unsupported(f"an index artifact with {index.media_type[:80]!r} and {table.media_type[:80]!r}")
        if layer_digest in found:
            raise Malformed(f"an index artifact with layer {layer_digest} twice")
        if index.size > MAX_INDEX_BLOB or table.size > seek.MAX_SIZE:
            raise TooLarge(f"an index artifact with an index of {index.size} and a seek table of {table.size} bytes")
        found[layer_digest] = IndexedLayer(layer_digest, diff_id, index, table)
    return list(found.values())


def index_blob(encoded: bytes) -> bytes:
    """Return an encoded layer index as it is stored in the registry; raise TooLarge if nobody would take it.

    Takes long: for threads.
    """
    if len(encoded) > MAX_INDEX:
        raise TooLarge(f"a layer index of {len(encoded)} bytes; the limit is {MAX_INDEX}")
    return zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False).compress(encoded)


def encoded_index(blob: bytes) -> bytes:
    """Return the encoded layer index in what `index_blob` returned; Malformed or TooLarge for all else."""
    try:
        size = zstandard.frame_content_size(blob)
        if not 0 <= size <= MAX_INDEX:
            raise TooLarge(f"a layer index of {size} bytes, unpacked; the limit is {MAX_INDEX}")
        data = zstandard.ZstdDecompressor(max_window_size=MAX_INDEX).decompress(blob, allow_extra_data=False)
    except zstandard.ZstdError as error:
        raise Malformed(f"a layer index that is not packed as zstd: {error}") from None
    return data


def check_layer(index: LayerIndex, table: SeekTable, wanted: Descriptor, diff_id: str, chunk_size: int) -> None:
    """Raise Malformed unless index and seek table belong to each other and to the image's layer."""
    try:
        for digest in (index.layer_digest, index.diff_id):
            digests.parse(digest)
    except DadiError as error:
        raise Malformed(f"a layer index for {error.message}") from None
    pairs = {
        "layer digest": (wanted.digest, index.layer_digest, table.layer_digest),
        "layer size": (wanted.size, index.layer_size, table.compressed.size),
        "diff ID": (diff_id, index.diff_id, table.diff_id),
        "unpacked size": (index.table.size, table.size, table.size),
        "chunk size": (chunk_size, index.table.chunk_size, chunk_size),
    }
    for what, (expected, of_index, of_table) in pairs.items():
        if not expected == of_index == of_table:
            raise Malformed(f"the index of layer {wanted.digest}: its {what} is {of_index} in the index and {of_table} "
                            f"in the seek table, and should be {expected}")  # fmt: skip


def decode_layer(blob: bytes, room: DecodeRoom | None = None) -> tuple[LayerIndex, bytes]:
    """Return the layer index in a blob of the registry, and its own encoding; raise as `layer.decode` does.

    Some KiB of a blob may become `MAX_INDEX` bytes and all that `room` has: decode one at a time, of those that are
    large when unpacked, and give all layers of an image the same room.
    """
    encoded = encoded_index(blob)
    return layer.decode(encoded, room), encoded


# ---- signatures


def encode_signature(subject: Descriptor, signature: bytes, key_id: str) -> bytes:
    """Return the manifest of the artifact that carries a signature of `subject` (an index artifact)."""
    held = Descriptor(SIGNATURE_TYPE, digests.of(signature), len(signature))
    return _manifest(SIGNATURE_TYPE, [_wire(held, SIGNATURE_TYPE, {})], subject, {A_KEY: key_id, A_VERSION: "1"})


def decode_signature(manifest: Manifest) -> Descriptor:
    """Return where the signature's bytes are; raise Malformed if it is no signature."""
    if manifest.artifact_type != SIGNATURE_TYPE or len(manifest.layers) != 1:
        raise Malformed("not the artifact of a signature")
    return manifest.layers[0]


def encode_manifest(
    artifact_type: str, held: Sequence[Descriptor], subject: Descriptor, annotations: dict[str, str]
) -> bytes:
    """Return the manifest of an artifact of another kind, made as ours are."""
    layers = [_wire(item, item.media_type, item.annotations) for item in held]
    return _manifest(artifact_type, layers, subject, annotations)


def _manifest(
    artifact_type: str, layers: list[dict[str, Any]], subject: Descriptor, annotations: dict[str, str]
) -> bytes:
    return msgspec.json.encode({
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "artifactType": artifact_type,
        "config": {**_wire(EMPTY_CONFIG, media_types.OCI_EMPTY, {}), "data": "e30="},
        # Some registries refuse a manifest without layers; the specification says to give them the empty one.
        "layers": layers or [_wire(EMPTY_CONFIG, media_types.OCI_EMPTY, {})],
        "subject": _wire(subject, subject.media_type, {}),
        "annotations": dict(sorted(annotations.items())),
    })  # fmt: skip


def _wire(descriptor: Descriptor, media_type: str, annotations: dict[str, str]) -> dict[str, Any]:
    made: dict[str, Any] = {"mediaType": media_type, "digest": descriptor.digest, "size": descriptor.size}
    return {**made, "annotations": annotations} if annotations else made
