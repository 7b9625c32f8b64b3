"""To whom the registry client shows which credentials: challenges, tokens, redirects."""

from __future__ import annotations

import asyncio
import base64
from typing import Any
from urllib.parse import parse_qs

import pytest

from dadi.errors import (
    AccessDenied,
    DadiError,
    Malformed,
    RegistryNotAllowed,
    Unavailable,
)
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import Credentials
from dadi.oci.registry import RegistryClient
from tests.fakes.clients import AMD64, DATA, SECRET, MakeClient, blob, read, ref
from tests.fakes.registry import FakeRegistry, FakeTime, Fault, cut, redirect, status

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

        async def get(self, registry: str, repository: str = "") -> Credentials:
            self.asked += 1
            return Credentials("me", f"secret-{self.asked}")

        def rejected(self, registry: str, repository: str, credentials: Credentials) -> bool:
            return False

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
