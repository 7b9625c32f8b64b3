"""The pull side of the OCI distribution specification 1.1, case by case.

Behind the proxy: a fake registry; Debian's; and Debian's with a superpeer in between, as it is in a node. Each test
names the section that it is from; the cases are those of the specification's conformance list ("Pull" and "Content
Discovery"), and what the text asks for beyond it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dadi import digest as digests
from dadi.oci import media_types
from dadi.oci.config import RegistryConfig
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from tests.fakes.registry import FakeRegistry
from tests.lab.proxies import ACCEPT, RunningProxy, proxied
from tests.lab.registry import DockerRegistry, available
from tests.lab.services import running

LAYER = b"a layer, as far as a registry cares" * 1000
CONFIG = json.dumps({"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": []}}).encode()
MISSING = digests.of(b"nowhere")
TAGS = ("latest", "v1", "v2", "v3")


def described(media_type: str, data: bytes) -> dict[str, Any]:
    return {"mediaType": media_type, "digest": digests.of(data), "size": len(data)}


MANIFEST = json.dumps({
    "schemaVersion": 2, "mediaType": media_types.OCI_MANIFEST,
    "config": described(media_types.OCI_CONFIG, CONFIG), "layers": [described(media_types.OCI_LAYER, LAYER)],
}).encode()  # fmt: skip
INDEX = json.dumps({
    "schemaVersion": 2, "mediaType": media_types.OCI_INDEX,
    "manifests": [described(media_types.OCI_MANIFEST, MANIFEST)],
}).encode()  # fmt: skip


def artifact(kind: str) -> bytes:
    return json.dumps({
        "schemaVersion": 2, "mediaType": media_types.OCI_MANIFEST, "artifactType": kind,
        "config": described(media_types.OCI_EMPTY, b"{}"), "layers": [described(media_types.OCI_EMPTY, b"{}")],
        "subject": described(media_types.OCI_MANIFEST, MANIFEST), "annotations": {"org.example.kind": kind},
    }).encode()  # fmt: skip


@pytest.fixture(scope="module")
def debians(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Debian's registry, filled, for all tests: none of them changes it. Empty: there is none here."""
    if not available():
        yield ""
        return
    directory = tmp_path_factory.mktemp("registry")
    with DockerRegistry(directory) as real:
        asyncio.run(fill(real.host))
        yield real.host


@pytest.fixture(params=["fake", "docker-registry", "docker-registry behind a superpeer"])
async def site(request: pytest.FixtureRequest, tmp_path: Path, debians: str
               ) -> AsyncIterator[tuple[str, tuple[str, ...]]]:  # fmt: skip
    """A filled registry, and the superpeers that are asked in its place."""
    if request.param == "fake":
        async with FakeRegistry(referrers=True) as fake:
            fake.add_blob(b"{}")
            await fill(fake.host)
            yield fake.host, ()
        return
    if not debians:
        pytest.skip("docker-registry is not installed (scripts/setup does it)")
    if request.param == "docker-registry":
        yield debians, ()
        return
    async with running(tmp_path / "superpeer", debians) as run:
        yield debians, (run.url,)


async def fill(host: str) -> None:
    client = RegistryClient(RegistryConfig(allowed=(host,), plain_http=(host,)))
    ref = Reference.parse(f"{host}/team/app:latest")
    try:
        for data in (LAYER, CONFIG, b"{}"):
            await client.push_blob(ref, digests.of(data), len(data), data)
        for tag in TAGS:
            await client.push_manifest(Reference.parse(f"{host}/team/app:{tag}"), MANIFEST, media_types.OCI_MANIFEST)
        await client.push_manifest(Reference.parse(f"{host}/team/app:index"), INDEX, media_types.OCI_INDEX)
        for kind in ("application/vnd.example.a", "application/vnd.example.b"):
            await client.push_referrer(ref, artifact(kind), media_types.OCI_MANIFEST, digests.of(MANIFEST))
    finally:
        await client.close()


@pytest.fixture
async def proxy(tmp_path: Path, site: tuple[str, tuple[str, ...]]) -> AsyncIterator[RunningProxy]:
    host, superpeers = site
    async with proxied(tmp_path / "proxy", host, superpeers=superpeers) as made:
        yield made


def code(body: bytes) -> str:
    """Return the code of an error body: {"errors": [{"code", "message", "detail"}]} ("Error Codes")."""
    (error,) = json.loads(body)["errors"]
    assert set(error) == {"code", "message", "detail"}
    assert error["code"] == error["code"].upper()
    return str(error["code"])


# ---- "Determining Support" (end-1)


async def test_the_base_answers_200(proxy: RunningProxy) -> None:
    for path in ("/v2/", "/v2"):
        response, _ = await proxy.get(path)
        assert response.status == 200
        assert response.headers["Docker-Distribution-API-Version"] == "registry/2.0"


# ---- "Pulling manifests" (end-3)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("name", ["latest", digests.of(MANIFEST)])
async def test_a_manifest_by_tag_and_by_digest(proxy: RunningProxy, method: str, name: str) -> None:
    response, body = await proxy.ask(method, f"/v2/team/app/manifests/{name}", headers=ACCEPT)
    assert response.status == 200
    assert response.headers["Docker-Content-Digest"] == digests.of(MANIFEST)
    assert response.headers["Content-Type"] == media_types.OCI_MANIFEST
    assert int(response.headers["Content-Length"]) == len(MANIFEST)
    assert body == (MANIFEST if method == "GET" else b"")


async def test_an_index_keeps_its_media_type(proxy: RunningProxy) -> None:
    response, body = await proxy.get("/v2/team/app/manifests/index", headers=ACCEPT)
    assert (response.headers["Content-Type"], body) == (media_types.OCI_INDEX, INDEX)


@pytest.mark.parametrize("name", ["latest", "index", digests.of(INDEX)])
async def test_whatever_a_client_accepts_it_is_told_what_there_is(proxy: RunningProxy, name: str) -> None:
    """"Pulling manifests": Content-Type says what is sent; a client that did not ask for it sees so before it parses.

    Nothing is converted: its digest would be another one. So one answer is right for all who ask.
    """
    expected = (media_types.OCI_MANIFEST, MANIFEST) if name == "latest" else (media_types.OCI_INDEX, INDEX)
    several = [("Accept", "application/json"), ("Accept", media_types.OCI_MANIFEST), ("Accept", "*/*;q=0.1")]
    for accepted in ([], several, [("Accept", f"{media_types.DOCKER_MANIFEST};q=0.5, text/html;q=1")],
                     [("Accept", media_types.OCI_INDEX)], [("Accept", ";;,q=x")]):  # fmt: skip
        options = {"headers": accepted, "skip_auto_headers": ["Accept"]}
        response, body = await proxy.get(f"/v2/team/app/manifests/{name}", **options)
        assert (response.headers["Content-Type"], body) == expected, accepted


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("name", ["nonexistent", MISSING])
async def test_a_manifest_that_does_not_exist_is_404(proxy: RunningProxy, method: str, name: str) -> None:
    response, body = await proxy.ask(method, f"/v2/team/app/manifests/{name}")
    assert response.status == 404
    assert method == "HEAD" or code(body) == "MANIFEST_UNKNOWN"


async def test_a_repository_that_does_not_exist_is_404(proxy: RunningProxy) -> None:
    assert (await proxy.get("/v2/no/such/manifests/latest"))[0].status == 404
    assert (await proxy.get(f"/v2/no/such/blobs/{digests.of(LAYER)}"))[0].status in (200, 404)  # the fake shares blobs
    response, body = await proxy.get("/v2/no/such/tags/list")
    assert (response.status, code(body)) == (404, "NAME_UNKNOWN")


async def test_a_manifest_that_is_known_is_not_sent_again(proxy: RunningProxy) -> None:
    """RFC 9110, 13.1.2; the specification's "Backwards Compatibility" leaves ETags to the registry."""
    first, _ = await proxy.get("/v2/team/app/manifests/latest")
    response, body = await proxy.get("/v2/team/app/manifests/latest", headers={"If-None-Match": first.headers["ETag"]})
    assert (response.status, body) == (304, b"")


@pytest.mark.parametrize("path", [
    "/v2/team/app/manifests/latest", f"/v2/team/app/manifests/{digests.of(MANIFEST)}", "/v2/team/app/manifests/index",
    f"/v2/team/app/blobs/{digests.of(LAYER)}", "/v2/team/app/manifests/nonexistent", f"/v2/team/app/blobs/{MISSING}",
    "/v2/no/such/tags/list",
])  # fmt: skip
async def test_head_says_what_get_says_without_a_body(proxy: RunningProxy, path: str) -> None:
    """"Checking if content exists in the registry"; RFC 9110, 9.3.2."""
    await proxy.get(path)  # what is asked of the registry by now is not the question
    given, body = await proxy.get(path)
    told, nothing = await proxy.ask("HEAD", path)
    assert (told.status, nothing) == (given.status, b"")
    assert {**told.headers, "Date": ""} == {**given.headers, "Date": ""}
    assert int(told.headers["Content-Length"]) == len(body)


# ---- "Pulling blobs" (end-2)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_blob(proxy: RunningProxy, method: str) -> None:
    response, body = await proxy.ask(method, f"/v2/team/app/blobs/{digests.of(LAYER)}")
    assert response.status == 200
    assert response.headers["Docker-Content-Digest"] == digests.of(LAYER)
    assert int(response.headers["Content-Length"]) == len(LAYER)
    if method == "GET":
        assert "sha256:" + hashlib.sha256(body).hexdigest() == digests.of(LAYER)


@pytest.mark.parametrize("method", ["GET", "HEAD"])
async def test_a_blob_that_does_not_exist_is_404(proxy: RunningProxy, method: str) -> None:
    response, body = await proxy.ask(method, f"/v2/team/app/blobs/{MISSING}")
    assert response.status == 404
    assert method == "HEAD" or code(body) == "BLOB_UNKNOWN"


@pytest.mark.parametrize("warm", [True, False])
async def test_a_range_of_a_blob(proxy: RunningProxy, warm: bool) -> None:
    """A registry SHOULD support the Range header in accordance with RFC 9110."""
    path = f"/v2/team/app/blobs/{digests.of(LAYER)}"
    if warm:
        await proxy.get(path)
    response, body = await proxy.get(path, headers={"Range": "bytes=10-19"})
    assert (response.status, body) == (206, LAYER[10:20])
    assert response.headers["Content-Range"] == f"bytes 10-19/{len(LAYER)}"
    for asked in (f"bytes={len(LAYER) - 10}-", "bytes=-10", f"bytes={len(LAYER) - 10}-{len(LAYER) + 99}"):
        response, body = await proxy.get(path, headers={"Range": asked})
        assert (response.status, body) == (206, LAYER[-10:])
    for asked in (f"bytes={len(LAYER)}-", f"bytes={len(LAYER)}-{len(LAYER) + 99}", "bytes=500-0"):
        response, body = await proxy.get(path, headers={"Range": asked})
        assert (response.status, response.headers["Content-Range"]) == (416, f"bytes */{len(LAYER)}")
        assert body == b""
    response, body = await proxy.get(path, headers={"Range": "bytes=10-19", "If-Range": '"another"'})
    assert (response.status, len(body)) == (200, len(LAYER))


async def test_what_is_no_range_gives_the_whole(proxy: RunningProxy) -> None:
    """RFC 9110, 14.2: a Range header that is not understood, or asks for several ranges, may be ignored."""
    path = f"/v2/team/app/blobs/{digests.of(LAYER)}"
    for asked in ("bytes=0-1,5-6", "lines=1-2", "bytes=a-b"):
        response, body = await proxy.get(path, headers={"Range": asked})
        assert (response.status, body) == (200, LAYER), asked
    response, body = await proxy.ask("HEAD", path, headers={"Range": "bytes=0-9"})
    assert (response.status, response.headers["Content-Length"]) == (200, str(len(LAYER)))


async def test_an_invalid_digest_is_400(proxy: RunningProxy) -> None:
    """"Error Codes": DIGEST_INVALID, code-4."""
    hexadecimal = digests.of(LAYER)[7:]
    for wrong in ("sha256:short", "md5:" + "0" * 32, "sha256:" + "Z" * 64, f"sha256:{hexadecimal.upper()}",
                  f"SHA256:{hexadecimal}", f"sha256:{hexadecimal[:-1]}", f"sha512:{hexadecimal * 2}"):  # fmt: skip
        for kind in ("blobs", "manifests", "referrers"):
            response, body = await proxy.get(f"/v2/team/app/{kind}/{wrong}")
            assert (response.status, code(body)) == (400, "DIGEST_INVALID"), (kind, wrong)


async def test_an_invalid_name_is_400(proxy: RunningProxy) -> None:
    """"Error Codes": NAME_INVALID, code-7."""
    for wrong in ("Team/app", "team//app", "-team/app"):
        response, body = await proxy.get(f"/v2/{wrong}/manifests/latest")
        assert (response.status, code(body)) == (400, "NAME_INVALID")


# ---- "Content Discovery": "Listing Tags" (end-8a, end-8b)


async def test_all_tags(proxy: RunningProxy) -> None:
    response, body = await proxy.get("/v2/team/app/tags/list")
    assert response.status == 200
    document = json.loads(body)
    assert document["name"] == "team/app"
    assert {*TAGS, "index"} <= set(document["tags"])
    assert document["tags"] == sorted(document["tags"]), "in lexical order"


async def test_tags_page_by_page(proxy: RunningProxy) -> None:
    """n tags, after `last`, in lexical order; the next page by the Link header (RFC 8288), which leads to us.

    Also where the registry behind does not do pages: Debian's docker-registry answers with all tags.
    """
    path: str | None = "/v2/team/app/tags/list?n=2"
    found: list[str] = []
    while path:
        response, body = await proxy.get(path)
        assert response.status == 200
        page = json.loads(body)["tags"]
        assert 0 < len(page) <= 2
        found += page
        path = response.headers.get("Link", "").partition("<")[2].partition(">")[0] or None
    assert found == sorted(set(found))
    assert {*TAGS, "index"} <= set(found)
    _, body = await proxy.get("/v2/team/app/tags/list?n=1&last=v1")
    assert json.loads(body)["tags"] == ["v2"]
    response, body = await proxy.get("/v2/team/app/tags/list?n=100&last=v1")
    assert (json.loads(body)["tags"], "Link" in response.headers) == (["v2", "v3"], False)
    response, body = await proxy.get("/v2/team/app/tags/list?n=0")
    assert (json.loads(body)["tags"], "Link" in response.headers) == ([], False)
    _, body = await proxy.get("/v2/team/app/tags/list?last=v2")
    assert json.loads(body)["tags"] == ["v3"]


# ---- "Content Discovery": "Listing Referrers" (end-12a, end-12b)


async def test_referrers(proxy: RunningProxy) -> None:
    response, body = await proxy.get(f"/v2/team/app/referrers/{digests.of(MANIFEST)}")
    assert response.status == 200
    assert response.headers["Content-Type"] == media_types.OCI_INDEX
    document = json.loads(body)
    assert (document["schemaVersion"], document["mediaType"]) == (2, media_types.OCI_INDEX)
    assert {entry["digest"] for entry in document["manifests"]} == {
        digests.of(artifact("application/vnd.example.a")), digests.of(artifact("application/vnd.example.b")),
    }  # fmt: skip
    for entry in document["manifests"]:
        assert entry["annotations"]["org.example.kind"] == entry["artifactType"]


async def test_referrers_of_one_type(proxy: RunningProxy) -> None:
    response, body = await proxy.get(
        f"/v2/team/app/referrers/{digests.of(MANIFEST)}?artifactType=application/vnd.example.b"
    )
    assert response.headers["OCI-Filters-Applied"] == "artifactType"
    assert [entry["artifactType"] for entry in json.loads(body)["manifests"]] == ["application/vnd.example.b"]


async def test_nothing_refers_to_it_is_an_empty_list(proxy: RunningProxy) -> None:
    """If the query results in no matching referrers, an empty manifest list MUST be returned, not a 404."""
    response, body = await proxy.get(f"/v2/team/app/referrers/{digests.of(INDEX)}")
    assert (response.status, json.loads(body)["manifests"]) == (200, [])


async def test_an_invalid_digest_of_a_subject_is_400(proxy: RunningProxy) -> None:
    assert (await proxy.get("/v2/team/app/referrers/sha256:short"))[0].status == 400


# ---- "Push", "Content Management": a mirror does neither (end-4 to end-11)


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/v2/team/app/blobs/uploads/"), ("PATCH", "/v2/team/app/blobs/uploads/1"),
     ("PUT", "/v2/team/app/blobs/uploads/1"), ("GET", "/v2/team/app/blobs/uploads/1"),
     ("PUT", "/v2/team/app/manifests/latest"), ("DELETE", "/v2/team/app/manifests/latest"),
     ("DELETE", f"/v2/team/app/blobs/{MISSING}")],
)  # fmt: skip
async def test_a_push_is_unsupported(proxy: RunningProxy, method: str, path: str) -> None:
    """"Error Codes": UNSUPPORTED, code-13."""
    response, body = await proxy.ask(method, path)
    assert (response.status, code(body)) == (405, "UNSUPPORTED")


# ---- containerd, docs/hosts.md: whose image it is


async def test_the_registry_may_be_named_by_ns_or_by_the_paths_first_part(
    site: tuple[str, tuple[str, ...]], tmp_path: Path
) -> None:
    host, superpeers = site
    async with proxied(tmp_path / "elsewhere", "127.0.0.1:9", allowed=[host], retries=0,
                       superpeers=superpeers) as proxy:  # fmt: skip
        assert (await proxy.get(f"/v2/team/app/manifests/latest?ns={host}"))[1] == MANIFEST
        assert (await proxy.get(f"/v2/{host}/team/app/manifests/v1"))[1] == MANIFEST
        assert (await proxy.get("/v2/team/app/manifests/latest"))[0].status in (403, 503), "not allowed, or not there"
