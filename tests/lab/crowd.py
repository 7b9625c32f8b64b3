"""A crowd: N hosts, a node on each, that start the same image in the same second; a registry and superpeers beside.

What lives here: how it is put together, started and watched, and what came of it. What never does: assertions, and
what goes wrong on purpose (tests/system/test_crowd.py).

    registry ─┬─ superpeer0 … superpeerM       Debian's docker-registry: its access log is what has left it
              ├─ node0    FUSE, loop devices; a reader that mounts the image and reads all of it     each on a host
              ├─ node1                                                                               with a shaped link
              └─ …

Nodes and readers are real processes, forked from one that has imported everything (tests/lab/forking.py). They stand
ready before `go`; then all readers begin at the same moment of the monotonic clock.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from tests.lab import images
from tests.lab.cleanup import Lab
from tests.lab.crowd_image import NAME, Material
from tests.lab.forking import Forked, Forks
from tests.lab.network import Host, Network
from tests.lab.processes import LabFailed, Superpeer, unix_get
from tests.lab.reading import Reading
from tests.lab.registry import DockerRegistry

SUPERPEER_PORT = 7070
PEER_PORT = 7071
_PORT = 5000
_READY = 60.0
_HEAD_START = 0.3
"""Seconds between `go` and the readers' beginning, so that all of them have been forked by then."""
SLOW_LINK = "1mbit"


@dataclass
class Member:
    """One machine of the crowd: its host, its node, and the reader of its mount once there is one."""

    number: int
    host: Host
    directory: Path
    node: Forked
    reader: Forked | None = None

    @property
    def name(self) -> str:
        return self.node.name

    @property
    def socket(self) -> Path:
        return self.directory / "run" / "node.sock"

    @property
    def result(self) -> Path:
        return self.directory / "reading.json"

    def status(self) -> dict[str, Any]:
        """Return what `dadi status --json` prints."""
        value: dict[str, Any] = json.loads(unix_get(self.socket, "/v1/status", timeout=20.0)[1])
        return value

    def reading(self) -> Reading | None:
        """Return what its reader saw; None as long as it reads."""
        return Reading(**json.loads(self.result.read_text())) if self.result.exists() else None

    def stored(self) -> int:
        """Return how many bytes its store takes on disk; asks the file system and not the node."""
        total = 0
        for file in (self.directory / "state" / "store").rglob("*"):
            with contextlib.suppress(OSError):
                total += file.lstat().st_blocks * 512
        return total

    def kill(self) -> None:
        """Let the machine die: node and reader, at once and without a word."""
        for process in (self.node, self.reader):
            if process is not None:
                process.kill()


@dataclass(frozen=True)
class Setting:
    """What a crowd is made of. `rate`: of each link, in tc's notation.

    `mounting`: a program on each node mounts the image and reads all of it; else each node fetches the startup set, in
    the order of its trace, and nothing more (tests/lab/prefetching.py).
    """

    nodes: int = 32
    superpeers: int = 1
    racks: int = 1
    rate: str = "100mbit"
    peers: bool = True
    slots: int = 1
    mounting: bool = True
    environment: Mapping[str, str] = field(default_factory=dict)
    node_sections: str = ""
    superpeer_options: str = ""
    superpeer_sections: str = ""


class Crowd:
    """See the head of this file. A context manager; what it starts belongs to `lab` and goes with it."""

    def __init__(self, lab: Lab, material: Material, setting: Setting) -> None:
        self.lab = lab
        self.material = material
        self.setting = setting
        self.network = Network(lab)
        self.members: list[Member] = []
        self.superpeers: list[Superpeer] = []
        self.began = 0.0
        self._go = lab.root / "go.json"
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Crowd:
        try:
            self._start()
        except BaseException:
            self._exits.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # Not asked politely: thirty-two of them that unmount and say good-bye take their time.
        for member in self.members:
            member.kill()
        for superpeer in self.superpeers:
            superpeer.kill()
        self._exits.close()

    # ---- putting it together

    def _start(self) -> None:
        self.forks = self._exits.enter_context(Forks(self.lab))
        host = self.network.host("registry", self.setting.rate)
        directory = self.lab.root / "registry"
        shutil.copytree(self.material.data, directory / "data")
        self.registry = self._exits.enter_context(
            DockerRegistry(directory, _PORT, address=host.address, prefix=host.prefix, environment=self.lab.environment)
        )
        self.reference = f"{self.registry.host}/{NAME}"
        hosts = [self.network.host(f"superpeer{n}", self.setting.rate) for n in range(self.setting.superpeers)]
        self.urls = [f"http://{host.address}:{SUPERPEER_PORT}" for host in hosts]
        for number in range(len(hosts)):
            self.superpeers.append(self._superpeer(number))
        for number in range(self.setting.nodes):
            self.members.append(self._member(number))
        deadline = time.monotonic() + _READY
        for member in self.members:
            member.node.wait_until(
                lambda member=member: unix_get(member.socket, "/healthz")[0] == 200, deadline - time.monotonic()
            )

    def _superpeer(self, number: int) -> Superpeer:
        host = self.network.hosts[f"superpeer{number}"]
        options = self.setting.superpeer_options
        if len(self.urls) > 1:
            options += f'\nurl = "{self.urls[number]}"\nsiblings = {json.dumps(self.urls)}\n'
        superpeer = Superpeer(self.lab, host, [self.registry.host], name=f"superpeer{number}", options=options,
                              sections=self.setting.superpeer_sections)  # fmt: skip
        # Elsewhere it has a machine to itself; here it would get a thirtieth of one.
        os.setpriority(os.PRIO_PROCESS, superpeer.popen.pid, -10)
        return superpeer

    def restart_superpeer(self, number: int = 0) -> None:
        """Kill a superpeer and start it again on what it left."""
        self.superpeers[number].kill()
        self.superpeers[number] = self._superpeer(number)

    def _member(self, number: int) -> Member:
        name = f"node{number}"
        host = self.network.host(name, self.setting.rate)
        directory = self.lab.root / name
        (directory / "image").mkdir(parents=True)
        file = directory / "node.toml"
        file.write_text(
            f'state = "{directory / "state"}"\nrun = "{directory / "run"}"\nsuperpeers = {json.dumps(self.urls)}\n'
            f"log_json = true\n[snapshotter]\nenabled = false\n{self._peers(number)}{self.setting.node_sections}\n"
        )
        program, arguments = "dadi.node.main", ["--config", str(file)]
        if not self.setting.mounting:
            program, arguments = "tests.lab.prefetching", [str(file), str(self._go), str(directory / "reading.json")]
        node = Forked(self.forks, name, program, arguments, host=host, environment=self.setting.environment)
        return Member(number, host, directory, node)

    def _peers(self, number: int) -> str:
        if not self.setting.peers:
            return "[peers]\nenabled = false\n"
        return (
            f'[peers]\nlisten = "0.0.0.0:{PEER_PORT}"\nzone = "zone"\nrack = "{self.rack(number)}"\n'
            f"slots = {self.setting.slots}\n"
        )

    def rack(self, number: int) -> str:
        """Return the rack of the node of this number."""
        return f"rack{number % self.setting.racks}"

    def liar(self, name: str, superpeer: int = 0) -> Liar:
        """Add a host with a peer that lies, and wait until it has joined the image's trees."""
        host = self.network.host(name, self.setting.rate)
        return Liar(self, name, host, self.urls[superpeer])

    # ---- running it

    def wait_for_groups(self, timeout: float = 30.0) -> None:
        """Wait until the nodes of each rack know each other, as where they were up before the image came."""

        def stand() -> bool:
            racks = [self.rack(member.number) for member in self.members]
            return all(
                member.status()["peers"]["directory"]["group"]["members"] >= racks.count(self.rack(member.number))
                for member in self.members
            )

        self.wait_for(stand, timeout, "the nodes of each rack know each other")

    def go(self, members: Sequence[Member] | None = None) -> None:
        """Let the readers of `members` (default: all) begin at the same moment."""
        self.served_before = [superpeer.host.traffic() for superpeer in self.superpeers if superpeer.host]
        chosen = self.members if members is None else members
        self.began = time.monotonic() + _HEAD_START + 0.01 * len(chosen)
        if not self.setting.mounting:
            self._go.write_text(json.dumps({"image": self.reference, "begin": self.began,
                                            "startup": self.material.trace}))  # fmt: skip
            for member in chosen:
                member.node.signal(signal.SIGUSR1)
            return
        startup = self.lab.root / "startup.json"
        startup.write_text(json.dumps(self.material.startup))
        for member in chosen:
            arguments = [str(member.socket), self.reference, str(member.directory / "image"), str(member.result),
                         repr(self.began), str(startup)]  # fmt: skip
            member.reader = Forked(self.forks, f"reader{member.number}", "tests.lab.reading", arguments)

    def wait_for(self, true: Callable[[], bool], timeout: float, what: str) -> None:
        """Poll until `true`; raises LabFailed, with where everybody stands."""
        deadline = time.monotonic() + timeout
        while not true():
            if time.monotonic() > deadline:
                raise LabFailed(f"{what}: not within {timeout:.0f} s\n{self.describe()}")
            time.sleep(0.05)

    def wait_until_stored(self, share: float, timeout: float = 60.0) -> None:
        """Wait until the middle one of the nodes has this share of the image in its store."""

        def reached() -> bool:
            stored = sorted(member.stored() for member in self.members)
            return stored[len(stored) // 2] >= share * self.material.size

        self.wait_for(reached, timeout, f"{share:.0%} of the image in every other store")

    def readings(self, members: Sequence[Member] | None = None, timeout: float = 120.0) -> list[Reading]:
        """Wait for the readers of `members` (default: all); return what they saw."""
        chosen = self.members if members is None else members
        self.wait_for(lambda: all(m.result.exists() for m in chosen), timeout, "all have read the image")
        return [reading for member in chosen if (reading := member.reading())]

    # ---- what came of it

    def registry_copies(self) -> float:
        """Return how often the image's layers have left the registry, by its access log."""
        paths = [layer.blob.digest for layer in self.material.image.layers]
        size = sum(
            request.size for request in self.registry.access_log()
            if request.method == "GET" and request.status < 300 and request.path.rpartition("/")[2] in paths
        )  # fmt: skip
        return size / self.material.image.compressed_size

    def superpeer_copies(self) -> float:
        """Return how often the image has left the superpeers since `go`, by the counters of their interfaces."""
        sent = 0
        for superpeer, before in zip(self.superpeers, self.served_before, strict=True):
            assert superpeer.host is not None
            sent += (superpeer.host.traffic() - before).sent
        return sent / self.material.size

    def wrong(self, readings: Sequence[Reading]) -> list[str]:
        """Return a line for each failed read and each tree that is not the image's."""
        found = []
        for number, reading in enumerate(readings):
            found += [f"reader {number}: {error}" for error in reading.errors]
            if not self.setting.mounting:
                if reading.bytes != self.material.startup_bytes:
                    found.append(f"reader {number}: {reading.bytes} bytes of {self.material.startup_bytes}")
            elif not reading.errors and reading.digest != self.material.digest:
                found.append(f"reader {number}: another tree: {reading.bytes} bytes, {reading.digest[:16]}")
        return found

    def describe(self) -> str:
        """Return where everybody stands, for people."""
        lines = [repr(superpeer) for superpeer in self.superpeers]
        for member in self.members:
            reading = member.reading()
            state = f"done in {reading.done:.1f} s, {len(reading.errors)} errors" if reading else "reading"
            lines.append(f"{member.name}: {state}, {member.stored() / self.material.size:.0%} stored, {member.node!r}")
        return "\n".join(lines)


class Liar(Forked):
    """A peer that sends wrong bytes (tests/lab/liar.py)."""

    def __init__(self, crowd: Crowd, name: str, host: Host, superpeer: str) -> None:
        self.result = crowd.lab.root / f"{name}.lies"
        arguments = [superpeer, crowd.reference, f"linux/{images.ARCHITECTURE}", name, str(PEER_PORT), "zone", "rack0",
                     str(max(1, crowd.setting.slots)), str(self.result)]  # fmt: skip
        super().__init__(crowd.forks, name, "tests.lab.liar", arguments, host=host)
        self.wait_until(self.result.exists)

    @property
    def lies(self) -> int:
        """How many wrong answers it has given."""
        return self.result.stat().st_size

    def stop(self, timeout: float = 10.0) -> int:
        """End it; it has nothing to tidy up."""
        return self.kill()
