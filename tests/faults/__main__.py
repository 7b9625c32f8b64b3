"""`python -m tests.faults [NAME …]`: runs the cases whose names begin so (all without names), prints the table."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import click
from rich.console import Console

from tests.faults import frame, table
from tests.faults.supply import Supply
from tests.lab.cleanup import Interrupted, Lab, leak_check, signals_as_exceptions, sweep


@click.command()
@click.argument("names", nargs=-1)
@click.option("--long", is_flag=True, help="Fifty kills instead of a few, outages of a minute and not of seconds.")
@click.option("--seed", default=1, show_default=True, help="Of what is left to chance.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write the rows to a file.")
@click.option("--markdown", "markdown_file", type=click.Path(dir_okay=False, path_type=Path), help="The table, too.")
@click.option("--list", "listing", is_flag=True, help="Print the names and what they are about.")
def main(names: tuple[str, ...], long: bool, seed: int, json_file: Path | None, markdown_file: Path | None,
         listing: bool) -> None:  # fmt: skip
    """Break everything around running containers, in earnest, and count what their reads notice."""
    console = Console(highlight=False, soft_wrap=True, width=max(Console().width, 140))
    cases = [case for case in frame.all_cases() if not names or case.name.startswith(names)]
    if listing or not cases:
        for case in cases or frame.all_cases():
            console.print(f"{case.name:24} {case.title}", markup=False)
        sys.exit(0 if listing else 2)
    if os.geteuid() != 0:
        console.print("The fault suite needs root: it mounts images.")
        sys.exit(1)
    rows: list[frame.Row] = []
    try:
        with signals_as_exceptions():
            sweep()
            _run(console, cases, rows, long, seed)
    except (KeyboardInterrupt, Interrupted):
        console.print("Interrupted; everything that was started has been taken down.")
        sys.exit(130)
    console.print()
    console.print(table.for_people(rows))
    if json_file:
        json_file.write_text(table.as_json(rows))
    if markdown_file:
        markdown_file.write_text(table.as_markdown(rows))
    sys.exit(1 if any(row.broken for row in rows) else 0)


def _run(console: Console, cases: list[frame.Case], rows: list[frame.Row], long: bool, seed: int) -> None:
    with Lab("suite") as suite, leak_check(suite.root) as leaks, Lab("supply", suite.root) as lab, \
         Supply(lab) as supply, frame.Stage(supply, suite.root, long=long, seed=seed) as stage:  # fmt: skip
        for case, following in zip(cases, [*cases[1:], None], strict=True):
            console.print(f"{case.title} …", end=" ", markup=False)
            row = stage.run(case, last=not frame.shares(case, following))
            rows.append(row)
            console.print(f"{row.seconds:.0f} s{': ' if row.note or row.broken else ''}{row.note}", markup=False)
            if row.broken:
                console.print(row.broken, style="red", markup=False)
    for leak in leaks.found:
        console.print(f"left behind: {leak}", style="red", markup=False)


if __name__ == "__main__":
    main()
