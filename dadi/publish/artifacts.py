"""The artifact of one image, and its signature, brought to where they belong; and a startup trace beside its image."""

from __future__ import annotations

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi import digest as digests
from dadi.index import artifact, signature
from dadi.index.artifact import Artifact, IndexedLayer
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor
from dadi.prefetch import trace_artifact
from dadi.publish.layer import Made
from dadi.publish.progress import Progress
from dadi.publish.target import Target


async def bring_layer(target: Target, made: Made, progress: Progress) -> IndexedLayer:
    """Bring a layer's index and seek table there."""
    index = Descriptor(artifact.LAYER_INDEX, digests.of(made.index_blob), len(made.index_blob))
    table = Descriptor(artifact.SEEK_TABLE, digests.of(made.seek_blob), len(made.seek_blob))
    await target.blob(index, made.index_blob, progress)
    await target.blob(table, made.seek_blob, progress)
    return IndexedLayer(made.index.layer_digest, made.index.diff_id, index, table)


async def bring_empty(target: Target, progress: Progress) -> None:
    """Bring the empty config there, which every artifact has: the first write, so that a refusal comes at once."""
    await target.blob(artifact.EMPTY_CONFIG, artifact.EMPTY, progress)


async def bring_artifact(
    target: Target, made: Artifact, key: Ed25519PrivateKey | None, progress: Progress
) -> Descriptor:
    """Bring the artifact there, and its signature if there is a key; return what the artifact is called there."""
    raw = artifact.encode(made)
    await target.referrer(raw, made.subject, artifact.ARTIFACT_TYPE, "index")
    described = Descriptor(
        media_types.OCI_MANIFEST, digests.of(raw), len(raw), artifact_type=artifact.ARTIFACT_TYPE
    )
    if key is not None:
        await bring_signature(target, described, key, progress)
    return described


async def bring_signature(target: Target, signed_one: Descriptor, key: Ed25519PrivateKey, progress: Progress) -> None:
    """Bring a signature of an artifact there."""
    signed = signature.sign(key, signed_one.digest)
    held = Descriptor(artifact.SIGNATURE_TYPE, digests.of(signed), len(signed))
    await target.blob(held, signed, progress)
    bare = Descriptor(signed_one.media_type, signed_one.digest, signed_one.size)
    named = signature.key_id(key.public_key())
    await target.referrer(
        artifact.encode_signature(bare, signed, named), bare, artifact.SIGNATURE_TYPE, "signature"
    )


async def bring_trace(
    target: Target, subject: Descriptor, text: bytes, key: Ed25519PrivateKey | None, progress: Progress
) -> Descriptor:
    """Bring a startup trace (JSON) there, beside the image `subject`, and its signature if there is a key."""
    await bring_empty(target, progress)
    held = Descriptor(trace_artifact.MEDIA_TYPE, digests.of(text), len(text))
    await target.blob(held, text, progress)
    bare = Descriptor(subject.media_type, subject.digest, subject.size)
    described = await target.referrer(
        trace_artifact.encode(bare, held), bare, trace_artifact.ARTIFACT_TYPE, "trace"
    )
    if key is not None:
        await bring_signature(target, described, key, progress)
    return described
