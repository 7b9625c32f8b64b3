"""The progress of long work where there is no terminal: few plain lines, on standard error."""

from __future__ import annotations

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
