"""What all benchmarks share: rows with targets, medians, the machine's description, tables and plots on disk.

What lives here: how results look. What never does: a measurement. A benchmark is a module of this package with a
docstring (its first line is the title) and a function `run(bench: Bench) -> None`, which adds rows.

    bench/results/NAME.json    everything, every single measurement
    bench/results/NAME.md      the table
    bench/results/NAME.png     the plot
    bench/results/README.md    all tables, after the machine

Ratios are between values of one run: both sides are measured in turn, minutes apart at most, and compared by medians.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import textwrap
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Row:
    """One line of a table: what we measured (`values`) beside what it is compared with (`baseline`).

    `better` says which way is good. A row's ratio is ours to theirs for "more", theirs to ours for "less", so that 1
    is a draw and more is better; its `target` is the least ratio. With `limit`, the value itself must stay below.
    """

    what: str
    unit: str
    values: list[float]
    baseline: list[float] = field(default_factory=list)
    better: str = "more"
    target: float | None = None
    limit: float | None = None
    note: str = ""

    @property
    def value(self) -> float:
        return statistics.median(self.values)

    @property
    def base(self) -> float | None:
        return statistics.median(self.baseline) if self.baseline else None

    @property
    def ratio(self) -> float | None:
        if self.base is None or not self.value or not self.base:
            return None
        return self.value / self.base if self.better == "more" else self.base / self.value

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None when there is none."""
        if self.target is not None and self.ratio is not None:
            return self.ratio >= self.target
        return None if self.limit is None else self.value < self.limit

    @property
    def verdict(self) -> str:
        return {True: "met", False: "MISSED", None: ""}[self.met]


class Bench:
    """Collects the rows of one benchmark and writes them down. `quick` asks for fewer and smaller measurements."""

    def __init__(self, name: str, title: str, *, quick: bool = False, console: Console | None = None) -> None:
        self.name = name
        self.title = title
        self.quick = quick
        self.ours = "dadi"
        self.theirs = "baseline"
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self._console = console or Console(highlight=False, soft_wrap=True)

    def say(self, text: str) -> None:
        """Tell the person who waits what is being measured."""
        self._console.print(f"  … {text}", markup=False)

    def add(self, row: Row) -> Row:
        """Take a finished row and print it."""
        self.rows.append(row)
        base = "" if row.base is None else f"  {self.theirs} {number(row.base)} {row.unit}"
        ratio = "" if row.ratio is None else f"  ratio {row.ratio:.2f}"
        self._console.print(
            f"  {row.what}: {self.ours} {number(row.value)} {row.unit}{base}{ratio}  {row.verdict}", markup=False
        )
        return row

    def note(self, text: str) -> None:
        """Add a sentence below the table: what was done, or why a target was missed."""
        self.notes.append(text)

    def write(self, directory: Path = RESULTS) -> None:
        """Write JSON, table and plot."""
        directory.mkdir(parents=True, exist_ok=True)
        record = {"name": self.name, "title": self.title, "quick": self.quick, "ours": self.ours, "theirs": self.theirs,
                  "rows": [asdict(row) for row in self.rows], "notes": self.notes, "machine": machine()}  # fmt: skip
        (directory / f"{self.name}.json").write_text(json.dumps(record, indent=1) + "\n")
        text = table(self)
        if any(row.baseline or row.limit for row in self.rows):
            plot(self, directory / f"{self.name}.png")
            text += f"\n![{self.title}]({self.name}.png)\n"
        (directory / f"{self.name}.md").write_text(text)


def table(bench: Bench) -> str:
    """Return the benchmark as Markdown."""
    head = ["", bench.ours, bench.theirs, "ratio", "target", ""]
    lines = [head, ["---", *["---:"] * 4, "---"]]
    for row in bench.rows:
        base = "" if row.base is None else f"{number(row.base)} {row.unit}"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        target = f"≥ {row.target:g}" if row.target is not None else ""
        if row.limit is not None:
            target = f"< {number(row.limit)} {row.unit}"
        verdict = f"{row.verdict} {row.note}".strip()
        lines.append([row.what, f"{number(row.value)} {row.unit}", base, ratio, target, verdict])
    lines = [[cell.replace("|", "\\|") for cell in cells] for cells in lines]
    text = f"## {bench.title}\n\n" + "".join(f"| {' | '.join(cells)} |\n" for cells in lines)
    if bench.quick:
        text += "\nA quick run: fewer and smaller measurements than usual.\n"
    return text + "".join(f"\n{note}\n" for note in bench.notes)


def plot(bench: Bench, path: Path) -> None:
    """Draw each comparison as a pair of bars relative to the baseline, with single measurements as dots.

    A row that has a limit and no baseline is one bar, relative to the limit.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = [row for row in bench.rows if row.base or row.limit]
    figure, axes = pyplot.subplots(figsize=(9, 1.4 + 0.62 * len(rows)), layout="constrained")
    for at, row in enumerate(rows):
        whole = row.base or row.limit or 1.0
        for shift, values, colour in ((-0.2, row.baseline, "#9aa0a6"), (0.2, row.values, "#1a7f5a")):
            if not values:
                continue
            middle = statistics.median(values)
            axes.barh(at + shift, middle / whole, height=0.36, color=colour)
            axes.plot([v / whole for v in values], [at + shift] * len(values), ".", color="black", markersize=3)
            axes.text(max(values) / whole, at + shift, f"  {number(middle)} {row.unit}", va="center", fontsize=8)
        mark = None if row.target is None else row.target if row.better == "more" else 1 / row.target
        if row.limit is not None:
            mark = row.limit / whole
        if mark is not None:
            axes.plot([mark, mark], [at - 0.45, at + 0.45], "--", color="#b3261e", linewidth=1)
    better = ["less" if row.limit is not None else row.better for row in rows]
    axes.set_yticks(range(len(rows)), [f"{row.what}\n({b} is better)" for row, b in zip(rows, better, strict=True)],
                    fontsize=8)  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.18)
    grey = f"relative to {bench.theirs} (grey)" if any(row.base for row in rows) else "relative to the limit"
    axes.set_xlabel(f"{grey}; green: {bench.ours}; dashed: target", fontsize=9)
    figure.suptitle("\n".join(textwrap.wrap(bench.title, 90)), fontsize=10)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


_OF_ONE_RUN = ("load when written", "date")


def summary(directory: Path = RESULTS) -> str:
    """Write and return README.md: the machine, then every table that is there, from its latest run."""
    records = [json.loads(path.read_text()) for path in sorted(directory.glob("*.json"))]
    text = "# Measurements\n\nWritten by `make bench`. Ratios are ours to theirs, turned so that more is better.\n"
    if records:
        common = {key: value for key, value in records[-1]["machine"].items() if key not in _OF_ONE_RUN}
        text += "\n" + "".join(f"- {key}: {value}\n" for key, value in common.items())
    for r in records:
        text += f"\n{(directory / (r['name'] + '.md')).read_text()}"
        text += f"\nWritten on {r['machine']['date']}, load {r['machine']['load when written']}.\n"
    (directory / "README.md").write_text(text)
    return text


def machine() -> dict[str, str]:
    """Describe this machine: what a reader needs to judge the numbers, nothing that identifies it."""
    cpu = _first(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo"))
    memory = int(_first(r"^MemTotal:\s*(\d+) kB", Path("/proc/meminfo")) or 0) / (1 << 20)
    disk = subprocess.run(["df", "--output=fstype", str(RESULTS.parent)], capture_output=True, text=True, check=False)
    return {
        "processor": f"{cpu}, {os.cpu_count()} cores",
        "memory": f"{memory:.0f} GiB",
        "kernel": f"Linux {platform.release()}",
        "system": _first(r'^PRETTY_NAME="(.+)"', Path("/etc/os-release")),
        "file system": disk.stdout.split()[-1] if disk.stdout else "",
        "Python": platform.python_version(),
        "load when written": f"{os.getloadavg()[0]:.1f}",
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
    }


def alternately(times: int, *acts: Callable[[], float]) -> list[list[float]]:
    """Call the acts in turn, `times` rounds; return what each returned. What drifts hits all of them alike."""
    found: list[list[float]] = [[] for _ in acts]
    for _ in range(times):
        for values, act in zip(found, acts, strict=True):
            values.append(act())
    return found


def fio(path: Path, *, kind: str, block: str, seconds: int | None, jobs: int = 1,
        direct: bool = False) -> dict[str, float]:  # fmt: skip
    """Read `path` by fio; returns {"iops", "bytes"} a second, of all jobs together.

    `kind` is fio's "read" or "randread"; `direct` opens with O_DIRECT. Random reads go on for `seconds` all over the
    file; without `seconds`, each block is read exactly once, each job taking its share of the file. The same call
    reads the same offsets every time.
    """
    command = ["fio", "--name=read", f"--filename={path}", f"--rw={kind}", f"--bs={block}", f"--numjobs={jobs}",
               "--thread", "--ioengine=psync", f"--direct={int(direct)}", "--group_reporting", "--randrepeat=1",
               "--readonly", "--invalidate=0", "--output-format=json"]  # fmt: skip
    if seconds is not None:
        command += ["--time_based", f"--runtime={seconds}", "--norandommap"]
    else:
        share = path.stat().st_size // jobs
        command += [f"--size={share}", f"--offset_increment={share}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"fio failed with status {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    answer: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])
    read = answer["jobs"][0]["read"]
    return {"iops": float(read["iops"]), "bytes": float(read["bw_bytes"])}


def drop_caches() -> None:
    """Write out what is dirty and empty the machine's page, dentry and inode caches."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3\n")


def number(value: float) -> str:
    """Return three significant digits, with thousands marked."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _first(pattern: str, path: Path) -> str:
    match = re.search(pattern, path.read_text(), re.MULTILINE)
    return match[1] if match else ""
