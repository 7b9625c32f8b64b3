"""Private images in Kubernetes: a pull secret, or a credential provider, makes them lazy as well, and shows nowhere.

What lives here: kubelet's calls through `cri.sock` to Debian's containerd, images in a registry with passwords. What
never does: kubelet. Nothing waits without end.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.cri import Cri
from tests.lab.kubernetes import SERVE, Kubernetes, containerd_of
from tests.lab.processes import LabFailed, Node
from tests.lab.registry import HTPASSWD, PASSWORD, USER, DockerRegistry
from tests.lab.waiting import wait_until
from tests.system import test_cri

pytestmark = test_cri.pytestmark
lab = test_cri.lab
registry = test_cri.registry
SECRET = {"username": USER, "password": PASSWORD}
SHOWN = [PASSWORD.encode(), base64.b64encode(f"{USER}:{PASSWORD}".encode())]


class Private(Kubernetes):
    """The image is in a registry with passwords; that of sandboxes in one without."""

    def __init__(self, lab: Lab, registry: DockerRegistry, private: DockerRegistry, sections: str) -> None:
        self.private = private
        self.sections = sections
        hosts = lab.root / "hosts" / private.host
        hosts.mkdir(parents=True)
        (hosts / "hosts.toml").write_text(f'server = "http://{private.host}"\n')
        super().__init__(lab, registry)
        self.reference = f"{private.host}/team/python:latest"
        self.cri_socket = self.node.socket.parent / "cri.sock"

    def _node(self) -> Node:
        hosts = f'["{self.registry.host}", "{self.private.host}"]'
        sections = (
            f'[registry]\nallowed = {hosts}\nplain_http = {hosts}\ndocker_config = "/dev/null"\n'
            f"[snapshotter]\nsweep = 1\nkeep_idle = 0\n[backfill]\nenabled = false\n{self.sections}\n"
        )
        return Node(self.lab, None, options='log_level = "debug"', sections=sections)

    def layers_made(self) -> dict[str, int]:
        made: dict[str, int] = self.node.status()["snapshots"]["layers"]
        return made


@pytest.fixture
def private(lab: Lab) -> Iterator[DockerRegistry]:
    with DockerRegistry(lab.root / "private", htpasswd=HTPASSWD, environment=lab.environment) as registry:
        images.host_python().push(f"{registry.host}/team/python:latest",
                                  options=["--dest-creds", f"{USER}:{PASSWORD}"])  # fmt: skip
        yield registry


def found_in(directory: Path) -> list[str]:
    """Return the files that a secret is in; of those in mounts only what is on disk below."""
    device = directory.stat().st_dev
    found = []
    for root, directories, files in os.walk(directory):
        directories[:] = [name for name in directories if (Path(root) / name).lstat().st_dev == device]
        for path in (Path(root) / name for name in files):
            if path.is_file() and not path.is_symlink() and path.lstat().st_dev == device:
                data = path.read_bytes()
                found += [str(path)] * any(shown in data for shown in SHOWN)
    return found


def run(machine: Private, cri: Cri, name: str) -> None:
    """Run a pod of the image until it has said that it is ready, then remove all."""
    pod = machine.pod(name)
    pod_id = cri.run_pod(pod)
    machine.start(cri, pod_id, pod, name, machine.image.command[0], "-c", SERVE)
    wait_until(lambda: "ready: " in machine.log(name))
    assert len([mount for mount in machine.node.status()["mounts"] if "team/python" in mount["reference"]]) == 1
    assert [row for row in machine.node.status()["fallbacks"] if row["kind"] == "layer not lazy"] == []
    machine.remove_all(cri, pod_id)


def test_a_pull_secret_makes_a_private_image_lazy_and_shows_nowhere(
    lab: Lab, registry: DockerRegistry, private: DockerRegistry
) -> None:
    socket = lab.root / "containerd" / "sock"
    machine = Private(lab, registry, private, f'[cri]\nenabled = true\ncontainerd = "{socket}"')
    assert machine.cri_socket.stat().st_mode & 0o777 == 0o600
    pod = machine.pod("one")
    with Cri(machine.containerd.socket, machine.cri_socket) as cri:
        assert cri.images() == []
        for auth in (None, {**SECRET, "password": "another"}):
            with pytest.raises(LabFailed, match=r"PullImageRequest: [A-Z]+: .*(401|authoriz)"):
                cri.pull(machine.reference, pod, auth)
        assert machine.layers_made() == {"lazy": 0, "ordinary": 0}

        pulled = cri.pull(machine.reference, pod, SECRET)
        assert machine.layers_made() == {"lazy": len(machine.image.layers), "ordinary": 0}
        assert cri.image(machine.reference).id == pulled
        assert cri.image_filesystem().fs_id.mountpoint
        run(machine, cri, "one")

        machine.wait_until_nothing_is_left()
        machine.containerd.stop()
        with pytest.raises(LabFailed, match=r"ListImagesRequest: UNAVAILABLE: dadi-node cannot reach containerd at"):
            cri.images()
        machine.containerd = containerd_of(lab, machine)
        wait_until(lambda: answers(cri))
        with pytest.raises(LabFailed, match="PullImageRequest"):
            cri.pull(machine.reference, pod)
        encoded = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        assert cri.pull(machine.reference, pod, {"auth": encoded, "server_address": f"http://{private.host}"}) == pulled
        assert machine.layers_made()["ordinary"] == 0

    status = repr(machine.node.status())
    machine.node.stop()
    assert PASSWORD not in status
    assert found_in(lab.root) == []
    (lab.root / "found").write_text(f"x{PASSWORD}x")
    assert found_in(lab.root) == [str(lab.root / "found")], "else it would not be found"


def answers(cri: Cri) -> bool:
    try:
        cri.images()
    except LabFailed:
        return False
    return True


PROVIDER = """#!/bin/sh
question=$(cat)
echo "$question" >> {directory}/asked
case "$question" in *'"image":"{image}"'*) ;; *) exit 1;; esac
cat {directory}/answer
"""
CONFIG = """
apiVersion: kubelet.config.k8s.io/v1
kind: CredentialProviderConfig
providers:
  - name: lab-provider
    apiVersion: credentialprovider.kubelet.k8s.io/v1
    matchImages: ["{host}/team"]
    defaultCacheDuration: 1h
"""


def test_a_credential_provider_makes_a_private_image_lazy(
    lab: Lab, registry: DockerRegistry, private: DockerRegistry, tmp_path: Path
) -> None:
    (tmp_path / "providers.yaml").write_text(CONFIG.format(host=private.host))
    program = tmp_path / "lab-provider"
    program.write_text(PROVIDER.format(directory=tmp_path, image=f"{private.host}/team/python"))
    program.chmod(0o755)
    answer = {"kind": "CredentialProviderResponse", "apiVersion": "credentialprovider.kubelet.k8s.io/v1",
              "cacheKeyType": "Registry", "auth": {private.host: SECRET}}  # fmt: skip
    (tmp_path / "answer").write_text(json.dumps(answer))
    machine = Private(lab, registry, private, f'[credentials]\nproviders = "{tmp_path / "providers.yaml"}"\n'
                                              f'provider_directory = "{tmp_path}"')  # fmt: skip
    assert not machine.cri_socket.exists(), "off, unless it is asked for"
    with Cri(machine.containerd.socket) as cri:
        cri.pull(machine.reference, machine.pod("one"), SECRET)
        assert machine.layers_made() == {"lazy": len(machine.image.layers), "ordinary": 0}
        run(machine, cri, "one")
    assert len((tmp_path / "asked").read_text().splitlines()) == 1, "it is asked once"
    machine.node.stop()
    assert found_in(lab.root) == []
