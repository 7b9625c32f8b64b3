"""The progress of long work: a live line on a terminal, few plain lines elsewhere; on standard error."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import TextIO

import pytest

from dadi.cli import show


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_plain_lines_come_one_a_layer_and_one_every_few_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Time()
    with show.Transfer("indexing x", clock=clock) as progress:
        progress.expect(layers=2, size=100_000_000)
        for _ in range(88):
            clock.now += 0.125
            progress.advance(625_000)
        progress.layer("sha256:" + "ab" * 32, "read, 3 files")
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1] == "layer abababababab: read, 3 files (1 of 2)"
    assert len(lines) == 3  # after 5 and 10 seconds, and the layer's
    assert lines[0] == "indexing x: 25.0 MB of 100.0 MB, 0/2 layers, 5.0 MB/s, 15 s left"


def test_quiet_shows_notices_only_and_never_on_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    with show.Transfer("x", quiet=True, clock=Time()) as progress:
        progress.stage("reading")
        progress.expect(layers=1, size=1)
        progress.layer("sha256:" + "ab" * 32, "done")
        progress.notice("something odd")
    said = capsys.readouterr()
    assert (said.out, said.err) == ("", "something odd\n")


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59, "59 s"), (61, "1:01"), (3600, "1:00:00")])
def test_durations_read_as_people_write_them(seconds: float, text: str) -> None:
    assert show.duration(seconds) == text


# ---- on a terminal


class Terminal:
    """A pseudo terminal in the place of standard error."""

    def __init__(self) -> None:
        self._master, slave = os.openpty()
        self.file: TextIO = os.fdopen(slave, "w")

    def shown(self) -> list[str]:
        """Return what was written since the last call, by lines, each state of the live one a line of its own."""
        self.file.flush()
        data = b""
        os.set_blocking(self._master, False)
        with contextlib.suppress(BlockingIOError):
            while True:
                data += os.read(self._master, 1 << 16)
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", data.decode())
        return [line.rstrip() for line in re.split(r"[\r\n]+", text) if line.strip()]

    def close(self) -> None:
        self.file.close()
        os.close(self._master)


@contextlib.contextmanager
def terminal_of(width: int) -> Iterator[Terminal]:
    made = Terminal()
    with contextlib.closing(made), pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("TERM", "xterm-256color")
        monkeypatch.setenv("COLUMNS", str(width))
        monkeypatch.setenv("LINES", "24")
        monkeypatch.delenv("NO_COLOR", raising=False)
        monkeypatch.setattr(sys, "stderr", made.file)
        yield made


LONG = "indexing registry.example.com/department/team/application@sha256:" + "0" * 64


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_shows_bytes_layers_rate_and_time_left(width: int) -> None:
    clock = Time()
    with terminal_of(width) as terminal, show.Transfer(LONG, clock=clock) as progress:
        progress.stage("reading layers")
        progress.expect(layers=12, size=200_000_000_000)
        said = "".join(terminal.shown())
        assert LONG.partition(" ")[2] + ": reading layers" in said
        clock.now = 1000
        progress.advance(100_200_000_000)
        assert progress._progress is not None
        progress._progress.refresh()
        assert any("100.2 GB of 200.0 GB, 0/12 layers, 100.2 MB/s, 16:36 left" in line for line in terminal.shown())
        progress.layer("sha256:" + "ab" * 32, "read, 3 files")
        progress._progress.refresh()
        lines = terminal.shown()
        assert "layer abababababab: read, 3 files (1 of 12)" in lines
        assert "1/12 layers" in lines[-1]
        assert all(len(line) <= width for line in lines)
        clock.now = 2000
        progress.advance(99_800_000_000)
        progress._progress.refresh()
        assert "200.0 GB of 200.0 GB, 1/12 layers, 100.0 MB/s" in terminal.shown()[-1]


def test_a_part_that_is_done_again_goes_back_on_a_terminal_too() -> None:
    clock = Time()
    with terminal_of(80) as terminal, show.Transfer("indexing x", clock=clock) as progress:
        progress.expect(layers=1, size=10_000_000)
        clock.now = 1
        progress.advance(5_000_000)
        progress.advance(-5_000_000)
        progress.notice("[b]trying[/b] again from another place")
        assert progress._progress is not None
        progress._progress.refresh()
        lines = terminal.shown()
        assert "[b]trying[/b] again from another place" in lines, "not taken for markup"
        assert "0 B of 10.0 MB, 0/1 layers, 0 B/s" in lines[-1]


def test_quiet_draws_nothing_on_a_terminal_but_notices() -> None:
    with terminal_of(80) as terminal:
        with show.Transfer("indexing x", quiet=True, clock=Time()) as progress:
            progress.stage("reading layers")
            progress.expect(layers=1, size=10)
            progress.advance(10)
            progress.layer("sha256:" + "ab" * 32, "read")
            progress.notice("something odd")
        assert terminal.shown() == ["something odd"]


def test_a_terminal_shows_how_far_a_superpeer_is() -> None:
    event = {"stage": "indexing layers", "bytes": 1_500_000, "total": 3_000_000, "layers": 4, "layers_done": 2}
    with terminal_of(120) as terminal, show.LongWork("inspecting x") as progress:
        progress.event(event)
        assert progress._progress is not None
        progress._progress.refresh()
        last = terminal.shown()[-1]
        assert "inspecting x: indexing layers" in last
        assert "1.5 MB of 3.0 MB, 2/4 layers" in last
