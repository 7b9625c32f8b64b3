"""`dadi convert`: the copy is the same image, seekable, deterministic, and pushed only once."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dadi import digest as digests
from dadi.errors import AccessDenied, DigestMismatch, InvalidRequest, NotFound, Unsupported
from dadi.index import artifact, seek
from dadi.index.chunks import DEFAULT_CHUNK_SIZE
from dadi.index.decompress import uncompressed
from dadi.index.seek import Form
from dadi.oci import manifest as manifests
from dadi.oci import media_types
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import FixedCredentials
from dadi.oci.manifest import Index, Manifest
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.oci.retry import Clock
from dadi.publish.archive import open_archive
from dadi.publish.convert import convert_image
from dadi.publish.convert_report import ConvertReport
from dadi.publish.images import LocalImage, RegistryImage
from dadi.publish.index import PRESENT, index_image
from dadi.publish.local import open_layout
from dadi.publish.target import LayoutTarget, RegistryTarget
from tests.fakes.registry import FakeRegistry
from tests.lab import images
from tests.lab.layers import file, tar_of
from tests.lab.oci_layout import Image
from tests.lab.registry import DockerRegistry

REPOSITORY = Path(__file__).parents[2]
MACHINE = f"linux/{images.ARCHITECTURE}"
HINT = "use oci:DIR"
pytestmark = pytest.mark.programs("docker-registry", "skopeo")
_numbers = itertools.count()


def made_image(directory: Path, layers: int, **more: Any) -> Image:
    return images.synthetic(
        directory, layers=layers, files=8, size=1_700_000, compression=["gzip", "zstd", "none"], **more
    )


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return made_image(tmp_path_factory.mktemp("image"), 3)


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as running:
        yield running


def client_for(host: str) -> RegistryClient:
    config = RegistryConfig(allowed=(host,), plain_http=(host,), retries=0)
    impatient = Clock(sleep=lambda seconds: asyncio.sleep(0))
    return RegistryClient(config, credentials=FixedCredentials(), clock=impatient)


@pytest.fixture
async def client(registry: DockerRegistry) -> AsyncIterator[RegistryClient]:
    made = client_for(registry.host)
    yield made
    await made.close()


@pytest.fixture
def name(registry: DockerRegistry, image: Image) -> str:
    """A repository of the test's own, with the image as tag 1."""
    name = f"{registry.host}/team/convert{next(_numbers)}"
    image.push(f"{name}:1")
    return name


async def run(client: RegistryClient, src: str, dst: str, **options: Any) -> ConvertReport:
    source = RegistryImage(client, Reference.parse(src))
    return await convert_image(source, RegistryTarget(client, Reference.parse(dst), HINT), level=3, **options)


async def manifest_of(client: RegistryClient, name: str) -> Manifest:
    document = manifests.parse((await client.manifest(Reference.parse(name)))[1])
    assert isinstance(document, Manifest)
    return document


class Bytes:
    def __init__(self, data: bytes) -> None:
        self.data = data

    def read(self, size: int, /) -> bytes:
        part, self.data = self.data[:size], self.data[size:]
        return part


async def test_the_copy_is_the_same_image_with_seekable_layers_and_its_index(
    client: RegistryClient, image: Image, name: str
) -> None:
    report = await run(client, f"{name}:1", f"{name}:z")
    reference = Reference.parse(f"{name}:z")
    assert (await client.resolve(reference)).digest == report.digest
    manifest = await manifest_of(client, f"{name}:z")
    before = await manifest_of(client, f"{name}:1")
    assert manifest.media_type == media_types.OCI_MANIFEST
    assert manifest.config == before.config
    (row,) = report.platforms
    found = [item for item in await client.referrers(reference, report.digest) if artifact.is_index(item.artifact_type)]
    assert [item.digest for item in found] == [row.artifact_digest]
    document = manifests.parse((await client.manifest(reference, row.artifact_digest))[1])
    assert isinstance(document, Manifest)
    made = artifact.decode(document)
    assert (made.origin, made.subject.digest) == (artifact.ORIGIN_CONVERT, report.digest)
    for layer, original, item, told in zip(manifest.layers, image.layers, made.layers, report.layers, strict=True):
        assert layer.media_type == media_types.OCI_LAYER_ZSTD
        packed = await client.blob_bytes(reference, layer, 1 << 30)
        tar = b"".join(uncompressed(Bytes(packed), max_size=1 << 30))
        assert digests.of(tar) == original.diff_id
        index, _ = artifact.decode_layer(await client.blob_bytes(reference, item.index, 1 << 30))
        table = seek.decode(await client.blob_bytes(reference, item.seek, 1 << 30))
        artifact.check_layer(index, table, layer, original.diff_id, DEFAULT_CHUNK_SIZE)
        assert (table.form, len(table.points)) == (Form.ZSTD, -(-len(tar) // DEFAULT_CHUNK_SIZE))
        units = table.units(len(tar) // 2, 1)
        at, length = table.compressed_extent(units)
        begin, size = table.extent(units)
        assert b"".join(seek.unpack(table, units, packed[at : at + length])) == tar[begin : begin + size]
        assert (told.before_bytes, told.after_bytes) == (original.blob.size, layer.size)
    assert report.chunks == sum(layer.chunks for layer in report.layers)


async def test_an_index_made_by_convert_is_found_by_index(client: RegistryClient, name: str) -> None:
    report = await run(client, f"{name}:1", f"{name}:z")
    reference = Reference.parse(f"{name}:z")
    indexed = await index_image(RegistryImage(client, reference), RegistryTarget(client, reference, HINT))
    assert (indexed.platforms[0].how, indexed.platforms[0].artifact_digest) == (
        PRESENT, report.platforms[0].artifact_digest,
    )  # fmt: skip


async def test_the_same_input_gives_the_same_digests_and_is_uploaded_once(
    registry: DockerRegistry, client: RegistryClient, name: str
) -> None:
    first = await run(client, f"{name}:1", f"{name}:z")
    before = len(registry.access_log())
    second = await run(client, f"{name}:1", f"{name}:again")
    asked = registry.access_log()[before:]
    assert second.digest == first.digest
    assert [p.artifact_digest for p in second.platforms] == [p.artifact_digest for p in first.platforms]
    assert [layer.pushed for layer in first.layers] == [True] * 3
    assert [layer.pushed for layer in second.layers] == [False] * 3
    assert not [r for r in asked if r.method in ("POST", "PATCH") or (r.method == "PUT" and "/blobs/" in r.path)]


async def test_chunks_that_are_there_more_than_once_are_counted(client: RegistryClient, name: str) -> None:
    await run(client, f"{name}:1", f"{name}:z")
    again = await run(client, f"{name}:1", f"{name}:z")
    assert again.known_chunks == again.chunks
    assert 0 <= again.repeated_chunks < again.chunks
    assert (await run(client, f"{name}:1", f"{name}:new")).known_chunks is None


async def test_repeated_chunks_within_an_image_are_found(tmp_path: Path, fake: FakeRegistry) -> None:
    same = random.Random(0).randbytes(DEFAULT_CHUNK_SIZE)
    tar = tar_of(file(b"a", bytes(DEFAULT_CHUNK_SIZE - 512) + same * 4))
    fake.add_image("app", "1", [tar])
    client = client_for(fake.host)
    report = await run(client, f"{fake.host}/app:1", f"{fake.host}/app:z")
    await client.close()
    assert report.repeated_chunks == 3
    assert report.layers[0].repeated_chunks == 3


async def test_from_layout_and_archive_to_layout(client: RegistryClient, name: str, tmp_path: Path) -> None:
    image = images.synthetic(tmp_path / "image", layers=2, files=4, size=900_000, compression="gzip")
    image.push(f"{name}:2")
    local = await asyncio.to_thread(open_layout, image.layout)
    there = await convert_image(LocalImage(local, "latest"), LayoutTarget(tmp_path / "out", "z"), level=3)
    assert there.digest == (await run(client, f"{name}:2", f"{name}:z")).digest
    saved = tmp_path / "saved.tar"
    skopeo("copy", f"oci:{image.layout}:latest", f"docker-archive:{saved}:app:1")
    archive = await asyncio.to_thread(open_archive, saved)
    target = LayoutTarget(tmp_path / "out2", "z")
    other = await convert_image(LocalImage(archive, "docker.io/library/app:1"), target, level=3)
    assert [layer.new_digest for layer in other.layers] == [layer.new_digest for layer in there.layers]
    skopeo("copy", "--dest-tls-verify=false", f"oci:{tmp_path}/out:z", f"docker://{name}:brought")
    assert (await client.resolve(Reference.parse(f"{name}:brought"))).digest == there.digest


def skopeo(verb: str, *arguments: str) -> str:
    done = subprocess.run(
        ["skopeo", "--insecure-policy", verb, *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# ---- documents, and registries that do not play along


@pytest.fixture
async def fake() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as running:
        yield running


@pytest.fixture
async def fake_client(fake: FakeRegistry) -> AsyncIterator[RegistryClient]:
    made = client_for(fake.host)
    yield made
    await made.close()


LAYERS = [tar_of(file(b"a", random.Random(1).randbytes(400_000))), tar_of(file(b"b", b"two" * 1000))]


def document_of(fake: FakeRegistry, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(fake.manifests["app", name][1])
    return found


async def test_docker_images_become_oci_images_and_keep_what_else_they_say(
    fake: FakeRegistry, fake_client: RegistryClient
) -> None:
    fake.add_image("app", "docker", LAYERS, docker=True)
    document = document_of(fake, "docker")
    document |= {"annotations": {"a": "b"}, "strange": [1]}
    document["layers"][0]["annotations"] = {"containerd.io/snapshot/stargz/toc.digest": "x", "mine": "y"}
    fake.add_manifest("app", "1", document, media_types.DOCKER_MANIFEST)
    await run(fake_client, f"{fake.host}/app:1", f"{fake.host}/app:z")
    made = document_of(fake, "z")
    assert made["mediaType"] == media_types.OCI_MANIFEST
    assert made["config"] == {**document["config"], "mediaType": media_types.OCI_CONFIG}
    assert (made["annotations"], made["strange"]) == ({"a": "b"}, [1])
    assert made["layers"][0]["annotations"] == {"mine": "y"}
    assert {layer["mediaType"] for layer in made["layers"]} == {media_types.OCI_LAYER_ZSTD}


async def test_an_index_stays_one_without_what_belonged_to_the_old_manifests(
    fake: FakeRegistry, fake_client: RegistryClient
) -> None:
    one = {**fake.add_image("app", None, LAYERS, platform=MACHINE), "annotations": {"kept": "entry"}}
    one["platform"]["os.version"] = "7"
    two = fake.add_image("app", None, LAYERS[:1], platform="linux/s390x")
    attestation = {**two, "platform": {"os": "unknown", "architecture": "unknown"},
                   "annotations": {"vnd.docker.reference.type": "attestation-manifest"}}  # fmt: skip
    index = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": [one, attestation, two],
             "annotations": {"kept": "top"}}  # fmt: skip
    fake.add_manifest("app", "1", index, media_types.OCI_INDEX)
    report = await run(fake_client, f"{fake.host}/app:1", f"{fake.host}/app:z", every=True)
    made = document_of(fake, "z")
    assert isinstance(manifests.parse(json.dumps(made).encode()), Index)
    assert made["annotations"] == {"kept": "top"}
    assert [entry["platform"] for entry in made["manifests"]] == [one["platform"], two["platform"]]
    assert made["manifests"][0]["annotations"] == {"kept": "entry"}
    assert [entry["digest"] for entry in made["manifests"]] == [p.new_manifest_digest for p in report.platforms]
    assert len(report.layers) == 2
    single = await run(fake_client, f"{fake.host}/app:1", f"{fake.host}/app:one")
    assert "layers" in document_of(fake, "one")
    assert single.left_out == ("linux/s390x",)


async def test_an_empty_layer_and_the_same_layer_twice_are_converted(
    fake: FakeRegistry, fake_client: RegistryClient
) -> None:
    fake.add_image("app", "1", [LAYERS[0], bytes(1024), LAYERS[0]])
    report = await run(fake_client, f"{fake.host}/app:1", f"{fake.host}/app:z")
    made = [layer["digest"] for layer in document_of(fake, "z")["layers"]]
    assert made[0] == made[2]
    assert len(report.layers) == 2


@pytest.mark.parametrize("which", ["layer", "config"])
async def test_what_is_not_what_it_says_is_not_copied(
    fake: FakeRegistry, fake_client: RegistryClient, which: str
) -> None:
    fake.add_image("app", "1", LAYERS)
    document = document_of(fake, "1")
    digest = document["config"]["digest"] if which == "config" else document["layers"][1]["digest"]
    fake.blobs[digest] = fake.blobs[digest][:-1] + b"x"
    with pytest.raises(DigestMismatch):
        await run(fake_client, f"{fake.host}/app:1", f"{fake.host}/app:z")
    assert ("app", "z") not in fake.manifests


async def test_a_diff_id_that_is_not_right_is_no_image(fake: FakeRegistry, fake_client: RegistryClient) -> None:
    fake.add_image("app", "1", LAYERS)
    document = document_of(fake, "1")
    config = json.loads(fake.blobs[document["config"]["digest"]])
    config["rootfs"]["diff_ids"].reverse()
    data = json.dumps(config).encode()
    document["config"] |= {"digest": fake.add_blob(data), "size": len(data)}
    fake.add_manifest("app", "1", document, media_types.OCI_MANIFEST)
    with pytest.raises(DigestMismatch, match="config says"):
        await run(fake_client, f"{fake.host}/app:1", f"{fake.host}/app:z")
    assert ("app", "z") not in fake.manifests


async def test_a_registry_that_may_only_be_read_is_said_first(fake: FakeRegistry, fake_client: RegistryClient) -> None:
    fake.add_image("app", "1", LAYERS)
    fake.read_only = 403
    with pytest.raises(AccessDenied) as caught:
        await run(fake_client, f"{fake.host}/app:1", f"{fake.host}/app:z")
    assert HINT in str(caught.value)
    assert "--output" not in str(caught.value)
    assert not [seen for seen in fake.seen if digests.of(LAYERS[0]) in seen.path]


async def test_what_cannot_be_copied_is_refused(fake: FakeRegistry, fake_client: RegistryClient) -> None:
    fake.add_image("app", "1", LAYERS)
    with pytest.raises(InvalidRequest, match="give it a tag"):
        await run(fake_client, f"{fake.host}/app:1", f"{fake.host}/app@{digests.of(b'')}")
    with pytest.raises(NotFound):
        await run(fake_client, f"{fake.host}/app:2", f"{fake.host}/app:z")
    document = document_of(fake, "1")
    document["layers"][0]["mediaType"] = media_types.DOCKER_FOREIGN_GZIP
    fake.add_manifest("app", "foreign", document, media_types.OCI_MANIFEST)
    with pytest.raises(Unsupported, match="may not be passed on"):
        await run(fake_client, f"{fake.host}/app:foreign", f"{fake.host}/app:z")


# ---- the command line


def dadi(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "dadi.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_command_reports_sizes_and_dedupe(image: Image, name: str, tmp_path: Path) -> None:
    done = dadi("convert", f"{name}:1", f"{name}:z", "--plain-http", "--level", "3", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["before_bytes"] == image.compressed_size
    assert (said["level"], len(said["layers"]), said["known_chunks"]) == (3, 3, None)
    other = dadi("convert", f"oci:{image.layout}:latest", f"oci:{tmp_path}/out:z", "--level", "3")
    assert other.returncode == 0, other.stderr
    assert f"oci:{tmp_path}/out is {said['digest']}" in other.stdout
    assert "are there more than once" in other.stdout
    assert other.stderr.count("layer ") == 3


@pytest.mark.parametrize(
    ("src", "dst", "why"),
    [
        ("oci:", "oci:/tmp/x", "names no path"),
        ("oci:/nowhere/at/all", "oci:/tmp/x", "is not an OCI layout"),
        ("docker-archive:/nowhere.tar", "oci:/tmp/x", "cannot be read"),
        ("oci:/nowhere", "docker-archive:/tmp/x.tar", "cannot be written"),
        ("Not/A/Reference", "oci:/tmp/x", "lower case"),
    ],
)
def test_what_makes_no_sense_is_said(src: str, dst: str, why: str) -> None:
    done = dadi("convert", src, dst)
    assert done.returncode == 1
    assert why in done.stderr
    assert "Traceback" not in done.stderr
