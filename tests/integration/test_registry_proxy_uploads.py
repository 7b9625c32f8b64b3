"""What is pushed through the proxy, passed on: whole or not at all, to the registry and to nobody else."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import io
import json
import ssl
import tracemalloc
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from dadi import digest as digests
from dadi import http
from dadi.blobs.disk import DiskBlobs
from dadi.errors import RegistryNotAllowed
from dadi.fallbacks import Fallbacks
from dadi.oci.config import RegistryConfig
from dadi.oci.reference import Reference
from dadi.originals.config import FrontConfig
from registry_proxy.config import ProxyConfig
from registry_proxy.paths import Kind, Route
from registry_proxy.proxy import Proxy
from registry_proxy.uploads import Uploads
from tests.fakes.authority import Authority
from tests.fakes.registry import FakeRegistry, Fault, cut, redirect, status
from tests.lab.proxies import RunningProxy, proxied
from tests.lab.registry import DockerRegistry, available
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


# ---- as clients in the field push


async def test_a_blob_is_mounted_from_the_repository_that_the_client_knows(
    registry: FakeRegistry, proxy: RunningProxy
) -> None:
    """"Mounting a blob from another repository": `from` is named as the path is, also where that names the registry."""
    registry.blobs[DIGEST] = DATA
    host = registry.host
    for target, source, expected in (
        ("team/app", "team/base", "team/base"),
        (f"{host}/team/app", f"{host}/team/base", "team/base"),
        (f"{host}/team/app", "team/base", "team/base"),
    ):
        registry.seen.clear()
        response, _ = await proxy.ask("POST", f"/v2/{target}/blobs/uploads/?mount={DIGEST}&from={source}")
        assert response.status == 201, (target, source)
        assert registry.seen[0].query == {"mount": DIGEST, "from": expected}
        assert response.headers["Location"].startswith(f"/v2/{target}/blobs/")


async def test_a_blob_of_another_registry_is_pushed_not_mounted(registry: FakeRegistry, proxy: RunningProxy) -> None:
    registry.blobs[DIGEST] = DATA
    response, _ = await proxy.ask("POST", f"{BEGIN}?mount={DIGEST}&from=other.example/team/base&x=1")
    assert (response.status, registry.seen[0].query) == (202, {"x": "1"})
    response, body = await proxy.ask("POST", f"{BEGIN}?mount={DIGEST}&from=../base")
    assert (response.status, json.loads(body)["errors"][0]["code"]) == (400, "NAME_INVALID")


async def test_chunks_and_a_mount_with_debians_registry(tmp_path: Path) -> None:
    """"Pushing a blob in chunks", "Mounting a blob from another repository"."""
    if not available():
        pytest.skip("docker-registry is not installed (scripts/setup does it)")
    with DockerRegistry(tmp_path / "registry") as real:
        async with proxied(tmp_path / "proxy", "127.0.0.1:9", allowed=[real.host], front={"uploads": "pass"}) as proxy:
            name = f"/v2/{real.host}/team"
            response, _ = await proxy.ask("POST", f"{name}/base/blobs/uploads/")
            for start in (0, 400_000, 800_000):
                piece = DATA[start : start + 400_000]
                headers = {"Content-Range": f"{start}-{start + len(piece) - 1}",
                           "Content-Type": "application/octet-stream"}  # fmt: skip
                response, _ = await proxy.ask("PATCH", response.headers["Location"], data=piece, headers=headers)
                assert (response.status, response.headers["Range"]) == (202, f"0-{start + len(piece) - 1}")
            response, _ = await proxy.ask("PUT", with_digest(response.headers["Location"]))
            assert (response.status, response.headers["Docker-Content-Digest"]) == (201, DIGEST)
            mount = f"{name}/app/blobs/uploads/?mount={DIGEST}&from={real.host}/team/base"
            assert (await proxy.ask("POST", mount))[0].status == 201
            assert (await proxy.get(f"{name}/app/blobs/{DIGEST}"))[1] == DATA


async def test_the_encoding_of_a_body_is_the_registrys_business(registry: FakeRegistry, proxy: RunningProxy) -> None:
    packed = gzip.compress(DATA)
    response, _ = await proxy.ask("PUT", with_digest(await session_of(proxy)), data=io.BytesIO(packed),
                                  headers={"Content-Encoding": "gzip"})  # fmt: skip
    assert (response.status, registry.blobs[DIGEST]) == (201, DATA), "unpacked over there, and nowhere before"
    assert registry.asked("/uploads/session", "PUT")[0].headers["Content-Length"] == str(len(packed))


@pytest.mark.parametrize("uploads", ["refuse", "pass"])
async def test_who_waits_to_be_told_to_send_is_told_so_only_where_it_will_be_taken(
    tmp_path: Path, registry: FakeRegistry, uploads: str
) -> None:
    """RFC 9110, 10.1.1: a refusal comes before the body, not after it."""
    options = {"front": {"uploads": uploads}, "retries": 0}
    async with proxied(tmp_path, registry.host, **options) as proxy, asyncio.timeout(10):
        target = with_digest(await session_of(proxy)) if uploads == "pass" else f"{BEGIN}1"
        reader, writer = await asyncio.open_connection(*proxy.host.split(":"))
        head = f"PUT {target} HTTP/1.1\r\nHost: a\r\nExpect: 100-continue\r\nContent-Length: {len(DATA)}\r\n\r\n"
        writer.write(head.encode())
        if uploads == "refuse":
            assert await reader.readline() == b"HTTP/1.1 405 Method Not Allowed\r\n"
        else:
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
            writer.write(DATA)
            assert await reader.readline() == b"HTTP/1.1 201 Created\r\n"
            assert registry.blobs[DIGEST] == DATA
        writer.close()
        await writer.wait_closed()


async def test_a_large_layer_passes_through_in_little_memory(tmp_path: Path) -> None:
    taken = 0

    async def take(request: web.Request) -> web.Response:
        nonlocal taken
        async for piece in request.content.iter_any():
            taken += len(piece)
        return web.Response(status=202)

    async def pieces() -> AsyncIterator[bytes]:
        for _ in range(48):
            yield DATA

    app = web.Application()
    app.router.add_patch("/{path:.*}", take)
    runner, host = await http.serve_tcp(app, "127.0.0.1:0")
    try:
        async with proxied(tmp_path, host, front={"uploads": "pass"}, retries=0) as proxy:
            tracemalloc.start()
            try:
                response, _ = await proxy.ask("PATCH", f"{BEGIN}1", data=pieces())
                most = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        assert (response.status, taken) == (202, 48 << 20)
        assert most < 16 << 20
    finally:
        await runner.cleanup()


PRIVATE = ["127.0.0.1:22", "[::1]:5000", "[::ffff:127.0.0.1]", "[fe80::1]", "[fd00::1]", "169.254.169.254", "10.0.0.1",
           "192.168.1.1:443", "0.0.0.0:80", "0x7f.1:80", "127.1:80", "2130706433:80", "localhost:5000", "a.localhost",
           "[::]:80", "[64:ff9b::7f00:1]", "[64:ff9b::a9fe:a9fe]", "[2002:7f00:1::]", "[::10.0.0.1]"]  # fmt: skip
"""Addresses of this machine and of private networks, in the spellings that resolvers and libraries know."""


@pytest.mark.parametrize("host", PRIVATE)
async def test_whatever_names_a_private_address_is_refused_though_all_registries_are_allowed(
    tmp_path: Path, host: str
) -> None:
    made = ProxyConfig(state=str(tmp_path), front=FrontConfig(uploads="pass"), registry=RegistryConfig(retries=0))
    store = DiskBlobs(tmp_path / "store")
    proxy = await Proxy.start(made, store, Fallbacks())
    try:
        runner, address = await http.serve_tcp(proxy.application(), "127.0.0.1:0")
        try:
            async with aiohttp.ClientSession() as session:
                for method, path in (("GET", "manifests/1"), ("GET", f"blobs/{DIGEST}"), ("GET", "tags/list"),
                                     ("POST", "blobs/uploads/"), ("PUT", "manifests/1")):  # fmt: skip
                    url = f"http://{address}/v2/team/app/{path}"
                    async with session.request(method, url, params={"ns": host}) as response:
                        assert response.status in (400, 403), (method, path)
        finally:
            await runner.cleanup()
    finally:
        await proxy.close()
        await store.close()


@contextlib.asynccontextmanager
async def answering(answer: bytes) -> AsyncIterator[str]:
    """A registry that says always the same, whatever bytes that are. Yields its host."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


@pytest.mark.parametrize(
    ("header", "expected"),
    [(b"Location: //[", 502), (b"Location: ftp://store.example/x", 502), (b"Location: https://a@store.example/", 502),
     (b"Location: https://store.example/\xc3\xa9", 502), (b"Docker-Upload-UUID: \xff", 202)],
)  # fmt: skip
async def test_headers_of_a_registry_that_make_no_sense_are_not_passed_on(
    tmp_path: Path, header: bytes, expected: int
) -> None:
    answer = b"HTTP/1.1 202 Accepted\r\nContent-Length: 0\r\n" + header + b"\r\n\r\n"
    async with answering(answer) as host, proxied(tmp_path, host, front={"uploads": "pass"}, retries=0) as proxy:
        response, _ = await proxy.ask("POST", BEGIN)
        assert response.status == expected
        assert not {"Location", "Docker-Upload-UUID"} & set(response.headers)
