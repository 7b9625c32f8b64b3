"""Debian's containerd in a lab, for comparison: pulls and unpacks an image as containers get theirs ordinarily.

What lives here: one private containerd with all of its files in the lab's directory. What never does: the machine's
own containerd, its socket, or its state.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from tests.lab.cleanup import Lab
from tests.lab.network import Host
from tests.lab.processes import LabFailed, Process, dadi

_TIDY = """[plugins."io.containerd.gc.v1.scheduler"]
startup_delay = "10ms"
schedule_delay = "0ms"
deletion_threshold = 1
"""


@dataclass(frozen=True)
class Pull:
    """How long a pull with its unpacking took, in seconds, and what crossed the host's link for it, in bytes."""

    seconds: float
    received: int


class Running:
    """A container from its start to its end: entered with the first line that its program prints, left when it ended.

    `start` starts it before it is entered, so that many can be started before the first is waited for.
    """

    def __init__(self, command: Sequence[str], lab: Lab) -> None:
        self._command = command
        self._lab = lab
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=self._lab.environment,
        )  # fmt: skip
        self._lab.children.append(self._process)

    def __enter__(self) -> str:
        if self._process is None:
            self.start()
        assert self._process is not None
        assert self._process.stdout is not None
        return self._process.stdout.readline().rstrip("\n")

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        assert self._process is not None
        if kind is not None:
            self._process.kill()
        _, said = self._process.communicate()
        if self._process.returncode != 0 and kind is None:
            raise LabFailed(f"{' '.join(self._command)}: {said.strip()}")


class Containerd(Process):
    """containerd on `host`, or on this machine; ended with the lab. Its directory stays when it is started again.

    `snapshotter`: the socket of its proxy plugin `dadi`. `config`: TOML of one's own, in the place of that plugin's.
    With `tidy` it collects garbage as soon as something has been removed. `cri`: with Kubernetes' side of it.
    `namespace`: what `ctr` works in where it is not told.
    """

    def __init__(
        self,
        lab: Lab,
        host: Host | None = None,
        name: str = "containerd",
        *,
        snapshotter: Path | None = None,
        config: str = "",
        tidy: bool = False,
        cri: bool = False,
        namespace: str = "default",
    ) -> None:
        self.directory = lab.root / name
        self.directory.mkdir(exist_ok=True)
        self.socket = self.directory / "sock"  # short: a socket path has at most 107 bytes
        self._lab = lab
        self._environment = {**lab.environment, "CONTAINERD_NAMESPACE": namespace}
        disabled = ["io.containerd.internal.v1.opt", *([] if cri else ["io.containerd.grpc.v1.cri"])]
        if snapshotter is not None:
            config += f'[proxy_plugins.dadi]\ntype = "snapshot"\naddress = "{snapshotter}"\n'
        file = self.directory / "config.toml"
        file.write_text(
            f'{"" if "version = 2" in config else "version = 2"}\n'
            f'root = "{self.directory / "root"}"\nstate = "{self.directory / "state"}"\n'
            f'disabled_plugins = {json.dumps(disabled)}\n{config}\n[grpc]\naddress = "{self.socket}"\n'
            + (_TIDY if tidy else "")
        )
        super().__init__(lab, name, ["containerd", "--config", str(file)], host=host)
        self.wait_until(lambda: self.socket.exists() and self.ctr("version", check=False).returncode == 0)

    def ctr(self, *arguments: str, check: bool = True, timeout: float = 600.0) -> subprocess.CompletedProcess[str]:
        """Run `ctr` against this containerd, on its host (ctr itself talks to the registry, not containerd)."""
        done = subprocess.run(
            [*self._ctr, *arguments], capture_output=True, text=True, check=False, env=self._environment,
            timeout=timeout, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        if check and done.returncode != 0:
            raise LabFailed(f"ctr {' '.join(arguments)}: {done.stderr.strip()}\n{self.tail()}")
        return done

    @property
    def _ctr(self) -> list[str]:
        return [*(self.host.prefix if self.host else []), "ctr", "--address", str(self.socket)]

    def pull(self, reference: str, snapshotter: str = "overlayfs") -> Pull:
        """Pull and unpack, as `ctr images pull` does it; the image's content counts as there when this returns."""
        assert self.host is not None
        before, start = self.host.traffic(), time.monotonic()
        self.ctr("images", "pull", "--plain-http", "--snapshotter", snapshotter, reference)
        return Pull(time.monotonic() - start, (self.host.traffic() - before).received)

    def pull_lazily(self, reference: str, host: Host | None = None) -> None:
        """`dadi pull`, on the host of the node that is this containerd's snapshotter (default: ours)."""
        dadi(self._lab, "pull", reference, "--plain-http", "--containerd-address", str(self.socket), "--json",
             host=host or self.host)  # fmt: skip

    def run(self, reference: str, name: str, command: Sequence[str], snapshotter: str = "overlayfs", *,
            namespace: str = "") -> str:  # fmt: skip
        """Run a container by runc until it ends; return what it printed."""
        return self.ctr(*_in(namespace), *self._run(reference, name, command, snapshotter, "--rm")).stdout

    def start(self, reference: str, name: str, command: Sequence[str], snapshotter: str = "overlayfs", *,
              namespace: str = "") -> None:  # fmt: skip
        """Start a container that goes on when this returns."""
        how = ("--detach", "--null-io")
        self.ctr(*_in(namespace), *self._run(reference, name, command, snapshotter, *how))

    def running(self, reference: str, name: str, command: Sequence[str], snapshotter: str = "overlayfs") -> Running:
        """Return a container that can be started; see `Running`."""
        return Running([*self._ctr, *self._run(reference, name, command, snapshotter, "--rm")], self._lab)

    def _run(self, reference: str, name: str, command: Sequence[str], snapshotter: str, *how: str) -> list[str]:
        # containers do not inherit our environment, and the lab finds its processes by it
        mark = [f"--env={key}={self._lab.environment[key]}" for key in ("DADI_LAB", "DADI_LAB_ROOT")]
        runc = f"--runc-root={self._lab.root / 'runc'}"
        return ["run", *how, *mark, runc, "--snapshotter", snapshotter, reference, name, *command]

    def mount(self, reference: str, directory: Path, snapshotter: str = "overlayfs") -> None:
        """Mount the unpacked image read-only at `directory`; `unmount` before the lab ends, or let the lab do it."""
        directory.mkdir(exist_ok=True)
        self.ctr("images", "mount", "--snapshotter", snapshotter, reference, str(directory))

    def unmount(self, directory: Path, snapshotter: str = "overlayfs") -> None:
        self.ctr("images", "unmount", "--rm", "--snapshotter", snapshotter, str(directory))


def remove_cgroups(name: str) -> None:
    """Remove the cgroups that runc has made below `name`, a namespace of containerd: they are outside of the lab."""
    for cgroup in sorted(Path("/sys/fs/cgroup").glob(f"**/{name}/**"), reverse=True):
        with contextlib.suppress(OSError):  # a container that a failed test has left is still in it
            cgroup.rmdir()


def _in(namespace: str) -> list[str]:
    return ["--namespace", namespace] if namespace else []
