"""`python -m tests [ARGUMENT …]`: all tests, in two pytest processes at once; `make test` runs this.

What lives here: which tests are in which half, and how both are started, shown, ended and summed up. What never does:
what a test needs of the machine (tests/conftest.py).

Most tests wait, for daemons, for slow links, for patience to end: one process would leave one of two processors idle.

    first     tests/system, tests/faults: images mounted by nodes, crowds, containerd; printed as it goes
    second    every other directory, and files of tests/system without nodes (`ENGINES`), so that both take about as
              long; printed when the first has ended, and from then on as it goes

Both halves are on one machine, and must not notice each other. So who looks for what is left over looks below a
directory of its own (tests/lab/cleanup.py); temporary files are in directories with short names, as the path of a unix
socket has 107 bytes; and the second half has a loopback of its own where it may (root), so that neither takes a port
that the other one means to come back to.

Arguments that change what is printed (`_PRINTING`) go to both. With any other – a path, -k, --lf, --pdb – all is one
ordinary pytest, which gets them as they are. With --coverage, too, either is measured (tests/failure_paths.py).
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

from tests import failure_paths
from tests.lab.cleanup import Interrupted, mounts_below, signals_as_exceptions

ROOT = Path(__file__).resolve().parents[1]
ENGINES = (
    "tests/system/test_convert_tools.py", "tests/system/test_docker_mirror.py", "tests/system/test_proxy_tools.py",
)  # fmt: skip
FIRST = ("tests/system", "tests/faults")
SLOWEST = 15
COVERAGE = "--coverage"
_PRINTING = re.compile(r"-[qvl]+|-r\w+|--(durations|durations-min|tb|color|show-capture|verbosity)=.+|--no-header")
_OWN_LOOPBACK = ("unshare", "--net", "--", "sh", "-c", 'ip link set lo up && exec "$@"', "sh")
_OUTCOMES = ("failure", "error", "skipped")
_WORDS = {"failure": "failed", "error": "errors", "passed": "passed", "skipped": "skipped"}
_LAST_FAILED = "v/cache/lastfailed"
"""Where pytest keeps, below its cache's directory, what `--lf` is to run."""


@dataclass(frozen=True)
class Result:
    """How one test ended: "passed" or one of `_OUTCOMES`; seconds with its fixtures."""

    test: str
    outcome: str
    seconds: float


class Half:
    """One pytest process on some directories. With a `log` its output goes there."""

    def __init__(self, place: Path, name: str, directories: Sequence[str], arguments: Sequence[str], *,
                 log: Path | None = None, own_loopback: bool = False) -> None:  # fmt: skip
        """`place`: where it may write, below `name`."""
        self.directories = directories
        self.log = log
        self._shown = 0
        self._report, self._cache = place / f"{name}.xml", place / f"{name}.cache"
        command = [
            *(_OWN_LOOPBACK if own_loopback else ()), sys.executable, "-m", "pytest", *directories, *arguments,
            f"--basetemp={place / name}", f"--junitxml={self._report}", "-o", "junit_family=xunit1",
            "-o", f"cache_dir={self._cache}",
        ]  # fmt: skip
        with contextlib.ExitStack() as files:
            output = files.enter_context(log.open("wb")) if log else None
            # Not in our process group: of a Ctrl-C it hears once, from us.
            self.process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output,
                                            stderr=subprocess.STDOUT if output else None, process_group=0)  # fmt: skip

    def interrupt(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            if self.process.poll() is None:
                os.kill(self.process.pid, number)

    def show(self) -> None:
        """Print its log, from where it was left, until it has ended."""
        assert self.log is not None
        sys.stdout.flush()
        with self.log.open("rb") as log:
            log.seek(self._shown)
            ended = False
            while not ended:
                ended = self.process.poll() is not None
                shutil.copyfileobj(log, sys.stdout.buffer)
                sys.stdout.buffer.flush()
                self._shown = log.tell()
                time.sleep(0 if ended else 0.2)

    def results(self) -> list[Result] | None:
        """Return what came of its tests; None if it did not get as far as saying so."""
        with contextlib.suppress(OSError, ElementTree.ParseError):
            return [_result(case) for case in ElementTree.parse(self._report).iter("testcase")]
        return None

    def failed(self) -> dict[str, bool]:
        """Return what its cache says of failed tests."""
        with contextlib.suppress(OSError, ValueError):
            found: dict[str, bool] = json.loads((self._cache / _LAST_FAILED).read_text())
            return found
        return {}


def _result(case: ElementTree.Element) -> Result:
    test = f"{case.get('file', '')}::{case.get('name', '')}"
    outcome = next((child.tag for child in case if child.tag in _OUTCOMES), "passed")
    return Result(test, outcome, float(case.get("time", 0)))


def run(first: Sequence[str], second: Sequence[str], arguments: Sequence[str] = (), cache: Path | None = None) -> int:
    """Run both halves; return 0 if all is well, 130 after an interrupt, else 1.

    `cache`: pytest's, which gets the failed tests of both.
    """
    began = time.monotonic()
    place = Path(tempfile.mkdtemp(prefix="dadi-t-"))
    halves: list[Half] = []
    times = 0
    try:
        while True:  # left when both have ended, whatever the number of interrupts before
            try:
                if not halves and not times:
                    halves.append(Half(place, "a", first, arguments))
                    halves.append(Half(place, "b", second, arguments, log=place / "b.log", own_loopback=_may_unshare()))
                for half in halves:
                    half.process.wait() if half.log is None else half.show()
                break
            except (KeyboardInterrupt, Interrupted):
                times += 1
                for half in halves:
                    half.interrupt(signal.SIGINT if times < 3 else signal.SIGKILL)
        if times:
            print("Interrupted; both halves have ended.")
        if cache is not None:
            _keep(cache, halves)
        good = _summed_up(halves, time.monotonic() - began)
    finally:
        left = _cleared(place)
    if times:
        return 130
    return 0 if good and not left and all(half.process.returncode == 0 for half in halves) else 1


def _may_unshare() -> bool:
    return os.geteuid() == 0 and all(shutil.which(program) for program in ("unshare", "ip"))


def _summed_up(halves: Iterable[Half], seconds: float) -> bool:
    """Print the slowest tests, those that failed, and the numbers; say whether each half has told of its own."""
    found: list[Result] = []
    silent = []
    for half in halves:
        results = half.results()
        found += results or []
        if results is None:
            silent.append(f"{' '.join(half.directories)}: no report, status {half.process.returncode}")
    _title(f"slowest {SLOWEST} tests of both halves")
    for result in sorted(found, key=lambda result: -result.seconds)[:SLOWEST]:
        print(f"{result.seconds:7.2f}s {result.test}")
    bad = [result for result in found if result.outcome in ("failure", "error")]
    if bad or silent:
        _title("failed in either half")
    for result in bad:
        print(f"{_WORDS[result.outcome].upper()} {result.test}")
    for line in silent:
        print(line)
    counts = Counter(result.outcome for result in found)
    told = ", ".join(f"{counts[outcome]} {word}" for outcome, word in _WORDS.items() if counts[outcome])
    minutes, rest = divmod(round(seconds), 60)
    _title(f"{told or 'no tests ran'} in {seconds:.2f}s ({minutes // 60}:{minutes % 60:02}:{rest:02})")
    return not silent


def _title(text: str) -> None:
    print(f" {text} ".center(80, "="), flush=True)


def _keep(cache: Path, halves: Iterable[Half]) -> None:
    """Let `--lf` know what has failed in either half."""
    file = cache / _LAST_FAILED
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({test: True for half in halves for test in half.failed()}, indent=1))


def _cleared(place: Path) -> list[str]:
    """Remove `place`; return, and print, the mounts that keep it from being removed."""
    left = [f"{kind} at {point}" for point, kind in mounts_below(place)]
    for mount in left:
        print(f"left behind: {mount}")
    if not left:
        shutil.rmtree(place, ignore_errors=True)
    return left


def second() -> list[str]:
    """Return what is not in the first half."""
    names = sorted({f"tests/{path.relative_to(ROOT).parts[1]}" for path in (ROOT / "tests").glob("*/**/test_*.py")})
    return [*(name for name in names if name not in FIRST), *ENGINES]


def main(arguments: Sequence[str]) -> int:
    """See the head of this file."""
    if COVERAGE in arguments:
        return failure_paths.measured([argument for argument in arguments if argument != COVERAGE])
    if not all(_PRINTING.fullmatch(argument) for argument in arguments):
        os.execv(sys.executable, [sys.executable, "-m", "pytest", *arguments])
    with signals_as_exceptions():
        first = [*FIRST, *(f"--ignore={file}" for file in ENGINES)]
        return run(first, second(), arguments, ROOT / ".pytest_cache")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
