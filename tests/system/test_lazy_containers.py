"""Containers by Debian's containerd and runc on lazily pulled images: the real node, registry, FUSE, EROFS.

What lives here: the node as containerd's snapshotter, from `dadi pull` to nothing being left. What never does: the
snapshotter's own semantics (tests/system/test_snapshotter_containerd.py). Nothing here waits without a time-out.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from tests.lab.cleanup import Lab
from tests.lab.containers import Machine, containerd_lab, containerd_of, registry_with_image
from tests.lab.registry import DockerRegistry
from tests.lab.waiting import wait_until

pytestmark = [
    pytest.mark.root,
    pytest.mark.programs("containerd", "ctr", "runc", "docker-registry", "skopeo"),
    pytest.mark.timeout(240),
]
TIMEOUT = 60
READ_ALL = """
import hashlib, os, time
files = sorted(os.path.join(d, n) for d, _, ns in os.walk(os.path.dirname(os.__file__)) for n in ns
               if not n.endswith(".pyc"))
PROGRESS = os.open("/tmp/progress", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
while True:
    digest = hashlib.sha256()
    for name in files:
        try:
            with open(name, "rb", 0) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                digest.update(file.read())
        except OSError as error:
            open("/tmp/failed", "a").write(f"{name}: {error}\\n")
        os.write(PROGRESS, b".")
        time.sleep(0.002)
    open("/tmp/rounds", "a").write(f"{len(files)} {digest.hexdigest()}\\n")
"""


@pytest.fixture
def lab() -> Iterator[Lab]:
    with containerd_lab() as lab:
        yield lab


@pytest.fixture
def registry(lab: Lab) -> Iterator[DockerRegistry]:
    with registry_with_image(lab) as registry:
        yield registry


def test_containers_run_from_a_lazily_pulled_image_and_nothing_is_left_of_it(
    lab: Lab, registry: DockerRegistry
) -> None:
    machine = Machine(lab, registry, backfill=False)
    told = json.loads(machine.pull())
    assert {layer["how"] for layer in told["layers"]} == {"lazy"}
    assert machine.node.status()["snapshots"]["layers"] == {"lazy": len(machine.image.layers), "ordinary": 0}
    assert machine.mounts() == [], "nothing runs yet"

    said = machine.run("once", "sh", "-c", "cat /etc/passwd; ls /var/log /etc")
    assert "/app" in said
    assert "second" in said
    assert "first" not in said, "hidden by the layer above"
    assert "old.conf" not in said, "deleted by the layer above"

    names = [f"c{number}" for number in range(5)]
    for name in names:
        machine.run(name)
    assert len(machine.mounts()) == 1, "one EROFS for all containers, whatever the number of layers"
    mounts = machine.node.status()["mounts"]
    assert [mount["state"] for mount in mounts] == ["lazy"]
    assert mounts[0]["bytes_present"] < mounts[0]["bytes"]

    change = "import os; open('/etc/passwd', 'w').write('new\\n'); [os.unlink('/app/' + n) for n in os.listdir('/app')]"
    machine.containerd.ctr("task", "exec", "--exec-id", "e1", "c0", machine.image.command[0], "-c", change)
    # By their exit status: of what a short program prints ctr may miss the end.
    machine.check("c1", "assert open('/tmp/f').read() == 'written'")
    machine.check("c1", "assert 'new' not in open('/etc/passwd').read()")

    # An ordinary layer on top of lazy ones: what was deleted stays deleted.
    machine.containerd.ctr("task", "rm", "--force", "c0")
    machine.containerd.ctr("snapshots", "--snapshotter", "dadi", "commit", "mine", "c0")
    (lab.root / "out").mkdir()
    machine.containerd.ctr("snapshots", "--snapshotter", "dadi", "view", "look", "mine")
    command = machine.containerd.ctr("snapshots", "--snapshotter", "dadi", "mounts", str(lab.root / "out"), "look")
    subprocess.run(["sh", "-c", command.stdout], check=True, timeout=TIMEOUT)
    try:
        assert (lab.root / "out/etc/passwd").read_text() == "new\n"
        assert list((lab.root / "out/app").iterdir()) == []
        assert (lab.root / "out/var/log/second").exists()
    finally:
        subprocess.run(["umount", lab.root / "out"], check=True, timeout=TIMEOUT)
    for name in ("look", "mine"):
        machine.containerd.ctr("snapshots", "--snapshotter", "dadi", "rm", name)
    machine.containerd.ctr("container", "rm", "c0")
    for name in names[1:]:
        machine.end(name)

    machine.remove_image()
    wait_until(lambda: machine.mounts() == [])
    wait_until(lambda: list((machine.node.state / "images").iterdir()) == [])
    status = machine.node.status()
    assert status["mounts"] == []
    assert list((machine.node.state / "snapshotter/images").iterdir()) == []
    assert list((machine.node.state / "snapshotter/snapshots").iterdir()) == []
    assert list((machine.node.state / "mounts").iterdir()) == []
    assert [row for row in status["fallbacks"] if row["kind"] == "layer not lazy"] == []


def test_local_images_and_their_containers_live_through_restarts_without_the_registry(
    lab: Lab, registry: DockerRegistry
) -> None:
    machine = Machine(lab, registry)
    machine.pull()
    machine.run("c1")
    wait_until(lambda: [mount["state"] for mount in machine.node.status()["mounts"]] == ["local"])
    before = machine.mounts()
    registry.stop()

    assert machine.node.stop() == 0
    assert machine.containerd.ctr("task", "exec", "--exec-id", "e1", "c1", "cat", "/var/log/second").returncode == 0
    machine.start_node_again()
    assert machine.mounts() == before, "found again, not made twice"
    assert machine.run("c2", "cat", "/var/log/second") == "in a fresh directory\n"

    machine.node.kill()
    machine.check("c1", "assert open('/tmp/f').read() == 'written'")
    machine.start_node_again()
    assert machine.mounts() == before
    machine.containerd.stop()
    machine.containerd = containerd_of(lab, machine.node.socket.parent / "snapshotter.sock")
    machine.check("c1", "assert open('/tmp/f').read() == 'written'")
    machine.end("c1")

    # As after a reboot: nothing is mounted, the bytes are here, the registry is not.
    machine.node.stop()
    for directory in machine.mounts():
        subprocess.run(["umount", directory], check=True, timeout=TIMEOUT)
    machine.start_node_again()
    assert machine.run("c3", "cat", "/var/log/second") == "in a fresh directory\n"
    machine.remove_image()
    wait_until(lambda: machine.mounts() == [])


def test_a_container_on_a_lazy_image_does_not_notice_that_the_node_stops_and_is_killed(
    lab: Lab, registry: DockerRegistry
) -> None:
    machine = Machine(lab, registry, backfill=False)
    machine.pull()
    machine.run("c1", program=READ_ALL)

    def wrote(name: str) -> str:
        found = list((machine.node.state / "snapshotter/snapshots").glob(f"*/fs/tmp/{name}"))
        return found[0].read_text() if found else ""

    def goes_on(files: int = 20) -> None:
        before = len(wrote("progress"))
        wait_until(lambda: len(wrote("progress")) > before + files)

    goes_on()
    mounts = machine.mounts()
    assert [mount["state"] for mount in machine.node.status()["mounts"]] == ["lazy"]
    for how in ("stop", "kill", "stop", "kill"):
        if how == "stop":
            assert machine.node.stop() == 0
        else:
            machine.node.signal(signal.SIGKILL)
        time.sleep(0.3)  # the container's reads find nobody
        machine.start_node_again()
        goes_on()
        assert machine.mounts() == mounts, "not unmounted, not made twice"
        status = machine.node.status()
        assert status["taken_over"]["mounts"] == 1
        assert [mount["state"] for mount in status["mounts"]] == ["lazy"]
        assert machine.containerd.ctr("task", "exec", "--exec-id", f"e{time.time()}", "c1", "ls", "/").returncode == 0
    wait_until(lambda: wrote("rounds").count("\n") >= 2)
    assert wrote("failed") == ""
    assert len(set(wrote("rounds").splitlines())) == 1, "the same bytes, before, after and in between"
    machine.end("c1")
    machine.remove_image()
    wait_until(lambda: machine.mounts() == [])
    assert machine.node.stop() == 0
