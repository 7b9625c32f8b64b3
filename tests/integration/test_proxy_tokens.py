"""Tokens that open nothing, at the proxy: those that a client fetches for the name of a repository there."""

from __future__ import annotations

from pathlib import Path
from random import Random

import pytest

from dadi import digest as digests
from tests.fakes.registry import FakeRegistry, status
from tests.lab.proxies import proxied

LAYER = Random(1).randbytes(1 << 20)
DIGEST = digests.of(LAYER)
MANIFEST, BLOB, TAGS = "/v2/team/app/manifests/1", f"/v2/team/app/blobs/{DIGEST}", "/v2/team/app/tags/list"
REFERRERS = f"/v2/team/app/referrers/{DIGEST}"
OF_NO_USE = {"Authorization": "Bearer for-another-name"}
NEVER = {"tag_ttl": 0.0, "access_ttl": 0.0}
"""What the registry says is believed for no time at all."""


@pytest.mark.parametrize("originals", [{}, NEVER])
async def test_what_everybody_may_read_is_not_refused_for_a_token_of_no_use(
    tmp_path: Path, originals: dict[str, float]
) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host, originals=originals) as proxy:
            for path in (MANIFEST, MANIFEST, TAGS, REFERRERS):
                assert (await proxy.get(path, headers=OF_NO_USE))[0].status == 200
            assert (await proxy.ask("HEAD", BLOB, headers=OF_NO_USE))[0].status == 200
            response, body = await proxy.get(BLOB, headers=OF_NO_USE)
            assert response.status == 200
            assert body == LAYER


async def test_a_client_whose_token_opens_nothing_hears_for_what_it_should_be(tmp_path: Path) -> None:
    async with FakeRegistry(auth="bearer", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host, front={"login": True}) as proxy:
            for path in (MANIFEST, BLOB):
                response, _ = await proxy.get(path)
                assert response.status == 401
                assert "error=" not in response.headers["WWW-Authenticate"], "nothing was shown"
                response, _ = await proxy.get(path, headers=OF_NO_USE)
                assert response.status == 401
                challenge = response.headers["WWW-Authenticate"]
                assert 'scope="repository:team/app:pull"' in challenge
                assert challenge.endswith(',error="insufficient_scope"')


async def test_a_challenge_for_a_password_stays_as_it_is(tmp_path: Path) -> None:
    async with FakeRegistry(auth="basic", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host) as proxy:
            response, _ = await proxy.get(MANIFEST, headers=OF_NO_USE)
            assert response.status == 401
            assert "insufficient_scope" not in response.headers["WWW-Authenticate"]


async def test_while_the_registry_is_away_nobody_is_sent_for_a_token_and_what_everybody_may_read_is_given(
    tmp_path: Path,
) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        registry.add_image("team/app", "1", [LAYER])
        for started in ("first", "again"):
            async with proxied(tmp_path, registry.host, front={"login": True}, originals=NEVER, retries=0) as proxy:
                if started == "first":
                    assert (await proxy.get("/v2/"))[0].status == 401
                    for path in (MANIFEST, BLOB):
                        assert (await proxy.get(path))[0].status == 200
                    registry.script("/v2/", *[status(503)] * 999)
                    assert "registry away, nobody is asked to log in" not in proxy.fallbacks()
                for _ in range(2):  # Docker and podman look there before each pull
                    await proxy.get("/v2/")
                    for path in ("/v2/", MANIFEST, BLOB):
                        assert (await proxy.get(path))[0].status == 200, (started, path)
                assert "registry away, nobody is asked to log in" in proxy.fallbacks()
