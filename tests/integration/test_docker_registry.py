"""The registry client against a real registry: Debian's docker-registry, filled by skopeo."""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dadi import digest as digests
from dadi.errors import AccessDenied, NoSuchPlatform, NotFound, Unavailable, Unsupported
from dadi.oci import media_types, platforms
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import Credentials, FixedCredentials
from dadi.oci.manifest import Descriptor, Manifest
from dadi.oci.manifest import parse as parse_manifest
from dadi.oci.reference import Reference
from dadi.oci.referrers import fallback_tag
from dadi.oci.registry import RegistryClient
from tests.fakes.registry import FakeTime
from tests.lab.oci_layout import Image, Layout
from tests.lab.registry import HTPASSWD, PASSWORD, USER, DockerRegistry

pytestmark = pytest.mark.programs("docker-registry", "skopeo")
AMD64 = platforms.parse("linux/amd64")


def made_image(directory: Path) -> Image:
    """Return an image of two layers, one of random bytes (3 MB), in a layout below `directory`."""
    layout = Layout(directory)
    layers = []
    for number, size in enumerate((3_000_000, 1000)):
        with layout.layer("none" if number == 0 else "gzip") as writer:
            tar = random.Random(number).randbytes(size - size % 512) + bytes(1024)
            writer.write_raw(tar)
        layers.append(writer.result)
    return layout.add_image("1", layers, command=["/x"], environment={}, unpacked_size=0, files=0)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return made_image(tmp_path_factory.mktemp("image"))


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory, image: Image) -> Iterator[DockerRegistry]:
    with DockerRegistry(tmp_path_factory.mktemp("registry")) as running:
        image.push(f"{running.host}/team/app:1")
        convert = ["skopeo", "copy", "--insecure-policy", "--dest-tls-verify=false", "--format=v2s2"]
        subprocess.run(
            [*convert, f"oci:{image.layout}:{image.tag}", f"docker://{running.host}/team/docker:1"],
            check=True,
            capture_output=True,
        )
        yield running


@pytest.fixture
async def client(registry: DockerRegistry) -> AsyncIterator[RegistryClient]:
    made = RegistryClient(RegistryConfig(plain_http=(registry.host,)), credentials=FixedCredentials())
    yield made
    await made.close()


async def test_an_image_that_skopeo_pushed_is_read(
    registry: DockerRegistry, client: RegistryClient, image: Image
) -> None:
    reference = Reference.parse(f"{registry.host}/team/app:1")
    assert (await client.resolve(reference)).digest == image.manifest.digest
    found = await client.image(reference, AMD64)
    assert found.descriptor.digest == image.manifest.digest
    assert [(layer.digest, layer.size) for layer in found.manifest.layers] == [
        (layer.blob.digest, layer.blob.size) for layer in image.layers
    ]
    assert list(found.diff_ids) == [layer.diff_id for layer in image.layers]
    for layer in found.manifest.layers:
        hasher = hashlib.sha256()
        async for piece in client.blob(reference, layer):
            hasher.update(piece)
        assert f"sha256:{hasher.hexdigest()}" == layer.digest


async def test_an_image_in_dockers_own_format_is_read(registry: DockerRegistry, client: RegistryClient) -> None:
    reference = Reference.parse(f"{registry.host}/team/docker:1")
    found = await client.image(reference, AMD64)
    assert found.manifest.media_type == media_types.DOCKER_MANIFEST
    for layer, diff_id in zip(found.manifest.layers, found.diff_ids, strict=True):
        data = await client.blob_bytes(reference, layer, 1 << 30)
        if media_types.compression(layer.media_type) is media_types.Compression.NONE:
            assert digests.of(data) == diff_id


async def test_parts_of_blobs_are_read(registry: DockerRegistry, client: RegistryClient) -> None:
    reference = Reference.parse(f"{registry.host}/team/app:1")
    layer = (await client.image(reference, AMD64)).manifest.layers[0]
    whole = await client.blob_bytes(reference, layer, 1 << 30)
    assert await client.blob_range(reference, layer, 1_000_000, 512) == whole[1_000_000:1_000_512]
    rest = b"".join([piece async for piece in client.blob(reference, layer, offset=2_999_000)])
    assert rest == whole[2_999_000:]
    assert await client.blob_range(reference, layer, layer.size - 1, 1) == whole[-1:]


async def test_the_access_log_tells_what_was_read(registry: DockerRegistry, client: RegistryClient) -> None:
    reference = Reference.parse(f"{registry.host}/team/app:1")
    layer = (await client.image(reference, AMD64)).manifest.layers[0]
    before = registry.blob_traffic()
    await client.blob_bytes(reference, layer, 1 << 30)
    await client.blob_range(reference, layer, 0, 100)
    after = registry.blob_traffic()
    assert after.requests - before.requests == 2
    assert after.size - before.size == layer.size + 100


async def test_what_is_not_there_is_said_in_the_registrys_words(
    registry: DockerRegistry, client: RegistryClient
) -> None:
    reference = Reference.parse(f"{registry.host}/team/app:none")
    with pytest.raises(NotFound, match="MANIFEST_UNKNOWN"):
        await client.image(reference, AMD64)
    with pytest.raises(NoSuchPlatform, match="linux/amd64"):
        await client.image(Reference.parse(f"{registry.host}/team/app:1"), platforms.parse("linux/s390x"))


async def test_a_registry_that_comes_back_is_used_again(tmp_path: Path, image: Image) -> None:
    time = FakeTime()
    with DockerRegistry(tmp_path) as registry:
        image.push(f"{registry.host}/team/app:1")
        client = RegistryClient(
            RegistryConfig(plain_http=(registry.host,)), credentials=FixedCredentials(), clock=time.clock()
        )
        reference = Reference.parse(f"{registry.host}/team/app:1")
        await client.resolve(reference)
        registry.stop()
        with pytest.raises(Unavailable):
            await client.resolve(reference)
        registry.start()
        assert (await client.resolve(reference)).digest == image.manifest.digest
        await client.close()


async def test_a_registry_with_passwords_wants_the_right_one(
    tmp_path: Path, image: Image, monkeypatch: pytest.MonkeyPatch
) -> None:
    with DockerRegistry(tmp_path / "registry", htpasswd=HTPASSWD) as registry:
        image.push(f"{registry.host}/team/app:1", options=[f"--dest-creds={USER}:{PASSWORD}"])
        config = RegistryConfig(plain_http=(registry.host,))
        reference = Reference.parse(f"{registry.host}/team/app:1")
        for wrong in ({}, {registry.host: Credentials(USER, "wrong")}):
            client = RegistryClient(config, credentials=FixedCredentials(wrong))
            with pytest.raises(AccessDenied, match="docker login"):
                await client.image(reference, AMD64)
            await client.close()
        # As Docker's command line would have written it.
        auth = Credentials(USER, PASSWORD).basic.removeprefix("Basic ")
        (tmp_path / "config.json").write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
        monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
        client = RegistryClient(config)
        assert (await client.image(reference, AMD64)).descriptor.digest == image.manifest.digest
        await client.close()
        answers = [request.status for request in registry.access_log() if request.path.endswith("/manifests/1")]
        assert answers[-2:] == [401, 200]


async def test_a_docker_registry_as_a_mirror(registry: DockerRegistry, image: Image) -> None:
    config = RegistryConfig(
        allowed=("registry.example",),
        plain_http=(registry.host,),
        mirrors={"registry.example": (registry.host,)},
    )
    client = RegistryClient(config, credentials=FixedCredentials())
    found = await client.image(Reference.parse("registry.example/team/app:1"), AMD64)
    assert found.descriptor.digest == image.manifest.digest
    await client.close()


# ---- pushing

KIND = "application/vnd.example.kind"
BLOB = random.Random(5).randbytes(5_000_000)


async def pieces() -> AsyncIterator[bytes]:
    for at in range(0, len(BLOB), 1_000_000):
        yield BLOB[at : at + 1_000_000]


def artifact(subject: Descriptor, **annotations: str) -> bytes:
    """Return an artifact of the one layer BLOB."""
    document = {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_MANIFEST,
        "artifactType": KIND,
        "config": {"mediaType": media_types.OCI_EMPTY, "digest": digests.of(b"{}"), "size": 2},
        "layers": [{"mediaType": "application/vnd.example.blob", "digest": digests.of(BLOB), "size": len(BLOB)}],
        "subject": {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size},
        "annotations": annotations,
    }
    return json.dumps(document).encode()


def skopeo(*arguments: str) -> bytes:
    return subprocess.run(["skopeo", *arguments], check=True, capture_output=True).stdout


async def push_blobs(client: RegistryClient, reference: Reference) -> None:
    assert await client.push_blob(reference, digests.of(BLOB), len(BLOB), pieces)
    assert await client.push_blob(reference, digests.of(b"{}"), 2, b"{}")


async def test_an_artifact_is_pushed_beside_an_image_and_others_can_list_and_copy_it(
    registry: DockerRegistry, client: RegistryClient, tmp_path: Path
) -> None:
    reference = Reference.parse(f"{registry.host}/team/app:1")
    subject = await client.resolve(reference)
    assert await client.referrers(reference, subject.digest) == []
    await push_blobs(client, reference)
    assert not await client.push_blob(reference, digests.of(BLOB), len(BLOB), pieces)
    raw = artifact(subject, number="1")
    pushed = await client.push_referrer(reference, raw, media_types.OCI_MANIFEST, subject.digest)
    assert await client.referrers(reference, subject.digest, KIND) == [pushed]
    assert (await client.resolve(reference)).digest == subject.digest
    # What skopeo sees: the list under the fallback tag, the artifact, its blobs.
    name = f"docker://{registry.host}/team/app"
    index = json.loads(skopeo("inspect", "--raw", "--tls-verify=false", f"{name}:{fallback_tag(subject.digest)}"))
    assert index["manifests"] == [
        {
            "mediaType": media_types.OCI_MANIFEST,
            "digest": pushed.digest,
            "size": len(raw),
            "artifactType": KIND,
            "annotations": {"number": "1"},
        }
    ]
    assert skopeo("inspect", "--raw", "--tls-verify=false", f"{name}@{pushed.digest}") == raw
    copy = ["copy", "--insecure-policy", "--src-tls-verify=false"]
    skopeo(*copy, f"{name}@{pushed.digest}", f"oci:{tmp_path / 'copy'}")
    assert (tmp_path / "copy/blobs/sha256" / digests.of(BLOB)[7:]).read_bytes() == BLOB
    assert (tmp_path / "copy/blobs/sha256" / pushed.digest[7:]).read_bytes() == raw


async def test_an_image_is_copied_with_mounts_and_pushes(
    registry: DockerRegistry, client: RegistryClient, image: Image
) -> None:
    source, target = (Reference.parse(f"{registry.host}/team/{name}:1") for name in ("app", "copy"))
    descriptor, raw = await client.manifest(source)
    manifest = parse_manifest(raw)
    assert isinstance(manifest, Manifest)
    first, *others = manifest.layers
    assert await client.mount_blob(target, first.digest, first.size, "team/app")
    assert not await client.mount_blob(target, digests.of(b"nobody has it"), 3, "team/app")
    for part in (manifest.config, *others):
        assert await client.push_blob(target, part.digest, part.size, lambda part=part: client.blob(source, part))
    pushed = await client.push_manifest(target, raw, descriptor.media_type)
    assert (pushed.digest, pushed.subject_known) == (descriptor.digest, False)
    assert (await client.image(target, AMD64)).descriptor.digest == image.manifest.digest


async def test_ten_that_list_something_at_once_lose_nothing(registry: DockerRegistry, client: RegistryClient) -> None:
    """Ten clients, as in ten processes: the registry has no compare-and-swap."""
    reference = Reference.parse(f"{registry.host}/team/race:1")
    await push_blobs(client, reference)
    subject = Descriptor(media_types.OCI_MANIFEST, digests.of(b"subject"), 7)
    config = RegistryConfig(plain_http=(registry.host,))
    clients = [RegistryClient(config, credentials=FixedCredentials()) for _ in range(10)]

    async def push(number: int) -> Descriptor:
        raw = artifact(subject, number=str(number))
        return await clients[number].push_referrer(reference, raw, media_types.OCI_MANIFEST, subject.digest)

    pushed = await asyncio.gather(*map(push, range(10)), return_exceptions=True)
    for one in clients:
        await one.close()
    found = await client.referrers(reference, subject.digest)
    assert len(found) == 10
    assert set(found) == set(pushed)


async def test_ten_changes_at_once_in_one_client_lose_nothing(registry: DockerRegistry, client: RegistryClient) -> None:
    reference = Reference.parse(f"{registry.host}/team/changes:1")
    await push_blobs(client, reference)
    new = []
    for number in range(10):
        raw = artifact(Descriptor(media_types.OCI_MANIFEST, digests.of(b"other"), 7), number=str(number))
        digest = (await client.push_manifest(reference.at(digests.of(raw)), raw, media_types.OCI_MANIFEST)).digest
        new.append(Descriptor(media_types.OCI_MANIFEST, digest, len(raw)))

    async def add(descriptor: Descriptor) -> None:
        await client.update_index(
            reference, "list", lambda entries: entries if descriptor in entries else [*entries, descriptor]
        )

    await asyncio.gather(*map(add, new))
    assert set(await client.tagged_index(reference, "list")) == set(new)
    await client.update_index(reference, "list", lambda entries: [])
    assert await client.tagged_index(reference, "list") == []


async def test_a_docker_registry_that_is_read_only_says_so(tmp_path: Path, image: Image) -> None:
    with DockerRegistry(
        tmp_path, environment={"REGISTRY_STORAGE_MAINTENANCE_READONLY": '{"enabled": true}'}
    ) as registry:
        client = RegistryClient(RegistryConfig(plain_http=(registry.host,)), credentials=FixedCredentials())
        reference = Reference.parse(f"{registry.host}/team/app:1")
        for call in (
            client.push_blob(reference, digests.of(b"x"), 1, b"x"),
            client.push_manifest(reference, b'{"schemaVersion":2}', media_types.OCI_MANIFEST),
        ):
            with pytest.raises(Unsupported, match=r"405.*--output DIR"):
                await call
        await client.close()


async def test_pushing_to_a_registry_with_passwords_wants_the_right_one(tmp_path: Path) -> None:
    with DockerRegistry(tmp_path, htpasswd=HTPASSWD) as registry:
        config = RegistryConfig(plain_http=(registry.host,))
        reference = Reference.parse(f"{registry.host}/team/app:1")
        for user, fine in ((Credentials(USER, "wrong"), False), (Credentials(USER, PASSWORD), True)):
            client = RegistryClient(config, credentials=FixedCredentials({registry.host: user}))
            if fine:
                await push_blobs(client, reference)
                assert await client.has_blob(reference, digests.of(BLOB))
            else:
                with pytest.raises(AccessDenied, match=r"docker login.*--output DIR"):
                    await client.push_blob(reference, digests.of(BLOB), len(BLOB), pieces)
            await client.close()
        puts = [request.status for request in registry.access_log() if request.method == "PUT"]
        assert puts == [201, 201]  # nobody's bytes were sent in vain
