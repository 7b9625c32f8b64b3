"""Debian's containerd in a lab, for comparison: pulls and unpacks an image as containers get theirs ordinarily.

What lives here: one private containerd with all of its files in the lab's directory. What never does: the machine's
own containerd, its socket, or its state.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.lab.cleanup import Lab
from tests.lab.network import Host
from tests.lab.processes import LabFailed, Process


@dataclass(frozen=True)
class Pull:
    """How long a pull with its unpacking took, in seconds, and what crossed the host's link for it, in bytes."""

    seconds: float
    received: int


class Containerd(Process):
    """containerd on `host`; ended and removed with the lab. `snapshotter`: the socket of its proxy plugin `dadi`."""

    def __init__(self, lab: Lab, host: Host, name: str = "containerd", *, snapshotter: Path | None = None) -> None:
        self._directory = lab.root / name
        self._directory.mkdir()
        self.socket = self._directory / "sock"  # short: a socket path has at most 107 bytes
        self._lab = lab
        config = self._directory / "config.toml"
        plugins = ["io.containerd.grpc.v1.cri", "io.containerd.internal.v1.opt"]
        config.write_text(
            f'version = 2\nroot = "{self._directory / "root"}"\nstate = "{self._directory / "state"}"\n'
            f'disabled_plugins = {json.dumps(plugins)}\n[grpc]\naddress = "{self.socket}"\n'
            + (f'[proxy_plugins.dadi]\ntype = "snapshot"\naddress = "{snapshotter}"\n' if snapshotter else "")
        )
        super().__init__(lab, name, ["containerd", "--config", str(config)], host=host)
        self.wait_until(lambda: self.socket.exists() and self.ctr("version", check=False).returncode == 0)

    def ctr(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run `ctr` against this containerd, on its host (ctr itself talks to the registry, not containerd)."""
        assert self.host is not None
        command = [*self.host.prefix, "ctr", "--address", str(self.socket), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self._lab.environment)
        if check and done.returncode != 0:
            raise LabFailed(f"ctr {' '.join(arguments)}: {done.stderr.strip()}\n{self.tail()}")
        return done

    def pull(self, reference: str, snapshotter: str = "overlayfs") -> Pull:
        """Pull and unpack, as `ctr images pull` does it; the image's content counts as there when this returns."""
        assert self.host is not None
        before, start = self.host.traffic(), time.monotonic()
        self.ctr("images", "pull", "--plain-http", "--snapshotter", snapshotter, reference)
        return Pull(time.monotonic() - start, (self.host.traffic() - before).received)

    def run(self, reference: str, name: str, command: Sequence[str], snapshotter: str = "overlayfs") -> str:
        """Run a container by runc until it ends; return what it printed."""
        mark = [f"--env={key}={self._lab.environment[key]}" for key in ("DADI_LAB", "DADI_LAB_ROOT")]
        runc = f"--runc-root={self._lab.root / 'runc'}"
        return self.ctr("run", "--rm", *mark, runc, "--snapshotter", snapshotter, reference, name, *command).stdout

    def mount(self, reference: str, directory: Path, snapshotter: str = "overlayfs") -> None:
        """Mount the unpacked image read-only at `directory`; `unmount` before the lab ends, or let the lab do it."""
        directory.mkdir(exist_ok=True)
        self.ctr("images", "mount", "--snapshotter", snapshotter, reference, str(directory))

    def unmount(self, directory: Path, snapshotter: str = "overlayfs") -> None:
        self.ctr("images", "unmount", "--rm", "--snapshotter", snapshotter, str(directory))
