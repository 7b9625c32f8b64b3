"""The hosts.toml files for the registry proxy."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from click.testing import CliRunner

from dadi.cli.main import cli
from dadi.containerd import mirror
from dadi.errors import AlreadyExists, InvalidRequest

URL = "http://127.0.0.1:7072"
HOST = {URL: {"capabilities": ["pull", "resolve"]}}


def test_the_default_names_no_server_so_that_containerd_finds_each_registry_itself() -> None:
    assert {name: tomllib.loads(text) for name, text in mirror.files(URL, []).items()} == {
        "_default/hosts.toml": {"host": HOST}
    }


@pytest.mark.parametrize(
    ("registry", "directory", "server"),
    [("docker.io", "docker.io", "https://registry-1.docker.io"), ("reg.example:5000", "reg.example:5000",
     "https://reg.example:5000"), ("http://10.0.0.1:5000", "10.0.0.1:5000", "http://10.0.0.1:5000")],
)  # fmt: skip
def test_a_registry_of_its_own(registry: str, directory: str, server: str) -> None:
    text = mirror.files(URL, [registry])[f"{directory}/hosts.toml"]
    assert tomllib.loads(text) == {"server": server, "host": HOST}


@pytest.mark.parametrize("registry", ["../x", "a/b", "ftp://a.example", 'a"b', "", "a b"])
def test_what_is_no_registry(registry: str) -> None:
    with pytest.raises(InvalidRequest):
        mirror.files(URL, [registry])


@pytest.mark.parametrize("url", ["127.0.0.1:7072", "http://a/b", "http://u@a", "http://a?b", 'http://a"', "ftp://a"])
def test_what_is_no_mirror(url: str) -> None:
    with pytest.raises(InvalidRequest):
        mirror.files(url, [])


def test_files_are_written_and_those_of_others_left_alone(tmp_path: Path) -> None:
    command = ["containerd-config", "--mirror", "--registry", "docker.io", "--write", str(tmp_path)]
    for _ in range(2):
        CliRunner().invoke(cli, command, catch_exceptions=False)
        assert tomllib.loads((tmp_path / "docker.io/hosts.toml").read_text())["host"] == HOST
    (tmp_path / "docker.io/hosts.toml").write_text('server = "https://mine"\n')
    (tmp_path / "_default/hosts.toml").unlink()
    with pytest.raises(AlreadyExists):
        CliRunner().invoke(cli, command, catch_exceptions=False)
    assert not (tmp_path / "_default/hosts.toml").exists()
    assert "mine" in (tmp_path / "docker.io/hosts.toml").read_text()


def test_printed_it_says_which_file_each_part_is_for() -> None:
    said = CliRunner().invoke(cli, ["containerd-config", "--mirror"], catch_exceptions=False).stdout
    assert "# /etc/containerd/certs.d/_default/hosts.toml" in said
    assert "config_path" in said
