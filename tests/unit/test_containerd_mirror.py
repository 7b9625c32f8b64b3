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
HOST = {URL: {"capabilities": ["pull", "resolve"], "dial_timeout": "1s"}}


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


def written(directory: Path, *options: str) -> str:
    return CliRunner().invoke(
        cli, ["containerd-config", "--mirror", "--write", str(directory), *options], catch_exceptions=False
    ).stdout


def test_an_https_proxy_with_an_authority_of_its_own(tmp_path: Path) -> None:
    url, path = "https://127.0.0.1:7072", '/etc/d"x.crt'
    for text in mirror.files(url, ["docker.io"], path).values():
        assert tomllib.loads(text)["host"][url]["ca"] == path
        assert mirror.mirrors(text) == {url: path}
        assert mirror.is_ours(text)
    for wrong in ((URL, path), (url, "ca.crt"), (url, "/a\nb")):
        with pytest.raises(InvalidRequest):
            mirror.files(wrong[0], [], wrong[1])
    said = written(tmp_path, "--proxy", url, "--ca", path)
    assert "wrote" in said
    assert path in tomllib.loads((tmp_path / "_default/hosts.toml").read_text())["host"][url]["ca"]


@pytest.mark.parametrize("more", ["skip_verify = true\n", '[host."http://other"]\n', "[more]\n", "="])
def test_what_somebody_has_edited_is_left_alone(tmp_path: Path, more: str) -> None:
    written(tmp_path)
    file = tmp_path / "_default/hosts.toml"
    edited = file.read_text() + more
    file.write_text(edited)
    with pytest.raises(AlreadyExists, match="edited"):
        written(tmp_path, "--registry", "docker.io")
    assert file.read_text() == edited
    assert not (tmp_path / "docker.io").exists()


def test_files_of_an_earlier_version_and_for_another_proxy_are_replaced(tmp_path: Path) -> None:
    (tmp_path / "_default").mkdir()
    (tmp_path / "_default/hosts.toml").write_text(f'{mirror.MARK}\n[host."http://a"]\n  capabilities = ["pull"]\n')
    written(tmp_path)
    assert tomllib.loads((tmp_path / "_default/hosts.toml").read_text()) == {"host": HOST}


def test_certificates_that_containerd_would_no_longer_look_at_are_said(tmp_path: Path) -> None:
    (tmp_path / "reg.example").mkdir()
    (tmp_path / "reg.example/ca.crt").touch()
    with pytest.raises(AlreadyExists, match=r"ca\.crt"):
        written(tmp_path, "--registry", "reg.example")
    assert [*tmp_path.rglob("hosts.toml")] == []


def test_a_directory_that_containerd_looks_into_first_is_said(tmp_path: Path) -> None:
    (tmp_path / "reg.example_5000_").mkdir()
    with pytest.raises(AlreadyExists, match="5000_ first"):
        written(tmp_path, "--registry", "reg.example:5000")
    written(tmp_path, "--registry", "reg.example:5001")


def test_registries_that_go_past_the_proxy_are_named(tmp_path: Path) -> None:
    for name in ("mine.example", "theirs.example"):
        (tmp_path / name).mkdir()
    (tmp_path / "mine.example/hosts.toml").write_text('server = "https://mine.example"\n')
    said = written(tmp_path, "--registry", "docker.io")
    assert "past the proxy" in said
    assert "mine.example, theirs.example" in said
    assert "docker.io" not in said.partition("past the proxy")[2].partition("Kubernetes")[0]
    assert (tmp_path / "mine.example/hosts.toml").read_text() == 'server = "https://mine.example"\n'


def test_printed_it_says_which_file_each_part_is_for() -> None:
    said = CliRunner().invoke(cli, ["containerd-config", "--mirror"], catch_exceptions=False).stdout
    assert "# /etc/containerd/certs.d/_default/hosts.toml" in said
    assert "config_path" in said
