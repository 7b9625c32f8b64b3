"""What is pushed through the proxy, passed on: whole or not at all, to the registry and to nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import pytest
from aiohttp.test_utils import make_mocked_request

from dadi import digest as digests
from dadi.errors import RegistryNotAllowed
from dadi.oci.config import RegistryConfig
from dadi.oci.reference import Reference
from registry_proxy.paths import Kind, Route
from registry_proxy.uploads import Uploads
from tests.fakes.authority import Authority
from tests.fakes.registry import FakeRegistry, Fault, cut, redirect, status
from tests.lab.proxies import RunningProxy, proxied
from tests.lab.services import running

DATA = Random(4).randbytes(1 << 20)
DIGEST = digests.of(DATA)
BEGIN = "/v2/team/app/blobs/uploads/"


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


@pytest.fixture
async def proxy(tmp_path: Path, registry: FakeRegistry) -> AsyncIterator[RunningProxy]:
    async with proxied(tmp_path, registry.host, front={"uploads": "pass"}, retries=0) as running:
        yield running


async def session_of(proxy: RunningProxy) -> str:
    response, _ = await proxy.ask("POST", BEGIN)
    assert response.status == 202
    return response.headers["Location"]


def with_digest(location: str) -> str:
    return f"{location}{'&' if '?' in location else '?'}digest={DIGEST}"


async def test_a_body_without_a_length_is_passed_on_as_it_comes(registry: FakeRegistry, proxy: RunningProxy) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        for at in range(0, len(DATA), 100_000):
            yield DATA[at : at + 100_000]
            await asyncio.sleep(0)

    response, _ = await proxy.ask("PUT", with_digest(await session_of(proxy)), data=pieces())
    assert (response.status, registry.blobs[DIGEST]) == (201, DATA)
    assert registry.asked("/uploads/session", "PUT")[0].headers["Transfer-Encoding"] == "chunked"


async def test_a_body_that_is_cut_off_is_never_passed_on_as_a_whole(
    registry: FakeRegistry, proxy: RunningProxy
) -> None:
    target = with_digest(await session_of(proxy))
    host, port = proxy.host.split(":")
    half = b"x" * 500
    for framing, body in (("Content-Length: 1000", half), ("Transfer-Encoding: chunked", b"1f4\r\n" + half)):
        _, writer = await asyncio.open_connection(host, int(port))
        writer.write(f"PUT {target} HTTP/1.1\r\nHost: proxy\r\n{framing}\r\n\r\n".encode() + body)
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    response, _ = await proxy.ask("PUT", target, data=DATA)
    assert response.status == 201, "the session is still there: what was cut off has ended nothing"
    assert registry.pushed == [DIGEST]


async def test_an_answer_comes_whole_or_not_at_all(registry: FakeRegistry, proxy: RunningProxy) -> None:
    said = json.dumps({"errors": [{"code": "DENIED", "message": "x" * 300_000}]}).encode()
    registry.script("/uploads/", status(403, said))
    response, body = await proxy.ask("POST", BEGIN)
    assert (response.status, body) == (403, said)
    registry.script("/uploads/", cut(100_000, status=403, body=said))
    response, body = await proxy.ask("POST", BEGIN)
    assert (response.status, json.loads(body)["errors"][0]["code"]) == (503, "UNAVAILABLE")
    registry.script("/uploads/", status(403, b"x" * (2 << 20)))
    assert (await proxy.ask("POST", BEGIN))[0].status == 502


async def test_nobody_is_followed_and_credentials_go_to_the_registry_alone(
    tmp_path: Path, registry: FakeRegistry, proxy: RunningProxy
) -> None:
    async with FakeRegistry() as elsewhere:
        registry.script("/uploads/", redirect(f"{elsewhere.base}/v2/x/blobs/uploads/1"))
        response, _ = await proxy.ask("POST", BEGIN, headers={"Authorization": "Bearer secret"})
        assert (response.status, response.headers["Location"]) == (307, f"{elsewhere.base}/v2/x/blobs/uploads/1")
        assert elsewhere.seen == []
    assert registry.seen[0].authorization == "Bearer secret"


@pytest.mark.parametrize("method", ["TRACE", "OPTIONS", "PROPFIND", "MKCOL"])
async def test_methods_of_no_push_are_not_passed_on(registry: FakeRegistry, proxy: RunningProxy, method: str) -> None:
    for path in (BEGIN, f"/v2/team/app/blobs/{DIGEST}", "/v2/team/app/manifests/1"):
        assert (await proxy.ask(method, path))[0].status == 405
    assert registry.seen == []


async def test_a_registry_that_does_not_answer_is_told_as_such(registry: FakeRegistry, proxy: RunningProxy) -> None:
    registry.script("/uploads/", Fault(drop=True))
    response, body = await proxy.ask("POST", BEGIN)
    assert (response.status, json.loads(body)["errors"][0]["code"]) == (503, "UNAVAILABLE")


async def pushed(config: RegistryConfig, registry: str) -> int:
    uploads = Uploads(config)
    try:
        request = make_mocked_request("DELETE", BEGIN + "1")
        answer = await uploads(request, Reference(registry, "team/app", "latest"), Route(Kind.UPLOAD, "team/app", "1"))
        return answer.status
    finally:
        await uploads.close()


async def test_a_name_that_leads_to_this_machine_is_not_contacted(monkeypatch: pytest.MonkeyPatch) -> None:
    async def resolve(self: object, host: str, port: int = 0, family: int = 0) -> list[dict[str, object]]:
        return [{"hostname": host, "host": "127.0.0.1", "port": port, "family": 2, "proto": 0, "flags": 0}]

    monkeypatch.setattr(aiohttp.ThreadedResolver, "resolve", resolve)
    with pytest.raises(RegistryNotAllowed, match=r"leads to 127\.0\.0\.1"):
        await pushed(RegistryConfig(retries=0), "reg.example:5000")


async def test_the_authorities_of_the_configuration_are_believed(tmp_path: Path) -> None:
    authority = Authority(tmp_path / "tls")
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(*authority.issue("registry"))
    async with FakeRegistry(tls=context) as registry:
        config = RegistryConfig(allowed=(registry.host,), ca_file=authority.file)
        assert await pushed(config, registry.host) == 404


@pytest.mark.parametrize("through", ["registry", "superpeer"])
async def test_who_pulls_after_a_push_or_a_deletion_through_a_proxy_gets_what_is_there_now(
    tmp_path: Path, registry: FakeRegistry, through: str
) -> None:
    registry.add_image("team/app", "1", [DATA])
    registry.add_image("team/app", "2", [DATA[1:]])
    first, tags = "/v2/team/app/manifests/1", "/v2/team/app/tags/list"
    async with contextlib.AsyncExitStack() as stack:
        urls = ()
        if through == "superpeer":
            urls = ((await stack.enter_async_context(running(tmp_path / "s", registry.host))).url,)
        options = {"front": {"uploads": "pass"}, "superpeers": urls}
        proxy = await stack.enter_async_context(proxied(tmp_path / "p", registry.host, **options))
        _, old = await proxy.get(first)
        answer, new = await proxy.get("/v2/team/app/manifests/2")
        kind = {"Content-Type": answer.headers["Content-Type"]}
        assert (await proxy.get(first))[1] == old != new, "believed for a while"
        registry.script("/tags/list", status(200, b'{"name":"team/app","tags":["1"]}'))
        await proxy.get(tags)
        assert (await proxy.ask("PUT", first, data=new, headers=kind))[0].status == 201
        assert (await proxy.get(first))[1] == new
        registry.script("/tags/list", status(200, b'{"name":"team/app","tags":["1","2"]}'))
        assert b'"2"' in (await proxy.get(tags))[1]
        registry.script("/manifests/1", status(202), method="DELETE")
        registry.script("/manifests/1", *[status(404)] * 9)
        assert (await proxy.ask("DELETE", first))[0].status == 202
        assert (await proxy.get(first))[0].status == 404
        assert not [kind for kind in proxy.fallbacks() if "told" in kind]


async def test_a_push_succeeds_though_superpeers_cannot_be_told_of_it(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add_image("team/app", "1", [DATA])
    options = {"front": {"uploads": "pass"}, "superpeers": ("http://127.0.0.1:9",)}
    async with proxied(tmp_path, registry.host, **options) as proxy:
        registry.script("/manifests/1", status(202), method="DELETE")
        assert (await proxy.ask("DELETE", "/v2/team/app/manifests/1"))[0].status == 202
        assert "superpeer not told of a push" in proxy.fallbacks()
