"""Whose index is believed for what: repositories, restarts with other settings, lies found while others ask."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi.errors import DigestMismatch, Unavailable
from dadi.index import layer as layer_index
from dadi.index.image import FIRST_SIGHT, REFERRER, ImageIndex
from dadi.index.layer import LayerIndex
from tests.fakes import indexed
from tests.fakes.indexed import CHUNK, with_digest_changed
from tests.fakes.registry import FakeRegistry, Fault
from tests.integration.test_lazy_layers import key_file, kinds, registry, superpeer, tars, whole
from tests.integration.test_lying_indexes import LIE, is_replaced
from tests.lab.services import Running, tar_of

__all__ = ["registry", "tars"]
NO_LONGER = "index no longer trusted"


def setuid(index: LayerIndex) -> LayerIndex:
    first, *rest = index.entries
    return msgspec.structs.replace(index, entries=(msgspec.structs.replace(first, mode=0o4755), *rest))


def wrong_chunk(index: LayerIndex) -> LayerIndex:
    return with_digest_changed(index, 7) if index.table.count > 10 else index


async def modes(run: Running, index: ImageIndex) -> set[int]:
    layer = index.layers[0]
    entries = layer_index.decode(await run.client.whole(layer.index_digest, layer.index_size)).entries
    return {entry.mode for entry in entries}


async def test_the_same_image_in_another_repository_is_not_given_that_repositorys_index(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    good = await indexed.add(registry, "team/app", tars, tmp_path)
    evil = await indexed.add(registry, "evil/app", tars, tmp_path, change_index=setuid)
    assert good.manifest.digest == evil.manifest.digest
    async with superpeer(tmp_path, registry) as run:
        assert (await run.index(evil.reference)).artifact == evil.artifact
        index = await run.index(good.reference)
        assert index.artifact == good.artifact
        assert await modes(run, index) == {0o644}


async def test_a_shared_layer_is_served_by_the_first_table_and_who_contradicts_it_is_not_believed(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    good = await indexed.add(registry, "team/app", tars, tmp_path)
    evil = await indexed.add(registry, "evil/app", [tars[0], tar_of(x=b"x")], tmp_path, change_index=wrong_chunk)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(good.reference)
        other = await run.index(evil.reference)
        assert (index.origin, other.origin) == (REFERRER, FIRST_SIGHT)
        assert run.superpeer.find(index.layers[0].diff_id).table == index.layers[0].table
        assert await whole(run, index) == tars


@pytest.mark.parametrize("first", ["evil", "good"])
async def test_an_honest_image_starts_whoever_came_first(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes], first: str
) -> None:
    good = await indexed.add(registry, "team/app", tars, tmp_path)
    evil = await indexed.add(registry, "evil/app", [tars[0], tar_of(x=b"x")], tmp_path, change_index=wrong_chunk)
    async with superpeer(tmp_path, registry) as run:
        await run.index((evil if first == "evil" else good).reference)
        index = await run.index(good.reference)
        assert await whole(run, index) == tars


async def test_trusted_keys_count_for_what_was_known_before_too(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    ours = Ed25519PrivateKey.generate()
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    signed = await indexed.add(registry, "team/signed", [tars[0] + bytes(512)], tmp_path, sign=ours)
    key = key_file(tmp_path, ours)
    async with superpeer(tmp_path, registry) as run:
        assert (await run.index(image.reference)).origin == REFERRER
    async with superpeer(tmp_path, registry, trusted_keys=(key,)) as run:
        assert kinds(run) == {NO_LONGER}
        assert (await run.index(image.reference)).origin == FIRST_SIGHT
        assert (await run.index(signed.reference)).origin == REFERRER
    async with superpeer(tmp_path, registry, trusted_keys=(key,)) as run:
        assert kinds(run) == set()
    other = key_file(tmp_path, Ed25519PrivateKey.generate())
    async with superpeer(tmp_path, registry, trusted_keys=(other,)) as run:  # a key that was withdrawn
        assert kinds(run) == {NO_LONGER}
        assert (await run.index(signed.reference)).origin == FIRST_SIGHT


async def test_use_artifacts_false_counts_for_what_was_known_before_too(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        assert (await run.index(image.reference)).origin == REFERRER
    async with superpeer(tmp_path, registry, use_artifacts=False) as run:
        assert (await run.index(image.reference)).origin == FIRST_SIGHT


async def test_a_question_under_way_does_not_bring_a_lying_index_back(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    image = await indexed.add(registry, "team/app", tars, tmp_path, change_index=wrong_chunk)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        run.superpeer.resolver._tag_ttl = 0.0
        gate = asyncio.Event()
        before = len(registry.asked("/manifests/1"))
        registry.script("/manifests/1", Fault(gate=gate))
        asking = asyncio.create_task(run.index(image.reference))
        while len(registry.asked("/manifests/1")) == before:
            await asyncio.sleep(0.002)
        with pytest.raises(DigestMismatch):
            await run.client.source.read(index.layers[0].blob, range(7, 8))
        gate.set()
        assert (await asking).origin == FIRST_SIGHT
        await is_replaced(run, image.reference, tars)


async def test_lies_in_two_layers_found_at_once_under_several_names(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    two = [tars[0], tar_of(b=random.Random(1).randbytes(300_000))]
    image = await indexed.add(registry, "team/app", two, tmp_path, change_index=wrong_chunk)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        await run.index(f"{registry.host}/team/app@{image.manifest.digest}")
        await run.image(image.reference, "linux/amd64/v2")
        bring = [run.superpeer.bring(layer.blob, range(7, 8)) for layer in index.layers]
        results = await asyncio.gather(*bring, return_exceptions=True)
        assert [result for result in results if isinstance(result, BaseException)
                and not isinstance(result, Unavailable)] == []  # fmt: skip
        await is_replaced(run, image.reference, two)


async def test_while_an_image_is_indexed_anew_its_layers_are_away_and_not_unknown(
    tmp_path: Path, registry: FakeRegistry, tars: list[bytes]
) -> None:
    two = [tars[0], tar_of(b=random.Random(1).randbytes(300_000))]
    image = await indexed.add(
        registry, "team/app", two, tmp_path,
        change_index=lambda index: with_digest_changed(index, 7) if index.table.size == len(two[0]) else index,
    )  # fmt: skip
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        lying, honest = index.layers
        finding = asyncio.create_task(run.client.source.read(lying.blob, range(7, 8)))
        while LIE not in kinds(run):
            await asyncio.sleep(0.001)
        async with asyncio.timeout(20):
            while True:
                try:
                    (data,) = await run.client.source.read(honest.blob, range(3, 4))
                    break
                except Unavailable:  # what a node waits through
                    await asyncio.sleep(0.01)
        assert data == two[1][3 * CHUNK : 4 * CHUNK]
        with pytest.raises(DigestMismatch):
            await finding
