"""What is fuzzed: one function of bytes for each format, and inputs to begin with.

The rule, for every input: it is taken, or an error of the error tree says why not; it ends soon, in little memory. What
comes from outside as text arrives here as UTF-8 with what is wrong in it replaced, as its reader would have it.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import json
import tarfile
import tomllib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import msgspec
import zstandard

from dadi.config import converted
from dadi.containerd.cri import secret_in
from dadi.errors import DadiError
from dadi.index import artifact, image, layer, seek, tar, tar_header, tar_pax
from dadi.index.decompress import uncompressed
from dadi.node.config import NodeConfig
from dadi.node.kernel import parse_mountinfo
from dadi.oci import challenge, index_document, kubelet, manifest, platforms, retry
from dadi.oci.hosts import Hosts
from dadi.oci.reference import Reference, parse_registry
from dadi.originals import byte_range, caller
from dadi.peers import frames, places, shown, stream, token
from dadi.prefetch import manifests, messages, nodes, trace, trace_json, when
from dadi.snapshotter import filters
from dadi.wire import EventReader, error_in
from fuse import state, wire
from registry_proxy import paths
from superpeer.adopting import decode_told
from superpeer.config import SuperpeerConfig


class Target(NamedTuple):
    """`allowed`: what it may raise besides the error tree, where its one caller translates that."""

    run: Callable[[bytes], object]
    seeds: Sequence[bytes] = (b"",)
    allowed: tuple[type[Exception], ...] = ()


def check(name: str, data: bytes) -> None:
    """Feed one target; let through whatever it should not have raised."""
    target = TARGETS[name]
    with contextlib.suppress(DadiError, *target.allowed):
        target.run(data)


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _fuse(data: bytes) -> None:
    """A request, and then its body as if it were of each kind."""
    request = wire.parse_request(data)
    for parse in (wire.parse_name, wire.parse_read, wire.parse_open, wire.parse_interrupt, wire.parse_init):
        with contextlib.suppress(DadiError):
            parse(request.body)


def _tar(data: bytes) -> None:
    """In two pieces, split where the first byte says."""
    parser = tar.TarParser(tar.TarLimits(max_entries=1000, max_metadata_size=1 << 20, max_header_size=1 << 16))
    at = data[0] if data else 0
    parser.feed(data[1 : at + 1])
    parser.feed(data[at + 1 :])
    parser.finish()


def _unpacked(data: bytes) -> None:
    for _ in uncompressed(io.BytesIO(data), max_size=1 << 20):
        pass


def _manifest(data: bytes) -> None:
    parsed = manifest.parse(data, limit=1 << 20)
    if isinstance(parsed, manifest.Manifest):
        for more in (artifact.decode, artifact.decode_signature):
            with contextlib.suppress(DadiError):
                more(parsed)
        manifest.parse_config(data, parsed)


def _proxy_path(data: bytes) -> None:
    path, _, rest = _text(data).partition("?")
    route = paths.split(path)
    repository = paths.repository(route.name, rest or None, "registry.example")
    paths.identified(repository, route.identifier)


def _events(data: bytes) -> None:
    reader = EventReader("here")
    for piece in (data[:7], data[7:]):
        for _ in reader.feed(piece):
            pass
    reader.end()


def _records(data: bytes) -> None:
    """Records of a stream, one after the other, as `line.py` reads them."""
    while len(data) >= stream.SIZE:
        kind, _, length = stream.parse(data[: stream.SIZE])
        body, data = data[stream.SIZE : stream.SIZE + length], data[stream.SIZE + length :]
        if kind == stream.ERROR:
            stream.error_of(body, "here")
        elif kind == stream.FRAME:
            frames.unpacked(body, 1 << 16)


def _frame(data: bytes) -> None:
    end = frames.frame_end(data, 1 << 16)
    if end is not None:
        frames.unpacked(data[:end], 1 << 16)


def _trace(data: bytes) -> None:
    for kind in (trace.Trace, trace.Message, trace.KeptTrace):
        with contextlib.suppress(DadiError):
            trace.decode(data, kind)


def _place(kind: type[msgspec.Struct]) -> Callable[[bytes], object]:
    return lambda data: msgspec.json.decode(data, type=kind)


def _configuration(data: bytes) -> None:
    try:
        values = tomllib.loads(_text(data))
    except tomllib.TOMLDecodeError:
        return
    for kind in (NodeConfig, SuperpeerConfig):
        with contextlib.suppress(DadiError):
            converted(values, kind, "here")


def _redirect(data: bytes) -> None:
    hosts = Hosts(("registry.example",), ())
    hosts.redirected("https://registry.example/v2/", _text(data), 1)


def _filters(data: bytes) -> None:
    filters.parse(_text(data).split("\0"))


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


_TAR = _tarred()
_D = "sha256:" + "0" * 64
_MANIFEST = json.dumps({
    "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
    "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": _D, "size": 2},
    "layers": [{"mediaType": "application/vnd.oci.image.layer.v1.tar+gzip", "digest": _D, "size": 9}],
}).encode()  # fmt: skip
_PEER = b'{"peer":{"id":"a","address":"h:1","zone":"z","rack":"r"},"blobs":["' + _D.encode() + b'"]}'
_POD = b"kind: Pod\nspec:\n  containers: [{image: a/b:1}]\n  initContainers: [{image: c}]\n"

TARGETS: dict[str, Target] = {
    "fuse": Target(_fuse, (bytes([48]) + bytes(47) + b"name\0",)),
    "fuse-state": Target(state.decode, (state.encode(wire.Init(7, 38, 1 << 17, 0), 1 << 17, "0:1"),)),
    "tar": Target(_tar, (b"\0" + _TAR, b"\x80" + _TAR)),
    "tar-header": Target(lambda data: tar_header.parse(data[:512].ljust(512, b"\0")), (_TAR[:512],)),
    "tar-pax": Target(tar_pax.parse, (b"11 path=ab\n", b"30 GNU.sparse.major=1\n")),
    "layer-stream": Target(_unpacked, (gzip.compress(_TAR), zstandard.compress(_TAR), _TAR)),
    "manifest": Target(_manifest, (_MANIFEST,)),
    "index-document": Target(index_document.parse, (b'{"schemaVersion":2,"manifests":[]}',)),
    "descriptor": Target(manifest.parse_descriptor, (b'{"mediaType":"a/b","digest":"' + _D.encode() + b'","size":1}',)),
    "layer-index": Target(layer.decode),
    "image-index": Target(image.decode),
    "seek-table": Target(lambda data: seek.decode(data, 1 << 20)),
    "index-artifact-layer": Target(artifact.decode_layer),
    "trace": Target(_trace, (trace.encode(trace.Trace(_D, ((_D, 262144),), ())),)),
    "trace-json": Target(
        lambda data: trace_json.from_json(msgspec.json.decode(data)), (b'{"format":1}',),
        (msgspec.MsgspecError, UnicodeDecodeError, RecursionError),
    ),
    "join": Target(_place(places.Join), (_PEER,), (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)),
    "heartbeat": Target(_place(places.Heartbeat), (_PEER,), (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)),
    "chunk-stream": Target(_records, (stream.WAITING, stream.head(2, 0, 4) + b"abcd")),
    "chunk-frame": Target(_frame, (zstandard.compress(b"abc" * 99),)),
    "token": Target(lambda data: token.verify(token.bearer(_text(data)), lambda key: None), (b"Bearer " + b"A" * 200,)),
    "shown-credentials": Target(
        lambda data: shown.credentials(_text(data)), (base64.b64encode(b'{"username":"a","password":"b"}'),)
    ),
    "prefetch-request": Target(messages.decode_request, (b'{"reference":"a/b:1","platform":"linux/amd64"}',)),
    "prefetch-wishes": Target(messages.decode_wishes),
    "prefetch-report": Target(messages.decode_report),
    "prefetch-nodes": Target(lambda data: nodes.parse(_text(data)), (b"zone=a,rack=b", b"20%")),
    "prefetch-moment": Target(lambda data: when.moment(_text(data), 1e9), (b"2026-11-10T22:00+08:00",)),
    "kubernetes": Target(manifests.images, (_POD,)),
    "sibling-told": Target(decode_told),
    "events": Target(_events, (b'{"event":"done"}\n',)),
    "error-body": Target(error_in, (b'{"error":"denied","message":"x"}',)),
    "proxy-path": Target(_proxy_path, (b"/v2/a/b/manifests/1?docker.io", b"/v2/a/blobs/sha256:" + b"0" * 64)),
    "range": Target(lambda data: byte_range.parse(_text(data), 1000), (b"bytes=1-2", b"bytes=-5")),
    "proxy-caller": Target(lambda data: caller.parse(_text(data)), (b"Basic YTpi", b"Bearer x")),
    "www-authenticate": Target(
        lambda data: challenge.choose(challenge.parse([_text(data)])), (b'Bearer realm="https://a/t",service="b"',)
    ),
    "retry-after": Target(lambda data: retry.parse_retry_after(_text(data), 1e9), (b"Sun, 06 Nov 1994 08:49:37 GMT",)),
    "redirect": Target(_redirect, (b"https://cdn.example/x", b"../y")),
    "reference": Target(lambda data: Reference.parse(_text(data)), (b"h:1/a/b:t@sha256:" + b"0" * 64,)),
    "registry-name": Target(lambda data: parse_registry(_text(data)), (b"registry.example:5000", b"[::1]:5")),
    "platform": Target(lambda data: platforms.parse(_text(data)), (b"linux/arm/v7",)),
    "kubelet-config": Target(lambda data: kubelet.read_config(data, "here"), (b"kind: CredentialProviderConfig\n",)),
    "cri-secret": Target(secret_in, (b"\x0a\x05\x0a\x03a/b",)),
    "snapshot-filters": Target(_filters, (b'kind==active,labels."a/b"~=x.*',)),
    "mountinfo": Target(parse_mountinfo, (b"1 2 0:3 / /mnt rw - erofs /dev/loop0 ro\n",)),
    "configuration": Target(_configuration, (b'listen = "a:1"\n[store]\nlimit = "1GiB"\n',)),
}
