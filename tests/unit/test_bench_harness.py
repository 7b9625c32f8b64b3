"""The benchmarks' arithmetic: ratios turned the right way, targets judged, tables that say what was missed."""

from __future__ import annotations

import json
from pathlib import Path

from bench.harness import Bench, Row, alternately, number, summary


def test_ratio_is_ours_to_theirs_when_more_is_better_and_the_other_way_round() -> None:
    assert Row("speed", "MB/s", [50, 60, 70], [100, 120, 140]).ratio == 0.5
    assert Row("time", "s", [2.0], [10.0], better="less").ratio == 5.0
    assert Row("memory", "MiB", [2.0]).ratio is None


def test_targets_are_judged_by_medians() -> None:
    assert Row("a", "s", [1.0, 1.0, 9.0], [5.0], better="less", target=5).met is True
    assert Row("a", "s", [1.1], [5.0], better="less", target=5).met is False
    assert Row("a", "MiB", [149.0], limit=150).met is True
    assert Row("a", "MiB", [150.0], limit=150).met is False
    assert Row("a", "s", [1.0], [5.0]).met is None


def test_results_are_written_as_table_plot_and_data(tmp_path: Path) -> None:
    bench = Bench("example", "An example", quick=True)
    bench.theirs = "a | b"
    bench.add(Row("speed", "MB/s", [1000.0], [4000.0], target=0.5))
    bench.note("Why it was missed.")
    bench.write(tmp_path)
    text = (tmp_path / "example.md").read_text()
    assert "| speed | 1,000 MB/s | 4,000 MB/s | 0.25 | ≥ 0.5 | MISSED |" in text
    assert "a \\| b" in text
    assert "quick run" in text
    assert (tmp_path / "example.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads((tmp_path / "example.json").read_text())["rows"][0]["values"] == [1000.0]
    assert "Why it was missed." in summary(tmp_path)


def test_sides_alternate() -> None:
    calls: list[str] = []

    def act(name: str) -> float:
        calls.append(name)
        return float(len(calls))

    assert alternately(2, lambda: act("a"), lambda: act("b")) == [[1.0, 3.0], [2.0, 4.0]]
    assert calls == ["a", "b", "a", "b"]


def test_numbers_have_three_digits() -> None:
    assert [number(v) for v in (0, 0.1234, 12.345, 123.4, 98765.4)] == ["0", "0.123", "12.3", "123", "98,765"]
