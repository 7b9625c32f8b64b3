"""How things look on a terminal: sizes, bars, the progress of long work. No decisions, no I/O but printing."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

console = Console(stderr=False)
messages = Console(stderr=True)


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


class LongWork:
    """The progress of resolving, indexing and mounting: a live line on a terminal, a plain line a stage elsewhere."""

    def __init__(self, what: str, *, quiet: bool = False) -> None:
        self._what = what
        self._quiet = quiet
        self._stage = ""
        self._progress: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> LongWork:
        if messages.is_terminal and not self._quiet:
            self._progress = Progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(),
                                      TextColumn("{task.fields[detail]}"), TimeElapsedColumn(),
                                      console=messages, transient=True)  # fmt: skip
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
            messages.print(f"{self._what}: {stage}", highlight=False)
        self._stage = stage
