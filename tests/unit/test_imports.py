"""Who may import whom, as a test (ARCHITECTURE.md, "Invariants")."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SERVICES = ("dadi", "superpeer", "registry_proxy", "fuse")
GENERATED = ("_pb2.py", "_pb2_grpc.py")
FILES = sorted(
    path.relative_to(ROOT)
    for name in SERVICES
    for path in (ROOT / name).rglob("*.py")
    if not path.name.endswith(GENERATED)
)
PURE = [
    "dadi/errors.py", "dadi/digest.py", "dadi/erofs/layout.py", "dadi/erofs/tree.py", "dadi/erofs/writer.py",
    "dadi/index/chunks.py", "dadi/index/layer.py", "dadi/index/image.py", "dadi/index/tar.py",
    "dadi/index/tar_header.py", "dadi/index/tar_pax.py", "dadi/index/tar_path.py", "dadi/index/tar_sparse.py",
    "dadi/oci/reference.py", "dadi/oci/manifest.py", "dadi/oci/media_types.py", "dadi/oci/platforms.py",
    "dadi/oci/challenge.py", "dadi/oci/kubelet_match.py", "dadi/oci/index_document.py", "dadi/oci/link.py",
    "dadi/index/seek.py", "dadi/index/artifact.py", "dadi/index/signature.py", "dadi/snapshotter/filters.py",
    "dadi/snapshotter/model.py", "dadi/snapshotter/overlay.py", "fuse/state.py", "fuse/wire.py",
    "dadi/peers/places.py", "dadi/peers/token.py", "dadi/peers/shown.py", "dadi/peers/choose.py",
    "dadi/peers/health.py", "dadi/peers/owners.py", "dadi/peers/frames.py", "dadi/peers/hops.py",
    "dadi/peers/stream.py", "dadi/peers/tries.py", "dadi/peers/patience.py", "dadi/peers/lanes.py",
    "dadi/prefetch/life.py", "dadi/prefetch/manifests.py", "dadi/prefetch/messages.py",
    "dadi/prefetch/nodes.py", "dadi/prefetch/plan.py", "dadi/prefetch/rate.py", "dadi/prefetch/when.py",
    "superpeer/directory.py", "superpeer/groups.py", "dadi/peers/directory.py", "dadi/peers/tree.py",
    "dadi/peers/group.py", "dadi/simulate/bounds.py", "dadi/simulate/events.py",
    "dadi/simulate/settings.py", "dadi/prefetch/trace.py", "dadi/prefetch/trace_json.py",
    "dadi/prefetch/trace_artifact.py", "superpeer/traces_sampling.py",
    "dadi/units/texts.py", "dadi/versions.py",
    "dadi/originals/caller.py", "dadi/originals/byte_range.py", "dadi/originals/lists.py", "dadi/originals/messages.py",
    "registry_proxy/paths.py",
    "dadi/containerd/config.py", "dadi/containerd/labels.py", "dadi/containerd/mirror.py", "dadi/oci/hosts.py",
    "dadi/publish/documents.py", "dadi/wire.py",
]  # fmt: skip
IMPURE = {"asyncio", "socket", "time", "os", "threading", "aiohttp", "subprocess", "pathlib", "random"}


@functools.cache
def parsed(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


@functools.cache
def imported(path: Path) -> set[str]:
    """Return the modules that a file imports, in full."""
    found = set()
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def tops(path: Path) -> set[str]:
    return {name.split(".")[0] for name in imported(path)}


@pytest.mark.parametrize("path", FILES, ids=str)
def test_services_import_dadi_and_never_each_other(path: Path) -> None:
    others = set(SERVICES) - {path.parts[0], "dadi"}
    allowed = set()
    if path.parts[:2] == ("dadi", "node"):
        allowed.add("fuse")
    if str(path) in ("dadi/node/embedded.py", "dadi/simulate/world.py"):  # embeds one; runs its directory, not a copy
        allowed.add("superpeer")
    if str(path) == "dadi/node/proxying.py":  # embeds one
        allowed.add("registry_proxy")
    assert tops(path) & others <= allowed


@pytest.mark.parametrize("path", PURE)
def test_pure_modules_do_no_input_or_output(path: str) -> None:
    assert not tops(Path(path)) & IMPURE


@pytest.mark.parametrize("path", FILES, ids=str)
def test_every_file_says_what_lives_in_it(path: Path) -> None:
    assert (ast.get_docstring(parsed(path)) or "").strip()


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_of_more_than_400_lines_says_why(path: Path) -> None:
    text = (ROOT / path).read_text()
    assert len(text.splitlines()) <= 400 or "longer than" in text[:2500].lower()


def test_fusepy_is_no_dependency() -> None:
    assert "fusepy" not in (ROOT / "pyproject.toml").read_text()
