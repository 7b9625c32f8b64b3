"""Junk beside an image: whoever may push to a repository must not be able to hide the index that is valid."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zstandard
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi import digest as digests
from dadi.errors import TooLarge
from dadi.index import artifact as artifacts
from dadi.index import signature
from dadi.index.image import FIRST_SIGHT, REFERRER
from dadi.index.layer import DecodeRoom
from dadi.index.tar import TarLimits
from dadi.oci import media_types, platforms
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.publish.index import PRESENT
from superpeer import referrers
from tests.fakes import indexed
from tests.fakes.indexed import Indexed
from tests.fakes.registry import FakeRegistry, status
from tests.integration.test_lazy_layers import key_file, kinds, superpeer
from tests.integration.test_publish import Said, client_for, run
from tests.lab.layers import directory, file
from tests.lab.layers import tar_of as tar_with
from tests.lab.services import PLATFORM, tar_of

JUNK_KINDS = ["no layer", "no blob", "a blob that is too large", "of another", "an index"]
TARS = [tar_of(a=b"a" * 300_000), tar_of(b=b"b" * 10)]


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_blob(artifacts.EMPTY)
        yield fake


def junk(kind: str, number: int, artifact_type: str, subject: Descriptor) -> dict[str, Any]:
    """Return the manifest of something that says that it is an index or a signature of `subject`."""
    if kind == "an index":
        index = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": []}
        return {**index, "annotations": {"n": str(number)}}
    size = {"a blob that is too large": 1 << 30}.get(kind, 64)
    blob = {"mediaType": artifact_type, "digest": "sha256:" + "7" * 64, "size": size}
    about = {"mediaType": subject.media_type, "digest": subject.digest, "size": subject.size}
    return {
        "schemaVersion": 2, "mediaType": media_types.OCI_MANIFEST, "artifactType": artifact_type,
        "config": {"mediaType": media_types.OCI_EMPTY, "digest": digests.of(b"{}"), "size": 2},
        "layers": [] if kind == "no layer" else [blob],
        "subject": {**about, "digest": "sha256:" + "8" * 64} if kind == "of another" else about,
        "annotations": {"n": str(number)},
    }  # fmt: skip


def listed(registry: FakeRegistry, repository: str, subject: str) -> list[dict[str, Any]]:
    _, raw = registry.manifests[repository, subject.replace(":", "-")]
    entries: list[dict[str, Any]] = json.loads(raw)["manifests"]
    return entries


def list_all(registry: FakeRegistry, repository: str, subject: str, entries: list[dict[str, Any]]) -> None:
    index = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": entries}
    registry.add_manifest(repository, subject.replace(":", "-"), index, media_types.OCI_INDEX)


def add_junk(registry: FakeRegistry, repository: str, subject: Descriptor, artifact_type: str, *,
             before: int, behind: int) -> list[str]:  # fmt: skip
    """Put junk before and behind what is listed as referring to `subject`; return the digests."""
    made = []
    for number in range(before + behind):
        document = junk(JUNK_KINDS[number % len(JUNK_KINDS)], number, artifact_type, subject)
        digest, size = registry.add_manifest(repository, None, document, document["mediaType"])
        made.append({"mediaType": document["mediaType"], "digest": digest, "size": size, "artifactType": artifact_type})
    entries = [*made[:before], *listed(registry, repository, subject.digest), *made[before:]]
    list_all(registry, repository, subject.digest, entries)
    return [entry["digest"] for entry in made]


def artifact_of(image: Indexed) -> Descriptor:
    return Descriptor(media_types.OCI_MANIFEST, image.artifact, 1)


@pytest.mark.parametrize("count", [1, 40])
async def test_junk_signatures_do_not_hide_the_valid_one(tmp_path: Path, registry: FakeRegistry, count: int) -> None:
    ours = Ed25519PrivateKey.generate()
    image = await indexed.add(registry, "team/app", TARS, tmp_path, sign=ours)
    kind = artifacts.SIGNATURE_TYPE
    add_junk(registry, "team/app", artifact_of(image), kind, before=count, behind=5 * count)
    async with superpeer(tmp_path, registry, trusted_keys=(key_file(tmp_path, ours),)) as run:
        index = await run.index(image.reference)
        assert (index.origin, index.signer) == (REFERRER, signature.key_id(ours.public_key()))
        assert kinds(run) == set()


async def test_a_signature_that_cannot_be_read_now_is_not_taken_for_none(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    ours = Ed25519PrivateKey.generate()
    image = await indexed.add(registry, "team/app", TARS, tmp_path, sign=ours)
    (entry,) = listed(registry, "team/app", image.artifact)
    registry.script(f"/manifests/{entry['digest']}", *[status(500)] * 20)
    async with superpeer(tmp_path, registry, trusted_keys=(key_file(tmp_path, ours),)) as run:
        assert (await run.index(image.reference)).origin == FIRST_SIGHT
        (row,) = run.superpeer.statistics()["fallbacks"]
        assert "500" in row["why"]


async def test_a_second_dadi_index_finds_its_signature_among_junk(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add_image("team/app", "1", TARS)
    client, key, said = client_for(registry.host), Ed25519PrivateKey.generate(), Said()
    try:
        (row,) = (await run(client, f"{registry.host}/team/app", key=key)).platforms
        digest = row.artifact_digest
        made = Descriptor(media_types.OCI_MANIFEST, digest, len(registry.manifests["team/app", digest][1]))
        add_junk(registry, "team/app", made, artifacts.SIGNATURE_TYPE, before=10, behind=10)
        again = await run(client, f"{registry.host}/team/app", key=key, progress=said)
    finally:
        await client.close()
    assert again.platforms[0].how == PRESENT
    assert any("signature" in notice for notice in said.notices)


@pytest.mark.parametrize(("before", "behind"), [(16, 0), (0, 16), (150, 150)])
async def test_junk_artifacts_do_not_hide_the_honest_one(
    tmp_path: Path, registry: FakeRegistry, before: int, behind: int
) -> None:
    image = await indexed.add(registry, "team/app", TARS, tmp_path)
    add_junk(registry, "team/app", image.manifest, artifacts.ARTIFACT_TYPE, before=before, behind=behind)
    async with superpeer(tmp_path, registry) as run:
        index = await run.index(image.reference)
        assert (index.origin, index.artifact) == (REFERRER, image.artifact)


async def test_artifacts_that_lied_and_those_of_other_versions_are_passed_over_unread(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(referrers, "_MOST", 3)
    image = await indexed.add(registry, "team/app", TARS, tmp_path)
    lied = add_junk(registry, "team/app", image.manifest, artifacts.ARTIFACT_TYPE, before=0, behind=9)
    newer = add_junk(registry, "team/app", image.manifest, "application/vnd.dadi.index.v9", before=0, behind=9)
    async with superpeer(tmp_path, registry) as run:
        for digest in lied:
            await run.superpeer._refused.add(digest, "it lied")
        assert (await run.index(image.reference)).artifact == image.artifact
    assert not [digest for digest in lied + newer if registry.asked(digest)]


async def test_the_search_for_an_index_ends(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(referrers, "_MOST", 20)
    image = await indexed.add(registry, "team/app", TARS, tmp_path)
    made = add_junk(registry, "team/app", image.manifest, artifacts.ARTIFACT_TYPE, before=0, behind=50)
    async with superpeer(tmp_path, registry) as run:
        assert (await run.index(image.reference)).origin == FIRST_SIGHT
        assert kinds(run) == {"index in the registry not used"}
    assert len([digest for digest in made if registry.asked(f"/manifests/{digest}")]) == 20


async def test_what_turned_out_to_be_useless_can_be_left_out(tmp_path: Path, registry: FakeRegistry) -> None:
    image = await indexed.add(registry, "team/app", TARS, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        reference, found = Reference.parse(image.reference), run.superpeer._referrers
        resolved = await run.superpeer.registry.image(reference, platforms.parse(PLATFORM))
        accepted = await found.find(reference, resolved)
        assert accepted is not None
        assert await found.find(reference, resolved, {accepted.digest}) is None


@pytest.mark.parametrize(("entries", "fits"), [(205, True), (204, False)])
async def test_the_indexes_of_all_layers_of_an_image_share_one_room(
    tmp_path: Path, registry: FakeRegistry, entries: int, fits: bool
) -> None:
    """Each of them fits; all together do not."""
    tars = [tar_with(*(directory(b"d%d-%d" % (layer, n)) for n in range(40)), file(b"f")) for layer in range(5)]
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    async with superpeer(tmp_path, registry) as run:
        reference, found = Reference.parse(image.reference), run.superpeer._referrers
        resolved = await run.superpeer.registry.image(reference, platforms.parse(PLATFORM))
        accepted = await found.find(reference, resolved)
        assert accepted is not None
        assert accepted.room.entries == TarLimits().max_entries, "by default what one layer may have"
        accepted = msgspec.structs.replace(accepted, room=DecodeRoom(entries, 1 << 20))
        pairs = zip(resolved.manifest.layers, resolved.diff_ids, strict=True)
        with contextlib.nullcontext() if fits else pytest.raises(TooLarge, match="entries, where"):
            await asyncio.gather(*(found.layer(reference, accepted, *pair) for pair in pairs))


async def test_large_indexes_are_brought_and_unpacked_one_at_a_time(
    tmp_path: Path, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    tars = [tar_of(**{f"f{n}": bytes([n]) * 1000}) for n in range(6)]
    image = await indexed.add(registry, "team/app", tars, tmp_path)
    monkeypatch.setattr(referrers, "_LARGE", 0)
    under_way = most = 0
    async with superpeer(tmp_path, registry) as run:
        fetch = run.superpeer.registry.blob_bytes

        async def blob_bytes(reference: Reference, descriptor: Descriptor, limit: int) -> bytes:
            nonlocal under_way, most
            if descriptor.media_type in (artifacts.LAYER_INDEX, artifacts.SEEK_TABLE):
                under_way += 1
                most = max(most, under_way)
            try:
                return await fetch(reference, descriptor, limit)
            finally:
                under_way -= descriptor.media_type in (artifacts.LAYER_INDEX, artifacts.SEEK_TABLE)

        monkeypatch.setattr(run.superpeer.registry, "blob_bytes", blob_bytes)
        assert (await run.index(image.reference)).origin == REFERRER
    assert most == 1


async def test_a_blob_that_unpacks_to_many_millions_of_entries_is_passed_over(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    image = await indexed.add(registry, "team/app", TARS, tmp_path)
    _, raw = registry.manifests["team/app", image.artifact]
    document = json.loads(raw)
    honest = artifacts.encoded_index(registry.blobs[document["layers"][0]["digest"]])
    # the one entry's array of the honest index, replaced by one of three million small entries
    entry = bytes((0x92, 0xC4, 0x01)) + b"a" + bytes((0x01,))
    head = honest[: honest.rindex(b"\x91\x9d")]
    bomb = zstandard.compress(head + b"\xdd" + (3_000_000).to_bytes(4, "big") + entry * 3_000_000)
    assert len(bomb) < 10_000
    digest = registry.add_blob(bomb)
    document["layers"][0] |= {"digest": digest, "size": len(bomb)}
    made, size = registry.add_manifest("team/app", None, document, media_types.OCI_MANIFEST)
    kind = artifacts.ARTIFACT_TYPE
    entry_of_list = {"mediaType": media_types.OCI_MANIFEST, "digest": made, "size": size, "artifactType": kind}
    list_all(registry, "team/app", image.manifest.digest, [entry_of_list])
    async with superpeer(tmp_path, registry) as run:
        assert (await run.index(image.reference)).origin == FIRST_SIGHT
        (row,) = run.superpeer.statistics()["fallbacks"]
        assert "length <= 2000000" in row["why"]
