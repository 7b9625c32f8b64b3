"""The directory's gate: nodes join, and tell of, the blobs that they have tokens for, and of no others."""

from __future__ import annotations

import contextlib
import io
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import msgspec
import pytest

from dadi.peers.directory_client import DirectoryClient
from dadi.peers.places import Changed, Heartbeat, Join, JoinAnswer, Peer, Told
from superpeer import peers as directory
from superpeer.config import PeersConfig
from tests.fakes.registry import FakeRegistry
from tests.lab.access import GOOD, Node, client_of, image, own_credentials, private_registry
from tests.lab.services import Running, running, tar_of

ROOT = PeersConfig(root_slots=1)


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with private_registry() as fake:
        yield fake


@pytest.fixture
def own(tmp_path: Path, registry: FakeRegistry) -> Path:
    return own_credentials(tmp_path / "config.json", registry)


async def post(run: Running, verb: str, message: msgspec.Struct, headers: dict[str, str]) -> tuple[int, bytes]:
    data = io.BytesIO(msgspec.json.encode(message))
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"{run.url}/v1/peers/{verb}", data=data, headers=headers) as got,
    ):
        return got.status, await got.read()


@contextlib.asynccontextmanager
async def client(run: Running) -> AsyncIterator[DirectoryClient]:
    """The directory's client of the node that `run.client` belongs to."""
    yield DirectoryClient(run.client.superpeers, run.client.session, run.fallbacks, tokens=run.client.tokens)


async def test_who_has_no_token_for_a_blob_does_not_join_it_and_is_not_believed_to_have_it(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    options = {"docker_config": own, "credentials": Node(GOOD).credential, "peers": ROOT}
    async with (
        FakeRegistry() as public,
        running(tmp_path, registry.host, public.host, **options) as run,
        client_of(run, None) as stranger,
    ):
        public.add_image("any/app", "1", [tar_of(z=b"z")])
        blob = (await run.index(f"{registry.host}/team/app:1")).layers[0].diff_id
        await image(stranger, f"{public.host}/any/app:1")
        (other,) = (record for record in run.superpeer.catalog.records() if public.host in record.reference)
        theirs = run.superpeer.catalog.image(other).layers[0].diff_id
        evil, headers = Peer("evil", "192.0.2.6:6666", "z", "r", 1024), stranger.tokens.headers(theirs)
        assert (await post(run, "join", Join(evil, (blob,)), headers))[0] == 403
        assert (await post(run, "join", Join(evil, (blob,)), {}))[0] == 401
        beat = Heartbeat(evil, blobs=(Told(blob, 0, 1, (), 9, True), Told(theirs, 0, 1, (), 9, True)))
        assert (await post(run, "heartbeat", beat, {}))[0] == 401
        code, body = await post(run, "heartbeat", beat, headers)
        assert (code, msgspec.json.decode(body, type=Changed).unproven) == (200, (blob,))
        code, body = await post(run, "join", Join(Peer("victim", "x:7071", "z", "r", 2), (blob,)),
                                run.client.tokens.headers(blob))  # fmt: skip
        assert code == 200
        assert msgspec.json.decode(body, type=JoinAnswer).places[blob].parents == ()


async def test_after_a_restart_a_node_is_back_in_the_trees_of_all_its_images_with_one_heartbeat(
    tmp_path: Path, registry: FakeRegistry, own: Path
) -> None:
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential, peers=ROOT) as run:
        indexes = [await run.index(f"{registry.host}/team/{name}:1") for name in ("app", "other")]
        blobs = [layer.diff_id for index in indexes for layer in index.layers]
        async with client(run) as directory_client:
            me = Peer("me", "192.0.2.1:7071", "z", "r", 2)
            beat = Heartbeat(me, blobs=tuple(Told(blob, 5, 1) for blob in blobs))
            await directory_client.heartbeat(beat)
            assert set(await directory_client.trees(blobs)) == set(blobs)
            assert all(rows for rows in (await directory_client.trees(blobs)).values())


async def test_one_address_does_not_fill_the_directory(
    tmp_path: Path, registry: FakeRegistry, own: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(directory, "_MOST_AT_ONE_ADDRESS", 3)
    node = Node(GOOD)
    async with running(tmp_path, registry.host, docker_config=own, credentials=node.credential) as run:
        blob = (await run.index(f"{registry.host}/team/app:1")).layers[0].diff_id
        headers = run.client.tokens.headers(blob)
        codes = [(await post(run, "join", Join(Peer(f"n{n}", f"h:{n + 1}"), (blob,)), headers))[0] for n in range(5)]
        assert codes == [200, 200, 200, 503, 503]
        assert (await post(run, "join", Join(Peer("n1", "h:2"), (blob,)), headers))[0] == 200, "who is known stays"
