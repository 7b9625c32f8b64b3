"""What targets take: small, valid inputs of the formats that have our own encoders, or are too long for a line.

What lives here: bytes. What never does: targets (targets.py).
"""

from __future__ import annotations

import base64
import io
import json
import tarfile

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi import digest as digests
from dadi.containerd.proto import cri_pull_pb2
from dadi.errors import Unavailable
from dadi.index import artifact, image, layer, seek
from dadi.index.artifact import Artifact, IndexedLayer
from dadi.index.chunks import blob_of, table_of
from dadi.index.image import ImageIndex, ImageLayer
from dadi.index.layer import Entry, Kind, LayerIndex
from dadi.index.seek import COMPRESSED_CHUNK, FIRST, Form, SeekPoint, SeekTable
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor
from dadi.originals.messages import OriginalAnswer
from dadi.peers import frames, stream, token
from dadi.peers.keys import PublicKey, PublicKeys
from dadi.peers.token import Token
from dadi.prefetch import trace, trace_artifact, trace_json
from dadi.prefetch.trace import KeptTrace, Message, Recording, Report, StartGroup, Trace
from fuse import wire

D, E = digests.of(b"one"), digests.of(b"another")


def _tarred() -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as out:
        member = tarfile.TarInfo("d" * 120 + "/f")
        member.size, member.pax_headers = 3, {"SCHILY.xattr.user.a": "b", "mtime": "1.5"}
        out.addfile(member, io.BytesIO(b"abc"))
        link = tarfile.TarInfo("l")
        link.type, link.linkname = tarfile.SYMTYPE, "../x"
        out.addfile(link)
    return file.getvalue()


TAR = _tarred()
LAYER, TEXT = b"a compressed layer" * 20, b"abcd" * (1 << 14)


def fuse_request(body: bytes) -> bytes:
    """Return a FUSE request with this body."""
    return wire._HEADER.pack(wire._HEADER.size + len(body), 1, 2, 3) + body


FUSE = (fuse_request(b"name\0"), fuse_request(bytes(64)), fuse_request(b"\7\0\0\0\x29\0\0\0" + b"\xff" * 56))


def _descriptor(media_type: str, data: bytes, **more: object) -> dict[str, object]:
    return {"mediaType": media_type, "digest": digests.of(data), "size": len(data), **more}


CONFIG = json.dumps({
    "architecture": "amd64", "os": "linux", "config": {"Entrypoint": ["/bin/app"], "Env": ["A=B"]},
    "rootfs": {"type": "layers", "diff_ids": [digests.of(TAR)]},
}).encode()  # fmt: skip
MANIFEST = json.dumps({
    "schemaVersion": 2, "mediaType": media_types.OCI_MANIFEST,
    "config": _descriptor(media_types.OCI_CONFIG, CONFIG),
    "layers": [_descriptor(media_types.OCI_LAYER_GZIP, LAYER, annotations={"a": "b"})],
}).encode()  # fmt: skip
INDEX = json.dumps({
    "schemaVersion": 2, "mediaType": media_types.OCI_INDEX,
    "manifests": [_descriptor(media_types.OCI_MANIFEST, MANIFEST, platform={"architecture": "arm64", "os": "linux"})],
}).encode()  # fmt: skip
DESCRIPTOR = msgspec.json.encode(_descriptor("a/b", b"x"))
_SUBJECT = Descriptor(media_types.OCI_MANIFEST, D, len(MANIFEST))

_INDEXED = LayerIndex(layer.VERSION, digests.of(LAYER), len(LAYER), digests.of(TAR), table_of(TAR, 4096), (
    Entry(b"d", Kind.DIRECTORY, mode=0o755), Entry(b"d/f", Kind.FILE, size=3, offset=1536, xattrs=((b"user.a", b"b"),)),
    Entry(b"l", Kind.SYMLINK, target=b"../x"),
))  # fmt: skip
LAYER_INDEX = layer.encode(_INDEXED)
PACKED_LAYER_INDEX = artifact.index_blob(LAYER_INDEX)
SEEK_TABLE = seek.encode(SeekTable(
    seek.VERSION, Form.GZIP, digests.of(LAYER), digests.of(TAR), len(TAR), table_of(LAYER, COMPRESSED_CHUNK),
    (FIRST, SeekPoint(80, 512, True, b"window")),
))  # fmt: skip
IMAGE_INDEX = image.encode(ImageIndex(
    image.VERSION, D, digests.of(CONFIG), "linux/amd64", CONFIG,
    (ImageLayer(digests.of(LAYER), 9, media_types.OCI_LAYER_GZIP, digests.of(TAR), table_of(TAR, 4096), E, 50),),
    blob_of(b"metadata", 4096), (0,),
))  # fmt: skip
ARTIFACT = artifact.encode(Artifact(_SUBJECT, (IndexedLayer(
    digests.of(LAYER), digests.of(TAR),
    Descriptor(artifact.LAYER_INDEX, digests.of(PACKED_LAYER_INDEX), len(PACKED_LAYER_INDEX)),
    Descriptor(artifact.SEEK_TABLE, digests.of(SEEK_TABLE), len(SEEK_TABLE)),
),), 4096))  # fmt: skip
SIGNATURE = artifact.encode_signature(_SUBJECT, bytes(64), "0" * 16)

_TRACE = Trace(D, ((E, 262144),), (StartGroup(2, ((0, 1, 5), (0, 7, 9))),))
_RECORDING = Recording("node", ((E, 262144),), ((0, 1, 5),), (0,))
TRACES = (
    trace.encode(_TRACE),
    trace.encode(Message(D, _RECORDING, Report("t", 5, 4, 6))),
    trace.encode(KeptTrace(D, (_RECORDING,), (Report("t", 5, 4, 6),), 1)),
)
TRACE_JSON = msgspec.json.encode(trace_json.to_json(_TRACE))
TRACE_ARTIFACT = trace_artifact.encode(_SUBJECT, Descriptor(trace_artifact.MEDIA_TYPE, D, len(TRACE_JSON)))

FRAME = frames.packed(TEXT)
STREAM = (
    stream.WAITING + stream.head(stream.FRAME, 0, len(FRAME)) + FRAME,
    stream.WAITING + stream.error_record(Unavailable("a", retry_after=9.0, hint="b"), "instead"),
)
KEY = Ed25519PrivateKey.from_private_bytes(bytes(32))
_ID = token.key_id(KEY.public_key())
BEARERS = tuple(
    f"Bearer {token.sign(KEY, each)}".encode()
    for each in (
        Token(token.Kind.READ, _ID, "00" * 16, 1, 9, token.names_of([D, E])),
        Token(token.Kind.RENEWAL, _ID, "00" * 16, 1, 9, b"", "registry.example/a@" + D, 5),
    )
)
KEYS = msgspec.json.encode(PublicKeys(
    (PublicKey(_ID, base64.b64encode(KEY.public_key().public_bytes_raw()).decode()),), ("0" * 32,), (PublicKeys(()),),
))  # fmt: skip

_PEER = {"id": "a", "address": "10.0.0.1:7071", "zone": "z", "rack": "r", "slots": 2}
_PLACE = {"order": 5, "depth": 1, "parents": [_PEER]}
JOIN = msgspec.json.encode({"peer": _PEER, "blobs": [D], "without": ["b"], "reports": [["b", "lied"]], "proof": "x"})
JOINED = msgspec.json.encode({"places": {D: _PLACE}, "heartbeat": 5, "proofs": {D: {"a": "x"}}})
HEARTBEAT = msgspec.json.encode({"peer": _PEER, "load": 0.5, "blobs": [{"blob": D, "order": 5, "depth": 1}]})
CHANGED = msgspec.json.encode({"places": {D: _PLACE}, "unproven": [E]})
GROUP = msgspec.json.encode({"version": 1, "heartbeat": 5, "mates": [_PEER]})
ORIGINAL = msgspec.msgpack.encode(OriginalAnswer(3, blob_of(b"abc", 4096), True, "t", False, b"a"))
SIBLING = msgspec.json.encode({
    "reference": "registry.example/a:1", "platform": "linux/amd64", "top_digest": D, "manifest_digest": D,
    "index_digest": E, "index_size": 9, "resolved_at": 1.5,
})  # fmt: skip
EVENTS = b"".join(msgspec.json.encode(each) + b"\n" for each in (
    {"event": "progress", "stage": "a"},
    {"event": "image", "reference": "registry.example/a:1", "platform": "linux/amd64", "manifest_digest": D,
     "index_digest": E, "index_size": 7, "age": 0.5},
    {"event": "done"},
))  # fmt: skip
PREFETCH = b'{"reference":"a/b:1","platform":"linux/amd64","scope":"startup","at":5.0,"nodes":"zone=a,20%"}'
WISHES = msgspec.json.encode({
    "wishes": [{"job": "j", "reference": "a/b:1", "platform": "linux/amd64", "chunks": {D: [[0, 3]]}}], "pinned": [E],
})  # fmt: skip
REPORT = b'{"node":"n","state":"failed","message":"m"}'
POD = b"kind: Pod\nspec:\n  containers: [{image: a/b:1}]\n  initContainers: [{image: c}]\n"
KUBELET = b"""apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- {name: a, matchImages: ["*.example"], defaultCacheDuration: 1h, apiVersion: credentialprovider.kubelet.k8s.io/v1}
"""
PULL = cri_pull_pb2.PullImageRequest(
    image={"image": "registry.example/a:1"}, auth={"username": "a", "password": "b"}
).SerializeToString()
CONFIGURATION = b'log_level = "info"\nstate = "/a"\n[store]\nlimit = "1GiB"\n[tls]\nca = "/ca"\n'
