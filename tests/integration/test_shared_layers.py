"""Layers that several repositories have, or say that they have: whose readers are given them."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from dadi.errors import AccessDenied, DadiError, NotFound, TokenRefused
from dadi.fallbacks import Fallbacks
from dadi.oci.reference import Reference
from dadi.peers import token as tokens
from superpeer.shown_layers import Layer, Proof, ShownLayers
from tests.fakes import indexed
from tests.fakes.registry import FakeRegistry, status
from tests.lab.access import GOOD, PRIVATE, Node, client_of, held, image, own_credentials, private_registry
from tests.lab.services import PLATFORM, running, tar_of


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with private_registry() as fake:
        yield fake


@pytest.fixture
async def public() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [PRIVATE])
        yield fake


@pytest.fixture
def own(tmp_path: Path, registry: FakeRegistry) -> Path:
    return own_credentials(tmp_path / "config.json", registry)


async def test_whoever_knows_the_digests_of_a_private_layer_is_not_given_it(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    private = tar_of(a=b"a" * 50_000)
    async with (
        FakeRegistry() as hostile,
        running(tmp_path, registry.host, hostile.host, docker_config=own, credentials=node.credential) as run,
    ):
        index = await run.index(f"{registry.host}/team/app:1")
        hostile.add_image("evil/app", "1", [private])
        digest = index.layers[0].layer_digest
        assert digest in hostile.blobs
        for data in (None, b"x" * len(private)):
            if data is None:
                del hostile.blobs[digest]  # it knows the digests, and has not got the bytes
            else:
                hostile.blobs[digest] = data
            async with client_of(run, None) as stranger:
                with pytest.raises(AccessDenied, match="does not show that it has layer"):
                    await image(stranger, f"{hostile.host}/evil/app:1")
                with pytest.raises(TokenRefused):
                    await stranger.source.read(index.layers[0].blob, range(1))


async def test_another_registry_that_has_the_layer_shows_it_once(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    private = tar_of(a=b"a" * 50_000)
    async with (
        FakeRegistry() as copy,
        running(tmp_path, registry.host, copy.host, docker_config=own, credentials=node.credential) as run,
    ):
        index = await run.index(f"{registry.host}/team/app:1")
        copy.add_image("team/copy", "1", [private])
        for _ in range(3):
            async with client_of(run, None) as client:
                await image(client, f"{copy.host}/team/copy:1")
                await client.source.read(index.layers[0].blob, range(1))
        assert len(copy.asked(f"/blobs/{index.layers[0].layer_digest}", "GET")) == 1


async def test_another_repository_of_the_same_registry_is_asked_and_no_byte_is_fetched(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential) as run:
        index = await run.index(f"{registry.host}/team/app:1")
        registry.add_image("team/derived", "1", [tar_of(a=b"a" * 50_000), tar_of(z=b"z")])
        digest = index.layers[0].layer_digest
        before = len(registry.asked(f"/blobs/{digest}", "GET"))
        registry.script(f"/blobs/{digest}", status(404), method="HEAD")
        with pytest.raises(AccessDenied, match="does not show"):
            await run.image(f"{registry.host}/team/derived:1")
        await run.image(f"{registry.host}/team/derived:1")
        assert len(registry.asked(f"/blobs/{digest}", "GET")) == before


async def test_a_layer_that_anybody_may_read_need_not_be_shown(
    tmp_path: Path, registry: FakeRegistry, public: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    hosts = (registry.host, public.host)
    async with running(tmp_path, *hosts, docker_config=own, credentials=node.credential) as run:
        index = await run.index(f"{public.host}/team/app:1")
        await run.image(f"{registry.host}/team/app:1")
        assert registry.asked(f"/blobs/{index.layers[0].layer_digest}") == []


async def test_a_refused_image_leaves_nothing_that_a_restart_could_take_for_a_right(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node, private = Node(GOOD), f"{registry.host}/team/app:1"
    async with FakeRegistry() as hostile:
        evil = f"{hostile.host}/evil/app:{_first_of(hostile.host, private)}"
        hosts = (registry.host, hostile.host)
        async with running(tmp_path / "s", *hosts, docker_config=own, credentials=node.credential) as run:
            index = await run.index(private)
            hostile.add_image("evil/app", evil.rpartition(":")[2], [PRIVATE])
            del hostile.blobs[index.layers[0].layer_digest]
            async with client_of(run, None) as stranger:
                with pytest.raises(AccessDenied, match="does not show"):
                    await image(stranger, evil)
            assert {record.reference for record in run.superpeer.catalog.records()} == {private}
        async with running(tmp_path / "s", *hosts, docker_config=own) as run, client_of(run, None) as stranger:
            with pytest.raises(AccessDenied, match="does not show"):
                await image(stranger, evil)


def _first_of(host: str, other: str) -> str:
    """Return a tag whose record is read before that of another image at the next start."""
    limit = hashlib.sha256(f"{other}|{PLATFORM}".encode()).hexdigest()

    def place(tag: str) -> str:
        return hashlib.sha256(f"{host}/evil/app:{tag}|{PLATFORM}".encode()).hexdigest()

    return next(tag for tag in (f"t{n}" for n in range(10_000)) if place(tag) < limit)


async def test_a_layer_stays_private_when_its_own_image_is_forgotten(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    options = {"docker_config": own, "credentials": node.credential, "most_images": 3}
    async with (
        FakeRegistry() as hostile,
        running(tmp_path / "s", registry.host, hostile.host, **options) as run,
        client_of(run, None) as stranger,
    ):
        index = await run.index(f"{registry.host}/team/app:1")
        hostile.add_image("evil/app", "1", [PRIVATE])
        del hostile.blobs[index.layers[0].layer_digest]
        for number in range(4):
            hostile.add_image("evil/filler", f"{number}", [tar_of(n=b"%d" % number)])
            await image(stranger, f"{hostile.host}/evil/filler:{number}")
        assert run.superpeer.catalog.layer_by_diff_id(index.layers[0].diff_id) is None, "forgotten"
        with pytest.raises(DadiError):
            await image(stranger, f"{hostile.host}/evil/app:1")
        with pytest.raises(TokenRefused):
            await stranger.source.read(index.layers[0].blob, range(1))


async def test_an_index_beside_an_image_gives_no_layer_that_its_repository_never_had(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    async with FakeRegistry() as hostile:
        made = await indexed.add(hostile, "evil/app", [PRIVATE], tmp_path)
        del hostile.blobs["sha256:" + hashlib.sha256(made.layers[0]).hexdigest()]
        async with (
            running(tmp_path / "s", registry.host, hostile.host, docker_config=own, credentials=node.credential) as run,
            client_of(run, None) as stranger,
        ):
            await image(stranger, made.reference)  # nobody is known to have the layer yet
            before = held(stranger)
            assert tokens.parse(before.tokens[0]).opens(made.diff_ids[0])
            index = await run.index(f"{registry.host}/team/app:1")
            assert index.layers[0].diff_id == made.diff_ids[0]
            headers = {"Authorization": f"Bearer {before.tokens[0]}"}
            with pytest.raises(TokenRefused, match="revoked"):
                await run.who_may.gate.admit(headers, made.diff_ids[0])
            assert tokens.parse(before.tokens[0]).id in run.who_may.public().revoked, "peers hear of it"
            with pytest.raises(DadiError):
                await stranger.access.renew(before)
            with pytest.raises(DadiError):
                await stranger.source.read(index.layers[0].blob, range(1))
            await run.client.source.read(index.layers[0].blob, range(index.layers[0].table.count))


async def test_a_manifest_of_another_repository_is_not_given_by_its_digest(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    async with running(tmp_path, registry.host, docker_config=own, credentials=Node(GOOD).credential) as run:
        await run.index(f"{registry.host}/team/app:1")
        given = held(run.client)
        # The check of the caller is passed: the registry is made to say yes to anything about the other repository.
        digest = given.reference.partition("@")[2]
        registry.script("/team/other/manifests/", status(200, {"Docker-Content-Digest": digest}), method="HEAD")
        bare = type(given)(f"{registry.host}/team/other@{digest}", PLATFORM, ())
        with pytest.raises(NotFound):
            await run.client.access.renew(bare)


async def test_what_failed_to_be_shown_is_not_fetched_again_at_once(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    async with (
        FakeRegistry() as hostile,
        running(tmp_path, registry.host, hostile.host, docker_config=own, credentials=Node(GOOD).credential) as run,
        client_of(run, None) as stranger,
    ):
        index = await run.index(f"{registry.host}/team/app:1")
        digest = index.layers[0].layer_digest
        hostile.add_image("evil/app", "1", [PRIVATE])
        hostile.blobs[digest] = b"x" * len(PRIVATE)
        for _ in range(3):
            with pytest.raises(AccessDenied):
                await image(stranger, f"{hostile.host}/evil/app:1")
        assert len(hostile.asked(f"/blobs/{digest}", "GET")) == 1


async def test_what_was_shown_is_known_after_a_restart_and_many_layers_of_one_push_out_his_own(tmp_path: Path) -> None:
    shown = ShownLayers(tmp_path / "shown.json", Fallbacks(), most=5)
    shown.add(Reference.parse("good.example/team/app:1"), "sha256:" + "1" * 64, "sha256:" + "2" * 64, Proof.HASHED)
    for number in range(20):
        digest = "sha256:" + f"{number + 100:032x}" * 2
        shown.add(Reference.parse("evil.example/evil/app:1"), digest, digest, Proof.HASHED)
    await shown.close()
    again = ShownLayers(tmp_path / "shown.json", Fallbacks(), most=5)
    await again.load()
    good = Layer("good.example/team/app", "sha256:" + "1" * 64, "sha256:" + "2" * 64)
    assert again.proof(good) is Proof.HASHED
    assert again.hashed(good.diff_id) == [good]
    assert again.hashed("sha256:" + f"{119:032x}" * 2)
    assert not again.hashed("sha256:" + f"{100:032x}" * 2)


async def test_siblings_are_told_what_a_repository_has_shown_and_not_what_it_says(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    async with FakeRegistry() as other:
        made = await indexed.add(other, "lazy/app", [tar_of(z=b"z" * 9_000)], tmp_path)
        options = {"docker_config": own, "credentials": Node(GOOD).credential}
        async with (
            running(tmp_path / "s", registry.host, other.host, **options) as run,
            aiohttp.ClientSession() as session,
        ):
            index = await run.index(f"{registry.host}/team/app:1")
            await image(run.client, made.reference)
            for digest, shown in [(index.layers[1].diff_id, [0, 1]), (made.diff_ids[0], [])]:
                url = f"{run.url}/v1/blobs/{digest}/origin"
                async with session.get(url, headers=run.who_may.sibling_headers(digest)) as response:
                    assert (await response.json())["shown"] == shown
