"""Two superpeers: a compressed layer leaves the registry once for lazy reads and plain pulls, whoever owns what."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import aiohttp
import pytest
from aiohttp import web

from dadi import digest as digests
from dadi import http
from dadi.errors import NotFound
from dadi.peers.owners import owners
from superpeer.shown_layers import Layer
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, status
from tests.lab import images
from tests.lab.datacenter import Datacenter, beside, datacenter
from tests.lab.proxies import proxied
from tests.lab.registry import DockerRegistry, available
from tests.lab.services import Running, tar_of


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


def tars_owned_apart(urls: list[str], count: int = 3) -> list[bytes]:
    """Return tars each of which has one owner as a tar, and the other one compressed: both ways round."""
    found: dict[str, list[bytes]] = {url: [] for url in urls}
    for seed in range(1000):
        tar = tar_of(**{f"f{seed}-{n}": Random(1000 * seed + n).randbytes(30_000) for n in range(20)})
        packed = gzip.compress(tar, 6, mtime=0)
        of_tar, of_packed = owners(digests.of(tar), urls)[0], owners(digests.of(packed), urls)[0]
        if of_tar != of_packed and len(found[of_tar]) < count:
            found[of_tar].append(tar)
        if all(len(each) == count for each in found.values()):
            return [tar for each in found.values() for tar in each]
    raise AssertionError("no such tars")


def sent(registry: FakeRegistry, layers: list[bytes]) -> list[float]:
    copies = []
    for layer in layers:
        seen = registry.asked(f"/blobs/{digests.of(layer)}", "GET")
        copies.append(sum(size_of(each.headers.get("Range"), len(layer)) for each in seen) / len(layer))
    return copies


def size_of(value: str | None, whole: int) -> int:
    if not value:
        return whole
    first, _, last = value.removeprefix("bytes=").partition("-")
    return (int(last) if last else whole - 1) - int(first) + 1


async def lazily(dc: Datacenter, reference: str, tars: list[bytes]) -> None:
    index = await dc.index(reference)
    assert await dc.read(index) == tars


async def plainly(dc: Datacenter, registry: FakeRegistry, path: Path, repository: str, layers: list[bytes]) -> None:
    async with proxied(path / "p", registry.host, superpeers=tuple(dc.urls)) as proxy:
        for layer in layers:
            assert (await proxy.get(f"/v2/{repository}/blobs/{digests.of(layer)}"))[1] == layer


@pytest.mark.parametrize("first", ["lazy", "plain", "both"])
@pytest.mark.parametrize("kind", ["indexed", "first sight"])
async def test_lazy_and_plain_are_one_copy(tmp_path: Path, registry: FakeRegistry, first: str, kind: str) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        tars = tars_owned_apart(dc.urls)
        if kind == "indexed":
            made = await indexed.add(registry, "team/app", tars, tmp_path)
            layers = made.layers
        else:
            layers = [gzip.compress(tar, 6, mtime=0) for tar in tars]
            indexed._add_image(registry, "team/app", layers, [digests.of(tar) for tar in tars])
        reference = f"{registry.host}/team/app:1"
        lazy, plain = lazily(dc, reference, tars), plainly(dc, registry, tmp_path, "team/app", layers)
        if first == "both":
            await asyncio.gather(lazy, plain)
        else:
            for work in (lazy, plain) if first == "lazy" else (plain, lazy):
                await work
        copies = sent(registry, layers)
        if (kind, first) == ("indexed", "both"):  # what is under way by ranges when the other one begins comes twice
            assert max(copies) < 1.5
        else:
            assert copies == [1.0] * len(layers)


@pytest.mark.skipif(not available(), reason="docker-registry is not installed (scripts/setup does it)")
@pytest.mark.programs("skopeo")
@pytest.mark.parametrize("first", ["lazy", "plain", "both"])
async def test_so_says_a_real_registry(tmp_path: Path, first: str) -> None:
    made = images.synthetic(tmp_path / "oci", layers=4, size=1 << 20, compression=["gzip", "zstd", "none", "fast-gzip"])
    (tmp_path / "registry").mkdir()
    with DockerRegistry(tmp_path / "registry") as registry:
        await asyncio.to_thread(made.push, f"{registry.host}/team/app:1")
        before = registry.blob_traffic()

        async def lazy() -> int:
            index = await dc.index(f"{registry.host}/team/app:1")
            assert [digests.of(tar) for tar in await dc.read(index)] == [layer.diff_id for layer in made.layers]
            return len(index.config)

        async def plain() -> None:
            async with proxied(tmp_path / "p", registry.host, superpeers=tuple(dc.urls)) as proxy:
                for layer in made.layers:
                    body = (await proxy.get(f"/v2/team/app/blobs/{layer.blob.digest}"))[1]
                    assert digests.of(body) == layer.blob.digest

        async with datacenter(tmp_path, registry.host) as dc:
            if first == "both":
                config, _ = await asyncio.gather(lazy(), plain())
            elif first == "lazy":
                config = await lazy()
                await plain()
            else:
                await plain()
                config = await lazy()
        assert registry.blob_traffic().size - before.size == made.compressed_size + config, "1.0 copies, and the config"


async def test_three_superpeers_are_no_different(tmp_path: Path, registry: FakeRegistry) -> None:
    async with datacenter(tmp_path, registry.host, count=3) as dc:
        tars = tars_owned_apart(dc.urls, count=2)
        made = await indexed.add(registry, "team/app", tars[:3], tmp_path)
        layers = [gzip.compress(tar, 6, mtime=0) for tar in tars[3:]]
        indexed._add_image(registry, "team/plain", layers, [digests.of(tar) for tar in tars[3:]])
        await asyncio.gather(
            lazily(dc, made.reference, tars[:3]),
            lazily(dc, f"{registry.host}/team/plain:1", tars[3:]),
            plainly(dc, registry, tmp_path / "1", "team/app", made.layers),
            plainly(dc, registry, tmp_path / "2", "team/plain", layers),
        )
        assert max(sent(registry, made.layers)) < 1.5
        assert sent(registry, layers) == [1.0] * 3


async def test_an_uncompressed_layer_is_one_copy_too(tmp_path: Path, registry: FakeRegistry) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        tars = [tar_of(a=Random(seed).randbytes(200_000)) for seed in range(4)]
        registry.add_image("team/app", "1", tars)
        await plainly(dc, registry, tmp_path, "team/app", tars)
        await lazily(dc, f"{registry.host}/team/app:1", tars)
        assert sent(registry, tars) == [1.0] * 4


async def test_where_one_has_died_the_other_one_gives_all_for_one_copy_more_at_most(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    async with datacenter(tmp_path, registry.host) as dc:
        tars = tars_owned_apart(dc.urls, count=1)
        made = await indexed.add(registry, "team/app", tars, tmp_path)
        await lazily(dc, made.reference, tars)
        await dc.kill(dc.urls[0])
        await plainly(dc, registry, tmp_path, "team/app", made.layers)
        assert max(sent(registry, made.layers)) <= 2.0


# ---- siblings that are not as they should be

LAYER = Random(5).randbytes(1 << 20)
DIGEST = digests.of(LAYER)
PATH = f"/v2/team/app/blobs/{DIGEST}"


class FakeSibling:
    """Tells what a test says of LAYER, and sends what it says."""

    def __init__(self, told: bytes, body: bytes, cut: int | None = None, hangs: bool = False) -> None:
        self.told, self.body, self.cut = told, body, cut
        self.go = asyncio.Event()
        if not hangs:
            self.go.set()
        self.asked: list[str] = []
        self.ranges: list[str] = []

    async def serve(self, port: int) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/sibling/v1/originals/{digest}", self._told)
        app.router.add_get("/sibling/v1/originals/{digest}/bytes", self._bytes)
        app.router.add_get("/healthz", self._healthz)
        app.router.add_get("/sibling/v1/blobs/{digest}", self._range)
        runner, _ = await http.serve_tcp(app, f"127.0.0.1:{port}")
        return runner

    async def _told(self, request: web.Request) -> web.Response:
        return web.Response(body=self.told)

    async def _range(self, request: web.Request) -> web.Response:
        wanted = request.http_range
        assert wanted.start is not None
        self.ranges.append(request.path)
        headers = {"Content-Range": f"bytes {wanted.start}-{wanted.stop - 1}/{len(self.body)}"}
        return web.Response(status=206, body=self.body[wanted.start : wanted.stop], headers=headers)

    async def _healthz(self, request: web.Request) -> web.Response:
        await self.go.wait()
        return web.Response()

    async def _bytes(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.path)
        await self.go.wait()
        response = web.StreamResponse(headers={"Content-Length": str(len(self.body))})
        await response.prepare(request)
        await response.write(self.body[: self.cut])
        if self.cut is not None and request.transport is not None:
            request.transport.close()
        return response


def told(registry: FakeRegistry, **more: object) -> bytes:
    return json.dumps({"whole": True, "sources": [f"{registry.host}/team/app"], **more}).encode()


def kinds(run: Running) -> set[str]:
    return {row["kind"] for row in run.superpeer.fallbacks.statistics()} - {"did not catch up with a sibling"}


async def pulled(run: Running, registry: FakeRegistry, directory: Path) -> bytes:
    """Return what a plain pull gets; nothing where it is cut."""
    async with proxied(directory, registry.host, superpeers=(run.url,), retries=0) as proxy:
        try:
            return (await proxy.get(PATH))[1]
        except aiohttp.ClientPayloadError:
            return b""


async def test_what_an_honest_sibling_has_is_not_asked_of_the_registry(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add_image("team/app", "1", [LAYER])
    sibling = FakeSibling(told(registry), LAYER)
    async with beside(tmp_path / "s", registry.host, sibling) as run:
        assert await pulled(run, registry, tmp_path / "p") == LAYER
        assert sent(registry, [LAYER]) == [0.0]
        assert run.superpeer.sibling_originals is not None
        assert run.superpeer.sibling_originals.bytes == len(LAYER)
        assert kinds(run) == set()


async def test_wrong_bytes_of_a_sibling_reach_nobody_as_a_whole_and_the_registry_has_the_right_ones(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add_image("team/app", "1", [LAYER])
    sibling = FakeSibling(told(registry), indexed.flipped(LAYER, 70_000))
    async with beside(tmp_path / "s", registry.host, sibling) as run:
        assert await pulled(run, registry, tmp_path / "p") in (b"", LAYER)
        assert not run.superpeer.store.has(DIGEST) or await run.superpeer.store.get(DIGEST) == LAYER
        assert await pulled(run, registry, tmp_path / "q") == LAYER
        assert len(sibling.asked) == 1, "not asked again"
        assert await run.superpeer.store.get(DIGEST) == LAYER


@pytest.mark.parametrize(("body", "cut"), [(LAYER, 300_000), (LAYER, 0), (LAYER[:-5], None), (LAYER + b"x", None)])
async def test_what_a_sibling_breaks_off_comes_from_the_registry(
    tmp_path: Path, registry: FakeRegistry, body: bytes, cut: int | None
) -> None:
    registry.add_image("team/app", "1", [LAYER])
    async with beside(tmp_path / "s", registry.host, FakeSibling(told(registry), body, cut)) as run:
        assert await pulled(run, registry, tmp_path / "p") == LAYER
        assert sent(registry, [LAYER]) == [pytest.approx(1 - (cut or 0) / len(LAYER), abs=0.25)]
        assert "blob broken off by a sibling, registry asked" in kinds(run)


async def test_a_sibling_that_begins_to_hang_is_not_waited_for(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add_image("team/app", "1", [LAYER])
    sibling = FakeSibling(told(registry), LAYER, hangs=True)
    try:
        async with beside(tmp_path / "s", registry.host, sibling) as run, asyncio.timeout(15):
            assert await pulled(run, registry, tmp_path / "p") == LAYER
            assert "blob broken off by a sibling, registry asked" in kinds(run)
            sibling.go.set()
    finally:
        sibling.go.set()
    assert sent(registry, [LAYER]) == [1.0]


FROM_ANOTHER_REGISTRY = b'{"whole": true, "sources": ["private.example/team/app"]}'


@pytest.mark.parametrize("answer", [b"", b"{}", b"[" * 5000, b" " * (1 << 20), b'{"arriving": -1}', b'{"sources": 1}',
                                    FROM_ANOTHER_REGISTRY])  # fmt: skip
async def test_what_a_sibling_tells_that_makes_no_sense_or_has_from_another_registry_is_not_used(
    tmp_path: Path, registry: FakeRegistry, answer: bytes
) -> None:
    registry.add_image("team/app", "1", [LAYER])
    sibling = FakeSibling(answer, LAYER)
    async with beside(tmp_path / "s", registry.host, sibling) as run:
        assert await pulled(run, registry, tmp_path / "p") == LAYER
    assert sibling.asked == []
    assert sent(registry, [LAYER]) == [1.0]


async def test_a_layer_that_a_sibling_has_is_indexed_only_for_a_repository_that_has_it(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    tar = tar_of(a=LAYER)
    packed = gzip.compress(tar, mtime=0)
    indexed._add_image(registry, "team/app", [packed], [digests.of(tar)])
    for has_it in (False, True):
        sibling = FakeSibling(told(registry), packed)
        if not has_it:
            registry.script(f"/blobs/{digests.of(packed)}", *[status(404)] * 5)
        async with beside(tmp_path / f"s-{has_it}", registry.host, sibling) as run:
            if has_it:
                await run.index(f"{registry.host}/team/app:1")
            else:
                with pytest.raises(NotFound):
                    await run.index(f"{registry.host}/team/app:1")
            assert run.superpeer.store.has(digests.of(tar)) == has_it
            assert len(sibling.asked) == 1
            proof = run.superpeer.shown.proof(Layer(f"{registry.host}/team/app", digests.of(packed), digests.of(tar)))
            assert proof is None, "the repository has sent nothing"
        registry._script.clear()
    assert sent(registry, [packed]) == [0.0]


async def test_chunks_that_a_sibling_has_are_for_readers_of_a_repository_that_has_the_layer(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    made = await indexed.add(registry, "team/app", [tar_of(a=LAYER)], tmp_path)
    (packed,) = made.layers
    digest = digests.of(packed)
    for number, has_it in enumerate((True, False)):
        sibling = FakeSibling(told(registry), packed)
        async with beside(tmp_path / f"s{number}", registry.host, sibling) as run:
            layer = (await run.index(made.reference)).layers[0]
            if not has_it:
                registry.script(f"/blobs/{digest}", *[status(404)] * 50)
                with pytest.raises(NotFound):
                    await run.superpeer.bring(layer.blob, range(layer.table.count))
            else:
                await run.superpeer.bring(layer.blob, range(layer.table.count))
                assert sent(registry, [packed]) == [0.0]
            assert bool(sibling.ranges) == has_it


async def test_one_that_wants_the_same_and_has_nothing_yet_is_followed_by_one_of_two_only(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    for number in range(12):
        registry.add_image("team/app", str(number), [LAYER])
        sibling = FakeSibling(told(registry, whole=False, arriving=0), LAYER)
        async with beside(tmp_path / f"s{number}", registry.host, sibling) as run:
            assert run.superpeer.siblings is not None
            (theirs,) = run.superpeer.siblings.others()
            assert await pulled(run, registry, tmp_path / f"p{number}") == LAYER
            assert bool(sibling.asked) == (owners(DIGEST, sorted([theirs, run.url]))[0] == theirs)


async def test_what_siblings_are_told_of_compressed_layers_is_for_siblings_only(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add_image("team/app", "1", [LAYER])
    async with datacenter(tmp_path, registry.host, authorization="registry") as dc, aiohttp.ClientSession() as session:
        await plainly(dc, registry, tmp_path, "team/app", [LAYER])
        for url in dc.urls:
            for path in (f"originals/{DIGEST}", f"originals/{DIGEST}/bytes"):
                async with session.get(f"{url}/sibling/v1/{path}") as response:
                    assert response.status == 401
                    assert LAYER[:100] not in await response.read()
            async with session.get(f"{url}/sibling/packed/v1/blobs/{DIGEST}") as response:
                assert response.status == 401
