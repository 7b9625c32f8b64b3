"""The lab itself: networks as shaped as they say, and nothing left of it, whatever ended it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.lab import images
from tests.lab.cleanup import Lab, leak_check, loops, mounts_below, signals_as_exceptions, sweep
from tests.lab.network import Network
from tests.lab.processes import LabFailed, Process, Registry

pytestmark = [pytest.mark.root, pytest.mark.programs("ip", "tc", "nsenter", "unshare", "losetup")]

MESS = """
import os, signal, subprocess, sys, time
from pathlib import Path
from tests.lab.cleanup import Lab, signals_as_exceptions
from tests.lab.network import Network
from tests.lab.processes import Process

with signals_as_exceptions(), Lab("mess", Path(sys.argv[1]), patience=0.3) as lab:
    host = Network(lab).host("a", "100mbit")
    Process(lab, "stubborn", ["sh", "-c", "trap '' TERM; while :; do sleep 1; done"], host=host)
    (lab.root / "m").mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "none", lab.root / "m"], check=True)
    (lab.root / "m/disk").write_bytes(bytes(1 << 20))
    subprocess.run(["losetup", "-f", lab.root / "m/disk"], check=True)
    print("made", flush=True)
    time.sleep(60)
"""


def make_a_mess(base: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", MESS, str(base)], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "made\n"
    assert [kind for _, kind in mounts_below(base)].count("nsfs") == 2
    assert any(str(base) in backing for backing in loops().values())
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_nothing_is_left_when_a_signal_ends_it(tmp_path: Path, number: signal.Signals) -> None:
    with leak_check(tmp_path) as leaks:
        process = make_a_mess(tmp_path)
        process.send_signal(number)
        process.communicate(timeout=20)
    assert process.returncode != 0
    assert leaks.found == []


def test_what_a_killed_one_leaves_is_seen_and_swept(tmp_path: Path) -> None:
    with leak_check(tmp_path) as leaks:
        with leak_check(tmp_path, patience=0) as before_sweep:
            process = make_a_mess(tmp_path)
            process.kill()
            process.communicate()
        kinds = {line.split(" ")[0] for line in before_sweep.found}
        assert kinds == {"process", "mount", "loop", "directory"}
        assert any(line.startswith("process") for line in sweep(tmp_path, patience=0.3))
        assert sweep(tmp_path) == []
    assert leaks.found == []


def test_signals_end_the_block_and_handlers_are_put_back() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught, signals_as_exceptions():
        signal.raise_signal(signal.SIGTERM)
    assert caught.value.code == 128 + signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_links_carry_what_they_are_shaped_to_and_count_it(tmp_path: Path) -> None:
    size = 3_000_000
    with Lab("net", tmp_path) as lab:
        network = Network(lab)
        near, far = network.host("near", "100mbit"), network.host("far")
        with far.socket() as listener, near.socket() as client:
            listener.bind((far.address, 5001))
            listener.listen()
            sender = threading.Thread(target=lambda: send(listener, size))
            sender.start()
            before, start, received = near.traffic(), time.monotonic(), 0
            client.connect((far.address, 5001))
            while data := client.recv(1 << 20):
                received += len(data)
            seconds = time.monotonic() - start
            sender.join()
        assert received == size
        # never faster than the link but for one burst of tbf (256 KiB); how much slower is up to the machine
        assert seconds > (size - (256 << 10)) * 8 / 100e6 * 0.97
        assert size <= (near.traffic() - before).received < size * 1.1


def send(listener: socket.socket, size: int) -> None:
    connection, _ = listener.accept()
    with connection:
        connection.sendall(bytes(size))


def test_hosts_reach_each_other_and_nothing_else(tmp_path: Path) -> None:
    with Lab("net", tmp_path) as lab:
        host = Network(lab).host("a")
        routes = subprocess.run([*host.prefix, "ip", "route"], capture_output=True, text=True, check=True).stdout
        assert routes.strip() == f"10.231.0.0/24 dev eth0 proto kernel scope link src {host.address}"


def test_a_daemon_that_ends_at_once_is_reported_with_its_words(tmp_path: Path) -> None:
    with Lab("process", tmp_path) as lab:
        process = Process(lab, "grumpy", ["sh", "-c", "echo no port for me >&2; exit 3"])
        with pytest.raises(LabFailed, match=r"grumpy ended with status 3:\nno port for me"):
            process.wait_until(lambda: False)


@pytest.mark.programs("docker-registry", "skopeo", "umoci", "ldd")
def test_host_python_runs_from_a_registry_by_an_ordinary_unpack(tmp_path: Path) -> None:
    image = images.host_python()
    with Lab("image", tmp_path) as lab:
        host = Network(lab).host("registry")
        registry = Registry(lab, host)
        image.push(f"{registry.address}/lab/host:1", prefix=host.prefix)
        back = lab.root / "back"
        source = f"docker://{registry.address}/lab/host:1"
        copy = ["skopeo", "copy", "--insecure-policy", "--src-tls-verify=false", source, f"oci:{back}:latest"]
        subprocess.run([*host.prefix, *copy], check=True, capture_output=True)
        bundle = lab.root / "bundle"
        subprocess.run(["umoci", "unpack", "--image", f"{back}:latest", bundle], check=True, capture_output=True)
        ran = subprocess.run(image.start_in(bundle / "rootfs"), capture_output=True, text=True, check=True)
        assert ran.stdout == image.facts["first_line"] + "\n"
        assert not (bundle / "rootfs/etc/old.conf").exists()
        assert os.listdir(bundle / "rootfs/var/log") == ["second"]
