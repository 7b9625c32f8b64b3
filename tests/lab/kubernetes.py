"""A machine of Kubernetes without kubelet: its containers are pods, by CRI of Debian's containerd, and lazy.

What lives here: `Kubernetes`, with the configuration that `dadi containerd-config --cri` prints, and `kubernetes_lab`,
the lab that it is in. What never does: kubelet, whose part is the test's; pod networks (pods are on the host's).
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.containerd import Containerd
from tests.lab.containers import Machine, containerd_lab
from tests.lab.cri import Cri, host_pod, pause_image
from tests.lab.processes import LabFailed, dadi
from tests.lab.registry import DockerRegistry
from tests.lab.waiting import wait_until

_CGROUP = f"dadi-cri-{os.getpid()}"
_SHIMS = Path("/run/containerd/s")
"""Where containerd's shims listen, whatever its configuration."""
SERVE = """
import runpy, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(7))
runpy.run_path("/app/main.py", run_name="__main__")
time.sleep(1000)
"""
"""A program that says that it is ready, stays, and ends with status 7 when it is asked to."""


@contextlib.contextmanager
def kubernetes_lab() -> Iterator[Lab]:
    """A lab for pods; nothing of it is left, no cgroup and no shim's socket either. Raises AssertionError."""
    shims = set(_SHIMS.iterdir()) if _SHIMS.exists() else set()
    with containerd_lab(_CGROUP) as lab:
        yield lab
    if _SHIMS.exists() and (left := set(_SHIMS.iterdir()) - shims):
        raise AssertionError(f"left behind: {left}")


def containerd_of(lab: Lab, machine: Kubernetes) -> Containerd:
    """Return containerd with what `dadi containerd-config --cri` prints, and what a machine without Internet needs."""
    printed = dadi(lab, "containerd-config", "--cri", "--socket", str(machine.snapshotter), "--root",
                   str(machine.state)).stdout  # fmt: skip
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
        return host_pod(name, self.logs, f"/{_CGROUP}")

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
        """Raises AssertionError with what is left."""
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not self.left())
        if left := self.left():
            raise AssertionError(f"left behind: {left}")
