"""`dadi trace`: what it shows, exports and imports; the node is a function of the test's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from dadi.cli import trace as verb
from dadi.cli.main import cli
from dadi.prefetch import trace_json
from dadi.prefetch.trace import StartGroup, Trace

A = "sha256:" + "a" * 64
FOUND = Trace("sha256:" + "b" * 64, ((A, 4096),), (StartGroup(3, ((0, 7, 0), (0, 8, 1), (0, 2, 1500))),))
ROW = {"replayed": True, "used_chunks": 3, "trace_chunks": 3, "hit_ratio": 1.0, "covered": 0.75}


class Node:
    def __init__(self, found: Trace | None) -> None:
        self.calls: list[tuple[str, Any, Any]] = []
        self.found = found

    def call(self, method: str, path: str, parameters: Any = None, body: Any = None) -> Any:
        assert path == "/v1/traces"
        self.calls.append((method, parameters, body))
        return {"reference": "r.example/app:1", "platform": "linux/amd64", "manifest_digest": FOUND.manifest,
                "trace": trace_json.to_json(self.found) if self.found else None, "last_start": ROW}  # fmt: skip


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Node:
    made = Node(FOUND)
    monkeypatch.setattr(verb, "NodeClient", lambda socket: made)
    return made


def dadi(*arguments: str, fails: bool = False) -> str:
    done = CliRunner().invoke(cli, ["trace", *arguments])
    assert bool(done.exit_code) == fails, done.output
    return f"{done.output}{done.exception or ''}"


def test_show_says_what_was_learnt_and_how_good_it_was(node: Node) -> None:
    text = dadi("show", "app:1", "--chunks")
    assert "start 1: 3 nodes, 3 chunks (12.3 kB) of 1 layers in 1.5 s" in text
    assert "7-8" in text
    assert "it had 75% of what was read" in text
    assert msgspec.json.decode(dadi("show", "app:1", "--json"))["trace"]["format"] == trace_json.FORMAT


def test_what_was_exported_can_be_imported_and_is_readable_line_by_line(node: Node, tmp_path: Path) -> None:
    file = tmp_path / "trace.json"
    dadi("export", "app:1", "--output", str(file))
    assert dadi("export", "app:1") == file.read_text()
    assert "   [0,7,2,0],\n   [0,2,1,1500]\n" in file.read_text()
    dadi("import", "app:1", str(file))
    method, _, body = node.calls[-1]
    assert method == "POST"
    assert trace_json.from_json(body["trace"]).chunks(FOUND.groups[0]) == FOUND.chunks(FOUND.groups[0])
    dadi("clear", "app:1", "--platform", "linux/arm64")
    assert node.calls[-1][:2] == ("DELETE", {"image": "app:1", "platform": "linux/arm64"})


def test_what_belongs_to_push_is_refused_without_it(node: Node) -> None:
    for option in (("--plain-http",), ("--sign-key", "key.pem"), ("--config", "cli.toml")):
        done = CliRunner().invoke(cli, ["trace", "export", "app:1", *option])
        assert done.exit_code == 2
        assert "belong to --push" in done.output
    assert node.calls == []


def test_nothing_learnt_yet_and_files_that_are_no_trace(node: Node, tmp_path: Path) -> None:
    node.found = None
    assert "nothing was learnt yet" in dadi("show", "app:1")
    assert "nothing was learnt" in dadi("export", "app:1", fails=True)
    wrong = tmp_path / "wrong"
    wrong.write_bytes(b"\xff")
    assert "is no startup trace" in dadi("import", "app:1", str(wrong), fails=True)
    assert "cannot read" in dadi("import", "app:1", str(tmp_path / "none"), fails=True)
