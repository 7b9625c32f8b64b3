"""What the repository has already: the index of this very image, and the layer indexes of other images.

    the image's own    a referrer of its manifest, of our version, that covers its layers
    other images'      an OCI index under the tag `dadi-layers`: an entry for each index artifact of the repository,
                       with the layers it has in the annotation dev.dadi.layers, newest last

With a key, only what carries a valid signature by it counts: an index decides which bytes are taken for right. What
cannot be used is said and passed over: the layers are read then, as if there were nothing.
"""

from __future__ import annotations

import asyncio

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from dadi.errors import DadiError, Malformed
from dadi.index import artifact, seek, signature
from dadi.index.artifact import Artifact, IndexedLayer
from dadi.index.chunks import DEFAULT_CHUNK_SIZE
from dadi.oci import manifest as manifests
from dadi.oci.manifest import Descriptor, Manifest
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.publish.layer import Made
from dadi.publish.progress import Progress

LAYERS_TAG = "dadi-layers"
A_LAYERS = "dev.dadi.layers"
MAX_ENTRIES = 500
MAX_BYTES = 2 << 20
"""Bytes of annotations in the index under LAYERS_TAG; registries take manifests of 4 MiB."""
_TRIES = 3
"""Artifacts that are looked at for one layer."""


class Found(msgspec.Struct, frozen=True):
    """An index artifact that is there, and the ID of the key that signed it ("" if nobody looked)."""

    descriptor: Descriptor
    artifact: Artifact
    key_id: str = ""


class Known:
    """Looks into one repository. `key`: whose signature an index must carry; None: any index will do."""

    def __init__(
        self, client: RegistryClient, reference: Reference, key: Ed25519PublicKey | None, progress: Progress
    ) -> None:
        self._client, self._reference, self._key, self._progress = client, reference, key, progress
        self._reading: asyncio.Task[dict[str, list[Descriptor]]] | None = None
        self._loaded: dict[str, Found | None] = {}

    async def index_of(self, subject: Descriptor, layers: list[tuple[Descriptor, str]]) -> Found | None:
        """Return the index that the image has; None if it has none that can be used. Raises as the client does."""
        for descriptor in await self._client.referrers(self._reference, subject.digest):
            if descriptor.artifact_type != artifact.ARTIFACT_TYPE:
                continue
            found = await self._load(descriptor)
            if found is None or found.artifact.chunk_size != DEFAULT_CHUNK_SIZE:
                continue
            named = found.artifact.subject
            if (named.digest, named.size) != (subject.digest, subject.size):
                continue
            covered = {(item.layer_digest, item.diff_id) for item in found.artifact.layers}
            if covered >= {(layer.digest, diff_id) for layer, diff_id in layers}:
                return found
        return None

    async def layer(self, wanted: Descriptor, diff_id: str) -> Made | None:
        """Return what an image of the repository has for a layer, checked; None if there is nothing to be used."""
        if self._reading is None:
            self._reading = asyncio.create_task(self._listed())
        for descriptor in (await asyncio.shield(self._reading)).get(wanted.digest, [])[:_TRIES]:
            found = await self._load(descriptor)
            item = found.artifact.layer(wanted.digest) if found else None
            if found is None or item is None or found.artifact.chunk_size != DEFAULT_CHUNK_SIZE:
                continue
            try:
                return await self.fetch(item, wanted, diff_id)
            except DadiError as error:
                self._progress.notice(f"the index of layer {wanted.digest} that is there cannot be used: {error}")
        return None

    async def fetch(self, item: IndexedLayer, wanted: Descriptor, diff_id: str) -> Made:
        """Return the blobs of a layer's index, verified and checked against the layer."""
        index_blob = await self._client.blob_bytes(self._reference, item.index, artifact.MAX_INDEX_BLOB)
        seek_blob = await self._client.blob_bytes(self._reference, item.seek, seek.MAX_SIZE)

        def decode() -> Made:
            index, _ = artifact.decode_layer(index_blob)
            table = seek.decode(seek_blob)
            artifact.check_layer(index, table, wanted, diff_id, DEFAULT_CHUNK_SIZE)
            return Made(index, table, index_blob, seek_blob)

        return await asyncio.to_thread(decode)

    async def remember(self, described: Descriptor, made: Artifact) -> None:
        """Enter an artifact into the list under LAYERS_TAG. What goes wrong is a notice: the next image reads more."""
        layers = " ".join(item.layer_digest for item in made.layers)
        entry = msgspec.structs.replace(
            described, annotations={A_LAYERS: layers}, artifact_type=artifact.ARTIFACT_TYPE, platform=None
        )
        try:
            await self._client.update_index(self._reference, LAYERS_TAG, lambda entries: listed_with(entries, entry))
        except DadiError as error:
            self._progress.notice(f"other images will not find these layers' indexes: {error}")

    async def _listed(self) -> dict[str, list[Descriptor]]:
        """Return the artifacts of the repository by the layers they have, newest first."""
        try:
            entries = await self._client.tagged_index(self._reference, LAYERS_TAG)
        except DadiError as error:
            self._progress.notice(f"what other images have had indexed cannot be read: {error}")
            return {}
        found: dict[str, list[Descriptor]] = {}
        for entry in reversed(entries):
            for digest in entry.annotations.get(A_LAYERS, "").split(" "):
                found.setdefault(digest, []).append(entry)
        return found

    async def _load(self, descriptor: Descriptor) -> Found | None:
        if descriptor.digest not in self._loaded:
            try:
                self._loaded[descriptor.digest] = await self._read(descriptor)
            except DadiError as error:
                if error.retryable:
                    raise
                self._progress.notice(f"the index {descriptor.digest} that is there cannot be used: {error}")
                self._loaded[descriptor.digest] = None
        return self._loaded[descriptor.digest]

    async def _read(self, descriptor: Descriptor) -> Found | None:
        manifest = await self._manifest(descriptor)
        made = artifact.decode(manifest)
        if self._key is None:
            return Found(descriptor, made)
        signed = await self._signed(descriptor.digest)
        return Found(descriptor, made, signature.key_id(self._key)) if signed else None

    async def _signed(self, digest: str) -> bool:
        """Whether there is a valid signature by our key."""
        for entry in await self._client.referrers(self._reference, digest, artifact.SIGNATURE_TYPE):
            try:
                if await self._is_ours(digest, entry):
                    return True
            except DadiError as error:
                if error.retryable:
                    raise
                self._progress.notice(f"the signature {entry.digest} that is there cannot be used: {error}")
        return False

    async def _is_ours(self, digest: str, entry: Descriptor) -> bool:
        """Whether one signature is valid and by our key."""
        assert self._key is not None
        manifest = await self._manifest(entry)
        if manifest.annotations.get(artifact.A_KEY) != signature.key_id(self._key):
            return False
        held = artifact.decode_signature(manifest)
        data = await self._client.blob_bytes(self._reference, held, signature.SIZE)
        return signature.signer([self._key], digest, data) is not None

    async def _manifest(self, descriptor: Descriptor) -> Manifest:
        _, raw = await self._client.manifest(self._reference, descriptor.digest)
        document = manifests.parse(raw, expected=descriptor.media_type)
        if not isinstance(document, Manifest):
            raise Malformed(f"{descriptor.digest} is an index where an artifact is due")
        return document


def listed_with(entries: list[Descriptor], entry: Descriptor) -> list[Descriptor]:
    """Return the list with `entry` as its newest, and without the oldest if it grows too long; as it is if it is in."""
    if any(item.digest == entry.digest and item.annotations == entry.annotations for item in entries):
        return entries
    kept = [*(item for item in entries if item.digest != entry.digest), entry][-MAX_ENTRIES:]
    size = 0
    for number, item in enumerate(reversed(kept)):
        size += sum(len(key) + len(value) for key, value in item.annotations.items())
        if size > MAX_BYTES and number:
            return kept[-number:]
    return kept

