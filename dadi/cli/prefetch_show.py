"""How prefetching looks: a row for each image and datacenter, live on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click
import msgspec

from dadi.cli import show
from dadi.cli.prefetch_where import Place
from dadi.errors import DadiError
from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Readiness, Request
from dadi.prefetch.when import written
from dadi.wire import error_fields

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_EVERY = 5.0
_ORDER = [State.FAILED, State.CANCELLED, State.QUEUED, State.RESOLVING, State.WAITING, State.INDEXING, State.WARMING,
          State.VERIFYING, State.READY]  # fmt: skip


class Row:
    """One image in one datacenter: what each of its superpeers says of the job, or why it says nothing."""

    def __init__(self, request: Request, place: Place) -> None:
        self.request = request
        self.place = place
        self.jobs: dict[str, Job] = {}
        self.errors: dict[str, DadiError] = {}
        self.readiness: dict[str, Readiness] = {}

    @property
    def name(self) -> str:
        """What it is called."""
        return f"{self.request.reference} {self.request.platform} {self.place.name}"

    @property
    def total(self) -> int:
        """Bytes of all shares that are known."""
        return sum(job.total for job in self.jobs.values())

    @property
    def done(self) -> int:
        """Bytes of them that are there."""
        return sum(job.done for job in self.jobs.values())

    @property
    def state(self) -> str:
        """The state of who is least far."""
        if not self.jobs:
            return "away"
        return min((job.state for job in self.jobs.values()), key=_ORDER.index).value

    @property
    def proven(self) -> str:
        """The scope that was proven, by all superpeers: "full" where there was no trace for "startup"."""
        proven = {each.proven for each in self.readiness.values()} or {job.proven for job in self.jobs.values()}
        return min(proven) if proven else ""

    @property
    def problems(self) -> list[str]:
        """What is wrong, a sentence each; none where the image is proven to be ready (or, detached, on its way)."""
        found = [f"{url}: {error}" for url, error in self.errors.items()]
        for url, job in self.jobs.items():
            if (failure := job.failure()) is not None:
                found.append(f"{url}: {failure}")
            elif job.state is State.CANCELLED:
                found.append(f"{url}: the job was cancelled")
        return found + unproven(self.place, self.readiness)

    def fields(self) -> dict[str, Any]:
        """Return it for --json."""
        superpeers: dict[str, Any] = {url: msgspec.to_builtins(job) for url, job in self.jobs.items()}
        superpeers |= {url: error_fields(error) for url, error in self.errors.items()}
        return {
            "image": self.request.reference, "platform": self.request.platform, "scope": self.request.scope,
            "proven": self.proven, "datacenter": self.place.name, "state": self.state, "total": self.total,
            "done": self.done,
            "ready": bool(self.readiness) and not self.problems, "problems": self.problems, "superpeers": superpeers,
        }  # fmt: skip


def unproven(place: Place, readiness: dict[str, Readiness]) -> list[str]:
    """Return what is missing for an image to be ready in a datacenter, by what its superpeers say."""
    found: list[str] = []
    for url, told in readiness.items():
        found += [f"{url} lacks {lacking}" for lacking in told.lacking]
    manifests = {told.manifest_digest for told in readiness.values() if told.manifest_digest}
    if len(manifests) > 1:
        found.append(f"its superpeers have different images: {', '.join(sorted(manifests))}")
    names = {name for told in readiness.values() for name in told.superpeers}
    answered = {told.url for told in readiness.values()}
    if readiness and (silent := sorted(names - answered)):
        found.append(f"not asked, and so not proven: {', '.join(silent)}")
    return found


class Board:
    """The rows while jobs run, on standard error. With `quiet` nothing is shown."""

    def __init__(self, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._quiet = quiet
        self._clock = clock
        self._progress: Progress | None = None
        self._tasks: dict[int, TaskID] = {}
        self._said: dict[int, tuple[str, float]] = {}

    def __enter__(self) -> Board:
        if sys.stderr.isatty() and not self._quiet:
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                Progress,
                TextColumn,
                TimeRemainingColumn,
                TransferSpeedColumn,
            )

            self._progress = Progress(
                TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(),
                TimeRemainingColumn(), TextColumn("{task.fields[state]}"), console=Console(stderr=True),
            )  # fmt: skip
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def changed(self, row: Row) -> None:
        """Show a row as it is now."""
        if self._quiet:
            return
        stage = next((job.stage for job in row.jobs.values() if job.stage and not job.state.is_over), "")
        state = f"{row.state}: {stage}" if stage else row.state
        if self._progress is not None:
            task = self._tasks.get(id(row))
            if task is None:
                task = self._tasks[id(row)] = self._progress.add_task(row.name, total=None, state=state)
            self._progress.update(task, total=row.total or None, completed=row.done, state=state)
            return
        before, at = self._said.get(id(row), ("", 0.0))
        now = self._clock()
        if row.state == before and now - at < _EVERY:
            return
        self._said[id(row)] = (row.state, now)
        amount = f", {show.size(row.done)} of {show.size(row.total)}" if row.total else ""
        click.echo(f"{row.name}: {state}{amount}", err=True)


def results(rows: Sequence[Row], *, detached: bool) -> None:
    """Print what has become of the rows."""
    for row in rows:
        problems = row.problems
        ids = ", ".join(sorted({job.id for job in row.jobs.values()}))
        what = "not ready" if problems else f"job {ids} is {row.state}" if detached else "ready"
        amount = f", {show.size(row.done)}" if row.total and not detached else ""
        more = ", all of it" if what == "ready" and row.proven not in ("", row.request.scope) else ""
        click.echo(f"{row.name}: {what}{more}{amount}")
        for problem in problems:
            click.echo(f"  {problem}")
        for note in dict.fromkeys(note for job in row.jobs.values() for note in job.notes):
            click.echo(f"  note: {note}")


def jobs(rows: Sequence[tuple[str, str, Job]]) -> None:
    """Print a table of jobs: datacenter, superpeer, job."""
    if not rows:
        click.echo("no jobs")
        return
    table = show.table("job", "image", "platform", "scope", "superpeer", "state", "done", "of", "since")
    for _, url, job in rows:
        request = job.request
        table.add_row(job.id, request.reference, request.platform, request.scope, url, job.state.value,
                      show.size(job.done), show.size(job.total), written(job.changed))  # fmt: skip
    show.print_table(table)


def one(url: str, job: Job) -> None:
    """Print all of a job at one superpeer."""
    request = job.request
    click.echo(f"{job.id} at {url}: {job.state.value}" + (f", {job.stage}" if job.stage else ""))
    lines = {
        "image": f"{request.reference} {request.platform}, scope {request.scope}",
        "manifest": job.manifest_digest,
        "fetched": f"{show.size(job.done)} of {show.size(job.total)}",
        "rate": f"{show.size(request.rate)}/s" if request.rate else "",
        "proven": "all of it" if job.proven not in ("", request.scope) else "",
        "begins": written(request.at),
        "deadline": written(request.deadline),
        "tried": f"until {written(job.patience)}, {job.tries + 1} times by now" if job.tries else "",
        "pinned": f"until {written(request.pin_until)}" if request.pin_until else "",
        "nodes": f"{request.nodes}: {_nodes(job)}" if request.nodes else "",
        "shared": f"by {', '.join(job.superpeers)}" if len(job.superpeers) > 1 else "",
        "failed": str(job.failure() or ""),
    }
    for name, text in lines.items():
        if text:
            click.echo(f"  {name:<9} {text}")
    for pin in job.pins:
        click.echo(f"  kept      {pin.manifest} until {written(pin.until)}")
    for lacking in job.lacking:
        click.echo(f"  lacks     {lacking}")
    for note in job.notes:
        click.echo(f"  note      {note}")


def _nodes(job: Job) -> str:
    return ", ".join(f"{count} {state}" for state, count in sorted(job.nodes.items())) or "none has told yet"
