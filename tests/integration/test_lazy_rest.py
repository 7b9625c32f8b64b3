"""What a superpeer brings for nobody, and what it holds while it does: bounded, behind demand, and not for ever.

Longer than 400 lines: each of these bad days needs the same superpeer, registry and image, made below.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import random
import threading
import tracemalloc
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from dadi.blobs.source import Urgency
from dadi.errors import StoreFull, Unavailable
from dadi.index.image import ImageIndex, ImageLayer
from superpeer import lazy_layers, ranged
from superpeer.ranged import Lie, RangedLayer
from tests.fakes import indexed
from tests.fakes.indexed import CHUNK, Indexed
from tests.fakes.registry import FakeRegistry, Fault, status
from tests.integration.test_lazy_layers import complete, fetched, kinds, registry, superpeer, tars, whole
from tests.lab.services import IndexingConfig, Running, running, tar_of
from tests.lab.waiting import until

__all__ = ["registry", "tars"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lazy_layers, "_PAUSE", 0.01)


async def turns(run: Running, count: int = 30) -> None:
    """Let the rest have its turn that many times, with time for what it would do (and is not to)."""
    for _ in range(count):
        run.superpeer.lazy._wake.set()
        await asyncio.sleep(0.005)


def noise(size: int, seed: int = 1) -> bytes:
    return random.Random(seed).randbytes(size)


def asked(registry: FakeRegistry, layer: ImageLayer) -> int:
    return len(registry.asked("/blobs/" + layer.layer_digest, "GET"))


def all_of(layer: ImageLayer) -> range:
    return range(layer.table.count)


def passed_over(document: dict[str, Any]) -> dict[str, Any]:
    return {**document, "artifactType": "application/vnd.dadi.index.v9"}


async def opened(run: Running, image: Indexed) -> tuple[ImageIndex, ImageLayer]:
    index = await run.index(image.reference)
    return index, index.layers[0]


# ---- memory


async def test_a_layer_that_is_asked_for_as_a_whole_is_not_held_in_memory(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    tar = tar_of(**{f"f{n}": noise(1 << 20, n) for n in range(48)})
    image = await indexed.add(
        registry, "team/app", [tar], tmp_path, compress=lambda data: gzip.compress(data, 1, mtime=0),
        chunk_size=256 << 10,
    )  # fmt: skip
    async with running(tmp_path / "superpeer", registry.host, indexing=IndexingConfig(rest_after=1e6)) as run:
        _, layer = await opened(run, image)
        tracemalloc.start(1)
        try:
            before = tracemalloc.get_traced_memory()[0]
            await run.superpeer.bring(layer.blob, all_of(layer))
            peak = tracemalloc.get_traced_memory()[1] - before
        finally:
            tracemalloc.stop()
        assert not await run.superpeer.store.missing(layer.blob)
        assert peak < 32 << 20
        assert fetched(registry, image) == len(image.layers[0])


async def test_a_seek_table_is_decoded_and_measured_in_a_thread(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[threading.Thread] = []
    really = ranged.largest_extent

    def largest_extent(*args: Any) -> int:
        threads.append(threading.current_thread())
        return really(*args)

    monkeypatch.setattr(ranged, "largest_extent", largest_extent)
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        _, layer = await opened(run, image)
        await run.superpeer.bring(layer.blob, range(1))
    assert len(threads) == 1
    assert threads[0] is not threading.current_thread()


async def test_looking_for_what_is_missing_stops_at_the_first_of_it(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranged, "_STEP", 4 * CHUNK)
    monkeypatch.setattr(ranged, "_AHEAD", 6 * CHUNK)
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        _, layer = await opened(run, image)
        store, looked = run.superpeer.store, []
        await run.superpeer.bring(layer.blob, range(9))
        open_layer = await run.superpeer.lazy._open(image.reference, layer)
        really = store.missing

        async def missing(blob: Any, chunks: range | None = None) -> list[int]:
            looked.append(chunks)
            return await really(blob, chunks)

        here = set(all_of(layer)) - set(await store.missing(layer.blob))
        monkeypatch.setattr(store, "missing", missing)
        ahead = await open_layer.ahead()
        assert ahead.start == min(set(all_of(layer)) - here)
        assert len(ahead) == 6
        assert looked == [range(at, at + 4) for at in range(0, ahead.start + 1, 4)]


async def test_layers_that_nobody_uses_are_closed_when_their_tables_take_too_much_memory(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_layers, "_OPEN_TABLES", 1)
    two = [tars[0], tar_of(x=noise(300_000))]
    image = await indexed.add(registry, "team/app", two, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        for layer in (*index.layers, *index.layers):
            await run.superpeer.bring(layer.blob, range(3))
            assert run.superpeer.lazy.statistics()["open"] == 1
        assert run.superpeer.lazy.statistics()["requests"] == 2
        assert await whole(run, index) == two


# ---- one copy


async def test_two_honest_indexes_of_one_layer_fetch_its_bytes_once(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    one = await indexed.add(registry, "team/a", tars[:1], tmp_path)
    monkeypatch.setattr(indexed, "SPACING", 128 << 10)
    two = await indexed.add(registry, "team/b", [tars[0], tar_of(z=b"z")], tmp_path)
    async with superpeer(tmp_path, registry) as run:
        a, b = (await opened(run, one))[1], (await opened(run, two))[1]
        assert a.found_index != b.found_index
        gate, lazy = asyncio.Event(), run.superpeer.lazy
        registry.script("/blobs/" + a.layer_digest, Fault(gate=gate), Fault(gate=gate))
        reads = [asyncio.create_task(lazy.bring(image.reference, layer, range(4), Urgency.DEMAND))
                 for image, layer in ((one, a), (two, b))]  # fmt: skip
        await until(lambda: lazy.waiting() == 2 and asked(registry, a) == 1)
        await turns(run, 5)
        gate.set()
        await asyncio.gather(*reads)
        assert fetched(registry, one) < len(one.layers[0])
        assert asked(registry, a) == 1
        await lazy.drop(a)  # the other one goes on
        await lazy.bring(two.reference, b, all_of(b), Urgency.DEMAND)
        assert fetched(registry, one) == len(one.layers[0])
        assert lazy.statistics()["bytes"] == len(one.layers[0])


async def test_a_layer_whose_tar_is_all_here_is_proven_without_another_request(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        _, layer = await opened(run, image)
        lazy, catalog = run.superpeer.lazy, run.superpeer.catalog
        await lazy.bring(image.reference, layer, range(4), Urgency.DEMAND)
        assert not await lazy.prove(image.reference, layer)
        assert catalog.proven_layer(layer.layer_digest) is None
        await lazy.bring(image.reference, layer, all_of(layer), Urgency.DEMAND)
        before = asked(registry, layer)
        assert await lazy.prove(image.reference, layer)
        assert catalog.proven_layer(layer.layer_digest) == layer
        assert run.superpeer.store.has(layer.diff_id)
        assert asked(registry, layer) == before


async def test_proving_a_layer_whose_index_tells_something_else_is_a_lie(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path, change_index=lambda index: msgspec.structs.replace(
        index, entries=(msgspec.structs.replace(index.entries[0], mode=0o4755), *index.entries[1:])
    ))  # fmt: skip
    async with superpeer(tmp_path, registry) as run:
        _, layer = await opened(run, image)
        open_layer = await run.superpeer.lazy._open(image.reference, layer)
        await open_layer.bring(all_of(layer), Urgency.DEMAND)
        with pytest.raises(Lie, match="something else"):
            await run.superpeer.lazy.prove(image.reference, layer)


async def test_a_tar_that_did_not_come_by_ranges_does_not_cost_a_second_copy(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ranged, "_REMAINDER", 64 << 10)
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        _, layer = await opened(run, image)
        lazy = run.superpeer.lazy
        await lazy.bring(image.reference, layer, range(1), Urgency.DEMAND)
        before = asked(registry, layer)
        await run.superpeer._bring_whole(image.reference, layer)
        lazy._wake.set()
        await complete(run, 1)
        assert asked(registry, layer) == before + 1


# ---- demand and the rest


async def test_a_demand_for_what_is_being_brought_for_nobody_does_not_wait_for_all_of_it(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("superpeer.ranges._LARGEST_REQUEST", 64 << 10)
    monkeypatch.setattr("superpeer.ranges._PATIENT_REQUEST", 64 << 10)
    image = await indexed.add(registry, "team/app", [tar_of(a=noise(4 << 20))], tmp_path)
    async with superpeer(tmp_path, registry, parallel_ranges=1) as run:
        _, layer = await opened(run, image)
        gate, order = asyncio.Event(), []
        registry.script("/blobs/" + layer.layer_digest, Fault(gate=gate))

        async def bring(name: str, chunks: range, urgency: Urgency) -> None:
            await run.superpeer.bring(layer.blob, chunks, urgency)
            order.append(name)

        rest = asyncio.create_task(bring("rest", range(64), Urgency.BACKFILL))
        await until(lambda: asked(registry, layer) == 1)
        first = asyncio.create_task(bring("first", range(30, 31), Urgency.DEMAND))
        await until(lambda: run.superpeer.lazy.waiting() == 2)
        later = [asyncio.create_task(bring("later", range(at, at + 1), Urgency.DEMAND)) for at in (100, 150, 200)]
        await until(lambda: run.superpeer.lazy.waiting() == 5)
        gate.set()
        await asyncio.gather(rest, first, *later)
        assert order == ["first", "later", "later", "later", "rest"]


@pytest.mark.parametrize("patience", [0.1, 60.0])
async def test_a_demand_that_hangs_does_not_stop_the_rest_of_other_layers(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    monkeypatch.setattr(lazy_layers, "_PATIENCE", patience)
    one = await indexed.add(registry, "team/a", tars[:1], tmp_path)
    two = await indexed.add(registry, "team/b", [tar_of(b=noise(500_000))], tmp_path)
    async with superpeer(tmp_path, registry, rest_after=0.05) as run:
        a, b = (await opened(run, one))[1], (await opened(run, two))[1]
        gate = asyncio.Event()
        if patience == 60.0:  # the rest of `a` has begun when the demand hangs
            await run.superpeer.bring(a.blob, range(1))
        registry.script("/blobs/" + b.layer_digest, Fault(gate=gate))
        hangs = asyncio.create_task(run.superpeer.bring(b.blob, range(1)))
        await until(lambda: asked(registry, b) >= 1)
        if patience == 0.1:  # the layer that hangs is the first one
            await run.superpeer.bring(a.blob, range(1))
        await complete(run, 1)
        assert run.superpeer.store.has(a.diff_id)
        assert not hangs.done()
        gate.set()
        await hangs
        await complete(run, 2)


async def test_what_is_all_here_is_completed_while_others_ask_and_ask(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:  # it is never quiet
        _, layer = await opened(run, image)
        await run.superpeer.bring(layer.blob, all_of(layer))
        await complete(run, 1)
        assert run.superpeer.store.has(layer.layer_digest)


async def test_a_closed_layer_does_not_start_again(tmp_path: Path, registry: FakeRegistry, tars: list[bytes]) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        _, layer = await opened(run, image)
        open_layer = await run.superpeer.lazy._open(image.reference, layer)
        await run.superpeer.lazy.drop(layer)
        with pytest.raises(Unavailable, match="broken off"):
            await open_layer.bring(range(40, 41), Urgency.DEMAND)
        assert asked(registry, layer) == 0


# ---- the rest, when it cannot be had


@pytest.mark.parametrize("part", [8, 4])
async def test_a_store_that_is_too_small_is_not_filled_over_and_over(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], part: int
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    limit = len(tars[0]) // part
    indexing = IndexingConfig(chunk_size=CHUNK, rest_after=0.0)
    async with running(tmp_path / "superpeer", registry.host, indexing=indexing, limit=limit) as run:
        _, layer = await opened(run, image)
        with contextlib.suppress(StoreFull):  # in the smaller one not even what was asked for finds room
            await run.superpeer.bring(layer.blob, range(1))
        before = asked(registry, layer)
        await turns(run)
        assert asked(registry, layer) == before
        assert run.superpeer.lazy.statistics()["open"] == 1


async def test_a_store_that_is_full_puts_the_rest_off_for_longer_each_time(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    pauses: list[float] = []
    really = lazy_layers.LazyLayers._put_off

    def put_off(self: Any, rest: Any, why: str) -> None:
        pauses.append(rest.pause)
        really(self, rest, why)

    async def bring(*_: object) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(lazy_layers.LazyLayers, "_put_off", put_off)
    async with superpeer(tmp_path, registry, rest_after=0.0) as run:
        _, layer = await opened(run, image)
        monkeypatch.setattr(RangedLayer, "bring", bring)
        with pytest.raises(StoreFull):
            await run.superpeer.bring(layer.blob, range(1))
        await until(lambda: len(pauses) >= 3)
        assert pauses[:3] == [0.01, 0.02, 0.04]
        monkeypatch.undo()
        await complete(run, 1)


async def test_a_store_that_keeps_nothing_does_not_make_the_rest_go_round(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lazy_layers, "_PAUSE", 60.0)
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    calls = 0

    async def bring(*_: object) -> None:
        nonlocal calls
        calls += 1

    async with superpeer(tmp_path, registry, rest_after=0.0) as run:
        _, layer = await opened(run, image)
        monkeypatch.setattr(RangedLayer, "bring", bring)
        await run.superpeer.bring(layer.blob, range(1))
        await turns(run)
        assert calls == 2
        assert "rest of a layer put off" in kinds(run)


async def test_a_layer_that_was_evicted_is_not_fetched_as_a_whole_again_for_one_demand(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry, rest_after=0.0) as run:
        _, layer = await opened(run, image)
        await run.superpeer.bring(layer.blob, range(1))
        await complete(run, 1)
        for digest in (layer.diff_id, layer.layer_digest):
            assert await run.superpeer.store.remove(digest)
        before = asked(registry, layer)
        await run.superpeer.bring(layer.blob, range(40, 41))
        await turns(run)
        assert asked(registry, layer) == before + 1
        await run.superpeer.bring(layer.blob, all_of(layer))  # but whole it may become
        await complete(run, 2)


async def test_a_registry_without_ranges_is_not_asked_for_the_rest_and_not_for_ranges_again(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", [tars[0], tar_of(x=noise(300_000))], tmp_path)
    for data in image.layers:
        registry.script("/blobs/" + indexed.digests.of(data), *[Fault(ignore_range=True)] * 50)
    async with superpeer(tmp_path, registry, rest_after=0.0) as run:
        index, layer = await opened(run, image)
        assert await whole(run, index) == image.tars
        await turns(run)
        assert asked(registry, layer) <= 3  # a range, the whole, and a range of the rest that came in between
        assert asked(registry, index.layers[1]) == 1
        assert run.superpeer.lazy.statistics()["open"] == 0


async def test_the_rest_of_a_layer_whose_image_was_forgotten_is_given_up(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry, rest_after=0.3) as run:
        _, layer = await opened(run, image)
        await run.superpeer.bring(layer.blob, range(1))
        await run.superpeer.catalog.forget(run.superpeer.catalog.records()[0])
        assert await run.superpeer.store.remove(layer.index_digest)
        await until(lambda: not run.superpeer.lazy.statistics()["open"])
        assert "rest of a layer given up" in kinds(run)


async def test_the_rest_of_a_layer_that_the_registry_has_no_more_is_given_up(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry, rest_after=0.3) as run:
        _, layer = await opened(run, image)
        await run.superpeer.bring(layer.blob, range(1))
        registry.script("/blobs/" + layer.layer_digest, *[status(404)] * 50)
        await until(lambda: not run.superpeer.lazy.statistics()["open"])
        assert "rest of a layer given up" in kinds(run)


@pytest.mark.parametrize("where", ["ahead", "_on_lie"])
async def test_an_error_that_nobody_foresaw_does_not_end_the_rest(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry, rest_after=0.0) as run:
        _, layer = await opened(run, image)
        failed = asyncio.Event()

        async def fails(*_: object) -> None:
            failed.set()
            raise OSError("disk")

        with monkeypatch.context() as patch:
            if where == "ahead":
                patch.setattr(RangedLayer, "ahead", fails)
            else:
                patch.setattr(RangedLayer, "complete", raising(Lie("so it seemed")))
                patch.setattr(run.superpeer.lazy, "_on_lie", fails)
            await run.superpeer.bring(layer.blob, range(1))
            async with asyncio.timeout(20):
                await failed.wait()
        await complete(run, 1)


def raising(error: Exception) -> Callable[..., Awaitable[None]]:
    async def fails(*_: object) -> None:
        raise error

    return fails


# ---- our own disk


def spoil(run: Running, digest: str) -> None:
    """Make zeros of what is here of a blob: a disk that lost what was written."""
    store = run.superpeer.store
    blob = store.find(digest)
    assert blob is not None
    store.data_path(blob).write_bytes(bytes(store.data_path(blob).stat().st_size))


async def test_compressed_bytes_that_our_disk_spoilt_condemn_no_index(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry, rest_after=0.3) as run:
        index, layer = await opened(run, image)
        await run.superpeer.bring(layer.blob, range(40, 41))
        spoil(run, layer.layer_digest)
        assert await whole(run, index) == tars
        await complete(run, 1)
        assert "our own disk spoilt bytes, fetched again" in kinds(run)
        assert "lying index thrown away" not in kinds(run)
        store = run.superpeer.store
        assert store.has(layer.diff_id)
        assert not store.has(layer.layer_digest)
        assert await store.get(layer.diff_id) == tars[0]


async def test_a_tar_that_our_disk_spoilt_is_brought_again_and_condemns_no_index(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry, rest_after=0.3) as run:
        _, layer = await opened(run, image)
        await run.superpeer.bring(layer.blob, range(40))
        spoil(run, layer.diff_id)
        await complete(run, 1)
        assert "lying index thrown away" not in kinds(run)
        store = run.superpeer.store
        assert await store.get(layer.diff_id) == tars[0]
        assert await store.get(layer.layer_digest) == image.layers[0]
        assert fetched(registry, image) == len(image.layers[0])


async def test_a_whole_tar_that_our_disk_spoilt_is_no_proof_and_no_lie(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        index, layer = await opened(run, image)
        await run.superpeer.bring(layer.blob, all_of(layer))
        await complete(run, 1)
        spoil(run, layer.diff_id)
        assert not await run.superpeer.lazy.prove(image.reference, layer)
        assert await whole(run, index) == tars


@pytest.mark.parametrize("which", ["seek_digest", "index_digest"])
async def test_an_index_that_our_disk_spoilt_is_no_lie(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], which: str
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        _, layer = await opened(run, image)
        if which == "index_digest":
            open_layer = await run.superpeer.lazy._open(image.reference, layer)
            await open_layer.bring(all_of(layer), Urgency.DEMAND)
        spoil(run, getattr(layer, which))
        if which == "index_digest":
            assert not await run.superpeer.lazy.prove(image.reference, layer)
        else:
            with pytest.raises(Unavailable, match="spoilt the index"):
                await run.superpeer.bring(layer.blob, range(1))
        assert "lying index thrown away" not in kinds(run)
