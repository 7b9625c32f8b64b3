"""`dadi verify` on a node that serves the real kernel: bytes that were spoilt on the disk reach nobody any more."""

from __future__ import annotations

import json
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dadi import http
from dadi.cli.main import cli
from dadi.errors import Conflict, Unavailable
from dadi.node import control
from dadi.node.node import Node
from dadi.peers.superpeer import image_answer
from tests.fakes.registry import FakeRegistry
from tests.lab.mounting import EAGER, LAZY, in_thread, mounted, node_of, read
from tests.lab.services import CHUNK, running, tar_of
from tests.lab.waiting import until

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]

DATA = random.Random(1).randbytes(60 * CHUNK + 77)
AT = 512
"""Where the file begins in its layer's tar."""


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [tar_of(small=b"small"), tar_of(data=DATA)])
        yield fake


async def verified(node: Node, *options: str) -> tuple[int, dict[str, Any]]:
    socket = Path(node.config.run) / "node.sock"
    runner = await http.serve_unix(control.create(node), str(socket))
    try:
        command = ["verify", "--json", "--node-socket", str(socket), *options]
        done = await in_thread(lambda: CliRunner().invoke(cli, command, catch_exceptions=False))
        (answer,) = [line for line in done.stdout.splitlines() if line.startswith("{")]  # the node logs there, too
        return done.exit_code, json.loads(answer)
    finally:
        await runner.cleanup()
        await in_thread(lambda: socket.unlink(missing_ok=True))


def spoil(node: Node, *chunks: int) -> str:
    """Change a byte in each of these chunks of the large layer, in the file on the disk; return the layer's digest."""
    device = max(node.devices.all(), key=lambda device: device.blob.size)
    with open(node.store.data_path(device.blob), "r+b", buffering=0) as file:
        for chunk in chunks:
            byte = os.pread(file.fileno(), 1, chunk * CHUNK + AT)
            os.pwrite(file.fileno(), bytes([byte[0] ^ 255]), chunk * CHUNK + AT)
        os.fsync(file.fileno())
    return device.blob.digest


async def test_a_local_device_gives_right_bytes_again_and_becomes_local_again(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        await mounted(node, f"{registry.host}/team/app:1", target)
        async for _ in node.drain.watch(0):
            pass
        await node.drain.end()
        assert await verified(node) == (0, {**(await verified(node))[1], "bad": [], "bad_blobs": 0, "bad_files": 0})

        digest = await in_thread(lambda: spoil(node, 7, 30))
        assert await read(target / "data") != DATA, "the kernel reads the file itself, without asking us"
        status, answer = await verified(node)
        (row,) = answer["bad"]
        assert (status, row["blob"], row["chunks"], row["repaired"]) == (1, digest, [7, 30], False)
        assert (row["outcome"], row["images"]) == ("read through dadi-node until it is whole again",
                                                   [f"{registry.host}/team/app:1"])  # fmt: skip
        assert node.statistics()["mounts"][0]["state"] == "lazy"
        assert await read(target / "data") == DATA, "thrown away, fetched when it was read"

        await in_thread(lambda: spoil(node, 3))
        status, answer = await verified(node, "--repair")
        assert (status, answer["bad_chunks"], answer["repaired"], answer["bad"][0]["outcome"]) == (0, 1, 1, "repaired")
        assert node.statistics()["mounts"][0]["state"] == "local"
        assert await read(target / "data") == DATA
        kinds = {row["kind"]: row["count"] for row in node.fallbacks.statistics()}
        assert kinds["wrong bytes on the disk"] == 2


async def test_with_backfill_a_damaged_local_file_heals_by_itself_once_it_was_found(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with (
        running(tmp_path / "superpeer", registry.host) as run,
        node_of(tmp_path, run.url, backfill=EAGER) as node,
    ):
        await mounted(node, f"{registry.host}/team/app:1", target)
        await until(lambda: node.statistics()["mounts"][0]["state"] == "local")
        await in_thread(lambda: spoil(node, 0, 59))
        assert (await verified(node))[0] == 1
        await until(lambda: node.statistics()["mounts"][0]["state"] == "local")
        assert await read(target / "data") == DATA
        assert (await verified(node))[0] == 0


async def test_without_a_source_it_says_so_and_serves_no_wrong_byte(
    tmp_path: Path, registry: FakeRegistry, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dadi.node.verifying._GIVE_UP", 0.3)
    async with node_of(tmp_path, "http://127.0.0.1:1", backfill=LAZY) as node:
        blob = await node.store.put(DATA)
        path = node.store.data_path(blob)
        await in_thread(lambda: path.write_bytes(b"\1" + path.read_bytes()[1:]))
        async with running(tmp_path / "superpeer", registry.host):
            status, answer = await verified(node, "--repair", "--rate", "10MiB")
        assert (status, answer["repaired"]) == (1, 0)
        assert answer["bad"][0]["outcome"].startswith("fetched again when it is needed; ")
        assert await node.store.missing(blob) == [0]
        events = node.verifying.run(repair=False, rate=1.0)
        await anext(events)
        with pytest.raises(Conflict, match="being verified already"):
            await anext(node.verifying.run(repair=False, rate=1.0))
        await events.aclose()


async def test_metadata_of_the_lowest_layers_that_nobody_else_has_is_made_again_and_a_drained_node_mounts_those(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        resolving = node.upstream.resolve(f"{registry.host}/team/app:1", node.platform)
        (answer,) = [image_answer(event) async for event in resolving if event.get("event") == "image"]
        await node.mounts.ensure(answer, str(target), 1)
        (row,) = node.statistics()["mounts"]
        metadata = row["devices"][0]["blob"]

        def spoil_metadata() -> None:
            path = node.store.root / "blobs" / metadata[7:] / "data"
            with open(path, "r+b", buffering=0) as file:
                os.pwrite(file.fileno(), b"\1\2\3", 1024)
                os.fsync(file.fileno())

        await in_thread(spoil_metadata)
        status, found = await verified(node)
        assert (status, [(bad["blob"], bad["outcome"]) for bad in found["bad"]]) == (0, [(metadata, "made again")])
        assert await read(target / "small") == b"small"
        assert (await verified(node))[0] == 0
        async for _ in node.drain.watch(0):
            pass
        for name in ("second", "third"):
            (target.parent / name).mkdir()
        await node.mounts.ensure(answer, str(target.parent / "second"), 1)
        assert await read(target.parent / "second" / "small") == b"small"
        with pytest.raises(Unavailable, match="being drained"):
            await node.mounts.ensure(answer, str(target.parent / "third"), 0)
        await node.mounts.unmount(str(target.parent / "second"))
