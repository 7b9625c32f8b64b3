"""Two datacenters before a peak: both are warmed, the registry is cut off, then sixteen nodes start the image.

Real processes, the real kernel, Debian's registry and our command line, in network namespaces. That a job survives
superpeer and command line being killed in the middle of it is shown by tests/integration/test_prefetch_killed.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.cleanup import Lab, leak_check
from tests.lab.crowd import Crowd, Member, Setting
from tests.lab.crowd_image import Material, material
from tests.lab.processes import REPOSITORY, Superpeer

pytestmark = [
    pytest.mark.root,
    pytest.mark.programs("docker-registry", "skopeo", "ip", "tc", "nsenter", "unshare"),
    pytest.mark.timeout(180),
]
NAMES = ("east", "west")
NODES = 16
TOKEN = "one-operator-of-both"


class Datacenters(Crowd):
    """Superpeers that know nothing of each other, each with every other one of the nodes; one registry for both."""

    def _superpeer(self, number: int) -> Superpeer:
        operators = self.lab.root / "operators"
        operators.write_text(f"token sha256:{hashlib.sha256(TOKEN.encode()).hexdigest()} lab\n")
        host = self.network.hosts[f"superpeer{number}"]
        return Superpeer(self.lab, host, [self.registry.host], name=f"superpeer{number}",
                         sections=f'[prefetch]\noperators = "{operators}"\n')  # fmt: skip

    def _member(self, number: int) -> Member:
        every, self.urls = self.urls, [self.urls[number % len(NAMES)]]
        try:
            return super()._member(number)
        finally:
            self.urls = every

    def dadi(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run the command line on the registry's host, as somebody who is in neither datacenter."""
        places = self.lab.root / "datacenters.toml"
        rows = "".join(f'{name} = ["{url}"]\n' for name, url in zip(NAMES, self.urls, strict=True))
        places.write_text(f"[datacenters]\n{rows}")
        token = self.lab.root / "token"
        token.write_text(TOKEN)
        command = [*self.network.hosts["registry"].prefix, sys.executable, "-m", "dadi.cli", *arguments,
                   "--datacenters-file", str(places)]  # fmt: skip
        environment = {**os.environ, **self.lab.environment, "PYTHONPATH": str(REPOSITORY),
                       "DADI_OPERATOR_TOKEN_FILE": str(token)}  # fmt: skip
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    @contextmanager
    def without_registry(self) -> Iterator[list[str]]:
        """Stop the registry; gives a list that gets a line for everybody who asks for it all the same."""
        host = self.network.hosts["registry"]
        port = int(self.registry.host.rpartition(":")[2])
        self.registry.stop()
        askers: list[str] = []
        with host.socket() as listening:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            host.inside(lambda: listening.bind((host.address, port)))
            listening.listen(64)
            listening.settimeout(0.1)
            over = threading.Event()

            def count() -> None:
                while not over.is_set():
                    try:
                        connection, (asker, _) = listening.accept()
                    except TimeoutError:
                        continue
                    askers.append(asker)
                    connection.close()

            thread = threading.Thread(target=count)
            thread.start()
            try:
                yield askers
            finally:
                over.set()
                thread.join()


@pytest.fixture(scope="module")
def base() -> Iterator[Path]:
    # not pytest's own: the path of a unix socket must not be longer than 107 bytes
    with tempfile.TemporaryDirectory(prefix="peak") as directory:
        yield Path(directory)


@pytest.fixture(scope="module")
def image(base: Path) -> Iterator[Material]:
    with Lab("image", base) as lab:
        yield material(lab, size=8 << 20, files=160)


def test_what_was_warmed_and_verified_starts_everywhere_without_its_registry(base: Path, image: Material) -> None:
    setting = Setting(nodes=NODES, superpeers=len(NAMES), rate="1gbit", node_sections="[backfill]\nenabled = false\n")
    with leak_check(base) as leaks:
        with Lab("peak", base) as lab, Datacenters(lab, image, setting) as started:
            both = [word for name in NAMES for word in ("--datacenter", name)]
            done = started.dadi("prefetch", started.reference, *both)
            assert done.returncode == 0, done.stderr
            ready = started.dadi("prefetch", "verify", started.reference, "--all", "--json")
            assert ready.returncode == 0, ready.stdout + ready.stderr
            proofs = json.loads(ready.stdout)
            assert {proof["datacenter"]: proof["registry_requests"] for proof in proofs} == dict.fromkeys(NAMES, 0)
            assert started.registry_copies() <= len(NAMES) * 1.01, "each datacenter took one copy"
            with started.without_registry() as askers:
                started.go()
                assert started.wrong(started.readings()) == []
            assert askers == [], "nobody asked the registry for anything"
    assert leaks.found == []
