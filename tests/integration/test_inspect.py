"""`dadi inspect` against a real node: where an image's index comes from, and what its layers are."""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from dadi import digest as digests
from dadi import http
from dadi.cli import show
from dadi.index import signature
from dadi.index.artifact import ORIGIN_CONVERT, Artifact
from dadi.index.image import ImageIndex
from dadi.node import control
from dadi.node.config import BackfillConfig, NodeConfig, PeersConfig
from dadi.node.node import Node
from dadi.oci import media_types
from tests.fakes import indexed
from tests.fakes.indexed import CHUNK, SPACING
from tests.fakes.registry import FakeRegistry
from tests.integration.test_lazy_layers import key_file, superpeer
from tests.lab.services import PLATFORM, tar_of

pytestmark = pytest.mark.root
REPOSITORY = Path(__file__).parents[2]
TARS = [
    tar_of(**{"a": random.Random(1).randbytes(400_000), "b": b"b" * 5000, "c": b""}),
    tar_of(**{"d": b"d" * 20}),
]


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        yield fake


async def dadi(socket: Path, *arguments: str) -> str:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "COLUMNS": "300"}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "dadi.cli", "inspect", *arguments, "--node-socket", str(socket), env=environment,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, said = await process.communicate()
    assert process.returncode == 0, said.decode()
    return out.decode()


async def inspected(
    directory: Path, registry: FakeRegistry, image: str, **indexing: Any
) -> tuple[Any, str, ImageIndex]:
    """Return what --json, and what the form for people, say of an image, and its index."""
    async with superpeer(directory, registry, **indexing) as run:
        config = NodeConfig(
            state=str(directory / "node" / "state"), run=str(directory / "node" / "run"), superpeers=(run.url,),
            backfill=BackfillConfig(enabled=False), platform=PLATFORM, peers=PeersConfig(listen="127.0.0.1:0"),
        )  # fmt: skip
        node = await Node.start(config)
        try:
            socket = directory / "node" / "run" / "node.sock"
            runner = await http.serve_unix(control.create(node), str(socket))
            try:
                told = json.loads(await dadi(socket, image, "--json"))
                return told, await dadi(socket, image, "--layers"), await run.index(image)
            finally:
                await runner.cleanup()
        finally:
            await node.close()


def cells(text: str, digest: str) -> list[str]:
    """Return the row that the table has for a layer."""
    (line,) = [line for line in text.splitlines() if digest[7:19] in line]
    return [cell for cell in line.split("  ") if cell.strip()]


def check_layers(told: Any, text: str, index: ImageIndex, files: list[int]) -> None:
    """The figures of each layer: right, and the same for people and programs."""
    assert [row["files"] for row in told["layers"]] == files
    for row, layer in zip(told["layers"], index.layers, strict=True):
        assert (row["digest"], row["diff_id"]) == (layer.layer_digest, layer.diff_id)
        assert (row["compressed_bytes"], row["unpacked_bytes"]) == (layer.layer_size, layer.table.size)
        assert (row["chunks"], row["chunk_size"]) == (-(-layer.table.size // CHUNK), CHUNK)
        assert (row["seek_points"], row["seek_bytes"]) == (layer.seek_points, layer.seek_size)
        assert row["index_bytes"] == layer.index_size > 0
        size = row["index_bytes"] + row["seek_bytes"]
        assert [cell.strip() for cell in cells(text, layer.layer_digest)][1:9] == [
            layer.layer_digest[7:19], show.size(layer.layer_size), show.size(layer.table.size), str(row["files"]),
            str(row["chunks"]), str(row["seek_points"] or "-"), show.size(size),
            f"{100 * size / layer.layer_size:.1f} %",
        ]  # fmt: skip


async def test_an_index_of_dadi_index_is_shown_with_its_artifact_and_its_seek_points(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    image = await indexed.add(registry, "team/app", TARS, tmp_path)
    told, text, index = await inspected(tmp_path, registry, image.reference)
    assert (told["index_origin"], told["index_version"]) == ("referrer", 1)
    assert (told["artifact_digest"], told["signer"]) == (image.artifact, "")
    assert f"index      version 1, referrer, {image.artifact}\n" in text
    assert told["manifest_digest"] == image.manifest.digest
    assert told["compressed_bytes"] == sum(map(len, image.layers))
    check_layers(told, text, index, [3, 1])
    assert told["layers"][0]["seek_points"] >= len(TARS[0]) // (2 * SPACING)
    assert told["layers"][0]["seek_bytes"] > 0


async def test_a_signed_index_is_shown_with_its_signer(tmp_path: Path, registry: FakeRegistry) -> None:
    key = Ed25519PrivateKey.generate()
    image = await indexed.add(registry, "team/app", TARS, tmp_path, sign=key)
    told, text, _ = await inspected(tmp_path, registry, image.reference, trusted_keys=(key_file(tmp_path, key),))
    signer = signature.key_id(key.public_key())
    assert (told["index_origin"], told["signer"]) == ("referrer", signer)
    assert f"referrer, {image.artifact}, signed by {signer}\n" in text


async def test_a_converted_image_is_shown_as_such(tmp_path: Path, registry: FakeRegistry) -> None:
    def converted(artifact: Artifact) -> Artifact:
        return Artifact(artifact.subject, artifact.layers, artifact.chunk_size, ORIGIN_CONVERT)

    image = await indexed.add(registry, "team/app", TARS, tmp_path, change_artifact=converted)
    told, text, index = await inspected(tmp_path, registry, image.reference)
    assert (told["index_origin"], told["artifact_digest"]) == ("converted", image.artifact)
    assert f"index      version 1, converted, {image.artifact}\n" in text
    check_layers(told, text, index, [3, 1])


async def test_an_index_made_on_first_sight_has_no_artifact_and_no_seek_points(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    registry.add_image("team/app", "1", TARS)
    told, text, index = await inspected(tmp_path, registry, f"{registry.host}/team/app:1")
    assert (told["index_origin"], told["artifact_digest"], told["signer"]) == ("first sight", "", "")
    assert "index      version 1, first sight\n" in text
    check_layers(told, text, index, [3, 1])
    assert [row["seek_points"] for row in told["layers"]] == [0, 0]
    assert {row["media_type"] for row in told["layers"]} == {media_types.OCI_LAYER}
    assert [row["digest"] for row in told["layers"]] == [digests.of(tar) for tar in TARS]
