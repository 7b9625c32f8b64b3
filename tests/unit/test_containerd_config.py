"""What `dadi containerd-config` prints is TOML, and what `dadi doctor` looks for."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from dadi.cli.main import cli
from dadi.containerd import check, config
from dadi.containerd.config import CriSettings, parse_version, printed_version
from dadi.errors import InvalidRequest, NotFound, Unavailable
from dadi.node.config import NodeConfig

VERSIONS = ["1.6", "1.6.20", "1.7", "1.7.16", "2.0", "2.0.4", "2.1", "2.2.0", "2.x", "3.0"]


def printed(version: str, *, cri: bool = True, socket: str = "/run/s.sock", root: str = "/var/r") -> dict[str, Any]:
    return tomllib.loads(config.text(parse_version(version), cri=cri, socket=socket, root=root))


def test_the_defaults_are_the_nodes() -> None:
    assert f"{NodeConfig().run}/snapshotter.sock" == config.SOCKET
    assert NodeConfig().state == config.ROOT


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("cri", [False, True])
def test_every_version_gets_the_proxy_plugin(version: str, cri: bool) -> None:
    found = printed(version, cri=cri)
    plugin = found["proxy_plugins"]["dadi"]
    assert found["version"] == (2 if version.startswith("1") else 3)
    assert (plugin["type"], plugin["address"], plugin["exports"]["root"]) == ("snapshot", "/run/s.sock", "/var/r")


@pytest.mark.parametrize("version", VERSIONS)
def test_what_is_printed_for_cri_makes_it_pull_lazily(version: str) -> None:
    assert config.cri_settings(printed(version)) == CriSettings("dadi", True)
    assert config.cri_settings(printed(version, cri=False)) is None


@pytest.mark.parametrize("version", VERSIONS)
def test_who_has_cri_is_told_what_has_to_start_first(version: str) -> None:
    def text(cri: bool) -> str:
        return config.text(parse_version(version), cri=cri, socket="/s", root="/var/r")

    assert "# Start dadi-node before containerd" in text(True)
    assert "# Start dadi-node before containerd" not in text(False)


def test_who_has_cri_is_told_where_kubelet_asks_for_images() -> None:
    text = config.text(parse_version("1.7"), cri=True, socket="/run/x/snapshotter.sock", root="/var/r")
    assert "#   imageServiceEndpoint: unix:///run/x/cri.sock\n" in text


@pytest.mark.parametrize("version", ["2.1", "2.x"])
def test_the_transfer_service_keeps_what_it_had_and_gets_ours(version: str) -> None:
    found = printed(version)
    rows = found["plugins"]["io.containerd.transfer.v1.local"]["unpack_config"]
    assert [(row["platform"], row["snapshotter"], row["differ"]) for row in rows] == [
        ("linux", "overlayfs", "walking"), ("linux", "dadi", "walking"),
    ]  # fmt: skip
    assert "disable_snapshot_annotations" not in found["plugins"]["io.containerd.cri.v1.images"], "it would switch back"


def test_versions_that_do_not_know_exports_get_a_hint_for_kubelet() -> None:
    def text(version: str) -> str:
        return config.text(parse_version(version), cri=True, socket="/s", root="/var/r")

    assert "ln -s /var/r /var/lib/containerd/io.containerd.snapshotter.v1.dadi" in text("1.6")
    assert "ln -s" in text("1.7.15")
    assert "ln -s" not in text("1.7.16")
    assert "ln -s" not in text("1.7"), "the newest of them, if nothing else is said"


def test_odd_paths_are_quoted_or_refused() -> None:
    found = printed("1.7", socket='/run/"a\\b".sock')
    assert found["proxy_plugins"]["dadi"]["address"] == '/run/"a\\b".sock'
    with pytest.raises(InvalidRequest, match="characters"):
        printed("1.7", root="/a\nb")


@pytest.mark.parametrize(
    ("output", "version"),
    [
        ("containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1-1+deb12u3\n", (1, 6, 20)),
        ("containerd github.com/containerd/containerd v1.7.24 88bf19b2105c8b17560993bee28a01ddc2f97182\n", (1, 7, 24)),
        ("containerd containerd.io 1.7.24 88bf19b2105c8b17560993bee28a01ddc2f97182\n", (1, 7, 24)),
        ("containerd github.com/containerd/containerd/v2 v2.0.0-rc.1 0123abc\n", (2, 0, 0)),
        ("containerd github.com/containerd/containerd/v2 v2.1.3 0123abc\n", (2, 1, 3)),
    ],
)
def test_what_containerd_says_of_its_version_is_understood(output: str, version: tuple[int, ...]) -> None:
    assert printed_version(output) == version


@pytest.mark.parametrize("text", ["", "x", "1.x.y", "1.5", "1.5.11", "0.9", "v", "2.1.3.4.5 "])
def test_versions_that_are_none_or_too_old_are_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_version(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [("1", "1.x"), ("2", "2.x"), ("2.x", "2.x"), ("v1.7", "1.7"), ("1.6.20~ds1", "1.6.20")],
)
def test_a_version_is_shown_as_far_as_it_is_known(text: str, shown: str) -> None:
    assert str(parse_version(text)) == shown


def test_output_that_holds_no_version_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="says"):
        printed_version("containerd devel")


@pytest.mark.parametrize(
    ("dumped", "settings"),
    [
        ({}, None),
        ({"plugins": 7}, None),
        ({"plugins": {"io.containerd.grpc.v1.cri": {"containerd": {"snapshotter": "overlayfs"}}}},
         CriSettings("overlayfs", False)),
        ({"plugins": {"io.containerd.grpc.v1.cri": {"containerd": {
            "snapshotter": "dadi", "disable_snapshot_annotations": True}}}}, CriSettings("dadi", False)),
        ({"plugins": {"io.containerd.cri.v1.images": {"snapshotter": "dadi", "disable_snapshot_annotations": False}}},
         CriSettings("dadi", True)),
        ({"plugins": {"io.containerd.cri.v1.images": {"snapshotter": "dadi", "disable_snapshot_annotations": True}},
          "proxy_plugins": {"dadi": {"exports": {"enable_remote_snapshot_annotations": "true"}}}},
         CriSettings("dadi", False)),
    ],
)  # fmt: skip
def test_settings_of_cri_are_read_from_what_containerd_dumps(
    dumped: dict[str, Any], settings: CriSettings | None
) -> None:
    assert config.cri_settings(dumped) == settings


def test_the_version_is_asked_for_if_it_is_not_given(monkeypatch: pytest.MonkeyPatch) -> None:
    said = "containerd github.com/containerd/containerd/v2 v2.1.3 0123abc\n"

    def run(command: list[str], *, timeout: float, **_: Any) -> subprocess.CompletedProcess[str]:
        assert command == ["containerd", "--version"]
        assert timeout > 0
        return subprocess.CompletedProcess(command, 0, said, "")

    monkeypatch.setattr(subprocess, "run", run)
    done = CliRunner().invoke(cli, ["containerd-config"], catch_exceptions=False)
    assert "# For containerd 2.1.3" in done.stdout
    assert config.SOCKET in done.stdout


@pytest.mark.parametrize(
    ("problem", "error"),
    [(FileNotFoundError(), NotFound), (PermissionError(13, "no"), Unavailable),
     (subprocess.TimeoutExpired("containerd", 10), Unavailable)],
)  # fmt: skip
def test_a_containerd_that_does_not_say_its_version(
    monkeypatch: pytest.MonkeyPatch, problem: Exception, error: type[Exception]
) -> None:
    def run(*_: Any, **__: Any) -> None:
        raise problem

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(error, match="--version"):
        CliRunner().invoke(cli, ["containerd-config"], catch_exceptions=False)


def test_a_machine_without_containerd_lacks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    (row,) = check.probe(str(tmp_path / "sock"))
    assert row.ok
    assert row.detail == "not on this machine"


def test_a_socket_that_nobody_answers_on_is_said(tmp_path: Path) -> None:
    (tmp_path / "sock").touch()
    (row,) = check.probe(str(tmp_path / "sock"))
    assert not row.ok
    assert "is containerd running" in row.hint
