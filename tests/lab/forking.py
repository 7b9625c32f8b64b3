"""Many daemons quickly: one process that has imported them all, and forks whenever one is asked for.

What lives here: `Forks`, which starts that process (tests/lab/fork_server.py) and talks to it, and `Forked`, a
`Process` (tests/lab/processes.py) that came to be so. What never does: what the daemons do. A daemon of ours takes a
second of processor time to be imported; thirty-two of them on two cores would be half a minute of nothing else.

    →  {"program": module, "arguments": […], "log": file, "namespace": file or null, "environment": {…}}   a line each
    ←  {"started": pid}                                                          the answer, in the order of asking
    ←  {"ended": pid, "status": as subprocess has it}                            whenever one ends

What is forked is a process like any other: a session, a network namespace and a log of its own, killed by its own
process group. `program` is a module (imported before if it is one of fork_server.PROGRAMS); its `main` gets
the arguments.
"""

from __future__ import annotations

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from tests.lab.cleanup import Lab
from tests.lab.fork_server import MORE
from tests.lab.network import Host
from tests.lab.processes import REPOSITORY, LabFailed, Process

_PATIENCE = 30.0
"""Seconds until the process that forks has imported all, and until it has forked."""


class Forks:
    """The process that forks, in a lab; leaving it ends that process, and leaves what it forked to the lab.

    It imports all while others go on; who is the first to have something forked waits for that.
    """

    def __init__(self, lab: Lab, programs: Sequence[str] = ()) -> None:
        """`programs`: modules to import beside fork_server.PROGRAMS."""
        self.lab = lab
        (lab.root / "logs").mkdir(exist_ok=True)
        self._ended: dict[int, int] = {}
        self._changed = threading.Condition()
        self._answers: queue.Queue[dict[str, int]] = queue.Queue()
        with (lab.root / "logs" / "forking.log").open("ab") as log:
            self._popen = subprocess.Popen(
                [sys.executable, "-m", "tests.lab.fork_server"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**lab.environment, "PYTHONPATH": str(REPOSITORY), MORE: " ".join(programs)},
                cwd=lab.root,
                start_new_session=True,
                text=True,
                bufsize=1,
            )
        lab.children.append(cast("subprocess.Popen[bytes]", self._popen))
        self._thread = threading.Thread(target=self._listen, name="forking", daemon=True)
        self._thread.start()
        self._ready = False

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, *exception: object) -> None:
        self._popen.kill()
        self._popen.wait()
        self._thread.join()
        for pipe in (self._popen.stdin, self._popen.stdout):
            assert pipe is not None
            pipe.close()

    def fork(self, program: str, arguments: Sequence[str], log: Path, namespace: Path | None,
             environment: Mapping[str, str]) -> int:  # fmt: skip
        """Return the pid of a new process. Raises LabFailed."""
        if not self._ready:
            self._answer("ready")
            self._ready = True
        wanted = {"program": program, "arguments": list(arguments), "log": str(log),
                  "namespace": namespace and str(namespace), "environment": dict(environment)}  # fmt: skip
        assert self._popen.stdin is not None
        self._popen.stdin.write(json.dumps(wanted) + "\n")
        return self._answer("started")

    def status(self, pid: int, timeout: float | None = 0.0) -> int | None:
        """Return how a process ended, waiting `timeout` seconds for it (None: as long as it takes); None: it runs."""
        with self._changed:
            self._changed.wait_for(lambda: pid in self._ended, timeout)
            return self._ended.get(pid)

    def _answer(self, word: str) -> int:
        try:
            return self._answers.get(timeout=_PATIENCE)[word]
        except (queue.Empty, KeyError):
            text = (self.lab.root / "logs" / "forking.log").read_text()
            raise LabFailed(f"the process that forks does not answer:\n{text}") from None

    def _listen(self) -> None:
        assert self._popen.stdout is not None
        for line in self._popen.stdout:
            said = json.loads(line)
            if "ended" in said:
                with self._changed:
                    self._ended[said["ended"]] = said["status"]
                    self._changed.notify_all()
            else:
                self._answers.put(said)
        self._answers.put({})


class _Handle:
    """What `Process` needs of a Popen."""

    def __init__(self, forks: Forks, pid: int) -> None:
        self._forks = forks
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        return self._forks.status(self.pid)

    def wait(self, timeout: float | None = None) -> int:
        status = self._forks.status(self.pid, timeout)
        if status is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return status


class Forked(Process):
    """A process that was forked on `host`, its output in a log like any other's."""

    def __init__(self, forks: Forks, name: str, program: str, arguments: Sequence[str], *, host: Host | None = None,
                 environment: Mapping[str, str] | None = None) -> None:  # fmt: skip
        self.name = name
        self.host = host
        self.log = forks.lab.root / "logs" / f"{name}.log"
        namespace = host.namespace if host else None
        pid = forks.fork(program, arguments, self.log, namespace, environment or {})
        self.popen = cast("subprocess.Popen[bytes]", _Handle(forks, pid))
