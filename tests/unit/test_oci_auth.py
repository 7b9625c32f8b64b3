"""Challenges, and credentials from Docker's configuration and its helpers."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import AccessDenied, ConfigError
from dadi.oci import challenge as challenges
from dadi.oci.challenge import Challenge
from dadi.oci.credentials import Credentials, DockerCredentials

HUB = "https://index.docker.io/v1/"


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ('Basic realm="x"', [Challenge("basic", {"realm": "x"})]),
        (
            'Bearer realm="https://auth.example/token",service="r.example",scope="repository:a/b:pull,push"',
            [
                Challenge(
                    "bearer",
                    {
                        "realm": "https://auth.example/token",
                        "service": "r.example",
                        "scope": "repository:a/b:pull,push",
                    },
                )
            ],
        ),
        (
            'Basic realm="a, b", Bearer realm=c , service = "d"',
            [Challenge("basic", {"realm": "a, b"}), Challenge("bearer", {"realm": "c", "service": "d"})],
        ),
        ('bearer Realm="say \\"hi\\""', [Challenge("bearer", {"realm": 'say "hi"'})]),
        ("Negotiate, Basic", [Challenge("negotiate"), Challenge("basic")]),
        ("Negotiate abc==, Basic realm=x", [Challenge("negotiate"), Challenge("basic", {"realm": "x"})]),
        ("Basic realm=a, realm=b", [Challenge("basic", {"realm": "a"})]),
        (",, ,", []),
        ("", []),
        ("Basic realm=x, @@@", [Challenge("basic", {"realm": "x"})]),
    ],
)
def test_challenges_are_read(header: str, expected: list[Challenge]) -> None:
    assert challenges.parse([header]) == expected


def test_bearer_is_preferred_and_basic_is_taken() -> None:
    assert challenges.choose(challenges.parse(["Basic realm=a", "Bearer realm=b"])) == Challenge(
        "bearer", {"realm": "b"}
    )
    assert challenges.choose(challenges.parse(["Bearer", "Basic realm=a"])) == Challenge("basic", {"realm": "a"})
    assert challenges.choose(challenges.parse(["Digest realm=a"])) is None


@given(st.text(max_size=100) | st.text(alphabet='Bearer ="\\,a \t', max_size=60))
def test_any_header_is_read_without_an_error(header: str) -> None:
    for found in challenges.parse([header]):
        assert found.scheme == found.scheme.lower()


_name = st.from_regex(r"[a-z]{1,8}", fullmatch=True)


@given(_name, st.dictionaries(_name, st.text(alphabet=st.characters(min_codepoint=32, max_codepoint=126)), min_size=1))
def test_what_is_quoted_is_read_as_it_was(scheme: str, params: dict[str, str]) -> None:
    def quoted(value: str) -> str:
        return '"' + re.sub(r'(["\\])', r"\\\1", value) + '"'

    header = f"{scheme} " + ", ".join(f"{name}={quoted(value)}" for name, value in params.items())
    assert challenges.parse([header, header]) == [Challenge(scheme, params)] * 2


@given(st.integers(min_value=1, max_value=3000))
def test_reading_a_long_header_takes_no_long_time(length: int) -> None:
    began = time.process_time()
    for header in ('B a="' + "\\" * length, "B " + "a=b" * length, "a," * length, "B a=" + '"' * length):
        challenges.parse([header])
    assert time.process_time() - began < 1


# ---- credentials


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory for Docker's configuration, which is also the only one where programs are found."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def write(directory: Path, configuration: Any) -> None:
    (directory / "config.json").write_text(json.dumps(configuration))


def helper(directory: Path, name: str, script: str) -> None:
    path = directory / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def runs(pid: int) -> bool:
    """Whether the process is alive; one that nobody has waited for yet is not."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


async def test_no_file_means_no_credentials(directory: Path) -> None:
    assert await DockerCredentials().get("r.example") is None


async def test_a_file_that_was_asked_for_must_exist(directory: Path) -> None:
    with pytest.raises(ConfigError, match="does not exist"):
        await DockerCredentials(str(directory / "none.json")).get("r.example")


async def test_an_empty_file_holds_no_credentials() -> None:
    assert await DockerCredentials("/dev/null").get("r.example") is None


async def test_the_auth_of_a_host_is_found(directory: Path) -> None:
    write(directory, {"auths": {"r.example:5000": auth("me", "a:b"), "other.example": auth("no", "no")}})
    assert await DockerCredentials().get("r.example:5000") == Credentials("me", "a:b")
    assert await DockerCredentials().get("r.example") is None


@pytest.mark.parametrize("spelt", ["https://r.example", "https://r.example/v1/", "http://r.example/v2/", "r.example/"])
async def test_a_host_may_be_spelt_as_a_url(directory: Path, spelt: str) -> None:
    write(directory, {"auths": {spelt: auth("me", "x")}})
    assert await DockerCredentials().get("r.example") == Credentials("me", "x")


async def test_an_entry_for_a_part_of_a_registry_is_not_used_for_all_of_it(directory: Path) -> None:
    write(directory, {"auths": {"r.example/team": auth("me", "x")}})
    assert await DockerCredentials().get("r.example") is None


async def test_docker_hub_is_found_by_its_old_name(directory: Path) -> None:
    write(directory, {"auths": {HUB: auth("me", "x")}})
    assert await DockerCredentials().get("docker.io") == Credentials("me", "x")


async def test_name_password_and_tokens_stand_as_they_are(directory: Path) -> None:
    write(
        directory,
        {
            "auths": {
                "a.example": {"username": "me", "password": "x"},
                "b.example": {**auth("me", ""), "identitytoken": "long"},
                "c.example": {"registrytoken": "direct"},
                "d.example": {},
            }
        },
    )
    source = DockerCredentials()
    assert await source.get("a.example") == Credentials("me", "x")
    assert await source.get("b.example") == Credentials("me", "", identity_token="long")
    assert await source.get("c.example") == Credentials(registry_token="direct")
    assert await source.get("d.example") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"auths": 1}', '{"auths": {"r.example": {"auth": 1}}}'])
async def test_a_broken_file_is_an_error(directory: Path, text: str) -> None:
    (directory / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="not valid"):
        await DockerCredentials().get("r.example")


async def test_an_auth_that_is_not_base64_is_an_error_that_does_not_show_it(directory: Path) -> None:
    write(directory, {"auths": {"r.example": {"auth": "secret!"}}})
    with pytest.raises(ConfigError, match=r"r\.example") as failure:
        await DockerCredentials().get("r.example")
    assert "secret" not in str(failure.value)


async def test_the_file_is_read_again_when_it_changes(directory: Path) -> None:
    source = DockerCredentials()
    write(directory, {"auths": {"r.example": auth("me", "first")}})
    assert await source.get("r.example") == Credentials("me", "first")
    write(directory, {"auths": {"r.example": auth("me", "another")}})
    assert await source.get("r.example") == Credentials("me", "another")


async def test_the_helper_of_a_host_is_asked(directory: Path) -> None:
    write(directory, {"credHelpers": {"r.example": "mine"}, "auths": {"r.example": auth("no", "no")}})
    helper(
        directory, "mine", f'read host; echo "$1 $host" > {directory}/asked\necho \'{{"Username":"me","Secret":"x"}}\''
    )
    assert await DockerCredentials().get("r.example") == Credentials("me", "x")
    assert (directory / "asked").read_text() == "get r.example\n"


async def test_the_helper_for_all_is_asked_about_docker_hub_by_its_old_name(directory: Path) -> None:
    write(directory, {"credsStore": "all"})
    helper(directory, "all", 'read host; echo "{\\"Username\\":\\"<token>\\",\\"Secret\\":\\"$host\\"}"')
    assert await DockerCredentials().get("docker.io") == Credentials(identity_token=HUB)


async def test_a_helper_that_knows_nothing_leaves_it_to_the_file(directory: Path) -> None:
    write(directory, {"credsStore": "empty", "auths": {"r.example": auth("me", "x")}})
    helper(directory, "empty", "echo credentials not found in native keychain; exit 1")
    assert await DockerCredentials().get("r.example") == Credentials("me", "x")
    assert await DockerCredentials().get("other.example") is None


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo secret; exit 3", "status 3"),
        ("echo secret", "protocol"),
        ("exec yes", "more than"),
        ("kill -9 $$", "status -9"),
    ],
)
async def test_a_helper_that_fails_is_an_error_that_does_not_show_what_it_said(
    directory: Path, script: str, says: str
) -> None:
    write(directory, {"credsStore": "bad"})
    helper(directory, "bad", script)
    with pytest.raises(AccessDenied, match=says) as failure:
        await DockerCredentials().get("r.example")
    assert "secret" not in str(failure.value)


async def test_a_helper_that_is_not_installed_is_an_error(directory: Path) -> None:
    write(directory, {"credsStore": "none"})
    with pytest.raises(AccessDenied, match="docker-credential-none cannot be started"):
        await DockerCredentials().get("r.example")


async def test_a_helper_that_hangs_is_killed_with_its_children(directory: Path) -> None:
    write(directory, {"credsStore": "slow"})
    helper(directory, "slow", f"sleep 1000 &\necho $! > {directory}/child\nwait")
    with pytest.raises(AccessDenied, match=r"within 0\.3 s"):
        await DockerCredentials(helper_timeout=0.3).get("r.example")
    child = int((directory / "child").read_text())
    async with asyncio.timeout(20):  # it was killed; that it is gone the kernel says a moment later
        while runs(child):
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("name", ["../evil", "a/b", "", ".x", "a b", "-x"])
async def test_a_helper_is_a_plain_name(directory: Path, name: str) -> None:
    write(directory, {"credHelpers": {"r.example": name}, "credsStore": name})
    if not name:
        assert await DockerCredentials().get("r.example") is None
        return
    with pytest.raises(ConfigError, match="credential helper"):
        await DockerCredentials().get("r.example")


def test_secrets_are_not_shown() -> None:
    for shown in (
        Credentials("me", "secret"),
        Credentials(identity_token="secret"),
        Credentials(registry_token="secret"),
    ):
        assert "secret" not in repr(shown)
        assert "secret" not in str(shown)


def test_basic_is_base64_of_both() -> None:
    assert Credentials("me", "é:").basic == "Basic " + base64.b64encode("me:é:".encode()).decode()


@given(st.binary(max_size=100) | st.text(max_size=60).map(lambda text: text.encode()))
def test_any_file_gives_credentials_or_an_error_of_ours(data: bytes) -> None:
    read, write_ = os.pipe()
    with os.fdopen(write_, "wb") as file:
        file.write(data)
    try:
        source = DockerCredentials(f"/proc/self/fd/{read}")
        try:
            assert source._load() is not None
        except ConfigError:
            pass
    finally:
        os.close(read)
