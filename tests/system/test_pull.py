"""`dadi pull` with Debian's containerd and runc and a real node: pull, run, again, not lazy, given up, collected."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dadi.oci import media_types
from dadi.oci.config import RegistryConfig
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from tests.fakes.registry import FakeRegistry, Fault
from tests.lab import images
from tests.lab.cleanup import Lab, clean_lab
from tests.lab.containerd import Containerd, remove_cgroups
from tests.lab.oci_layout import Image
from tests.lab.processes import LabFailed, Node
from tests.lab.registry import DockerRegistry
from tests.lab.services import tar_of
from tests.lab.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.programs("containerd", "ctr", "runc", "docker-registry", "skopeo")]

REPOSITORY = Path(__file__).parents[2]
TIMEOUT = 60
SECOND = ("cat", "/var/log/second")
IN_SECOND = "in a fresh directory\n"
SNAPSHOTTER = "[snapshotter]\nkeep_idle = 0\n"
DADI = ("-m", "dadi.cli")
HASTY = ("-c", "from dadi.cli.main import cli; from dadi.containerd import client; client._DIALS = 0.2; cli()")
"""The same, but a snapshotter that is not there has no ten seconds to come up."""


def dadi(lab: Lab, *arguments: str, check: bool = True,
         program: tuple[str, ...] = DADI) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run the command line."""
    done = subprocess.run(
        [sys.executable, *program, *arguments], capture_output=True, text=True, timeout=TIMEOUT, check=False,
        env={**lab.environment, "PYTHONPATH": str(REPOSITORY)}, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    if check and done.returncode != 0:
        raise LabFailed(f"dadi {' '.join(arguments)}: {done.stderr.strip()}")
    return done


def containerd(lab: Lab, name: str, snapshotter: Path | None, root: Path = Path("/nowhere"), *,
               cri: bool = False) -> Containerd:  # fmt: skip
    """Start containerd, configured with what `dadi containerd-config` prints, or without dadi (no `snapshotter`)."""
    config = ""
    if snapshotter is not None:
        places = ["--socket", str(snapshotter), "--root", str(root)]
        config = dadi(lab, "containerd-config", *places, *(["--cri"] if cri else [])).stdout
    return Containerd(lab, name=name, config=config, tidy=True, cri=cri)


class Machine:
    """A registry, a node and a containerd, and a namespace of containerd for each test.

    The node may not contact other registries: their images cannot be lazy.
    """

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.registry = DockerRegistry(lab.root / "registry", environment=lab.environment)
        self.other = DockerRegistry(lab.root / "other", environment=lab.environment)
        self.registry.start()
        self.other.start()
        host = json.dumps([self.registry.host])
        sections = f"[registry]\nallowed = {host}\nplain_http = {host}\n{SNAPSHOTTER}[backfill]\nenabled = false\n"
        self.node = Node(lab, sections=sections)
        self.containerd = containerd(lab, "c", self.node.socket.parent / "snapshotter.sock", self.node.state)
        self._names = itertools.count()
        self.namespace = ""

    def new_namespace(self) -> None:
        self.namespace = f"dadi-{os.getpid()}-{next(self._names)}"

    def command(self, reference: str) -> list[str]:
        return ["pull", reference, "--namespace", self.namespace, "--plain-http", "--json",
                "--containerd-address", str(self.containerd.socket)]  # fmt: skip

    def pull(self, reference: str, *options: str) -> dict[str, Any]:
        """Pull; return what --json says, and what was said on standard error as "said"."""
        done = dadi(self.lab, *self.command(reference), *options)
        return {**json.loads(done.stdout), "said": done.stderr}

    def ctr(self, *arguments: str) -> str:
        return self.containerd.ctr("--namespace", self.namespace, *arguments).stdout

    def rows(self, *arguments: str) -> list[list[str]]:
        """Return the words of each line that `ctr … ls` prints, without the head."""
        return [line.split() for line in self.ctr(*arguments).splitlines()[1:]]

    def run(self, reference: str, *command: str) -> str:
        return self.containerd.run(reference, "once", command, "dadi", namespace=self.namespace)

    def left(self) -> dict[str, Any]:
        """Return what containerd has in this namespace, and what the node has mounted."""
        found = {
            "content": self.rows("content", "ls"),
            "ingests": self.rows("content", "active"),
            "snapshots": self.rows("snapshots", "--snapshotter", "dadi", "ls"),
            "leases": self.rows("leases", "ls"),
            "mounts": [row["directory"] for row in self.node.status()["mounts"]],
        }
        return {key: value for key, value in found.items() if value}

    def wait_until_nothing_is_left(self) -> None:
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not self.left())
        assert self.left() == {}


@pytest.fixture(scope="module")
def shared() -> Iterator[Machine]:
    with clean_lab("p") as lab:
        machine = Machine(lab)
        yield machine
        machine.registry.stop()
        machine.other.stop()


@pytest.fixture
def machine(shared: Machine) -> Iterator[Machine]:
    shared.new_namespace()
    yield shared
    remove_cgroups(shared.namespace)


@pytest.fixture(scope="module")
def image() -> Image:
    return images.host_python()


@pytest.fixture
def reference(machine: Machine, image: Image) -> str:
    reference = f"{machine.registry.host}/host/python:latest"
    image.push(reference)
    return reference


def labels_of(row: list[str]) -> set[str]:
    return set(row[-1].split(","))


def test_a_lazy_pull_then_a_container_at_once(machine: Machine, image: Image, reference: str) -> None:
    report = machine.pull(reference)
    assert [layer["how"] for layer in report["layers"]] == ["lazy"] * len(image.layers)
    assert (report["name"], report["digest"], report["already"]) == (reference, image.manifest.digest, False)

    content = {row[0]: labels_of(row) for row in machine.rows("content", "ls")}
    config = report["config_digest"]
    assert set(content) == {image.manifest.digest, config}, "no layer"
    source = "containerd.io/distribution.source.127.0.0.1=host/python"
    layers = {f"containerd.io/gc.ref.content.l.{n}={row.blob.digest}" for n, row in enumerate(image.layers)}
    assert content[image.manifest.digest] == {f"containerd.io/gc.ref.content.config={config}", source, *layers}
    assert content[config] == {f"containerd.io/gc.ref.snapshot.dadi={report['chain_id']}", source}
    assert machine.rows("leases", "ls") == []

    assert "ready:" in machine.run(reference)
    assert machine.run(reference, *SECOND) == IN_SECOND
    assert {row[0] for row in machine.rows("content", "ls")} == set(content), "ctr run fetched nothing"

    again = machine.pull(reference)
    assert again["already"]
    assert again | {"seconds": 0, "said": ""} == report | {
        "already": True, "seconds": 0, "said": "",
        "layers": [{**layer, "how": "there already"} for layer in report["layers"]],
    }  # fmt: skip

    machine.ctr("image", "rm", "--sync", reference)
    machine.wait_until_nothing_is_left()


def test_another_namespace_and_two_pulls_at_once(machine: Machine, image: Image, reference: str) -> None:
    machine.pull(reference)
    first = machine.namespace
    machine.new_namespace()
    commands = [[sys.executable, "-m", "dadi.cli", *machine.command(reference)] for _ in range(2)]
    environment = {**machine.lab.environment, "PYTHONPATH": str(REPOSITORY)}
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) for command in commands]
    reports = [json.loads(process.communicate(timeout=TIMEOUT)[0]) for process in both]
    for report in reports:
        assert {layer["how"] for layer in report["layers"]} <= {"lazy", "there already"}
        assert report["downloaded_bytes"] == 0
    assert len(machine.rows("content", "ls")) == 2
    assert machine.run(reference, *SECOND) == IN_SECOND
    machine.ctr("image", "rm", "--sync", reference)
    machine.namespace, second = first, machine.namespace
    assert machine.run(reference, *SECOND) == IN_SECOND, "the other namespace's image has gone, not ours"
    machine.ctr("image", "rm", "--sync", reference)
    machine.wait_until_nothing_is_left()
    machine.namespace = second
    machine.wait_until_nothing_is_left()


def push_index(machine: Machine, name: str, *entries: dict[str, Any]) -> dict[str, Any]:
    """Push an index under a tag; return its descriptor."""
    host = machine.registry.host
    data = json.dumps({"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": list(entries)}).encode()

    async def push() -> str:
        client = RegistryClient(RegistryConfig(allowed=(host,), plain_http=(host,)))
        try:
            pushed = await client.push_manifest(Reference.parse(f"{host}/{name}"), data, media_types.OCI_INDEX)
        finally:
            await client.close()
        return pushed.digest

    return {"mediaType": media_types.OCI_INDEX, "digest": asyncio.run(push()), "size": len(data)}


def entry(image: Image, architecture: str) -> dict[str, Any]:
    return {**image.manifest.json(), "platform": {"os": "linux", "architecture": architecture}}


def test_indexes_within_indexes_are_there_too(machine: Machine, image: Image, tmp_path: Path) -> None:
    other = images.synthetic(tmp_path / "other", layers=1, files=1, size=100)
    for name, one in (("host", image), ("other", other)):
        one.push(f"{machine.registry.host}/app:{name}")
    inner = push_index(machine, "app:inner", entry(other, "s390x"), entry(image, images.ARCHITECTURE))
    top = push_index(machine, "app:1", inner)
    reference = f"{machine.registry.host}/app:1"

    report = machine.pull(reference)
    assert (report["digest"], report["manifest_digest"]) == (top["digest"], image.manifest.digest)
    content = {row[0]: labels_of(row) for row in machine.rows("content", "ls")}
    assert set(content) == {top["digest"], inner["digest"], image.manifest.digest, report["config_digest"]}
    assert f"containerd.io/gc.ref.content.0={inner['digest']}" in content[top["digest"]]
    assert {
        f"containerd.io/gc.ref.content.m.0={other.manifest.digest}",
        f"containerd.io/gc.ref.content.m.1={image.manifest.digest}",
    } <= content[inner["digest"]]
    assert machine.run(reference, *SECOND) == IN_SECOND
    assert machine.pull(reference)["already"]
    machine.ctr("image", "rm", "--sync", reference)
    machine.wait_until_nothing_is_left()


def test_a_tag_that_has_moved(machine: Machine, image: Image, tmp_path: Path) -> None:
    reference = f"{machine.registry.host}/moving/app:1"
    images.synthetic(tmp_path / "old", layers=2, files=2, size=1000).push(reference)
    old = machine.pull(reference)
    image.push(reference)
    new = machine.pull(reference)
    assert not new["already"]
    assert [row[:3:2] for row in machine.rows("image", "ls")] == [[reference, image.manifest.digest]]
    assert machine.run(reference, *SECOND) == IN_SECOND
    machine.ctr("image", "rm", "--sync", reference)
    machine.wait_until_nothing_is_left()
    assert old["digest"] != new["digest"]


def test_an_image_that_cannot_be_lazy_is_unpacked_and_that_is_said(machine: Machine, image: Image) -> None:
    reference = f"{machine.other.host}/host/python:latest"
    image.push(reference)
    report = machine.pull(reference)
    assert [layer["how"] for layer in report["layers"]] == ["not lazy: downloaded and unpacked"] * len(image.layers)
    assert report["said"].count("cannot be lazy: it is downloaded and unpacked") == 1
    assert report["downloaded_bytes"] == sum(layer.blob.size for layer in image.layers)
    content = {row[0]: labels_of(row) for row in machine.rows("content", "ls")}
    for layer in image.layers:
        assert f"containerd.io/uncompressed={layer.diff_id}" in content[layer.blob.digest]
    assert machine.rows("leases", "ls") == []
    said = machine.run(reference, "sh", "-c", "cat /etc/passwd; ls /var/log /etc")
    assert "/app" in said
    assert "second" in said
    assert "first" not in said, "hidden by the layer above"
    assert "old.conf" not in said, "deleted by the layer above"
    assert machine.pull(reference)["already"]
    assert "layer not lazy" in {row["kind"] for row in machine.node.status()["fallbacks"]}

    lazy = f"{machine.registry.host}/host/python:latest"
    image.push(lazy)
    assert {layer["how"] for layer in machine.pull(lazy)["layers"]} == {"there already"}
    for name in (reference, lazy):
        machine.ctr("image", "rm", "--sync", name)
    machine.wait_until_nothing_is_left()


async def test_a_pull_that_is_given_up_leaves_nothing(machine: Machine) -> None:
    async with FakeRegistry() as registry:
        added = registry.add_image("app", "1", [tar_of(a=b"a" * 100_000), tar_of(b=b"b" * 3_000_000)])
        digests = [row["digest"] for row in json.loads(registry.manifests["app", added["digest"]][1])["layers"]]
        stalled = asyncio.Event()
        registry.script(f"/blobs/{digests[1]}", Fault(stall_after=2_500_000, after=stalled.set))
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "dadi.cli", *machine.command(f"{registry.host}/app:1"),
            env={**machine.lab.environment, "PYTHONPATH": str(REPOSITORY)},
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        async with asyncio.timeout(TIMEOUT):
            await stalled.wait()
            while len(await asyncio.to_thread(machine.rows, "snapshots", "--snapshotter", "dadi", "ls")) < 2:
                await asyncio.sleep(0.01)  # the first layer is committed, the second prepared
        assert await asyncio.to_thread(machine.rows, "leases", "ls")
        process.send_signal(signal.SIGTERM)
        async with asyncio.timeout(TIMEOUT):
            await process.communicate()
        assert process.returncode == 128 + signal.SIGTERM
        assert await asyncio.to_thread(machine.left) == {}


@pytest.mark.parametrize("what", ["layer", "diff ID"])
async def test_wrong_bytes_are_not_kept(machine: Machine, what: str) -> None:
    async with FakeRegistry() as registry:
        added = registry.add_image("app", "1", [tar_of(a=b"a" * 10_000), tar_of(b=b"b" * 10_000)])
        manifest = json.loads(registry.manifests["app", added["digest"]][1])
        if what == "layer":
            registry.script(f"/blobs/{manifest['layers'][1]['digest']}", Fault(flip=700), Fault(flip=700))
        else:
            config = json.loads(registry.blobs[manifest["config"]["digest"]])
            config["rootfs"]["diff_ids"][1] = "sha256:" + "0" * 64
            data = json.dumps(config).encode()
            manifest["config"] |= {"digest": registry.add_blob(data), "size": len(data)}
            registry.add_manifest("app", "1", manifest, media_types.OCI_MANIFEST)
        command = machine.command(f"{registry.host}/app:1")
        done = await asyncio.to_thread(dadi, machine.lab, *command, check=False)
        assert done.returncode == 1
        assert "is not what its digest says" in done.stderr if what == "layer" else "the config says" in done.stderr
        assert await asyncio.to_thread(machine.left) == {}


def test_doctor_and_pull_say_what_is_missing(machine: Machine, reference: str) -> None:
    def rows(address: Path) -> dict[str, Any]:
        done = dadi(machine.lab, "doctor", "--json", "--containerd-address", str(address), check=False)
        return {row["name"]: row for row in json.loads(done.stdout)}

    found = rows(machine.containerd.socket)
    assert found["containerd knows dadi"]["ok"]
    assert found["snapshotter's socket"]["ok"]
    assert rows(machine.lab.root / "nothing")["containerd"]["ok"], "a machine without containerd lacks nothing"

    plain = containerd(machine.lab, "plain", None)
    try:
        said = rows(plain.socket)["containerd knows dadi"]
        assert said["ok"], "one may use dadi without containerd"
        assert "`dadi containerd-config` prints" in said["detail"]
        command = ["pull", reference, "--plain-http", "--containerd-address"]
        done = dadi(machine.lab, *command, str(plain.socket), check=False)
        assert done.returncode == 1
        assert "`dadi containerd-config`" in done.stderr
        assert plain.ctr("leases", "ls").stdout.splitlines()[1:] == []
    finally:
        assert plain.stop() == 0
    done = dadi(machine.lab, *command, str(machine.lab.root / "nothing"), check=False)
    assert done.returncode == 1
    assert "is containerd running" in done.stderr


def test_without_the_node_a_pull_fails_and_says_so(machine: Machine, reference: str) -> None:
    silent = containerd(machine.lab, "silent", machine.lab.root / "no.sock")
    try:
        done = dadi(machine.lab, "doctor", "--json", "--containerd-address", str(silent.socket), check=False)
        found = {row["name"]: row for row in json.loads(done.stdout)}
        assert found["containerd knows dadi"]["ok"]
        assert not found["snapshotter's socket"]["ok"]
        command = ["pull", reference, "--plain-http", "--containerd-address", str(silent.socket)]
        done = dadi(machine.lab, *command, check=False, program=HASTY)
        assert done.returncode == 1
        assert "is dadi-node running?" in done.stderr
    finally:
        assert silent.stop() == 0


async def cri(containerd: Containerd, method: str) -> bytes:
    """Call a method of CRI's image service that takes an empty message; return the answer, undecoded."""
    async with grpc.aio.insecure_channel(f"unix:{containerd.socket}") as channel:
        return await channel.unary_unary(f"/runtime.v1.ImageService/{method}")(b"", timeout=TIMEOUT)


async def test_kubernetes_sees_what_was_pulled_for_it(machine: Machine, reference: str) -> None:
    lab, node = machine.lab, machine.node
    snapshotter = node.socket.parent / "snapshotter.sock"
    served = await asyncio.to_thread(containerd, lab, "cri", snapshotter, node.state, cri=True)
    command = ["pull", reference, "--plain-http", "--namespace", "k8s.io", "--containerd-address"]
    await asyncio.to_thread(dadi, lab, *command, str(served.socket))
    async with asyncio.timeout(TIMEOUT):
        while reference.encode() not in await cri(served, "ListImages"):
            await asyncio.sleep(0.02)  # it learns of it by an event
    doctor = ["doctor", "--json", "--containerd-address", str(served.socket)]
    done = await asyncio.to_thread(dadi, lab, *doctor, check=False)
    (row,) = [row for row in json.loads(done.stdout) if "CRI" in row["name"]]
    assert (row["ok"], row["detail"]) == (True, "yes, with dadi")
    await asyncio.to_thread(served.stop)
