"""A node's part among the others, when it starts: its port may be taken, its mounts may not be known yet."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from dadi import http
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.errors import ConfigError, Conflict, NotFound, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import blob_of
from dadi.node import peering as peering_file
from dadi.node.config import PeersConfig
from dadi.node.demand import Demand
from dadi.node.peering import Peering
from dadi.peers.places import Peer
from dadi.peers.pressure import Pressure
from dadi.peers.superpeer import SuperpeerClient
from superpeer.directory import Directory
from tests.contracts.store import content
from tests.fakes.registry import FakeRegistry
from tests.lab.services import Running, running

BLOB = blob_of(content(100_000), 64 << 10)


@pytest.fixture
async def superpeer(tmp_path: Path) -> AsyncIterator[Running]:
    async with FakeRegistry() as registry, running(tmp_path / "superpeer", registry.host, authorization="open") as run:
        yield run


@pytest.fixture
def taken() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener


@contextlib.asynccontextmanager
async def started(directory: Path, url: str, listen: str) -> AsyncIterator[Peering]:
    fallbacks = Fallbacks()
    client = SuperpeerClient([url], fallbacks, connect=1, read=5)
    store = DiskBlobs(directory / "store")
    config = PeersConfig(listen=listen, authorization="open")
    peering = Peering(config, client, store, fallbacks, directory, compress=True, tls=None,
                      in_use=lambda: [])  # fmt: skip
    chain = Chain(store, peering.upstream.source, patience=1, fallbacks=fallbacks)
    try:
        await peering.start(chain, Demand())
        yield peering
    finally:
        await peering.close()
        await chain.close()
        await client.close()
        await store.close()


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the slots that the superpeer hears of, as they come."""
    slots: list[int] = []
    real = Directory._heard

    def hear(directory: Directory, peer: Peer, now: float) -> Any:
        slots.append(peer.slots)
        return real(directory, peer, now)

    monkeypatch.setattr(Directory, "_heard", hear)
    return slots


async def test_a_node_whose_port_is_taken_joins_serves_nobody_and_serves_when_the_port_is_free(
    tmp_path: Path, superpeer: Running, taken: socket.socket, heard: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(peering_file, "_AGAIN", 0.05)
    port = taken.getsockname()[1]
    async with started(tmp_path / "node", superpeer.url, f"127.0.0.1:{port}") as peering:
        peering.parents.membership.expect([BLOB])
        await peering.parents.membership.placed(BLOB.digest)
        assert BLOB.digest in peering.parents.membership.places, "parents are found all the same"
        assert set(heard) == {0}
        taken.close()
        assert peering._listening is not None
        await peering._listening
        await peering.parents.membership.beat()
        assert heard[-1] == peering.parents.peer.slots > 0


async def test_who_asks_before_the_mounts_are_known_is_told_to_come_again(tmp_path: Path, superpeer: Running) -> None:
    async with started(tmp_path / "node", superpeer.url, "127.0.0.1:0") as peering, http.client() as session:
        url = f"http://{peering.parents.peer.address}/v1/blobs/{BLOB.digest}"

        async def ask() -> Any:
            async with http.request(session, "GET", url, "asking", headers={"Range": "bytes=0-65535"}):
                return None

        with pytest.raises(Unavailable, match="just started") as refused:
            await ask()
        assert refused.value.retry_after is not None
        peering.restored = True
        with pytest.raises(NotFound):
            await ask()


@pytest.mark.parametrize(("listen", "why"), [("192.0.2.1:0", "cannot listen on"), ("nobody.invalid:0", "cannot")])
async def test_an_address_that_is_not_ours_is_a_mistake_in_the_configuration(listen: str, why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        await http.serve_tcp(http.application(), listen)


async def test_a_port_that_is_taken_is_a_conflict(taken: socket.socket) -> None:
    with pytest.raises(Conflict, match="cannot listen on"):
        await http.serve_tcp(http.application(), f"127.0.0.1:{taken.getsockname()[1]}")


async def test_a_node_that_was_short_of_memory_says_that_it_is_not_any_more_though_nobody_asks_it(
    tmp_path: Path, superpeer: Running
) -> None:
    async with started(tmp_path, superpeer.url, "127.0.0.1:0") as peering:
        now, psi = [0.0], tmp_path / "psi"
        psi.mkdir()
        peering.pressure = Pressure(memory=0.2, cpu=0, root=psi, clock=lambda: now[0])
        for share, refuses in ((b"50.00", True), (b"0.00", False)):
            now[0] += 10
            (psi / "memory").write_bytes(b"some avg10=%s avg60=0 avg300=0 total=0\n" % share)
            assert (await peering._condition()).refuses is refuses
