"""`python -m tests`: two pytest processes at once, on directories made here, and what is told of both."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import pytest

from tests import __main__ as halves

MEET = """
    import pathlib, time

    def test_meet(tmp_path):
        assert str(tmp_path).count("/") <= {depth}
        here = pathlib.Path(__file__)
        here.with_suffix(".there").touch()
        while not list(here.parents[1].glob("{other}/*.there")):
            time.sleep(0.01)
"""
GOOD = """
    import pytest

    @pytest.mark.skip(reason="not today")
    def test_skipped():
        pass
"""
BAD = """
    import pytest

    @pytest.fixture
    def leaky():
        yield
        raise RuntimeError("not ended in order")

    def test_bad():
        assert "one" == "another"

    def test_leaky(leaky):
        pass
"""
STUCK = """
    import pathlib, pytest, time

    @pytest.fixture
    def something():
        yield
        pathlib.Path(__file__).with_suffix(".ended").touch()

    def test_stuck(something):
        pathlib.Path(__file__).with_suffix(".there").touch()
        time.sleep(100)
"""


def directory(tmp_path: Path, name: str, text: str) -> str:
    (tmp_path / name).mkdir()
    (tmp_path / name / f"test_{name}.py").write_text(textwrap.dedent(text))
    return str(tmp_path / name)


@pytest.fixture(autouse=True)
def nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "t").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "t"))
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setattr(tempfile, "tempdir", None)


def test_both_halves_run_at_the_same_time_and_are_told_of_together(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    depth = str(tmp_path).count("/") + 4
    first = directory(tmp_path, "good", MEET.format(other="bad", depth=depth) + GOOD)
    second = directory(tmp_path, "bad", MEET.format(other="good", depth=depth) + BAD)
    assert halves.run([first], [second], ["-q"], tmp_path / "cache") == 1
    told = capfd.readouterr().out
    assert told.index("1 passed, 1 skipped in") < told.index("1 failed, 2 passed, 1 error in")
    assert re.search(r"=== 1 failed, 1 errors, 2 passed, 1 skipped in [0-9.]+s \(0:00:\d\d\) ===", told)
    assert re.search(r"^FAILED \S+::test_bad$", told, re.MULTILINE)
    assert re.search(r"^ERRORS \S+::test_leaky$", told, re.MULTILINE)
    assert len(re.findall(r"^ +[0-9.]+s \S+::test_\w+$", told, re.MULTILINE)) == 5
    failed = json.loads((tmp_path / "cache/v/cache/lastfailed").read_text())
    assert {test.rpartition("::")[2] for test in failed} == {"test_bad", "test_leaky"}
    assert list((tmp_path / "t").iterdir()) == []


def test_a_half_that_ends_without_a_word_is_a_failure(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    first = directory(tmp_path, "good", GOOD)
    second = directory(tmp_path, "gone", "def test_gone():\n    import os\n    os._exit(0)\n")
    assert halves.run([first], [second]) == 1
    assert f"{second}: no report, status 0" in capfd.readouterr().out


def test_an_interrupt_ends_both_in_order_and_leaves_nothing(tmp_path: Path) -> None:
    both = [directory(tmp_path, name, STUCK) for name in ("one", "two")]
    program = (f"import sys\nfrom tests.__main__ import run\nfrom tests.lab.cleanup import signals_as_exceptions\n"
               f"with signals_as_exceptions(): sys.exit(run({both[:1]}, {both[1:]}))")  # fmt: skip
    with subprocess.Popen([sys.executable, "-c", program], cwd=halves.ROOT, stdout=subprocess.PIPE, text=True,
                          env={**os.environ, "TMPDIR": str(tmp_path / "t")}) as process:  # fmt: skip
        while len(list(tmp_path.glob("*/*.there"))) < len(both):
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        told, _ = process.communicate()
    assert process.returncode == 130
    assert "Interrupted; both halves have ended." in told
    assert told.count("KeyboardInterrupt !!!") == len(both)
    assert len(list(tmp_path.glob("*/*.ended"))) == len(both)
    assert list((tmp_path / "t").iterdir()) == []


@pytest.mark.parametrize(
    "arguments", [["-k", "name"], ["tests/unit"], ["--lf"], ["-q", "--cov=dadi"], ["-x"], ["-p", "no:x"]]
)
def test_what_selects_tests_is_for_one_process(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[list[str]] = []

    def execv(path: str, command: list[str]) -> None:
        called.append(command)
        raise SystemExit

    monkeypatch.setattr(os, "execv", execv)
    with pytest.raises(SystemExit):
        halves.main(arguments)
    assert called == [[sys.executable, "-m", "pytest", *arguments]]


def test_each_file_with_tests_is_in_one_half() -> None:
    every = {str(path.relative_to(halves.ROOT)) for path in (halves.ROOT / "tests").rglob("test_*.py")}
    second = [file for file in every for place in halves.second() if file == place or file.startswith(f"{place}/")]
    first = [file for file in every if file.startswith(tuple(f"{place}/" for place in halves.FIRST))]
    assert sorted([*first, *second]) == sorted([*every, *halves.ENGINES])
    assert set(halves.ENGINES) <= {*first} & {*second}, "the first half is told to leave them out"
