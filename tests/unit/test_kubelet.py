"""Kubelet's credential providers: which images they are for, their protocol, and how long an answer is good."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import ConfigError, InvalidRequest
from dadi.fallbacks import Fallbacks
from dadi.oci import kubelet_match
from dadi.oci.config import CredentialsConfig
from dadi.oci.credentials import Credentials
from dadi.oci.kubelet import FAILED, LEFT_OUT, CredentialProviders, read_config
from tests.fakes.registry import FakeTime

V1 = "credentialprovider.kubelet.k8s.io/v1"
ME = Credentials("me", "secret")
IMAGE = "r.example/team/app"


@pytest.mark.parametrize(
    ("pattern", "image", "does"),
    [
        ("r.example", "r.example/a", True),
        ("r.example", "s.example/a", False),
        ("*.example", "r.example/a", True),
        ("*.example", "a.r.example/a", False),
        ("*.*.example", "a.r.example/a", True),
        ("*.registry.io", "registry.io/a", False),
        ("prefix.*.io", "prefix.registry.io/a", True),
        ("*-good.io", "prefix-good.io/a", True),
        ("1*.dkr.ecr.*.amazonaws.com", "123.dkr.ecr.us-east-1.amazonaws.com/x", True),
        ("1*.dkr.ecr.*.amazonaws.com", "223.dkr.ecr.us-east-1.amazonaws.com/x", False),
        ("a*b*c.io", "aXbYc.io/x", True),
        ("a*b*c.io", "aXcYb.io/x", False),
        ("ab*ba.io", "aba.io/x", False),
        ("r.example:5000", "r.example:5000/a", True),
        ("r.example", "r.example:5000/a", False),
        ("r.example:5000", "r.example/a", False),
        ("r.example:*", "r.example:5000/a", None),
        ("r.example/team", "r.example/team/app", True),
        ("r.example/team", "r.example/teamwork/app", True),
        ("r.example/team", "r.example/other/app", False),
        ("r.example/*/app", "r.example/team/app", False),
        ("*", "r.example/team", False),
        ("*", "localhost/team", True),
        ("*.*", "r.example/team", True),
        ("R.Example", "r.example/team", True),
        ("", "r.example/team", None),
        ("r.ex ample", "r.example/team", None),
        ("[::1]:5000", "[::1]:5000/x", True),
    ],
)
def test_a_pattern_is_for_an_image_as_kubelet_has_it(pattern: str, image: str, does: bool | None) -> None:
    if does is None:
        with pytest.raises(InvalidRequest):
            kubelet_match.matches(pattern, image)
    else:
        assert kubelet_match.matches(pattern, image) is does


@given(st.text(alphabet="ab*.:/1[]-", max_size=30), st.text(alphabet="ab.:/1", max_size=30))
def test_any_pattern_is_for_an_image_or_not_or_refused(pattern: str, image: str) -> None:
    try:
        found = kubelet_match.matches(pattern, image)
    except InvalidRequest:
        return
    assert found in (True, False)
    if "*" not in pattern and found:
        assert image.lower().startswith(pattern.lower().partition("/")[0].rstrip(":"))


@given(st.text(alphabet="ab", max_size=12), st.lists(st.integers(0, 12), max_size=4))
def test_a_label_with_stars_put_into_it_still_matches(label: str, places: list[int]) -> None:
    pattern = label
    for place in places:
        pattern = pattern[:place] + "*" + pattern[place:]
    if label:
        assert kubelet_match.matches(pattern, f"{label}/x")
        cut = pattern[:1] + pattern[2:] if len(pattern) > 2 else pattern
        assert kubelet_match.matches(cut, f"{label}/x") in (True, False)


@pytest.mark.parametrize(
    ("keys", "image", "found"),
    [
        (["r.example", "r.example/team"], IMAGE, "r.example/team"),
        (["*.example", "r.example"], IMAGE, "r.example"),
        (["https://r.example/v1/"], IMAGE, "https://r.example/v1/"),
        (["http://r.example"], IMAGE, "http://r.example"),
        (["r.example/v2/team"], IMAGE, "r.example/v2/team"),
        (["s.example", "a b", ""], IMAGE, None),
        (["index.docker.io"], "docker.io/library/debian", "index.docker.io"),
        (["index.docker.io"], IMAGE, None),
        ([], IMAGE, None),
    ],
)
def test_the_most_special_key_of_an_answer_is_used(keys: list[str], image: str, found: str | None) -> None:
    assert kubelet_match.find({key: key for key in keys}, image) == found


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("0s", 0), ("12h", 43200), ("1h30m", 5400), ("1.5s", 1.5), ("300ms", 0.3), ("+1m", 60)],
)
def test_a_duration_is_written_as_in_go(text: str, seconds: float) -> None:
    assert kubelet_match.seconds(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "1", "h", "1d", "-1h", "1h 2m", "1h+2m", "1hx", "1" * 200 + "h"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest, match="duration"):
        kubelet_match.seconds(text)


# ---- the configuration


def provider(name: str = "lab", **changes: Any) -> dict[str, Any]:
    return {"name": name, "matchImages": ["r.example"], "defaultCacheDuration": "1h", "apiVersion": V1, **changes}


def config(*providers: dict[str, Any], **changes: Any) -> bytes:
    file = {"apiVersion": "kubelet.config.k8s.io/v1", "kind": "CredentialProviderConfig", "providers": providers}
    return json.dumps({**file, **changes}).encode()


def test_the_configuration_is_json_or_yaml() -> None:
    yaml = b"""
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
- name: lab
  apiVersion: credentialprovider.kubelet.k8s.io/v1
  matchImages:
  - r.example
  defaultCacheDuration: "1h"
"""
    assert read_config(yaml, "f") == read_config(config(provider()), "f")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "CredentialProviderConfig"),
        (b"{", "no YAML"),
        (b"\xff\xfe\x00", "no YAML"),
        (b"[" * 100_000, "no YAML"),
        (b"!!python/object/apply:os.system [id]", "no YAML"),
        (config(provider(), kind="Pod"), "kind"),
        (config(provider(), apiVersion="v2"), "apiVersion"),
        (config(provider(apiVersion="v2")), "apiVersion"),
        (config(provider("../x")), "name"),
        (config(provider("..")), "name"),
        (config(provider("")), "name"),
        (config(provider(), provider()), "several"),
        (config(provider(matchImages=[])), "matchImages"),
        (config(provider(matchImages=["a b"])), "a b"),
        (config(provider(defaultCacheDuration="1d")), "duration"),
        (config(provider(env=[{"name": "A", "value": 1}])), "env"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(data: bytes, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_config(data, "f")


@given(st.binary(max_size=200))
def test_any_bytes_are_a_configuration_or_refused(data: bytes) -> None:
    try:
        read_config(data, "f")
    except ConfigError:
        pass


# ---- asking


class Lab:
    """A directory with a provider whose answers are given; it counts what it is asked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.fallbacks = Fallbacks()
        self.time = FakeTime()
        self.answer(auth={"r.example": {"username": "me", "password": "secret"}})

    def answer(self, **changes: Any) -> None:
        answer = {"kind": "CredentialProviderResponse", "apiVersion": V1, "cacheKeyType": "Image", **changes}
        (self.directory / "answer").write_text(json.dumps(answer))

    def program(self, script: str = "", name: str = "lab") -> None:
        path = self.directory / name
        path.write_text(f"#!/bin/sh\ncat >> {self.directory}/asked; echo >> {self.directory}/asked\n"
                        f"{script or f'cat {self.directory}/answer'}\n")  # fmt: skip
        path.chmod(0o755)

    def providers(self, *providers: dict[str, Any], timeout: float = 20) -> CredentialProviders:
        (self.directory / "config").write_bytes(config(*(providers or (provider(),))))
        told = CredentialsConfig(str(self.directory / "config"), str(self.directory), timeout)
        return CredentialProviders(told, self.fallbacks, clock=self.time.clock().monotonic)

    def asked(self) -> list[dict[str, Any]]:
        path = self.directory / "asked"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def noted(self) -> list[str]:
        return [f"{row['kind']}: {row['why']}" for row in self.fallbacks.statistics()]


@pytest.fixture
def lab(tmp_path: Path) -> Lab:
    lab = Lab(tmp_path)
    lab.program()
    return lab


async def test_a_provider_is_asked_for_the_image_that_is_wanted(lab: Lab) -> None:
    providers = lab.providers()
    assert await providers.get("r.example", "team/app") == ME
    assert lab.asked() == [{"kind": "CredentialProviderRequest", "apiVersion": V1, "image": IMAGE}]
    assert await providers.get("s.example", "team/app") is None
    assert await providers.get("r.example") is None
    assert len(lab.asked()) == 1
    assert "secret" not in repr(providers)


@pytest.mark.parametrize(("kind", "questions"), [("Image", 3), ("Registry", 2), ("Global", 1)])
async def test_an_answer_is_good_for_what_it_says(lab: Lab, kind: str, questions: int) -> None:
    auth = {host: {"username": "me", "password": "secret"} for host in ("r.example", "s.example")}
    lab.answer(cacheKeyType=kind, auth=auth)
    providers = lab.providers(provider(matchImages=["*.example"]))
    for registry, repository in (("r.example", "a"), ("r.example", "b"), ("s.example", "a"), ("r.example", "a")):
        assert await providers.get(registry, repository) == ME
    assert len(lab.asked()) == questions


@pytest.mark.parametrize(("duration", "kept"), [(None, 3600), ("10m", 600), ("0s", 0)])
async def test_an_answer_is_good_for_so_long(lab: Lab, duration: str | None, kept: float) -> None:
    lab.answer(auth={"r.example": {"username": "me", "password": "secret"}}, cacheDuration=duration)
    providers = lab.providers()
    await providers.get("r.example", "a")
    if kept:
        lab.time.now += kept - 1
        await providers.get("r.example", "a")
        assert len(lab.asked()) == 1
        lab.time.now += 2
    assert await providers.get("r.example", "a") == ME
    assert len(lab.asked()) == 2


async def test_many_who_want_the_same_ask_once_and_may_go(lab: Lab) -> None:
    providers = lab.providers()
    tasks = [asyncio.create_task(providers.get("r.example", "a")) for _ in range(10)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    found = await asyncio.gather(*tasks, return_exceptions=True)
    assert found[1:] == [ME] * 9
    assert len(lab.asked()) == 1


async def test_what_the_registry_refuses_is_asked_for_anew(lab: Lab) -> None:
    providers = lab.providers()
    await providers.get("r.example", "a")
    lab.answer(auth={"r.example": {"username": "me", "password": "new"}})
    assert await providers.get("r.example", "a") == ME
    assert providers.rejected("r.example", "a", ME) is True
    assert await providers.get("r.example", "a") == Credentials("me", "new")
    assert providers.rejected("r.example", "a", ME) is False


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo secret; echo secret >&2; exit 3", "status 3"),
        ("echo secret", "protocol"),
        ("echo '{\"kind\": \"secret\"}'", "protocol"),
        ("exec yes secret", "more than"),
        ("sleep 1000", "within 0.5 s"),
    ],
)
async def test_a_provider_that_fails_is_passed_over_and_noted(lab: Lab, script: str, says: str) -> None:
    lab.program(script, "bad")
    providers = lab.providers(provider("bad"), provider(), timeout=20 if "sleep" not in script else 0.5)
    assert await providers.get("r.example", "team/app") == ME
    (noted,) = lab.noted()
    assert noted.startswith(f"{FAILED}: {IMAGE}: ")
    assert says in noted
    assert "secret" not in noted


@pytest.mark.parametrize("changes", [{"apiVersion": "x"}, {"cacheKeyType": "All"}, {"cacheDuration": "1d"}])
async def test_an_answer_that_breaks_the_protocol_is_not_used(lab: Lab, changes: dict[str, Any]) -> None:
    lab.answer(auth={"r.example": {"username": "me", "password": "secret"}}, **changes)
    assert await lab.providers().get("r.example", "a") is None
    assert "protocol" in lab.noted()[0]


async def test_a_provider_that_is_not_there_is_noted(lab: Lab) -> None:
    assert await lab.providers(provider("none")).get("r.example", "a") is None
    assert "cannot be started" in lab.noted()[0]


async def test_arguments_and_environment_are_given(lab: Lab) -> None:
    lab.program(f"echo \"$1 $2 $NAME\" > {lab.directory}/told; cat {lab.directory}/answer")
    providers = lab.providers(provider(args=["--a", "b c; exit"], env=[{"name": "NAME", "value": "$(id)"}]))
    assert await providers.get("r.example", "a") == ME
    assert (lab.directory / "told").read_text() == "--a b c; exit $(id)\n"


async def test_a_provider_that_wants_a_service_accounts_token_is_left_out(lab: Lab) -> None:
    providers = lab.providers(provider(tokenAttributes={"requireServiceAccount": True}))
    assert await providers.get("r.example", "a") is None
    assert lab.noted()[0].startswith(LEFT_OUT)
    assert lab.asked() == []


async def test_an_answer_without_credentials_is_none(lab: Lab) -> None:
    lab.answer(auth={"s.example": {"username": "me", "password": "secret"}})
    assert await lab.providers().get("r.example", "a") is None
    assert lab.noted() == []


async def test_a_file_that_is_not_there_is_an_error_of_the_configuration(tmp_path: Path) -> None:
    providers = CredentialProviders(CredentialsConfig(str(tmp_path / "none")), Fallbacks())
    with pytest.raises(ConfigError, match=r"credentials\.providers.*none"):
        await providers.load()
