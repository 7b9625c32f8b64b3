"""A machine whose containers are lazy: a registry with an image, a node, and containerd with it as a snapshotter.

What lives here: `Machine`, and `containerd_lab`, the lab that it is in. What never does: Kubernetes' side of it
(tests/lab/kubernetes.py).
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

from tests.lab import images
from tests.lab.cleanup import Lab, clean_lab
from tests.lab.containerd import Containerd, remove_cgroups
from tests.lab.processes import LabFailed, Node, Superpeer, dadi
from tests.lab.registry import DockerRegistry
from tests.lab.waiting import wait_until

NAMESPACE = f"lazy-{os.getpid()}"
"""Of containerd, and the name of the cgroups that runc makes."""
WAIT = "import time; open('/tmp/f', 'w').write('written'); time.sleep(1000)"
"""A program that stays until it is ended."""


@contextlib.contextmanager
def containerd_lab(cgroups: str = NAMESPACE) -> Iterator[Lab]:
    """A lab for containers; nothing of it is left, and no cgroup below `cgroups`. Raises AssertionError."""
    try:
        with clean_lab("s") as lab:
            yield lab
    finally:
        remove_cgroups(cgroups)


@contextlib.contextmanager
def registry_with_image(lab: Lab) -> Iterator[DockerRegistry]:
    """A registry with this machine's Python as host/python:latest."""
    with DockerRegistry(lab.root / "registry", environment=lab.environment) as registry:
        images.host_python().push(f"{registry.host}/host/python:latest")
        yield registry


def containerd_of(lab: Lab, snapshotter: Path) -> Containerd:
    """Return containerd with the node's socket as the proxy plugin `dadi`."""
    return Containerd(lab, snapshotter=snapshotter, tidy=True, namespace=NAMESPACE)


class Machine:
    """A registry with one image, a node, and containerd that uses it."""

    def __init__(self, lab: Lab, registry: DockerRegistry, backfill: bool = True) -> None:
        """Without `backfill` the node has a superpeer, and takes from it only what is read."""
        self.lab = lab
        self.registry = registry
        self.image = images.host_python()
        self.reference = f"{registry.host}/host/python:latest"
        self._checks = itertools.count()
        self._superpeers = [] if backfill else [self._superpeer()]
        self.node = self._node()
        self.containerd = containerd_of(lab, self.node.socket.parent / "snapshotter.sock")

    def _superpeer(self) -> str:
        return Superpeer(self.lab, None, [self.registry.host]).url

    def _node(self) -> Node:
        host = self.registry.host
        sections = (
            f'[registry]\nallowed = ["{host}"]\nplain_http = ["{host}"]\n[snapshotter]\nsweep = 1\nkeep_idle = 0\n'
            f"[backfill]\nenabled = {str(not self._superpeers).lower()}\nquiet = 0.5\n"
        )
        return Node(self.lab, None, self._superpeers, sections=sections)

    def pull(self) -> str:
        """`dadi pull`; return what it says as JSON."""
        try:
            return dadi(self.lab, "pull", self.reference, "--namespace", NAMESPACE, "--containerd-address",
                        str(self.containerd.socket), "--plain-http", "--json").stdout  # fmt: skip
        except LabFailed as error:
            raise LabFailed(f"{error}\n{self.node.tail()}\n{self.containerd.tail()}") from None

    def run(self, name: str, *command: str, program: str = WAIT) -> str:
        """Run a container; with a command in the foreground, without one it stays there with a Python program."""
        if command:
            return self.containerd.run(self.reference, name, command, "dadi")
        self.containerd.start(self.reference, name, (self.image.command[0], "-c", program), "dadi")
        return ""

    def check(self, name: str, statement: str) -> None:
        """Run Python in a container that runs; its exit status counts, since `ctr` may miss what it prints."""
        command = (name, self.image.command[0], "-c", statement)
        self.containerd.ctr("task", "exec", "--exec-id", f"check-{next(self._checks)}", *command)

    def end(self, name: str) -> None:
        self.containerd.ctr("task", "rm", "--force", name)
        self.containerd.ctr("container", "rm", name)

    def mounts(self) -> list[str]:
        """Return where our EROFS images are mounted, as the kernel says."""
        lines = Path("/proc/mounts").read_text().splitlines()
        return [line.split()[1] for line in lines if " erofs " in line and str(self.lab.root) in line]

    def start_node_again(self) -> None:
        self.node = self._node()
        wait_until(lambda: self.containerd.ctr("snapshots", "--snapshotter", "dadi", "ls", check=False).returncode == 0)

    def remove_image(self) -> None:
        self.containerd.ctr("image", "rm", "--sync", self.reference)
        self.containerd.ctr("leases", "create", "--id", "collect")
        self.containerd.ctr("leases", "delete", "--sync", "collect")
