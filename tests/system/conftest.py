"""Fixtures of tests on the real kernel: where to mount, and that nothing stays mounted or started."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from dadi.node import kernel
from tests.lab.cleanup import Lab, clean_lab, mounts_below


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """An empty directory to mount an image at."""
    directory = tmp_path / "mnt"
    directory.mkdir()
    return directory


@pytest.fixture
def lab() -> Iterator[Lab]:
    """A lab for one test. Nothing of it is left afterwards."""
    with clean_lab("s") as lab:
        yield lab


@pytest.fixture(autouse=True)
def nothing_stays_mounted(tmp_path: Path) -> Iterator[None]:
    """Fail a test that leaves a mount below its own directory, and take the mount down for the next one."""
    yield
    left = [point for point, _ in mounts_below(tmp_path)]
    for directory in left:
        kernel.umount(directory, detach=True)
    assert left == []
