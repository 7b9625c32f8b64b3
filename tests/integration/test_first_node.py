"""Twenty nodes read an image at random that no superpeer has seen: the registry's own access log tells what it cost."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from pathlib import Path

import pytest

from dadi.fallbacks import Fallbacks
from dadi.index.image import CONVERTED, REFERRER, ImageIndex
from dadi.oci.config import RegistryConfig
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from dadi.peers.superpeer import SuperpeerClient
from dadi.publish.convert import convert_image
from dadi.publish.images import RegistryImage
from dadi.publish.index import index_image
from dadi.publish.target import RegistryTarget
from tests.lab import images
from tests.lab.registry import DockerRegistry, available
from tests.lab.services import IndexingConfig, Running, running

pytestmark = [
    pytest.mark.skipif(not available(), reason="docker-registry is not installed (scripts/setup does it)"),
    pytest.mark.programs("skopeo"),
]
NODES = 20


async def read_at_random(run: Running, index: ImageIndex, seed: int) -> Counter[str]:
    """Be a node: read every chunk of every layer once, in no order; return the bytes by diff ID."""
    client = SuperpeerClient([run.url], Fallbacks(), connect=5, read=30)
    places = [(layer.blob, chunk) for layer in index.layers for chunk in range(layer.table.count)]
    counts: Counter[str] = Counter()
    for blob, chunk in random.Random(seed).sample(places, len(places)):
        (data,) = await client.source.read(blob, range(chunk, chunk + 1))  # verified by the client
        counts[blob.digest] += len(data)
    await client.close()
    return counts


def layer_bytes(registry: DockerRegistry, index: ImageIndex) -> dict[str, int]:
    """Return, out of the access log, the bytes of each layer that have left the registry."""
    log = registry.access_log()
    return {
        layer.layer_digest: sum(
            request.size for request in log
            if request.method == "GET" and request.path.endswith(layer.layer_digest) and request.status < 300
        )
        for layer in index.layers
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["indexed", "converted"])
async def test_the_registry_gives_each_byte_of_the_image_once(tmp_path: Path, kind: str) -> None:
    compression = ["gzip", "gzip", "none", "fast-gzip"]
    made = images.synthetic(tmp_path / "oci", layers=4, size=3 << 20, compression=compression)
    (tmp_path / "registry").mkdir()
    with DockerRegistry(tmp_path / "registry") as registry:
        plain, name = f"{registry.host}/team/plain:1", f"{registry.host}/team/app:1"
        await asyncio.to_thread(made.push, plain if kind == "converted" else name)
        config = RegistryConfig(allowed=(registry.host,), plain_http=(registry.host,))
        publisher = RegistryClient(config)
        reference = Reference.parse(name)
        if kind == "indexed":
            await index_image(RegistryImage(publisher, reference), RegistryTarget(publisher, reference, ""))
        else:
            source = RegistryImage(publisher, Reference.parse(plain))
            await convert_image(source, RegistryTarget(publisher, reference, ""), level=3)
        await publisher.close()
        async with running(
            tmp_path / "superpeer", registry.host, indexing=IndexingConfig(rest_after=0.2), authorization="open"
        ) as run:
            before = registry.access_log()
            index = await run.index(name)
            assert index.origin == (REFERRER if kind == "indexed" else CONVERTED)
            known = layer_bytes(registry, index) if kind == "converted" else None
            counts = await asyncio.gather(*(read_at_random(run, index, seed) for seed in range(NODES)))
            assert all(count == {layer.diff_id: layer.table.size for layer in index.layers} for count in counts)
            async with asyncio.timeout(60):
                while run.superpeer.lazy.completed < len(index.layers):
                    await asyncio.sleep(0.02)
            if kind == "indexed":  # `dadi index` has read each layer once, before
                known = {layer.layer_digest: layer.layer_size for layer in index.layers}
            assert known is not None
            assert {digest: size - known[digest] for digest, size in layer_bytes(registry, index).items()} == {
                layer.layer_digest: layer.layer_size for layer in index.layers
            }, "1.0 copies of the image's compressed size"
            assert len(registry.access_log()) > len(before)
            for layer in index.layers:  # complete, verified, and there for a plain pull
                data = await run.client.whole(layer.layer_digest, layer.layer_size)
                assert len(data) == layer.layer_size
