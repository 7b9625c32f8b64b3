"""Which credentials are for an image: the order, and whose pull secret is used for what."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.containerd.cri import secret_in
from dadi.containerd.proto import cri_pull_pb2 as pb
from dadi.errors import InvalidRequest
from dadi.fallbacks import Fallbacks
from dadi.oci.auth import repository_in
from dadi.oci.config import CredentialsConfig, RegistryConfig
from dadi.oci.credentials import Credentials, FixedCredentials
from dadi.oci.keychain import Keychain, PullSecrets
from dadi.oci.reference import Reference
from tests.fakes.registry import FakeTime

APP, OTHER = Reference.parse("r.example/team/app:1"), Reference.parse("r.example/team/other:1")
DOCKER, MINE, YOURS = (Credentials("me", f"secret-{name}") for name in ("docker", "mine", "yours"))


@pytest.fixture
def keychain() -> Keychain:
    return Keychain(FixedCredentials({"r.example": DOCKER}))


async def test_a_pull_secret_is_for_its_repository_and_no_other(keychain: Keychain) -> None:
    assert keychain.pulls.remember(APP, MINE) is True
    assert await keychain.credential(APP) == MINE
    assert await keychain.credential(APP.at("sha256:" + "0" * 64)) == MINE
    assert await keychain.credential(OTHER) == DOCKER
    assert await keychain.get("r.example") == DOCKER
    assert await keychain.credential(Reference.parse("s.example/team/app")) is None


async def test_a_newer_pull_secret_comes_first_and_one_of_a_pull_that_failed_goes(keychain: Keychain) -> None:
    keychain.pulls.remember(APP, MINE)
    assert keychain.pulls.remember(APP, YOURS) is True
    assert await keychain.credential(APP) == YOURS
    keychain.pulls.forget(APP, YOURS)
    assert await keychain.credential(APP) == MINE
    assert keychain.pulls.remember(APP, MINE) is False
    keychain.pulls.forget(APP, MINE)
    assert len(keychain.pulls) == 0


async def test_what_the_registry_refuses_comes_last(keychain: Keychain) -> None:
    keychain.pulls.remember(APP, MINE)
    keychain.pulls.remember(APP, YOURS)
    assert keychain.rejected("r.example", "team/app", YOURS) is True
    assert await keychain.credential(APP) == MINE
    assert keychain.rejected("r.example", "team/app", YOURS) is False, "no news"
    assert keychain.rejected("r.example", "team/app", MINE) is True
    assert await keychain.credential(APP) == DOCKER
    keychain.pulls.remember(APP, YOURS)
    assert await keychain.credential(APP) == YOURS, "shown again, so perhaps good again"


async def test_a_refused_pull_secret_is_better_than_none() -> None:
    keychain = Keychain()
    keychain.pulls.remember(APP, MINE)
    keychain.rejected("r.example", "team/app", MINE)
    assert await keychain.credential(APP) == MINE


async def test_pull_secrets_are_forgotten_after_a_time_and_when_there_are_many() -> None:
    time = FakeTime()
    pulls = PullSecrets(most=3, lifetime=100, clock=time.clock().monotonic)
    for name in "abcd":
        pulls.remember(Reference.parse(f"r.example/{name}"), MINE)
        time.now += 10
    assert [pulls.find(f"r.example/{name}") for name in "abcd"] == [None, MINE, MINE, MINE]
    time.now += 75
    assert [pulls.find(f"r.example/{name}") for name in "bcd"] == [None, MINE, MINE]
    time.now += 100
    assert pulls.find("r.example/d") is None
    assert len(pulls) == 0
    for number in range(100):
        pulls.remember(APP, Credentials("me", str(number)))
    assert pulls.find(APP.name) == Credentials("me", "99")
    assert len(pulls._by_name[APP.name]) < 10


def test_nothing_shows_a_secret(keychain: Keychain) -> None:
    keychain.pulls.remember(APP, MINE)
    assert "secret-" not in repr(keychain) + repr(keychain.pulls) + repr(keychain.pulls._by_name)


async def test_the_order_is_pull_secret_then_provider_then_docker(tmp_path: Path) -> None:
    docker = base64.b64encode(b"me:secret-docker").decode()
    (tmp_path / "docker.json").write_text('{"auths": {"r.example": {"auth": "%s"}}}' % docker)  # noqa: UP031
    (tmp_path / "providers.json").write_text(
        '{"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": [{"name": "p", '
        '"matchImages": ["r.example/team/app"], "defaultCacheDuration": "1h", '
        '"apiVersion": "credentialprovider.kubelet.k8s.io/v1"}]}'
    )
    (tmp_path / "p").write_text(
        '#!/bin/sh\necho \'{"kind": "CredentialProviderResponse", "cacheKeyType": "Image", "apiVersion": '
        '"credentialprovider.kubelet.k8s.io/v1", "auth": {"r.example": {"username": "me", "password": "secret-p"}}}\'\n'
    )
    (tmp_path / "p").chmod(0o755)
    keychain = Keychain.of(
        RegistryConfig(docker_config=str(tmp_path / "docker.json")),
        CredentialsConfig(str(tmp_path / "providers.json"), str(tmp_path)),
        Fallbacks(),
        PullSecrets(),
    )
    await keychain.load()
    assert await keychain.credential(OTHER) == DOCKER
    assert await keychain.credential(APP) == Credentials("me", "secret-p")
    keychain.pulls.remember(APP, MINE)
    assert await keychain.credential(APP) == MINE
    await keychain.close()


@pytest.mark.parametrize(
    ("scope", "repository"),
    [
        ("repository:team/app:pull", "team/app"),
        ("repository:team/app:pull,push repository:other:pull", "team/app"),
        ("registry:catalog:*", "catalog"),
        ("", ""),
    ],
)
def test_the_repository_is_that_of_the_first_scope(scope: str, repository: str) -> None:
    assert repository_in(scope) == repository


# ---- what is read of a PullImage


def pull(image: str = str(APP), **auth: str) -> bytes:
    request = pb.PullImageRequest(image=pb.ImageSpec(image=image), auth=pb.AuthConfig(**auth) if auth else None)
    return bytes(request.SerializeToString())


@pytest.mark.parametrize(
    ("auth", "credentials"),
    [
        ({}, None),
        ({"username": "me", "password": "x"}, Credentials("me", "x")),
        ({"username": "me", "password": "x", "identity_token": "t"}, Credentials("me", "x")),
        ({"identity_token": "t", "auth": "!"}, Credentials(identity_token="t")),
        ({"registry_token": "t"}, Credentials(registry_token="t")),
        ({"auth": base64.b64encode(b"me:x:y\0").decode()}, Credentials("me", "x:y")),
        ({"auth": base64.b64encode(b":x").decode()}, None),
        ({"username": "me", "server_address": "r.example"}, Credentials("me")),
        ({"username": "me", "server_address": "https://R.example/v1/"}, Credentials("me")),
        ({"username": "me", "server_address": "s.example"}, None),
        ({"username": "me", "server_address": "r.example:443"}, None),
    ],
)
def test_auth_means_what_it_means_to_containerd(auth: dict[str, str], credentials: Credentials | None) -> None:
    assert secret_in(pull(**auth)) == (None if credentials is None else (APP, credentials))


def test_an_image_of_docker_hub_is_what_its_short_name_means() -> None:
    found = secret_in(pull("debian", username="me", server_address="https://index.docker.io/v1/"))
    assert found == (Reference.parse("docker.io/library/debian:latest"), Credentials("me"))


@pytest.mark.parametrize(
    "request_", [b"\xff", pull(auth="secret"), pull("Not An Image", username="secret"), pull(username="s" * 20000)]
)
def test_what_makes_no_sense_is_refused_without_showing_it(request_: bytes) -> None:
    with pytest.raises(InvalidRequest) as failure:
        secret_in(request_)
    assert "secret" not in str(failure.value)
    assert len(str(failure.value)) < 300


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(request_: bytes) -> None:
    try:
        found = secret_in(request_)
    except InvalidRequest:
        return
    assert found is None or isinstance(found[1], Credentials)
