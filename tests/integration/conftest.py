"""Fixtures of the tests of the registry client: two registries that misbehave on demand, time, and clients for both."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest

from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import Credentials, FixedCredentials
from dadi.oci.registry import RegistryClient
from tests.fakes.clients import MakeClient
from tests.fakes.registry import FakeRegistry, FakeTime


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
