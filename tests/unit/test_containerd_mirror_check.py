"""What `dadi doctor` says of the registry proxies that engines are told to ask."""

from __future__ import annotations

import socket
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from dadi.containerd import check, config, mirror, mirror_check

GONE = "/nowhere/containerd.sock"
OLD, NEW = "io.containerd.grpc.v1.cri", "io.containerd.cri.v1.images"
CERTS = mirror.CERTS_D


class Healthy(BaseHTTPRequestHandler):
    said = b"ok\n"

    def log_message(self, format: str, *arguments: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(self.said)


@pytest.fixture
def proxy() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Healthy) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def told(directory: Path, url: str) -> str:
    """Have containerd told of a proxy; return its certs.d."""
    for name, text in mirror.files(url, ["docker.io"]).items():
        (directory / name).parent.mkdir(parents=True)
        (directory / name).write_text(text)
    return str(directory)


def test_where_nobody_is_told_of_a_proxy_nothing_is_said(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/hosts.toml").write_text('[host."http://127.0.0.1:9"]\n')
    (tmp_path / "dadi.conf").write_text("no TOML [")
    assert mirror_check.probe(GONE, str(tmp_path), str(tmp_path / "dadi.conf")) == []
    assert mirror_check.probe(GONE, str(tmp_path / "no"), str(tmp_path / "no")) == []


def test_a_proxy_that_answers_is_one_row_however_many_registries_lead_to_it(tmp_path: Path, proxy: str) -> None:
    (tmp_path / "dadi.conf").write_text(
        f'[[registry]]\nlocation = "docker.io"\n[[registry.mirror]]\nlocation = "{proxy.removeprefix("http://")}'
        '/docker.io"\ninsecure = true\n'
    )
    (row,) = mirror_check.probe(GONE, told(tmp_path / "certs", proxy), str(tmp_path / "dadi.conf"))
    assert row.ok
    assert row.detail == f"{proxy} answers"


def test_a_proxy_that_does_not_answer_is_lacking(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    for scheme in ("http", "https"):
        (row,) = mirror_check.probe(GONE, told(tmp_path / scheme, f"{scheme}://127.0.0.1:{port}"), str(tmp_path / "no"))
        assert not row.ok
        assert "refused" in row.detail
        assert "pull past it" in row.hint


def test_somebody_else_at_its_address_is_no_proxy(
    tmp_path: Path, proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Healthy, "said", b"<html>")
    (row,) = mirror_check.probe(GONE, told(tmp_path, proxy), str(tmp_path / "no"))
    assert not row.ok
    assert "somebody else" in row.detail


@pytest.mark.parametrize(
    ("dumped", "expected"),
    [({}, None), ({"plugins": {OLD: {"registry": {"config_path": CERTS}}}}, True),
     ({"plugins": {OLD: {"registry": {"config_path": ""}}}}, False),
     ({"plugins": {OLD: {}}, "disabled_plugins": ["cri"]}, None),
     ({"plugins": {NEW: {"registry": {"config_path": f"{CERTS}:/etc/docker/certs.d"}}}}, True),
     ({"plugins": {NEW: {"registry": {"config_path": f"{CERTS}-mine"}}}}, False)],
)  # fmt: skip
def test_whether_cri_looks_there(dumped: dict[str, Any], expected: bool | None) -> None:
    assert config.cri_looks_into(dumped, CERTS, usual=False) is expected


def test_from_2_2_on_cri_looks_there_untold_but_not_where_it_is_told_of_mirrors_in_the_old_way() -> None:
    untold: dict[str, Any] = {"plugins": {NEW: {"registry": {}}}}
    assert config.cri_looks_into(untold, CERTS, usual=True)
    untold["plugins"][NEW]["registry"]["mirrors"] = {"docker.io": {}}
    assert not config.cri_looks_into(untold, CERTS, usual=True)


@pytest.mark.parametrize(
    ("dumped", "detail"),
    [({"plugins": {OLD: {"registry": {"config_path": "DIR"}}}}, "yes, by"), ({"plugins": {OLD: {}}}, "no: its"),
     (ValueError("no TOML"), "not known: no TOML")],
)  # fmt: skip
def test_with_kubernetes_it_is_said_whether_pods_pull_through_it(
    tmp_path: Path, proxy: str, monkeypatch: pytest.MonkeyPatch, dumped: Any, detail: str
) -> None:
    certs = told(tmp_path / "certs", proxy)
    (tmp_path / "sock").touch()
    said = subprocess.CompletedProcess([], 0, "containerd github.com/containerd/containerd 1.6.20~ds1 1.6.20~ds1")

    def dump(_: str) -> dict[str, Any]:
        if isinstance(dumped, Exception):
            raise dumped
        if "registry" in (found := dumped["plugins"][OLD]):
            found["registry"]["config_path"] = certs
        return dict(dumped)

    monkeypatch.setattr(subprocess, "run", lambda *_, **__: said)
    monkeypatch.setattr(check, "dumped", dump)
    _, row = mirror_check.probe(str(tmp_path / "sock"), certs, str(tmp_path / "no"))
    assert row.ok, "there may be no Kubernetes"
    assert row.detail.startswith(detail)
