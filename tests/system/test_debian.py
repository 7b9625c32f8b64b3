"""Debian, by debootstrap, in four layers: mounted by a node with everything real, it equals an ordinary unpack."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import compare, images
from tests.lab.cleanup import Lab
from tests.lab.compare import Snapshot, differences, snapshot_of
from tests.lab.processes import Node
from tests.lab.registry import DockerRegistry
from tests.lab.starts import program

pytestmark = [pytest.mark.root, pytest.mark.programs("docker-registry", "skopeo", "umoci", "debootstrap")]
CACHE = Path(__file__).parents[2] / ".cache" / "lab"


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with Lab("debian") as lab:
        yield lab


@pytest.fixture(scope="module")
def unpacked(lab: Lab) -> Snapshot:
    # umoci knows no zstd; the files of both tags are the same.
    return snapshot_of(compare.unpacked(images.debian_python(CACHE, zstd=False), lab.root / "unpacked"))


@pytest.mark.timeout(900)  # the image is built here if neither demo nor bench has done so
@pytest.mark.parametrize("zstd", [False, True], ids=["gzip", "one layer zstd"])
def test_debian_mounted_is_debian_unpacked(lab: Lab, unpacked: Snapshot, zstd: bool) -> None:
    image = images.debian_python(CACHE, zstd=zstd)
    assert len(image.layers) >= 4
    assert image.unpacked_size > 150_000_000
    name = "zstd" if zstd else "gzip"
    (lab.root / f"registry-{name}").mkdir()
    with DockerRegistry(lab.root / f"registry-{name}", environment=lab.environment) as registry:
        image.push(f"{registry.host}/debian:1")
        node = Node(
            lab,
            name=f"node-{name}",
            sections=f'[registry]\nallowed = ["{registry.host}"]\nplain_http = ["{registry.host}"]\n',
        )
        target = lab.root / f"mnt-{name}"
        target.mkdir()
        row = json.loads(node.dadi("mount", "--json", f"{registry.host}/debian:1", str(target)))
        assert row["layers"] == len(image.layers)
        assert node.status()["superpeers"] == ["embedded"]
        with program(image, target) as line:
            assert line == image.facts["first_line"]
        assert differences(unpacked, snapshot_of(target), untimed=(b"",)) == []
        node.dadi("umount", str(target))
        node.stop()
