"""The snapshotter under Debian's containerd: pull, run, write, exec, commit, remove, restarts, garbage collection.

containerd's own overlayfs passes the contract of tests/contracts/snapshots.py here too, so that the contract asks for
containerd's behaviour; ours passes it once more behind containerd's metadata. No FUSE and no registry of ours: images
are imported, or lie in a directory (tests/fakes/lazy_images.py). Nothing here waits without a time-out.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import grpc
import pytest

from dadi.snapshotter.proto import snapshots_pb2 as pb
from tests.contracts.snapshots import (
    Client,
    Code,
    SnapshotFilesContract,
    SnapshotsContract,
    fails,
    mounted,
    tree,
)
from tests.fakes.lazy_images import chain_ids, labels_for
from tests.lab import images
from tests.lab.cleanup import Lab, clean_lab
from tests.lab.containerd import Containerd, remove_cgroups
from tests.lab.containers import WAIT
from tests.lab.processes import Process
from tests.lab.registry import DockerRegistry
from tests.lab.waiting import wait_until

pytestmark = [pytest.mark.root, pytest.mark.programs("containerd", "ctr", "runc", "docker-registry", "skopeo")]

TIMEOUT = 60
SERVER = """
import asyncio, signal, sys
from pathlib import Path
from dadi import log
from dadi.fallbacks import Fallbacks
from dadi.snapshotter import service
from dadi.snapshotter.snapshots import Snapshots
from tests.fakes.lazy_images import FakeImages

async def main(directory):
    log.configure("info", json=True)
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    images = FakeImages(directory / "images")
    images.add("lazy.example/app:1", [{"a/file": b"lower", "a/gone": b"x"}, {"a/gone": None, "b": b"b"}, {"c": b"c"}])
    snapshots = await Snapshots.open(directory / "root", images, Fallbacks(), keep_idle=0)
    serving = await service.serve(directory / "sock", snapshots)
    await stop.wait()
    await serving.stop()
    await snapshots.close()

asyncio.run(main(Path(sys.argv[1])))
"""
LAZY = "lazy.example/app:1"
LAYERS = [{"a/file": b"lower", "a/gone": b"x"}, {"a/gone": None, "b": b"b"}, {"c": b"c"}]


class Snapshotter(Process):
    """Ours, in a process of its own; its directory is kept when it is started again."""

    def __init__(self, lab: Lab) -> None:
        self.directory = lab.root / "dadi"
        self.directory.mkdir(exist_ok=True)
        super().__init__(lab, "snapshotter", [sys.executable, "-c", SERVER, str(self.directory)])
        self.wait_until(self._answers)

    def _answers(self) -> bool:
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(self.directory / "sock"))
        return True


def containerd(lab: Lab) -> Containerd:
    """Start containerd with ours as the proxy plugin `dadi`."""
    return Containerd(lab, snapshotter=lab.root / "dadi/sock", tidy=True)


class Machine:
    """containerd and ours, and a namespace for each test: containerd keeps them apart."""

    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.ours = Snapshotter(lab)
        self.containerd = containerd(lab)
        self._namespaces = itertools.count()
        self.namespace = ""

    def new_namespace(self) -> None:
        self.namespace = f"dadi-{os.getpid()}-{next(self._namespaces)}"

    def ctr(self, *arguments: str) -> str:
        """Run ctr in the test's namespace; return what it printed."""
        return self.containerd.ctr("--namespace", self.namespace, *arguments).stdout

    @contextlib.asynccontextmanager
    async def client(self, snapshotter: str = "dadi") -> AsyncIterator[Client]:
        """A client of containerd's own snapshot service, as nerdctl and CRI are."""
        async with grpc.aio.insecure_channel(f"unix:{self.containerd.socket}") as channel:
            yield Client(channel, snapshotter, self.namespace)

    def snapshots(self) -> dict[str, str]:
        """Return what `ctr snapshots ls` prints: key → kind."""
        lines = self.ctr("snapshots", "--snapshotter", "dadi", "ls").splitlines()[1:]
        return {line.split()[0]: line.split()[-1] for line in lines}

    def run(self, reference: str, name: str, *command: str) -> str:
        """Run a container; with a command, in the foreground; without one it waits."""
        if command:
            return self.containerd.run(reference, name, command, "dadi", namespace=self.namespace)
        waiting = (images.host_python().command[0], "-c", WAIT)
        self.containerd.start(reference, name, waiting, "dadi", namespace=self.namespace)
        return ""

    def start_ours_again(self) -> None:
        """Start ours anew, and wait until containerd has noticed: it dials again every 1 to 3 seconds."""
        self.ours = Snapshotter(self.lab)
        command = ("--namespace", self.namespace, "snapshots", "--snapshotter", "dadi", "ls")
        self.ours.wait_until(lambda: self.containerd.ctr(*command, check=False).returncode == 0)

    def end(self, name: str) -> None:
        """End a container's task; its snapshot stays."""
        self.ctr("task", "rm", "--force", name)

    def left(self) -> list[str]:
        """Return the directories that ours has, and the images that are mounted."""
        found = []
        for directory in (self.ours.directory / "root/snapshots", self.ours.directory / "images"):
            if directory.exists():
                found += sorted(path.name for path in directory.iterdir())
        return found

    def wait_until_nothing_is_left(self) -> None:
        """Have containerd collect its garbage, and wait until ours has followed."""
        # Deleting a lease is how one asks for it: a removal while a collection runs does not always start the next one.
        self.ctr("leases", "create", "--id", "collect")
        self.ctr("leases", "delete", "--sync", "collect")
        with contextlib.suppress(TimeoutError):
            wait_until(lambda: not self.left())
        assert self.left() == []


@pytest.fixture(scope="module")
def lab() -> Iterator[Lab]:
    with clean_lab("s") as lab:
        yield lab


@pytest.fixture(scope="module")
def shared(lab: Lab) -> Machine:
    return Machine(lab)


@pytest.fixture
def machine(shared: Machine) -> Iterator[Machine]:
    shared.new_namespace()
    namespace = shared.namespace
    yield shared
    remove_cgroups(namespace)
    assert not list(Path("/run/containerd").glob(f"*/{namespace}"))


@pytest.fixture(scope="module")
def reference(lab: Lab) -> Iterator[str]:
    """An ordinary image in a registry on this machine: three layers, with whiteouts."""
    with DockerRegistry(lab.root / "registry", environment=lab.environment) as registry:
        reference = f"{registry.host}/host/python:latest"
        images.host_python().push(reference)
        yield reference


class Behind:
    """The contract through containerd."""

    snapshotter = ""

    @pytest.fixture
    async def client(self, machine: Machine) -> AsyncIterator[Client]:
        async with machine.client(self.snapshotter) as client:
            yield client
            await remove_all(client)


class TestOverlayfs(Behind, SnapshotsContract):
    """containerd's own."""

    snapshotter = "overlayfs"


class TestOverlayfsFiles(Behind, SnapshotFilesContract):
    """containerd's own."""

    snapshotter = "overlayfs"


class TestOurs(Behind, SnapshotsContract):
    """Ours, behind containerd's metadata."""

    snapshotter = "dadi"


class TestOursFiles(Behind, SnapshotFilesContract):
    """Ours, behind containerd's metadata."""

    snapshotter = "dadi"


def test_pull_run_write_exec_commit_remove(machine: Machine, reference: str) -> None:
    machine.ctr("image", "pull", "--plain-http", "--snapshotter", "dadi", reference)
    layers = images.host_python().layers
    assert list(machine.snapshots().values()) == ["Committed"] * len(layers)
    refused = [event for event in machine.ours.events() if event.get("kind") == "layer not lazy"]
    assert "the client does not ask for lazy layers" in refused[0]["why"], "ctr of 1.x does not"

    said = machine.run(reference, "once", "sh", "-c", "cat /etc/passwd; ls /var/log /etc")
    assert "/app" in said
    assert "second" in said
    assert "first" not in said, "hidden by the layer above"
    assert "old.conf" not in said, "deleted by the layer above"

    machine.run(reference, "c1")
    machine.run(reference, "c2")
    # By their exit status: of what a short program prints ctr may miss the end.
    machine.ctr("task", "exec", "--exec-id", "e1", "c1", "sh", "-c", 'test "$(cat /tmp/f)" = written')
    machine.ctr("task", "exec", "--exec-id", "e2", "c1", "sh", "-c", "echo more > /tmp/g; echo new > /etc/passwd")
    apart = 'test ! -e /tmp/g && test -s /etc/passwd && test "$(cat /etc/passwd)" != new'
    machine.ctr("task", "exec", "--exec-id", "e3", "c2", "sh", "-c", apart)
    usage = machine.ctr("snapshots", "--snapshotter", "dadi", "usage", "c1")
    assert "c1" in usage

    machine.end("c1")
    machine.ctr("snapshots", "--snapshotter", "dadi", "commit", "mine", "c1")
    (machine.lab.root / "out").mkdir(exist_ok=True)
    machine.ctr("snapshots", "--snapshotter", "dadi", "view", "look", "mine")
    command = machine.ctr("snapshots", "--snapshotter", "dadi", "mounts", str(machine.lab.root / "out"), "look")
    subprocess.run(["sh", "-c", command], check=True, timeout=TIMEOUT)
    try:
        assert (machine.lab.root / "out/etc/passwd").read_text() == "new\n"
        assert (machine.lab.root / "out/tmp/g").read_text() == "more\n"
        assert (machine.lab.root / "out/var/log/second").exists()
    finally:
        subprocess.run(["umount", machine.lab.root / "out"], check=True, timeout=TIMEOUT)
    for name in ("look", "mine"):
        machine.ctr("snapshots", "--snapshotter", "dadi", "rm", name)
    machine.end("c2")
    for name in ("c1", "c2"):
        machine.ctr("container", "rm", name)
    machine.ctr("image", "rm", "--sync", reference)
    machine.wait_until_nothing_is_left()
    assert machine.snapshots() == {}


def test_containers_live_through_restarts_of_ours_and_of_containerd(machine: Machine, reference: str) -> None:
    machine.ctr("image", "pull", "--plain-http", "--snapshotter", "dadi", reference)
    machine.run(reference, "c1")
    before = machine.snapshots()

    assert machine.ours.stop() == 0
    machine.ctr("task", "exec", "--exec-id", "e1", "c1", "sh", "-c", 'test "$(cat /tmp/f)" = written')  # without us
    machine.start_ours_again()
    assert machine.snapshots() == before
    assert machine.run(reference, "c2", "cat", "/var/log/second") == "in a fresh directory\n"

    machine.ours.kill()
    machine.start_ours_again()
    assert machine.run(reference, "c3", "cat", "/var/log/second") == "in a fresh directory\n"

    machine.containerd.stop()
    machine.containerd = containerd(machine.lab)
    machine.ctr("task", "exec", "--exec-id", "e2", "c1", "sh", "-c", 'test "$(cat /tmp/f)" = written')
    assert machine.snapshots() == before
    assert machine.run(reference, "c4", "cat", "/var/log/second") == "in a fresh directory\n"

    machine.end("c1")
    machine.ctr("container", "rm", "c1")
    machine.ctr("image", "rm", "--sync", reference)
    machine.wait_until_nothing_is_left()


async def pull_lazily(client: Client) -> list[str]:
    """Prepare the layers of the lazy image as a client with remote snapshots does; return the chain IDs."""
    chain = chain_ids(LAYERS)
    for number, chain_id in enumerate(chain):
        parent = chain[number - 1] if number else ""
        with fails(Code.ALREADY_EXISTS):
            await client.prepare(f"extract-{number} {chain_id}", parent, labels_for(chain_id, LAZY))
        info = await client.stat(chain_id)
        assert (info.kind, info.parent) == (pb.COMMITTED, parent)
    return chain


async def remove_all(client: Client) -> None:
    parents = {info.name: info.parent for info in await client.list()}

    def depth(name: str) -> int:
        return 1 + depth(parents[name]) if name in parents else 0

    for name in sorted(parents, key=depth, reverse=True):
        await client.remove(name)


async def test_containerd_takes_lazy_layers_for_layers_that_are_there(machine: Machine, tmp_path: Path) -> None:
    async with machine.client() as client:
        chain = await pull_lazily(client)
        (mount,) = await client.prepare("container", chain[-1])
        (lower,) = [option for option in mount.options if option.startswith("lowerdir=")]
        assert ":" not in lower, "one lower directory for three layers"
        with mounted([mount], tmp_path) as root:
            assert sorted(tree(root)) == ["a", "a/file", "b", "c"]
            (root / "a/file").unlink()
            (root / "own").write_text("own")
        await client.commit("mine", "container")
        with mounted(await client.prepare("on mine", "mine"), tmp_path) as root:
            assert sorted(tree(root)) == ["a", "b", "c", "own"]
        with mounted(await client.view("part", chain[0]), tmp_path) as root:
            assert sorted(tree(root)) == ["a", "a/file", "a/gone"]
        assert len(machine.left()) == 5, "three ordinary snapshots, and two depths of one image"
        first = machine.namespace
        machine.new_namespace()
        async with machine.client() as other:
            assert await pull_lazily(other) == chain
            assert len(await other.list()) == 3
            await remove_all(other)
        machine.namespace = first

        machine.ours.kill()
        machine.start_ours_again()
        with mounted(await client.mounts("on mine"), tmp_path) as root:
            assert sorted(tree(root)) == ["a", "b", "c", "own"]
        await remove_all(client)
    machine.wait_until_nothing_is_left()
