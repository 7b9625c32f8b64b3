"""The index of an image as an OCI artifact: written, read back, and refused where it contradicts itself."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import DadiError, Malformed, TooLarge, Unsupported
from dadi.index import artifact as artifacts
from dadi.index import layer, seek
from dadi.index.artifact import Artifact, IndexedLayer
from dadi.index.chunks import ChunkTable, table_of
from dadi.index.layer import DecodeRoom, Entry, Kind, LayerIndex
from dadi.index.seek import COMPRESSED_CHUNK, FIRST, Form, SeekTable
from dadi.oci import manifest as manifests
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor, Manifest

BLOB, TAR = b"compressed" * 100, b"\0" * 5120
WANTED = Descriptor(media_types.OCI_LAYER_GZIP, digests.of(BLOB), len(BLOB))
DIFF_ID = digests.of(TAR)
INDEX = LayerIndex(1, WANTED.digest, len(BLOB), DIFF_ID, table_of(TAR, 4096), ())
TABLE = SeekTable(1, Form.GZIP, WANTED.digest, DIFF_ID, len(TAR), table_of(BLOB, COMPRESSED_CHUNK), (FIRST,))
SUBJECT = Descriptor(media_types.OCI_MANIFEST, digests.of(b"the image's manifest"), 20)


def made() -> Artifact:
    index, table = artifacts.index_blob(layer.encode(INDEX)), seek.encode(TABLE)
    return Artifact(SUBJECT, (IndexedLayer(
        WANTED.digest, DIFF_ID, Descriptor(artifacts.LAYER_INDEX, digests.of(index), len(index)),
        Descriptor(artifacts.SEEK_TABLE, digests.of(table), len(table)),
    ),), 4096)  # fmt: skip


def read(document: dict[str, Any]) -> Artifact:
    manifest = manifests.parse(json.dumps(document).encode())
    assert isinstance(manifest, Manifest)
    return artifacts.decode(manifest)


def document() -> dict[str, Any]:
    return json.loads(artifacts.encode(made()))


def test_what_is_written_is_read_back_and_is_always_the_same() -> None:
    found = read(document())
    assert (found.subject.digest, found.chunk_size, found.origin) == (SUBJECT.digest, 4096, "index")
    item = found.layer(WANTED.digest)
    assert item is not None
    assert (item.diff_id, item.index.digest, item.seek.size) == (
        DIFF_ID, made().layers[0].index.digest, made().layers[0].seek.size,
    )  # fmt: skip
    assert artifacts.encode(made()) == artifacts.encode(made())


def test_it_has_the_form_that_standard_tools_know() -> None:
    found = document()
    assert (found["schemaVersion"], found["mediaType"]) == (2, media_types.OCI_MANIFEST)
    assert found["config"] == {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digests.of(b"{}"),
                               "size": 2, "data": "e30="}  # fmt: skip
    assert found["subject"] == {"mediaType": SUBJECT.media_type, "digest": SUBJECT.digest, "size": SUBJECT.size}


def test_an_image_without_layers_has_an_artifact_too() -> None:
    encoded = artifacts.encode(Artifact(SUBJECT, (), 4096))
    assert [item["mediaType"] for item in json.loads(encoded)["layers"]] == ["application/vnd.oci.empty.v1+json"]
    assert read(json.loads(encoded)).layers == ()


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"artifactType": "application/vnd.dadi.index.v2"}, Unsupported),
        ({"artifactType": "application/vnd.other"}, Unsupported),
        ({"subject": None}, Malformed),
        ({"annotations": {}}, Unsupported),
        ({"annotations": {"dev.dadi.version": "1", "dev.dadi.chunk-size": "x"}}, Malformed),
        ({"annotations": {"dev.dadi.version": "1", "dev.dadi.chunk-size": "9" * 5000}}, Malformed),
        ({"annotations": {"dev.dadi.version": "1", "dev.dadi.chunk-size": "4096", "dev.dadi.origin": "?"}}, Malformed),
        ({"layers": document()["layers"][:1]}, Malformed),
        ({"layers": document()["layers"][::-1]}, Unsupported),
        ({"layers": document()["layers"] * 2}, Malformed),
        ({"layers": [{**item, "annotations": {}} for item in document()["layers"]]}, Malformed),
        ({"layers": [{**item, "size": 1 << 40} for item in document()["layers"]]}, Malformed),
    ],
)
def test_what_contradicts_itself_is_refused(change: dict[str, Any], error: type[DadiError]) -> None:
    with pytest.raises(error):
        read({name: value for name, value in {**document(), **change}.items() if value is not None})


@pytest.mark.parametrize(
    ("index", "table"),
    [
        (msgspec.structs.replace(INDEX, layer_digest=digests.of(b"?")), TABLE),
        (msgspec.structs.replace(INDEX, layer_size=5), TABLE),
        (msgspec.structs.replace(INDEX, diff_id=digests.of(b"?")), TABLE),
        (msgspec.structs.replace(INDEX, table=ChunkTable(512, 4096, bytes(32))), TABLE),
        (msgspec.structs.replace(INDEX, table=table_of(TAR, 8192)), TABLE),
        (INDEX, msgspec.structs.replace(TABLE, layer_digest=digests.of(b"?"))),
        (INDEX, msgspec.structs.replace(TABLE, diff_id=digests.of(b"?"))),
        (INDEX, msgspec.structs.replace(TABLE, size=512)),
        (INDEX, msgspec.structs.replace(TABLE, compressed=table_of(BLOB + b"?", COMPRESSED_CHUNK))),
        (msgspec.structs.replace(INDEX, layer_digest="nonsense"), TABLE),
    ],
)
def test_index_and_seek_table_must_be_those_of_the_layer(index: LayerIndex, table: SeekTable) -> None:
    artifacts.check_layer(INDEX, TABLE, WANTED, DIFF_ID, 4096)
    with pytest.raises(Malformed):
        artifacts.check_layer(index, table, WANTED, DIFF_ID, 4096)


def test_a_layer_index_is_packed_and_unpacked_and_a_bomb_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    index, encoded = artifacts.decode_layer(artifacts.index_blob(layer.encode(INDEX)))
    assert (index, encoded) == (INDEX, layer.encode(INDEX))
    monkeypatch.setattr(artifacts, "MAX_INDEX", 1 << 20)
    bomb = zstandard.ZstdCompressor(level=1).compress(bytes((1 << 20) + 1))
    with pytest.raises(TooLarge):
        artifacts.encoded_index(bomb)
    unsized = zstandard.ZstdCompressor(write_content_size=False).compress(layer.encode(INDEX))
    with pytest.raises(Malformed):
        artifacts.encoded_index(unsized)
    with pytest.raises(Malformed):
        artifacts.encoded_index(artifacts.index_blob(layer.encode(INDEX)) + b"more")


def test_an_index_that_nobody_would_take_is_not_made(monkeypatch: pytest.MonkeyPatch) -> None:
    encoded = layer.encode(INDEX)
    monkeypatch.setattr(artifacts, "MAX_INDEX", len(encoded) - 1)
    with pytest.raises(TooLarge, match=f"{len(encoded)} bytes"):
        artifacts.index_blob(encoded)


def test_some_hundred_bytes_do_not_become_many_millions_of_entries() -> None:
    empty, entry = layer.encode(INDEX), msgspec.msgpack.encode([b"a", int(Kind.DIRECTORY)])
    bomb = zstandard.compress(empty[:-1] + b"\xdd" + (6_000_000).to_bytes(4, "big") + entry * 6_000_000)
    assert len(bomb) < 4096
    with pytest.raises(TooLarge):
        artifacts.decode_layer(bomb)


def test_the_layers_of_an_image_may_share_a_room() -> None:
    index = msgspec.structs.replace(INDEX, entries=tuple(Entry(b"%d" % n, Kind.DIRECTORY) for n in range(10)))
    blob, room = artifacts.index_blob(layer.encode(index)), DecodeRoom(25)
    artifacts.decode_layer(blob, room)
    artifacts.decode_layer(blob, room)
    with pytest.raises(TooLarge):
        artifacts.decode_layer(blob, room)
    artifacts.decode_layer(blob)


@given(st.binary(max_size=200))
def test_no_bytes_make_it_fail_in_another_way(data: bytes) -> None:
    with pytest.raises((Malformed, TooLarge)):
        artifacts.encoded_index(data)


def test_a_signature_has_an_artifact_of_its_own() -> None:
    encoded = artifacts.encode_signature(SUBJECT, b"s" * 64, "0123456789abcdef")
    manifest = manifests.parse(encoded)
    assert isinstance(manifest, Manifest)
    assert artifacts.decode_signature(manifest).digest == digests.of(b"s" * 64)
    assert manifest.subject is not None
    assert manifest.subject.digest == SUBJECT.digest
    plain = manifests.parse(artifacts.encode(made()))
    assert isinstance(plain, Manifest)
    with pytest.raises(Malformed):
        artifacts.decode_signature(plain)
