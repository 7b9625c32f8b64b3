"""What `dadi status` says of mounts that are not as they should be."""

from __future__ import annotations

import pytest

from dadi.cli import status

LOST = {
    "reference": "registry.test/team/app:1", "directory": "/mnt/app", "state": "lost", "bytes": 0, "bytes_present": 0,
    "devices": [], "error": "cannot connect to http://superpeer:7070",
}  # fmt: skip


def test_of_a_lost_mount_it_says_where_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    status._mounts([LOST, {**LOST, "directory": "/mnt/other", "state": "lazy"}], False)
    shown = capsys.readouterr().out
    assert "lost: /mnt/app: cannot connect to http://superpeer:7070\n" in shown
    assert "lost: /mnt/other" not in shown
