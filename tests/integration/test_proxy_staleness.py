"""While the registry is away: what is here is served as long as it is not too old, and said to be old; then no more.

The clock is the test's. Straight to the registry, and through a superpeer.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi import digest as digests
from dadi.originals.service import Originals
from tests.fakes.registry import FakeRegistry, status
from tests.lab.proxies import RunningProxy, proxied
from tests.lab.services import running

LAYER = b"layer" * 1000
MANIFEST, TAGS = "/v2/team/app/manifests/1", "/v2/team/app/tags/list"
BLOB = f"/v2/team/app/blobs/{digests.of(LAYER)}"
DAY = 86400.0
"""How old tags, lists and permissions may be, where nothing else is configured (`originals.stale`)."""


class Clock:
    """Seconds, moved by hand."""

    def __init__(self) -> None:
        self.now = 1.7e9

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    defaults = Originals.__init__.__kwdefaults__
    assert defaults is not None
    monkeypatch.setitem(defaults, "clock", made)
    return made


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [LAYER])
        yield fake


@pytest.fixture(params=["direct", "superpeer"])
async def proxy(
    request: pytest.FixtureRequest, tmp_path: Path, registry: FakeRegistry, clock: Clock
) -> AsyncIterator[RunningProxy]:
    if request.param == "direct":
        async with proxied(tmp_path, registry.host) as made:
            yield made
        return
    async with (
        running(tmp_path / "superpeer", registry.host) as run,
        proxied(tmp_path / "proxy", registry.host, superpeers=(run.url,)) as made,
    ):
        yield made


async def test_a_tag_is_served_for_a_day_with_a_warning_and_then_refused(
    registry: FakeRegistry, proxy: RunningProxy, clock: Clock
) -> None:
    _, manifest = await proxy.get(MANIFEST)
    _, tags = await proxy.get(TAGS)
    assert (await proxy.get(BLOB))[1] == LAYER
    registry.script("/v2/", *[status(503)] * 9999)
    clock.now += DAY - 10
    for path, body in ((MANIFEST, manifest), (TAGS, tags)):
        response, said = await proxy.get(path)
        assert (response.status, said) == (200, body)
        assert response.headers["Warning"].startswith("299 - ")
        assert DAY - 11 <= int(response.headers["Age"]) <= DAY
    assert (await proxy.get(BLOB))[1] == LAYER
    assert proxy.proxy.front.requests["stale"] == 2
    clock.now += 20
    for path in (MANIFEST, TAGS, BLOB):
        assert (await proxy.get(path))[0].status == 503, path


async def test_when_the_registry_is_back_the_warning_is_gone(
    registry: FakeRegistry, proxy: RunningProxy, clock: Clock
) -> None:
    await proxy.get(MANIFEST)
    registry.script("/v2/", *[status(503)] * 9999)
    clock.now += DAY / 2
    assert "Warning" in (await proxy.get(MANIFEST))[0].headers
    registry._script.clear()
    clock.now += DAY / 4
    response, _ = await proxy.get(MANIFEST)
    assert (response.status, "Warning" in response.headers) == (200, False)
