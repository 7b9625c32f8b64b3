"""A superpeer that finds an index in the registry: only the ranges that are asked for, each once."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest
import zstandard
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi import digest as digests
from dadi.blobs.source import Urgency
from dadi.fallbacks import Fallbacks
from dadi.index.image import FIRST_SIGHT, REFERRER, ImageIndex
from dadi.peers.superpeer import SuperpeerClient
from tests.fakes import indexed
from tests.fakes.indexed import CHUNK, Indexed
from tests.fakes.registry import FakeRegistry, Fault, status
from tests.lab.services import IndexingConfig, Running, running, tar_of

NEVER = 1e6
"""Seconds: the rest is not fetched while a test looks."""


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


@pytest.fixture
def tars() -> list[bytes]:
    # Words in no order: they compress to a third, and every place refers to what stands before it.
    choose = random.Random(3)
    words = [choose.randbytes(choose.randrange(3, 12)).hex().encode() for _ in range(2000)]
    files = {f"f{n}": b" ".join(choose.choices(words, k=16_000)) for n in range(8)}
    return [tar_of(**files), tar_of(b=b"b" * 10)]


def superpeer(directory: Path, registry: FakeRegistry, *, rest_after: float = NEVER, **indexing: Any) -> Any:
    config = IndexingConfig(chunk_size=CHUNK, rest_after=rest_after, **indexing)
    return running(directory / "superpeer", registry.host, indexing=config)


async def whole(run: Running, index: ImageIndex) -> list[bytes]:
    """Read all of every layer, a chunk at a time."""
    read = run.client.source.read
    return [b"".join([b"".join(await read(layer.blob, range(n, n + 1))) for n in range(layer.table.count)])
            for layer in index.layers]  # fmt: skip


def kinds(run: Running) -> set[str]:
    return {row["kind"] for row in run.superpeer.statistics()["fallbacks"]}


def fetched(registry: FakeRegistry, image: Indexed) -> int:
    """Return the bytes of layers that were asked of the registry."""
    count = 0
    for layer in image.layers:
        for seen in registry.asked(f"/blobs/{digests.of(layer)}", "GET"):
            asked = seen.headers.get("Range", f"bytes=0-{len(layer) - 1}")
            first, last = asked.removeprefix("bytes=").split("-")
            count += int(last) - int(first) + 1
    return count


async def complete(run: Running, count: int) -> None:
    async with asyncio.timeout(20):
        while run.superpeer.lazy.completed < count:
            await asyncio.sleep(0.01)


async def test_resolving_fetches_indexes_and_a_read_fetches_the_ranges_it_needs(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        assert (index.origin, index.artifact) == (REFERRER, image.artifact)
        assert fetched(registry, image) == 0
        layer = index.layers[0]
        (chunk,) = await run.client.source.read(layer.blob, range(40, 41))
        assert chunk == tars[0][40 * CHUNK : 41 * CHUNK]
        assert 0 < fetched(registry, image) < len(image.layers[0]) / 3
        assert kinds(run) == set()


async def test_every_chunk_read_in_any_order_costs_one_copy_of_the_layer(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    quiet = IndexingConfig(chunk_size=CHUNK, rest_after=NEVER)
    async with running(tmp_path / "superpeer", registry.host, indexing=quiet, authorization="open") as run:
        index = await run.index(image.reference)
        layer = index.layers[0]
        order = random.Random(5).sample(range(layer.table.count), layer.table.count)
        nodes = [SuperpeerClient([run.url], Fallbacks(), connect=3, read=10) for _ in range(5)]

        async def node(client: SuperpeerClient, seed: int) -> None:
            for chunk in random.Random(seed).sample(order, len(order)):
                (data,) = await client.source.read(layer.blob, range(chunk, chunk + 1))
                assert data == tars[0][chunk * CHUNK : (chunk + 1) * CHUNK]

        await asyncio.gather(*(node(client, seed) for seed, client in enumerate(nodes)))
        assert fetched(registry, image) <= len(image.layers[0])
        for client in nodes:
            await client.close()


async def test_when_it_is_quiet_the_rest_comes_and_both_forms_are_complete_and_verified(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry, rest_after=0.0) as run:
        index = await run.index(image.reference)
        await run.client.source.read(index.layers[0].blob, range(30, 31))
        await complete(run, 1)
        store, layer = run.superpeer.store, index.layers[0]
        assert store.has(layer.diff_id)
        assert store.has(layer.layer_digest)
        assert await store.get(layer.layer_digest) == image.layers[0]
        assert await store.get(layer.diff_id) == tars[0]
        assert fetched(registry, image) == len(image.layers[0])
        assert run.superpeer.statistics()["ranges"]["open"] == 0
        # A plain pull is served what was assembled.
        assert await run.client.whole(layer.layer_digest, layer.layer_size) == image.layers[0]


async def test_what_nobody_waits_for_waits_for_demand(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry, parallel_ranges=1) as run:
        index = await run.index(image.reference)
        layer = index.layers[0]
        gate = asyncio.Event()
        registry.script("/blobs/" + layer.layer_digest, Fault(gate=gate))
        read = run.client.source.read
        first = asyncio.create_task(read(layer.blob, range(0, 1), Urgency.BACKFILL))
        while not registry.asked("/blobs/" + layer.layer_digest):
            await asyncio.sleep(0.005)
        rest = asyncio.create_task(read(layer.blob, range(20, 60), Urgency.BACKFILL))
        while run.superpeer.lazy.waiting() < 2:
            await asyncio.sleep(0.005)
        last = layer.table.count - 1
        demand = asyncio.create_task(read(layer.blob, range(last, last + 1)))
        while run.superpeer.lazy.waiting() < 3:
            await asyncio.sleep(0.005)
        gate.set()
        await asyncio.gather(first, rest, demand)
        ranges = [seen.headers["Range"] for seen in registry.asked("/blobs/" + layer.layer_digest)]
        begins = [int(text.removeprefix("bytes=").split("-")[0]) for text in ranges]
        assert begins[0] == 0
        assert begins[1] == max(begins), "what was asked for last, and by a program, came before the rest"


async def test_a_registry_without_ranges_gives_the_whole_layer_and_that_is_said(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    for layer in image.layers:
        registry.script("/blobs/" + digests.of(layer), *[Fault(ignore_range=True)] * 50)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        assert await whole(run, index) == tars
        assert kinds(run) == {"no ranges, whole layer fetched"}


async def test_one_wrong_range_is_asked_for_again_and_nobody_is_called_a_liar(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        registry.script("/blobs/" + index.layers[0].layer_digest, Fault(flip=100))
        assert await whole(run, index) == tars
        assert kinds(run) == {"wrong range, asked the registry itself again"}


# ---- indexes that are not used


def newer(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "artifactType": "application/vnd.dadi.index.v9"}


def of_another(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "subject": {**document["subject"], "digest": "sha256:" + "0" * 64}}


def without_subject(document: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in document.items() if name != "subject"}


def without_a_layer(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "layers": document["layers"][2:]}


def swapped(document: dict[str, Any]) -> dict[str, Any]:
    layers = [dict(item) for item in document["layers"]]
    for name in ("digest", "size"):
        layers[0][name], layers[2][name] = layers[2][name], layers[0][name]
    return {**document, "layers": layers}


def with_a_blob_that_is_not_there(document: dict[str, Any]) -> dict[str, Any]:
    layers = [dict(item) for item in document["layers"]]
    layers[0]["digest"] = "sha256:" + "1" * 64
    return {**document, "layers": layers}


@pytest.mark.parametrize(
    "change", [newer, of_another, without_subject, without_a_layer, swapped, with_a_blob_that_is_not_there]
)
async def test_an_index_that_does_not_fit_is_passed_over_and_the_image_indexed_on_first_sight(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], change: Callable[[dict[str, Any]], dict[str, Any]]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path, change_manifest=change)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        assert (index.origin, index.artifact) == (FIRST_SIGHT, "")
        assert kinds(run) == {"index in the registry not used"}
        assert await whole(run, index) == tars


async def test_an_index_with_other_chunks_than_ours_is_passed_over(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path, chunk_size=2 * CHUNK)
    async with superpeer(tmp_path, registry) as run:
        assert (await run.index(image.reference)).origin == FIRST_SIGHT
        assert kinds(run) == {"index in the registry not used"}


async def test_referrers_that_cannot_be_read_do_not_keep_an_image_from_starting(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    registry.script("/referrers/", *[status(500)] * 20)
    registry.script("/manifests/sha256-", *[status(500)] * 20)
    async with superpeer(tmp_path, registry) as run:
        assert (await run.index(image.reference)).origin == FIRST_SIGHT
        assert kinds(run) == {"referrers could not be read"}


async def test_use_artifacts_false_means_never(tmp_path: Path, registry: FakeRegistry, tars: list[bytes]) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry, use_artifacts=False) as run:
        assert (await run.index(image.reference)).origin == FIRST_SIGHT
        assert kinds(run) == set()


# ---- trusted keys


def key_file(directory: Path, key: Ed25519PrivateKey) -> str:
    path = directory / f"{id(key)}.pem"
    path.write_bytes(key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    ))  # fmt: skip
    return str(path)


async def test_with_trusted_keys_only_what_one_of_them_signed_is_used(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    ours, other = Ed25519PrivateKey.generate(), Ed25519PrivateKey.generate()
    good = await indexed.add(registry, "team/good", tars, tmp_path, sign=ours)
    bad = await indexed.add(registry, "team/bad", [tars[0] + bytes(512)], tmp_path, sign=other)
    none = await indexed.add(registry, "team/none", [tars[0] + bytes(1024)], tmp_path)
    async with superpeer(tmp_path, registry, trusted_keys=(key_file(tmp_path, ours),)) as run:
        index = await run.index(good.reference)
        assert (index.origin, len(index.signer)) == (REFERRER, 16)
        assert kinds(run) == set()
        assert (await run.index(bad.reference)).origin == FIRST_SIGHT
        assert (await run.index(none.reference)).origin == FIRST_SIGHT
        assert kinds(run) == {"index in the registry not used"}


async def test_a_layer_without_seek_points_is_streamed_whole_and_not_held_in_memory(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superpeer.ranged._LARGEST_NEED", 100_000)
    image = await indexed.add(registry, "team/app", tars, tmp_path, compress=zstandard.compress)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        assert (index.origin, index.layers[0].seek_points) == (REFERRER, 1)
        assert await whole(run, index) == tars
        assert kinds(run) == {"no ranges, whole layer fetched"}
        assert fetched(registry, image) == sum(map(len, image.layers))
