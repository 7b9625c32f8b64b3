"""`dadi containerd-config`: what to put into containerd's configuration."""

from __future__ import annotations

import subprocess

import click

from dadi.containerd import config
from dadi.errors import NotFound, Unavailable

_PATIENCE = 10.0
"""Seconds that `containerd --version` may take."""


@click.command(name="containerd-config")
@click.option("--version", "version_text", default="", metavar="VERSION", help=(
    "containerd's version: 1.6, 1.7, 2.0, 2.x. Default: that of this machine's."))
@click.option("--cri", is_flag=True, help="Also what makes Kubernetes (CRI) pull lazily.")
@click.option("--socket", default=config.SOCKET, show_default=True, metavar="PATH", help=(
    "Where dadi-node serves containerd: snapshotter.sock in its `run` directory."))
@click.option("--root", default=config.ROOT, show_default=True, metavar="DIR", help=(
    "Where dadi-node keeps its bytes: its `state` directory. Disk accounting looks there."))
def containerd_config(version_text: str, cri: bool, socket: str, root: str) -> None:  # fmt: skip
    """Print what has to be in containerd's config.toml, on standard output.

    `dadi doctor` then says whether it is in force.
    """
    version = config.parse_version(version_text) if version_text else config.printed_version(_asked())
    click.echo(config.text(version, cri=cri, socket=socket, root=root), nl=False)


def _asked() -> str:
    """Return what `containerd --version` prints."""
    try:
        command = ["containerd", "--version"]
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False).stdout
    except FileNotFoundError:
        raise NotFound("no containerd is installed here", hint="say which version it is for: --version 1.7") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`containerd --version`: {error}", hint="say which version it is for: --version") from None
