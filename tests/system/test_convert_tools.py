"""A converted image is an ordinary one: containerd, podman and skopeo pull it and unpack the same tree."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.compare import Snapshot, differences, snapshot_of
from tests.lab.containerd import Containerd
from tests.lab.network import Host, Network
from tests.lab.oci_layout import Image
from tests.lab.processes import REPOSITORY, Registry

pytestmark = [
    pytest.mark.root,
    pytest.mark.programs("docker-registry", "skopeo", "umoci", "ip", "ldd"),
]


@dataclass
class Site:
    """A registry on a host of its own, with the image as `before` and its conversion as `after`."""

    lab: Lab
    network: Network
    host: Host
    before: str
    after: str

    def run(self, *command: str | Path) -> str:
        done = subprocess.run(
            [*self.host.prefix, *map(str, command)], capture_output=True, text=True, check=False,
            env={**self.lab.environment, "PYTHONPATH": str(REPOSITORY)},
        )  # fmt: skip
        assert done.returncode == 0, f"{command}: {done.stderr}"
        return done.stdout


@pytest.fixture(scope="module")
def image() -> Image:
    return images.host_python()


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory, image: Image) -> Iterator[Site]:
    with Lab("convert", tmp_path_factory.mktemp("lab")) as lab:
        network = Network(lab)
        host = network.host("registry")
        registry = Registry(lab, host)
        before, after = f"{registry.address}/lab/app:1", f"{registry.address}/lab/app:z"
        image.push(before, prefix=host.prefix)
        site = Site(lab, network, host, before, after)
        site.run(sys.executable, "-m", "dadi.cli", "convert", before, after, "--plain-http", "--level", "3")
        yield site


@pytest.fixture(scope="module")
def expected(site: Site, image: Image) -> Snapshot:
    """The tree of the original, by an ordinary unpack."""
    bundle = site.lab.root / "bundle"
    source = site.lab.root / "original"
    site.run("skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", f"docker://{site.before}",
             f"oci:{source}:1")  # fmt: skip
    site.run("umoci", "unpack", "--image", f"{source}:1", bundle)
    return snapshot_of(bundle / "rootfs")


def comparable(tree: Snapshot) -> Snapshot:
    """Leave out what unpackers do as they like: the root directory, which is in no layer, and links of directories."""
    return {
        path: facts._replace(links=0) if facts.kind == "directory" else facts for path, facts in tree.items() if path
    }


def assert_same(ours: Path, expected: Snapshot) -> None:
    found, wanted = comparable(snapshot_of(ours)), comparable(expected)
    # A directory that a layer changes something in without listing it gets the time of day from some unpackers.
    directories = {path for path, facts in wanted.items() if facts.kind == "directory"}
    assert differences(found, wanted, untimed=directories) == []
    assert len(found) > 1000


def test_skopeo_copies_it_and_its_layers_unpack_to_the_same_tars(site: Site, image: Image) -> None:
    copy = site.lab.root / "copy"
    site.run("skopeo", "--insecure-policy", "copy", "--src-tls-verify=false", "--dest-decompress",
             f"docker://{site.after}", f"dir:{copy}")  # fmt: skip
    assert '+zstd"' in site.run("skopeo", "inspect", "--raw", "--tls-verify=false", f"docker://{site.after}")
    tars = {"sha256:" + hashlib.sha256(path.read_bytes()).hexdigest() for path in copy.iterdir()}
    assert {layer.diff_id for layer in image.layers} <= tars


@pytest.mark.programs("containerd", "ctr")
def test_containerd_pulls_it_and_has_the_same_tree(site: Site, expected: Snapshot) -> None:
    containerd = Containerd(site.lab, site.network.host("containerd"))
    directory = site.lab.root / "containerd-mnt"
    containerd.pull(site.after)
    containerd.mount(site.after, directory)
    try:
        assert_same(directory, expected)
    finally:
        containerd.unmount(directory)
        containerd.stop()


@pytest.mark.programs("podman")
def test_podman_pulls_it_and_has_the_same_tree(site: Site, expected: Snapshot) -> None:
    root = site.lab.root / "podman"
    with tempfile.TemporaryDirectory(prefix="pod-") as short:  # podman refuses a runroot of more than 50 characters
        podman = ["podman", "--root", root / "root", "--runroot", short, "--tmpdir", root / "tmp",
                  "--storage-driver", "vfs", "--cgroup-manager", "cgroupfs", "--events-backend", "none"]  # fmt: skip
        site.run(*podman, "pull", "--tls-verify=false", site.after)
        directory = Path(site.run(*podman, "image", "mount", site.after).strip())
        try:
            assert_same(directory, expected)
        finally:
            site.run(*podman, "image", "umount", "--all")


def test_the_image_id_stays(site: Site) -> None:
    before, after = (
        site.run("skopeo", "inspect", "--config", "--raw", "--tls-verify=false", f"docker://{name}")
        for name in (site.before, site.after)
    )
    assert before == after
