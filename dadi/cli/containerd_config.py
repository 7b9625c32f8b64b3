"""`dadi containerd-config`: what to put into containerd's configuration."""

from __future__ import annotations

import subprocess
from pathlib import Path

import click

from dadi.containerd import config
from dadi.containerd import mirror as mirrors
from dadi.errors import AlreadyExists, NotFound, Unavailable

_PATIENCE = 10.0
"""Seconds that `containerd --version` may take."""


@click.command(name="containerd-config", short_help="Print what to put into containerd's config.toml.")
@click.option("--version", "version_text", default="", metavar="VERSION", help=(
    "containerd's version: 1.6, 1.7, 2.0, 2.x. Default: that of this machine's."))
@click.option("--cri", is_flag=True, help="Also what makes Kubernetes (CRI) pull lazily.")
@click.option("--socket", default=config.SOCKET, show_default=True, metavar="PATH", help=(
    "Where dadi-node serves containerd: snapshotter.sock in its `run` directory."))
@click.option("--root", default=config.ROOT, show_default=True, metavar="DIR", help=(
    "Where dadi-node keeps its bytes: its `state` directory. Disk accounting looks there."))
@click.option("--mirror", is_flag=True, help="Instead, what makes containerd pull through a registry proxy.")
@click.option("--proxy", default=mirrors.URL, show_default=True, metavar="URL", help=(
    "--mirror: where the proxy listens."))
@click.option("--registry", "registries", multiple=True, metavar="HOST", help=(
    "--mirror: a registry that gets a file of its own; http://HOST:PORT if it has no TLS. May be repeated."))
@click.option("--write", "directory", default=None, metavar="DIR", help=(
    f"--mirror: write the files below DIR ({mirrors.CERTS_D}) instead of printing them."))
def containerd_config(version_text: str, cri: bool, socket: str, root: str, mirror: bool, proxy: str,
                      registries: tuple[str, ...], directory: str | None) -> None:  # fmt: skip
    """Print what has to be in containerd's config.toml, on standard output.

    `dadi doctor` then says whether it is in force. With --mirror: the hosts.toml files that make containerd ask a
    registry proxy first, and the registry itself when that does not answer.
    """
    if mirror:
        _mirror(proxy, registries, directory)
        return
    version = config.parse_version(version_text) if version_text else config.printed_version(_asked())
    click.echo(config.text(version, cri=cri, socket=socket, root=root), nl=False)


def _mirror(proxy: str, registries: tuple[str, ...], directory: str | None) -> None:
    files = mirrors.files(proxy, registries)
    if directory is None:
        for name, text in files.items():
            click.echo(f"# {mirrors.CERTS_D}/{name}\n{text}")
        click.echo(mirrors.cri(mirrors.CERTS_D), nl=False)
        return
    for name in files:
        path = Path(directory) / name
        if path.exists() and not path.read_text(errors="replace").startswith(mirrors.MARK):
            hint = "add the [host] table to it by hand, or move it away"
            raise AlreadyExists(f"{path} was not written by dadi", hint=hint)
    for name, text in files.items():
        path = Path(directory) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        click.echo(f"wrote {path}")
    click.echo(mirrors.cri(directory), nl=False)


def _asked() -> str:
    """Return what `containerd --version` prints."""
    try:
        command = ["containerd", "--version"]
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False).stdout
    except FileNotFoundError:
        raise NotFound("no containerd is installed here", hint="say which version it is for: --version 1.7") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`containerd --version`: {error}", hint="say which version it is for: --version") from None
