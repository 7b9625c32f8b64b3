"""What is fuzzed: one function of bytes for each format, and inputs to begin with.

The rule, for every input: it is taken, or an error of the error tree says why not; it ends soon, in little memory. What
comes from outside as text arrives here as UTF-8 with what is wrong in it replaced, as its reader would have it.
"""

from __future__ import annotations

import base64
import contextlib
import gzip
import io
import tomllib
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import msgspec
import zstandard

from dadi import digest as digests
from dadi.config import converted
from dadi.containerd.cri import secret_in
from dadi.errors import DadiError
from dadi.http import asked_to_wait, parse_listen
from dadi.index import artifact, image, layer, seek, tar, tar_header, tar_pax
from dadi.index.decompress import uncompressed
from dadi.node.config import NodeConfig
from dadi.node.kernel import parse_mountinfo
from dadi.oci import challenge, index_document, kubelet, link, manifest, media_types, platforms, retry
from dadi.oci.config import RegistryConfig
from dadi.oci.hosts import Hosts
from dadi.oci.reference import Reference, parse_registry
from dadi.originals import byte_range, caller
from dadi.originals.client import decode_answer
from dadi.peers import frames, hops, places, shown, stream, token
from dadi.peers.keys import KnownKeys, PublicKeys
from dadi.peers.superpeer import image_answer
from dadi.prefetch import manifests, messages, nodes, trace, trace_artifact, trace_json, when
from dadi.snapshotter import filters
from dadi.wire import EventReader, error_in
from fuse import state, wire
from registry_proxy import paths, uploads
from registry_proxy.config import ProxyConfig
from superpeer.adopting import decode_told
from superpeer.config import SuperpeerConfig
from superpeer.sibling_serving import decode_here
from tests.fuzz import seeds, snapshotter


class Target(NamedTuple):
    """`allowed`: what it may raise besides the error tree, where its one caller translates that."""

    run: Callable[[bytes], object]
    seeds: Sequence[bytes] = (b"",)
    allowed: tuple[type[Exception], ...] = ()


_NO_JSON = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)


_UPLOADS = uploads.Uploads(RegistryConfig())


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
        with contextlib.suppress(DadiError):
            trace_artifact.decode(parsed, seeds.D)


def _config(data: bytes) -> None:
    layer_of_it = manifest.Descriptor(media_types.OCI_LAYER_GZIP, seeds.D, 1)
    manifest.parse_config(data, manifest.Manifest(seeds.D, layer_of_it, (layer_of_it,)))


def _token(data: bytes) -> None:
    """What it says is looked at before its signature is: so it is here, where hardly any is right."""
    text = token.bearer(_text(data))
    with contextlib.suppress(DadiError):
        repr(token.parse(text))
    token.verify(text, lambda key: seeds.KEY.public_key())


def _proxy_path(data: bytes) -> None:
    path, _, rest = _text(data).partition("?")
    route = paths.split(path)
    repository = paths.repository(route.name, rest or None, "registry.example")
    paths.identified(repository, route.identifier)


def _upload_location(data: bytes) -> None:
    """It leads to us by the name that the client knows, or to somebody whom the client asks by himself."""
    asked = cast("Any", SimpleNamespace(raw_path="/v2/r.example/a/b/blobs/uploads/?ns=x", query={"ns": "x"}))
    base = "https://r.example"
    found = _UPLOADS._location(_text(data), f"{base}/v2/a/b/blobs/uploads/", base, asked, Reference("r.example", "a/b"))
    assert found.startswith(("/v2/r.example/a/b/", "http://", "https://")), found


def _mount(data: bytes) -> None:
    asked = cast("Any", SimpleNamespace(query={"mount": seeds.D, "from": _text(data)}))
    found = dict(uploads._query(asked, Reference("r.example", "a/b")))
    assert not found or Reference.parse(f"r.example/{found['from']}").repository == found["from"]


def _events(data: bytes) -> None:
    reader = EventReader("here")
    for piece in (data[:7], data[7:]):
        for event in reader.feed(piece):
            with contextlib.suppress(DadiError):
                image_answer(event)
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


def _message(kind: type[msgspec.Struct], seed: bytes, then: Callable[[Any], object] = repr) -> Target:
    """Return a target for messages whose readers (`bodies.py` and the like) say what is none; `then`: what follows."""
    return Target(lambda data: then(msgspec.json.decode(data, type=kind)), (seed,), _NO_JSON)


def _wait(data: bytes) -> None:
    """The header as an answer has it; nobody asks for more of an answer."""
    asked_to_wait(cast("Any", SimpleNamespace(headers={"Retry-After": _text(data)})))


def _configuration(data: bytes) -> None:
    try:
        values = tomllib.loads(_text(data))
    except tomllib.TOMLDecodeError:
        return
    for kind in (NodeConfig, SuperpeerConfig, ProxyConfig):
        with contextlib.suppress(DadiError):
            converted(values, kind, "here")


def _redirect(data: bytes) -> None:
    hosts = Hosts(("registry.example",), ())
    hosts.redirected("https://registry.example/v2/", _text(data), 1)


TARGETS: dict[str, Target] = {
    "fuse": Target(_fuse, seeds.FUSE),
    "fuse-state": Target(state.decode, (state.encode(wire.Init(7, 38, 1 << 17, 0), 1 << 17, "0:1"),)),
    "tar": Target(_tar, (b"\0" + seeds.TAR, b"\x80" + seeds.TAR)),
    "tar-header": Target(lambda data: tar_header.parse(data[:512].ljust(512, b"\0")), (seeds.TAR[:512],)),
    "tar-pax": Target(tar_pax.parse, (b"11 path=ab\n", b"22 GNU.sparse.major=1\n")),
    "layer-stream": Target(_unpacked, (gzip.compress(seeds.TAR), zstandard.compress(seeds.TAR), seeds.TAR)),
    "manifest": Target(_manifest, (seeds.MANIFEST, seeds.ARTIFACT, seeds.SIGNATURE, seeds.TRACE_ARTIFACT, seeds.INDEX)),
    "image-config": Target(_config, (seeds.CONFIG,)),
    "index-document": Target(index_document.parse, (seeds.INDEX,)),
    "descriptor": Target(manifest.parse_descriptor, (seeds.DESCRIPTOR,)),
    "layer-index": Target(layer.decode, (seeds.LAYER_INDEX,)),
    "image-index": Target(image.decode, (seeds.IMAGE_INDEX,)),
    "seek-table": Target(lambda data: seek.decode(data, 1 << 20), (seeds.SEEK_TABLE,)),
    "index-artifact-layer": Target(artifact.decode_layer, (seeds.PACKED_LAYER_INDEX,)),
    "trace": Target(_trace, seeds.TRACES),
    "trace-json": Target(
        lambda data: trace_json.from_json(msgspec.json.decode(data)), (seeds.TRACE_JSON,), _NO_JSON,
    ),
    "join": _message(places.Join, seeds.JOIN),
    "joined": _message(places.JoinAnswer, seeds.JOINED),
    "heartbeat": _message(places.Heartbeat, seeds.HEARTBEAT),
    "changed": _message(places.Changed, seeds.CHANGED),
    "group": _message(places.Grouped, seeds.GROUP),
    "keys": _message(PublicKeys, seeds.KEYS, lambda said: KnownKeys(said, "here")),
    "chunks-asked-for": Target(lambda data: stream.chunks_of(_text(data), 1000, 32), (b"1-3,7",)),
    "hops": Target(lambda data: hops.hops_of(_text(data)), (b"12",)),
    "original-answer": Target(lambda data: decode_answer(data, digests.of(b"abc")), (seeds.ORIGINAL,)),
    "chunk-stream": Target(_records, seeds.STREAM),
    "chunk-frame": Target(_frame, (seeds.FRAME,)),
    "token": Target(_token, seeds.BEARERS),
    "shown-credentials": Target(
        lambda data: shown.credentials(_text(data)), (b"Basic " + base64.b64encode(b"a:b"), b"Bearer x")
    ),
    "prefetch-request": Target(messages.decode_request, (seeds.PREFETCH,)),
    "prefetch-wishes": Target(messages.decode_wishes, (seeds.WISHES,)),
    "prefetch-report": Target(messages.decode_report, (seeds.REPORT,)),
    "prefetch-nodes": Target(lambda data: nodes.parse(_text(data)), (b"zone=a,rack=b", b"20%")),
    "prefetch-moment": Target(lambda data: when.moment(_text(data), 1e9), (b"2026-11-10T22:00+08:00",)),
    "kubernetes": Target(manifests.images, (seeds.POD,)),
    "sibling-told": Target(decode_told, (seeds.SIBLING,)),
    "sibling-original": Target(decode_here, (b'{"whole":true,"arriving":5,"ranges":true,"sources":["r.example/a"]}',)),
    "events": Target(_events, (seeds.EVENTS,)),
    "error-body": Target(error_in, (b'{"error":"denied","message":"x"}',)),
    "proxy-path": Target(_proxy_path, (b"/v2/a/b/manifests/1?docker.io", b"/v2/a/blobs/sha256:" + b"0" * 64)),
    "upload-location": Target(_upload_location, (b"/v2/a/b/blobs/uploads/1?_state=x%2F", b"https://store.example/x")),
    "mount": Target(_mount, (b"r.example/a/c", b"a/c", b"other.example/a/c")),
    "range": Target(lambda data: byte_range.parse(_text(data), 1000), (b"bytes=1-2", b"bytes=-5")),
    "proxy-caller": Target(lambda data: caller.parse(_text(data)), (b"Basic YTpi", b"Bearer x")),
    "www-authenticate": Target(
        lambda data: challenge.choose(challenge.parse([_text(data)])), (b'Bearer realm="https://a/t",service="b"',)
    ),
    "retry-after": Target(lambda data: retry.parse_retry_after(_text(data), 1e9), (b"Sun, 06 Nov 1994 08:49:37 GMT",)),
    "asked-to-wait": Target(_wait, (b"12",)),
    "next-page": Target(lambda data: link.next_page("https://a/v2/", [_text(data)]), (b'</v2/x?n=1>; rel="next"',)),
    "listen": Target(lambda data: parse_listen(_text(data)), (b"[::1]:7070", b":1")),
    "redirect": Target(_redirect, (b"https://cdn.example/x", b"../y")),
    "reference": Target(lambda data: Reference.parse(_text(data)), (b"h:1/a/b:t@sha256:" + b"0" * 64,)),
    "registry-name": Target(lambda data: parse_registry(_text(data)), (b"registry.example:5000", b"[::1]:5")),
    "platform": Target(lambda data: platforms.parse(_text(data)), (b"linux/arm/v7",)),
    "kubelet-config": Target(lambda data: kubelet.read_config(data, "here"), (seeds.KUBELET,)),
    "cri-secret": Target(secret_in, (seeds.PULL,)),
    "snapshotter": Target(snapshotter.feed, snapshotter.SEEDS),
    "snapshot-filters": Target(
        lambda data: filters.parse(_text(data).split("\0")), (b'kind==active,labels."a/b"~=x.*', b"name~=/a\\/b/")
    ),
    "mountinfo": Target(parse_mountinfo, (b"1 2 0:3 / /mnt rw - erofs /dev/loop0 ro\n",)),
    "configuration": Target(_configuration, (seeds.CONFIGURATION,)),
}
