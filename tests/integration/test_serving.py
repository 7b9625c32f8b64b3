"""Ranges over HTTP: exactly the bytes that were asked for, compressed where that pays, and nothing for nonsense."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
import zstandard

from dadi.blobs import answering
from dadi.blobs.serving import Compressor
from dadi.errors import NotFound
from dadi.index.chunks import blob_of
from tests.contracts.store import content
from tests.fakes.registry import FakeRegistry
from tests.lab.services import CHUNK, running, tar_of


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake



@pytest.fixture
def layers(registry: FakeRegistry) -> list[bytes]:
    layers = [tar_of(a=b"a" * 50_000, b=b"b" * 10), tar_of(b=bytes(range(256)) * 300)]
    registry.add_image("team/app", "1", layers)
    return layers



async def test_ranges_are_exact(tmp_path: Path, registry: FakeRegistry, layers: list[bytes]) -> None:
    async with running(tmp_path, registry.host, authorization="open") as run, aiohttp.ClientSession() as session:
        index = await run.index(f"{registry.host}/team/app:1")
        url = f"{run.url}/v1/blobs/{index.layers[0].diff_id}"
        size = len(layers[0])
        for first, last in [(0, 0), (0, 99), (511, 20_000), (CHUNK - 1, CHUNK), (size - 5, size - 1), (0, size - 1)]:
            async with session.get(url, headers={"Range": f"bytes={first}-{last}"}) as response:
                assert response.status == 206
                assert response.headers["Content-Range"] == f"bytes {first}-{last}/{size}"
                assert await response.read() == layers[0][first : last + 1]
        async with session.get(url, headers={"Range": f"bytes={size - 3}-{size + 100}"}) as response:
            assert (response.status, await response.read()) == (206, layers[0][-3:])
        async with session.get(url) as response:
            assert (response.status, await response.read()) == (200, layers[0])
        async with session.head(url) as response:
            assert (response.status, int(response.headers["Content-Length"])) == (200, size)


@pytest.mark.parametrize(
    "value", ["bytes=-5", "bytes=5", "bytes=9-2", "bytes=0-1,5-6", "chunks=0-1", "bytes=9999999-"]
)
async def test_a_range_that_makes_no_sense_is_refused(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes], value: str
) -> None:
    async with running(tmp_path, registry.host, authorization="open") as run, aiohttp.ClientSession() as session:
        index = await run.index(f"{registry.host}/team/app:1")
        url = f"{run.url}/v1/blobs/{index.layers[0].diff_id}"
        async with session.get(url, headers={"Range": value}) as response:
            assert (response.status, await response.read()) == (416, b"")
            assert response.headers["Content-Range"] == f"bytes */{len(layers[0])}"


@pytest.mark.parametrize(
    ("path", "code"),
    [
        ("/v1/blobs/sha256:" + "0" * 64, 404),
        ("/v1/blobs/sha256:..%2f..%2fetc%2fpasswd", 400),
        ("/v1/blobs/md5:" + "0" * 32, 400),
        ("/v1/images", 400),
        ("/v1/images/../../etc/passwd", 404),
    ],
)
async def test_hostile_paths_are_refused(tmp_path: Path, registry: FakeRegistry, path: str, code: int) -> None:
    async with running(tmp_path, registry.host, authorization="open") as run, aiohttp.ClientSession() as session:
        async with session.get(run.url + path) as response:
            assert response.status == code


async def test_ranges_go_compressed_where_that_pays_and_both_sides_want_it(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    async with (
        running(tmp_path, registry.host, authorization="open") as run,
        aiohttp.ClientSession(auto_decompress=False) as session,
    ):
        index = await run.index(f"{registry.host}/team/app:1")
        url = f"{run.url}/v1/blobs/{index.layers[0].diff_id}"
        asked = {"Range": "bytes=100-49000", "Accept-Encoding": "zstd"}
        for _ in range(2):
            async with session.get(url, headers=asked) as response:
                body = await response.read()
                assert response.headers["Content-Range"] == f"bytes 100-49000/{len(layers[0])}"
                assert response.headers["Content-Encoding"] == "zstd"
                with zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True) as reader:
                    assert reader.read() == layers[0][100:49001]
        served = (await (await session.get(f"{run.url}/v1/status")).json())["served"]
        assert served["wire_bytes"] < served["bytes"] / 5


async def test_what_does_not_compress_goes_as_it_is(tmp_path: Path, registry: FakeRegistry) -> None:
    noise = tar_of(a=content(60_000))
    registry.add_image("team/noise", "1", [noise])
    async with (
        running(tmp_path, registry.host, authorization="open") as run,
        aiohttp.ClientSession(auto_decompress=False) as session,
    ):
        index = await run.index(f"{registry.host}/team/noise:1")
        url = f"{run.url}/v1/blobs/{index.layers[0].diff_id}"
        for _ in range(2):
            headers = {"Range": "bytes=1024-50000", "Accept-Encoding": "zstd"}
            async with session.get(url, headers=headers) as response:
                assert "Content-Encoding" not in response.headers
                assert await response.read() == noise[1024:50001]


async def test_the_memory_for_compressed_ranges_is_bounded(tmp_path: Path) -> None:
    file = tmp_path / "file"
    data = b"".join(b"%09d\n" % n for n in range(100_000))
    file.write_bytes(data)
    compressor = Compressor(cache=50_000)
    blob = blob_of(data, CHUNK)
    with open(file, "rb") as opened:
        for at in range(0, 900_000, CHUNK):
            assert await compressor.range(blob, opened.fileno(), at, CHUNK)
            assert compressor._bytes <= 50_000
        assert 0 < len(compressor._cache) < 900_000 // CHUNK


async def test_when_the_processors_are_busy_ranges_go_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(bytes(1 << 20))
    compressor = Compressor(cache=1 << 20, most=1)
    blob = blob_of(bytes(1 << 20), CHUNK)
    with open(file, "rb") as opened:
        both = [compressor.range(blob, opened.fileno(), at, CHUNK) for at in (0, CHUNK)]
        first, second = await asyncio.gather(*both)
        assert (first is None, second is None) == (False, True)


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), NotFound("it has gone")])
async def test_an_answer_that_fails_in_the_middle_is_cut_off_and_nothing_is_taken_for_its_rest(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes], monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def broken(*arguments: object) -> None:
        raise error

    monkeypatch.setattr(answering, "send_file", broken)
    async with running(tmp_path, registry.host, authorization="open") as run, aiohttp.ClientSession() as session:
        index = await run.index(f"{registry.host}/team/app:1")
        url = f"{run.url}/v1/blobs/{index.layers[0].diff_id}"
        # so few bytes are left that the head of another answer would fill them
        async with session.get(url, headers={"Range": f"bytes=0-{answering.FIRST_PART + 39}"}) as response:
            assert response.status == 206
            with pytest.raises(aiohttp.ClientError):
                await response.read()
