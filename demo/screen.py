"""What the demo prints: live on a terminal, plain lines elsewhere. No measuring, no processes.

A terminal gets colour, a spinner while something takes its time, and a progress bar. A pipe or a log gets the same
sentences as lines, each once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

_WIDTH = 46
_LABEL = 14


@dataclass(frozen=True)
class Bar:
    """One row of the comparison."""

    label: str
    seconds: float
    received: int
    note: str
    style: str


def megabytes(count: float) -> str:
    """Return bytes as people read them; powers of 1000, as links and disks are sold."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


class Screen:
    """Prints sentences. Everything it is given is text, not markup."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(highlight=False, soft_wrap=True)
        self.live = self._console.is_terminal

    def title(self, text: str, explanation: str) -> None:
        self._print(f"[bold]{escape(text)}[/]")
        self._print(f"[dim]{escape(explanation)}[/]")

    def fact(self, label: str, text: str) -> None:
        self._print(f"  [cyan]{label:<{_LABEL}}[/]{escape(text)}")

    def section(self, text: str) -> None:
        self._print("")
        self._print(f"[bold]{escape(text)}[/]")

    @contextmanager
    def working(self, text: str) -> Iterator[None]:
        """Show that something takes its time."""
        if self.live:
            with self._console.status(escape(text)):
                yield
        else:
            self._print(f"  … {escape(text)}")
            yield

    def event(self, seconds: float, text: str, *, strong: bool = False) -> None:
        """One moment of a timeline, `seconds` after its beginning."""
        style = "bold green" if strong else "default"
        self._print(f"  {seconds:8.2f} s  [{style}]{escape(text)}[/]")

    def bars(self, rows: Sequence[Bar]) -> None:
        """Draw durations to one scale."""
        longest = max(row.seconds for row in rows)
        for row in rows:
            bar = "█" * max(1, round(_WIDTH * row.seconds / longest))
            self._print(
                f"  {row.label:<{_LABEL}}[{row.style}]{bar:<{_WIDTH}}[/] {row.seconds:6.2f} s  "
                f"{megabytes(row.received):>9} crossed  {escape(row.note)}"
            )

    @contextmanager
    def progress(self, text: str, total: int) -> Iterator[ProgressLine]:
        """A bar that fills, in bytes."""
        if not self.live:
            yield ProgressLine(self, None, text, total)
            return
        columns = (TextColumn("  {task.description}"), BarColumn(40), TextColumn("{task.fields[detail]}"))
        with Progress(*columns, TimeElapsedColumn(), console=self._console) as bar:
            yield ProgressLine(self, bar, text, total)

    def good(self, text: str) -> None:
        self._print(f"  [bold green]{escape(text)}[/]")

    def problem(self, text: str) -> None:
        self._print(f"[bold red]{escape(text)}[/]")

    def _print(self, text: str) -> None:
        self._console.print(text)


class ProgressLine:
    """One bar, or a line each time another tenth is done."""

    def __init__(self, screen: Screen, bar: Progress | None, text: str, total: int) -> None:
        self._screen = screen
        self._bar = bar
        self._text = text
        self._total = total
        self._tenths = -1
        self._task = bar.add_task(text, total=total, detail="") if bar else None

    def update(self, done: int) -> None:
        detail = f"{megabytes(done)} of {megabytes(self._total)}"
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=done, detail=detail)
        elif done * 10 // self._total > self._tenths:
            self._tenths = done * 10 // self._total
            filled = "█" * (2 * self._tenths)
            self._screen.fact(self._text, f"{filled:<20} {detail}")
