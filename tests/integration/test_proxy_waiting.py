"""Proxies that have peers wait for a new blob's chunk table; tokens come with it; the listener speaks TLS."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import msgspec
import pytest

from dadi import digest as digests
from dadi import http
from dadi.blobs.source import Urgency
from dadi.errors import NotFound
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob
from dadi.originals.messages import HEAD, SMALL, OriginalAnswer
from dadi.peers import token as tokens
from dadi.peers.shown import HEADER
from dadi.tls import Tls, TlsConfig
from tests.fakes.authority import Authority
from tests.fakes.registry import FakeRegistry, Fault, cut, status
from tests.lab.proxies import RunningProxy, proxied
from tests.lab.services import Running, running

LAYER = Random(1).randbytes(3 << 20)
LITTLE = Random(2).randbytes(SMALL - 1)
DIGEST, LITTLE_DIGEST = digests.of(LAYER), digests.of(LITTLE)
BLOB, LITTLE_BLOB = (f"/v2/team/app/blobs/{digest}" for digest in (DIGEST, LITTLE_DIGEST))


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [LAYER, LITTLE])
        yield fake


class Peers:
    """A node's parents: other proxies' stores. Remembers who was asked for what."""

    name = "parents"

    def __init__(self) -> None:
        self.others: list[RunningProxy] = []
        self.asked = 0

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        self.asked += len(chunks)
        for other in self.others:
            with contextlib.suppress(NotFound):
                return await other.store.read(blob, chunks)
        raise NotFound("no peer has it")


@contextlib.asynccontextmanager
async def nodes(directory: Path, registry: FakeRegistry, run: Running, count: int) -> AsyncIterator[list[RunningProxy]]:
    async with contextlib.AsyncExitStack() as stack:
        peers = Peers()
        for number in range(count):
            made = proxied(directory / f"node-{number}", registry.host, superpeers=(run.url,), source=peers)
            peers.others.append(await stack.enter_async_context(made))
        yield peers.others


async def told(run: Running, proxy: RunningProxy, registry: FakeRegistry, digest: str = DIGEST, **more: str
               ) -> OriginalAnswer:  # fmt: skip
    parameters = {"reference": f"{registry.host}/team/app", **more}
    async with proxy.session.get(f"{run.url}/v1/original/{digest}/table", params=parameters) as response:
        return msgspec.msgpack.decode(await response.read(), type=OriginalAnswer)


async def test_a_new_blob_is_not_streamed_to_each_but_given_in_chunks(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run, nodes(tmp_path, registry, run, 5) as made:
        answers = await asyncio.gather(*(proxy.get(BLOB) for proxy in made))
        assert {body for _, body in answers} == {LAYER}
        assert all(proxy.proxy.upstream.statistics()["streamed"]["blobs"] == 0 for proxy in made)
        assert all(proxy.store.has(DIGEST) for proxy in made)
        assert all(proxy.fallbacks() == [] for proxy in made)
    assert len(registry.asked(f"/blobs/{DIGEST}", "GET")) == 1


async def test_the_first_bytes_come_while_the_superpeer_still_gets_it(tmp_path: Path, registry: FakeRegistry) -> None:
    gate, rest = asyncio.Event(), asyncio.Event()
    registry.script(f"/blobs/{DIGEST}", cut(1 << 20), Fault(gate=rest), method="GET")
    async with running(tmp_path / "s", registry.host) as run, nodes(tmp_path, registry, run, 2) as made:
        before = run.superpeer.statistics()["originals"]["bytes"]

        async def pull(proxy: RunningProxy) -> bytes:
            async with proxy.session.get(proxy.url + BLOB) as response:
                first = await response.content.readexactly(HEAD // 2)
                gate.set()
                return first + await response.read()

        pulls = [asyncio.create_task(pull(proxy)) for proxy in made]
        async with asyncio.timeout(20):
            await gate.wait()
        assert run.superpeer.statistics()["originals"]["bytes"] == before, "it has nothing whole yet"
        rest.set()
        assert [await one for one in pulls] == [LAYER, LAYER]
        assert all(proxy.proxy.upstream.statistics()["streamed"]["blobs"] == 0 for proxy in made), "in chunks, as ever"


async def test_first_bytes_that_prove_wrong_are_not_completed(tmp_path: Path, registry: FakeRegistry) -> None:
    """The registry begins with other bytes than it goes on with when it is asked anew."""
    rest = asyncio.Event()
    registry.script(f"/blobs/{DIGEST}", cut(1 << 20, flip=3), Fault(gate=rest), method="GET")
    async with running(tmp_path / "s", registry.host) as run, nodes(tmp_path, registry, run, 1) as (proxy,):
        async with proxy.session.get(proxy.url + BLOB) as response:
            assert (await response.content.readexactly(4))[3] == LAYER[3] ^ 1
            rest.set()
            with pytest.raises(aiohttp.ClientError):
                await response.content.readexactly(len(LAYER) - 4 + 1)
        assert not proxy.store.has(DIGEST)
        assert (await proxy.get(BLOB))[1] == LAYER


async def test_bytes_in_advance_are_for_who_may_have_the_blob(tmp_path: Path) -> None:
    async with FakeRegistry(auth="bearer", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        registry.tokens.add("a")
        registry.script(f"/blobs/{DIGEST}", Fault(stall_after=1 << 20), method="GET")
        parameters = {"reference": f"{registry.host}/team/app", "wait": "1", "from": "0"}
        async with running(tmp_path / "s", registry.host) as run, aiohttp.ClientSession() as session:
            url = f"{run.url}/v1/original/{DIGEST}/table"
            for token, expected in (("a", 200), ("b", 401)):
                headers = {HEADER: f"Bearer {token}"}
                async with session.get(url, params=parameters, headers=headers) as response:
                    assert response.status == expected
                    body = await response.read()
                    assert (LAYER[:100] in body) == (expected == 200)
            async with session.get(url, params={**parameters, "from": "-1"}, headers={HEADER: "Bearer a"}) as response:
                assert LAYER[:100] not in await response.read()


async def test_a_small_blob_is_streamed_at_once(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run, nodes(tmp_path, registry, run, 3) as made:
        answers = await asyncio.gather(*(proxy.get(LITTLE_BLOB) for proxy in made))
        assert {body for _, body in answers} == {LITTLE}
        assert (await made[0].get(LITTLE_BLOB))[1] == LITTLE
        async with asyncio.timeout(10):
            while made[0].proxy.upstream.statistics()["streamed"]["blobs"] != 1:  # once it is kept
                await asyncio.sleep(0.005)


async def test_a_head_request_fetches_nothing(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run, nodes(tmp_path, registry, run, 1) as (proxy,):
        response, _ = await proxy.ask("HEAD", BLOB)
        assert response.headers["Content-Length"] == str(len(LAYER))
        assert registry.asked(f"/blobs/{DIGEST}", "GET") == []


async def test_ranges_of_a_blob_that_is_waited_for(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run, nodes(tmp_path, registry, run, 1) as (proxy,):
        response, part = await proxy.get(BLOB, headers={"Range": "bytes=5-9"})
        assert (response.status, part) == (206, LAYER[5:10])


async def test_where_the_registry_fails_who_waits_is_told(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path / "s", registry.host) as run, nodes(tmp_path, registry, run, 2) as made:
        registry.script(f"/blobs/{DIGEST}", *[status(503)] * 60, method="GET")
        answers = await asyncio.gather(*(proxy.get(BLOB) for proxy in made))
        assert {response.status for response, _ in answers} == {503}
        registry._script.clear()
        assert (await made[0].get(BLOB))[1] == LAYER


async def test_a_wrong_blob_is_given_to_nobody(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.blobs[DIGEST] = bytes(len(LAYER))
    async with running(tmp_path / "s", registry.host) as run, nodes(tmp_path, registry, run, 2) as made:
        answers = await asyncio.gather(*(proxy.get(BLOB) for proxy in made))
        assert {response.status for response, _ in answers} == {502}
        assert not any(proxy.store.has(DIGEST) for proxy in made)


async def test_a_stream_that_breaks_off_at_the_registry_is_gone_on_with(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.script(f"/blobs/{DIGEST}", cut(1 << 20), method="GET")
    async with running(tmp_path / "s", registry.host) as run, nodes(tmp_path, registry, run, 2) as made:
        answers = await asyncio.gather(*(proxy.get(BLOB) for proxy in made))
        assert {body for _, body in answers} == {LAYER}


async def test_the_table_comes_with_a_token_for_this_blob_and_no_other(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with running(tmp_path / "s", registry.host) as run, nodes(tmp_path, registry, run, 1) as (proxy,):
        before = await told(run, proxy, registry)
        assert (before.blob, before.token, before.coming) == (None, "", False)
        said = await told(run, proxy, registry, wait="10")
        assert said.blob is not None
        assert not said.coming
        token = tokens.parse(said.token)
        assert token.opens(DIGEST)
        assert not token.opens(LITTLE_DIGEST)
        url = f"{run.url}/v1/blobs/{DIGEST}"
        async with proxy.session.get(url) as response:
            assert response.status == 401
        async with proxy.session.get(url, headers={"Authorization": f"Bearer {said.token}"}) as response:
            assert await response.read() == LAYER


async def test_who_may_not_read_the_repository_gets_no_token(tmp_path: Path) -> None:
    async with FakeRegistry(auth="basic", user="u", password="p") as registry:
        registry.add_image("team/app", "1", [LAYER])
        async with running(tmp_path / "s", registry.host) as run, aiohttp.ClientSession() as session:
            parameters = {"reference": f"{registry.host}/team/app", "wait": "10"}
            async with session.get(f"{run.url}/v1/original/{DIGEST}/table", params=parameters) as response:
                assert response.status == 401
                assert b"token" not in await response.read()
    assert registry.asked(f"/blobs/{DIGEST}", "GET") == []


async def test_the_listener_speaks_tls_and_nothing_else(tmp_path: Path, registry: FakeRegistry) -> None:
    authority = Authority(tmp_path / "tls")
    certificate, key = authority.issue("proxy")
    config = TlsConfig(certificate=certificate, key=key)
    async with proxied(tmp_path / "p", registry.host, tls=config) as proxy:
        with pytest.raises(aiohttp.ClientError):
            await proxy.get("/v2/")
        tls = Tls(TlsConfig(ca=authority.file), Fallbacks())
        await tls.start()
        async with http.client(connect=3, read=5, tls=tls) as session:
            async with session.get(f"https://{proxy.host}{BLOB}") as response:
                assert await response.read() == LAYER
        await tls.close()
