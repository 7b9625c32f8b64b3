"""What `dadi doctor` looks at where there is a containerd: is dadi in its configuration, and does the plugin answer?

The running containerd is asked for its plugins. What CRI does it does not tell: `containerd config dump` prints what is
in the configuration file (that of the process at the other end of the socket), which may have changed since it started.
A machine without containerd, or where it does not run, lacks nothing.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import struct
import subprocess
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dadi.containerd import config
from dadi.containerd.config import PLUGIN
from dadi.errors import DadiError
from dadi.node.kernel import Feature

if TYPE_CHECKING:
    from dadi.containerd.client import Plugin

_PATIENCE = 10.0
"""Seconds for each thing that is asked."""
_SNAPSHOTTER = "io.containerd.snapshotter.v1"
_CRI = {"io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"}
DUMP_FAILS = (OSError, subprocess.SubprocessError, ValueError)
_NAME = "containerd"
_HINT = "`dadi containerd-config` prints what to put into its configuration; then restart containerd"


def probe(address: str) -> list[Feature]:
    """Return what there is to say of the containerd behind the socket `address`, a row each."""
    path = address.removeprefix("unix://")
    if not Path(path).exists():
        installed = shutil.which("containerd")
        found = f"installed ({installed}), not running: there is no {path}" if installed else "not on this machine"
        return [Feature(_NAME, True, found, "")]
    try:
        plugins = asyncio.run(_plugins(path))
    except DadiError as error:
        return [Feature(_NAME, False, error.message, error.hint or "see its log")]
    ours = [row for row in plugins if (row.type, row.id) == (_SNAPSHOTTER, PLUGIN)]
    if not ours:
        # Nothing is lacking: this machine may use dadi without containerd.
        return [Feature(f"containerd knows {PLUGIN}", True, f"no (behind {path}); {_HINT}", "")]
    if ours[0].error:
        return [Feature(f"containerd knows {PLUGIN}", False, ours[0].error, _HINT)]
    rows = [Feature(f"containerd knows {PLUGIN}", True, f"the snapshotter {PLUGIN} is loaded", "")]
    rows.append(_socket(ours[0].exports.get("address", "")))
    if any(f"{row.type}.{row.id}" in _CRI and not row.error for row in plugins):
        rows.append(_cri(path))
    return rows


def dumped(path: str) -> dict[str, Any]:
    """Return what `containerd config dump` prints for who listens on a socket; see `DUMP_FAILS` for what it raises."""
    file = _config_file(path)
    command = ["containerd", *(("--config", file) if file else ()), "config", "dump"]
    return tomllib.loads(subprocess.run(command, capture_output=True, timeout=_PATIENCE, check=True).stdout.decode())


async def _plugins(path: str) -> list[Plugin]:
    from dadi.containerd.client import connect

    async with connect(path, "default") as containerd:
        return await containerd.plugins(_PATIENCE)


def _socket(address: str) -> Feature:
    name = "snapshotter's socket"
    if not address:
        return Feature(name, True, "containerd does not say which it is", "")
    path = address.removeprefix("unix://")
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(_PATIENCE)
        try:
            client.connect(path)
        except OSError as error:
            return Feature(name, False, f"{path}: {error.strerror or error}", "start dadi-node, or configure its place")
    return Feature(name, True, f"{path} answers", "")


def _config_file(path: str) -> str | None:
    """Return the configuration file that the process listening on a socket was started with; None if it says none."""
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_PATIENCE)
            client.connect(path)
            pid, _, _ = struct.unpack("3i", client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        words = [os.fsdecode(word) for word in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")]
    except OSError:
        return None
    for word, following in zip(words, [*words[1:], ""], strict=True):
        option, equals, value = word.partition("=")
        if option in ("-c", "--config", "-config") and (value if equals else following):
            return value if equals else following
    return None


def _cri(path: str) -> Feature:
    name = "Kubernetes (CRI) pulls lazily"
    try:
        settings = config.cri_settings(dumped(path))
    except DUMP_FAILS as error:
        return Feature(name, True, f"not known: `containerd config dump`: {error}", "")
    if settings is None:
        return Feature(name, True, "not known: `containerd config dump` says nothing of CRI", "")
    if settings.snapshotter != PLUGIN:
        return Feature(name, True, f"no: it is set to {settings.snapshotter} (`dadi containerd-config --cri`)", "")
    if not settings.annotations:
        detail = f"its snapshotter is {PLUGIN}, but it does not tell it where layers come from"
        return Feature(name, False, detail, "`dadi containerd-config --cri` prints what is missing")
    return Feature(name, True, f"yes, with {PLUGIN}", "")
