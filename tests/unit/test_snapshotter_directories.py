"""Directories of snapshots: made, measured and deleted, and the options that overlayfs needs here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from dadi.errors import ConfigError, StoreFull, Unavailable
from dadi.snapshotter.directories import Directories, overlay_options


@pytest.fixture
def directories(tmp_path: Path) -> Directories:
    made = Directories(tmp_path)
    made.prepare()
    return made


def test_an_active_snapshot_has_a_work_directory_and_a_view_has_none(directories: Directories) -> None:
    directories.make(1, work=True)
    directories.make(2, work=False)
    assert sorted(os.listdir(directories.path / "1")) == ["fs", "work"]
    assert os.listdir(directories.path / "2") == ["fs"]
    assert directories.present() == {1, 2}


def test_a_directory_that_is_there_already_is_not_taken_over(directories: Directories) -> None:
    directories.make(1, work=True)
    with pytest.raises(Unavailable, match="File exists"):
        directories.make(1, work=True)


def test_a_full_disk_is_store_full(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "mkdir", full)
    with pytest.raises(StoreFull):
        directories.make(1, work=True)


@pytest.mark.parametrize("name", ["a:b", "a,b", 'a"b', "a\\b"])
def test_a_path_that_cannot_be_a_mount_option_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match="mount's options"):
        Directories(tmp_path / name)


def test_usage_counts_a_file_with_several_names_once_and_follows_no_link(directories: Directories) -> None:
    directories.make(1, work=True)
    top = Path(directories.upper(1))
    (directories.path.parent / "outside").write_bytes(os.urandom(1 << 20))
    empty = directories.usage(1)
    assert empty.inodes == 1
    (top / "below").mkdir()
    (top / "below" / "file").write_bytes(os.urandom(64 << 10))
    os.link(top / "below" / "file", top / "again")
    (top / "link").symlink_to(directories.path.parent / "outside")
    (top / "directory").symlink_to(directories.path)
    (Path(directories.work(1)) / "x").write_bytes(b"not counted")
    os.sync()
    usage = directories.usage(1)
    assert usage.inodes == 5
    assert 64 << 10 <= usage.size - empty.size < 128 << 10


def test_usage_of_what_is_gone_is_nothing(directories: Directories) -> None:
    assert directories.usage(9) == (0, 0)


def test_deleting_follows_no_link_and_is_harmless_again(directories: Directories) -> None:
    directories.make(1, work=True)
    outside = directories.path.parent / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (Path(directories.upper(1)) / "link").symlink_to(outside)
    assert directories.delete(1)
    assert directories.delete(1)
    assert directories.present() == set()
    assert (outside / "precious").exists()


def test_what_cannot_be_deleted_is_logged(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    directories.make(1, work=True)

    def refused(*_: object, **__: object) -> None:
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(os, "rmdir", refused)
    with capture_logs() as logs:
        assert not directories.delete(1)
    assert "Operation not permitted" in logs[0]["why"]


def test_the_owner_of_the_parent_s_root_is_taken(directories: Directories, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, int, int]] = []
    monkeypatch.setattr(os, "chown", lambda path, uid, gid: calls.append((str(path), uid, gid)))
    monkeypatch.setattr(os, "geteuid", lambda: 4242)
    directories.make(1, work=True)
    status = os.stat(directories.path)
    directories.take_owner(1, str(directories.path))
    assert calls == [(directories.upper(1), status.st_uid, status.st_gid)]
    with pytest.raises(Unavailable):
        directories.take_owner(1, "/none")


def system(root: Path, *, users: str = "0 0 4294967295", index: bool = True, mounts: str = "") -> Path:
    """Make /proc and /sys as a kernel would show them."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/self/uid_map").write_text(f"         {users}\n")
    (root / "proc/self/mountinfo").write_text(mounts)
    if index:
        (root / "sys/module/overlay/parameters").mkdir(parents=True)
        (root / "sys/module/overlay/parameters/index").write_text("N\n")
    return root


def test_options_of_overlays_on_this_kernel(tmp_path: Path) -> None:
    disk = "1 0 8:1 / / rw - ext4 /dev/sda rw\n"
    tmpfs = disk + "2 1 0:2 / /var rw - tmpfs none rw\n"
    state = Path("/var/lib/dadi")
    assert overlay_options(state, system(tmp_path / "a")) == ("index=off",)
    assert overlay_options(state, system(tmp_path / "b", index=False)) == ()
    user = system(tmp_path / "c", users="0 100000 65536", mounts=disk)
    assert overlay_options(state, user) == ("userxattr", "index=off")
    user = system(tmp_path / "d", users="0 100000 65536", mounts=tmpfs)
    assert overlay_options(state, user) == ("index=off",)
