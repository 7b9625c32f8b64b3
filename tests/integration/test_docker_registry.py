"""The registry client against a real registry: Debian's docker-registry, filled by skopeo."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from dadi import digest as digests
from dadi.errors import AccessDenied, NoSuchPlatform, NotFound, Unavailable
from dadi.oci import media_types, platforms
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import Credentials, FixedCredentials
from dadi.oci.reference import Reference
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
