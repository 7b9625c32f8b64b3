"""Which failure paths no test has walked: what `python -m tests --coverage` prints (`make coverage`).

What lives here: how a run is measured, with the daemons and commands that it starts; which lines of a source file are
failure paths; the report. What never does: which tests there are, and how they are run (tests/__main__.py).

A percentage does not say what would happen at three in the morning. So the report names, file by file, each

    except  whose body no test has entered
    raise   that was never reached (one inside such an `except` is part of it)
    note    of a fallback that was never taken

Every Python that has this environment measures itself, by coverage's own hook in site-packages: the tests' processes,
and the daemons and commands that they start; not dadi-keeper, which runs without site-packages. What one has seen is
written when it ends in order: what is killed by SIGKILL has seen nothing. A measured program takes two to three times
as long, and more memory: a test that watches either may fail here and nowhere else. Code must not change meanwhile:
lines are known by their numbers.

    .cache/coverage/data.*        of one process each
    .cache/coverage/report.txt    what is printed; `python -m tests.failure_paths` makes it anew
"""

from __future__ import annotations

import ast
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from coverage import Coverage

ROOT = Path(__file__).resolve().parents[1]
PLACE = ROOT / ".cache" / "coverage"
_CONFIGURATION = ROOT / "pyproject.toml"
_ROW = "{:24} {:>16} {:>16} {:>20}"


@dataclass(frozen=True)
class FailurePath:
    """One way to fail, `where`: in which function. Walked when `line` ran; `last` is where its statement ends."""

    line: int
    last: int
    text: str
    where: str


def failure_paths(source: str) -> list[FailurePath]:
    """Return those of one source file, in its order. Raises SyntaxError."""
    return sorted(_below(ast.parse(source), source.splitlines(), ""), key=lambda path: (path.line, -path.last))


def _below(node: ast.AST, lines: Sequence[str], where: str) -> Iterator[FailurePath]:
    for child in ast.iter_child_nodes(node):
        named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        inside = f"{where}.{child.name}".lstrip(".") if named else where
        if isinstance(child, ast.ExceptHandler | ast.Raise) or (isinstance(child, ast.Expr) and _notes(child.value)):
            first = child.body[0] if isinstance(child, ast.ExceptHandler) else child
            text = lines[child.lineno - 1].strip()
            yield FailurePath(first.lineno, child.end_lineno or first.lineno, text, inside)
        yield from _below(child, lines, inside)


def _notes(expression: ast.expr) -> bool:
    called = expression.func if isinstance(expression, ast.Call) else None
    return isinstance(called, ast.Attribute) and called.attr == "note" and "fallbacks" in ast.unparse(called.value)


def unwalked(paths: Iterable[FailurePath], missing: Collection[int]) -> list[FailurePath]:
    """Return those whose first line is missing; what is inside another one is not told again."""
    found: list[FailurePath] = []
    for path in paths:
        if path.line in missing and not (found and path.line <= found[-1].last):
            found.append(path)
    return found


@dataclass(frozen=True)
class File:
    """What was seen of one source file. `numbers`: coverage's summary of it."""

    name: str
    numbers: dict[str, int]
    paths: Sequence[FailurePath]
    unwalked: Sequence[FailurePath]

    @property
    def folder(self) -> str:
        return str(Path(self.name).parent)


def seen(place: Path, root: Path = ROOT) -> list[File]:
    """Return a row for each source file of ours, from what all processes have left at `place`."""
    coverage = Coverage(data_file=str(place / "data"), data_suffix=False, config_file=str(_CONFIGURATION))
    coverage.combine([str(place)], keep=True)
    coverage.json_report(outfile=str(place / "coverage.json"))
    found = []
    measured: dict[str, dict[str, Any]] = json.loads((place / "coverage.json").read_text())["files"]
    for name, row in sorted(measured.items()):
        path = Path(root, name)
        paths = failure_paths(path.read_text())
        found.append(
            File(os.path.relpath(path, root), row["summary"], paths, unwalked(paths, set(row["missing_lines"])))
        )
    return found


def report(files: Sequence[File]) -> str:
    """Return all of it: the paths that nobody has walked, file by file; then the numbers, by folder."""
    lines = []
    for file in files:
        if file.unwalked:
            lines += [f"{file.name}: {len(file.unwalked)} of {len(file.paths)} failure paths not walked"]
            lines += [f"  {path.line:4}  {path.text}    [{path.where}]" for path in file.unwalked]
    lines += ["", _ROW.format("", "lines", "branches", "failure paths")]
    by_folder = sorted(files, key=lambda file: file.folder)
    lines += [_numbers(folder, list(group)) for folder, group in groupby(by_folder, key=lambda file: file.folder)]
    return "\n".join([*lines, _numbers("all", files)])


def _numbers(name: str, files: Sequence[File]) -> str:
    def share(part: str, whole: str) -> str:
        return _share(sum(file.numbers[part] for file in files), sum(file.numbers[whole] for file in files))

    paths, left = sum(len(file.paths) for file in files), sum(len(file.unwalked) for file in files)
    return _ROW.format(name, share("covered_lines", "num_statements"), share("covered_branches", "num_branches"),
                       f"{left} of {paths} not")  # fmt: skip


def _share(part: int, whole: int) -> str:
    return f"{part / whole:6.1%} of {whole}" if whole else "-"


def measured(arguments: Sequence[str], place: Path = PLACE) -> int:
    """Run `python -m tests` with these arguments, measured; print and keep the report; return the run's status."""
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    environment = {**os.environ, "COVERAGE_PROCESS_START": str(_CONFIGURATION), "COVERAGE_FILE": str(place / "data")}
    with subprocess.Popen([sys.executable, "-m", "tests", *arguments], cwd=ROOT, env=environment) as run:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it has heard of a Ctrl-C itself, and ends in order
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, lambda number, frame: run.send_signal(number))
        status = run.wait()
    told(place)
    return status


def told(place: Path = PLACE) -> None:
    """Print the report of what is at `place`, and write it there."""
    text = report(seen(place))
    (place / "report.txt").write_text(text + "\n")
    print(text, f"({place / 'report.txt'})", sep="\n")


if __name__ == "__main__":
    told()
