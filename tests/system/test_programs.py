"""The programs as a user runs them: real processes, a real registry, real images, the command line."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.lab import images
from tests.lab.cleanup import Lab, loops
from tests.lab.compare import differences, snapshot_of, unpacked
from tests.lab.network import Network
from tests.lab.oci_layout import Image
from tests.lab.processes import LabFailed, Node, Registry, Superpeer
from tests.lab.starts import program
from tests.lab.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.programs("docker-registry", "skopeo", "umoci", "ip")]

CACHE = Path(__file__).parents[2] / ".cache" / "lab"
QUICK = "[backfill]\nquiet = 0\n"
NEVER = "[backfill]\nenabled = false\n"


@pytest.fixture(scope="module")
def image() -> Image:
    return images.host_python(CACHE)


@dataclass
class Site:
    """A registry and a superpeer, each on a host of its own, for all tests; a node's host and names for each test."""

    lab: Lab
    network: Network
    registry: Registry
    superpeer: Superpeer
    reference: str
    name: str = ""
    nodes: list[Node] = field(default_factory=list)

    def node(self, sections: str = "", **options: str) -> Node:
        """Start the test's node, or start it again on what it left."""
        host = self.network.hosts.get(self.name) or self.network.host(self.name)
        node = Node(self.lab, host, [self.superpeer.url], name=self.name, sections=sections, **options)
        self.nodes.append(node)
        return node

    def directory(self) -> Path:
        directory = self.lab.root / f"{self.name}-mnt"
        directory.mkdir()
        return directory


@pytest.fixture
def site(world: Site) -> Iterator[Site]:
    site = replace(world, name=f"node{len(world.network.hosts)}", nodes=[])
    yield site
    for node in site.nodes:
        if node.alive:
            node.stop()


@pytest.fixture(scope="module")
def world(image: Image) -> Iterator[Site]:
    with Lab("programs") as lab:
        network = Network(lab)
        registry = Registry(lab, network.host("registry"))
        reference = f"{registry.address}/team/app:1"
        image.push(reference, prefix=network.hosts["registry"].prefix)
        superpeer = Superpeer(lab, network.host("superpeer"), [registry.address])
        yield Site(lab, network, registry, superpeer, reference)


def state(node: Node) -> str:
    return node.status()["mounts"][0]["state"]


def test_a_real_image_starts_lazily_equals_its_unpack_and_becomes_local(site: Site, image: Image) -> None:
    node, target = site.node(QUICK), site.directory()
    said = node.dadi("mount", site.reference, str(target))
    assert f"is mounted at {target}" in said
    with program(image, target) as line:
        assert line == image.facts["first_line"]
    ordinary = unpacked(image, site.lab.root / "unpacked")
    assert differences(snapshot_of(ordinary), snapshot_of(target), untimed=(b"",)) == []
    wait_until(lambda: state(node) == "local")
    shown = node.dadi("status", "--devices")
    assert "local" in shown
    assert "100 %" in shown
    node.kill()
    Path("/proc/sys/vm/drop_caches").write_text("3")
    with program(image, target) as line:
        assert line == image.facts["first_line"], "the daemon is no longer in the read path"
    again = site.node()
    assert state(again) == "local"
    again.dadi("umount", str(target))
    assert os.listdir(target) == []


def test_a_node_that_was_killed_goes_on_with_its_lazy_images_and_keeps_their_chunks(site: Site, image: Image) -> None:
    node, target = site.node(NEVER), site.directory()
    node.dadi("mount", site.reference, str(target))
    with program(image, target):
        pass
    before = node.status()["sources"][0]["bytes"]
    node.kill()
    again = site.node(NEVER)
    assert again.status()["taken_over"]["mounts"] == 1
    assert state(again) == "lazy"
    with program(image, target) as line:
        assert line == image.facts["first_line"]
    assert before > 1_000_000
    assert again.status()["sources"][0]["bytes"] < before / 4, "what was here was verified and not fetched again"


def test_inspect_tells_where_each_file_is(site: Site, image: Image) -> None:
    node = site.node()
    told = json.loads(node.dadi("inspect", site.reference, "--files", "--json"))
    assert [layer["diff_id"] for layer in told["layers"]] == [layer.diff_id for layer in image.layers]
    assert sum(layer["compressed_bytes"] for layer in told["layers"]) == told["compressed_bytes"]
    files = {entry["path"]: entry for layer in told["layers"] for entry in layer["entries"]}
    main = files["app/main.py"]
    assert main["offset"] % 512 == 0
    assert main["length"] == main["size"] > 0
    shown = node.dadi("inspect", site.reference, "--layers", "--files")
    assert "app/main.py" in shown
    assert str(main["offset"]) in shown


def test_status_as_json_has_what_the_text_has(site: Site) -> None:
    node, target = site.node(NEVER), site.directory()
    assert "no image is mounted" in node.dadi("status")
    row = json.loads(node.dadi("mount", "--json", site.reference, str(target)))
    told = json.loads(node.dadi("status", "--json"))
    assert told["mounts"][0]["directory"] == row["directory"] == str(target)
    assert told["mounts"][0]["bytes_present"] < told["mounts"][0]["bytes"]
    assert {"reads", "sources", "bytes", "store", "fallbacks", "backfill"} <= set(told)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mount", "REGISTRY/team/none:1", "DIR"], "team/none"),
        (["mount", "elsewhere.example/team/app:1", "DIR"], "not among the allowed ones"),
        (["mount", "not a reference!", "DIR"], "not a reference"),
        (["mount", "REFERENCE", "DIR/nowhere"], "create it first"),
        (["mount", "REFERENCE", "DIR", "--platform", "linux/s390x"], "s390x"),
        (["umount", "DIR"], "no image is mounted at"),
        (["inspect", "REGISTRY/team/app:none"], "none"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_exit_status_1(site: Site, arguments: list[str], said: str) -> None:
    node, target = site.node(), site.directory()
    words = {"REGISTRY": site.registry.address, "REFERENCE": site.reference, "DIR": str(target)}
    for word, value in words.items():
        arguments = [argument.replace(word, value) for argument in arguments]
    with pytest.raises(LabFailed) as error:
        node.dadi(*arguments)
    message = str(error.value).split("\nlog of ")[0]
    assert said in message
    assert "Traceback" not in message
    assert node.status()["mounts"] == []


def test_a_disk_that_is_full_is_said_and_reads_go_on(site: Site, image: Image) -> None:
    small = site.lab.root / site.name / "state"
    small.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", small], check=True)
    node, target = site.node(QUICK), site.directory()
    node.dadi("mount", site.reference, str(target))
    with program(image, target) as line:
        assert line == image.facts["first_line"]
    kinds = [row["kind"] for row in node.status()["fallbacks"]]
    assert "not kept: store full" in kinds
    assert "not kept: store full" in node.dadi("status")
    node.dadi("umount", str(target))
    node.stop()


def daemon(name: str, *arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", name, *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False, env=environment)


def test_a_port_that_is_taken_is_said(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        (tmp_path / "s.toml").write_text(f'listen = "{address}"\nstate = "{tmp_path}/s"\n')
        done = daemon("superpeer", "--config", str(tmp_path / "s.toml"))
    assert done.returncode == 1
    assert f"cannot listen on {address}" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("name", ["superpeer", "dadi.node"])
def test_a_daemon_refuses_a_configuration_that_makes_no_sense(tmp_path: Path, name: str) -> None:
    (tmp_path / "bad.toml").write_text("nonsense = 1\n")
    done = daemon(name, "--config", str(tmp_path / "bad.toml"))
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "nonsense" in done.stderr
    printed = daemon(name, "--print-default-config")
    assert printed.returncode == 0
    (tmp_path / "good.toml").write_text(printed.stdout)
    assert "registry" in printed.stdout


def test_two_nodes_cannot_share_a_state_directory(site: Site) -> None:
    node = site.node()
    file = site.lab.root / "second.toml"
    file.write_text(f'state = "{node.state}"\nrun = "{site.lab.root}/elsewhere"\n')
    done = daemon("dadi.node", "--config", str(file), environment=site.lab.environment)
    assert done.returncode == 1
    assert "used by another process" in done.stderr


def test_no_node_is_said_with_what_to_do(tmp_path: Path) -> None:
    done = daemon("dadi.cli", "status", "--node-socket", str(tmp_path / "none.sock"))
    assert done.returncode == 1
    assert "no node answers on" in done.stderr
    assert "start dadi-node" in done.stderr


def test_doctor_finds_this_machine_fit() -> None:
    done = daemon("dadi.cli", "doctor", "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0, done.stdout
    assert all(row["ok"] for row in rows)
    assert {"name", "ok", "detail", "hint"} == set(rows[0])


def test_a_stop_that_is_to_unmount_leaves_no_mount_and_no_process(site: Site) -> None:
    node, target = site.node(NEVER, options="unmount_on_stop = true"), site.directory()
    node.dadi("mount", site.reference, str(target))
    node.signal(signal.SIGTERM)
    wait_until(lambda: not node.alive)
    mounts = Path("/proc/mounts").read_text()
    assert str(target) not in mounts
    assert str(node.directory) not in mounts
    assert [backing for backing in loops().values() if str(node.directory) in backing] == []
    wait_until(lambda: not (node.socket.parent / "keeper.sock").exists())
