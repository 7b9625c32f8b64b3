"""A superpeer over real HTTP, with registries that behave (Debian's) and that do not (the fake)."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from dadi import digest as digests
from dadi.errors import (
    AccessDenied,
    DadiError,
    DigestMismatch,
    InvalidRequest,
    NoSuchPlatform,
    NotFound,
    RegistryNotAllowed,
    StoreFull,
    Unavailable,
)
from dadi.fallbacks import Fallbacks
from dadi.index import layer as layer_index
from dadi.peers.superpeer import ImageAnswer, SuperpeerClient
from tests.contracts.store import content
from tests.fakes.registry import FakeRegistry, cut, status
from tests.lab import images
from tests.lab.registry import DockerRegistry, available
from tests.lab.services import PLATFORM, running, tar_of


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


@pytest.fixture
def layers(registry: FakeRegistry) -> list[bytes]:
    layers = [tar_of(a=b"a" * 50_000, b=b"b" * 10), tar_of(b=bytes(range(256)) * 300)]
    registry.add_image("team/app", "1", layers)
    return layers


@pytest.mark.skipif(not available(), reason="docker-registry is not installed (scripts/setup does it)")
@pytest.mark.programs("skopeo")
async def test_twenty_askers_at_once_cost_the_registry_one_copy(tmp_path: Path) -> None:
    made = images.synthetic(tmp_path / "oci", layers=4, size=1 << 20, compression=["gzip", "zstd", "none", "fast-gzip"])
    (tmp_path / "registry").mkdir()
    with DockerRegistry(tmp_path / "registry") as registry:
        await asyncio.to_thread(made.push, f"{registry.host}/team/app:1")
        before = registry.blob_traffic()
        async with running(tmp_path / "superpeer", registry.host) as run:
            answers = await asyncio.gather(*(run.image(f"{registry.host}/team/app:1") for _ in range(20)))
            assert len({answer.index_digest for answer in answers}) == 1
            index = await run.index(f"{registry.host}/team/app:1")
            for layer in index.layers:
                chunks = await run.client.source.read(layer.blob, range(layer.table.count))
                assert "sha256:" + hashlib.sha256(b"".join(chunks)).hexdigest() == layer.diff_id
            after = registry.blob_traffic()
        config = len(index.config)
        assert after.size - before.size == made.compressed_size + config, "1.0 copies of each layer, and the config"
        assert [layer.diff_id for layer in index.layers] == [layer.diff_id for layer in made.layers]


async def test_the_index_tells_where_each_file_is(tmp_path: Path, registry: FakeRegistry, layers: list[bytes]) -> None:
    async with running(tmp_path, registry.host) as run:
        index = await run.index(f"{registry.host}/team/app:1")
        layer = index.layers[1]
        entries = layer_index.decode(await run.client.whole(layer.index_digest, layer.index_size)).entries
        (entry,) = entries
        assert (entry.path, layers[1][entry.offset : entry.offset + entry.size]) == (b"b", bytes(range(256)) * 300)
        assert index.devices == (0, 1)


async def test_what_it_has_is_answered_while_the_registry_is_away_and_said(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    reference = f"{registry.host}/team/app:1"
    async with running(tmp_path, registry.host, tag_ttl=0.0) as run:
        first = await run.image(reference)
        registry.script("/manifests/", *[status(503)] * 50)
        second = await run.image(reference)
        assert second.index_digest == first.index_digest
        assert [row["kind"] for row in run.superpeer.statistics()["fallbacks"]] == [
            "registry away, answered from the cache"
        ]
        with pytest.raises(Unavailable):
            await run.image(f"{registry.host}/team/unknown:1")


async def test_everything_is_there_after_a_restart_without_the_registry(tmp_path: Path) -> None:
    async with FakeRegistry() as registry:
        data = tar_of(a=b"a" * 100_000)
        registry.add_image("team/app", "1", [data])
        reference = f"{registry.host}/team/app:1"
        async with running(tmp_path, registry.host, tag_ttl=0.0) as run:
            before = await run.index(reference)
    async with running(tmp_path, registry.host, tag_ttl=0.0) as run:
        assert await run.index(reference) == before
        chunks = await run.client.source.read(before.layers[0].blob, range(before.layers[0].table.count))
        assert b"".join(chunks) == data
        assert run.superpeer.origin.bytes == 0


async def test_a_tag_that_moved_is_found_out_and_shared_layers_are_not_fetched_again(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    async with running(tmp_path, registry.host, tag_ttl=0.0) as run:
        old = await run.image(f"{registry.host}/team/app:1")
        more = tar_of(c=b"c" * 999)
        registry.add_image("team/app", "1", [*layers, more])
        before = len(registry.asked("/blobs/"))
        new = await run.image(f"{registry.host}/team/app:1")
        assert new.manifest_digest != old.manifest_digest
        assert len(registry.asked("/blobs/")) - before == 2, "the new layer and the config"


async def test_a_tag_is_believed_for_its_time(tmp_path: Path, registry: FakeRegistry, layers: list[bytes]) -> None:
    async with running(tmp_path, registry.host, tag_ttl=3600.0) as run:
        await run.image(f"{registry.host}/team/app:1")
        asked = len(registry.seen)
        for _ in range(50):
            await run.image(f"{registry.host}/team/app:1")
        assert len(registry.seen) == asked


async def test_a_layer_that_was_evicted_is_brought_again_and_is_the_same(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    async with running(tmp_path, registry.host) as run:
        index = await run.index(f"{registry.host}/team/app:1")
        assert await run.superpeer.store.remove(index.layers[0].diff_id)
        chunks = await run.client.source.read(index.layers[0].blob, range(index.layers[0].table.count))
        assert b"".join(chunks) == layers[0]
        assert [row["kind"] for row in run.superpeer.statistics()["fallbacks"]] == ["blob was evicted, fetched again"]


async def test_a_registry_that_is_not_allowed_is_never_contacted(tmp_path: Path, registry: FakeRegistry) -> None:
    async with FakeRegistry() as other, running(tmp_path, registry.host) as run:
        with pytest.raises(RegistryNotAllowed):
            await run.image(f"{other.host}/team/app:1")
        assert other.seen == []


@pytest.mark.parametrize(
    ("reference", "platform", "error"),
    [
        ("HOST/team/app:none", PLATFORM, NotFound),
        ("HOST/team/app:1", "linux/s390x", NoSuchPlatform),
        ("HOST/Team/App:1", PLATFORM, InvalidRequest),
        ("HOST/team/app:1", "plan9", InvalidRequest),
    ],
)
async def test_what_cannot_be_had_is_told_over_the_wire_as_what_it_is(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes], reference: str, platform: str, error: type[DadiError]
) -> None:
    async with running(tmp_path, registry.host) as run:
        with pytest.raises(error) as raised:
            await run.image(reference.replace("HOST", registry.host), platform)
        assert type(raised.value) is error


async def test_access_denied_is_told(tmp_path: Path) -> None:
    async with FakeRegistry(auth="basic", user="u", password="p") as registry, running(tmp_path, registry.host) as run:
        registry.add_image("team/app", "1", [tar_of(a=b"a")])
        with pytest.raises(AccessDenied):
            await run.image(f"{registry.host}/team/app:1")


async def test_a_wrong_layer_leaves_nothing_behind_and_the_next_try_is_free_to_succeed(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    digest = "sha256:" + hashlib.sha256(layers[0]).hexdigest()
    registry.blobs[digest] = layers[0][:600] + b"\xff" + layers[0][601:]
    async with running(tmp_path, registry.host) as run:
        with pytest.raises(DigestMismatch):
            await run.image(f"{registry.host}/team/app:1")
        assert not run.superpeer.store.has(digest)
        await run.superpeer.origin.close()  # the other layer may be under way
        assert list((tmp_path / "store" / "incoming").iterdir()) == []
        registry.blobs[digest] = layers[0]
        await run.image(f"{registry.host}/team/app:1")
        assert run.superpeer.store.has(digest)


async def test_a_download_that_is_cut_goes_on_where_it_was(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    digest = "sha256:" + hashlib.sha256(layers[0]).hexdigest()
    registry.script(f"/blobs/{digest}", cut(20_000), cut(10_000), method="GET")
    async with running(tmp_path, registry.host) as run:
        await run.image(f"{registry.host}/team/app:1")
    ranges = [seen.headers.get("Range") for seen in registry.asked(f"/blobs/{digest}", "GET")]
    assert ranges[0] is None
    assert all(value and value.startswith("bytes=") for value in ranges[1:])


async def test_a_store_too_small_says_so(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    async with running(tmp_path, registry.host, limit=30_000) as run:
        with pytest.raises(DadiError, match=r"does not fit|limit") as error:
            await run.image(f"{registry.host}/team/app:1")
        assert error.value.code == "store-full"


async def test_an_asker_that_goes_away_does_not_stop_the_others(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    async with running(tmp_path, registry.host) as run:
        impatient = asyncio.create_task(run.image(f"{registry.host}/team/app:1"))
        patient = asyncio.create_task(run.image(f"{registry.host}/team/app:1"))
        while not registry.seen:
            await asyncio.sleep(0.001)
        impatient.cancel()
        with pytest.raises(asyncio.CancelledError):
            await impatient
        assert (await patient).manifest_digest


async def test_metrics_and_status_tell_the_same(tmp_path: Path, registry: FakeRegistry, layers: list[bytes]) -> None:
    async with running(tmp_path, registry.host) as run, aiohttp.ClientSession() as session:
        await run.image(f"{registry.host}/team/app:1")
        async with session.get(f"{run.url}/v1/status") as response:
            shown = await response.json()
        async with session.get(f"{run.url}/metrics") as response:
            text = await response.text()
        assert f"dadi_superpeer_registry_bytes {float(shown['registry_bytes'])}" in text
        assert shown["registry_bytes"] == sum(map(len, layers))


async def test_a_config_that_lies_about_a_layer_does_not_get_what_an_honest_image_fetches(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    honest = "sha256:" + hashlib.sha256(layers[0]).hexdigest()
    registry.add_image("team/liar", "1", [layers[0]])
    config = next(data for data in registry.blobs.values() if data.count(honest.encode()) == 1 and b"rootfs" in data
                  and data.count(b"sha256:") == 1)  # fmt: skip
    lie = config.replace(honest.encode(), b"sha256:" + b"1" * 64)
    (media_type, manifest) = registry.manifests["team/liar", "1"]
    manifest = manifest.replace(hashlib.sha256(config).hexdigest().encode(), hashlib.sha256(lie).hexdigest().encode())
    manifest = manifest.replace(b'"size": %d' % len(config), b'"size": %d' % len(lie))
    registry.add_blob(lie)
    registry.add_manifest("team/liar", "1", manifest, media_type)
    async with running(tmp_path, registry.host) as run:
        good, bad = await asyncio.gather(
            run.image(f"{registry.host}/team/app:1"),
            run.image(f"{registry.host}/team/liar:1"),
            return_exceptions=True,
        )
        assert isinstance(good, ImageAnswer)
        assert isinstance(bad, DigestMismatch)


async def test_when_a_tag_moves_the_old_image_stays_known_by_its_digest(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    async with running(tmp_path, registry.host, tag_ttl=0.0) as run:
        old = await run.image(f"{registry.host}/team/app:1")
        registry.add_image("team/app", "1", [tar_of(new=b"n")])
        await run.image(f"{registry.host}/team/app:1")
        registry.blobs.clear()
        again = await run.image(f"{registry.host}/team/app:1@{old.manifest_digest}")
        assert again.index_digest == old.index_digest


async def test_the_oldest_references_are_forgotten_and_let_go_of(tmp_path: Path, registry: FakeRegistry) -> None:
    async with running(tmp_path, registry.host, most_images=2) as run:
        for number in range(4):
            registry.add_image("team/app", str(number), [tar_of(a=b"%d" % number)])
            await run.image(f"{registry.host}/team/app:{number}")
        names = [record.reference.rpartition(":")[2] for record in run.superpeer.catalog.records()]
        assert names == ["2", "3"]
        assert len(list((tmp_path / "images").iterdir())) == 2
        assert run.superpeer.store.statistics()["held"] == 6, "index, layer index and metadata of two images"


async def test_what_is_read_and_renewed_outlives_what_is_only_asked_for(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    async with running(tmp_path, registry.host, most_images=4) as run:
        reference = f"{registry.host}/team/app:1"
        index = await run.index(reference)
        (held,) = run.client.tokens._images.values()
        for number in range(12):
            if number % 2:
                await run.client.source.read(index.layers[0].blob, range(1))
            else:
                await run.client.access.renew(held.image)
            registry.add_image("any/app", str(number), [tar_of(a=b"%d" % number)])
            await run.image(f"{registry.host}/any/app:{number}")
        assert run.superpeer.catalog.find(reference, PLATFORM) is not None


async def test_the_tags_of_an_image_in_use_do_not_all_stay_for_that(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    async with running(tmp_path, registry.host, most_images=4) as run:
        await run.image(f"{registry.host}/team/app:1")
        registry.add_image("any/app", "0", [tar_of(a=b"a")])
        index = await run.index(f"{registry.host}/any/app:0")
        for number in range(1, 8):
            registry.add_image("any/app", str(number), [tar_of(a=b"a")])
            await run.image(f"{registry.host}/any/app:{number}")
            await run.client.source.read(index.layers[0].blob, range(1))
            run.superpeer.catalog.find(f"{registry.host}/team/app:1", PLATFORM)
        names = [record.reference.partition("/")[2] for record in run.superpeer.catalog.records()]
        assert sorted(names) == ["any/app:5", "any/app:6", "any/app:7", "team/app:1"]


async def test_an_image_that_the_superpeer_forgot_is_resolved_again_by_who_runs_it(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    async with running(tmp_path, registry.host) as run:
        index = await run.index(f"{registry.host}/team/app:1")
        (record,) = run.superpeer.catalog.records()
        for layer in index.layers:
            await run.superpeer.store.remove(layer.diff_id)
        await run.superpeer.catalog.forget(record)
        blobs = [layer.blob for layer in index.layers]
        reads = (run.client.source.read(blob, range(blob.table.count)) for blob in (*blobs, *blobs))
        parts = await asyncio.gather(*reads)
        assert [digests.of(b"".join(part)) for part in parts[: len(blobs)]] == [blob.digest for blob in blobs]
        assert len(run.superpeer.catalog.records()) == 1
        noted = {row["kind"]: row["count"] for row in run.fallbacks.statistics()}
        assert noted["image forgotten by superpeers, resolved again"] == 1, "whoever waits, waits for the same answer"


async def test_what_the_registry_has_lost_too_is_not_resolved_for_each_read(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    async with running(tmp_path, registry.host) as run:
        index = await run.index(f"{registry.host}/team/app:1")
        (record,) = run.superpeer.catalog.records()
        await run.superpeer.store.remove(index.layers[0].diff_id)
        await run.superpeer.catalog.forget(record)
        registry.script("/manifests/", *[status(404)] * 99)
        for _ in range(3):
            with pytest.raises(NotFound):
                await run.client.source.read(index.layers[0].blob, range(1))
        noted = {row["kind"]: row["count"] for row in run.fallbacks.statistics()}
        assert noted["image forgotten by superpeers, resolved again"] == 1


async def test_what_one_superpeer_does_not_know_another_is_asked_for(
    tmp_path: Path, registry: FakeRegistry, layers: list[bytes]
) -> None:
    both = [running(tmp_path / name, registry.host, authorization="open") for name in "ab"]
    async with both[0] as empty, both[1] as full:
        answer = await full.image(f"{registry.host}/team/app:1")
        client = SuperpeerClient([empty.url, full.url], Fallbacks(), connect=3, read=10)
        try:
            assert await client.whole(answer.index_digest, answer.index_size)
        finally:
            await client.close()


async def test_an_image_larger_than_the_store_is_refused_and_not_fetched_over_and_over(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add_image("team/app", "1", [tar_of(a=content(60_000, seed)) for seed in range(3)])
    async with running(tmp_path, registry.host, limit=150_000) as run:
        with pytest.raises(StoreFull):
            await run.image(f"{registry.host}/team/app:1")
