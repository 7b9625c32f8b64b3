"""A keychain in front of a registry: what it refuses makes room for the next, and a secret goes to one repository."""

from __future__ import annotations

import pytest

from dadi.errors import AccessDenied
from dadi.oci import platforms
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import Credentials, FixedCredentials
from dadi.oci.keychain import Keychain
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from tests.fakes.registry import FakeRegistry, FakeTime

AMD64 = platforms.parse("linux/amd64")
GOOD, BAD = Credentials("me", "good"), Credentials("you", "bad")


async def resolved(registry: FakeRegistry, keychain: Keychain, repository: str = "team/app") -> None:
    client = RegistryClient(
        RegistryConfig(plain_http=(registry.host,)), credentials=keychain, clock=FakeTime().clock()
    )
    try:
        await client.image(Reference.parse(f"{registry.host}/{repository}:1"), AMD64)
    finally:
        await client.close()


@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_a_pull_secret_that_is_refused_makes_room_for_the_next(auth: str) -> None:
    async with FakeRegistry(auth=auth, user="me", password="good") as registry:
        registry.add_image("team/app", "1", [b"x"])
        app = Reference.parse(f"{registry.host}/team/app:1")
        keychain = Keychain()
        keychain.pulls.remember(app, GOOD)
        keychain.pulls.remember(app, BAD)
        await resolved(registry, keychain)
        assert await keychain.credential(app) == GOOD
        keychain = Keychain(FixedCredentials({registry.host: GOOD}))
        keychain.pulls.remember(app, BAD)
        await resolved(registry, keychain)


@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_a_pull_secret_is_not_shown_for_another_repository(auth: str) -> None:
    async with FakeRegistry(auth=auth, user="me", password="good") as registry:
        for name in ("team/app", "team/other"):
            registry.add_image(name, "1", [b"x"])
        keychain = Keychain()
        keychain.pulls.remember(Reference.parse(f"{registry.host}/team/app:1"), GOOD)
        await resolved(registry, keychain)
        before = len(registry.seen)
        with pytest.raises(AccessDenied):
            await resolved(registry, keychain, "team/other")
        assert {seen.authorization for seen in registry.seen[before:]} == {None}


@pytest.mark.parametrize("auth", ["basic", "bearer"])
async def test_when_nothing_is_good_that_is_said_after_a_few_requests(auth: str) -> None:
    async with FakeRegistry(auth=auth, user="me", password="good") as registry:
        registry.add_image("team/app", "1", [b"x"])
        keychain = Keychain()
        keychain.pulls.remember(Reference.parse(f"{registry.host}/team/app:1"), BAD)
        with pytest.raises(AccessDenied) as failure:
            await resolved(registry, keychain)
        assert len(registry.seen) <= 5
        assert "bad" not in str(failure.value)
