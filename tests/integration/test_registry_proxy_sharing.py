"""What callers of one proxy share, and what each has for himself: fetches, credentials, answers that are kept.

Everything here goes straight to a registry, or through one superpeer.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from random import Random

import pytest
from structlog.testing import capture_logs

from dadi import digest as digests
from dadi.originals import service
from dadi.originals.client import FromSuperpeers
from tests.fakes.registry import FakeRegistry, Fault, cut, status
from tests.lab.proxies import proxied
from tests.lab.services import running

LAYER = Random(1).randbytes(3 << 20)
DIGEST = digests.of(LAYER)
BLOB = f"/v2/team/app/blobs/{DIGEST}"
MANIFEST = "/v2/team/app/manifests/1"
A, B = ({"Authorization": f"Bearer {token}"} for token in "ab")


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [LAYER])
        yield fake


@pytest.fixture
async def private() -> AsyncIterator[FakeRegistry]:
    """A registry that lets in who shows "a" or "b", which are good until the test says otherwise."""
    async with FakeRegistry(auth="bearer", user="u", password="p") as fake:
        fake.add_image("team/app", "1", [LAYER])
        fake.tokens |= {"a", "b"}
        yield fake


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not true():
            await asyncio.sleep(0.005)


# ---- nothing is fetched that nobody reads


ASKED = [("HEAD", {}, 200), ("GET", {"If-None-Match": f'"{DIGEST}"'}, 304), ("GET", {"Range": "bytes=9999999-"}, 416)]


@pytest.mark.parametrize("through", ["registry", "superpeer"])
async def test_an_answer_without_bytes_begins_no_download(
    tmp_path: Path, registry: FakeRegistry, through: str
) -> None:
    async with running(tmp_path / "s", registry.host) as run:
        urls = (run.url,) if through == "superpeer" else ()
        async with proxied(tmp_path / "p", registry.host, superpeers=urls) as proxy:
            for method, headers, expected in ASKED:
                response, body = await proxy.ask(method, BLOB, headers=headers)
                assert (response.status, body) == (expected, b"")
            await proxy.get("/v2/team/app/tags/list")  # had one begun it would be under way by now
        async with proxied(tmp_path / "q", registry.host) as proxy:
            url = f"{run.url}/v1/original/{DIGEST}?reference={registry.host}/team/app"
            async with proxy.session.head(url) as response:
                assert response.status == 200
    assert registry.asked("/blobs/", "GET") == []


# ---- whose credentials


async def test_one_whose_token_has_run_out_does_not_fail_who_asks_with_him(
    tmp_path: Path, private: FakeRegistry
) -> None:
    async with proxied(tmp_path, private.host, originals={"tag_ttl": 0.0}) as proxy:
        for headers in (A, B):
            assert (await proxy.get(MANIFEST, headers=headers))[0].status == 200
        gate = asyncio.Event()
        private.script("/manifests/", Fault(gate=gate), method="HEAD")
        private.seen.clear()
        first = asyncio.create_task(proxy.get(MANIFEST, headers=A))
        await until(lambda: private.seen)
        others = [asyncio.create_task(proxy.get(MANIFEST, headers=headers)) for headers in (A, B, B)]
        await proxy.get("/v2/")  # they have come after this
        private.tokens.discard("a")
        gate.set()
        response, _ = await first
        assert (response.status, response.headers["WWW-Authenticate"][:6]) == (401, "Bearer"), "he can log in anew"
        assert [(await other)[0].status for other in others] == [401, 200, 200]


async def test_a_blob_goes_on_with_the_next_callers_token_where_the_firsts_has_run_out(
    tmp_path: Path, private: FakeRegistry
) -> None:
    async with proxied(tmp_path, private.host) as proxy:
        for headers in (A, B):
            assert (await proxy.ask("HEAD", BLOB, headers=headers))[0].status == 200
        gate = asyncio.Event()
        private.script("/blobs/", cut(1 << 20, lambda: private.tokens.discard("a"), gate=gate), method="GET")
        first = asyncio.create_task(proxy.get(BLOB, headers=A))
        await until(lambda: private.asked("/blobs/", "GET"))
        second = asyncio.create_task(proxy.get(BLOB, headers=B))
        await until(lambda: proxy.proxy.upstream.statistics()["originals"]["readers"] == 2)
        gate.set()
        assert [(await task)[1] for task in (first, second)] == [LAYER, LAYER]
        last = private.asked("/blobs/", "GET")[-1]
        assert last.authorization == "Bearer b"
        assert last.headers["Range"].startswith("bytes=")
        assert not last.headers["Range"].startswith("bytes=0-"), "it goes on, and does not begin anew"


async def test_a_blob_fails_when_nobodys_token_is_good_enough(tmp_path: Path, private: FakeRegistry) -> None:
    async with proxied(tmp_path, private.host) as proxy:
        for headers in (A, B):
            assert (await proxy.ask("HEAD", BLOB, headers=headers))[0].status == 200
        private.tokens.clear()
        assert (await proxy.get(BLOB, headers=B))[0].status in (401, 403)
        assert not proxy.store.has(DIGEST)


async def test_chunks_are_read_for_another_caller_where_one_is_refused(tmp_path: Path, private: FakeRegistry) -> None:
    async with (
        running(tmp_path / "s", private.host) as run,
        proxied(tmp_path / "p", private.host, superpeers=(run.url,)) as proxy,
    ):
        assert (await proxy.get(BLOB, headers=B))[1] == LAYER
        await until(lambda: run.superpeer.store.has(DIGEST))
        assert (await proxy.ask("HEAD", BLOB, headers=A))[0].status == 200
        private.tokens.discard("a")
        run.superpeer.originals.access._granted.clear()
        upstream, blob = proxy.proxy.upstream, run.superpeer.store.find(DIGEST)
        assert isinstance(upstream, FromSuperpeers)
        assert blob is not None
        assert [one.caller.authorization for one in upstream._asked.of(DIGEST)] == ["Bearer a", "Bearer b"]
        assert await upstream.read(blob, range(1)) == [LAYER[: blob.table.chunk_size]]
        assert [one.caller.authorization for one in upstream._asked.of(DIGEST)] == ["Bearer b"]


async def test_tokens_of_callers_are_in_no_log_status_or_repr(tmp_path: Path, private: FakeRegistry) -> None:
    secret = "canary-1d7c"
    private.tokens.add(secret)
    headers = {"Authorization": f"Bearer {secret}"}
    with capture_logs() as logs:
        async with (
            running(tmp_path / "s", private.host) as run,
            proxied(tmp_path / "p", private.host, superpeers=(run.url,)) as through,
            proxied(tmp_path / "q", private.host, originals={"tag_ttl": 0.0}) as direct,
        ):
            said: list[object] = []
            for proxy in (through, direct):
                assert (await proxy.get(BLOB, headers=headers))[1] == LAYER
                private.script("/v2/", *[status(401, secret.encode())] * 4)
                said += [await proxy.get(path, headers=headers) for path in (MANIFEST, BLOB, "/v1/status", "/metrics")]
                private._script.clear()
                upstream = proxy.proxy.upstream
                said += [upstream, upstream.statistics(), proxy.proxy.fallbacks.statistics(), vars(upstream)]
            private.tokens.clear()
            said.append(await direct.get(MANIFEST, headers=headers))
            said.append([vars(direct.proxy.upstream.originals.access)])
        told = repr(logs) + repr([body for _, body in filter(lambda one: isinstance(one, tuple), said)])
        told += repr([one for one in said if not isinstance(one, tuple)])
    assert "team/app" in told, "something was said"
    assert secret not in told


# ---- storms


async def test_a_thousand_looks_at_the_base_cost_the_registry_one(tmp_path: Path, private: FakeRegistry) -> None:
    async with proxied(tmp_path, private.host, front={"login": True}) as proxy:
        answers = await asyncio.gather(*(proxy.get("/v2/") for _ in range(1000)))
        assert {response.status for response, _ in answers} == {401}
    assert [seen.path for seen in private.seen] == ["/v2/"]


async def test_a_thousand_pulls_of_a_private_tag_cost_the_registry_what_one_does(
    tmp_path: Path, private: FakeRegistry
) -> None:
    costs = []
    for number, count in enumerate((1, 500)):
        private.seen.clear()
        async with proxied(tmp_path / str(number), private.host) as proxy:
            answers = await asyncio.gather(*(proxy.get(MANIFEST, headers=A) for _ in range(count)))
            assert {response.status for response, _ in answers} == {200}
            answers = await asyncio.gather(*(proxy.get(MANIFEST) for _ in range(count)))
            assert {response.status for response, _ in answers} == {401}
        costs.append([(seen.method, seen.path) for seen in private.seen])
    assert costs[0] == costs[1]


async def test_each_of_a_thousand_tokens_costs_the_registry_one_request(tmp_path: Path, private: FakeRegistry) -> None:
    tokens = [f"token-{number}" for number in range(300)]
    private.tokens.update(tokens)
    async with proxied(tmp_path, private.host, originals={"tag_ttl": 60.0}) as proxy:
        assert (await proxy.get(MANIFEST, headers=A))[0].status == 200
        private.seen.clear()
        headers = [{"Authorization": f"Bearer {token}"} for token in tokens]
        answers = await asyncio.gather(*(proxy.get(MANIFEST, headers=each) for each in headers))
        assert {response.status for response, _ in answers} == {200}
        assert (await proxy.get(MANIFEST, headers={"Authorization": "Bearer wrong"}))[0].status == 401
    assert len(private.seen) <= len(tokens) + 3


async def test_through_a_superpeer_the_base_is_asked_for_once_too(tmp_path: Path, private: FakeRegistry) -> None:
    async with (
        running(tmp_path / "s", private.host) as run,
        proxied(tmp_path / "p", private.host, superpeers=(run.url,), front={"login": True}) as proxy,
    ):
        for _ in range(20):
            assert (await proxy.get("/v2/"))[0].status == 401
    assert [seen.path for seen in private.seen] == ["/v2/"]


async def test_through_two_superpeers_a_tag_and_its_digest_are_one_request(tmp_path: Path) -> None:
    async with (
        FakeRegistry() as registry,
        running(tmp_path / "a", registry.host) as one,
        running(tmp_path / "b", registry.host) as other,
        proxied(tmp_path / "p", registry.host, superpeers=(one.url, other.url)) as proxy,
    ):
        for tag in map(str, range(8)):
            digest = registry.add_image("team/app", tag, [tag.encode()])["digest"]
            for name in (tag, digest):
                assert (await proxy.get(f"/v2/team/app/manifests/{name}"))[0].headers["Docker-Content-Digest"] == digest
        assert [seen.path[-1] for seen in registry.seen] == [*map(str, range(8))]


# ---- what is not what it says


@pytest.mark.parametrize("through", ["registry", "superpeer"])
async def test_a_blob_is_not_empty_only_because_the_registry_says_so(
    tmp_path: Path, registry: FakeRegistry, through: str
) -> None:
    async with running(tmp_path / "s", registry.host) as run:
        urls = (run.url,) if through == "superpeer" else ()
        async with proxied(tmp_path / "p", registry.host, superpeers=urls) as proxy:
            registry.script("/blobs/", *[status(200)] * 9, method="HEAD")
            for method in ("GET", "HEAD"):
                assert (await proxy.ask(method, BLOB))[0].status == 502
            registry._script.clear()
            assert (await proxy.get(BLOB))[1] == LAYER, "that was not remembered"


async def test_a_size_that_was_wrong_once_is_asked_for_again(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service, "_DOUBTED_FOR", 0.0)
    async with proxied(tmp_path, registry.host, retries=0) as proxy:
        registry.script("/blobs/", status(200, b"<html>"), method="HEAD")
        assert (await proxy.get(BLOB))[0].status == 502
        assert (await proxy.get(BLOB))[1] == LAYER


async def test_the_blob_without_bytes_can_be_had(tmp_path: Path, registry: FakeRegistry) -> None:
    empty = registry.add_blob(b"")
    async with proxied(tmp_path, registry.host) as proxy:
        response, body = await proxy.get(f"/v2/team/app/blobs/{empty}")
        assert (response.status, body, response.headers["Content-Length"]) == (200, b"", "0")


async def test_no_page_of_tags_is_taken_for_another(tmp_path: Path, registry: FakeRegistry) -> None:
    """What a client writes into one parameter must not look like two of them."""
    async with proxied(tmp_path, registry.host) as proxy:
        registry.script("/tags/list", status(200, b'{"name":"team/app","tags":["odd"]}'))
        _, odd = await proxy.get("/v2/team/app/tags/list?last=a%26n=2")
        registry.script("/tags/list", status(200, b'{"name":"team/app","tags":["b","c"]}'))
        _, page = await proxy.get("/v2/team/app/tags/list?last=a&n=2")
        assert (json.loads(odd)["tags"], json.loads(page)["tags"]) == (["odd"], ["b", "c"])


async def test_an_artifact_type_that_none_can_be_is_refused(registry: FakeRegistry, tmp_path: Path) -> None:
    async with proxied(tmp_path, registry.host) as proxy:
        for text in ("x" * 256, "a%0Ab"):
            assert (await proxy.get(f"/v2/team/app/referrers/{DIGEST}?artifactType={text}"))[0].status == 400
    assert not registry.seen


# ---- what anybody may know


async def test_the_status_shows_numbers_and_no_names(tmp_path: Path, registry: FakeRegistry) -> None:
    async with proxied(tmp_path, registry.host, originals={"tag_ttl": 0.0}, retries=0) as proxy:
        await proxy.get(MANIFEST)
        await proxy.get(BLOB)
        await until(lambda: proxy.proxy.upstream.statistics()["originals"]["blobs"])
        registry.script("/v2/", *[status(503)] * 99)
        await proxy.get(MANIFEST)
        _, body = await proxy.get("/v1/status")
        told = json.loads(body)
        assert told["served"]["requests"] == 1
        assert told["originals"]["blobs"] == 1
        assert [row["kind"] for row in told["fallbacks"]] == ["registry away, answered from the cache"]
        _, metrics = await proxy.get("/metrics")
        for text in (body, metrics):
            for name in (b"team", registry.host.encode(), DIGEST[7:20].encode(), b"manifest team"):
                assert name not in text
        assert "team/app" in json.dumps(proxy.proxy.fallbacks.statistics()), "the node's own socket has them"


async def test_what_was_remembered_of_blobs_does_not_grow_for_ever(tmp_path: Path, registry: FakeRegistry) -> None:
    layers = [Random(number).randbytes(2000) for number in range(8)]
    registry.add_image("team/many", "1", layers)
    async with proxied(tmp_path, registry.host, originals={"most_records": 3}) as proxy:
        for layer in layers:
            assert (await proxy.get(f"/v2/team/many/blobs/{digests.of(layer)}"))[1] == layer
        originals = proxy.proxy.upstream.originals
        await until(lambda: not originals.intake.busy)
        assert len(originals.proven._came) <= 3
        assert originals.coming.proving == {}
        assert (await proxy.get(f"/v2/team/many/blobs/{digests.of(layers[0])}"))[1] == layers[0]


async def test_what_another_registry_has_to_prove_is_forgotten_when_it_is_done(tmp_path: Path) -> None:
    layers = [Random(number).randbytes(2000) for number in range(3)]
    async with FakeRegistry(auth="basic", user="u", password="p") as secret, FakeRegistry() as other:
        for one in (secret, other):
            one.add_image("team/app", "1", layers)
        async with proxied(tmp_path, secret.host, allowed=[other.host]) as proxy:
            for layer in layers:
                path = f"/v2/team/app/blobs/{digests.of(layer)}"
                good = {"Authorization": "Basic dTpw"}
                assert (await proxy.get(path, headers=good))[1] == layer
                assert (await proxy.get(f"{path}?ns={other.host}"))[1] == layer
            originals = proxy.proxy.upstream.originals
            assert len(originals.coming.proving) <= 1
