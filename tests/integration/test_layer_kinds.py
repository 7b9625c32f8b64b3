"""Layers of every kind that builders make, from `dadi index` to a node's reads: by ranges, the right bytes, each once.

What estargz and zstd:chunked layers look like is written here after their specifications (containerd/stargz-snapshotter
"docs/estargz.md"; containers/storage "docs/containers-storage-zstd-chunked.md"), since the programs that make them are
no requirement of these tests. To us each is an ordinary layer: what they add for other readers is passed over.
"""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import struct
import tarfile
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import zstandard

from dadi import digest as digests
from dadi.index.chunks import DEFAULT_CHUNK_SIZE
from dadi.index.image import REFERRER, ImageIndex
from dadi.oci import media_types
from tests.fakes import gzips
from tests.fakes.registry import FakeRegistry
from tests.integration.test_lazy_layers import complete, kinds
from tests.integration.test_publish import client_for
from tests.integration.test_publish import run as dadi_index
from tests.lab.layers import Member, directory, file, symlink
from tests.lab.services import IndexingConfig, Running, running

SPACING = 128 << 10
CHUNK_OF_FILE = 512 << 10
"""Bytes of a file in one gzip member or zstd frame (4 MiB by default; smaller, so that a test has several)."""
NEVER = 1e6

Packed = tuple[bytes, bytes]
"""A layer as the registry has it, and its tar: estargz adds members of its own to this."""


def members() -> list[Member]:
    generator = random.Random(11)
    small = [file(b"app/f%d" % n, gzips.text(generator.randrange(3000), n)) for n in range(60)]
    return [
        directory(b"app"), *small[:30], file(b"app/large", gzips.text(1_700_000, 5)), symlink(b"app/link", b"large"),
        file(b"app/noise", generator.randbytes(600_000)), file(b"app/empty"), file(b"app/zeros", bytes(900_000)),
        *small[30:],
    ]  # fmt: skip


def parts(found: list[Member]) -> Iterator[tuple[str, int, bytes]]:
    """Yield the tar as the builders cut it: (name, -1, headers), (name, place in the file, a piece of its data)."""
    for info, data in found:
        yield info.name, -1, info.tobuf(tarfile.PAX_FORMAT)
        for at in range(0, len(data), CHUNK_OF_FILE):
            yield info.name, at, data[at : at + CHUNK_OF_FILE]
        yield info.name, -1, bytes(-len(data) % 512)


TAR = b"".join(data for _, _, data in parts(members())) + bytes(1024)


def estargz() -> Packed:
    """A gzip member for each file's piece, with the headers that follow it; the TOC's own; and the footer."""
    landmark = file(b".no.prefetch.landmark", b"\x0f")
    blob, tar, held = b"", b"", b""
    toc = []
    for name, at, data in parts([landmark, *members()]):
        if at >= 0:
            blob += gzip.compress(held, 9, mtime=0)
            held = b""
            toc.append({"name": name, "type": "reg" if at == 0 else "chunk", "offset": len(blob), "chunkOffset": at,
                        "chunkSize": len(data), "chunkDigest": digests.of(data)})  # fmt: skip
        held += data
        tar += data
    blob += gzip.compress(held, 9, mtime=0)
    table = json.dumps({"version": 1, "entries": toc}).encode()
    last = b"".join(data for _, _, data in parts([file(b"stargz.index.json", table)])) + bytes(1024)
    return blob + gzip.compress(last, 9, mtime=0) + stargz_footer(len(blob)), tar + last


def stargz_footer(offset: int) -> bytes:
    """An empty gzip member of 51 bytes, with the TOC's offset in its header."""
    extra = b"SG" + struct.pack("<H", 22) + b"%016xSTARGZ" % offset
    header = b"\x1f\x8b\x08\x04" + bytes(4) + b"\0\xff" + struct.pack("<H", len(extra)) + extra
    footer = header + b"\x01\0\0\xff\xff" + bytes(8)
    assert len(footer) == 51
    assert zlib.decompress(footer, 31) == b""
    return footer


def zstd_chunked() -> Packed:
    """A zstd frame for each piece; the manifest, what tar-split needs, and a footer in skippable frames behind them."""
    blob, table = b"", []
    pieces = [*parts(members()), ("", -1, bytes(1024))]
    for name, at, data in pieces:
        if not data:
            continue
        table.append({"name": name, "offset": len(blob), "chunkOffset": max(at, 0), "digest": digests.of(data)})
        blob += zstandard.ZstdCompressor(level=3, write_content_size=at < 0).compress(data)
    manifest = zstandard.compress(json.dumps({"version": 1, "entries": table}).encode())
    split = zstandard.compress(b"".join(data for _, at, data in pieces if at < 0))
    footer = struct.pack("<7Q", len(blob) + 8, len(manifest), 4096, 1, len(blob) + 16 + len(manifest), len(split), 4096)
    behind = gzips.skippable(manifest) + gzips.skippable(split) + gzips.skippable(footer + b"GNUlInUx")
    return blob + behind, TAR


def of(pack: gzips.Packer) -> Callable[[], Packed]:
    return lambda: (pack(TAR), TAR)


KINDS: dict[str, tuple[Callable[[], Packed], str]] = {
    "estargz": (estargz, media_types.OCI_LAYER_GZIP),
    "zstd:chunked": (zstd_chunked, media_types.OCI_LAYER_ZSTD),
    "gzip": (of(gzips.member), media_types.OCI_LAYER_GZIP),
    "gzip for docker": (of(gzips.member), media_types.DOCKER_LAYER_GZIP),
    "pigz": (of(gzips.piped("pigz", "-p4")), media_types.OCI_LAYER_GZIP),
    "pigz -i": (of(gzips.piped("pigz", "-i", "-p4")), media_types.OCI_LAYER_GZIP),
    "bgzip": (of(gzips.piped("bgzip", "-c")), media_types.OCI_LAYER_GZIP),
    "members": (of(lambda tar: gzips.members(tar, 300_000)), media_types.OCI_LAYER_GZIP),
    "stored blocks": (of(lambda tar: gzips.member(tar, 0)), media_types.OCI_LAYER_GZIP),
    "zeros behind": (of(lambda tar: gzips.member(tar) + bytes(5000)), media_types.OCI_LAYER_GZIP),
    "zstd": (of(gzips.zstd), media_types.OCI_LAYER_ZSTD),
    "plain tar": (of(lambda tar: tar), media_types.OCI_LAYER),
}
WITHOUT_POINTS = {"zstd", "plain tar"}
"""One frame has just one place to begin; a plain tar needs none."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    program = request.param.split()[0]
    if program in ("pigz", "bgzip") and not shutil.which(program):
        pytest.skip(f"{program} is not installed (scripts/setup does it)")
    return str(request.param)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


def add_image(registry: FakeRegistry, layer: bytes, tar: bytes, media_type: str) -> str:
    """Add an image of one layer; return its reference."""
    config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digests.of(tar)]}}
    data = json.dumps(config).encode()
    document = {
        "schemaVersion": 2, "mediaType": media_types.OCI_MANIFEST,
        "config": {"mediaType": media_types.OCI_CONFIG, "digest": registry.add_blob(data), "size": len(data)},
        "layers": [{"mediaType": media_type, "digest": registry.add_blob(layer), "size": len(layer)}],
    }  # fmt: skip
    registry.add_manifest("team/app", "1", document, media_types.OCI_MANIFEST)
    return f"{registry.host}/team/app:1"


def given(registry: FakeRegistry, layer: bytes) -> int:
    """Return how many bytes of a layer the registry was asked for."""
    count = 0
    for seen in registry.asked(f"/blobs/{digests.of(layer)}", "GET"):
        first, last = seen.headers.get("Range", f"bytes=0-{len(layer) - 1}").removeprefix("bytes=").split("-")
        count += int(last) - int(first) + 1
    return count


async def chunk_of(run: Running, index: ImageIndex, chunk: int) -> bytes:
    (data,) = await run.client.source.read(index.layers[0].blob, range(chunk, chunk + 1))
    return data


def part_of(tar: bytes, chunk: int) -> bytes:
    return tar[chunk * DEFAULT_CHUNK_SIZE : (chunk + 1) * DEFAULT_CHUNK_SIZE]


async def test_every_chunk_in_any_order_is_right_and_costs_one_copy(
    tmp_path: Path, registry: FakeRegistry, kind: str
) -> None:
    pack, media_type = KINDS[kind]
    layer, tar = pack()
    reference = add_image(registry, layer, tar, media_type)
    client = client_for(registry.host)
    report = await dadi_index(client, f"{registry.host}/team/app", spacing=SPACING)
    await client.close()
    (told,) = report.platforms[0].layers
    assert told.unpacked_bytes == len(tar)
    assert (told.seek_points > 5) == (kind not in WITHOUT_POINTS)
    registry.seen.clear()
    async with running(tmp_path, registry.host, indexing=IndexingConfig(rest_after=NEVER)) as run:
        index = await run.index(reference)
        (found,) = index.layers
        assert (index.origin, found.media_type, found.seek_points) == (REFERRER, media_type, told.seek_points)
        assert given(registry, layer) == 0
        count = found.table.count
        assert await chunk_of(run, index, count // 2) == part_of(tar, count // 2)
        assert given(registry, layer) <= (len(layer) if kind == "zstd" else 0.45 * len(layer))
        for chunk in random.Random(7).sample(range(count), count):
            assert await chunk_of(run, index, chunk) == part_of(tar, chunk)
        assert 0.9 * len(layer) < given(registry, layer) <= len(layer), "1.0 copies of it"
        assert kinds(run) == set()


async def test_the_layer_is_complete_and_verified_in_both_forms_when_the_rest_has_come(
    tmp_path: Path, registry: FakeRegistry, kind: str
) -> None:
    pack, media_type = KINDS[kind]
    layer, tar = pack()
    reference = add_image(registry, layer, tar, media_type)
    client = client_for(registry.host)
    await dadi_index(client, f"{registry.host}/team/app", spacing=SPACING)
    await client.close()
    registry.seen.clear()
    async with running(tmp_path, registry.host, indexing=IndexingConfig(rest_after=0.0)) as run:
        index = await run.index(reference)
        assert await chunk_of(run, index, 3) == part_of(tar, 3)
        await complete(run, 1)
        assert await run.superpeer.store.get(digests.of(tar)) == tar
        # The skippable frames and the footer, which no reader of the tar needs, are there too.
        assert await run.client.whole(digests.of(layer), len(layer)) == layer
        assert given(registry, layer) == len(layer)
        assert kinds(run) == set()


@pytest.mark.parametrize("make", [estargz, zstd_chunked])
def test_what_is_made_here_is_what_others_read(make: Callable[[], Packed]) -> None:
    layer, tar = make()
    if make is estargz:
        assert gzip.decompress(layer) == tar
        offset = int(layer[-51:][16:32], 16)
        with tarfile.open(fileobj=io.BytesIO(gzip.decompress(layer[offset:]))) as last:
            member = last.extractfile("stargz.index.json")
            assert member is not None
            toc = json.loads(member.read())["entries"]
        for entry in toc:
            piece = zlib.decompressobj(31).decompress(layer[entry["offset"] :])[: entry["chunkSize"]]
            assert digests.of(piece) == entry["chunkDigest"]
    else:
        with zstandard.ZstdDecompressor().stream_reader(layer, read_across_frames=True) as reader:
            assert reader.read() == tar
        assert layer.endswith(b"GNUlInUx")
        offset, size = struct.unpack("<2Q", layer[-64:][:16])
        toc = json.loads(zstandard.decompress(layer[offset : offset + size]))["entries"]
    with tarfile.open(fileobj=io.BytesIO(tar)) as found:
        names = found.getnames()
    assert {entry["name"] for entry in toc if entry["name"]} <= set(names)
    assert "app/large" in names
