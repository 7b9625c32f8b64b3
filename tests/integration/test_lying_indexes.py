"""Indexes that lie: no wrong byte is read, the index is thrown away, reported, and replaced by one of our own."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from dadi.errors import DigestMismatch
from dadi.index import layer as layer_index
from dadi.index.image import FIRST_SIGHT, REFERRER
from dadi.index.layer import Kind, LayerIndex
from dadi.index.seek import SeekTable
from tests.fakes import indexed
from tests.fakes.indexed import CHUNK, flipped, with_digest_changed
from tests.fakes.registry import FakeRegistry, Fault
from tests.integration.test_lazy_layers import complete, kinds, registry, superpeer, tars, whole
from tests.lab.services import Running

__all__ = ["registry", "tars"]
LIE, DOUBT = "lying index thrown away", "index doubted, not used for a while"
"""What is told where it was proved to lie; and where only its ranges come wrong, maybe on their way."""


def other_window(table: SeekTable) -> SeekTable:
    """A seek point whose history is that of another one."""
    points = list(table.points)
    raw = [place for place, point in enumerate(points) if point.window]
    a, b = raw[0], raw[-1]
    assert points[a].window != points[b].window
    points[a] = msgspec.structs.replace(points[a], window=points[b].window)
    return msgspec.structs.replace(table, points=tuple(points))


def other_offset(table: SeekTable) -> SeekTable:
    """A seek point that says its bytes stand a little later."""
    points = list(table.points)
    if len(points) > 2:
        points[2] = msgspec.structs.replace(points[2], offset=points[2].offset + 512)
    return msgspec.structs.replace(table, points=tuple(points))


def other_position(table: SeekTable) -> SeekTable:
    points = list(table.points)
    if len(points) > 2:
        points[2] = msgspec.structs.replace(points[2], position=points[2].position + 8)
    return msgspec.structs.replace(table, points=tuple(points))


def other_compressed_digest(table: SeekTable) -> SeekTable:
    wrong = msgspec.structs.replace(table.compressed, digests=flipped(table.compressed.digests, 5))
    return msgspec.structs.replace(table, compressed=wrong)


def only_large(change: Callable[[SeekTable], SeekTable]) -> Callable[[SeekTable], SeekTable]:
    return lambda table: change(table) if table.size > 1 << 20 else table


@pytest.mark.parametrize("change", [other_window, other_offset, other_position, other_compressed_digest])
async def test_lying_seek_points_cost_a_first_sight_and_no_reader_notices(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], change: Callable[[SeekTable], SeekTable]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path, change_table=only_large(change))
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        assert index.origin == REFERRER
        assert await whole(run, index) == tars
        assert (DOUBT if change is other_compressed_digest else LIE) in kinds(run)
        await is_replaced(run, image.reference, tars)


async def test_a_lying_chunk_table_gives_an_error_and_never_other_bytes(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    def change(index: LayerIndex) -> LayerIndex:
        return with_digest_changed(index, 7) if index.table.count > 10 else index

    image = await indexed.add(registry, "team/app", tars, tmp_path, change_index=change)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        layer = index.layers[0]
        with pytest.raises(DigestMismatch):  # a node has the lying table too: it can only refuse
            await run.client.source.read(layer.blob, range(7, 8))
        assert LIE in kinds(run)
        (data,) = await run.client.source.read(layer.blob, range(50, 51))
        assert data == tars[0][50 * CHUNK : 51 * CHUNK]
        await is_replaced(run, image.reference, tars)
    # It is remembered, and not believed again.
    async with superpeer(tmp_path, registry) as run:
        await is_replaced(run, image.reference, tars)


async def test_bytes_that_are_spoilt_on_their_way_have_an_honest_index_refused_for_a_while_and_not_for_good(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    now = 0.0
    async with superpeer(tmp_path, registry) as run:
        run.superpeer._refused._clock = lambda: now
        for lasts in (600.0, 1200.0):
            index = await run.index(image.reference)
            assert index.origin == REFERRER
            registry.script("/blobs/" + index.layers[0].layer_digest, Fault(flip=3), Fault(flip=3), method="GET")
            assert await whole(run, index) == tars
            assert DOUBT in kinds(run)
            await is_replaced(run, image.reference, tars)
            now += lasts - 1
            await forget(run)
            assert (await run.index(image.reference)).origin == FIRST_SIGHT
            now += 2
            await forget(run)
        assert (await run.index(image.reference)).origin == REFERRER
    assert not (tmp_path / "superpeer" / "refused-indexes.json").exists()


async def test_an_index_that_tells_something_else_of_a_file_is_found_out_when_the_layer_is_complete(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    def setuid(index: LayerIndex) -> LayerIndex:
        first, *rest = index.entries
        return msgspec.structs.replace(index, entries=(msgspec.structs.replace(first, mode=0o4755), *rest))

    image = await indexed.add(registry, "team/app", tars, tmp_path, change_index=setuid)
    async with superpeer(tmp_path, registry, rest_after=0.0) as run:
        index = await run.index(image.reference)
        await run.client.source.read(index.layers[0].blob, range(1))
        async with asyncio.timeout(20):
            while LIE not in kinds(run):
                await asyncio.sleep(0.01)
        replaced = await is_replaced(run, image.reference, tars)
        layer = replaced.layers[0]
        entries = layer_index.decode(await run.client.whole(layer.index_digest, layer.index_size)).entries
        assert {entry.mode for entry in entries if entry.kind is Kind.FILE} == {0o644}


async def test_what_lies_of_one_image_is_not_used_for_another_with_the_same_layer(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    """Whoever may push to one repository must not speak for the layers of another."""

    def setuid(index: LayerIndex) -> LayerIndex:
        first, *rest = index.entries
        return msgspec.structs.replace(index, entries=(msgspec.structs.replace(first, mode=0o4755), *rest))

    evil = await indexed.add(registry, "evil/app", tars, tmp_path, change_index=setuid)
    good = await indexed.add(registry, "team/app", [*tars, b""], tmp_path, change_manifest=lambda document: {
        **document, "artifactType": "application/vnd.dadi.index.v9",
    })  # fmt: skip
    async with superpeer(tmp_path, registry) as run:
        assert (await run.index(evil.reference)).origin == REFERRER
        index = await run.index(good.reference)
        assert index.origin == FIRST_SIGHT
        layer = index.layers[0]
        entries = layer_index.decode(await run.client.whole(layer.index_digest, layer.index_size)).entries
        assert {entry.mode for entry in entries} == {0o644}


async def test_a_proven_index_is_used_for_another_image_without_reading_the_layer(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    first = await indexed.add(registry, "team/a", tars[:1], tmp_path)
    async with superpeer(tmp_path, registry, rest_after=0.0) as run:
        index = await run.index(first.reference)
        await run.client.source.read(index.layers[0].blob, range(1))
        await complete(run, 1)
        second = await indexed.add(registry, "team/b", tars, tmp_path, change_manifest=lambda document: {
            **document, "artifactType": "application/vnd.dadi.index.v9",
        })  # fmt: skip
        def read() -> int:
            asked = registry.asked("/blobs/" + index.layers[0].layer_digest)
            return sum(seen.method == "GET" for seen in asked)  # HEAD asks whether team/b has the layer too

        before = read()
        assert (await run.index(second.reference)).origin == FIRST_SIGHT
        assert read() == before


async def forget(run: Running) -> None:
    """Have all images looked for anew, and their layers brought anew."""
    catalog, store = run.superpeer.catalog, run.superpeer.store
    async with asyncio.timeout(20):
        while run.superpeer.originals.intake.busy:  # a layer that was indexed here is about to be kept as it is, too
            await asyncio.sleep(0.01)
    for record in catalog.records():
        layers = catalog.image(record).layers
        await catalog.forget(record)
        for layer in layers:
            for digest in (layer.diff_id, layer.layer_digest):
                if store.find(digest) is not None:
                    assert await store.remove(digest)


async def is_replaced(run: Running, reference: str, tars: list[bytes]):
    """Whoever asks now gets an index made on first sight, and the right bytes."""
    async with asyncio.timeout(20):
        while (index := await run.index(reference)).origin != FIRST_SIGHT:
            await asyncio.sleep(0.01)
    assert await whole(run, index) == tars
    return index
