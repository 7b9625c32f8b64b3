"""Blobs pushed to a registry that misbehaves on demand (tests/fakes/registry.py), and who may push."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncIterator

import pytest

from dadi import digest as digests
from dadi.errors import (
    AccessDenied,
    DigestMismatch,
    InvalidRequest,
    Malformed,
    NotFound,
    RegistryNotAllowed,
    TooLarge,
    Unavailable,
    Unsupported,
)
from dadi.oci import media_types as types
from dadi.oci.credentials import Credentials
from dadi.oci.manifest import Descriptor
from dadi.oci.registry import RegistryClient
from tests.fakes.clients import MakeClient, artifact, ref
from tests.fakes.registry import FakeRegistry, FakeTime, Fault, redirect, status

DATA = random.Random(2).randbytes(3_000_000)
DIGEST = digests.of(DATA)
SECRET = Credentials("me", "secret")


class Source:
    """Gives DATA in pieces; counts how often it was asked for, and how often it was closed."""

    def __init__(self, data: bytes = DATA, error: Exception | None = None) -> None:
        self.data, self.error = data, error
        self.begun = self.closed = 0

    async def __call__(self) -> AsyncIterator[bytes]:
        self.begun += 1
        try:
            for at in range(0, len(self.data), 400_000):
                yield self.data[at : at + 400_000]
            if self.error is not None:
                raise self.error
        finally:
            self.closed += 1


def steps(registry: FakeRegistry) -> list[str]:
    """Return method and last part of the path of each request for uploads."""
    return [f"{s.method} {s.path.rpartition('/')[2][:7]}".strip() for s in registry.asked("/blobs/")]


# ---- blobs


async def test_a_blob_is_pushed_once_and_arrives_whole(client: RegistryClient, registry: FakeRegistry) -> None:
    source, said = Source(), []
    assert not await client.has_blob(ref(registry), DIGEST)
    assert await client.push_blob(ref(registry), DIGEST, len(DATA), source, on_progress=said.append)
    assert registry.blobs == {DIGEST: DATA}
    assert said == sorted(said)
    assert said[-1] == len(DATA)
    assert await client.has_blob(ref(registry), DIGEST)
    assert not await client.push_blob(ref(registry), DIGEST, len(DATA), source)
    assert (source.begun, source.closed) == (1, 1)
    assert steps(registry) == ["HEAD sha256:", "HEAD sha256:", "POST", "PUT session", "HEAD sha256:", "HEAD sha256:"]
    put = registry.asked("/blobs/", "PUT")[0]
    assert put.headers["Content-Length"] == str(len(DATA))
    assert "Transfer-Encoding" not in put.headers
    assert put.query == {"_state": "a/b=", "n": "1", "digest": DIGEST}
    assert registry.asked("/blobs/", "POST")[0].headers["Content-Length"] == "0"


@pytest.mark.parametrize("data", [b"", b"x", DATA])
async def test_bytes_are_pushed_as_they_are(client: RegistryClient, registry: FakeRegistry, data: bytes) -> None:
    assert await client.push_blob(ref(registry), digests.of(data), len(data), data)
    assert registry.blobs == {digests.of(data): data}


@pytest.mark.parametrize("form", ["absolute", "relative", "no query"])
async def test_the_location_may_take_any_form(client: RegistryClient, registry: FakeRegistry, form: str) -> None:
    registry.upload_location = {
        "absolute": lambda path: f"{registry.base}{path}?x=%2f%2F&y",
        "relative": lambda path: f"{path.rpartition('/')[2]}?x=%2f%2F&y",
        "no query": lambda path: path,
    }[form]
    await client.push_blob(ref(registry), DIGEST, len(DATA), DATA)
    put = registry.asked("/blobs/", "PUT")[0]
    assert put.query == {"digest": DIGEST} | ({} if form == "no query" else {"x": "//", "y": ""})
    assert registry.pushed == [DIGEST]


async def test_a_location_on_another_host_gets_the_bytes_and_no_credentials(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    registry.auth, registry.user, registry.password = "basic", SECRET.username, SECRET.password
    other.auth, other.user, other.password = "basic", SECRET.username, SECRET.password
    other.uploads = registry.uploads
    registry.upload_location = lambda path: f"{other.base}/upload/{path.rpartition('/')[2]}?sig=abc"
    client = make({registry.host: SECRET, other.host: SECRET})
    assert await client.push_blob(ref(registry), DIGEST, len(DATA), Source())
    assert other.blobs == {DIGEST: DATA}
    assert [(s.authorization, s.query) for s in other.seen] == [(None, {"sig": "abc", "digest": DIGEST})]
    assert registry.asked("/blobs/", "POST")[-1].authorization is not None


async def test_a_location_that_leads_where_nobody_may_go_is_refused(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    client = make(plain_http=(registry.host,))
    for location in (f"{other.base}/upload/x", "http://169.254.169.254/", "https://127.0.0.1/x"):
        registry.upload_location = lambda path, location=location: location
        with pytest.raises(RegistryNotAllowed) as caught:
            await client.push_blob(ref(registry), DIGEST, len(DATA), DATA)
        assert "--output" not in str(caught.value)
    registry.upload_location = lambda path: ""
    with pytest.raises(Malformed, match="Location"):
        await client.push_blob(ref(registry), DIGEST, len(DATA), DATA)
    assert other.seen == []
    assert registry.pushed == []


@pytest.mark.parametrize("host", ["same", "other"])
async def test_an_upload_is_redirected_with_its_body(
    client: RegistryClient, registry: FakeRegistry, other: FakeRegistry, host: str
) -> None:
    source = Source()
    target = registry if host == "same" else other
    target.uploads["else"] = "team/app"
    registry.script("/session-1", redirect(f"{target.base}/upload/else?digest={DIGEST}"), method="PUT")
    assert await client.push_blob(ref(registry), DIGEST, len(DATA), source)
    assert target.blobs == {DIGEST: DATA}
    assert (source.begun, source.closed) == (2, 2)


async def test_a_redirect_that_would_lose_the_body_is_not_followed(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    registry.script("/session-1", redirect(f"{registry.base}/upload/else", 303), method="PUT")
    with pytest.raises(Malformed, match="303"):
        await client.push_blob(ref(registry), DIGEST, len(DATA), DATA)


@pytest.mark.parametrize(
    "fault",
    [
        Fault(drop=True),
        Fault(drop=True, takes=1_000_000),
        Fault(status=503, takes=1_000_000, headers={"Retry-After": "7"}),
        status(429, Retry_After="7"),
        status(500),
        status(404),
        status(416),
    ],
    ids=str,
)
async def test_an_upload_that_breaks_starts_anew(
    client: RegistryClient, registry: FakeRegistry, time: FakeTime, fault: Fault
) -> None:
    source, said = Source(), []
    registry.script("/session-1", fault, method="PUT")
    assert await client.push_blob(ref(registry), DIGEST, len(DATA), source, on_progress=said.append)
    assert registry.blobs == {DIGEST: DATA}
    assert registry.pushed == [DIGEST]
    assert (source.begun, source.closed) == (2, 2)
    assert said[-1] == len(DATA)
    assert len(registry.asked("/blobs/uploads/", "POST")) == 2
    if "Retry-After" in fault.headers:
        assert sum(time.slept) >= 7


async def test_an_upload_whose_answer_is_lost_is_not_made_twice(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    registry.script("/session-1", Fault(lost=True), method="PUT")
    assert await client.push_blob(ref(registry), DIGEST, len(DATA), DATA)
    assert registry.pushed == [DIGEST]


async def test_a_registry_that_takes_nothing_more_is_given_up(make: MakeClient, registry: FakeRegistry) -> None:
    client = make(read_timeout=0.2, retries=1)
    data = bytes(40_000_000)  # more than sockets hold
    registry.script("/session-", Fault(stuck=True, takes=1000), Fault(stuck=True, takes=1000), method="PUT")
    source = Source(data)
    with pytest.raises(Unavailable, match=r"took nothing more for 0\.2 s"):
        await client.push_blob(ref(registry), digests.of(data), len(data), source)
    assert (source.begun, source.closed) == (2, 2)


async def test_an_early_refusal_is_heard_while_the_body_is_sent(client: RegistryClient, registry: FakeRegistry) -> None:
    data = bytes(40_000_000)
    registry.script("/session-", Fault(status=413, takes=1000, body=b""), method="PUT")
    source = Source(data)
    with pytest.raises(TooLarge, match=r"413.*--output DIR"):
        await client.push_blob(ref(registry), digests.of(data), len(data), source)
    assert (source.begun, source.closed) == (1, 1)


async def test_cancelling_a_push_closes_its_source(client: RegistryClient, registry: FakeRegistry) -> None:
    registry.script("/session-", Fault(stuck=True, takes=1000), method="PUT")
    data, taken = bytes(40_000_000), asyncio.Event()
    source = Source(data)
    push = asyncio.create_task(
        client.push_blob(ref(registry), digests.of(data), len(data), source, on_progress=lambda _: taken.set())
    )
    await taken.wait()
    push.cancel()
    with pytest.raises(asyncio.CancelledError):
        await push
    assert (source.begun, source.closed) == (1, 1)


@pytest.mark.parametrize("error", [OSError(5, "the disk"), Unavailable("elsewhere"), ValueError("x")], ids=repr)
async def test_what_the_source_raises_is_not_the_registrys_fault(
    client: RegistryClient, registry: FakeRegistry, error: Exception
) -> None:
    source = Source(DATA[:-1], error)
    with pytest.raises(type(error)) as caught:
        await client.push_blob(ref(registry), DIGEST, len(DATA), source)
    assert caught.value is error
    assert (source.begun, source.closed) == (1, 1)
    assert registry.pushed == []


@pytest.mark.parametrize("size", [len(DATA) - 1, len(DATA) + 1])
async def test_a_source_of_another_size_is_an_error(client: RegistryClient, registry: FakeRegistry, size: int) -> None:
    with pytest.raises(InvalidRequest, match="announced"):
        await client.push_blob(ref(registry), DIGEST, size, Source())
    assert registry.pushed == []


async def test_a_blob_of_another_digest_is_refused_by_the_registry_and_tried_once_more(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    source = Source(bytes(len(DATA)))
    with pytest.raises(DigestMismatch, match="DIGEST_INVALID"):
        await client.push_blob(ref(registry), DIGEST, len(DATA), source)
    assert source.begun == 2
    assert registry.blobs == {}


async def test_a_registry_that_names_another_digest_than_it_was_given_is_caught(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    wrong = status(201, Docker_Content_Digest=digests.of(b"else"))
    registry.script("/session-", wrong, wrong, method="PUT")
    with pytest.raises(DigestMismatch, match="calls it"):
        await client.push_blob(ref(registry), DIGEST, len(DATA), DATA)


async def test_what_is_no_digest_is_refused_before_anything_is_sent(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    for call in (
        client.has_blob(ref(registry), "sha256:x"),
        client.push_blob(ref(registry), "../x", 1, b"x"),
        client.mount_blob(ref(registry), "x", 1, "a"),
        client.referrers(ref(registry), "x"),
    ):
        with pytest.raises(InvalidRequest):
            await call
    assert registry.seen == []


async def test_a_blob_is_mounted_where_the_registry_does_that(client: RegistryClient, registry: FakeRegistry) -> None:
    digest = registry.add_blob(DATA)
    assert await client.mount_blob(ref(registry), digest, len(DATA), "team/base")
    assert registry.asked("/uploads/")[0].query == {"mount": digest, "from": "team/base"}
    assert not await client.mount_blob(ref(registry), digest, len(DATA) - 1, "team/base")
    registry.mounts = False
    assert not await client.mount_blob(ref(registry), digest, len(DATA), "team/base")
    assert registry.uploads == {}
    assert registry.seen[-1].method == "DELETE"
    for code in (400, 403, 404, 405):
        registry.script("/uploads/", status(code))
        assert not await client.mount_blob(ref(registry), digest, len(DATA), "team/base")


# ---- who may


async def test_one_token_serves_a_whole_push(make: MakeClient, registry: FakeRegistry) -> None:
    registry.auth, registry.user, registry.password = "bearer", SECRET.username, SECRET.password
    client, source = make({registry.host: SECRET}), Source()
    assert await client.push_blob(ref(registry), DIGEST, len(DATA), source)
    raw = json.dumps({"schemaVersion": 2, "mediaType": types.OCI_INDEX, "manifests": []}).encode()
    await client.push_manifest(ref(registry), raw, types.OCI_INDEX)
    assert registry.issued == 1
    assert registry.asked("/token")[0].query["scope"] == "repository:team/app:pull,push"
    assert source.begun == 1
    await client.mount_blob(ref(registry), DIGEST, len(DATA), "team/base")
    assert set(registry.token_scopes.values()) == {
        "repository:team/app:pull,push",
        "repository:team/app:pull,push repository:team/base:pull",
    }
    # Reading asks for no more than reading.
    await client.referrers(ref(registry), DIGEST)
    assert registry.asked("/token")[-1].query["scope"] == "repository:team/app:pull"


async def test_an_identity_token_is_exchanged_for_the_right_to_push(make: MakeClient, registry: FakeRegistry) -> None:
    registry.auth, registry.refresh_token = "bearer", "refresh"
    client = make({registry.host: Credentials(identity_token="refresh")})
    assert await client.push_blob(ref(registry), DIGEST, len(DATA), DATA)
    assert list(registry.token_scopes.values()) == ["repository:team/app:pull,push"]


async def test_a_token_that_runs_out_during_an_upload_is_renewed(make: MakeClient, registry: FakeRegistry) -> None:
    registry.auth, registry.user, registry.password = "bearer", SECRET.username, SECRET.password
    client, source = make({registry.host: SECRET}), Source()
    location = registry.upload_location

    def late(path: str) -> str:
        registry.expire_tokens()
        return location(path)

    registry.upload_location = late
    assert await client.push_blob(ref(registry), DIGEST, len(DATA), source)
    assert registry.blobs == {DIGEST: DATA}
    assert (source.begun, source.closed) == (2, 2)


@pytest.mark.parametrize("how", ["token", "403", "basic", "405"])
async def test_a_registry_that_is_not_to_be_written_to_says_so_and_what_to_do(
    make: MakeClient, registry: FakeRegistry, how: str
) -> None:
    credentials = {registry.host: SECRET}
    if how == "token":
        registry.auth, registry.user, registry.password, registry.may_push = "bearer", "me", "secret", False
    elif how == "basic":
        registry.auth, registry.user, registry.password = "basic", "me", "another"
    else:
        registry.read_only = int(how)
    client, source = make(credentials), Source()
    subject = Descriptor(types.OCI_MANIFEST, digests.of(b"subject"), 7)
    expected = Unsupported if how == "405" else AccessDenied
    for call in (
        client.push_blob(ref(registry), DIGEST, len(DATA), source),
        client.push_manifest(ref(registry), artifact(subject), types.OCI_MANIFEST),
        client.push_referrer(ref(registry), artifact(subject), types.OCI_MANIFEST, subject.digest),
        client.update_index(ref(registry), "list", lambda entries: [subject]),
    ):
        with pytest.raises(expected, match=f"{registry.host} answers 40") as caught:
            await call
        assert "--output DIR" in (caught.value.hint or "")
        assert ("docker login" in (caught.value.hint or "")) == (how != "405")
    assert source.begun == 0


async def test_a_repository_that_must_be_made_first_is_named(client: RegistryClient, registry: FakeRegistry) -> None:
    registry.script("/uploads/", status(404))
    with pytest.raises(NotFound, match="repository team/app to be made first"):
        await client.push_blob(ref(registry), DIGEST, len(DATA), DATA)


async def test_mirrors_are_never_pushed_to_nor_asked_for_referrers(
    make: MakeClient, registry: FakeRegistry, other: FakeRegistry
) -> None:
    client = make(mirrors={registry.host: (other.host,)})
    subject = Descriptor(types.OCI_MANIFEST, digests.of(b"subject"), 7)
    await client.push_blob(ref(registry), digests.of(b"{}"), 2, b"{}")
    await client.push_referrer(ref(registry), artifact(subject), types.OCI_MANIFEST, subject.digest)
    assert len(await client.referrers(ref(registry), subject.digest)) == 1
    assert await client.blob_range(ref(registry), Descriptor("x/y", digests.of(b"{}"), 2), 1, 1, mirrors=False) == b"}"
    assert other.seen == []
