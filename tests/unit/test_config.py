"""Configuration files: units, unknown keys, and the default file that documents itself."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from dadi import config
from dadi.config import RATE, SECONDS, SIZE, quantity
from dadi.errors import ConfigError
from dadi.node.config import NodeConfig
from superpeer.config import SuperpeerConfig


def load(tmp_path: Path, text: str, cls: type = NodeConfig):
    file = tmp_path / "dadi.toml"
    file.write_text(text)
    return config.load(cls, file)


@pytest.mark.parametrize("cls", [NodeConfig, SuperpeerConfig])
def test_the_printed_default_is_the_default_and_explains_every_key(cls: type[msgspec.Struct], tmp_path: Path) -> None:
    text = config.render(cls())
    assert load(tmp_path, text, cls) == cls()
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if " = " in line and not line.startswith("#"):
            assert lines[number - 1].startswith("# "), line
            assert len(lines[number - 1]) > 5, line


@pytest.mark.parametrize(
    ("text", "unit", "value"),
    [
        ("20GiB", SIZE, 20 << 30), ("1.5 KiB", SIZE, 1536), ("7", SIZE, 7), ("3 MB", SIZE, 3_000_000),
        ("90s", SECONDS, 90), ("5m", SECONDS, 300), ("2h", SECONDS, 7200), ("1d", SECONDS, 86400),
        ("250ms", SECONDS, 0.25),
        ("100Mbit", RATE, 12_500_000), ("2Gbit", RATE, 250_000_000), ("50MiB", RATE, 50 << 20),
    ],
)  # fmt: skip
def test_quantities_have_units(text: str, unit: str, value: float) -> None:
    assert quantity(text, unit) == value


@pytest.mark.parametrize("text", ["", "x", "-1GiB", "1 GiB GiB", "1Mbit", "1e9", "GiB", "nan"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not a number of bytes"):
        quantity(text, SIZE)


def test_units_and_sections_are_read(tmp_path: Path) -> None:
    loaded = load(tmp_path, '[store]\nlimit = "20GiB"\n[read]\npatience = "10m"\n[backfill]\nrate = "1Gbit"\nquiet=3')
    assert (loaded.store.limit, loaded.read.patience) == (20 << 30, 600.0)
    assert (loaded.backfill.rate, loaded.backfill.quiet) == (125_000_000, 3)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense = 1", "nonsense"),
        ("[store]\nlimits = 1", r"store\.limits"),
        ('fuse_threads = "many"', "fuse_threads"),
        ("store = 3", "store"),
        ("[store]\nlimit = -1", "store.limit"),
        ('[store]\nlimit = "20 elephants"', "20 elephants"),
        ("this is not toml", "not TOML"),
        ("log_level = 'loud'", "log_level"),
        ("[registry]\nretries = -4", "retries"),
    ],
)
def test_what_cannot_be_used_is_refused_with_its_name_and_file(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load(tmp_path, text)
    assert "dadi.toml" in str(error.value)


def test_a_chunk_size_that_is_no_power_of_two_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="power of two"):
        load(tmp_path, "[indexing]\nchunk_size = 300000", SuperpeerConfig)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration"):
        config.load(NodeConfig, tmp_path / "none.toml")


def test_no_file_is_all_defaults() -> None:
    assert config.load(NodeConfig, None) == NodeConfig()
    assert config.load(NodeConfig, None, {"fuse_threads": 7, "run": None}).fuse_threads == 7


