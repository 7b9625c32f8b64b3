"""Debian's docker-registry as a child process: a real registry for tests, demo and benchmark.

What lives here: its configuration, its life, and what it says that it was asked for. What never does: images and how
they get there (tests/lab/oci_layout.py).

    DIR/config.yml    its configuration
    DIR/data          its storage; survives `stop`
    DIR/log           what it says (standard error); also tells us the port, which it chooses itself
    DIR/access        one line a request (standard output), in Apache's combined format

All functions block; call them from fixtures or threads, not from an event loop.
"""

from __future__ import annotations

import atexit
import contextlib
import http.client
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

PROGRAM = "docker-registry"
USER, PASSWORD = "dadi", "correct horse"
HTPASSWD = f"{USER}:$2b$04$XWwhmMOK/LZQYJmrH8zm2eNdNscQdIUQy4t4HqncKeP1at4gTja8.\n"
"""USER with PASSWORD, as `htpasswd -B` writes it."""

_LISTENING = re.compile(r"listening on (\S+):([0-9]+)")
_ACCESS = re.compile(r'\S+ \S+ \S+ \[[^]]*\] "(\S+) (\S+) [^"]*" ([0-9]{3}) ([0-9]+)')
_START, _STOP = 20.0, 5.0
"""Seconds until it must answer, and until it must be gone."""


def available() -> bool:
    """Whether this machine has a docker-registry."""
    return shutil.which(PROGRAM) is not None


@dataclass(frozen=True)
class Request:
    """One request as the registry's access log has it; `size` is the bytes of the answer's body."""

    method: str
    path: str
    status: int
    size: int


@dataclass(frozen=True)
class Traffic:
    """How many requests, and how many bytes of bodies in their answers."""

    requests: int
    size: int


class DockerRegistry:
    """A docker-registry that stores below `directory`; use it as a context manager, or call `start` and `stop`.

    Without `port` it takes a free one, and keeps it when it is started again. `htpasswd` is the content of such a file
    (for example HTPASSWD); without it everybody may read and write. `address` is where it listens; `prefix` goes before
    the command line and `environment` into the environment (tests/lab/network.py, tests/lab/cleanup.py).
    """

    def __init__(
        self,
        directory: Path,
        port: int | None = None,
        htpasswd: str | None = None,
        *,
        address: str = "127.0.0.1",
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.directory = directory
        self._address = address
        self._port = port
        self._htpasswd = htpasswd
        self._prefix = list(prefix)
        self._environment = dict(environment or {})
        self._process: subprocess.Popen[bytes] | None = None
        self._markers = itertools.count(1)

    def __repr__(self) -> str:
        return f"DockerRegistry({self.directory}, {self._address}:{self._port})"

    def __enter__(self) -> DockerRegistry:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def host(self) -> str:
        """ADDRESS:PORT, as in the name of an image; known once it was started."""
        if self._port is None:
            raise RuntimeError("the registry was never started: it has no port yet")
        return f"{self._address}:{self._port}"

    @property
    def data(self) -> Path:
        """The directory that holds what was pushed."""
        return self.directory / "data"

    def start(self) -> None:
        """Start it and wait until it answers; raises RuntimeError with its own words if it does not."""
        if self._process is not None:
            raise RuntimeError(f"{self!r} runs already")
        self.data.mkdir(parents=True, exist_ok=True)
        configuration = self.directory / "config.yml"
        configuration.write_text(json.dumps(self._configuration(), indent=1))  # JSON is YAML
        said = (self.directory / "log").stat().st_size if (self.directory / "log").exists() else 0
        with (self.directory / "log").open("ab") as log, (self.directory / "access").open("ab") as access:
            self._process = subprocess.Popen(
                [*self._prefix, PROGRAM, "serve", str(configuration)],
                stdin=subprocess.DEVNULL,
                stdout=access,
                stderr=log,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
        atexit.register(self.stop)
        try:
            self._wait_until_it_answers(said)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop it and wait until it is gone; nothing happens if it does not run."""
        process, self._process = self._process, None
        if process is None:
            return
        atexit.unregister(self.stop)
        # The whole process group: a prefix may have put another process between us and the registry.
        for number, patience in ((signal.SIGTERM, _STOP), (signal.SIGKILL, None)):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(patience)
                break

    def access_log(self) -> list[Request]:
        """Return every request it has answered, oldest first, as far as it had been answered before this call."""
        if self._process is not None:
            self._mark()
        found = []
        for line in (self.directory / "access").read_text().splitlines():
            match = _ACCESS.match(line)
            if match is not None and "/?marker=" not in match[2]:
                found.append(Request(match[1], match[2], int(match[3]), int(match[4])))
        return found

    def blob_traffic(self) -> Traffic:
        """Return the GETs of blobs that gave bytes (200 and 206), and their bytes."""
        gets = [r for r in self.access_log() if r.method == "GET" and "/blobs/sha256:" in r.path and r.status < 300]
        return Traffic(len(gets), sum(r.size for r in gets))

    def _configuration(self) -> dict[str, object]:
        configuration: dict[str, object] = {
            "version": 0.1,
            "log": {"level": "info", "accesslog": {"disabled": False}},
            "storage": {"filesystem": {"rootdirectory": str(self.data.resolve())}, "delete": {"enabled": True}},
            "http": {"addr": f"{self._address}:{self._port or 0}", "secret": "not one"},
        }
        if self._htpasswd is not None:
            path = self.directory / "htpasswd"
            path.write_text(self._htpasswd)
            configuration["auth"] = {"htpasswd": {"realm": "lab", "path": str(path.resolve())}}
        return configuration

    def _wait_until_it_answers(self, said: int) -> None:
        deadline = time.monotonic() + _START
        while time.monotonic() < deadline:
            assert self._process is not None
            log = (self.directory / "log").read_bytes()[said:].decode(errors="replace")
            if self._process.poll() is not None:
                raise RuntimeError(f"{PROGRAM} ended with status {self._process.returncode}:\n{log}")
            listening = _LISTENING.search(log)
            if listening is not None:
                # It listens, so it will answer: the connection waits in the kernel until it accepts.
                self._port = int(listening[2])
                if not self._prefix:
                    self._get("/v2/?marker=start")
                return
            time.sleep(0.01)
        raise RuntimeError(f"{PROGRAM} did not listen within {_START:g} s; see {self.directory / 'log'}")

    def _mark(self) -> None:
        """Make a request of our own and wait until it is in the log: what came before it is there then too."""
        if self._prefix:
            return  # it listens where we are not
        marker = f"/v2/?marker={next(self._markers)}-{time.monotonic_ns()}"
        self._get(marker)
        deadline = time.monotonic() + _START
        while marker not in (self.directory / "access").read_text():
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self!r} does not write its access log")
            time.sleep(0.005)

    def _get(self, path: str) -> None:
        connection = http.client.HTTPConnection(self._address, self._port, timeout=_START)
        try:
            connection.request("GET", path)
            connection.getresponse().read()
        finally:
            connection.close()
