"""Kubernetes' way to dadi: pods through CRI of Debian's containerd, from images that are pulled lazily.

What lives here: what kubelet asks of containerd, in its order, with the configuration that `dadi containerd-config
--cri` prints. What never does: kubelet and pod networks (pods are on the host's network). Nothing waits without end.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab.cleanup import Lab
from tests.lab.containers import registry_with_image
from tests.lab.cri import Cri
from tests.lab.kubernetes import SERVE, Kubernetes, kubernetes_lab
from tests.lab.processes import LabFailed
from tests.lab.registry import DockerRegistry
from tests.lab.waiting import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.programs("containerd", "ctr", "runc", "docker-registry", "skopeo"),
    pytest.mark.timeout(240),
]


@pytest.fixture
def lab() -> Iterator[Lab]:
    with kubernetes_lab() as lab:
        yield lab


@pytest.fixture
def registry(lab: Lab) -> Iterator[DockerRegistry]:
    with registry_with_image(lab) as registry:
        yield registry


def test_a_pods_image_is_pulled_lazily_and_nothing_is_left_of_it(lab: Lab, registry: DockerRegistry) -> None:
    machine = Kubernetes(lab, registry, backfill=False)
    image, node = machine.image, machine.node
    pod = machine.pod("one")
    with Cri(machine.containerd.socket) as cri:
        assert cri.image(machine.reference) is None
        pulled = cri.pull(machine.reference, pod)
        assert node.status()["snapshots"]["layers"] == {"lazy": len(image.layers), "ordinary": 0}
        assert machine.mounts() == [], "nothing runs yet"
        there = cri.image(machine.reference)
        assert there.id == pulled
        assert list(there.repo_tags) == [machine.reference]
        assert list(there.repo_digests) == [f"{registry.host}/host/python@{image.manifest.digest}"]
        assert there.size > 0
        assert set(machine.rows("content", "ls")) == {image.manifest.digest, pulled}, "no layer"

        pod_id = cri.run_pod(pod)
        assert cri.pod_is_ready(pod_id)
        container = machine.start(cri, pod_id, pod, "app", image.command[0], "-c", SERVE)
        wait_until(lambda: "ready: " in machine.log("app"))
        assert cri.state(container) == "RUNNING"
        assert cri.status(container).image_ref == there.repo_digests[0]
        assert "/app" in cri.execute(container, "cat", "/etc/passwd")
        assert cri.execute(container, "ls", "/var/log").split() == ["second"], "what is below is hidden"
        assert "old.conf" not in cri.execute(container, "ls", "/etc"), "deleted by the layer above"
        with pytest.raises(LabFailed, match="status 1"):
            cri.execute(container, "cat", "/etc/old.conf")
        cri.execute(container, "sh", "-c", "cat /app/rows.csv /app/rows.csv > /tmp/twice")

        # Two images are mounted, each once and lazily; the rest of them is not here.
        assert node.status()["snapshots"]["layers"] == {"lazy": machine.layers, "ordinary": 0}
        mounts = {mount["reference"]: mount for mount in node.status()["mounts"]}
        assert len(mounts) == len(machine.mounts()) == 2
        (mount,) = [mount for reference, mount in mounts.items() if "host/python" in reference]
        assert mount["state"] == "lazy"
        assert 0 < mount["bytes_present"] < mount["bytes"]
        assert node.status()["bytes"]["fetched"] < sum(layer.tar_size for layer in image.layers)
        assert sum(source["wire_bytes"] for source in node.status()["sources"]) < image.compressed_size
        assert [row for row in node.status()["fallbacks"] if row["kind"] == "layer not lazy"] == []

        # A second one of the same image, of its own command, which ends by itself.
        other = machine.start(cri, pod_id, pod, "short")
        wait_until(lambda: cri.state(other) == "EXITED")
        assert (cri.status(other).exit_code, machine.log("short")) == (0, image.facts["first_line"])

        # What kubelet decides by when the disk is full; 1.6 names a place where `containerd-config` wants a link.
        place = Path(cri.image_filesystem().fs_id.mountpoint)
        assert place == machine.containerd.directory / "root/io.containerd.snapshotter.v1.dadi"
        place.symlink_to(machine.state)
        assert os.statvfs(place).f_blocks > 0
        wait_until(lambda: cri.written(container) > 1 << 20)
        assert cri.image_filesystem().used_bytes.value > cri.written(container)

        assert cri.stop(container) == 7, "it was asked to end, and did"
        for one in (container, other):
            cri.remove(one)
        cri.stop_pod(pod_id)
        assert not cri.pod_is_ready(pod_id)
        cri.remove_pod(pod_id)
        assert cri.image(machine.reference).id == pulled, "images stay until they are removed"
        for name in (machine.reference, machine.pause):
            cri.remove_image(name)
        assert cri.images() == []
    machine.wait_until_nothing_is_left()


def test_pods_live_through_restarts_of_containerd_and_the_node(lab: Lab, registry: DockerRegistry) -> None:
    machine = Kubernetes(lab, registry)
    pod = machine.pod("two")
    serve = (machine.image.command[0], "-c", SERVE)
    with Cri(machine.containerd.socket) as cri:
        pulled = cri.pull(machine.reference, pod)
        pod_id = cri.run_pod(pod)
        first = machine.start(cri, pod_id, pod, "first", *serve)
        wait_until(lambda: "ready: " in machine.log("first"))
        cri.execute(first, "sh", "-c", "echo mine > /tmp/f")
    wait_until(lambda: [mount["state"] for mount in machine.node.status()["mounts"]] == ["local"] * 2)
    before = machine.mounts()
    registry.stop()

    machine.restart_containerd()
    with Cri(machine.containerd.socket) as cri:
        assert cri.pod_is_ready(pod_id)
        assert cri.state(first) == "RUNNING"
        assert cri.image(machine.reference).id == pulled, "kubelet need not pull it again"
        assert cri.execute(first, "cat", "/tmp/f", "/var/log/second") == "mine\nin a fresh directory\n"

        assert machine.node.stop() == 0
        assert cri.execute(first, "cat", "/var/log/second") == "in a fresh directory\n"
        assert cri.image_filesystem().used_bytes.value > 0
        machine.start_node_again()
        assert machine.mounts() == before, "found again, not made twice"
        second = machine.start(cri, pod_id, pod, "second", *serve)
        wait_until(lambda: "ready: " in machine.log("second"))

    # Both at once, as when a machine's packages are upgraded.
    machine.restart_all()
    with Cri(machine.containerd.socket) as cri:
        assert [cri.state(container) for container in (first, second)] == ["RUNNING"] * 2
        assert cri.execute(first, "cat", "/tmp/f") == "mine\n"
        assert machine.mounts() == before

        # Another pod, without the registry.
        pod_of_three = machine.pod("three")
        third_pod = cri.run_pod(pod_of_three)
        third = machine.start(cri, third_pod, pod_of_three, "third")
        wait_until(lambda: cri.state(third) == "EXITED")
        assert machine.log("third") == machine.image.facts["first_line"]

        assert [cri.stop(container) for container in (first, second)] == [7, 7]
        machine.remove_all(cri, pod_id, third_pod)
    machine.wait_until_nothing_is_left()


def test_after_containerd_was_up_before_the_node_a_pull_fetches_nothing(lab: Lab, registry: DockerRegistry) -> None:
    machine = Kubernetes(lab, registry)
    pod = machine.pod("four")
    with Cri(machine.containerd.socket) as cri:
        pulled = cri.pull(machine.reference, pod)
        pod_id = cri.run_pod(pod)
        first = machine.start(cri, pod_id, pod, "first", machine.image.command[0], "-c", SERVE)
        wait_until(lambda: "ready: " in machine.log("first"))
    wait_until(lambda: [mount["state"] for mount in machine.node.status()["mounts"]] == ["local"] * 2)

    machine.node.stop()
    machine.restart_containerd()
    with Cri(machine.containerd.socket) as cri:
        assert cri.state(first) == "RUNNING"
        assert cri.execute(first, "cat", "/var/log/second") == "in a fresh directory\n"
        machine.start_node_again()
        # At its start CRI leaves out the images whose snapshots it cannot ask for; kubelet then has them pulled again.
        assert cri.images() == []
        assert cri.pull(machine.reference, pod) == pulled
        five = machine.pod("five")
        pod_of_five = cri.run_pod(five)
        second = machine.start(cri, pod_of_five, five, "second")
        wait_until(lambda: cri.state(second) == "EXITED")
        assert machine.log("second") == machine.image.facts["first_line"]
        assert machine.node.status()["bytes"]["fetched"] == 0
        machine.remove_all(cri, pod_id, pod_of_five)
    machine.wait_until_nothing_is_left()
