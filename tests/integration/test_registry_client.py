"""The registry client against a registry that misbehaves on demand: manifests, images, patience, TLS."""

from __future__ import annotations

import asyncio
import hashlib
import json
import ssl
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dadi.errors import (
    AccessDenied,
    ConfigError,
    DadiError,
    DigestMismatch,
    InvalidRequest,
    Malformed,
    NoSuchPlatform,
    NotFound,
    RegistryNotAllowed,
    TooLarge,
    Unavailable,
    Unsupported,
)
from dadi.oci import media_types as types
from dadi.oci import platforms
from dadi.oci.manifest import Descriptor
from dadi.oci.registry import RegistryClient
from tests.fakes.clients import AMD64, DATA, MakeClient, blob, read, ref
from tests.fakes.registry import FakeRegistry, FakeTime, Fault, redirect, status

# ---- manifests and images


@pytest.mark.parametrize("docker", [False, True])
async def test_an_image_is_found_by_its_tag(client: RegistryClient, registry: FakeRegistry, docker: bool) -> None:
    entry = registry.add_image("team/app", "1", [b"one", b"two"], docker=docker)
    image = await client.image(ref(registry), AMD64)
    assert image.descriptor.digest == entry["digest"]
    assert image.index_digest is None
    assert image.raw == registry.manifests["team/app", "1"][1]
    assert hashlib.sha256(image.config).hexdigest() == image.manifest.config.digest[7:]
    assert list(image.diff_ids) == ["sha256:" + hashlib.sha256(data).hexdigest() for data in (b"one", b"two")]
    assert image.platform == AMD64
    assert registry.seen[0].headers["Accept"] == types.ACCEPT


@pytest.mark.parametrize("media_type", [types.OCI_INDEX, types.DOCKER_INDEX])
async def test_an_index_leads_to_the_image_for_the_platform(
    client: RegistryClient, registry: FakeRegistry, media_type: str
) -> None:
    entries = [
        registry.add_image("team/app", None, [platform.encode()], platform=platform)
        for platform in ("linux/arm64", "linux/amd64", "linux/arm/v7")
    ]
    attestation = {**entries[0], "platform": {"os": "unknown", "architecture": "unknown"}}
    document = {"schemaVersion": 2, "mediaType": media_type, "manifests": [attestation, *entries]}
    digest, _ = registry.add_manifest("team/app", "1", document, media_type)
    image = await client.image(ref(registry), platforms.parse("linux/arm/v7"))
    assert image.descriptor.digest == entries[2]["digest"]
    assert image.index_digest == digest
    with pytest.raises(NoSuchPlatform, match=r"team/app:1: no image for linux/s390x") as failure:
        await client.image(ref(registry), platforms.parse("linux/s390x"))
    assert failure.value.hint == "there is linux/amd64, linux/arm/v7, linux/arm64"


async def test_an_index_within_an_index_is_followed(client: RegistryClient, registry: FakeRegistry) -> None:
    entry = registry.add_image("team/app", None, [b"x"])
    document: Any = {"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": [entry]}
    for _ in range(2):
        digest, size = registry.add_manifest("team/app", "1", document, types.OCI_INDEX)
        inner = {"mediaType": types.OCI_INDEX, "digest": digest, "size": size}
        document = {"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": [inner]}
    registry.add_manifest("team/app", "1", document, types.OCI_INDEX)
    assert (await client.image(ref(registry), AMD64)).descriptor.digest == entry["digest"]
    digest, size = registry.add_manifest("team/app", "1", document, types.OCI_INDEX)
    deeper = {"mediaType": types.OCI_INDEX, "digest": digest, "size": size}
    document = {"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": [deeper]}
    registry.add_manifest("team/app", "1", document, types.OCI_INDEX)
    with pytest.raises(Malformed, match="indexes within indexes"):
        await client.image(ref(registry), AMD64)


async def test_entries_that_name_no_platform_are_looked_at(client: RegistryClient, registry: FakeRegistry) -> None:
    entries = [registry.add_image("team/app", None, [b"x"], platform=f"linux/{arch}") for arch in ("arm64", "amd64")]
    for entry in entries:
        del entry["platform"]
    document = {"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": entries}
    registry.add_manifest("team/app", "1", document, types.OCI_INDEX)
    assert (await client.image(ref(registry), AMD64)).descriptor.digest == entries[1]["digest"]
    with pytest.raises(NoSuchPlatform):
        await client.image(ref(registry), platforms.parse("linux/s390x"))


async def test_an_image_for_another_platform_is_not_taken(client: RegistryClient, registry: FakeRegistry) -> None:
    registry.add_image("team/app", "1", [b"x"], platform="linux/arm64")
    with pytest.raises(NoSuchPlatform, match="linux/arm64"):
        await client.image(ref(registry), AMD64)


async def test_the_type_that_the_index_announced_must_be_right(client: RegistryClient, registry: FakeRegistry) -> None:
    entry = registry.add_image("team/app", None, [b"x"], docker=True)
    for wrong in ({"mediaType": types.OCI_MANIFEST}, {"size": entry["size"] + 1}):
        document = {"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": [entry | wrong]}
        registry.add_manifest("team/app", "1", document, types.OCI_INDEX)
        with pytest.raises(Malformed, match="team/app:1: "):
            await client.image(ref(registry), AMD64)


async def test_an_artifact_is_not_an_image(client: RegistryClient, registry: FakeRegistry) -> None:
    config = {"mediaType": types.OCI_EMPTY, "digest": registry.add_blob(b"{}"), "size": 2}
    document = {"schemaVersion": 2, "mediaType": types.OCI_MANIFEST, "config": config, "layers": []}
    registry.add_manifest("team/app", "1", document, types.OCI_MANIFEST)
    with pytest.raises(Unsupported, match="not a container image"):
        await client.image(ref(registry), AMD64)


async def test_a_tag_is_resolved_without_fetching_the_manifest(client: RegistryClient, registry: FakeRegistry) -> None:
    entry = registry.add_image("team/app", "1", [b"x"])
    found = await client.resolve(ref(registry))
    assert (found.digest, found.size, found.media_type) == (entry["digest"], entry["size"], types.OCI_MANIFEST)
    assert [seen.method for seen in registry.seen] == ["HEAD"]


@pytest.mark.parametrize(
    "fault", [status(405), status(200), status(200, Docker_Content_Digest="sha256:" + "0" * 64), status(501)]
)
async def test_a_head_that_does_not_say_enough_is_followed_by_a_get(
    client: RegistryClient, registry: FakeRegistry, fault: Fault
) -> None:
    entry = registry.add_image("team/app", "1", [b"x"])
    registry.script("/manifests/", fault, method="HEAD")
    assert (await client.resolve(ref(registry))).digest == entry["digest"]
    assert [seen.method for seen in registry.seen] == ["HEAD", "GET"]


async def test_what_does_not_exist_is_not_found(client: RegistryClient, registry: FakeRegistry) -> None:
    with pytest.raises(NotFound, match=r"team/app:1: .* answers 404 \(NAME_UNKNOWN there is no such thing\)"):
        await client.manifest(ref(registry))
    with pytest.raises(NotFound):
        await client.resolve(ref(registry))
    with pytest.raises(NotFound):
        await read(client, ref(registry), Descriptor("", "sha256:" + "0" * 64, 10))
    assert len(registry.seen) == 3


async def test_a_manifest_with_a_wrong_bit_is_fetched_again_and_then_refused(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    entry = registry.add_image("team/app", "1", [b"x"])
    registry.script("/manifests/", Fault(flip=20))
    found, raw = await client.manifest(ref(registry))
    assert found.digest == entry["digest"] == "sha256:" + hashlib.sha256(raw).hexdigest()
    registry.script("/manifests/", Fault(flip=20), Fault(flip=21))
    with pytest.raises(DigestMismatch) as failure:
        await client.manifest(ref(registry), entry["digest"])
    assert failure.value.source == registry.host


async def test_a_registry_that_gives_another_manifest_is_caught(client: RegistryClient, registry: FakeRegistry) -> None:
    asked, given = (registry.add_image("team/app", None, [data]) for data in (b"x", b"y"))
    registry.manifests["team/app", asked["digest"]] = registry.manifests["team/app", given["digest"]]
    with pytest.raises(DigestMismatch):
        await client.manifest(ref(registry, f"team/app@{asked['digest']}"))


async def test_a_config_with_a_wrong_bit_is_fetched_again(client: RegistryClient, registry: FakeRegistry) -> None:
    registry.add_image("team/app", "1", [b"x"])
    registry.script("/blobs/", Fault(flip=3))
    assert (await client.image(ref(registry), AMD64)).platform == AMD64


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_manifest_that_is_too_large_is_not_read(
    make: MakeClient, registry: FakeRegistry, chunked: bool
) -> None:
    registry.add_manifest("team/app", "1", b"{" + b" " * 5_000_000 + b"}", types.OCI_MANIFEST)
    registry.script("/manifests/", Fault(chunked=chunked))
    client = make(max_manifest_size=1 << 20)
    with pytest.raises(TooLarge, match="1048576"):
        await client.manifest(ref(registry))
    received = client.statistics()["bytes"]
    assert isinstance(received, int)
    assert received < 4_000_000


async def test_a_blob_of_another_size_than_announced_is_refused(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    for size in (len(DATA) - 1, len(DATA) + 1):
        with pytest.raises((DigestMismatch, TooLarge)):
            await client.blob_bytes(ref(registry), Descriptor("", descriptor.digest, size), 1 << 30)
        with pytest.raises(DigestMismatch):
            await read(client, ref(registry), Descriptor("", descriptor.digest, size))
    with pytest.raises(TooLarge):
        await client.blob_bytes(ref(registry), descriptor, 1000)
    assert await client.blob_bytes(ref(registry), descriptor, len(DATA)) == DATA


# ---- patience


async def test_retry_after_is_honoured(client: RegistryClient, registry: FakeRegistry, time: FakeTime) -> None:
    registry.add_image("team/app", "1", [b"x"])
    registry.script("/manifests/", status(429, Retry_After="7"), status(503, Retry_After="30"), status(500))
    began = time.now
    await client.resolve(ref(registry))
    assert [round(seconds, 3) for seconds in time.slept] == [7.2, 30.4, 0.8]
    assert time.now - began == pytest.approx(38.4)


async def test_a_wait_that_is_too_long_is_an_error_at_once(
    client: RegistryClient, registry: FakeRegistry, time: FakeTime
) -> None:
    registry.script("/manifests/", status(429, b'{"errors":[{"code":"TOOMANYREQUESTS"}]}', Retry_After="3600"))
    with pytest.raises(Unavailable, match=r"429.*TOOMANYREQUESTS") as failure:
        await client.manifest(ref(registry))
    assert failure.value.retry_after == 3600
    # Nor is it asked by anybody else until then.
    with pytest.raises(Unavailable, match="left alone"):
        await client.manifest(ref(registry, "team/other:1"))
    assert time.slept == []
    assert len(registry.seen) == 1


async def test_what_is_told_to_one_request_holds_for_all(
    client: RegistryClient, registry: FakeRegistry, time: FakeTime
) -> None:
    registry.add_image("team/app", "1", [b"x"])
    registry.script("/manifests/", status(429, Retry_After="5"))
    await asyncio.gather(*(client.resolve(ref(registry)) for _ in range(3)))
    began = time.now
    await client.resolve(ref(registry))
    assert time.now == began


@pytest.mark.parametrize(
    ("code", "error"),
    [(400, InvalidRequest), (403, AccessDenied), (410, NotFound), (418, Malformed), (451, AccessDenied)],
)
async def test_other_answers_are_errors_at_once(
    client: RegistryClient, registry: FakeRegistry, time: FakeTime, code: int, error: type[DadiError]
) -> None:
    registry.script("/manifests/", status(code))
    with pytest.raises(error, match=str(code)):
        await client.manifest(ref(registry))
    assert time.slept == []


async def test_the_words_of_a_registry_are_cut_and_cleaned(client: RegistryClient, registry: FakeRegistry) -> None:
    body = json.dumps({"errors": [{"code": "DENIED", "message": "\x1b[2J" + "x" * 10_000}]}).encode()
    registry.script("/manifests/", status(404, body))
    with pytest.raises(NotFound) as failure:
        await client.manifest(ref(registry))
    assert "\x1b" not in str(failure.value)
    assert len(str(failure.value)) < 400


# ---- TLS


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate for 127.0.0.1 that signs itself, with its key in the same file."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    command = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=test"
    command += f" -addext subjectAltName=IP:127.0.0.1 -keyout {path} -out {path}.crt"
    subprocess.run(command.split(), check=True, capture_output=True)
    path.write_text(path.read_text() + Path(f"{path}.crt").read_text())
    return path


@pytest.fixture
async def secure(certificate: Path) -> AsyncIterator[FakeRegistry]:
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate)
    async with FakeRegistry(tls=context) as running:
        yield running


@pytest.mark.programs("openssl")
async def test_an_authority_of_our_own_can_be_trusted(
    make: MakeClient, secure: FakeRegistry, certificate: Path
) -> None:
    client = make(allowed=("127.0.0.1",), plain_http=(), ca_file=str(certificate))
    descriptor = blob(secure)
    assert await read(client, ref(secure), descriptor) == DATA


@pytest.mark.programs("openssl")
async def test_a_certificate_that_nobody_knows_is_refused_at_once(
    make: MakeClient, secure: FakeRegistry, time: FakeTime
) -> None:
    client = make(allowed=("127.0.0.1",), plain_http=())
    with pytest.raises(ConfigError, match="certificate of 127") as failure:
        await client.resolve(ref(secure))
    assert "ca_file" in str(failure.value)
    assert time.slept == []
    assert secure.seen == []


@pytest.mark.programs("openssl")
async def test_https_is_not_left_for_plain_http(
    make: MakeClient, secure: FakeRegistry, registry: FakeRegistry, certificate: Path
) -> None:
    descriptor = blob(secure)
    registry.blobs = secure.blobs
    target = f"{registry.base}/cdn/{descriptor.digest}"
    secure.script("/blobs/", redirect(target), redirect(target))
    strict = make(allowed=("127.0.0.1",), plain_http=(), ca_file=str(certificate))
    with pytest.raises(RegistryNotAllowed, match="plain HTTP"):
        await read(strict, ref(secure), descriptor)
    assert registry.seen == []
    lenient = make(allowed=("127.0.0.1",), plain_http=(registry.host,), ca_file=str(certificate))
    assert await read(lenient, ref(secure), descriptor) == DATA


async def test_a_registry_without_tls_is_not_spoken_to_in_the_clear(
    make: MakeClient, registry: FakeRegistry, time: FakeTime
) -> None:
    client = make(allowed=("127.0.0.1",), plain_http=())
    with pytest.raises(ConfigError, match="does not speak TLS"):
        await client.resolve(ref(registry))
    assert registry.seen == []


async def test_a_ca_file_that_cannot_be_used_is_an_error(make: MakeClient, registry: FakeRegistry) -> None:
    for path in ("/nowhere/ca.pem", "/dev/null"):
        with pytest.raises(ConfigError, match="ca_file"):
            await make(ca_file=path).resolve(ref(registry))


async def test_a_client_can_be_closed_twice_and_without_having_been_used() -> None:
    client = RegistryClient()
    await client.close()
    await client.close()
    assert "0 requests" in repr(client)
