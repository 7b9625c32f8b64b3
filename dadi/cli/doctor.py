"""`dadi doctor`: what this machine has and lacks."""

from __future__ import annotations

import sys

import click
import msgspec

from dadi.cli import show
from dadi.cli.client import as_json
from dadi.cli.pull import containerd_address
from dadi.containerd import check, mirror_check
from dadi.node import kernel


@click.command(short_help="Check what this machine has and lacks.")
@containerd_address
@as_json
def doctor(containerd_address: str, as_json: bool) -> None:
    """Check whether this machine has what dadi-node needs. Exit status 1 if something is lacking.

    Where containerd runs, also whether it knows dadi; a machine without containerd lacks nothing. Where engines are
    told to pull through a registry proxy, whether it answers.
    """
    rows = [*kernel.probe(), *check.probe(containerd_address), *mirror_check.probe(containerd_address)]
    if as_json:
        click.echo(msgspec.json.encode([
            {"name": row.name, "ok": row.ok, "detail": row.detail, "hint": row.hint} for row in rows
        ]))  # fmt: skip
    else:
        table = show.table("", "what", "found", "what to do")
        for row in rows:
            table.add_row("ok" if row.ok else "LACKS", row.name, row.detail, "" if row.ok else row.hint)
        show.print_table(table)
    sys.exit(0 if all(row.ok for row in rows) else 1)
