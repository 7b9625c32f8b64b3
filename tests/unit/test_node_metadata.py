"""What a mount needs of its image's index: whole and right, from the store if that has it, else from a superpeer."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.errors import Malformed, StoreFull, TooLarge
from dadi.fallbacks import Fallbacks
from dadi.index import layer as layer_index
from dadi.index.chunks import Blob, ChunkTable, blob_of
from dadi.index.image import VERSION, ImageIndex, ImageLayer, encode
from dadi.index.layer import Entry, Extent, Kind, LayerIndex
from dadi.node.metadata import ImageMetadata
from dadi.peers.superpeer import MAX_SMALL_BLOB, ImageAnswer

INDEX = ImageIndex(VERSION, digests.of(b"manifest"), digests.of(b"config"), "linux/amd64", b"{}", (),
                   blob_of(b"metadata", 4096), ())  # fmt: skip
RAW = encode(INDEX)
ANSWER = ImageAnswer("r/app:1", "linux/amd64", INDEX.manifest_digest, digests.of(RAW), len(RAW))

TAR = blob_of(b"t" * 5000, 4096)
LAYER = LayerIndex(layer_index.VERSION, digests.of(b"layer"), 7, TAR.digest, TAR.table,
                   (Entry(b"file", Kind.FILE, size=5000, extents=(Extent(0, 0, 5000),)),))  # fmt: skip
LAYER_RAW = layer_index.encode(LAYER)
IN_IMAGE = ImageLayer(LAYER.layer_digest, 7, "t", TAR.digest, TAR.table, digests.of(LAYER_RAW), len(LAYER_RAW))


class Upstream:
    """Gives the index of the image and that of its layer, and nothing else."""

    def __init__(self) -> None:
        self.asked = 0

    async def whole(self, digest: str, size: int) -> bytes:
        self.asked += 1
        (found,) = [data for data in (RAW, LAYER_RAW) if (digests.of(data), len(data)) == (digest, size)]
        return found


class Site:
    def __init__(self, store: DiskBlobs) -> None:
        self.store, self.upstream, self.fallbacks = store, Upstream(), Fallbacks()
        self.metadata = ImageMetadata(store, self.upstream, self.fallbacks, lambda index: None)

    @property
    def data(self) -> Path:
        return self.data_of(ANSWER.index_digest)

    def data_of(self, digest: str) -> Path:
        return self.store.root / "blobs" / digest.removeprefix("sha256:") / "data"

    @property
    def noted(self) -> list[str]:
        return [row["kind"] for row in self.fallbacks.statistics()]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    store = DiskBlobs(tmp_path)
    yield Site(store)
    await store.close()


async def test_it_is_fetched_once(site: Site) -> None:
    assert [await site.metadata.index(ANSWER), await site.metadata.index(ANSWER)] == [INDEX, INDEX]
    assert (site.upstream.asked, site.noted) == (1, [])


@pytest.mark.parametrize("damage", ["spoilt", "short"])
async def test_what_the_disk_spoilt_or_does_not_give_is_fetched_again_and_that_is_said(site: Site, damage: str) -> None:
    await site.metadata.index(ANSWER)
    if damage == "spoilt":
        with site.data.open("r+b") as file:
            file.write(b"\0\0\0\0")
    else:
        os.truncate(site.data, 3)
    assert [await site.metadata.index(ANSWER), await site.metadata.index(ANSWER)] == [INDEX, INDEX]
    assert (site.upstream.asked, site.noted) == (2, ["our own disk spoilt bytes, fetched again"])


async def test_a_store_without_room_loses_the_keeping_and_not_the_mount(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def put(data: bytes) -> Blob:
        raise StoreFull("no room")

    monkeypatch.setattr(site.store, "put", put)
    assert await site.metadata.index(ANSWER) == INDEX
    assert site.noted == ["not kept: store full"]


async def test_an_index_of_another_image_is_refused(site: Site) -> None:
    other = ImageAnswer("r/app:1", "linux/amd64", digests.of(b"another"), ANSWER.index_digest, ANSWER.index_size)
    with pytest.raises(Malformed, match="is not of the image"):
        await site.metadata.index(other)


async def test_metadata_beyond_all_measure_is_refused_before_a_byte_of_it_is_fetched(site: Site) -> None:
    table = ChunkTable(MAX_SMALL_BLOB + 1, 1 << 30, b"\0" * 32)
    index = ImageIndex(VERSION, INDEX.manifest_digest, INDEX.config_digest, "linux/amd64", b"{}", (),
                       Blob(digests.of(b"m"), table), ())  # fmt: skip
    with contextlib.ExitStack() as holds, pytest.raises(TooLarge, match="the limit is"):
        await site.metadata.hold(ANSWER, index, holds)
    assert site.upstream.asked == 0


async def test_fewer_layers_are_mounted_by_layer_indexes_that_were_hashed_again(site: Site) -> None:
    index = msgspec.structs.replace(INDEX, layers=(IN_IMAGE,))
    with contextlib.ExitStack() as holds:
        made = await site.metadata.prefix(index, 1, holds)
    assert site.noted == []
    with site.data_of(IN_IMAGE.index_digest).open("r+b") as file:
        file.seek(LAYER_RAW.index(b"file"))
        file.write(b"evil")
    with contextlib.ExitStack() as holds:
        assert await site.metadata.prefix(index, 1, holds) == made
    assert site.noted == ["our own disk spoilt bytes, fetched again"]
