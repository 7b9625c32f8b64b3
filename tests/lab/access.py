"""Registries that let in some, and nodes that show credentials: for tests of who may have what."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator
from pathlib import Path

from dadi.fallbacks import Fallbacks
from dadi.oci.credentials import Credentials
from dadi.oci.reference import Reference
from dadi.peers import shown
from dadi.peers.superpeer import SuperpeerClient
from dadi.peers.tokens import ImageTokens
from tests.fakes.registry import FakeRegistry
from tests.lab.services import PLATFORM, Running, tar_of

GOOD, WRONG = Credentials("me", "secret"), Credentials("me", "wrong")
PRIVATE = tar_of(a=b"a" * 50_000)
"""The first layer of team/app."""


class Node:
    """Has credentials, which may change."""

    def __init__(self, credentials: Credentials | None) -> None:
        self.credentials = credentials

    async def credential(self, reference: Reference) -> Credentials | None:
        return self.credentials


class Clock:
    """The clock of this machine, and how far it is set ahead."""

    def __init__(self) -> None:
        self.ahead = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead


def value(credentials: Credentials) -> str:
    """Return what a node shows of credentials."""
    return shown.header(credentials)[shown.HEADER]


@contextlib.asynccontextmanager
async def private_registry() -> AsyncIterator[FakeRegistry]:
    """A private registry with two images."""
    async with FakeRegistry(auth="basic", user=GOOD.username, password=GOOD.password) as fake:
        fake.add_image("team/app", "1", [PRIVATE, tar_of(b=b"b" * 9_000)])
        fake.add_image("team/other", "1", [tar_of(c=b"c" * 9_000)])
        yield fake


def own_credentials(file: Path, registry: FakeRegistry) -> Path:
    """Write the superpeer's own credentials."""
    auth = GOOD.basic.removeprefix("Basic ")
    file.write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
    return file


@contextlib.asynccontextmanager
async def client_of(run: Running, credentials: Credentials | None) -> AsyncIterator[SuperpeerClient]:
    """Another node's client."""
    client = SuperpeerClient([run.url], Fallbacks(), connect=3, read=10, credentials=Node(credentials).credential)
    try:
        yield client
    finally:
        await client.close()


async def image(client: SuperpeerClient, reference: str) -> dict[str, object]:
    """Resolve an image."""
    async with contextlib.aclosing(client.resolve(reference, PLATFORM)) as events:
        async for event in events:
            if event["event"] == "image":
                return event
    raise AssertionError("no image event")


def held(client: SuperpeerClient) -> ImageTokens:
    """Return what a client holds of its one image."""
    (only,) = client.tokens._images.values()
    return only.image


def heads(registry: FakeRegistry) -> int:
    """Return how often a registry was asked about manifests."""
    return len(registry.asked("/manifests/", "HEAD"))
