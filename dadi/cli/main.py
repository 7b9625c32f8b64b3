"""`dadi`: the group of verbs, and the one place where an error becomes a sentence and exit status 1."""

from __future__ import annotations

import sys

import click

from dadi import __version__
from dadi.cli.containerd_config import containerd_config
from dadi.cli.convert import convert
from dadi.cli.doctor import doctor
from dadi.cli.drain import drain
from dadi.cli.index import index
from dadi.cli.inspect import inspect
from dadi.cli.install_units import install_units
from dadi.cli.mount import mount, umount
from dadi.cli.peers import peers
from dadi.cli.prefetch import prefetch
from dadi.cli.pull import pull
from dadi.cli.simulate import simulate
from dadi.cli.status import status
from dadi.cli.trace import trace
from dadi.cli.verify import verify
from dadi.errors import DadiError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dadi")
def cli() -> None:
    """Container images that start before they are there.

    Talks to the node daemon (dadi-node) of this machine; prefetch talks to superpeers, index, convert and pull to
    registries, pull also to containerd.
    """


for verb in (
    mount, umount, pull, prefetch, status, peers, trace, inspect, drain, verify, index, convert, simulate,
    containerd_config, install_units, doctor,
):  # fmt: skip
    cli.add_command(verb)


def main() -> None:
    """Run the command line; the console script."""
    try:
        cli(prog_name="dadi")
    except DadiError as error:
        click.echo(f"dadi: {error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
