"""The index that `dadi index` or `dadi convert` has put beside an image: found, checked, brought into the store.

A startup trace that was put there (`dadi trace export --push`) is found and checked in the same way, without the store.

    1. the registry's referrers of the image's manifest, of our artifact type; whoever may push can add some
    2. the first that can be used, the newest first: known version, not refused before, subject the manifest that was
       asked for, our chunk size, signed by a trusted key where the configuration has any, an index and a seek table for
       each layer
    3. for each layer both blobs, verified by their digests, checked against each other and against the image

Whatever is wrong with an artifact is a fallback that says so; the image is then indexed on first sight. What an index
says of the bytes themselves is verified as they come (`ranged.py`). Indexes may be made to fill our memory: all that an
image has share one `DecodeRoom`, and what is large, packed or unpacked, is in memory one at a time.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Container, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dadi.blobs.disk import DiskBlobs
from dadi.errors import AccessDenied, ConfigError, DadiError, Malformed, StoreFull, TooLarge, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index import artifact as artifacts
from dadi.index import seek, signature
from dadi.index.artifact import Artifact
from dadi.index.image import CONVERTED, REFERRER, ImageLayer
from dadi.index.layer import DecodeRoom, LayerIndex
from dadi.index.seek import SeekTable
from dadi.oci import manifest as manifests
from dadi.oci.manifest import Descriptor, Manifest
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient, ResolvedImage
from dadi.prefetch import trace_artifact
from dadi.prefetch.trace import Trace
from superpeer.refused import Refused

_MOST = 512
"""Artifacts and signatures that are read for one image. More are junk, and each costs a request or two."""
_MOST_TRACES = 32
"""Of startup traces and their signatures; and images whose traces are remembered."""
_PARALLEL = 8
_LARGE = 16 << 20
"""Bytes of a layer's index and seek table, packed, that are not brought in parallel."""


class _Looks:
    """How many more documents may be read to find an image's index."""

    def __init__(self) -> None:
        self.left = _MOST

    def take(self) -> None:
        if not self.left:
            raise TooLarge(f"more than {_MOST} artifacts and signatures", hint="delete those that nobody needs")
        self.left -= 1


class Accepted(msgspec.Struct, frozen=True):
    """An artifact that can be used for an image; `signer` is "" where no signature was asked for."""

    digest: str
    artifact: Artifact
    signer: str
    room: DecodeRoom = msgspec.field(default_factory=DecodeRoom)
    """What the indexes of the image's layers may cost together."""

    @property
    def origin(self) -> str:
        """One of `dadi.index.image.ORIGINS`."""
        return CONVERTED if self.artifact.origin == artifacts.ORIGIN_CONVERT else REFERRER


class ShippedIndexes:
    """Finds indexes in registries."""

    def __init__(self, store: DiskBlobs, registry: RegistryClient, refused: Refused, *, chunk_size: int,
                 fallbacks: Fallbacks) -> None:  # fmt: skip
        self._keys: Sequence[Ed25519PublicKey] = ()
        """The trusted ones; without any, signatures are not asked for."""
        self._store = store
        self._registry = registry
        self._refused = refused
        self._chunk_size = chunk_size
        self._fallbacks = fallbacks
        self._traces: dict[str, list[Descriptor]] = {}
        """Startup traces beside images whose index was looked for a moment ago, by manifest."""
        self._slots = asyncio.Semaphore(_PARALLEL)
        self._large = asyncio.Lock()
        self._unpacking = asyncio.Lock()

    async def load(self, paths: tuple[str, ...]) -> None:
        """Read the trusted keys. Raises ConfigError."""
        self._keys = await asyncio.to_thread(_trusted_keys, paths)

    def trusts(self, signer: str) -> bool:
        """Whether an index signed by this key ("": by none) may be used."""
        return not self._keys or signer in {signature.key_id(key) for key in self._keys}

    async def find(
        self, reference: Reference, resolved: ResolvedImage, without: Container[str] = ()
    ) -> Accepted | None:
        """Return the index to use for an image; None if there is none that can be used.

        `without`: digests of artifacts that turned out to be of no use.
        """
        try:
            found = await self._registry.referrers(reference, resolved.descriptor.digest)
        except DadiError as error:
            self._fallbacks.note("referrers could not be read", f"{reference}: {error}")
            self._listed_traces(resolved.descriptor.digest, [])
            return None
        self._listed_traces(resolved.descriptor.digest, found)
        entries = [item for item in found if artifacts.is_index(item.artifact_type) and item.digest not in without]
        looks = _Looks()
        for entry in reversed(entries):  # registries and clients add at the end
            try:
                return await self._accept(reference, resolved, entry, looks)
            except DadiError as error:
                self._fallbacks.note("index in the registry not used", f"{reference}, {entry.digest}: {error}")
            if not looks.left:
                break
        return None

    async def _accept(self, reference: Reference, resolved: ResolvedImage, entry: Descriptor,
                      looks: _Looks) -> Accepted:  # fmt: skip
        self._refused.check(entry.digest)
        if entry.artifact_type != artifacts.ARTIFACT_TYPE:
            artifacts.decode(Manifest("", entry, (), artifact_type=entry.artifact_type))  # says which version it is
        looks.take()
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
        signer = await self._signer(reference, entry.digest, looks) if self._keys else ""
        return Accepted(entry.digest, artifact, signer)

    def _listed_traces(self, subject: str, found: Sequence[Descriptor]) -> None:
        traces = [each for each in found if each.artifact_type == trace_artifact.ARTIFACT_TYPE]
        self._traces[subject] = traces[-_MOST_TRACES:]
        if len(self._traces) > _MOST_TRACES:
            self._traces.pop(next(iter(self._traces)))

    async def trace(self, reference: Reference, subject: str) -> Trace | None:
        """Return the startup trace beside the image whose manifest is `subject`, the newest that can be used.

        None if there is none. What is wrong with one is noted. Raises what listing referrers raises. When the image's
        index has just been looked for, the registry is not asked again which referrers there are.
        """
        looks = _Looks()
        looks.left = _MOST_TRACES
        found = self._traces.pop(subject, None)
        if found is None:
            found = await self._registry.referrers(reference, subject, trace_artifact.ARTIFACT_TYPE)
        for entry in reversed(found):
            try:
                looks.take()
                held = trace_artifact.decode(await self._manifest(reference, entry.digest), subject)
                if self._keys:
                    await self._signer(reference, entry.digest, looks)
                data = await self._registry.blob_bytes(reference, held, trace_artifact.MAX_SIZE)
                return await asyncio.to_thread(trace_artifact.trace_in, data, subject)
            except DadiError as error:
                why = f"{reference}, {entry.digest}: {error.message}"
                self._fallbacks.note("startup trace in the registry not used", why)
            if not looks.left:
                break
        return None

    async def _manifest(self, reference: Reference, digest: str) -> Manifest:
        descriptor, raw = await self._registry.manifest(reference, digest)
        document = manifests.parse(raw, descriptor.media_type)
        if not isinstance(document, Manifest):
            raise Malformed(f"{digest} is an index of manifests, not an artifact")
        return document

    async def _signer(self, reference: Reference, digest: str, looks: _Looks) -> str:
        """Return the ID of the trusted key that signed an artifact; raise AccessDenied if none did."""
        away: DadiError | None = None
        for entry in reversed(await self._registry.referrers(reference, digest, artifacts.SIGNATURE_TYPE)):
            looks.take()
            try:
                signer = await self._signer_of(reference, digest, entry)
            except DadiError as error:
                # Junk that somebody has put beside the valid one; or we cannot know now what it is.
                away = error if error.retryable else away
                continue
            if signer is not None:
                return signer
        raise away or AccessDenied("no trusted key has signed it", hint="see indexing.trusted_keys")

    async def _signer_of(self, reference: Reference, digest: str, entry: Descriptor) -> str | None:
        """Return the ID of the trusted key that made one signature; None if none did."""
        document = await self._manifest(reference, entry.digest)
        if document.subject is None or document.subject.digest != digest:
            return None
        held = artifacts.decode_signature(document)
        signed = await self._registry.blob_bytes(reference, held, signature.SIZE)
        return signature.signer(self._keys, digest, signed)

    async def layer(self, reference: Reference, accepted: Accepted, descriptor: Descriptor,
                    diff_id: str) -> tuple[LayerIndex, ImageLayer]:  # fmt: skip
        """Bring the index and the seek table of a layer into the store; return them.

        Raises Malformed and the like if they cannot be used, Unavailable if the registry is away, StoreFull.
        """
        item = accepted.artifact.layer(descriptor.digest)
        assert item is not None  # `_accept` has looked
        large = item.index.size + item.seek.size > _LARGE
        alone: AbstractAsyncContextManager[None] = self._large if large else contextlib.nullcontext()
        async with alone, self._slots:
            blob = await self._registry.blob_bytes(reference, item.index, artifacts.MAX_INDEX_BLOB)
            raw = await self._registry.blob_bytes(reference, item.seek, seek.MAX_SIZE)
            async with self._unpacking:  # few bytes may become many
                index, encoded, table = await asyncio.to_thread(_unpacked, blob, raw, accepted.room)
                artifacts.check_layer(index, table, descriptor, diff_id, self._chunk_size)
                index_blob, seek_blob = await self._store.put(encoded), await self._store.put(raw)
        return index, ImageLayer(
            descriptor.digest, descriptor.size, descriptor.media_type, diff_id, index.table, index_blob.digest,
            index_blob.size, seek_blob.digest, seek_blob.size, len(table.points),
        )  # fmt: skip


def _unpacked(index: bytes, table: bytes, room: DecodeRoom) -> tuple[LayerIndex, bytes, SeekTable]:
    """Return the layer index, its encoding, and the seek table. For threads."""
    decoded, encoded = artifacts.decode_layer(index, room)
    return decoded, encoded, seek.decode(table)


def is_final(error: DadiError) -> bool:
    """Whether an error speaks against the artifact, and not against the time or the place."""
    return not isinstance(error, Unavailable | StoreFull)


def _trusted_keys(paths: tuple[str, ...]) -> list[Ed25519PublicKey]:
    """Return the public keys in PEM files; raise ConfigError for one that cannot be read. For threads."""
    keys = []
    for path in paths:
        try:
            pem = Path(path).read_bytes()
        except OSError as error:
            raise ConfigError(f"indexing.trusted_keys: {path} cannot be read: {error.strerror}") from None
        keys.append(signature.public_key(pem, f"indexing.trusted_keys: {path}"))
    return keys
