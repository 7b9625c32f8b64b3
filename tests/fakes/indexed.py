"""Images with an index beside them in a `FakeRegistry`, honest or lying: for tests of who believes what.

What lives here: artifacts made by hand, each part of which a test may change before it is stored. What never does: the
code that makes them for users (`dadi/publish`).
"""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from dadi import digest as digests
from dadi.index import artifact as artifacts
from dadi.index import build, layer, seek, seek_build, signature
from dadi.index.artifact import Artifact, IndexedLayer
from dadi.index.layer import LayerIndex
from dadi.index.seek import SeekTable
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor
from tests.fakes.registry import FakeRegistry

CHUNK = 16 << 10
SPACING = 64 << 10


class _Nowhere:
    def write(self, data: bytes, /) -> None: ...


@dataclass
class Indexed:
    """What was put into the registry. `layers`: the gzip blobs; `tars`: what they unpack to."""

    reference: str
    manifest: Descriptor
    artifact: str
    layers: list[bytes]
    tars: list[bytes]
    diff_ids: list[str] = field(default_factory=list)


async def add(
    registry: FakeRegistry, repository: str, tars: list[bytes], directory: Path, *,
    compress: Callable[[bytes], bytes] = lambda tar: gzip.compress(tar, 6, mtime=0),
    change_index: Callable[[LayerIndex], LayerIndex] = lambda index: index,
    change_table: Callable[[SeekTable], SeekTable] = lambda table: table,
    change_artifact: Callable[[Artifact], Artifact] = lambda artifact: artifact,
    change_manifest: Callable[[dict[str, Any]], dict[str, Any]] = lambda document: document,
    sign: Any = None, chunk_size: int = CHUNK,
) -> Indexed:  # fmt: skip
    """Add an image of gzip layers, and the index that is its referrer (by the fallback tag)."""
    layers = [compress(tar) for tar in tars]
    diff_ids = [digests.of(tar) for tar in tars]
    manifest = _add_image(registry, repository, layers, diff_ids)
    items = []
    for blob, diff_id in zip(layers, diff_ids, strict=True):
        source = build.LayerSource(digests.of(blob), len(blob), media_types.OCI_LAYER_GZIP, diff_id)
        index = await build.build(_pieces(blob), source, _Nowhere(), chunk_size=chunk_size)
        path = directory / hashlib.sha256(blob).hexdigest()
        path.write_bytes(blob)
        table = await asyncio.to_thread(seek_build.build, path, index, spacing=SPACING)
        index_blob = artifacts.index_blob(layer.encode(change_index(index)))
        table_blob = seek.encode(change_table(table))
        items.append(IndexedLayer(source.layer_digest, diff_id, _blob(registry, artifacts.LAYER_INDEX, index_blob),
                                  _blob(registry, artifacts.SEEK_TABLE, table_blob)))  # fmt: skip
    artifact = change_artifact(Artifact(manifest, tuple(items), chunk_size))
    registry.add_blob(artifacts.EMPTY)
    document = change_manifest(json.loads(artifacts.encode(artifact)))
    digest = _referrer(registry, repository, manifest.digest, document)
    if sign is not None:
        signed = signature.sign(sign, digest)
        registry.add_blob(signed)
        size = len(json.dumps(document).encode())
        about = Descriptor(media_types.OCI_MANIFEST, digest, size)
        signed_manifest = artifacts.encode_signature(about, signed, signature.key_id(sign.public_key()))
        _referrer(registry, repository, digest, json.loads(signed_manifest))
    return Indexed(f"{registry.host}/{repository}:1", manifest, digest, layers, tars, diff_ids)


def _add_image(registry: FakeRegistry, repository: str, layers: list[bytes], diff_ids: list[str]) -> Descriptor:
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    data = json.dumps(config).encode()
    document = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "config": {"mediaType": media_types.OCI_CONFIG, "digest": registry.add_blob(data), "size": len(data)},
        "layers": [
            {"mediaType": media_types.OCI_LAYER_GZIP, "digest": registry.add_blob(blob), "size": len(blob)}
            for blob in layers
        ],
    }
    digest, size = registry.add_manifest(repository, "1", document, media_types.OCI_MANIFEST)
    return Descriptor(media_types.OCI_MANIFEST, digest, size)


def _referrer(registry: FakeRegistry, repository: str, subject: str, document: dict[str, Any]) -> str:
    digest, size = registry.add_manifest(repository, None, document, media_types.OCI_MANIFEST)
    entry = {"mediaType": media_types.OCI_MANIFEST, "digest": digest, "size": size,
             "artifactType": document["artifactType"]}  # fmt: skip
    index = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": [entry]}
    registry.add_manifest(repository, subject.replace(":", "-"), index, media_types.OCI_INDEX)
    return digest


def _blob(registry: FakeRegistry, media_type: str, data: bytes) -> Descriptor:
    return Descriptor(media_type, registry.add_blob(data), len(data))


async def _pieces(blob: bytes) -> AsyncIterator[bytes]:
    yield blob


def flipped(data: bytes, at: int) -> bytes:
    """Return the bytes with one bit turned over."""
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def with_digest_changed(index: LayerIndex, chunk: int) -> LayerIndex:
    """Return an index whose table says something wrong of one chunk."""
    table = index.table
    return msgspec.structs.replace(
        index, table=msgspec.structs.replace(table, digests=flipped(table.digests, chunk * digests.SIZE))
    )
