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
@click.option("--ca", default="", metavar="FILE", help=(
    "--mirror: who has signed an https proxy's certificate, if containerd is to trust more than the system does."))
@click.option("--registry", "registries", multiple=True, metavar="HOST", help=(
    "--mirror: a registry that gets a file of its own; http://HOST:PORT if it has no TLS. May be repeated."))
@click.option("--write", "directory", default=None, metavar="DIR", help=(
    f"--mirror: write the files below DIR ({mirrors.CERTS_D}) instead of printing them."))
def containerd_config(version_text: str, cri: bool, socket: str, root: str, mirror: bool, proxy: str, ca: str,
                      registries: tuple[str, ...], directory: str | None) -> None:  # fmt: skip
    """Print what has to be in containerd's config.toml, on standard output.

    `dadi doctor` then says whether it is in force. With --mirror: the hosts.toml files that make containerd ask a
    registry proxy first, and the registry itself when that does not answer.
    """
    if mirror:
        files = mirrors.files(proxy, registries, ca)
        if directory is None:
            for name, text in files.items():
                click.echo(f"# {mirrors.CERTS_D}/{name}\n{text}")
        else:
            _write(Path(directory), files)
        click.echo(mirrors.cri(directory or mirrors.CERTS_D), nl=False)
        return
    version = config.parse_version(version_text) if version_text else config.printed_version(_asked())
    click.echo(config.text(version, cri=cri, socket=socket, root=root), nl=False)


def _write(certs: Path, files: dict[str, str]) -> None:
    """Write all files or, where one would take the place of what somebody else has made, none."""
    for name in files:
        _check_free(certs / name)
    for name, text in files.items():
        path = certs / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        click.echo(f"wrote {path}")
    others = sorted(path.name for path in certs.iterdir() if path.is_dir() and f"{path.name}/hosts.toml" not in files
                    and not _read(path / "hosts.toml").startswith(mirrors.MARK))  # fmt: skip
    if others:
        click.echo(f"# past the proxy, by directories of their own in {certs}: {', '.join(others)}\n"
                   "# (the [host] table above all others of their hosts.toml changes that)")  # fmt: skip


def _check_free(path: Path) -> None:
    """Raise AlreadyExists if there is what containerd would no longer look at."""
    if path.exists() and not mirrors.is_ours(_read(path)):
        hint = "add the [host] table to it by hand, or move it away"
        raise AlreadyExists(f"{path} was not written by dadi, or was edited since", hint=hint)
    before = mirrors.looked_at_before(path.parent.name)
    if before and (path.parent.parent / before).exists():
        hint = f"add the [host] table to the hosts.toml there, or move it to {path.parent.name}"
        raise AlreadyExists(f"containerd looks into {path.parent.parent / before} first", hint=hint)
    if not path.exists() and path.parent.is_dir():
        certificates = sorted(one.name for one in path.parent.iterdir() if one.suffix in (".crt", ".cert", ".key"))
        if certificates:
            hint = 'write it by hand, with them below `server` (`ca = "FILE"`, `client = [["CERT", "KEY"]]`)'
            what = f"beside {path} containerd would no longer look at {', '.join(certificates)}"
            raise AlreadyExists(what, hint=hint)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _asked() -> str:
    """Return what `containerd --version` prints."""
    try:
        command = ["containerd", "--version"]
        return subprocess.run(command, capture_output=True, text=True, timeout=_PATIENCE, check=False).stdout
    except FileNotFoundError:
        raise NotFound("no containerd is installed here", hint="say which version it is for: --version 1.7") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"`containerd --version`: {error}", hint="say which version it is for: --version") from None
