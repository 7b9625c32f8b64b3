"""The proxy straight to a registry: what clients get, what it costs the registry, and what happens when things fail.

Longer than 400 lines: the same proxy and registry, through all that a client may meet.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import pytest

from dadi import digest as digests
from dadi.blobs import answering
from dadi.oci import media_types
from dadi.oci.config import RegistryConfig
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from tests.fakes.registry import FakeRegistry, Fault, cut, redirect, status
from tests.lab.proxies import ACCEPT, RunningProxy, proxied
from tests.lab.waiting import until

LAYER = Random(1).randbytes(3 << 20)
DIGEST = digests.of(LAYER)
BLOB = f"/v2/team/app/blobs/{DIGEST}"
MANIFEST = "/v2/team/app/manifests/1"


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [LAYER])
        yield fake


@pytest.fixture
async def proxy(tmp_path: Path, registry: FakeRegistry) -> AsyncIterator[RunningProxy]:
    async with proxied(tmp_path, registry.host) as running:
        yield running


def gets(registry: FakeRegistry, part: str = "/blobs/") -> int:
    return len([seen for seen in registry.asked(part, "GET") if DIGEST in seen.path or part != "/blobs/"])


def basic(user: str, password: str) -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}


# ---- once


async def test_a_thousand_pulls_of_a_tag_cost_the_registry_one_request(
    registry: FakeRegistry, proxy: RunningProxy
) -> None:
    answers = await asyncio.gather(*(proxy.get(MANIFEST) for _ in range(1000)))
    assert {response.status for response, _ in answers} == {200}
    assert len({body for _, body in answers}) == 1
    assert [(seen.method, seen.path) for seen in registry.seen] == [("GET", MANIFEST)]


async def test_a_thousand_pulls_with_tokens_cost_one_token(tmp_path: Path) -> None:
    async with FakeRegistry(auth="bearer") as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host) as proxy:
            answers = await asyncio.gather(*(proxy.get(MANIFEST) for _ in range(1000)))
            assert {response.status for response, _ in answers} == {200}
        assert registry.issued == 1
        assert [seen.path for seen in registry.seen] == [MANIFEST, "/token", MANIFEST]


async def test_a_tag_that_is_old_costs_one_head_however_many_ask(tmp_path: Path, registry: FakeRegistry) -> None:
    async with proxied(tmp_path, registry.host, originals={"tag_ttl": 0.0}) as proxy:
        await proxy.get(MANIFEST)
        registry.seen.clear()
        await asyncio.gather(*(proxy.get(MANIFEST) for _ in range(50)))
        assert {seen.method for seen in registry.seen} == {"HEAD"}
        assert len(registry.seen) <= 2


async def test_a_tag_that_moved_is_seen_after_its_time(tmp_path: Path, registry: FakeRegistry) -> None:
    async with proxied(tmp_path, registry.host, originals={"tag_ttl": 0.0}) as proxy:
        before, _ = await proxy.get(MANIFEST)
        registry.add_image("team/app", "1", [b"another"])
        after, _ = await proxy.get(MANIFEST)
        assert before.headers["Docker-Content-Digest"] != after.headers["Docker-Content-Digest"]


async def test_a_manifest_that_was_had_by_tag_is_not_fetched_by_digest(
    registry: FakeRegistry, proxy: RunningProxy
) -> None:
    first, body = await proxy.get(MANIFEST)
    second, again = await proxy.get(f"/v2/team/app/manifests/{first.headers['Docker-Content-Digest']}")
    assert (second.status, again) == (200, body)
    assert gets(registry, "/manifests/") == 1


async def test_twenty_clients_at_once_get_a_blob_by_one_fetch(registry: FakeRegistry, proxy: RunningProxy) -> None:
    answers = await asyncio.gather(*(proxy.get(BLOB) for _ in range(20)))
    assert {body for _, body in answers} == {LAYER}
    assert gets(registry) == 1
    _, body = await proxy.get(BLOB)
    assert (body, gets(registry)) == (LAYER, 1)


async def test_what_is_kept_survives_a_restart(tmp_path: Path, registry: FakeRegistry) -> None:
    async with proxied(tmp_path, registry.host) as proxy:
        await proxy.get(MANIFEST)
        await proxy.get(BLOB)
    registry.seen.clear()
    async with proxied(tmp_path, registry.host) as proxy:
        assert (await proxy.get(MANIFEST))[0].status == 200
        assert (await proxy.get(BLOB))[1] == LAYER
    assert not registry.seen


# ---- while it arrives


async def test_bytes_are_streamed_while_they_arrive(registry: FakeRegistry, proxy: RunningProxy) -> None:
    registry.script("/blobs/", Fault(stall_after=1 << 20), method="GET")
    async with proxy.session.get(proxy.url + BLOB) as response:
        first = await response.content.readexactly(1 << 20)
    assert first == LAYER[: 1 << 20]


async def test_a_client_that_goes_away_does_not_stop_the_others(registry: FakeRegistry, proxy: RunningProxy) -> None:
    gate = asyncio.Event()
    registry.script("/blobs/", Fault(gate=gate), method="GET")
    impatient = asyncio.create_task(proxy.get(BLOB))
    patient = asyncio.create_task(proxy.get(BLOB))
    await until(lambda: registry.asked("/blobs/", "GET"))
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    gate.set()
    assert (await patient)[1] == LAYER
    assert gets(registry) == 1


@pytest.mark.parametrize(
    ("header", "part"),
    [("bytes=0-99", slice(0, 100)), ("bytes=1000000-1999999", slice(1_000_000, 2_000_000)),
     ("bytes=-7", slice(-7, None)), ("bytes=3000000-", slice(3_000_000, None))],
)  # fmt: skip
async def test_a_range_of_a_blob_that_is_still_arriving(
    registry: FakeRegistry, proxy: RunningProxy, header: str, part: slice
) -> None:
    gate = asyncio.Event()
    registry.script("/blobs/", Fault(gate=gate), method="GET")
    whole = asyncio.create_task(proxy.get(BLOB))
    ranged = asyncio.create_task(proxy.get(BLOB, headers={"Range": header}))
    await until(lambda: registry.asked("/blobs/", "GET"))
    gate.set()
    response, body = await ranged
    assert (response.status, body) == (206, LAYER[part])
    assert response.headers["Content-Range"].endswith(f"/{len(LAYER)}")
    assert (await whole)[1] == LAYER
    assert gets(registry) == 1


async def test_a_broken_download_is_taken_up_where_it_stopped(registry: FakeRegistry, proxy: RunningProxy) -> None:
    registry.script("/blobs/", cut(1 << 20), method="GET")
    assert (await proxy.get(BLOB))[1] == LAYER
    assert registry.asked("/blobs/", "GET")[1].headers["Range"].startswith("bytes=")


# ---- wrong bytes


async def test_wrong_bytes_are_cut_off_before_the_last_one_and_not_kept(
    registry: FakeRegistry, proxy: RunningProxy
) -> None:
    registry.script("/blobs/", Fault(flip=len(LAYER) - 1), method="GET")
    async with proxy.session.get(proxy.url + BLOB) as response:
        with pytest.raises(aiohttp.ClientError):
            await response.content.readexactly(len(LAYER) + 1)
    assert not proxy.store.has(DIGEST)
    assert (await proxy.get(BLOB))[1] == LAYER, "the next time it is right"


async def test_no_range_of_wrong_bytes_is_given_whole(registry: FakeRegistry, proxy: RunningProxy) -> None:
    registry.script("/blobs/", Fault(flip=5), method="GET")
    with pytest.raises(aiohttp.ClientError):
        await proxy.get(BLOB, headers={"Range": "bytes=0-99"})
    assert not proxy.store.has(DIGEST)


async def test_after_wrong_bytes_from_a_mirror_the_registry_itself_is_asked(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with FakeRegistry() as mirror:
        mirror.add_image("team/app", "1", [LAYER])
        mirror.script("/blobs/", *[Fault(flip=9)] * 9, method="GET")
        async with proxied(tmp_path, registry.host, allowed=[mirror.host],
                           mirrors={registry.host: (mirror.host,)}) as proxy:  # fmt: skip
            with pytest.raises(aiohttp.ClientError):
                await proxy.get(BLOB)
            assert (await proxy.get(BLOB))[1] == LAYER
        assert (gets(mirror), gets(registry)) == (1, 1)


async def test_a_manifest_that_is_not_what_its_digest_says_is_refused(
    registry: FakeRegistry, proxy: RunningProxy
) -> None:
    digest = digests.of(registry.manifests["team/app", "1"][1])
    registry.script("/manifests/", *[Fault(flip=3)] * 9)
    response, body = await proxy.get(f"/v2/team/app/manifests/{digest}")
    assert response.status == 502
    assert json.loads(body)["errors"][0]["code"] == "DIGEST_INVALID"


# ---- a store that is too small


async def test_a_blob_larger_than_the_store_passes_by_verified(tmp_path: Path, registry: FakeRegistry) -> None:
    async with proxied(tmp_path, registry.host, limit=1 << 20) as proxy:
        assert (await proxy.get(BLOB))[1] == LAYER
        _, part = await proxy.get(BLOB, headers={"Range": "bytes=100-199"})
        assert part == LAYER[100:200]
        registry.script("/blobs/", Fault(flip=0), method="GET")
        with pytest.raises(aiohttp.ClientError):
            await proxy.get(BLOB)
        assert proxy.fallbacks() == ["blob passes by, no room to keep it"]
        assert proxy.store.statistics()["bytes"] <= 1 << 20


# ---- who may


async def test_a_private_image_needs_credentials_also_when_it_is_cached(tmp_path: Path) -> None:
    async with FakeRegistry(auth="basic", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host) as proxy:
            for path in (MANIFEST, BLOB):
                assert (await proxy.get(path, headers=basic("u", "p")))[0].status == 200
            for path in (MANIFEST, BLOB, "/v2/team/app/tags/list", f"/v2/team/app/referrers/{DIGEST}"):
                for headers in ({}, basic("u", "wrong")):
                    response, body = await proxy.get(path, headers=headers)
                    assert response.status == 401
                    assert response.headers["WWW-Authenticate"].startswith("Basic realm=")
                    assert json.loads(body)["errors"][0]["code"] == "UNAUTHORIZED"


async def test_the_challenge_of_a_token_registry_reaches_the_client_and_its_token_the_registry(tmp_path: Path) -> None:
    async with FakeRegistry(auth="bearer", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host) as proxy:
            response, _ = await proxy.get(MANIFEST)
            assert response.status == 401
            challenge = response.headers["WWW-Authenticate"]
            assert f'realm="{registry.base}/token"' in challenge
            assert 'scope="repository:team/app:pull"' in challenge
            async with proxy.session.get(f"{registry.base}/token", headers=basic("u", "p")) as token:
                bearer = {"Authorization": f"Bearer {(await token.json())['token']}"}
            assert (await proxy.get(MANIFEST, headers=bearer))[0].status == 200
            assert (await proxy.get(BLOB, headers=bearer))[1] == LAYER
            assert (await proxy.get(MANIFEST))[0].status == 401


async def test_credentials_do_not_follow_a_redirect(tmp_path: Path) -> None:
    async with FakeRegistry() as storage, FakeRegistry(auth="basic", user="u", password="p") as registry:
        storage.add_blob(LAYER)
        registry.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host, allowed=[storage.host]) as proxy:
            registry.script("/blobs/", redirect(f"{storage.base}/cdn/{DIGEST}"), method="GET")
            assert (await proxy.get(BLOB, headers=basic("u", "p")))[1] == LAYER
        assert storage.seen
        assert all(seen.authorization is None for seen in storage.seen)


async def test_credentials_for_one_registry_are_not_shown_to_another(tmp_path: Path, registry: FakeRegistry) -> None:
    async with FakeRegistry() as other:
        other.add_image("team/app", "1", [b"other"])
        async with proxied(tmp_path, registry.host, allowed=[other.host]) as proxy:
            await proxy.get(MANIFEST, headers=basic("u", "p"))
            assert (await proxy.get(f"{MANIFEST}?ns={other.host}"))[0].status == 200
        assert all(seen.authorization is None for seen in other.seen)


async def test_a_revoked_permission_ends_after_its_time(tmp_path: Path) -> None:
    async with FakeRegistry(auth="basic", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host, originals={"access_ttl": 0.0}) as proxy:
            assert (await proxy.get(BLOB, headers=basic("u", "p")))[0].status == 200
            registry.password = "new"
            assert (await proxy.get(BLOB, headers=basic("u", "p")))[0].status == 401


async def test_a_digest_alone_does_not_open_another_repository(tmp_path: Path) -> None:
    """What is cached for one repository is not given to who names the blob in another that has it not."""
    async with FakeRegistry() as registry:
        registry.add_image("team/secret", "1", [LAYER])
        async with proxied(tmp_path, registry.host) as proxy:
            assert (await proxy.get(f"/v2/team/secret/blobs/{DIGEST}"))[0].status == 200
            del registry.blobs[DIGEST]
            response, body = await proxy.get(f"/v2/mallory/own/blobs/{DIGEST}")
            assert response.status == 404
            assert json.loads(body)["errors"][0]["code"] == "BLOB_UNKNOWN"


async def test_own_credentials_are_lent_only_if_configured(tmp_path: Path) -> None:
    async with FakeRegistry(auth="basic", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        file = tmp_path / "config.json"
        auth = base64.b64encode(b"u:p").decode()
        file.write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
        for lend, expected in ((False, 401), (True, 200)):
            async with proxied(tmp_path / str(lend), registry.host, docker_config=str(file),
                               originals={"lend_credentials": lend}) as proxy:  # fmt: skip
                assert (await proxy.get(MANIFEST))[0].status == expected


async def test_clients_that_only_look_at_the_base_can_be_asked_to_log_in(tmp_path: Path) -> None:
    async with FakeRegistry(auth="basic", user="u", password="p") as registry:
        async with proxied(tmp_path / "a", registry.host) as proxy:
            assert (await proxy.get("/v2/"))[0].status == 200
        async with proxied(tmp_path / "b", registry.host, front={"login": True}) as proxy:
            response, _ = await proxy.get("/v2/")
            assert (response.status, response.headers["WWW-Authenticate"][:5]) == (401, "Basic")
            assert (await proxy.get("/v2/", headers=basic("u", "p")))[0].status == 200


@pytest.mark.parametrize(
    ("client", "uploads", "query", "scheme"),
    [("libpod/4.3.1", "refuse", "", "Basic"), ("skopeo/1.9.3", "refuse", "", "Basic"), ("", "refuse", "", "Basic"),
     ("docker/20.10.24 go/1.19", "refuse", "", "Bearer"), ("Go-http-client/1.1", "refuse", "", "Bearer"),
     ("libpod/4.3.1", "pass", "", "Bearer"),
     ("libpod/4.3.1", "refuse", "?ns=", "Bearer")],
)  # fmt: skip
async def test_only_who_has_passwords_for_the_upstream_alone_is_sent_to_its_token_server(
    tmp_path: Path, client: str, uploads: str, query: str, scheme: str
) -> None:
    async with FakeRegistry(auth="bearer", user="u", password="p") as registry:
        front = {"login": True, "uploads": uploads}
        async with proxied(tmp_path, registry.host, front=front) as proxy:
            base = f"/v2/{query}{registry.host if query else ''}"
            response, _ = await proxy.get(base, headers={"User-Agent": client})
            assert (response.status, response.headers["WWW-Authenticate"].split()[0]) == (401, scheme)


async def test_who_shows_an_empty_password_is_anybody(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host) as proxy:
            assert (await proxy.get(MANIFEST, headers=basic("", "")))[0].status == 200
        assert not any("Authorization" in seen.headers for seen in registry.seen)


# ---- registry away


async def test_while_the_registry_is_away_what_is_here_is_served_and_said_so(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    times = {"tag_ttl": 0.0, "access_ttl": 0.0}
    async with proxied(tmp_path, registry.host, originals=times, retries=0) as proxy:
        _, body = await proxy.get(MANIFEST)
        await proxy.get(BLOB)
        registry.script("/v2/", *[Fault(drop=True)] * 99)
        response, again = await proxy.get(MANIFEST)
        assert (response.status, again) == (200, body)
        assert response.headers["Warning"].startswith("299 - ")
        assert (await proxy.get(BLOB))[1] == LAYER
        assert (await proxy.get("/v2/team/app/manifests/2"))[0].status == 503
        assert {"registry away, answered from the cache", "registry away, an earlier permission holds"} <= set(
            proxy.fallbacks()
        )
        assert 'dadi_registry_proxy_requests_stale 1.0' in (await proxy.get("/metrics"))[1].decode()


async def test_a_registry_that_hangs_does_not_hold_up_who_can_be_served(tmp_path: Path, registry: FakeRegistry) -> None:
    times = {"tag_ttl": 0.0, "patience": 0.05}
    async with proxied(tmp_path, registry.host, originals=times) as proxy:
        await proxy.get(MANIFEST)
        registry.script("/manifests/", Fault(gate=asyncio.Event()))
        async with asyncio.timeout(5):
            response, _ = await proxy.get(MANIFEST)
        assert (response.status, "Warning" in response.headers) == (200, True)


async def test_a_private_image_is_served_without_delay_while_the_registry_hangs(tmp_path: Path) -> None:
    times = {"tag_ttl": 0.0, "access_ttl": 0.0, "patience": 0.05}
    async with FakeRegistry(auth="basic", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host, originals=times) as proxy:
            for path in (MANIFEST, BLOB):
                assert (await proxy.get(path, headers=basic("u", "p")))[0].status == 200
            proxy.proxy.upstream.originals.access._refused.clear()  # as a minute later
            registry.script("/v2/", *[Fault(gate=asyncio.Event())] * 99)
            async with asyncio.timeout(8):
                response, _ = await proxy.get(MANIFEST, headers=basic("u", "p"))
                assert (response.status, "Warning" in response.headers) == (200, True)
                assert (await proxy.get(BLOB, headers=basic("u", "p")))[1] == LAYER


async def test_beyond_the_configured_staleness_nothing_is_served(tmp_path: Path, registry: FakeRegistry) -> None:
    async with proxied(tmp_path, registry.host, originals={"tag_ttl": 0.0, "stale": 0.0}, retries=0) as proxy:
        await proxy.get(MANIFEST)
        registry.script("/v2/", *[status(503)] * 99)
        assert (await proxy.get(MANIFEST))[0].status == 503


async def test_a_tag_that_was_deleted_is_not_served_when_the_registry_goes_away_later(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with proxied(tmp_path, registry.host, originals={"tag_ttl": 0.0}, retries=0) as proxy:
        await proxy.get(MANIFEST)
        del registry.manifests["team/app", "1"]
        assert (await proxy.get(MANIFEST))[0].status == 404
        registry.script("/v2/", *[status(503)] * 99)
        assert (await proxy.get(MANIFEST))[0].status == 503


async def test_what_the_registry_asks_for_by_retry_after_is_passed_on(registry: FakeRegistry, tmp_path: Path) -> None:
    async with proxied(tmp_path, registry.host) as proxy:
        registry.script("/v2/", *[status(429, Retry_After="3600")] * 9)
        response, body = await proxy.get(MANIFEST)
        assert (response.status, json.loads(body)["errors"][0]["code"]) == (429, "TOOMANYREQUESTS")
        assert int(response.headers["Retry-After"]) > 3000


async def test_a_registry_that_is_not_allowed_is_never_contacted(registry: FakeRegistry, proxy: RunningProxy) -> None:
    for ns in ("127.0.0.1:1", "169.254.169.254", "localhost:5000", "other.example"):
        async with FakeRegistry():
            response, body = await proxy.get(f"{MANIFEST}?ns={ns}", headers=ACCEPT)
        assert (response.status, json.loads(body)["errors"][0]["code"]) == (403, "DENIED")


# ---- what is pushed, where that is configured


async def test_a_push_can_be_passed_on_to_the_registry(tmp_path: Path, registry: FakeRegistry) -> None:
    data = Random(4).randbytes(1 << 20)
    config = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
    async with proxied(tmp_path, registry.host, front={"uploads": "pass"}) as proxy:
        client = RegistryClient(RegistryConfig(allowed=(proxy.host,), plain_http=(proxy.host,)))
        ref = Reference.parse(f"{proxy.host}/team/new:1")
        try:
            for blob in (data, config):
                assert await client.push_blob(ref, digests.of(blob), len(blob), blob)
            document = {
                "schemaVersion": 2, "mediaType": media_types.OCI_MANIFEST,
                "config": {"mediaType": media_types.OCI_CONFIG, "digest": digests.of(config), "size": len(config)},
                "layers": [{"mediaType": media_types.OCI_LAYER, "digest": digests.of(data), "size": len(data)}],
            }  # fmt: skip
            pushed = await client.push_manifest(ref, json.dumps(document).encode(), media_types.OCI_MANIFEST)
        finally:
            await client.close()
        assert ("team/new", "1") in registry.manifests
        response, _ = await proxy.get("/v2/team/new/manifests/1")
        assert response.headers["Docker-Content-Digest"] == pushed.digest
        assert (await proxy.get(f"/v2/team/new/blobs/{digests.of(data)}"))[1] == data


async def test_a_location_outside_of_the_registry_is_left_to_the_client(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.upload_location = lambda path: "https://storage.example/upload?x=1"
    async with proxied(tmp_path, registry.host, front={"uploads": "pass"}) as proxy:
        response, _ = await proxy.ask("POST", f"/v2/team/app/blobs/uploads/?ns={registry.host}")
        assert (response.status, response.headers["Location"]) == (202, "https://storage.example/upload?x=1")
        response, _ = await proxy.ask("POST", "/v2/team/app/blobs/uploads/?ns=127.0.0.1:9")
        assert response.status == 403


# ---- a registry that names the blobs of others


async def test_another_registrys_word_does_not_open_what_came_from_a_private_one(tmp_path: Path) -> None:
    """It says yes to every digest: it has to send the bytes itself, and those are then checked."""
    async with FakeRegistry(auth="basic", user="u", password="p") as private, FakeRegistry() as evil:
        private.add_image("team/secret", "1", [LAYER])
        evil.script("/blobs/", *[Fault(status=200, body=b"x" * len(LAYER))] * 20)
        async with proxied(tmp_path, private.host, allowed=[evil.host]) as proxy:
            path = f"/v2/team/secret/blobs/{DIGEST}"
            assert (await proxy.get(path, headers=basic("u", "p")))[1] == LAYER
            for _ in range(2):
                async with proxy.session.get(f"{proxy.url}/v2/evil/app/blobs/{DIGEST}?ns={evil.host}") as response:
                    with pytest.raises(aiohttp.ClientError):
                        await response.content.readexactly(len(LAYER) + 1)
            assert (await proxy.get(path, headers=basic("u", "p")))[1] == LAYER, "and what is here stays"


async def test_a_registry_that_has_the_blob_sends_it_once_and_has_proved_it(tmp_path: Path) -> None:
    async with FakeRegistry(auth="basic", user="u", password="p") as private, FakeRegistry() as other:
        for one in (private, other):
            one.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, private.host, allowed=[other.host]) as proxy:
            await proxy.get(BLOB, headers=basic("u", "p"))
            for _ in range(3):
                assert (await proxy.get(f"{BLOB}?ns={other.host}"))[1] == LAYER
        assert (gets(private), gets(other)) == (1, 1)


async def test_what_everybody_may_read_is_shared_between_registries(tmp_path: Path, registry: FakeRegistry) -> None:
    async with FakeRegistry() as other:
        other.add_image("team/app", "1", [LAYER])
        async with proxied(tmp_path, registry.host, allowed=[other.host]) as proxy:
            assert (await proxy.get(BLOB))[1] == LAYER
            assert (await proxy.get(f"{BLOB}?ns={other.host}"))[1] == LAYER
        assert gets(other) == 0


async def test_a_stalled_stream_from_a_registry_opens_nothing_that_comes_from_another(tmp_path: Path) -> None:
    """What is arriving from his own registry a caller may have; what is here besides is another matter."""
    async with FakeRegistry(auth="basic", user="u", password="p") as private, FakeRegistry() as evil:
        private.add_image("team/secret", "1", [LAYER])
        evil.blobs[DIGEST] = b"x" * len(LAYER)
        evil.script("/blobs/", Fault(stall_after=10), method="GET")
        async with proxied(tmp_path, private.host, allowed=[evil.host]) as proxy:
            theirs = f"{proxy.url}/v2/evil/app/blobs/{DIGEST}?ns={evil.host}"
            async with proxy.session.get(theirs) as stalled:
                assert await stalled.content.readexactly(5) == b"xxxxx"
                path = f"/v2/team/secret/blobs/{DIGEST}"
                assert (await proxy.get(path, headers=basic("u", "p")))[1] == LAYER, "not held up by the other"
                async with proxy.session.get(theirs) as again:
                    assert await again.content.readexactly(5) == b"xxxxx"


async def test_an_answer_that_fails_in_the_middle_is_cut_off_and_nothing_is_taken_for_its_rest(
    proxy: RunningProxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    await proxy.get(BLOB)

    async def broken(*arguments: object) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(answering, "send_file", broken)
    with pytest.raises(aiohttp.ClientError):
        await proxy.get(BLOB, headers={"Range": f"bytes=0-{answering.FIRST_PART + 39}"})
    monkeypatch.undo()
    assert (await proxy.get(BLOB))[1] == LAYER
