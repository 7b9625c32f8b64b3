"""What superpeers have forgotten is resolved again where it is an image, and only there."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import cast

import pytest

from dadi.errors import NotFound
from dadi.fallbacks import Fallbacks
from dadi.peers.known_again import Resolver
from dadi.peers.tokens import Tokens
from dadi.wire import Event

DIGEST = "sha256:" + "1" * 64


class Held:
    """What is asked of `Tokens` here. Those of plain pulls are renewed by asking about the blob."""

    def __init__(self, platform: str) -> None:
        self.renew_by = {"original": None}
        self._platform = platform

    def image_with(self, digest: str) -> tuple[str, str]:
        return f"registry.example/app@{digest}", self._platform


@pytest.mark.parametrize(("platform", "asked"), [("linux/amd64", 1), ("original", 0)])
async def test_an_image_is_resolved_again_a_blob_of_a_plain_pull_is_not(platform: str, asked: int) -> None:
    """A registry that is asked for the manifest of a layer's digest may fail, and a read would wait for it to heal."""
    resolved: list[str] = []

    async def resolve(reference: str, platform: str) -> AsyncGenerator[Event, None]:
        resolved.append(reference)
        yield {}

    async def read() -> bytes:
        raise NotFound("no image that this superpeer or its siblings know has the blob")

    resolver = Resolver(resolve, cast("Tokens", Held(platform)), Fallbacks())
    with pytest.raises(NotFound):
        await resolver.tried(DIGEST, read)
    assert len(resolved) == asked
    await resolver.close()
