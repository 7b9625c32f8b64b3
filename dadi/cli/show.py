"""How things look on a terminal: sizes, tables, the progress of long work. rich is imported only when it draws."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID
    from rich.table import Table


def size(count: float) -> str:
    """Return bytes as people read them: 195.3 MB (powers of 1000, as disks and links are sold)."""
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if abs(count) < 1000 or unit == "TB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def share(part: float, whole: float) -> str:
    """Return "43 %"; 100 % only when it is all."""
    if whole <= 0 or part >= whole:
        return "100 %"
    return f"{min(99, int(100 * part / whole))} %"


def table(*columns: str) -> Table:
    """Return a table without lines; a column is never cut: it is folded where the terminal ends."""
    from rich.table import Table

    made = Table(box=None, header_style="bold")
    for name in columns:
        made.add_column(name, overflow="fold")
    return made


def print_table(table: Table) -> None:
    """Print it on standard output; as wide as it needs where that is no terminal."""
    from rich.console import Console

    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    console.print(table)


class LongWork:
    """The progress of resolving, indexing and mounting: a live line on a terminal, a plain line a stage elsewhere.

    All of it goes to standard error.
    """

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self._what = what
        self._quiet = quiet
        self._stage = ""
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> LongWork:
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

            self._progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
                                      TextColumn("{task.fields[detail]}"), TimeElapsedColumn(),
                                      console=Console(stderr=True), transient=True)  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(self._what, total=None, detail="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress:
            self._progress.stop()

    def event(self, event: dict[str, Any]) -> None:
        """Show a "progress" event."""
        stage = str(event.get("stage", ""))
        total, done = event.get("total") or 0, event.get("bytes") or 0
        detail = f"{size(done)} of {size(total)}" if total else ""
        if event.get("layers"):
            detail += f", {event.get('layers_done')}/{event['layers']} layers"
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, description=f"{self._what}: {stage}", total=total or None,
                                  completed=done, detail=detail)  # fmt: skip
        elif stage != self._stage and not self._quiet:
            click.echo(f"{self._what}: {stage}", err=True)
        self._stage = stage
