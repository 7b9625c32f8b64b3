"""Media types of manifests, configs and layers, OCI's and Docker's, and what each stands for. Pure.

OCI image specification, "Media Types", with its table of compatible Docker types.
"""

from __future__ import annotations

import enum

from dadi.errors import Unsupported

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
OCI_LAYER_GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"
OCI_LAYER_ZSTD = "application/vnd.oci.image.layer.v1.tar+zstd"
OCI_EMPTY = "application/vnd.oci.empty.v1+json"

DOCKER_INDEX = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
DOCKER_CONFIG = "application/vnd.docker.container.image.v1+json"
DOCKER_LAYER = "application/vnd.docker.image.rootfs.diff.tar"
DOCKER_LAYER_GZIP = "application/vnd.docker.image.rootfs.diff.tar.gzip"
DOCKER_LAYER_ZSTD = "application/vnd.docker.image.rootfs.diff.tar.zstd"
DOCKER_FOREIGN_GZIP = "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"

DOCKER_SCHEMA_1 = frozenset(
    {
        "application/vnd.docker.distribution.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v1+prettyjws",
    }
)

INDEXES = frozenset({OCI_INDEX, DOCKER_INDEX})
MANIFESTS = frozenset({OCI_MANIFEST, DOCKER_MANIFEST})
CONFIGS = frozenset({OCI_CONFIG, DOCKER_CONFIG})

ACCEPT = ", ".join((OCI_INDEX, DOCKER_INDEX, OCI_MANIFEST, DOCKER_MANIFEST))
"""What a manifest is asked for with. A registry that is not told would convert, and the digest would change."""


class Compression(enum.StrEnum):
    """How a layer's tar is packed, as its media type claims."""

    NONE = "none"
    GZIP = "gzip"
    ZSTD = "zstd"


_OCI_NONDISTRIBUTABLE = "application/vnd.oci.image.layer.nondistributable.v1.tar"
_FOREIGN = frozenset(
    {
        _OCI_NONDISTRIBUTABLE,
        f"{_OCI_NONDISTRIBUTABLE}+gzip",
        f"{_OCI_NONDISTRIBUTABLE}+zstd",
        DOCKER_FOREIGN_GZIP,
        "application/vnd.docker.image.rootfs.foreign.diff.tar",
    }
)
_LAYERS = {
    OCI_LAYER: Compression.NONE,
    OCI_LAYER_GZIP: Compression.GZIP,
    OCI_LAYER_ZSTD: Compression.ZSTD,
    DOCKER_LAYER: Compression.NONE,
    DOCKER_LAYER_GZIP: Compression.GZIP,
    DOCKER_LAYER_ZSTD: Compression.ZSTD,
} | {name: Compression(name.rpartition("tar")[2].lstrip("+.") or "none") for name in _FOREIGN}


def bare(header: str) -> str:
    """Return a Content-Type header's media type: lower case, without parameters."""
    return header.partition(";")[0].strip().lower()


def is_layer(media_type: str) -> bool:
    """Whether this is a layer of a file system."""
    return media_type in _LAYERS


def is_foreign(media_type: str) -> bool:
    """Whether the layer may not be passed on freely and the registry may therefore not have it."""
    return media_type in _FOREIGN


def compression(media_type: str) -> Compression:
    """Return how a layer is packed; raise Unsupported if the type is not a layer's.

    It is a claim: layers that say gzip and are not exist in the field, so a reader looks at the magic bytes too.
    """
    try:
        return _LAYERS[media_type]
    except KeyError:
        hint = "encrypted layers cannot be read" if "encrypted" in media_type else None
        raise Unsupported(f"a layer of media type {media_type[:100]!r}", hint=hint) from None
