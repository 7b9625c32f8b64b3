"""`dadi install-units`: systemd units for our daemons."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import click

from dadi.errors import Conflict
from dadi.units import texts
from dadi.units.install import Outcome, headed, install


@click.command("install-units", short_help="Write systemd units for the daemons.")
@click.option("--node", "programs", multiple=True, flag_value="dadi-node", help="dadi-node's (the default).")
@click.option("--superpeer", "programs", multiple=True, flag_value="dadi-superpeer", help="dadi-superpeer's.")
@click.option("--registry-proxy", "programs", multiple=True, flag_value="dadi-registry-proxy",
              help="dadi-registry-proxy's.")  # fmt: skip
@click.option("--root", metavar="DIR", default="/", help="Install below it: the root of a machine image, say.")
@click.option("--bin", "binaries", metavar="DIR", help="Where the programs are, as the unit is to say. Default: where "
              "this `dadi` is.")  # fmt: skip
@click.option("--systemd", metavar="VERSION", type=int, help="For this version; default: the one of this machine.")
@click.option("--print", "print_only", is_flag=True, help="Print the units, write nothing.")
@click.option("--force", is_flag=True, help="Also replace units that were edited.")
def install_units(
    programs: tuple[str, ...], root: str, binaries: str | None, systemd: int | None, print_only: bool, force: bool
) -> None:
    """Write systemd units into /etc/systemd/system, with the settings that keep containers running.

    Says what it changes; a second run changes nothing. A unit that somebody has edited is left as it is, with exit
    status 1, unless --force. It starts nothing: `systemctl daemon-reload` and `systemctl enable --now` are yours.
    """
    version = systemd or _systemd() or texts.KEEPS_DESCRIPTORS - 1
    directory = Path(binaries) if binaries else _binaries()
    chosen = [program for program in texts.PROGRAMS if program in (programs or ("dadi-node",))]
    left = changed = 0
    for program in chosen:
        text = texts.unit(program, version, str(directory))
        if print_only:
            click.echo(headed(text))
            continue
        change = install(Path(root), f"{program}.service", text, force=force)
        click.echo(f"{change.path}: {change.outcome.value}")
        if change.outcome in (Outcome.OLD, Outcome.EDITED, Outcome.FORCED):
            click.echo(change.diff, nl=False)
        left += change.outcome is Outcome.EDITED
        changed += change.outcome not in (Outcome.EDITED, Outcome.SAME)
        config = Path(root) / "etc/dadi" / f"{program.removeprefix('dadi-')}.toml"
        if not config.exists():
            click.echo(f"it needs {config}: {program} --print-default-config prints one", err=True)
    if changed:
        click.echo("next: systemctl daemon-reload && systemctl enable --now " + " ".join(chosen), err=True)
    if left:
        raise Conflict(f"{left} units were edited by somebody", hint="--force replaces them; or use drop-ins")


def _systemd() -> int | None:
    """Return this machine's version of systemd."""
    try:
        done = subprocess.run(["systemctl", "--version"], capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    found = re.match(r"systemd ([0-9]+)", done.stdout)
    return int(found[1]) if found else None


def _binaries() -> Path:
    beside = Path(sys.executable).parent
    if (beside / "dadi-node").exists():
        return beside
    found = shutil.which("dadi-node")
    return Path(found).parent if found else Path("/usr/bin")
