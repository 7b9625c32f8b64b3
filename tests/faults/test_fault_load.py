"""The readers see what they are for: a read that fails, a byte that is wrong, bytes that are missing."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.faults.frame import Bounds, judged
from tests.faults.load import MANNERS, Counts, Load
from tests.lab.cleanup import Lab

CONTENT = bytes(range(256)) * 300


def read(tmp_path: Path, spoil: Callable[[Path], object], *, reads: int = 6, manner: str) -> Counts:
    """Return what one reader counts of a file that was spoilt."""
    known, file = tmp_path / "known", tmp_path / "file"
    known.write_bytes(CONTENT)
    file.write_bytes(CONTENT)
    spoil(file)
    with Lab("load", tmp_path) as lab, Load(lab, "one", [(file, known)], readers=1, pace=0.0, manners=[manner]) as load:
        deadline = time.monotonic() + 30
        while load.done()[0] < reads and load.alive and time.monotonic() < deadline:
            time.sleep(0.01)
        load.stop()
        return load.counts()


def one_wrong_byte(file: Path) -> None:
    file.write_bytes(CONTENT[:70_000] + b"\xff" + CONTENT[70_001:])


@pytest.mark.parametrize("manner", MANNERS)
def test_right_bytes_are_right(tmp_path: Path, manner: str) -> None:
    counts = read(tmp_path, lambda file: None, manner=manner)
    assert counts.tried >= 6
    assert (counts.failed, counts.wrong) == (0, 0)
    assert judged(Bounds(), counts, hurt=1) == ""


@pytest.mark.parametrize("manner", ["walk", "whole"])
def test_one_wrong_byte_is_one(tmp_path: Path, manner: str) -> None:
    counts = read(tmp_path, one_wrong_byte, reads=2, manner=manner)
    assert counts.wrong >= 1
    assert "WRONG BYTES" in judged(Bounds(failed=None), counts, hurt=1)


def test_a_short_read_has_failed(tmp_path: Path) -> None:
    counts = read(tmp_path, lambda file: file.write_bytes(CONTENT[:-100]), manner="whole")
    assert counts.failed == counts.tried >= 6


def test_a_read_that_fails_is_counted(tmp_path: Path) -> None:
    counts = read(tmp_path, lambda file: file.unlink(), manner="random")
    assert counts.failed == counts.tried >= 6
    assert "reads failed" in judged(Bounds(), counts, hurt=1)


def test_a_reader_that_dies_has_failed(tmp_path: Path) -> None:
    """As by SIGBUS: the page behind the end of a file that has shrunk."""
    counts = read(tmp_path, lambda file: file.write_bytes(CONTENT[:4096]), reads=1000, manner="mmap")
    assert counts.failed >= 1


def test_a_case_that_hurt_nobody_has_shown_nothing() -> None:
    assert judged(Bounds(), Counts(tried=1, right=1), hurt=0) == "nothing was injured"
    assert "at most" in judged(Bounds(longest=1), Counts(tried=1, right=1, longest=2.0), hurt=1)
