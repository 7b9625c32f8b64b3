"""A startup trace as an OCI artifact beside its image: `dadi trace export --push` puts it there, superpeers find it.

    manifest        an OCI image manifest with
                    artifactType   application/vnd.dadi.trace.v1
                    config         the empty descriptor ("{}")
                    subject        the image's manifest, for one platform
                    annotations    dev.dadi.version "1", dev.dadi.tool
    its layer       application/vnd.dadi.trace.v1+json    what `dadi trace export` writes, see `trace_json.py`
    a signature     as that of an index (`dadi/index/artifact.py`), with this manifest as its subject

Pure. The same trace and version of dadi give the same bytes. All of it is somebody's word: a trace that is wrong costs
the bytes that it names, of this image, until nodes have told that they did not need them.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dadi import __version__
from dadi.errors import InvalidRequest, Malformed, TooLarge, Unsupported
from dadi.index import artifact
from dadi.oci.manifest import Descriptor, Manifest
from dadi.prefetch import trace_json
from dadi.prefetch.trace import Trace

ARTIFACT_TYPE = "application/vnd.dadi.trace.v1"
MEDIA_TYPE = "application/vnd.dadi.trace.v1+json"
MAX_SIZE = 4 << 20
"""Bytes of the JSON: more than the largest trace that is handed out has."""


def encode(subject: Descriptor, held: Descriptor) -> bytes:
    """Return the manifest of the artifact that carries the blob `held` beside the image `subject`; deterministic."""
    said = {artifact.A_TOOL: f"dadi {__version__}", artifact.A_VERSION: "1"}
    return artifact.encode_manifest(ARTIFACT_TYPE, [held], subject, said)


def decode(manifest: Manifest, subject: str) -> Descriptor:
    """Return where the trace of the image `subject` (a digest) is; raise Unsupported, Malformed or TooLarge."""
    if manifest.artifact_type != ARTIFACT_TYPE or manifest.annotations.get(artifact.A_VERSION) != "1":
        raise Unsupported(f"{manifest.artifact_type[:80]!r} is no startup trace of a known version")
    if manifest.subject is None or manifest.subject.digest != subject:
        raise Malformed(f"it is no startup trace of {subject}")
    if [held.media_type for held in manifest.layers] != [MEDIA_TYPE]:
        raise Malformed("the artifact of a startup trace without the trace, or with more")
    if manifest.layers[0].size > MAX_SIZE:
        raise TooLarge(f"a startup trace of {manifest.layers[0].size} bytes; the limit is {MAX_SIZE}")
    return manifest.layers[0]


def trace_in(data: bytes, subject: str) -> Trace:
    """Return the trace in the artifact's blob; raise InvalidRequest or Malformed for all that is none of this image."""
    try:
        value: Any = msgspec.json.decode(data)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"a startup trace that is no JSON: {error}"[:300]) from None
    found = trace_json.from_json(value)
    if found.manifest != subject:
        raise Malformed(f"it is the trace of {found.manifest}, not of {subject}")
    return found
