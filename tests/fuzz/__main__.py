"""`make fuzz`: each target by atheris, which follows the branches that an input takes; one process for each.

    make fuzz                           every target for 60 seconds
    make fuzz ARGS="tar token --seconds 600"
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import click

from tests.fuzz.targets import TARGETS

CORPUS = Path(__file__).parents[2] / ".cache/fuzz"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, metavar="[TARGET]...")
@click.option("--seconds", default=60, show_default=True, help="Time for each target.")
@click.option("--list", "show", is_flag=True, help="List the targets.")
def main(names: tuple[str, ...], seconds: int, show: bool) -> None:
    """Fuzz everything that parses bytes from outside; the input that broke a target is named, and kept."""
    unknown = set(names) - set(TARGETS)
    if unknown:
        raise click.UsageError(f"no such target: {', '.join(sorted(unknown))} (--list)")
    if show:
        click.echo("\n".join(TARGETS))
    else:
        broken = [name for name in names or TARGETS if not _survives(name, seconds)]
        click.echo(f"broken: {', '.join(broken)}; see {CORPUS}" if broken else "nothing broke")
        sys.exit(bool(broken))


def _survives(name: str, seconds: int) -> bool:
    click.echo(f"{name}: {seconds} s", err=True)
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.one", name, str(seconds), str(CORPUS)],
        check=False, capture_output=True, text=True, errors="replace", timeout=seconds + 120,
    )  # fmt: skip
    if done.returncode != 0:
        click.echo(done.stdout[-3000:] + done.stderr[-3000:], err=True)
    return done.returncode == 0


if __name__ == "__main__":
    main()
