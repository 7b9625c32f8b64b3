"""`dadi index` against a real registry, and what happens when the registry or the image does not play along.

Longer than 400 lines: one capability and its faults, on one set of fixtures.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from dadi import digest as digests
from dadi.errors import AccessDenied, DigestMismatch, NoSuchPlatform, Unsupported
from dadi.index import artifact, seek, signature
from dadi.index.artifact import Artifact
from dadi.index.chunks import DEFAULT_CHUNK_SIZE
from dadi.oci import manifest as manifests
from dadi.oci import media_types, platforms
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import FixedCredentials
from dadi.oci.manifest import Descriptor, Manifest
from dadi.oci.reference import Reference
from dadi.oci.referrers import fallback_tag
from dadi.oci.registry import RegistryClient
from dadi.oci.retry import Clock
from dadi.publish.archive import open_archive
from dadi.publish.images import LocalImage, Origin, RegistryImage
from dadi.publish.index import MADE, PRESENT, READ, REUSED, IndexReport, index_image
from dadi.publish.local import LocalImages, open_layout
from dadi.publish.progress import Progress
from dadi.publish.target import LayoutTarget, RegistryTarget
from tests.fakes.registry import FakeRegistry, status
from tests.lab import images
from tests.lab.layers import file, tar_of
from tests.lab.oci_layout import Image, Layout
from tests.lab.registry import DockerRegistry

REPOSITORY = Path(__file__).parents[2]
HINT = "use --output DIR"
pytestmark = pytest.mark.programs("docker-registry", "skopeo")


class Said(Progress):
    """Keeps notices, layers and bytes."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.layers: list[str] = []
        self.size = self.done = 0

    def expect(self, *, layers: int = 0, size: int = 0) -> None:
        self.size += size

    def advance(self, size: int) -> None:
        self.done += size

    def layer(self, digest: str, text: str) -> None:
        self.layers.append(digest)

    def notice(self, text: str) -> None:
        self.notices.append(text)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return made_image(tmp_path_factory.mktemp("image"), 2)


@pytest.fixture(scope="module")
def larger(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """The same two layers, and a third."""
    return made_image(tmp_path_factory.mktemp("larger"), 3)


def made_image(directory: Path, layers: int, **more: Any) -> Image:
    return images.synthetic(
        directory, layers=layers, files=8, size=700_000, compression=["gzip", "zstd", "none"], **more
    )


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as running:
        yield running


@pytest.fixture
async def client(registry: DockerRegistry) -> AsyncIterator[RegistryClient]:
    made = client_for(registry.host)
    yield made
    await made.close()


def client_for(host: str) -> RegistryClient:
    config = RegistryConfig(allowed=(host,), plain_http=(host,), retries=0)
    impatient = Clock(sleep=lambda seconds: asyncio.sleep(0))
    return RegistryClient(config, credentials=FixedCredentials(), clock=impatient)


_numbers = itertools.count()


@pytest.fixture
def name(registry: DockerRegistry) -> str:
    """A repository of the test's own."""
    return f"{registry.host}/team/app{next(_numbers)}"


async def run(
    client: RegistryClient, name: str, tag: str = "1", *, local: LocalImages | None = None, **options: Any
) -> IndexReport:
    reference = Reference.parse(f"{name}:{tag}")
    return await index_image(
        RegistryImage(client, reference, local), RegistryTarget(client, reference, HINT), **options
    )


async def artifact_of(client: RegistryClient, name: str, digest: str) -> tuple[Descriptor, Artifact]:
    """Return the one index that an image has."""
    reference = Reference.parse(f"{name}:x")
    (found,) = [
        item for item in await client.referrers(reference, digest) if artifact.is_index(item.artifact_type)
    ]
    manifest = manifests.parse((await client.manifest(reference, found.digest))[1])
    assert isinstance(manifest, Manifest)
    return found, artifact.decode(manifest)


def layer_gets(registry: DockerRegistry, image: Image, name: str) -> list[str]:
    """Return the layers of an image that were read in a repository, so far."""
    repository = name.partition("/")[2]
    wanted = {layer.blob.digest for layer in image.layers}
    paths = [r.path for r in registry.access_log() if r.method == "GET" and f"/v2/{repository}/blobs/" in r.path]
    return [path.rpartition("/")[2] for path in paths if path.rpartition("/")[2] in wanted]


async def test_the_index_is_beside_the_image_and_the_image_stays(
    registry: DockerRegistry, client: RegistryClient, image: Image, name: str
) -> None:
    image.push(f"{name}:1")
    said = Said()
    report = await run(client, name, progress=said)
    (row,) = report.platforms
    assert (row.how, row.manifest_digest, report.digest) == (MADE, image.manifest.digest, image.manifest.digest)
    assert [layer.how for layer in row.layers] == [READ, READ]
    assert sorted(layer_gets(registry, image, name)) == sorted(layer.blob.digest for layer in image.layers)
    assert said.done == said.size
    found, made = await artifact_of(client, name, image.manifest.digest)
    assert found.digest == row.artifact_digest
    assert (made.origin, made.chunk_size) == (artifact.ORIGIN_INDEX, DEFAULT_CHUNK_SIZE)
    assert made.subject.digest == image.manifest.digest
    reference = Reference.parse(f"{name}:1")
    for layer, item, told in zip(image.layers, made.layers, row.layers, strict=True):
        index, _ = artifact.decode_layer(await client.blob_bytes(reference, item.index, 1 << 20))
        table = seek.decode(await client.blob_bytes(reference, item.seek, 1 << 20))
        wanted = Descriptor(layer.blob.media_type, layer.blob.digest, layer.blob.size)
        artifact.check_layer(index, table, wanted, layer.diff_id, DEFAULT_CHUNK_SIZE)
        assert (told.unpacked_bytes, told.seek_points) == (layer.tar_size, len(table.points))
        assert (told.index_bytes, told.seek_bytes) == (item.index.size, item.seek.size)
    assert (await client.resolve(reference)).digest == image.manifest.digest


async def test_a_second_run_reads_and_writes_nothing(
    registry: DockerRegistry, client: RegistryClient, image: Image, name: str
) -> None:
    image.push(f"{name}:1")
    first = await run(client, name)
    before = len(registry.access_log())
    second = await run(client, name)
    asked = registry.access_log()[before:]
    assert second.platforms[0].how == PRESENT
    assert second.platforms[0].artifact_digest == first.platforms[0].artifact_digest
    assert {request.method for request in asked} <= {"GET", "HEAD"}
    assert not [r for r in asked if any(layer.blob.digest in r.path for layer in image.layers)]


async def test_layers_that_another_image_has_had_indexed_are_not_read(
    registry: DockerRegistry, client: RegistryClient, image: Image, larger: Image, name: str
) -> None:
    image.push(f"{name}:1")
    larger.push(f"{name}:2")
    await run(client, name)
    before = len(layer_gets(registry, larger, name))
    report = await run(client, name, "2")
    assert [layer.how for layer in report.platforms[0].layers] == [REUSED, REUSED, READ]
    assert layer_gets(registry, larger, name)[before:] == [larger.layers[2].blob.digest]
    _, made = await artifact_of(client, name, larger.manifest.digest)
    assert [item.layer_digest for item in made.layers] == [layer.blob.digest for layer in larger.layers]


async def test_force_reads_again_and_makes_the_same(
    registry: DockerRegistry, client: RegistryClient, image: Image, name: str
) -> None:
    image.push(f"{name}:1")
    first = await run(client, name)
    before = len(layer_gets(registry, image, name))
    second = await run(client, name, force=True)
    assert len(layer_gets(registry, image, name)) - before == 2
    assert second.platforms[0].how == MADE
    assert second.platforms[0].artifact_digest == first.platforms[0].artifact_digest


async def test_with_a_key_only_what_it_signed_counts(
    registry: DockerRegistry, client: RegistryClient, image: Image, larger: Image, name: str
) -> None:
    ours, theirs = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    image.push(f"{name}:1")
    larger.push(f"{name}:2")
    unsigned = await run(client, name)
    signed = await run(client, name, key=ours)
    assert [(r.how, r.key_id) for r in signed.platforms] == [(MADE, signature.key_id(ours.public_key()))]
    assert [layer.how for layer in signed.platforms[0].layers] == [READ, READ]
    assert signed.platforms[0].artifact_digest == unsigned.platforms[0].artifact_digest
    again = await run(client, name, key=ours)
    assert (again.platforms[0].how, again.platforms[0].key_id) == (PRESENT, signature.key_id(ours.public_key()))
    assert (await run(client, name, key=theirs)).platforms[0].how == MADE
    others = await run(client, name, "2", key=Ed25519PrivateKey.generate())
    assert [layer.how for layer in others.platforms[0].layers] == [READ] * 3
    assert (await run(client, name, "2", key=ours)).platforms[0].how == MADE


async def test_local_sources_spare_the_registry(
    registry: DockerRegistry, client: RegistryClient, larger: Image, name: str
) -> None:
    larger.push(f"{name}:1")
    report = await run(client, name, local=await asyncio.to_thread(open_layout, larger.layout))
    assert [layer.how for layer in report.platforms[0].layers] == [READ] * 3
    assert layer_gets(registry, larger, name) == []


async def test_a_docker_archive_gives_the_layers_that_are_plain_tars(
    registry: DockerRegistry, client: RegistryClient, tmp_path: Path, name: str
) -> None:
    plain = images.synthetic(tmp_path / "plain", layers=2, files=3, size=300_000, compression="none")
    plain.push(f"{name}:1")
    saved = tmp_path / "saved.tar"
    skopeo("copy", f"oci:{plain.layout}:latest", f"docker-archive:{saved}:app:1")
    local = await asyncio.to_thread(open_archive, saved)
    report = await run(client, name, local=local)
    assert layer_gets(registry, plain, name) == []
    assert report.platforms[0].artifact_digest == (await run(client, name, force=True)).platforms[0].artifact_digest
    with pytest.raises(Unsupported, match="no manifest to which an index could belong"):
        await index_image(LocalImage(local), LayoutTarget(tmp_path / "out"))


async def test_a_local_blob_that_is_damaged_is_passed_over(
    registry: DockerRegistry, client: RegistryClient, image: Image, name: str, tmp_path: Path
) -> None:
    image.push(f"{name}:1")
    layout = tmp_path / "layout"
    shutil.copytree(image.layout, layout)
    damaged = layout / "blobs/sha256" / image.layers[0].blob.digest[7:]
    data = bytearray(damaged.read_bytes())
    data[len(data) // 2] ^= 1
    damaged.write_bytes(data)
    said = Said()
    report = await run(client, name, local=await asyncio.to_thread(open_layout, layout), progress=said)
    assert report.platforms[0].how == MADE
    assert layer_gets(registry, image, name) == [image.layers[0].blob.digest]
    assert "trying again from another place" in said.notices[0]


async def test_without_a_registry_it_goes_from_layout_to_layout_and_skopeo_brings_it(
    registry: DockerRegistry, client: RegistryClient, image: Image, name: str, tmp_path: Path
) -> None:
    key, out = Ed25519PrivateKey.generate(), tmp_path / "out"
    local = await asyncio.to_thread(open_layout, image.layout)
    report = await index_image(LocalImage(local, "latest"), LayoutTarget(out), key=key)
    (row,) = report.platforms
    image.push(f"{name}:1")
    for digest in (row.manifest_digest, row.artifact_digest):
        tag = fallback_tag(digest)
        skopeo("copy", "--all", "--dest-tls-verify=false", f"oci:{out}:{tag}", f"docker://{name}:{tag}")
    found = await run(client, name, key=key)
    assert (found.platforms[0].how, found.platforms[0].artifact_digest) == (PRESENT, row.artifact_digest)
    assert row.artifact_digest == (await run(client, name, force=True)).platforms[0].artifact_digest


async def test_skopeo_lists_and_copies_the_artifact(
    client: RegistryClient, image: Image, name: str, tmp_path: Path
) -> None:
    image.push(f"{name}:1")
    row = (await run(client, name)).platforms[0]
    source = f"docker://{name}@{row.artifact_digest}"
    raw = skopeo("inspect", "--raw", "--tls-verify=false", source)
    assert json.loads(raw)["artifactType"] == artifact.ARTIFACT_TYPE
    assert fallback_tag(row.manifest_digest) in skopeo("list-tags", "--tls-verify=false", f"docker://{name}")
    skopeo("copy", "--src-tls-verify=false", source, f"oci:{tmp_path}/copy:index")
    skopeo("copy", "--dest-tls-verify=false", f"oci:{tmp_path}/copy:index", f"docker://{name}-copy:index")
    assert (await client.resolve(Reference.parse(f"{name}-copy:index"))).digest == row.artifact_digest


def skopeo(verb: str, *arguments: str) -> str:
    options = ["--insecure-policy"]
    done = subprocess.run(["skopeo", *options, verb, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


async def test_a_tag_that_moves_meanwhile_is_said_and_changes_nothing(
    client: RegistryClient, image: Image, larger: Image, name: str
) -> None:
    class Moving(RegistryImage):
        async def origins(self, layer: Descriptor) -> list[Origin]:
            await asyncio.to_thread(larger.push, f"{name}:1")
            return await super().origins(layer)

    image.push(f"{name}:1")
    reference = Reference.parse(f"{name}:1")
    report = await index_image(Moving(client, reference), RegistryTarget(client, reference, HINT))
    assert (report.digest, report.moved_to) == (image.manifest.digest, larger.manifest.digest)
    await artifact_of(client, name, image.manifest.digest)
    assert await client.referrers(Reference.parse(f"{name}:1"), larger.manifest.digest) == []


# ---- images of several platforms


async def push_index(
    client: RegistryClient, name: str, members: Sequence[tuple[Image, str]], others: Sequence[dict[str, Any]] = ()
) -> str:
    """Push an index of images under the tag "all"; return its digest."""
    entries: list[dict[str, Any]] = []
    reference = Reference.parse(f"{name}:all")
    for image, platform in members:
        blobs = image.layout / "blobs/sha256"
        raw = (blobs / image.manifest.digest[7:]).read_bytes()
        document = json.loads(raw)
        for item in (document["config"], *document["layers"]):
            await client.push_blob(reference, item["digest"], item["size"], (blobs / item["digest"][7:]).read_bytes())
        await client.push_manifest(reference.at(image.manifest.digest), raw, media_types.OCI_MANIFEST)
        os_, architecture = platform.split("/")
        entries.append({
            **image.manifest.json(), "platform": {"os": os_, "architecture": architecture},
            "annotations": {"of": platform},
        })  # fmt: skip
    document = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": [*entries, *others],
                "annotations": {"kept": "yes"}}  # fmt: skip
    return (await client.push_manifest(reference, json.dumps(document).encode(), media_types.OCI_INDEX)).digest


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Image:
    """An image for another machine, that shares its lower layer with `image`."""
    layout = Layout(tmp_path_factory.mktemp("arm"))
    made = made_image(layout.directory, 1)
    with layout.layer("gzip") as writer:
        writer.write_raw(tar_of(file(b"arm", b"only")))
    return layout.add_image("arm", [*made.layers, writer.result], command=[], environment={}, unpacked_size=0,
                            files=0, architecture="riscv64")  # fmt: skip


MACHINE = f"linux/{images.ARCHITECTURE}"
OTHER = "linux/riscv64"


async def test_the_machines_platform_is_the_default_and_the_rest_is_named(
    client: RegistryClient, image: Image, arm: Image, name: str
) -> None:
    top = await push_index(client, name, [(image, MACHINE), (arm, OTHER)])
    report = await run(client, name, "all")
    assert (report.digest, report.left_out) == (top, (OTHER,))
    assert [(r.platform, r.manifest_digest) for r in report.platforms] == [(MACHINE, image.manifest.digest)]


async def test_all_platforms_share_layers(
    registry: DockerRegistry, client: RegistryClient, image: Image, arm: Image, name: str
) -> None:
    await push_index(client, name, [(image, MACHINE), (arm, OTHER)])
    report = await run(client, name, "all", every=True)
    assert {row.manifest_digest for row in report.platforms} == {image.manifest.digest, arm.manifest.digest}
    shared = image.layers[0].blob.digest
    assert layer_gets(registry, image, name).count(shared) == 1
    again = await run(client, name, "all", platforms=[platforms.parse(OTHER)])
    assert [(row.how, row.platform) for row in again.platforms] == [(PRESENT, OTHER)]
    with pytest.raises(NoSuchPlatform, match="there is"):
        await run(client, name, "all", platforms=[platforms.parse("linux/s390x")])


# ---- registries that do not play along


@pytest.fixture
async def fake() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as running:
        yield running


LAYERS = [tar_of(file(b"a", random.Random(1).randbytes(400_000))), tar_of(file(b"b", b"two" * 1000))]


async def on_fake(fake: FakeRegistry, tag: str = "1", **options: Any) -> IndexReport:
    client = client_for(fake.host)
    try:
        return await run(client, f"{fake.host}/app", tag, **options)
    finally:
        await client.close()


@pytest.mark.parametrize("code", [403, 405])
async def test_a_registry_that_may_only_be_read_is_said_before_any_layer_is_read(fake: FakeRegistry, code: int) -> None:
    fake.add_image("app", "1", LAYERS)
    fake.read_only = code
    with pytest.raises(AccessDenied if code == 403 else Unsupported) as caught:
        await on_fake(fake)
    assert "cannot be pushed" in caught.value.message
    assert "--output DIR" in str(caught.value)
    assert not [seen for seen in fake.seen if digests.of(LAYERS[0]) in seen.path]


async def test_what_a_registry_does_not_take_can_be_written_to_a_directory(fake: FakeRegistry, tmp_path: Path) -> None:
    fake.add_image("app", "1", LAYERS)
    fake.read_only = 403
    client = client_for(fake.host)
    source = RegistryImage(client, Reference.parse(f"{fake.host}/app:1"))
    report = await index_image(source, LayoutTarget(tmp_path / "out"))
    await client.close()
    written = await asyncio.to_thread(open_layout, tmp_path / "out")
    assert written.named(report.platforms[0].artifact_digest).artifact_type == artifact.ARTIFACT_TYPE
    assert {seen.method for seen in fake.seen} <= {"GET", "HEAD"}


async def test_a_registry_with_the_referrers_api_needs_no_tag(fake: FakeRegistry) -> None:
    fake.referrers_api = True
    fake.add_image("app", "1", LAYERS)
    report = await on_fake(fake)
    assert (await on_fake(fake)).platforms[0].how == PRESENT
    tag = fallback_tag(report.platforms[0].manifest_digest)
    assert ("app", tag) not in fake.manifests


async def test_wrong_layers_end_it_and_no_index_is_pushed(fake: FakeRegistry) -> None:
    fake.add_image("app", "1", LAYERS)
    digest = digests.of(LAYERS[0])
    fake.blobs[digest] = LAYERS[0][:-1] + b"x"
    with pytest.raises(DigestMismatch):
        await on_fake(fake)
    assert not [tag for _, tag in fake.manifests if tag.startswith("sha256-")]


async def test_the_list_of_known_layers_may_fail_without_harm(fake: FakeRegistry) -> None:
    fake.add_image("app", "1", LAYERS)
    fake.script("manifests/dadi-layers", *[status(405)] * 20)
    said = Said()
    report = await on_fake(fake, progress=said)
    assert report.platforms[0].how == MADE
    assert said.notices


async def test_an_index_that_lies_about_its_layers_is_passed_over(fake: FakeRegistry) -> None:
    fake.add_image("app", "1", LAYERS)
    fake.add_image("app", "2", LAYERS[:1])
    first = (await on_fake(fake, tag="2")).platforms[0]
    # what stands under the digest of the layer's index is another thing
    raw = fake.manifests["app", first.artifact_digest][1]
    index = json.loads(raw)["layers"][0]["digest"]
    fake.blobs[index] = b"x" * len(fake.blobs[index])
    said = Said()
    second = (await on_fake(fake, progress=said)).platforms[0]
    assert [layer.how for layer in second.layers] == [READ, READ]
    assert any("cannot be used" in notice for notice in said.notices)


# ---- the command line


def dadi(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    command = [sys.executable, "-m", "dadi.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def key_file(path: Path) -> Path:
    key = Ed25519PrivateKey.generate()
    path.write_bytes(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return path


def test_the_command_prints_one_json_object_and_nothing_else(image: Image, name: str, tmp_path: Path) -> None:
    image.push(f"{name}:1")
    key = key_file(tmp_path / "key.pem")
    arguments = ["index", f"{name}:1", "--plain-http", "--sign-key", str(key)]
    done = dadi(*arguments, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    assert said["platforms"][0]["how"] == "made"
    assert len(said["platforms"][0]["layers"]) == 2
    again = dadi(*arguments)
    assert (again.returncode, "nothing to do" in again.stdout) == (0, True)


def test_the_command_tells_its_progress_in_plain_lines(image: Image, name: str) -> None:
    image.push(f"{name}:1")
    done = dadi("index", f"{name}:1", "--plain-http", "--force")
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("layer ") == 2
    assert len(done.stderr.splitlines()) < 8
    assert "the index is pushed" in done.stdout


def test_the_command_needs_no_registry_with_layout_and_output(image: Image, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = dadi("index", "--oci-layout", str(image.layout), "--output", str(out))
    assert done.returncode == 0, done.stderr
    assert f"skopeo copy --all oci:{out}:sha256-{image.manifest.digest[7:]}" in done.stdout
    assert {path.name for path in out.iterdir()} == {"oci-layout", "index.json", "blobs"}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ([], "which IMAGE"),
        (["x", "--oci-layout", "a", "--docker-archive", "b"], "exclude each other"),
        (["x", "--platform", "linux/amd64", "--all-platforms"], "exclude each other"),
        (["127.0.0.1:1/x", "--sign-key", "/nowhere"], "cannot be read"),
        (["127.0.0.1:1/x", "--plain-http"], "no connection to 127.0.0.1:1"),
    ],
)
def test_what_makes_no_sense_is_said(arguments: list[str], why: str, tmp_path: Path) -> None:
    config = tmp_path / "cli.toml"
    config.write_text("[registry]\nretries = 0\n")
    done = dadi("index", *arguments, "--config", str(config))
    assert done.returncode != 0
    assert why in done.stderr
    assert "Traceback" not in done.stderr

