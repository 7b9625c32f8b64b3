"""How things look on a terminal: sizes, tables, the progress of long work. rich is imported only when it draws."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import click

from dadi.publish.progress import Progress as Reporting

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


def duration(seconds: float) -> str:
    """Return seconds as people read them: 43 s, 12:05, 3:00:12."""
    whole = round(seconds)
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}:{minutes:02}:{rest:02}"
    return f"{minutes}:{rest:02}" if minutes else f"{whole} s"


class Transfer(Reporting):
    """The progress of reading and pushing layers: bytes, layers, rate, time left.

    One line a stage and a layer; below these a live one on a terminal, elsewhere one every `_EVERY` seconds at most.
    All of it goes to standard error. With `quiet` only notices are shown.
    """

    _EVERY = 5.0

    def __init__(self, what: str, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._what, self._quiet, self._clock = what, quiet, clock
        self._began = self._said = clock()
        self._layers = self._layers_done = self._size = self._done = 0
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> Transfer:
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            # What is being done stands above: beside the figures it would push them out of 80 columns.
            self._progress = Progress(SpinnerColumn(), BarColumn(bar_width=16), TextColumn("{task.fields[detail]}"),
                                      console=Console(stderr=True), transient=True)  # fmt: skip
            self._progress.start()
            self._task = self._progress.add_task(self._what, total=None, detail="")
        return self

    def __exit__(self, *exc: object) -> None:
        if self._progress:
            self._progress.stop()

    def expect(self, *, layers: int = 0, size: int = 0) -> None:
        self._layers += layers
        self._size += size
        if layers:
            self._began = self._clock()  # what comes before the first byte says nothing about the rate

    def advance(self, size: int) -> None:
        self._done += size
        self._draw()
        if self._progress is None and self._clock() - self._said >= self._EVERY:
            self._line(self._detail())

    def _draw(self) -> None:
        if self._progress is not None and self._task is not None:
            self._progress.update(self._task, total=self._size or None, completed=self._done, detail=self._detail())

    def layer(self, digest: str, text: str) -> None:
        self._layers_done += 1
        self._draw()
        self._print(f"layer {digest[7:19]}: {text} ({self._layers_done} of {self._layers})")

    def stage(self, text: str) -> None:
        self._line(text)

    def notice(self, text: str) -> None:
        self._print(text, always=True)

    def _detail(self) -> str:
        seconds = max(self._clock() - self._began, 1e-3)
        rate = self._done / seconds
        left = f", {duration((self._size - self._done) / rate)} left" if 0 < self._done < self._size else ""
        return (f"{size(self._done)} of {size(self._size)}, {self._layers_done}/{self._layers} layers, "
                f"{size(rate)}/s{left}")  # fmt: skip

    def _line(self, text: str) -> None:
        self._said = self._clock()
        self._print(f"{self._what}: {text}")

    def _print(self, text: str, *, always: bool = False) -> None:
        if self._progress is not None:
            self._progress.console.print(text, markup=False, highlight=False)
        elif always or not self._quiet:
            click.echo(text, err=True)
