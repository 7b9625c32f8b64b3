"""`dadi simulate`: units, output, the picture, and what it says when something is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from dadi.cli.simulate import simulate
from dadi.errors import ConfigError, MissingFeature

SMALL = ("--nodes", "20", "--racks", "2", "--image-size", "20MiB", "--misses", "3")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(simulate, [*SMALL, *arguments])


def test_options_have_units_and_the_result_is_json() -> None:
    result = run("--json", "--nic", "100Mbit", "--startup", "50%", "--latency", "1ms", "--join", "2")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    settings = found["settings"]
    assert settings["nic"] == 12.5e6
    assert settings["startup"] == 0.5
    assert settings["latency"] == 0.001
    assert settings["join_chunks"] == 2
    assert len(found["times"]) == 20
    assert found["last"] > found["floor"] > 0


def test_what_is_shown_names_the_bound_and_the_loads() -> None:
    result = run()
    assert result.exit_code == 0, result.output
    for words in ("last startup byte", "no scheme can beat", "1.00 copies", "copies into a rack", "runs of 4 chunks"):
        assert words in result.stdout


def test_where_joins_and_not_links_take_the_time_that_is_said() -> None:
    slow, quick = run("--join-time", "100ms"), run("--join-time", "0.02ms")
    assert "they, and not the links" in slow.stdout
    assert "20, 2 of them at superpeers" in quick.stdout
    assert "not the links" not in quick.stdout


def test_nodes_that_go_without_are_an_error() -> None:
    result = run("--limit", "1ms")
    assert result.exit_code == 1
    assert "20 lived and did not get their bytes" in result.stdout


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    result = run("--plot", str(tmp_path / "peak.png"))
    assert result.exit_code == 0, result.output
    assert (tmp_path / "peak.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_a_picture_is_refused_before_anything_is_simulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    result = run("--plot", "peak.png")
    assert isinstance(result.exception, MissingFeature)
    assert "pip install matplotlib" in str(result.exception)
    assert "simulating" not in result.output


@pytest.mark.parametrize("wrong", [("--startup", "much"), ("--nodes", "0")])
def test_an_option_that_makes_no_sense_is_refused(wrong: tuple[str, str]) -> None:
    assert run(*wrong).exit_code == 2


def test_a_unit_that_does_not_exist_is_named() -> None:
    result = run("--nic", "25parsec")
    assert isinstance(result.exception, ConfigError)
    assert "parsec" in str(result.exception)
