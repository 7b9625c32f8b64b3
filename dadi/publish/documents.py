"""The manifests of a copy: those of the original with other layers, all else as it was. Pure.

The JSON is changed and not made anew, so that fields that dadi does not know survive.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dadi import digest as digests
from dadi.oci import media_types
from dadi.oci.index_document import encode_descriptor
from dadi.oci.manifest import Descriptor
from dadi.publish.images import Selection, SourceImage

_OF_THE_BLOB = ("containerd.io/snapshot/stargz/", "io.github.containers.", "io.containers.", "vnd.docker.image.rootfs.")
"""Beginnings of annotations that describe how a layer was packed; they would be wrong in the copy."""


def layer_annotations(layer: Descriptor) -> dict[str, str]:
    """Return the annotations of a layer that hold for the same tar packed otherwise."""
    return {key: value for key, value in layer.annotations.items() if not key.startswith(_OF_THE_BLOB)}


def converted_manifest(image: SourceImage, blobs: dict[str, Descriptor]) -> bytes:
    """Return an image's manifest with other layers, by the digests of those it has; all else stays as it is."""
    document: dict[str, Any] = msgspec.json.decode(image.raw)
    document["mediaType"] = media_types.OCI_MANIFEST
    document["config"]["mediaType"] = media_types.OCI_CONFIG
    document["layers"] = [msgspec.Raw(encode_descriptor(blobs[layer.digest])) for layer in image.manifest.layers]
    return msgspec.json.encode(document)


def converted_index(selection: Selection, manifests: dict[str, bytes]) -> bytes:
    """Return the selection's index with other manifests, by the digests of those it has."""
    document: dict[str, Any] = msgspec.json.decode(selection.raw)
    written = {entry["digest"]: entry for entry in document["manifests"]}
    entries = []
    for image in selection.images:
        raw = manifests[image.entry.digest]
        entry = written.get(image.entry.digest) or msgspec.json.decode(encode_descriptor(image.entry))
        entries.append({**entry, "mediaType": media_types.OCI_MANIFEST, "digest": digests.of(raw), "size": len(raw)})
    return msgspec.json.encode({**document, "mediaType": media_types.OCI_INDEX, "manifests": entries})
