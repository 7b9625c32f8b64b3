"""Where tokens came from may be gone when the next one is needed: the registry is asked what it wants now."""

from __future__ import annotations

import pytest

from dadi.errors import Unavailable
from tests.fakes.clients import DATA, MakeClient, blob, read, ref
from tests.fakes.registry import FakeRegistry, FakeTime, status


@pytest.mark.parametrize("now", [None, "bearer"])
async def test_a_realm_that_is_gone_is_forgotten(make: MakeClient, time: FakeTime, now: str | None) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host,))
        descriptor = blob(registry)
        assert await read(client, ref(registry), descriptor) == DATA
        time.now += 1000  # the token has run out meanwhile
        registry.script("/token", status(404))
        registry.auth = now
        assert await read(client, ref(registry), descriptor) == DATA
        assert len(registry.tokens) == (1 if now is None else 2)


async def test_a_realm_that_is_away_is_an_error_that_may_heal(make: MakeClient, time: FakeTime) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        client = make(plain_http=(registry.host,), retries=0)
        descriptor = blob(registry)
        assert await read(client, ref(registry), descriptor) == DATA
        time.now += 1000
        registry.script("/token", status(503), status(503))
        with pytest.raises(Unavailable):
            await read(client, ref(registry), descriptor)
        assert await read(client, ref(registry), descriptor) == DATA
