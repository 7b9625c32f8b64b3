"""The index that `dadi index` or `dadi convert` has put beside an image: found, checked, brought into the store.

    1. the registry's referrers of the image's manifest, of our artifact type
    2. the first that can be used: known version, not refused before, subject the manifest that was asked for, our chunk
       size, signed by a trusted key where the configuration has any, an index and a seek table for each layer
    3. for each layer both blobs, verified by their digests, checked against each other and against the image

Whatever is wrong with an artifact is a fallback that says so; the image is then indexed on first sight. What an index
says of the bytes themselves is verified as they come (`ranged.py`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dadi.blobs.disk import DiskBlobs
from dadi.errors import AccessDenied, DadiError, Malformed, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index import artifact as artifacts
from dadi.index import seek, signature
from dadi.index.artifact import Artifact
from dadi.index.image import CONVERTED, REFERRER, ImageLayer
from dadi.index.layer import LayerIndex
from dadi.oci import manifest as manifests
from dadi.oci.manifest import Descriptor, Manifest
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient, ResolvedImage
from superpeer.refused import Refused

_MOST = 16
"""Artifacts, and signatures of one, that are looked at."""
_PARALLEL = 8


class Accepted(msgspec.Struct, frozen=True):
    """An artifact that can be used for an image; `signer` is "" where no signature was asked for."""

    digest: str
    artifact: Artifact
    signer: str

    @property
    def origin(self) -> str:
        """One of `dadi.index.image.ORIGINS`."""
        return CONVERTED if self.artifact.origin == artifacts.ORIGIN_CONVERT else REFERRER


class Referrers:
    """Finds indexes in registries."""

    def __init__(self, store: DiskBlobs, registry: RegistryClient, refused: Refused, *, chunk_size: int,
                 fallbacks: Fallbacks) -> None:  # fmt: skip
        self.keys: Sequence[Ed25519PublicKey] = ()
        """The trusted ones; without any, signatures are not asked for."""
        self._store = store
        self._registry = registry
        self._refused = refused
        self._chunk_size = chunk_size
        self._fallbacks = fallbacks
        self._slots = asyncio.Semaphore(_PARALLEL)

    async def find(self, reference: Reference, resolved: ResolvedImage) -> Accepted | None:
        """Return the index to use for an image; None if there is none that can be used."""
        try:
            found = await self._registry.referrers(reference, resolved.descriptor.digest)
        except DadiError as error:
            self._fallbacks.note("referrers could not be read", f"{reference}: {error.message}")
            return None
        for entry in [item for item in found if artifacts.is_index(item.artifact_type)][:_MOST]:
            try:
                return await self._accept(reference, resolved, entry)
            except DadiError as error:
                self._fallbacks.note("index in the registry not used", f"{reference}, {entry.digest}: {error.message}")
        return None

    async def _accept(self, reference: Reference, resolved: ResolvedImage, entry: Descriptor) -> Accepted:
        self._refused.check(entry.digest)
        if entry.artifact_type != artifacts.ARTIFACT_TYPE:
            artifacts.decode(Manifest("", entry, (), artifact_type=entry.artifact_type))  # says which version it is
        artifact = artifacts.decode(await self._manifest(reference, entry.digest))
        subject, wanted = artifact.subject, resolved.descriptor
        if (subject.digest, subject.size) != (wanted.digest, wanted.size):
            raise Malformed(f"it is the index of {subject.digest}, not of {wanted.digest}")
        if artifact.chunk_size != self._chunk_size:
            raise Malformed(f"its chunks have {artifact.chunk_size} bytes, ours {self._chunk_size}")
        for layer, diff_id in zip(resolved.manifest.layers, resolved.diff_ids, strict=True):
            item = artifact.layer(layer.digest)
            if item is None or item.diff_id != diff_id:
                raise Malformed(f"it has no index of layer {layer.digest} with diff ID {diff_id}")
        signer = await self._signer(reference, entry.digest) if self.keys else ""
        return Accepted(entry.digest, artifact, signer)

    async def _manifest(self, reference: Reference, digest: str) -> Manifest:
        descriptor, raw = await self._registry.manifest(reference, digest)
        document = manifests.parse(raw, descriptor.media_type)
        if not isinstance(document, Manifest):
            raise Malformed(f"{digest} is an index of manifests, not an artifact")
        return document

    async def _signer(self, reference: Reference, digest: str) -> str:
        """Return the ID of the trusted key that signed an artifact; raise AccessDenied if none did."""
        for entry in (await self._registry.referrers(reference, digest, artifacts.SIGNATURE_TYPE))[:_MOST]:
            document = await self._manifest(reference, entry.digest)
            if document.subject is None or document.subject.digest != digest:
                continue
            held = artifacts.decode_signature(document)
            signed = await self._registry.blob_bytes(reference, held, signature.SIZE)
            signer = signature.signer(self.keys, digest, signed)
            if signer is not None:
                return signer
        raise AccessDenied("no trusted key has signed it", hint="see indexing.trusted_keys")

    async def layer(self, reference: Reference, accepted: Accepted, descriptor: Descriptor,
                    diff_id: str) -> tuple[LayerIndex, ImageLayer]:  # fmt: skip
        """Bring the index and the seek table of a layer into the store; return them.

        Raises Malformed and the like if they cannot be used, Unavailable if the registry is away, StoreFull.
        """
        item = accepted.artifact.layer(descriptor.digest)
        assert item is not None  # `_accept` has looked
        async with self._slots:
            blob = await self._registry.blob_bytes(reference, item.index, artifacts.MAX_INDEX_BLOB)
            index, encoded = await asyncio.to_thread(artifacts.decode_layer, blob)
            del blob
            raw = await self._registry.blob_bytes(reference, item.seek, seek.MAX_SIZE)
            table = await asyncio.to_thread(seek.decode, raw)
            artifacts.check_layer(index, table, descriptor, diff_id, self._chunk_size)
            index_blob, seek_blob = await self._store.put(encoded), await self._store.put(raw)
        return index, ImageLayer(
            descriptor.digest, descriptor.size, descriptor.media_type, diff_id, index.table, index_blob.digest,
            index_blob.size, seek_blob.digest, seek_blob.size, len(table.points),
        )  # fmt: skip


def is_final(error: DadiError) -> bool:
    """Whether an error speaks against the artifact, and not against the time or the place."""
    return not isinstance(error, Unavailable | StoreFull)
