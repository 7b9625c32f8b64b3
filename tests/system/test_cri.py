"""Kubernetes' way to dadi: pods through CRI of Debian's containerd, from images that are pulled lazily.

What lives here: what kubelet asks of containerd, in its order, with the configuration that `dadi containerd-config
--cri` prints. What never does: kubelet and pod networks (pods are on the host's network). Nothing waits without end.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lab import images
from tests.lab.cleanup import Lab, leak_check
from tests.lab.containerd import Containerd
from tests.lab.cri import Cri, host_pod, pause_image
from tests.lab.processes import LabFailed
from tests.lab.registry import DockerRegistry
from tests.system.test_lazy_containers import Machine, wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.programs("containerd", "ctr", "runc", "docker-registry", "skopeo"),
    pytest.mark.timeout(240),
]
REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 60
CGROUP = f"dadi-cri-{os.getpid()}"
SHIMS = Path("/run/containerd/s")
"""Where containerd's shims listen, whatever its configuration."""
SERVE = """
import runpy, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
runpy.run_path("/app/main.py", run_name="__main__")
time.sleep(1000)
"""


def containerd_of(lab: Lab, machine: Kubernetes) -> Containerd:
    """Return containerd with what `dadi containerd-config --cri` prints, and what a machine without Internet needs."""
    command = [sys.executable, "-m", "dadi.cli", "containerd-config", "--cri",
               "--socket", str(machine.snapshotter), "--root", str(machine.state)]  # fmt: skip
    printed = subprocess.run(command, capture_output=True, text=True, check=True, timeout=TIMEOUT,
                             env={**lab.environment, "PYTHONPATH": str(REPOSITORY)}).stdout  # fmt: skip
    hosts = lab.root / "hosts" / machine.registry.host
    hosts.mkdir(parents=True, exist_ok=True)
    (hosts / "hosts.toml").write_text(f'server = "http://{machine.registry.host}"\n')
    cri, cni = 'plugins."io.containerd.grpc.v1.cri"', lab.root / "containerd/cni"
    config = (
        f'{printed}\n[{cri}]\nsandbox_image = "{machine.pause}"\nstats_collect_period = 1\n'
        "restrict_oom_score_adj = true\n"  # below our own it may not go without CAP_SYS_RESOURCE
        f'[{cri}.cni]\nbin_dir = "{cni}"\nconf_dir = "{cni}"\n[{cri}.registry]\nconfig_path = "{hosts.parent}"\n'
        f'[{cri}.containerd.runtimes.runc]\nruntime_type = "io.containerd.runc.v2"\n'
        f'[{cri}.containerd.runtimes.runc.options]\nRoot = "{lab.root / "runc"}"\n'
    )
    containerd = Containerd(lab, config=config, tidy=True, cri=True, namespace="k8s.io")

    def ready() -> bool:
        with contextlib.suppress(LabFailed), Cri(containerd.socket) as client:
            return client.conditions()["RuntimeReady"]
        return False

    containerd.wait_until(ready)
    return containerd


class Kubernetes(Machine):
    """A registry with an image and one for sandboxes, a node, containerd with CRI; kubelet's part is the test's."""

    def __init__(self, lab: Lab, registry: DockerRegistry, backfill: bool = True) -> None:
        self.lab = lab
        self.registry = registry
        self.image = images.host_python()
        self.reference = f"{registry.host}/host/python:latest"
        self.pause = f"{registry.host}/pods/pause:1"
        self.marks = {key: lab.environment[key] for key in ("DADI_LAB", "DADI_LAB_ROOT")}
        self.pause_image = pause_image(lab.root / "pause", self.marks)
        self.pause_image.push(self.pause)
        self._superpeers = [] if backfill else [self._superpeer()]
        self.node = self._node()
        self.state, self.snapshotter = self.node.state, self.node.socket.parent / "snapshotter.sock"
        self.containerd = containerd_of(lab, self)
        self.logs = lab.root / "pod-logs"
        self.logs.mkdir()

    @property
    def layers(self) -> int:
        """How many layers there are, the sandbox's too."""
        return len(self.image.layers) + len(self.pause_image.layers)

    def pod(self, name: str) -> Any:
        return host_pod(name, self.logs, f"/{CGROUP}")

    def start(self, cri: Cri, pod_id: str, pod: Any, name: str, *command: str) -> str:
        """Create and start a container of the image (no command: its own); return its ID."""
        container = cri.create(pod_id, pod, name, self.reference, command, self.marks)
        cri.start(container)
        return container

    def log(self, name: str) -> str:
        """Return what a container has printed, without what CRI puts before each line."""
        file = self.logs / f"{name}.log"
        lines = file.read_text().splitlines() if file.exists() else []
        return "\n".join(line.split(" ", 3)[3] for line in lines)

    def restart_containerd(self) -> None:
        self.containerd.stop()
        self.containerd = containerd_of(self.lab, self)

    def restart_all(self) -> None:
        """The node, which has no time to end, and containerd; pods go on."""
        self.containerd.stop()
        self.node.kill()
        self.node = self._node()
        self.containerd = containerd_of(self.lab, self)

    def remove_all(self, cri: Cri, *pods: str) -> None:
        """Remove pods, with the containers that are in them, and both images."""
        for pod_id in pods:
            cri.stop_pod(pod_id)
            cri.remove_pod(pod_id)
        for name in (self.reference, self.pause):
            cri.remove_image(name)

    def rows(self, *arguments: str) -> list[str]:
        """Return the first word of each line that `ctr … ls` prints, without the head."""
        return [line.split()[0] for line in self.containerd.ctr(*arguments).stdout.splitlines()[1:]]

    def left(self) -> dict[str, Any]:
        """Return what there still is, in containerd and in the node."""
        status, state = self.node.status(), self.node.state
        directories = ("images", "mounts", "snapshotter/images", "snapshotter/snapshots")
        found = {
            "images": self.rows("image", "ls"),
            "containers": self.rows("container", "ls"),
            "tasks": self.rows("task", "ls"),
            "content": self.rows("content", "ls"),
            "ingests": self.rows("content", "active"),
            "leases": self.rows("leases", "ls"),
            "snapshots": self.rows("snapshots", "--snapshotter", "dadi", "ls"),
            "mounted": self.mounts(),
            "mounts": status["mounts"],
            **{f"{name}/": [path.name for path in (state / name).iterdir()] for name in directories},
        }
        return {key: value for key, value in found.items() if value}

    def wait_until_nothing_is_left(self) -> None:
        deadline = time.monotonic() + TIMEOUT
        while (left := self.left()) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert left == {}


@pytest.fixture
def lab() -> Iterator[Lab]:
    # Unix sockets want short paths, and the leak check a directory that is ours alone.
    base = Path(tempfile.gettempdir()) / f"dk{os.getpid()}"
    base.mkdir()
    shims = set(SHIMS.iterdir()) if SHIMS.exists() else set()
    try:
        with leak_check(base) as leaks, Lab("k", base) as lab:
            yield lab
        assert leaks.found == []
    finally:
        base.rmdir()
        for cgroup in sorted(Path("/sys/fs/cgroup").glob(f"**/{CGROUP}/**"), reverse=True):
            with contextlib.suppress(OSError):
                cgroup.rmdir()
    assert set(SHIMS.iterdir()) - shims == set() if SHIMS.exists() else True


@pytest.fixture
def registry(lab: Lab) -> Iterator[DockerRegistry]:
    with DockerRegistry(lab.root / "registry", environment=lab.environment) as registry:
        images.host_python().push(f"{registry.host}/host/python:latest")
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
