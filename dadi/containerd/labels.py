"""containerd's labels on content and snapshots: what keeps what from being garbage, and what a layer is. Pure.

    on an index            containerd.io/gc.ref.content.m.N = digest of its Nth manifest
    on a manifest          containerd.io/gc.ref.content.config, containerd.io/gc.ref.content.l.N (layers)
    on a config            containerd.io/gc.ref.snapshot.SNAPSHOTTER = chain ID of all layers
    on a layer             containerd.io/uncompressed = diff ID
    on all of them         containerd.io/distribution.source.HOST = REPOSITORY[,REPOSITORY…]
    on a Prepare           containerd.io/snapshot.ref = chain ID, and containerd.io/snapshot/cri.… (below)

What they refer to need not be there: layers of a lazy image never are. containerd's own client sets the same ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

from dadi.oci import media_types
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference

MAX_LABEL = 4096
"""Bytes of a label's key and value together, by containerd's rule."""
EXPIRES = "containerd.io/gc.expire"
UNCOMPRESSED = "containerd.io/uncompressed"
SNAPSHOT_REF = "containerd.io/snapshot.ref"
_INHERITED = "containerd.io/snapshot/"
IMAGE_REFERENCE = f"{_INHERITED}cri.image-ref"
MANIFEST_DIGEST = f"{_INHERITED}cri.manifest-digest"
LAYER_DIGEST = f"{_INHERITED}cri.layer-digest"
IMAGE_LAYERS = f"{_INHERITED}cri.image-layers"
_CONTENT = "containerd.io/gc.ref.content"
_SOURCE = "containerd.io/distribution.source"


def chain_ids(diff_ids: Sequence[str]) -> list[str]:
    """Return the chain ID of each prefix of layers (OCI image specification, "Layer ChainID")."""
    found: list[str] = []
    for diff_id in diff_ids:
        above = f"{found[-1]} {diff_id}" if found else ""
        found.append("sha256:" + hashlib.sha256(above.encode()).hexdigest() if above else diff_id)
    return found


def children(descriptors: Iterable[Descriptor]) -> dict[str, str]:
    """Return the labels that an index or a manifest refers to its children by: entries, or config and layers."""
    labels: dict[str, str] = {}
    counts: dict[str, int] = {}
    for child in descriptors:
        key = _key(child.media_type)
        number = counts.get(key, 0)
        counts[key] = number + 1
        labels[f"{key}{number}" if number or key.endswith(".") else key] = child.digest
    return labels


def _key(media_type: str) -> str:
    if media_type in media_types.CONFIGS:
        return f"{_CONTENT}.config"
    if media_type in media_types.MANIFESTS:
        return f"{_CONTENT}.m."
    return f"{_CONTENT}.l." if media_types.is_layer(media_type) else f"{_CONTENT}."


def unpacked_in(snapshotter: str) -> str:
    """Return the key of a config's label that refers to the snapshot of all layers."""
    return f"containerd.io/gc.ref.snapshot.{snapshotter}"


def source(reference: Reference, there: dict[str, str]) -> dict[str, str]:
    """Return the label that says where content comes from, added to what `there` says; {} if it would be too long."""
    host = reference.registry.rpartition(":")[0] if _has_port(reference.registry) else reference.registry
    key = f"{_SOURCE}.{host.strip('[]')}"
    repositories = {name for name in there.get(key, "").split(",") if name} | {reference.repository}
    value = ",".join(sorted(repositories))
    return {key: value} if _fits(key, value) else {}


def _has_port(registry: str) -> bool:
    return registry.rpartition(":")[2].isdecimal() and not registry.endswith("]")


def for_layer(
    reference: str, manifest_digest: str, layers: Sequence[Descriptor], number: int, chain_id: str
) -> dict[str, str]:
    """Return the labels for the Prepare of layer `number` (0: the lowest): what makes a lazy one of it."""
    layer = layers[number]
    inherited = {key: value for key, value in layer.annotations.items() if key.startswith(_INHERITED)}
    inherited |= {
        IMAGE_REFERENCE: reference,
        MANIFEST_DIGEST: manifest_digest,
        LAYER_DIGEST: layer.digest,
        IMAGE_LAYERS: _joined(layers[number:]),
        SNAPSHOT_REF: chain_id,
    }
    return {key: value for key, value in inherited.items() if _fits(key, value)}


def _joined(layers: Sequence[Descriptor]) -> str:
    """Return the digests, from the first one on, as many as a label takes."""
    text = ""
    for layer in layers:
        longer = f"{text},{layer.digest}" if text else layer.digest
        if not _fits(IMAGE_LAYERS, longer):
            break
        text = longer
    return text


def _fits(key: str, value: str) -> bool:
    return len(key.encode()) + len(value.encode()) <= MAX_LABEL
