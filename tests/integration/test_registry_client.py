"""The registry client against a registry that misbehaves on demand (tests/fakes/registry.py)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import random
import socket
import ssl
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

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
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import Credentials, FixedCredentials
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from tests.fakes.registry import FakeRegistry, FakeTime, Fault, cut, redirect, status

AMD64 = platforms.parse("linux/amd64")
DATA = random.Random(1).randbytes(1_000_000)
SECRET = Credentials("me", "secret")

MakeClient = Callable[..., RegistryClient]


@pytest.fixture
def time() -> FakeTime:
    return FakeTime()


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as running:
        yield running


@pytest.fixture
async def other() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as running:
        yield running


@pytest.fixture
async def make(time: FakeTime, registry: FakeRegistry, other: FakeRegistry) -> AsyncIterator[MakeClient]:
    """Make clients for both registries; they are closed in the end."""
    made: list[RegistryClient] = []

    def make(credentials: dict[str, Credentials] | None = None, **config: Any) -> RegistryClient:
        config.setdefault("plain_http", (registry.host, other.host))
        config.setdefault("read_timeout", 10.0)
        client = RegistryClient(RegistryConfig(**config), credentials=FixedCredentials(credentials), clock=time.clock())
        made.append(client)
        return client

    yield make
    for client in made:
        await client.close()


@pytest.fixture
def client(make: MakeClient) -> RegistryClient:
    return make()


def ref(registry: FakeRegistry, rest: str = "team/app:1") -> Reference:
    return Reference.parse(f"{registry.host}/{rest}")


def blob(registry: FakeRegistry, data: bytes = DATA) -> Descriptor:
    return Descriptor(types.OCI_LAYER, registry.add_blob(data), len(data))


async def read(client: RegistryClient, reference: Reference, descriptor: Descriptor, **options: Any) -> bytes:
    return b"".join([piece async for piece in client.blob(reference, descriptor, **options)])


def hosts_of(client: RegistryClient) -> list[dict[str, Any]]:
    hosts = client.statistics()["hosts"]
    assert isinstance(hosts, list)
    return hosts


def ranges(registry: FakeRegistry) -> list[str | None]:
    return [seen.headers.get("Range") for seen in registry.asked("/blobs/")]


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


# ---- downloads that break


async def test_a_blob_is_read_whole_or_from_an_offset(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    assert await read(client, ref(registry), descriptor) == DATA
    assert await read(client, ref(registry), descriptor, offset=999_999) == DATA[-1:]
    assert await read(client, ref(registry), descriptor, offset=1_000_000) == b""
    assert ranges(registry) == [None, "bytes=999999-999999"]
    for offset in (-1, 1_000_001):
        with pytest.raises(InvalidRequest):
            client.blob(ref(registry), descriptor, offset=offset)


async def test_an_empty_blob_needs_no_request(client: RegistryClient, registry: FakeRegistry) -> None:
    assert await read(client, ref(registry), blob(registry, b"")) == b""
    assert registry.seen == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_download_that_is_cut_goes_on_where_it_stopped(
    client: RegistryClient, registry: FakeRegistry, time: FakeTime, chunked: bool
) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", *[cut(100_000, chunked=chunked)] * 7)
    assert await read(client, ref(registry), descriptor) == DATA
    assert ranges(registry) == [None, *(f"bytes={n * 100_000}-999999" for n in range(1, 8))]
    # Each cut came after progress, so patience never ran out and the waits did not grow.
    assert time.slept == [0.2] * 7
    assert client.statistics()["resumed"] == 7


async def test_a_trickle_is_no_progress(client: RegistryClient, registry: FakeRegistry, time: FakeTime) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", *[cut(1000)] * 50)
    with pytest.raises(Unavailable, match="gave up after 6 attempts"):
        await read(client, ref(registry), descriptor)
    assert time.slept == [0.2, 0.4, 0.8, 1.6, 3.2]


async def test_a_200_to_a_range_request_does_not_put_wrong_bytes_in(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", cut(300_000), cut(700_000, ignore_range=True), Fault(ignore_range=True, chunked=True))
    assert await read(client, ref(registry), descriptor) == DATA
    assert len(ranges(registry)) == 3


async def test_a_200_that_never_gets_further_is_given_up(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", cut(500_000), *[cut(500_000, ignore_range=True)] * 20)
    with pytest.raises(Unavailable):
        await read(client, ref(registry), descriptor)
    assert len(ranges(registry)) == 1 + 5


@pytest.mark.parametrize(
    "content_range",
    [
        "",
        "bytes 0-699999/1000000",
        "bytes 300001-999999/1000000",
        "bytes 300000-999998/1000000",
        "bytes */1000000",
        "x",
    ],
)
async def test_a_206_with_other_bytes_is_refused(
    client: RegistryClient, registry: FakeRegistry, content_range: str
) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", cut(300_000), Fault(headers={"Content-Range": content_range}))
    assert await read(client, ref(registry), descriptor) == DATA
    assert len(ranges(registry)) == 3


async def test_a_206_of_another_blob_is_refused(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    wrong = Fault(headers={"Content-Range": "bytes 300000-999999/1000001"})
    registry.script("/blobs/", cut(300_000), wrong, wrong)
    with pytest.raises(DigestMismatch, match="1000001"):
        await read(client, ref(registry), descriptor)


async def test_a_body_that_goes_on_too_long_is_refused(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    short = Descriptor("", descriptor.digest, 10)
    registry.script("/blobs/", *[Fault(chunked=True)] * 3)
    with pytest.raises(DigestMismatch, match="longer"):
        await read(client, ref(registry), short)


async def test_a_registry_that_stalls_is_left_and_asked_again(make: MakeClient, registry: FakeRegistry) -> None:
    client = make(read_timeout=0.05)
    descriptor = blob(registry)
    registry.script("/blobs/", Fault(stall_after=400_000), Fault(stall_after=0))
    assert await read(client, ref(registry), descriptor) == DATA
    assert ranges(registry) == [None, "bytes=400000-999999", "bytes=400000-999999"]


async def test_dropped_connections_are_made_again(
    client: RegistryClient, registry: FakeRegistry, time: FakeTime
) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", Fault(drop=True), Fault(drop=True), Fault(drop=True))
    assert await read(client, ref(registry), descriptor) == DATA
    assert len(time.slept) in (1, 2, 3)  # the HTTP library repeats a request once on a kept connection by itself


async def test_a_registry_that_does_not_listen_is_unavailable(make: MakeClient, time: FakeTime) -> None:
    async with FakeRegistry() as gone:
        pass
    client = make(plain_http=(gone.host,), retries=2)
    with pytest.raises(Unavailable, match=r"no connection to 127\.0\.0\.1:\d+: .*gave up after 3 attempts"):
        await client.resolve(ref(gone))
    assert time.slept == [0.2, 0.4]


async def test_a_registry_that_does_not_accept_connections_is_given_up(make: MakeClient) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # fill the queue, so that the kernel does not answer any more
            client_socket = stack.enter_context(socket.socket())
            client_socket.setblocking(False)
            client_socket.connect_ex(server.getsockname())
        host = f"127.0.0.1:{server.getsockname()[1]}"
        client = make(plain_http=(host,), connect_timeout=0.05, retries=0)
        with pytest.raises(Unavailable, match=r"no connection to .* within 0\.05 s"):
            await client.resolve(Reference.parse(f"{host}/a:1"))


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n",
        b"\x00" * 100,
        b"HTTP/1.1 999999 x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_does_not_speak_http_is_unavailable(make: MakeClient, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = make(plain_http=(host,), retries=1)
        with pytest.raises(Unavailable, match=host):
            await client.manifest(Reference.parse(f"{host}/a:1"))


_faults = st.lists(
    st.builds(
        Fault,
        cut_after=st.none() | st.integers(0, 1_000_000),
        ignore_range=st.booleans(),
        chunked=st.booleans(),
    )
    | st.sampled_from([Fault(drop=True), status(503), status(429, Retry_After="1"), status(500), redirect("/v2/x")])
    | st.integers(0, 10).map(lambda n: Fault(headers={"Content-Range": f"bytes {n * 100_000}-999999/1000000"})),
    max_size=8,
)


@given(_faults, st.integers(0, 1_000_000))
@settings(max_examples=40)
def test_whatever_goes_wrong_no_wrong_bytes_come_out(faults: list[Fault], offset: int) -> None:
    async def run() -> None:
        async with FakeRegistry() as registry:
            config = RegistryConfig(plain_http=(registry.host,), retries=3)
            client = RegistryClient(config, credentials=FixedCredentials(), clock=FakeTime().clock())
            descriptor = blob(registry)
            registry.script("/blobs/", *faults)
            got = b""
            try:
                async for piece in client.blob(ref(registry), descriptor, offset=offset):
                    got += piece
                assert got == DATA[offset:]
            except DadiError:
                assert faults
                assert DATA[offset:].startswith(got)
            finally:
                await client.close()

    asyncio.run(run())


async def test_a_reader_may_leave_early(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    async with contextlib.aclosing(client.blob(ref(registry), descriptor)) as pieces:
        first = await anext(pieces)
    assert DATA.startswith(first)
    assert await read(client, ref(registry), descriptor) == DATA


async def test_a_cancelled_reader_leaves_the_client_usable(make: MakeClient, registry: FakeRegistry) -> None:
    client = make()
    descriptor = blob(registry)
    stalled = asyncio.Event()
    registry.script("/blobs/", Fault(stall_after=10, after=stalled.set))
    task = asyncio.create_task(read(client, ref(registry), descriptor))
    await stalled.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await read(client, ref(registry), descriptor) == DATA


async def test_ranges_are_exact(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    assert await client.blob_range(ref(registry), descriptor, 1000, 5) == DATA[1000:1005]
    assert await client.blob_range(ref(registry), descriptor, 0, 5) == DATA[:5]
    assert await client.blob_range(ref(registry), descriptor, 999_000, 1000) == DATA[-1000:]
    assert await client.blob_range(ref(registry), descriptor, 0, 1_000_000) == DATA
    assert await client.blob_range(ref(registry), descriptor, 7, 0) == b""
    registry.script("/blobs/", cut(2000))
    assert await client.blob_range(ref(registry), descriptor, 10, 5000) == DATA[10:5010]
    for offset, length in ((-1, 5), (0, -1), (999_999, 2)):
        with pytest.raises(InvalidRequest):
            await client.blob_range(ref(registry), descriptor, offset, length)


@pytest.mark.parametrize("offset", [0, 1000])
async def test_a_registry_without_ranges_is_said_to_have_none(
    client: RegistryClient, registry: FakeRegistry, offset: int
) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", Fault(ignore_range=True))
    with pytest.raises(Unsupported, match="whole blob"):
        await client.blob_range(ref(registry), descriptor, offset, 5)
    assert len(registry.seen) == 1


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


# ---- redirects


async def test_a_redirect_is_followed_without_credentials(make: MakeClient, other: FakeRegistry) -> None:
    async with FakeRegistry(auth="basic", user="me", password="secret") as registry:
        client = make({registry.host: SECRET}, plain_http=(registry.host, other.host))
        descriptor = blob(registry)
        other.blobs = registry.blobs
        target = f"{other.base}/cdn/{descriptor.digest}?signature=a%2Bb%3D"
        registry.script("/blobs/", status(401, WWW_Authenticate="Basic realm=x"), redirect(target), redirect(target))
        other.script("/cdn/", cut(200_000))
        assert await read(client, ref(registry), descriptor) == DATA
        assert registry.seen[1].authorization is not None
        assert [seen.authorization for seen in other.seen] == [None, None]
        assert [seen.headers.get("Cookie") for seen in other.seen] == [None, None]
        assert other.seen[1].headers["Range"] == "bytes=200000-999999"
        assert other.seen[0].query == {"signature": "a+b="}


async def test_a_redirect_to_the_same_place_keeps_the_credentials(make: MakeClient) -> None:
    async with FakeRegistry(auth="basic", user="me", password="secret") as registry:
        client = make({registry.host: SECRET}, plain_http=(registry.host,))
        entry = registry.add_image("team/app", "1", [b"x"])
        registry.script("/manifests/", redirect("/v2/team/app/manifests/1"))
        assert (await client.manifest(ref(registry)))[0].digest == entry["digest"]


async def test_a_redirect_to_another_port_of_the_same_host_is_another_place(
    make: MakeClient, other: FakeRegistry
) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host, other.host))
        descriptor = blob(registry)
        other.blobs = registry.blobs
        registry.script("/blobs/", Fault(), redirect(f"{other.base}/cdn/{descriptor.digest}"))
        assert await read(client, ref(registry), descriptor) == DATA
        assert registry.seen[-1].authorization == "Bearer token-1"
        assert other.seen[0].authorization is None


async def test_a_challenge_from_where_it_redirects_to_is_not_answered(make: MakeClient, other: FakeRegistry) -> None:
    async with FakeRegistry(auth="basic", user="me", password="secret") as registry:
        client = make({registry.host: SECRET, other.host: SECRET}, plain_http=(registry.host, other.host), retries=1)
        descriptor = blob(registry)
        registry.script("/blobs/", *[redirect(f"{other.base}/cdn/x?signature=hidden")] * 9)
        other.script("/cdn/", *[status(401, WWW_Authenticate="Basic realm=x")] * 9)
        with pytest.raises(Unavailable, match="answers 401") as failure:
            await read(client, ref(registry), descriptor)
        assert "hidden" not in str(failure.value)
        assert {seen.authorization for seen in other.seen} == {None}


async def test_a_signed_link_that_has_run_out_is_asked_for_anew(
    client: RegistryClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    descriptor = blob(registry)
    other.blobs = registry.blobs
    target = f"{other.base}/cdn/{descriptor.digest}"
    registry.script("/blobs/", redirect(f"{target}?old"), redirect(f"{target}?new"))
    other.script("/cdn/", status(403))
    assert await read(client, ref(registry), descriptor) == DATA
    assert [list(seen.query) for seen in other.seen] == [["old"], ["new"]]


async def test_redirects_in_a_circle_end(make: MakeClient, registry: FakeRegistry) -> None:
    client = make(retries=1)
    registry.script("/manifests/", *[redirect("/v2/team/app/manifests/1")] * 100)
    with pytest.raises(Unavailable, match="circles"):
        await client.manifest(ref(registry))
    assert len(registry.seen) == 2 * 11


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("http://127.0.0.1:1/x", RegistryNotAllowed),
        ("http://cdn.example/x", RegistryNotAllowed),
        ("https://169.254.169.254/latest/meta-data/", RegistryNotAllowed),
        ("https://localhost/", RegistryNotAllowed),
        ("file:///etc/passwd", Malformed),
        ("https://user:secret@cdn.example/", Malformed),
    ],
)
async def test_redirects_to_where_nobody_should_go_are_not_followed(
    client: RegistryClient, registry: FakeRegistry, target: str, error: type[DadiError]
) -> None:
    registry.script("/manifests/", redirect(target))
    with pytest.raises(error):
        await client.manifest(ref(registry))
    assert len(registry.seen) == 1


async def test_a_redirect_without_a_target_is_malformed(client: RegistryClient, registry: FakeRegistry) -> None:
    registry.script("/manifests/", status(302))
    with pytest.raises(Malformed, match="no Location"):
        await client.manifest(ref(registry))


# ---- who we are


async def test_basic_credentials_are_shown_when_asked_for(make: MakeClient) -> None:
    async with FakeRegistry(auth="basic", user="me", password="secret") as registry:
        client = make({registry.host: SECRET}, plain_http=(registry.host,))
        registry.add_image("team/app", "1", [b"x"])
        await client.image(ref(registry), AMD64)
        shown = "Basic " + base64.b64encode(b"me:secret").decode()
        assert [seen.authorization for seen in registry.seen] == [None, shown, shown]


@pytest.mark.parametrize("kind", ["basic", "bearer"])
async def test_wrong_or_no_credentials_are_denied_after_one_try(make: MakeClient, kind: str) -> None:
    async with FakeRegistry(auth=kind, user="me", password="secret") as registry:
        for credentials in ({}, {registry.host: Credentials("me", "wrong")}):
            client = make(credentials, plain_http=(registry.host,))
            before = len(registry.seen)
            with pytest.raises(AccessDenied) as failure:
                await client.resolve(ref(registry))
            assert f"docker login {registry.host}" in str(failure.value)
            assert "wrong" not in failure.value.message
            assert len(registry.seen) - before <= 2


async def test_basic_credentials_that_changed_are_looked_up_again(make: MakeClient, time: FakeTime) -> None:
    class Rotating:
        def __init__(self) -> None:
            self.asked = 0

        async def get(self, registry: str) -> Credentials:
            self.asked += 1
            return Credentials("me", f"secret-{self.asked}")

    async with FakeRegistry(auth="basic", user="me", password="secret-1") as registry:
        config = RegistryConfig(plain_http=(registry.host,))
        client = RegistryClient(config, credentials=Rotating(), clock=time.clock())
        descriptor = blob(registry)
        await client.blob_range(ref(registry), descriptor, 0, 1)
        registry.password, registry.refuse_with = "secret-2", 403
        assert await client.blob_range(ref(registry), descriptor, 5, 1) == DATA[5:6]
        await client.close()


async def test_a_token_is_fetched_as_anybody_and_used_again(make: MakeClient) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host,))
        registry.add_image("team/app", "1", [b"x"])
        await client.image(ref(registry), AMD64)
        await client.image(ref(registry), AMD64)
        token = registry.asked("/token")
        assert len(token) == 1
        assert token[0].query == {"service": "fake", "scope": "repository:team/app:pull"}
        assert token[0].authorization is None
        assert client.statistics()["tokens"] == 1


async def test_a_token_is_bought_with_a_password(make: MakeClient) -> None:
    async with FakeRegistry(auth="bearer", user="me", password="secret") as registry:
        client = make({registry.host: SECRET}, plain_http=(registry.host,))
        registry.add_image("team/app", "1", [b"x"])
        await client.resolve(ref(registry))
        shown = [seen.authorization for seen in registry.seen]
        assert shown == [None, "Basic " + base64.b64encode(b"me:secret").decode(), "Bearer token-1"]


async def test_a_token_is_bought_with_an_identity_token(make: MakeClient) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        registry.refresh_token = "long-lived"
        client = make({registry.host: Credentials(identity_token="long-lived")}, plain_http=(registry.host,))
        registry.add_image("team/app", "1", [b"x"])
        await client.resolve(ref(registry))
        form = parse_qs(registry.asked("/token", "POST")[0].body)
        assert form == {
            "grant_type": ["refresh_token"],
            "refresh_token": ["long-lived"],
            "client_id": ["dadi"],
            "service": ["fake"],
            "scope": ["repository:team/app:pull"],
        }


async def test_a_registry_token_is_shown_as_it_is(make: MakeClient) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        registry.tokens.add("direct")
        client = make({registry.host: Credentials(registry_token="direct")}, plain_http=(registry.host,))
        registry.add_image("team/app", "1", [b"x"])
        await client.resolve(ref(registry))
        assert registry.asked("/token") == []


async def test_many_requests_fetch_one_token(make: MakeClient) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host,))
        registry.add_image("team/app", "1", [b"x"])
        await asyncio.gather(*(client.resolve(ref(registry)) for _ in range(20)))
        assert registry.issued == 1


async def test_each_repository_has_its_own_token(make: MakeClient) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host,))
        for name in ("a/a", "b/b"):
            registry.add_image(name, "1", [b"x"])
            await client.resolve(ref(registry, f"{name}:1"))
        assert [seen.query["scope"] for seen in registry.asked("/token")] == [
            "repository:a/a:pull",
            "repository:b/b:pull",
        ]


@pytest.mark.parametrize("refuse_with", [401, 403])
async def test_a_token_that_runs_out_in_the_middle_of_a_download_is_renewed(
    make: MakeClient, time: FakeTime, refuse_with: int
) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host,))
        descriptor = blob(registry)

        def expire() -> None:
            registry.expire_tokens(refuse_with)

        registry.script("/blobs/", Fault(), cut(300_000, then=expire), Fault(), cut(400_000, then=expire))
        assert await read(client, ref(registry), descriptor) == DATA
        assert registry.issued == 3
        assert time.slept == [0.2, 0.2]


async def test_a_token_near_its_end_is_renewed_before_it_is_used(make: MakeClient, time: FakeTime) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host,))
        registry.add_image("team/app", "1", [b"x"])
        await client.resolve(ref(registry))
        time.now += 280
        await client.resolve(ref(registry))
        assert registry.issued == 1
        time.now += 15
        await client.resolve(ref(registry))
        assert registry.issued == 2
        assert registry.seen[-1].authorization == "Bearer token-2"
        assert registry.seen[-2].path == "/token"


async def test_a_registry_that_means_it_is_believed(make: MakeClient) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host,))
        registry.script("/manifests/", Fault(), status(403, b'{"errors":[{"code":"DENIED","message":"not yours"}]}'))
        with pytest.raises(AccessDenied, match="DENIED not yours"):
            await client.manifest(ref(registry))
        assert registry.issued == 1


async def test_a_token_endpoint_that_is_busy_is_asked_again(make: MakeClient, time: FakeTime) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host,))
        registry.add_image("team/app", "1", [b"x"])
        registry.script("/token", status(503, Retry_After="3"), Fault(drop=True))
        await client.resolve(ref(registry))
        assert time.slept[0] == pytest.approx(3.2)


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"token": 1}', b'{"token": ""}', b'{"token": "a\\r\\nX: y"}', b"x" * 2_000_000]
)
async def test_an_answer_that_is_no_token_is_malformed(make: MakeClient, body: bytes) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host,))
        registry.script("/token", status(200, body))
        with pytest.raises(Malformed, match="a token for"):
            await client.resolve(ref(registry))


@pytest.mark.parametrize(
    ("extra", "valid_for"),
    [({}, 54), ({"expires_in": -1}, 54), ({"expires_in": 1000}, 990), ({"expires_in": 1e308}, 1e9)],
)
async def test_odd_lifetimes_of_tokens(
    make: MakeClient, time: FakeTime, extra: dict[str, Any], valid_for: float
) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        registry.token_extra = extra
        client = make(plain_http=(registry.host,))
        registry.add_image("team/app", "1", [b"x"])
        await client.resolve(ref(registry))
        time.now += valid_for - 1
        await client.resolve(ref(registry))
        assert registry.issued == 1


@pytest.mark.parametrize(
    "realm",
    ["http://auth.example/token", "http://127.0.0.1:1/token", "https://127.0.0.1:1/token", "ftp://x/", "/token"],
)
async def test_no_credentials_go_to_a_realm_that_is_not_safe(make: MakeClient, realm: str) -> None:
    async with FakeRegistry(auth="bearer", user="me", password="secret") as registry:
        registry.realm = realm
        client = make({registry.host: SECRET}, plain_http=(registry.host,))
        with pytest.raises((RegistryNotAllowed, Malformed), match="tokens fetched at"):
            await client.resolve(ref(registry))
        assert [seen.authorization for seen in registry.seen] == [None]


async def test_a_token_endpoint_that_redirects_is_not_followed(make: MakeClient, other: FakeRegistry) -> None:
    async with FakeRegistry(auth="bearer", user="me", password="secret") as registry:
        client = make({registry.host: SECRET}, plain_http=(registry.host, other.host))
        registry.script("/token", redirect(f"{other.base}/token"))
        with pytest.raises(DadiError, match="307"):
            await client.resolve(ref(registry))
        assert other.seen == []


# ---- which hosts


@pytest.mark.parametrize("name", ["r.example/a:1", "169.254.169.254/a:1", "localhost:1/a:1", "10.0.0.1/a:1"])
async def test_a_registry_that_is_not_allowed_is_not_contacted(make: MakeClient, name: str) -> None:
    client = make(allowed=("*.internal", "??.0.0.1"))
    reference = Reference.parse(name)
    digest = Descriptor("", "sha256:" + "0" * 64, 1)
    with pytest.raises(RegistryNotAllowed):
        await client.resolve(reference)
    with pytest.raises(RegistryNotAllowed):
        await client.manifest(reference)
    with pytest.raises(RegistryNotAllowed):
        await client.image(reference, AMD64)
    with pytest.raises(RegistryNotAllowed):
        await read(client, reference, digest)
    with pytest.raises(RegistryNotAllowed):
        await client.blob_range(reference, digest, 0, 1)
    assert client.statistics()["requests"] == 0


async def test_a_name_that_leads_to_this_machine_is_refused_unless_it_is_named(
    make: MakeClient, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def getaddrinfo(host: str, port: int, **_: object) -> list[Any]:
        assert host == "innocent.example"
        return [(2, 1, 6, "", ("127.0.0.1", port))]

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    port = registry.host.partition(":")[2]
    registry.add_image("team/app", "1", [b"x"])
    reference = Reference.parse(f"innocent.example:{port}/team/app:1")
    with pytest.raises(RegistryNotAllowed, match=r"leads to 127\.0\.0\.1"):
        await make().resolve(reference)
    assert registry.seen == []
    await make(plain_http=(reference.registry,)).resolve(reference)
    assert len(registry.seen) == 1


async def test_a_name_that_does_not_exist_is_unavailable(make: MakeClient, monkeypatch: pytest.MonkeyPatch) -> None:
    async def getaddrinfo(*_: object, **__: object) -> list[Any]:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", getaddrinfo)
    with pytest.raises(Unavailable, match=r"the name nowhere\.example cannot be looked up"):
        await make(retries=0).resolve(Reference.parse("nowhere.example/a:1"))


# ---- mirrors


async def test_a_mirror_is_asked_first_and_the_registry_not_at_all(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    client = make(mirrors={registry.host: (f"{other.host}/hub",)})
    entry = other.add_image("hub/team/app", "1", [DATA])
    image = await client.image(ref(registry), AMD64)
    assert image.descriptor.digest == entry["digest"]
    assert await read(client, ref(registry), image.manifest.layers[0]) == DATA
    assert registry.seen == []
    assert {seen.query.get("ns") for seen in other.seen} == {registry.host}


async def test_what_a_mirror_does_not_have_comes_from_the_registry(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry, time: FakeTime
) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    entry = registry.add_image("team/app", "1", [b"x"])
    assert (await client.image(ref(registry), AMD64)).descriptor.digest == entry["digest"]
    assert time.slept == []


async def test_a_mirror_that_fails_is_left_alone_for_a_while(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry, time: FakeTime
) -> None:
    client = make(mirrors={registry.host: (other.host,)}, mirror_rest=60.0)
    registry.add_image("team/app", "1", [b"x"])
    other.add_image("team/app", "1", [b"x"])
    other.script("/manifests/", status(500))
    for _ in range(3):
        await client.resolve(ref(registry))
    assert len(other.seen) == 1
    mirror, origin = hosts_of(client)
    assert (mirror["host"], mirror["mirror_of"], mirror["left_alone"]) == (other.host, registry.host, 60.0)
    assert "500" in mirror["last_error"]
    assert (origin["host"], origin["mirror_of"], origin["failures"]) == (registry.host, None, 0)
    time.now += 61
    await client.resolve(ref(registry))
    assert len(other.seen) == 2
    assert len(registry.seen) == 3
    assert time.slept == []


async def test_a_download_that_breaks_at_a_mirror_goes_on_at_the_registry(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    descriptor = blob(registry)
    other.blobs = registry.blobs
    other.script("/blobs/", cut(600_000))
    assert await read(client, ref(registry), descriptor) == DATA
    assert ranges(registry) == ["bytes=600000-999999"]


async def test_a_mirror_that_lies_is_not_believed(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    entry = registry.add_image("team/app", "1", [DATA])
    lie = other.add_image("team/app", None, [b"lie"])
    other.manifests["team/app", entry["digest"]] = other.manifests["team/app", lie["digest"]]
    pinned = ref(registry, f"team/app@{entry['digest']}")
    assert (await client.image(pinned, AMD64)).descriptor.digest == entry["digest"]
    assert hosts_of(client)[0]["left_alone"] == 60.0


async def test_a_reader_can_do_without_mirrors(make: MakeClient, registry: FakeRegistry, other: FakeRegistry) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    descriptor = blob(registry)
    other.blobs[descriptor.digest] = bytes(len(DATA))
    assert await read(client, ref(registry), descriptor) == bytes(len(DATA))
    assert await read(client, ref(registry), descriptor, mirrors=False) == DATA


async def test_resting_mirrors_are_asked_when_the_registry_is_away(make: MakeClient, other: FakeRegistry) -> None:
    async with FakeRegistry() as gone:
        pass
    client = make(plain_http=(gone.host, other.host), mirrors={gone.host: (other.host,)})
    other.add_image("team/app", "1", [b"x"])
    other.script("/manifests/", status(500))
    await client.resolve(ref(gone))
    await client.resolve(ref(gone))
    assert len(other.seen) == 3


async def test_the_error_tells_of_the_mirrors_too(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    other.script("/manifests/", status(500))
    with pytest.raises(NotFound) as failure:
        await client.manifest(ref(registry))
    assert failure.value.hint is not None
    assert f"mirror {other.host}: " in failure.value.hint


async def test_a_mirror_gets_its_own_credentials(make: MakeClient, registry: FakeRegistry) -> None:
    async with FakeRegistry(auth="basic", user="you", password="other") as mirror:
        mine = {mirror.host: Credentials("you", "other"), registry.host: SECRET}
        client = make(mine, plain_http=(registry.host, mirror.host), mirrors={registry.host: (mirror.host,)})
        mirror.add_image("team/app", "1", [b"x"])
        await client.image(ref(registry), AMD64)
        shown = {seen.authorization for seen in mirror.seen}
        assert shown == {None, "Basic " + base64.b64encode(b"you:other").decode()}


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
