"""Superpeers, nodes and mounts that cases do harm to, and how they are put together and taken down again.

What lives here: `Setting`, `Scene`, and the daemons as things that can be killed and started again. What never does:
what is done to them (registries.py …) and who reads (load.py). All on loopback: daemons are found at other ports.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dadi.cli.client import NodeClient
from dadi.errors import DadiError
from dadi.index.chunks import DEFAULT_CHUNK_SIZE
from tests.faults.injured import LOOKED_AT_EVERY
from tests.faults.supply import Content, Supply
from tests.lab.cleanup import Lab, loops, mounts_below
from tests.lab.forking import Forked, Forks
from tests.lab.processes import LabFailed, unix_get

_READY, _STOP = 60.0, 30.0


@dataclass(frozen=True)
class Setting:
    """What stands at the beginning of a case; cases with an equal one may share a scene, each with layers of its own.

    The image (`layers` of `size` bytes and a little; `indexed` with seek points) is mounted on each node. Peers are off
    unless asked for. Sections and options are TOML.
    """

    nodes: int = 1
    superpeers: int = 1
    peers: bool = False
    image: str = "app"
    layers: int = 4
    size: int = 3 << 20
    indexed: bool = False
    patience: float = 90.0
    backfill: str = "enabled = false"
    node_sections: str = ""
    superpeer_options: str = ""
    superpeer_sections: str = ""
    mounted: bool = True


class Daemon:
    """A daemon of ours that may be killed and started again, on what it left. `process`: the one that runs, or ran."""

    program = ""

    def __init__(self, scene: Scene, name: str) -> None:
        self.scene, self.name = scene, name
        self.directory = scene.directory / name
        self.directory.mkdir()
        self.config = self.directory / "config.toml"
        self.process: Forked | None = None

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.alive

    def begin(self) -> None:
        """Start it, and do not wait."""
        name = f"{self.scene.directory.name}-{self.name}"
        self.process = Forked(self.scene.forks, name, self.program, ["--config", str(self.config)])

    def wait(self) -> None:
        """Wait until it answers."""
        assert self.process is not None
        self.process.wait_until(self.answers, _READY)

    def start(self) -> None:
        self.begin()
        self.wait()

    def answers(self) -> bool:
        raise NotImplementedError

    def stop(self) -> int:
        """SIGTERM; returns its status, 0 if it was killed before. How long it takes is no case's subject."""
        assert self.process is not None
        return self.process.stop(_STOP) if self.process.alive else 0

    def kill(self) -> None:
        """SIGKILL, without waiting: a node may hang in the kernel until its successor serves."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.popen.pid, signal.SIGKILL)


class Superpeer(Daemon):
    """`dadi-superpeer`; images and layers that it has not yet it takes through the door."""

    program = "superpeer.main"

    def __init__(self, scene: Scene, number: int, urls: list[str]) -> None:
        super().__init__(scene, f"superpeer{number}")
        self.url, setting = urls[number], scene.setting
        family = f'url = "{self.url}"\nsiblings = {json.dumps(urls)}\n' if len(urls) > 1 else ""
        door = json.dumps([scene.supply.door.host])
        chunk = DEFAULT_CHUNK_SIZE if setting.indexed else 16 << 10  # an index has chunks of that size
        self.config.write_text(
            f'listen = "{self.url.removeprefix("http://")}"\nstate = "{self.directory / "state"}"\nlog_json = true\n'
            f"{family}{setting.superpeer_options}\n[indexing]\nchunk_size = {chunk}\nrest_after = 3600\n"
            f"[registry]\nallowed = {door}\nplain_http = {door}\n{setting.superpeer_sections}\n"
        )

    def answers(self) -> bool:
        with socket.create_connection(("127.0.0.1", int(self.url.rpartition(":")[2])), timeout=1):
            return True


class Node(Daemon):
    """`dadi-node`, and what its control socket is asked for."""

    program = "dadi.node.main"

    def __init__(self, scene: Scene, name: str, urls: list[str]) -> None:
        super().__init__(scene, name)
        setting = scene.setting
        self.socket = self.directory / "run" / "node.sock"
        self.image = self.directory / "image"
        """Where the setting's image is mounted."""
        self.image.mkdir()
        self.client = NodeClient(str(self.socket))
        peers = 'listen = "127.0.0.1:0"' if setting.peers else "enabled = false"
        self.config.write_text(
            f'state = "{self.directory / "state"}"\nrun = "{self.socket.parent}"\nsuperpeers = {json.dumps(urls)}\n'
            f"log_json = true\n[snapshotter]\nenabled = false\n[backfill]\n{setting.backfill}\n[peers]\n{peers}\n"
            f"[read]\npatience = {setting.patience}\nstall = 5\n[trace]\nenabled = false\n{setting.node_sections}\n"
        )

    def answers(self) -> bool:
        return unix_get(self.socket, "/healthz")[0] == 200

    def status(self) -> dict[str, Any]:
        """Return what `dadi status --json` prints."""
        value: dict[str, Any] = json.loads(unix_get(self.socket, "/v1/status", timeout=20.0)[1])
        return value

    def mount(self, reference: str, directory: Path) -> None:
        """As `dadi mount`. Raises an error of dadi/errors.py."""
        directory.mkdir(exist_ok=True)
        for _ in self.client.events("POST", "/v1/mounts", body={"image": reference, "directory": str(directory)}):
            pass

    def unmount(self, directory: Path, *, force: bool = False) -> None:
        """As `dadi umount`. Raises an error of dadi/errors.py."""
        self.client.call("DELETE", "/v1/mounts", {"directory": str(directory), "force": "1" if force else "0"})

    def noted(self) -> set[str]:
        """Return the kinds of fallbacks that its status names."""
        return {row["kind"] for row in self.status()["fallbacks"]}


class InjuredNode(Node):
    """A node on a machine that can be made to fail it (injured.py)."""

    program = "tests.faults.injured"

    def injure(self, injury: Mapping[str, object]) -> None:
        """From now on this is wrong, and nothing else."""
        (self.directory / "injury.new").write_text(json.dumps(injury))
        (self.directory / "injury.new").rename(self.directory / "injury")
        time.sleep(2 * LOOKED_AT_EVERY)


class Scene:
    """See the head of this file. `close` takes all down, and returns what cannot be taken down."""

    def __init__(self, lab: Lab, forks: Forks, supply: Supply, setting: Setting, name: str) -> None:
        self.lab, self.forks, self.supply, self.setting = lab, forks, supply, setting
        self.directory = lab.root / name
        self.directory.mkdir()
        self.content: Content = supply.image(setting.image, layers=setting.layers, size=setting.size,
                                             indexed=setting.indexed)  # fmt: skip
        self._taken = 0
        self.urls = [f"http://127.0.0.1:{port}" for port in free_ports(setting.superpeers)]
        self.superpeers = [Superpeer(self, number, self.urls) for number in range(setting.superpeers)]
        self.nodes = [Node(self, f"node{number}", self.urls) for number in range(setting.nodes)]
        self.others: list[Daemon] = []
        """What else a case has started for those after it, too."""
        for daemon in (*self.superpeers, *self.nodes):
            daemon.begin()
        for daemon in (*self.superpeers, *self.nodes):
            daemon.wait()
        for node in self.nodes if setting.mounted else ():
            node.mount(self.content.reference, node.image)

    @property
    def left(self) -> int:
        """How many layers nobody has taken yet."""
        return self.setting.layers - self._taken

    def take(self, layers: int) -> range:
        """Return the next layers that nobody has read yet; they are not given again."""
        first, self._taken = self._taken, self._taken + layers
        return range(first, self._taken)

    def warnings(self, most: int = 12) -> str:
        """Return the last warnings and errors in the logs, for people."""
        lines = []
        for daemon in (*self.superpeers, *self.nodes, *self.others):
            events = daemon.process.events() if daemon.process else []
            bad = [event for event in events if event.get("level") in ("warning", "error", "critical")]
            lines += [f"{daemon.name}: {json.dumps(event)[:600]}" for event in bad[-most:]]
        return "\n".join(lines)

    def close(self) -> list[str]:
        """Unmount everything (killed nodes are started once more for that), end everything; return what is left."""
        found = []
        for node in self.nodes:
            if not node.alive:
                node.start()
            for row in node.status()["mounts"]:
                try:
                    node.unmount(Path(row["directory"]), force=True)
                except DadiError as error:
                    found.append(f"{node.name}: {error}")
        ends = [(daemon.name, daemon.stop()) for daemon in (*self.nodes, *self.others, *self.superpeers)]
        found += [f"{name} ended with status {status}" for name, status in ends if status]
        found += until_nothing(self.leftovers)
        return found

    def leftovers(self) -> list[str]:
        """Return mounts, loop devices and keepers of this scene."""
        found = [f"mount {point}" for point, _ in mounts_below(self.directory)]
        found += [f"loop device {path}" for path, file in loops().items() if file.startswith(f"{self.directory}/")]
        return found + [f"process {pid}" for pid in processes_below(self.directory)]


def processes_below(directory: Path) -> list[int]:
    """Return processes whose command line names something below a directory: keepers, and programs they came from."""
    found, wanted = [], os.fsencode(directory) + b"/"
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdigit() and wanted in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return found


def until_nothing(look: Callable[[], list[str]], limit: float = 15.0) -> list[str]:
    """Return what is there still after `limit` seconds at most."""
    deadline = time.monotonic() + limit
    while (found := look()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return found


def free_ports(count: int) -> list[int]:
    """Return ports that nobody listens on; they lie below those that the kernel gives to connections."""
    found: list[int] = []
    with contextlib.ExitStack() as stack:
        for port in range(20_000 + os.getpid() % 1000 * 10, 32_000):
            if len(found) == count:
                return found
            sock = stack.enter_context(socket.socket())
            with contextlib.suppress(OSError):
                sock.bind(("127.0.0.1", port))
                found.append(port)
    raise LabFailed("no free port")
