"""Superpeers that are not as they should be, and proxies that ask them: links that break, another version."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import msgspec
import pytest
from aiohttp import web

from dadi import digest as digests
from dadi import http
from dadi.originals import client
from dadi.originals.messages import OriginalAnswer
from tests.lab.proxies import proxied

DATA = Random(8).randbytes(1_000_000)
DIGEST = digests.of(DATA)
BLOB = f"/v2/team/app/blobs/{DIGEST}"


@contextlib.asynccontextmanager
async def superpeer(
    step: int = 1 << 20, challenge: bytes = b"{}", said: bytes = b"", stale: str = ""
) -> AsyncIterator[tuple[str, list[int]]]:
    """One that breaks off after `step` bytes each time. Yields its URL, and where it was asked to begin.

    `said`: of the blob's size and table, in place of what is right; `stale`: how old its documents are.
    """
    asked: list[int] = []

    async def original(request: web.Request) -> web.StreamResponse:
        start = int(request.headers["Range"].removeprefix("bytes=").partition("-")[0])
        asked.append(start)
        said = {"Content-Range": f"bytes {start}-{len(DATA) - 1}/{len(DATA)}", "Content-Length": str(len(DATA) - start)}
        response = web.StreamResponse(status=206, headers=said)
        await response.prepare(request)
        await response.write(DATA[start : start + step])
        if start + step < len(DATA) and request.transport is not None:
            request.transport.close()  # what has been written still goes
        return response

    async def table(request: web.Request) -> web.Response:
        return web.Response(body=said or msgspec.msgpack.encode(OriginalAnswer(len(DATA))))

    async def tags(request: web.Request) -> web.Response:
        return web.json_response({"name": "team/app", "tags": ["1"]}, headers={client.STALE: stale})

    async def challenged(request: web.Request) -> web.Response:
        return web.Response(body=challenge)

    app = http.application()
    app.router.add_get("/v1/original/{digest}", original)
    app.router.add_get("/v1/original/{digest}/table", table)
    app.router.add_get("/v1/challenge", challenged)
    app.router.add_get("/v1/tags", tags)
    runner, address = await http.serve_tcp(app, "127.0.0.1:0")
    try:
        yield f"http://{address}", asked
    finally:
        await runner.cleanup()


async def test_a_large_blob_comes_over_a_link_that_breaks_as_long_as_it_gets_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PROGRESS", 100_000)
    async with superpeer(120_000) as (url, asked), proxied(tmp_path, "127.0.0.1:9", superpeers=(url,)) as proxy:
        assert (await proxy.get(BLOB))[1] == DATA
        assert asked == list(range(0, len(DATA), 120_000))


async def test_what_hardly_gets_on_is_given_up_after_a_few_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_PROGRESS", 130_000)
    async with superpeer(120_000) as (url, asked), proxied(tmp_path, "127.0.0.1:9", superpeers=(url,)) as proxy:
        with pytest.raises(aiohttp.ClientError):
            await proxy.get(BLOB)
        assert asked == [0, 120_000, 240_000]


@pytest.mark.parametrize("said", [b"[]", b'{"challenge": 5}', b"not json", b'{"challenge": "\xff"}'])
async def test_a_challenge_that_makes_no_sense_is_told_as_such(tmp_path: Path, said: bytes) -> None:
    async with (
        superpeer(challenge=said) as (url, _),
        proxied(tmp_path, "127.0.0.1:9", superpeers=(url,), front={"login": True}) as proxy,
    ):
        response, body = await proxy.get("/v2/")
        assert response.status == 502
        assert b"are the versions alike?" in body


SIZE = b"\x82\xa4size\x09"


@pytest.mark.parametrize("said", [b"\xc0", SIZE + b"\xa5token\xa2\xff\xff", SIZE + b"\xa4more" + b"\x91" * 20_000])
async def test_what_makes_no_sense_of_a_blob_is_no_fault_of_the_proxy(tmp_path: Path, said: bytes) -> None:
    async with superpeer(said=said) as (url, _), proxied(tmp_path, "127.0.0.1:9", superpeers=(url,)) as proxy:
        response, body = await proxy.get(BLOB)
        assert response.status in (502, 503), body
        assert b"a fault of ours" not in body


@pytest.mark.parametrize("stale", ["²", "9" * 400, "-1", "soon"])
async def test_an_age_that_is_no_number_is_left_out(tmp_path: Path, stale: str) -> None:
    async with superpeer(stale=stale) as (url, _), proxied(tmp_path, "127.0.0.1:9", superpeers=(url,)) as proxy:
        response, _ = await proxy.get("/v2/team/app/tags/list")
        assert (response.status, "Warning" in response.headers) == (200, False)
