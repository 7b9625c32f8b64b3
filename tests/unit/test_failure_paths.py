"""The coverage report: what counts as a failure path, which are told, and daemons that are measured as well."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests import __main__ as halves
from tests import failure_paths
from tests.failure_paths import FailurePath, File

SOURCE = '''
class Door:
    async def open(self):
        try:
            await self.key()
        except KeyError as error:
            self.fallbacks.note("no key", str(error))
            raise Shut(
                "for good"
            ) from error
        except OSError:
            pass
        if self.locked:
            raise Shut("today")
        self._fallbacks.note("open", "anyway")
        self.pencil.note("not a fallback", "at all")
'''


def paths() -> list[FailurePath]:
    return failure_paths.failure_paths(SOURCE)


def test_each_except_each_raise_and_each_fallback_is_a_path_known_by_its_first_line_that_runs() -> None:
    assert [(path.line, path.text) for path in paths()] == [
        (7, "except KeyError as error:"),
        (7, 'self.fallbacks.note("no key", str(error))'),
        (8, "raise Shut("),
        (12, "except OSError:"),
        (14, 'raise Shut("today")'),
        (15, 'self._fallbacks.note("open", "anyway")'),
    ]
    assert {path.where for path in paths()} == {"Door.open"}


def test_what_is_inside_a_path_that_nobody_walked_is_not_told_again() -> None:
    assert [path.line for path in failure_paths.unwalked(paths(), {7, 8, 12, 14})] == [7, 12, 14]
    assert [path.line for path in failure_paths.unwalked(paths(), {8})] == [8]
    assert failure_paths.unwalked(paths(), {5, 16}) == []


def test_the_report_names_paths_by_file_and_adds_up_by_folder() -> None:
    numbers = {"num_statements": 10, "covered_lines": 5, "num_branches": 0, "covered_branches": 0}
    files = [
        File("house/door.py", numbers, paths(), failure_paths.unwalked(paths(), {14})),
        File("house/wall.py", {**numbers, "covered_lines": 10}, [], []),
    ]
    told = failure_paths.report(files)
    assert 'house/door.py: 1 of 6 failure paths not walked\n    14  raise Shut("today")    [Door.open]\n' in told
    assert "wall" not in told
    assert [line.split() for line in told.splitlines()[-2:]] == [
        [name, "75.0%", "of", "20", "-", "1", "of", "6", "not"] for name in ("house", "all")
    ]


def test_a_program_that_a_test_starts_is_measured_too_also_what_it_forks(tmp_path: Path) -> None:
    program = """
        import os
        from dadi import digest, errors
        try:
            digest.parse("sha256:what")
        except errors.DadiError:
            pass
        if os.fork() == 0:
            from dadi.oci.reference import Reference
            try:
                Reference.parse("http://")
            except errors.DadiError:
                os._exit(0)
        os.wait()
    """
    environment = {
        **os.environ, "COVERAGE_PROCESS_START": str(failure_paths.ROOT / "pyproject.toml"),
        "COVERAGE_FILE": str(tmp_path / "data"), "PYTHONPATH": str(failure_paths.ROOT),
    }  # fmt: skip
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, cwd=tmp_path, env=environment)
    files = {file.name: file for file in failure_paths.seen(tmp_path)}
    for name in ("dadi/digest.py", "dadi/oci/reference.py"):
        assert 0 < len(files[name].unwalked) < len(files[name].paths)
    assert len(files["dadi/program.py"].unwalked) == len(files["dadi/program.py"].paths) > 0, "never imported"


def test_coverage_is_an_option_of_ours_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []
    monkeypatch.setattr(failure_paths, "measured", lambda arguments: called.append(arguments) or 7)
    assert halves.main(["-q", "--coverage", "-k", "name"]) == 7
    assert called == [["-q", "-k", "name"]]
