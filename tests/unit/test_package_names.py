"""The module name `fuse` is ours: other projects have used it for bindings of another kind."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_imported_fuse_is_ours() -> None:
    spec = importlib.util.find_spec("fuse")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin) == ROOT / "fuse" / "__init__.py"


def test_no_installed_distribution_has_another_fuse() -> None:
    owners = importlib.metadata.packages_distributions().get("fuse", [])
    assert set(owners) <= {"dadi"}, "uninstall the others: whichever is found first hides the rest"
