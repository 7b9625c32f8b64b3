"""Programs in a lab: started on a host of its network (or on this machine), waited for until ready, watched, ended.

What lives here: `Process` and, as thin wrappers that write a configuration first, the superpeer, the node and
Debian's docker-registry; and `dadi`, the command line. What never does: assertions. Each daemon's output is in
ROOT/logs/NAME.log; whatever fails here shows its end.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.lab.cleanup import Lab
from tests.lab.network import Host, free_ports, get

REPOSITORY = Path(__file__).resolve().parents[2]
_POLL = 0.01  # seconds


class LabFailed(Exception):
    """A program in the lab did not start, ended too soon, or failed; the text holds the end of what it printed."""


class Process:
    """One process in a process group of its own, its output in a log."""

    def __init__(
        self,
        lab: Lab,
        name: str,
        command: Sequence[str],
        *,
        host: Host | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self.host = host
        self.log = lab.root / "logs" / f"{name}.log"
        self.log.parent.mkdir(exist_ok=True)
        with self.log.open("ab") as log:
            self.popen = subprocess.Popen(
                [*(host.prefix if host else []), *command],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env={**lab.environment, "PYTHONPATH": str(REPOSITORY), **(environment or {})},
                cwd=lab.root,
                start_new_session=True,
            )
        lab.children.append(self.popen)

    def __repr__(self) -> str:
        state = "running" if self.alive else f"ended with status {self.popen.returncode}"
        return f"<Process {self.name} {self.popen.pid}, {state}>"

    @property
    def alive(self) -> bool:
        return self.popen.poll() is None

    def wait_until(self, ready: Callable[[], bool], timeout: float = 20.0) -> None:
        """Poll until `ready` says so; OSError and HTTPException from it mean "not yet". Raises LabFailed."""
        deadline = time.monotonic() + timeout
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if ready():
                    return
            if not self.alive:
                raise LabFailed(f"{self.name} ended with status {self.popen.returncode}:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise LabFailed(f"{self.name} is not ready after {timeout:.0f} s:\n{self.tail()}")
            time.sleep(_POLL)

    def stop(self, timeout: float = 10.0) -> int:
        """End it by SIGTERM, then SIGKILL; returns its status as subprocess has it (negative: the signal)."""
        self.signal(signal.SIGTERM)
        try:
            return self.popen.wait(timeout)
        except subprocess.TimeoutExpired:
            return self.kill()

    def kill(self) -> int:
        """End it and its process group by SIGKILL."""
        self.signal(signal.SIGKILL)
        return self.popen.wait()

    def signal(self, number: int) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.popen.pid, number)

    def peak_memory(self) -> int:
        """Return the largest resident set size so far, in bytes (VmHWM of proc_pid_status(5)); 0 when it has ended."""
        return self._status("VmHWM")

    def memory(self) -> int:
        """Return the resident set size now, in bytes."""
        return self._status("VmRSS")

    def _status(self, field: str) -> int:
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{self.popen.pid}/status").read_text()
            match = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
            return int(match[1]) * 1024 if match else 0
        return 0

    def tail(self, lines: int = 25) -> str:
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def events(self) -> list[dict[str, Any]]:
        """Return the lines of the log that are JSON objects."""
        found = []
        for line in self.log.read_text(errors="replace").splitlines():
            with contextlib.suppress(json.JSONDecodeError):
                value = json.loads(line)
                if isinstance(value, dict):
                    found.append(value)
        return found


class Registry(Process):
    """Debian's docker-registry, plain HTTP, anonymous. `address` is what image references begin with."""

    def __init__(self, lab: Lab, host: Host, port: int = 5000, name: str = "registry") -> None:
        directory = lab.root / name
        directory.mkdir()
        self.address = f"{host.address}:{port}"
        config = {
            "version": 0.1,
            "log": {"level": "warn", "accesslog": {"disabled": True}},
            "storage": {"filesystem": {"rootdirectory": str(directory)}, "delete": {"enabled": True}},
            "http": {"addr": self.address, "secret": "only this one instance"},
        }
        file = directory / "config.yml"
        file.write_text(json.dumps(config))  # JSON is YAML
        super().__init__(lab, name, ["docker-registry", "serve", str(file)], host=host)
        self.wait_until(lambda: host.get(host.address, port, "/v2/")[0] == 200)


class Superpeer(Process):
    """`dadi-superpeer` on `host`, allowed to use `registries` by plain HTTP. `options` are added to its TOML's head.

    Without a host it is on this machine's loopback, at a free port.
    """

    def __init__(
        self,
        lab: Lab,
        host: Host | None,
        registries: Sequence[str],
        *,
        port: int = 7070,
        name: str = "superpeer",
        options: str = "",
        sections: str = "",
    ) -> None:
        directory = lab.root / name
        directory.mkdir(exist_ok=True)
        self._address, self._port = (host.address, port) if host else ("127.0.0.1", free_ports(1)[0])
        listen = f"{self._address}:{self._port}"
        self.url = f"http://{listen}"
        file = directory / "superpeer.toml"
        file.write_text(
            f'listen = "{listen}"\nstate = "{directory / "state"}"\nlog_json = true\n{options}\n'
            f"[registry]\nallowed = {json.dumps(list(registries))}\nplain_http = {json.dumps(list(registries))}\n"
            f"{sections}\n"
        )
        super().__init__(lab, name, [sys.executable, "-m", "superpeer", "--config", str(file)], host=host)
        self.wait_until(lambda: self.get("/healthz")[0] == 200)

    def get(self, path: str) -> tuple[int, bytes]:
        return (self.host.get if self.host else get)(self._address, self._port, path)

    def status(self) -> dict[str, Any]:
        """Return GET /v1/status."""
        value: dict[str, Any] = json.loads(self.get("/v1/status")[1])
        return value


def _any_port(host: Host | None) -> str:
    """Return the section by which several nodes can serve each other on one machine."""
    return f'[peers]\nlisten = "{"0.0.0.0" if host else "127.0.0.1"}:0"\n'


class Node(Process):
    """`dadi-node` on `host` (or on this machine), with the superpeers at `superpeers` (none: it embeds one).

    `options` are added to the head of its TOML, `sections` to the end; `prefix` goes before its command line. Its
    directory, ROOT/NAME, is kept when a node of the same name is started again: that is how to test a restart.
    """

    def __init__(
        self,
        lab: Lab,
        host: Host | None = None,
        superpeers: Sequence[str] = (),
        *,
        name: str = "node",
        options: str = "",
        sections: str = "",
        environment: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self.directory = lab.root / name
        self.directory.mkdir(exist_ok=True)
        self.socket = self.directory / "run" / "node.sock"
        self.state = self.directory / "state"
        self._lab = lab
        file = self.directory / "node.toml"
        file.write_text(
            f'state = "{self.state}"\nrun = "{self.socket.parent}"\nsuperpeers = {json.dumps(list(superpeers))}\n'
            f"log_json = true\n{options}\n{sections}\n{'' if '[peers]' in sections else _any_port(host)}"
        )
        command = [*prefix, sys.executable, "-m", "dadi.node", "--config", str(file)]
        super().__init__(lab, name, command, host=host, environment=environment)
        self.wait_until(lambda: unix_get(self.socket, "/healthz")[0] == 200)

    def dadi(self, *arguments: str, check: bool = True) -> str:
        """Run the command line against this node; returns what it printed. Raises LabFailed if it fails (`check`)."""
        ours = {"DADI_NODE_SOCKET": str(self.socket)}
        try:
            return dadi(self._lab, *arguments, check=check, environment=ours).stdout
        except LabFailed as error:
            raise LabFailed(f"{error}\nlog of {self.name}:\n{self.tail()}") from None

    def status(self) -> dict[str, Any]:
        """Return what `dadi status --json` prints, without starting a process for it."""
        value: dict[str, Any] = json.loads(unix_get(self.socket, "/v1/status")[1])
        return value


def dadi(lab: Lab, *arguments: str, host: Host | None = None, check: bool = True,
         environment: Mapping[str, str] | None = None) -> subprocess.CompletedProcess[str]:  # fmt: skip
    """Run the command line to its end, on `host` or on this machine. Raises LabFailed if it fails (`check`)."""
    command = [*(host.prefix if host else []), sys.executable, "-m", "dadi.cli", *arguments]
    environment = {**lab.environment, "PYTHONPATH": str(REPOSITORY), **(environment or {})}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment,
                          stdin=subprocess.DEVNULL)  # fmt: skip
    if check and done.returncode != 0:
        raise LabFailed(f"dadi {' '.join(arguments)}: {done.stderr.strip()}")
    return done


def unix_get(path: Path, target: str, timeout: float = 5.0) -> tuple[int, bytes]:
    """GET over a unix socket; returns status and body. Raises OSError, HTTPException."""
    connection = http.client.HTTPConnection("localhost", timeout=timeout)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.settimeout(timeout)
        connection.sock.connect(str(path))
        connection.request("GET", target)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()
