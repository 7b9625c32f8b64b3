"""Requests that nobody sends in good faith, over raw sockets: a proper status, and the proxy goes on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi import digest as digests
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab.proxies import RunningProxy, proxied

MANIFEST = "/v2/team/app/manifests/1"


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [b"layer"])
        yield fake


@pytest.fixture
async def proxy(tmp_path: Path, registry: FakeRegistry) -> AsyncIterator[RunningProxy]:
    async with proxied(tmp_path, registry.host) as running:
        yield running


async def raw(proxy: RunningProxy, data: bytes) -> bytes:
    """Send bytes, return all that comes back until the proxy hangs up, or waits for more than we have."""
    host, port = proxy.host.split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        writer.write(data)
        await writer.drain()
        answer = b""
        try:
            async with asyncio.timeout(0.5):
                while piece := await reader.read(1 << 20):
                    answer += piece
        except TimeoutError:
            pass
        return answer
    except ConnectionResetError:
        return b""
    finally:
        writer.close()
        await asyncio.gather(writer.wait_closed(), return_exceptions=True)


def request(target: str, *headers: str, method: str = "GET", body: bytes = b"") -> bytes:
    lines = [f"{method} {target} HTTP/1.1", "Host: proxy", "Connection: close", *headers]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


@pytest.mark.parametrize(
    "target",
    ["/v2/../../etc/passwd", "/v2/team/../secret/manifests/1", "/v2/team/%2e%2e/secret/manifests/1", "/v2//manifests/1",
     "/v2/team/app/manifests/..", "/v2/team/app/manifests/1%00", "/v2/team/app/manifests/%2Fetc%2Fpasswd",
     "/v2/team%2Fapp/manifests/1", "/v2/team/app/blobs/sha256:..%2f..", "/v2/team/app/blobs/sha256:" + "A" * 64,
     "/v2/team/app/blobs/" + "x" * 3000, "/v2/team/app/manifests/" + "x" * 200, "http://other/v2/team/app/manifests/1",
     MANIFEST + "?ns=a.example&ns=b.example", MANIFEST + "?ns=", MANIFEST + "?ns=a.example%2F..",
     "/v2/team/app/tags/list?n=-1", "/v2/team/app/tags/list?n=1e9", "/v2/team/app/tags/list?n=1&n=2",
     "/v2/team/app/tags/list?last=%00"],
)  # fmt: skip
async def test_paths_and_parameters_of_no_image_are_refused(
    registry: FakeRegistry, proxy: RunningProxy, target: str
) -> None:
    answer = await raw(proxy, request(target))
    assert status_of(answer) in (400, 404)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["errors"][0]["code"] in (
        "NAME_INVALID", "DIGEST_INVALID", "MANIFEST_INVALID", "NAME_UNKNOWN", "UNSUPPORTED", "MANIFEST_UNKNOWN",
    )  # fmt: skip
    assert not registry.seen, "the registry is not bothered with it"


def head(*lines: str, body: bytes = b"") -> bytes:
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


GET = f"GET {MANIFEST} HTTP/1.1"
PUT = f"PUT /v2/team/app/blobs/uploads/1?digest=sha256:{'0' * 64} HTTP/1.1"
CHUNKED = "Transfer-Encoding: chunked"
SHAPES = {
    "length and chunked": (400, request(MANIFEST, "Content-Length: 5", CHUNKED, body=b"0\r\n\r\n")),
    "two lengths": (400, request(MANIFEST, "Content-Length: 5", "Content-Length: 6", body=b"hello")),
    "two lengths in one": (400, request(MANIFEST, "Content-Length: 5, 6", body=b"hello")),
    "a length with a sign": (400, request(MANIFEST, "Content-Length: +5", body=b"hello")),
    "GET with a body": (400, request(MANIFEST, "Content-Length: 5", body=b"hello")),
    "GET in chunks": (400, request(MANIFEST, CHUNKED, body=b"5\r\nhello\r\n0\r\n\r\n")),
    "GET in no chunks": (400, request(MANIFEST, CHUNKED, body=b"0\r\n\r\n")),
    "1.0 in chunks": (400, head(f"PUT {MANIFEST} HTTP/1.0", CHUNKED, body=b"0\r\n\r\n")),
    "an unknown coding": (400, request(MANIFEST, "Transfer-Encoding: xchunked", body=b"5\r\nhello\r\n0\r\n\r\n")),
    "a coding that we do not undo": (501, head(PUT, "Host: a", "Transfer-Encoding: gzip, chunked", body=b"0\r\n\r\n")),
    "chunked and more": (400, head(PUT, "Host: a", "Transfer-Encoding: chunked, identity", body=b"0\r\n\r\n")),
    "two codings": (400, head(PUT, "Host: a", CHUNKED, "Transfer-Encoding: identity", body=b"0\r\n\r\n")),
    "a blank before the colon": (400, request(MANIFEST, "Transfer-Encoding : chunked", body=b"0\r\n\r\n")),
    "a folded header": (400, head(GET, "Host: a", "X: a", " b")),
    "bare LF": (400, f"{GET}\nHost: a\n\n".encode()),
    "bare CR": (400, head(GET, "Host: a\rX: y")),
    "a chunk of negative size": (400, head(PUT, "Host: a", CHUNKED, body=b"-5\r\nhello\r\n0\r\n\r\n")),
    "a chunk too large to count": (400, head(PUT, "Host: a", CHUNKED, body=b"F" * 17 + b"\r\nhello\r\n0\r\n\r\n")),
    "bare LF in a chunk's head": (400, head(PUT, "Host: a", CHUNKED, body=b"5;a\nb\r\nhello\r\n0\r\n\r\n")),
    "a length among the trailers": (
        400, head(PUT, "Host: a", CHUNKED, body=b"5\r\nhello\r\n0\r\nContent-Length: 9\r\n\r\n"),
    ),
    "no Host": (400, head(GET)),
    "two Hosts": (400, request(MANIFEST, "Host: another")),
    "two Authorizations": (400, request(MANIFEST, "Authorization: Bearer a", "Authorization: Bearer b")),
    "NUL in credentials": (400, request(MANIFEST, "Authorization: Bearer a\x00b")),
    "credentials of no kind": (400, request(MANIFEST, "Authorization: Negotiate abc")),
    "large credentials": (400, request(MANIFEST, "Authorization: Bearer " + "x" * 20_000)),
    "a large header": (431, request(MANIFEST, "X-Long: " + "x" * 100_000)),
    "many headers": (431, request(MANIFEST, *["X: y"] * 200)),
    "headers without end": (431, head(GET, "Host: a", *["X: " + "y" * 9000] * 9)[:-2]),
    "a long path": (414, request("/v2/" + "x" * 100_000)),
    "HTTP/0.9": (400, head(f"GET {MANIFEST}")),
    "HTTP/2": (400, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/1.2": (400, head(f"GET {MANIFEST} HTTP/1.2", "Host: a")),
    "TLS": (400, b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"),
    "CONNECT": (404, head("CONNECT reg.example:443 HTTP/1.1", "Host: reg.example:443", "Connection: close")),
    "no path": (404, head("OPTIONS * HTTP/1.1", "Host: a", "Connection: close")),
    "another's URL": (400, head(f"GET http://r.example{MANIFEST} HTTP/1.1", "Host: r.example", "Connection: close")),
}


@pytest.mark.parametrize("uploads", ["refuse", "pass"])
async def test_shapes_that_two_programs_could_read_differently_are_refused_as_the_api_has_it(
    tmp_path: Path, registry: FakeRegistry, caplog: pytest.LogCaptureFixture, uploads: str
) -> None:
    """Whole bodies and what follows them reach nobody; what the parser refuses quotes no credentials in the log."""
    async with proxied(tmp_path, registry.host, front={"uploads": uploads}) as proxy:
        for name, (status, data) in SHAPES.items():
            answer = await raw(proxy, data)
            assert status_of(answer) == status, name
            assert len(re.findall(rb"HTTP/\d\.\d \d{3} ", answer)) == 1, f"{name}: two answers to one request"
            (error,) = json.loads(answer.partition(b"\r\n\r\n")[2])["errors"]
            assert set(error) == {"code", "message", "detail"}, name
            assert not registry.seen, name
        assert not [record for record in caplog.records if record.name.startswith("aiohttp")]
        assert proxy.proxy.front.statistics()["requests"]["refused"] >= len(SHAPES)
        assert (await proxy.get(MANIFEST))[0].status == 200


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
@pytest.mark.parametrize("path", [MANIFEST, "/v2/team/app/blobs/uploads/", "/v2/team/app/blobs/sha256:" + "0" * 64])
async def test_what_pushes_or_deletes_is_unsupported(
    registry: FakeRegistry, proxy: RunningProxy, method: str, path: str
) -> None:
    response, body = await proxy.ask(method, path)
    assert response.status == 405
    assert response.headers["Allow"] == "GET, HEAD"
    assert json.loads(body)["errors"][0]["code"] == "UNSUPPORTED"
    assert not registry.seen


async def test_a_manifest_that_is_too_large_is_refused(registry: FakeRegistry, proxy: RunningProxy) -> None:
    registry.script("/manifests/", *[Fault(status=200, body=b"x" * (5 << 20))] * 9)
    assert (await proxy.get(MANIFEST))[0].status == 502


async def test_a_type_that_contradicts_the_body_is_refused(registry: FakeRegistry, proxy: RunningProxy) -> None:
    """A manifest that calls itself an index, and the other way round: two readers would see two images."""
    index = "application/vnd.oci.image.index.v1+json"
    registry.script("/manifests/", *[Fault(headers={"Content-Type": index})] * 9)
    response, _ = await proxy.get(MANIFEST)
    assert response.status == 502
    assert not proxy.store.statistics()["blobs"], "not kept"
    document = {"schemaVersion": 2, "manifests": [], "layers": [], "config": {}}
    registry.add_manifest("team/app", "2", document, index)
    assert (await proxy.get("/v2/team/app/manifests/2"))[0].status == 502


async def test_a_page_of_a_login_portal_is_no_manifest(registry: FakeRegistry, proxy: RunningProxy) -> None:
    registry.script("/v2/", *[Fault(status=200, body=b"<html>", headers={"Content-Type": "text/html"})] * 9)
    assert (await proxy.get(MANIFEST))[0].status == 502
    assert (await proxy.get("/v2/team/app/tags/list"))[0].status == 502


# ---- fuzzed


LAYER = b"layer" * 500
_JUNK = st.sampled_from(["", "", "", "", "/", "//", "/..", "..", ".", "%2e%2e", "%2f", "%00", "#", ";", "\\", "\x00",
                         "é", "?ns=", "?ns=a&ns=b", "?ns=../x", "?n=1", "?n=-1", "?last=v", "x" * 300])  # fmt: skip
_TARGETS = st.one_of(
    st.sampled_from([MANIFEST, f"/v2/team/app/blobs/{digests.of(LAYER)}", "/v2/team/app/tags/list"]),
    st.tuples(
        st.sampled_from(["/v2/", "/v2/", "/v2/", "/v2", "//v2/", "/v1/", "http://other/v2/", "*"]), _JUNK,
        st.sampled_from(["team/app/", "team/app/", "team/", "", "Team/app/", "other:80/team/app/"]),
        st.sampled_from(["manifests/", "blobs/", "blobs/", "tags/list", "referrers/", "blobs/uploads/", "catalog"]),
        st.sampled_from(["1", "", "nowhere", digests.of(LAYER), digests.of(LAYER), digests.of(LAYER)[:-1], "md5:1",
                         digests.of(LAYER).upper(), "sha256%3A" + digests.of(LAYER)[7:], "sha256:" + "0" * 64]), _JUNK,
    ).map("".join),
    st.text(alphabet=st.characters(max_codepoint=255), max_size=40).map("/v2/".__add__),
)  # fmt: skip
_HEADERS = st.one_of(
    st.sampled_from([
        "Range: bytes=0-9", "Range: bytes=-5", "Range: bytes=9-1,3", "Range: bytes=99999-", "If-Range: x", "Host: two",
        "Authorization: Basic !", "Authorization: Bearer a b", "Content-Length: 5", "Content-Length: -1",
        "Transfer-Encoding: chunked", "Transfer-Encoding: gzip, chunked", "Expect: 100-continue", "Upgrade: h2c",
        "If-None-Match: *", "Accept: nothing/at-all", "Accept-Encoding: zstd", " folded", "Connection: upgrade",
    ]),
    st.text(alphabet=st.characters(max_codepoint=255, exclude_characters="\r\n"), max_size=20).map("Cookie: ".__add__),
)  # fmt: skip


def _allowed(status: int, headers: bytes, body: bytes, bodies: set[bytes]) -> bool:
    """Whether an answer is a refusal, says nothing, or gives bytes of the image or a part of them."""
    if 400 <= status < 500 or status == 501:
        return not body or body.startswith(b'{"errors": [')
    if status in (100, 304):
        return True
    if status == 206:
        return any(body in whole for whole in bodies)
    return status == 200 and (body in bodies or b"text/plain" in headers)


def test_any_request_is_refused_or_gets_the_right_bytes(tmp_path: Path) -> None:
    """One proxy meets them all, and goes on."""
    bodies = {LAYER, b"{}", b""}

    async def site(stack: contextlib.AsyncExitStack) -> RunningProxy:
        registry = await stack.enter_async_context(FakeRegistry())
        registry.add_image("team/app", "1", [LAYER])
        proxy = await stack.enter_async_context(proxied(tmp_path, registry.host))
        for path in (MANIFEST, f"/v2/team/app/blobs/{digests.of(LAYER)}", "/v2/team/app/tags/list"):
            bodies.add((await proxy.get(path))[1])
        bodies.update(registry.blobs.values())
        return proxy

    with asyncio.Runner() as runner:
        stack = contextlib.AsyncExitStack()
        proxy = runner.run(site(stack))

        @settings(max_examples=250)
        @given(st.sampled_from(["GET"] * 9 + ["HEAD", "PUT", "POST", "get", "G\tT", "CONNECT"]), _TARGETS,
               st.lists(_HEADERS, max_size=2),
               st.sampled_from([b""] * 9 + [b"hello", b"GET / HTTP/1.1", b"\0"]))  # fmt: skip
        def ask(method: str, target: str, headers: list[str], body: bytes) -> None:
            answer = runner.run(raw(proxy, request(target, *headers, method=method, body=body)))
            if not answer:
                return  # hung up on
            head, _, said = answer.partition(b"\r\n\r\n")
            if status_of(answer) == 100:
                head, _, said = said.partition(b"\r\n\r\n")
            status = status_of(head) if head else 100
            assert _allowed(status, head, said, bodies), (status, said[:200])
            assert runner.run(proxy.get("/v2/"))[0].status == 200

        try:
            ask()
        finally:
            runner.run(stack.aclose())
