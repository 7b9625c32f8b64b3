"""`dadi umount` when dadi-node does not answer: with --force the mount is taken away all the same."""

from __future__ import annotations

import importlib
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from click.testing import CliRunner

from dadi.errors import DadiError, NotFound, StoreFull, Unavailable
from dadi.node import released

mount = importlib.import_module("dadi.cli.mount")


@pytest.fixture
def freed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, str]]:
    calls: list[tuple[Path, str]] = []
    monkeypatch.setattr(released, "free", lambda run, directory: calls.append((run, directory)))
    return calls


@pytest.fixture
def silent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A socket behind which nobody ever answers."""
    monkeypatch.setattr(mount, "_FORCED", 0.05)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(tmp_path / "node.sock"))
        listening.listen()
        yield tmp_path / "node.sock"


def test_a_node_that_is_dead_is_not_needed(tmp_path: Path, freed: list[tuple[Path, str]]) -> None:
    arguments = ["--force", "--node-socket", str(tmp_path / "node.sock"), "/mnt/app"]
    done = CliRunner().invoke(mount.umount, arguments)
    assert done.exit_code == 0
    assert freed == [(tmp_path, "/mnt/app")]
    assert "/mnt/app was taken away all the same" in done.output


def test_a_node_that_hangs_is_not_waited_for_for_long(silent: Path, freed: list[tuple[Path, str]]) -> None:
    assert CliRunner().invoke(mount.umount, ["--force", "--node-socket", str(silent), "/mnt/app"]).exit_code == 0
    assert freed == [(silent.parent, "/mnt/app")]


@pytest.mark.parametrize("error", [DadiError("a fault of ours"), StoreFull("no space left")])
def test_a_node_that_cannot_do_it_is_not_needed_either(
    tmp_path: Path, freed: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch, error: DadiError
) -> None:
    def call(*_: object) -> NoReturn:
        raise error

    monkeypatch.setattr(mount.NodeClient, "call", call)
    assert CliRunner().invoke(mount.umount, ["--force", "/mnt/app"]).exit_code == 0
    assert [directory for _, directory in freed] == ["/mnt/app"]


def test_what_the_node_says_is_not_there_is_not_taken_away(
    freed: list[tuple[Path, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(*_: object) -> NoReturn:
        raise NotFound("no image is mounted there")

    monkeypatch.setattr(mount.NodeClient, "call", call)
    assert isinstance(CliRunner().invoke(mount.umount, ["--force", "/mnt/app"]).exception, NotFound)
    assert freed == []


def test_without_force_it_is_an_error(tmp_path: Path, freed: list[tuple[Path, str]]) -> None:
    done = CliRunner().invoke(mount.umount, ["--node-socket", str(tmp_path / "node.sock"), "/mnt/app"])
    assert isinstance(done.exception, Unavailable)
    assert freed == []
