"""The image index's bytes: there and back, what it adds up, and nothing but our errors for any other bytes."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings

from dadi import digest as digests
from dadi.errors import Malformed, Unsupported
from dadi.index.chunks import ChunkTable, blob_of
from dadi.index.image import MAGIC, MAX_LAYERS, VERSION, ImageIndex, ImageLayer, decode, encode
from tests.contracts import formats


def layer(name: bytes, size: int = 5000) -> ImageLayer:
    blob = blob_of(name * size, 4096)
    return ImageLayer(digests.of(name), 100, "application/vnd.oci.image.layer.v1.tar+gzip", blob.digest, blob.table,
                      digests.of(b"index" + name), 50)  # fmt: skip


INDEX = ImageIndex(VERSION, digests.of(b"manifest"), digests.of(b"config"), "linux/amd64", b'{"\xff"}',
                   (layer(b"a"), layer(b"b", 0), layer(b"c")), blob_of(b"metadata", 4096), (0, 2))  # fmt: skip
SAMPLE = encode(INDEX)


def replaced(**fields: object) -> bytes:
    return encode(msgspec.structs.replace(INDEX, **fields))


def test_there_and_back() -> None:
    assert decode(SAMPLE) == INDEX
    assert encode(decode(SAMPLE)) == SAMPLE
    assert SAMPLE.startswith(MAGIC)


def test_it_adds_up_and_names_the_blob_behind_each_device() -> None:
    assert (INDEX.layers_size, INDEX.unpacked_size) == (300, 10_000)
    assert INDEX.device_blobs() == [INDEX.layers[0].blob, INDEX.layers[2].blob]
    assert INDEX.layers[0].blob == blob_of(b"a" * 5000, 4096)
    assert repr(INDEX) == f"ImageIndex({digests.of(b'manifest')[7:19]}, linux/amd64, 3 layers)"


def taken_or_refused(data: bytes) -> None:
    index = formats.taken_or_refused(data, decode, encode)
    assert index is None or len(index.device_blobs()) == len(index.devices)


@given(formats.strange(MAGIC))
def test_any_bytes_give_an_index_or_an_error_of_ours(data: bytes) -> None:
    taken_or_refused(data)


@settings(max_examples=300)
@given(formats.damaged(SAMPLE))
def test_a_damaged_index_gives_an_index_or_an_error_of_ours(data: bytes) -> None:
    taken_or_refused(data)


def test_a_cut_index_is_malformed_wherever_the_cut_is() -> None:
    for cut in range(len(SAMPLE)):
        with pytest.raises(Malformed):
            decode(SAMPLE[:cut])


def test_another_version_is_unsupported() -> None:
    with pytest.raises(Unsupported, match="version 9"):
        decode(replaced(version=9))


BAD = layer(b"bad")


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MAGIC,
        b"DADILYR1" + SAMPLE[8:],
        SAMPLE + b"\0",
        MAGIC + b"\x91" * 1_000_000,
        replaced(manifest_digest="sha512:abc"),
        replaced(config_digest=""),
        replaced(metadata=msgspec.structs.replace(INDEX.metadata, digest="../../etc")),
        replaced(metadata=msgspec.structs.replace(INDEX.metadata, table=ChunkTable(1, 4096, b""))),
        replaced(layers=(msgspec.structs.replace(BAD, layer_digest="x"),) * 3),
        replaced(layers=(msgspec.structs.replace(BAD, diff_id="sha256:" + "G" * 64),) * 3),
        replaced(layers=(msgspec.structs.replace(BAD, index_digest="sha256:" + "A" * 64),) * 3),
        replaced(layers=(msgspec.structs.replace(BAD, table=ChunkTable(9, 5000, b"")),) * 3),
        replaced(devices=(3,)),
        replaced(devices=(0, -1)),
        replaced(layers=(), devices=(0,)),
        replaced(layers=INDEX.layers * MAX_LAYERS),
    ],
)
def test_what_contradicts_itself_is_malformed(data: bytes) -> None:
    with pytest.raises(Malformed):
        decode(data)
