"""The rows of the fault suite as a table: for a terminal, as markdown for the README, as JSON for programs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from rich.table import Table

from tests.faults.frame import Row

HEAD = ("what goes wrong", "times", "took", "reads", "failed", "bytes wrong", "longest read", "stalled in all", "")


def cells(row: Row) -> tuple[str, ...]:
    """Return one line of the table; stalled: the seconds of all readers together, in reads of more than one."""
    counts = row.counts
    times = f"{counts.longest:.1f} s", f"{counts.stalled:.1f} s"
    numbers = f"{row.hurt:,}", f"{row.seconds:.0f} s", f"{counts.tried:,}", str(counts.failed), str(counts.wrong)
    return row.title, *numbers, *times, "NOT AS IT SHOULD BE" if row.broken else ""


def for_people(rows: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(HEAD):
        table.add_column(name, no_wrap=True, justify="left" if number in (0, len(HEAD) - 1) else "right")
    for row in rows:
        table.add_row(*cells(row), style="red" if row.broken else None)
    return table


def as_markdown(rows: Sequence[Row]) -> str:
    bad = any(row.broken for row in rows)
    columns = len(HEAD) - (not bad)
    lines = [HEAD[:columns], ("---", *["---:"] * 7, "---")[:columns], *(cells(row)[:columns] for row in rows)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps([row.as_json() for row in rows], indent=1) + "\n"
