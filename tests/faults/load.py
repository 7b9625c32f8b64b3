"""The load: reader processes on some files of a mount, and what they count.

What lives here: starting and ending readers (reader.py), `Counts`. What never does: what may be counted (frame.py).
A reader that is killed by SIGBUS (a mapped page could not be read) has failed in the read that it was at.
"""

from __future__ import annotations

import json
import mmap
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.faults import reader
from tests.lab.cleanup import Lab

MANNERS = ("walk", "random", "mmap", "direct", "whole")
_END = 60.0
"""Seconds that a reader has for its last read once it is told to stop; the bound of a case may be longer."""


@dataclass(frozen=True)
class Counts:
    """What all readers together have counted. Seconds: `longest` of one read, `stalled` in all (reads above 1 s)."""

    tried: int = 0
    failed: int = 0
    wrong: int = 0
    right: int = 0
    stalled: float = 0.0
    longest: float = 0.0

    def __add__(self, other: Counts) -> Counts:
        return Counts(
            self.tried + other.tried, self.failed + other.failed, self.wrong + other.wrong, self.right + other.right,
            self.stalled + other.stalled, max(self.longest, other.longest),
        )  # fmt: skip


class Load:
    """Readers of `files` (path, path of the known bytes); a context manager."""

    def __init__(self, lab: Lab, name: str, files: Sequence[tuple[Path, Path]], *, readers: int = 5, pace: float = 0.02,
                 seed: int = 0, end: float = _END, manners: Sequence[str] = MANNERS) -> None:  # fmt: skip
        self._files = list(files)
        self._readers, self._pace, self._seed, self._end = readers, pace, seed, end
        self._manners = manners
        directory = lab.root / "load"
        directory.mkdir(exist_ok=True)
        self._path, self._errors = directory / name, directory / f"{name}.log"
        self._path.write_bytes(bytes(reader.SLOT * (readers + 1)))
        self._lab = lab
        self._popen: list[subprocess.Popen[bytes]] = []
        self._lost = Counts()

    def __enter__(self) -> Load:
        with self._path.open("r+b") as file:
            self._board = mmap.mmap(file.fileno(), 0)
        files = self._path.with_suffix(".json")
        files.write_text(json.dumps([[str(path), str(known)] for path, known in self._files]))
        with self._errors.open("ab") as log:
            for number in range(self._readers):
                manner = self._manners[number % len(self._manners)]
                told = (self._path, number, manner, self._seed + number, self._pace, files)
                command = [sys.executable, "-I", reader.__file__, *map(str, told)]
                popen = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                                         env=self._lab.environment)  # fmt: skip
                self._popen.append(popen)
                self._lab.children.append(popen)
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Let each reader end with the read that it is at; one that cannot is counted as failed, and killed."""
        if self._board[0]:
            return
        self._board[0] = 1
        deadline = time.monotonic() + self._end
        for number, popen in enumerate(self._popen):
            try:
                popen.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                popen.kill()
                self._say(f"reader {number} waits for ever")
            if popen.poll() != 0:
                self._say(f"reader {number} ended with status {popen.poll()}")
                self._lost += Counts(failed=1)

    @property
    def running(self) -> bool:
        return bool(self._popen) and not self._board[0]

    @property
    def alive(self) -> bool:
        """Whether a reader runs."""
        return any(popen.poll() is None for popen in self._popen)

    def counts(self) -> Counts:
        """Return what has been counted so far; a read under way counts for `longest` and `stalled` too."""
        total, now = self._lost, time.monotonic_ns()
        for number in range(self._readers):
            tried, failed, wrong, right, stalled, longest, began, _ = reader.FIELDS.unpack_from(
                self._board, reader.SLOT * (number + 1)
            )
            under_way = now - began if began and self._popen[number].poll() is None else 0
            stalled += under_way if under_way > reader.STALL else 0
            total += Counts(tried, failed, wrong, right, stalled / 1e9, max(longest, under_way) / 1e9)
        return total

    def done(self) -> list[int]:
        """Return for each reader how many reads it has behind it."""
        slots = [reader.FIELDS.unpack_from(self._board, reader.SLOT * (n + 1)) for n in range(self._readers)]
        return [slot[0] - bool(slot[6]) for slot in slots]

    def errors(self) -> str:
        """Return what readers said of reads that failed."""
        return self._errors.read_text(errors="replace")[-4000:]

    def _say(self, text: str) -> None:
        with self._errors.open("a") as log:
            log.write(text + "\n")
