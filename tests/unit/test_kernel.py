"""The mount table and what `dadi doctor` says, from files; mounting itself is tested with the real kernel."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dadi.errors import DadiError, InvalidRequest, Malformed, MissingFeature
from dadi.node import kernel
from fuse import connection

TABLE = rb"""22 1 254:0 / / rw,relatime - ext4 /dev/vda rw,discard
36 22 0:47 / /mnt/two\040words\134 ro,nosuid master:1 shared:7 - fuse.dadi dadi rw,user_id=0
40 22 7:8 /sub /caf\303\251 rw - erofs /dev/loop8 ro
41 22 0:3 / /empty rw -  none rw
"""


def test_a_mount_table_is_read_with_its_escapes_and_optional_fields() -> None:
    root, fuse, erofs, odd = kernel.parse_mountinfo(TABLE)
    assert (root.id, root.parent, root.device, root.target, root.kind, root.source) == (
        22, 1, "254:0", "/", "ext4", "/dev/vda",
    )  # fmt: skip
    assert (fuse.target, fuse.kind, fuse.options) == (
        "/mnt/two words\\", "fuse.dadi", ("ro", "nosuid", "rw", "user_id=0"),
    )  # fmt: skip
    assert (os.fsencode(erofs.target), erofs.root) == ("/café".encode(), "/sub")
    assert (odd.kind, odd.source) == ("", "none")


@pytest.mark.parametrize(
    "line", [b"x", b"1 2 3:4 / /a rw", b"1 2 3:4 / /a rw ext4 dev rw", b"1 two 3:4 / /a rw - a b c"]
)
def test_a_line_that_is_none_is_malformed(line: bytes) -> None:
    with pytest.raises(Malformed, match="not a line of a mount table"):
        kernel.parse_mountinfo(line)


@given(st.binary(max_size=200))
def test_whatever_bytes_come_they_are_a_mount_table_or_malformed(text: bytes) -> None:
    try:
        mounts = kernel.parse_mountinfo(text)
    except Malformed:
        return
    assert len(mounts) <= text.count(b"\n") + 1


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40))
def test_any_path_survives_the_table(name: str) -> None:
    raw = "".join(f"\\{ord(c):03o}" if c in " \t\n\\" else c for c in f"/{name}")
    (mount,) = kernel.parse_mountinfo(f"1 2 3:4 / {raw} rw - a b c".encode())
    assert mount.target == f"/{name}"


def test_the_mount_table_of_this_machine_is_understood() -> None:
    assert kernel.is_mounted("/proc")
    assert not kernel.is_mounted("/proc/self")
    assert {"/", "/proc"} <= {mount.target for mount in kernel.mounts()}


@pytest.mark.parametrize("bad", [("a\0b", "/t", "x", ""), ("a", "/t\0", "x", ""), ("a", "/t", "x", "o\0p")])
def test_a_nul_never_reaches_the_kernel(bad: tuple[str, str, str, str]) -> None:
    with pytest.raises(InvalidRequest, match="NUL"):
        kernel.mount(*bad[:3], 0, bad[3])
    with pytest.raises(InvalidRequest, match="NUL"):
        kernel.umount("/nowhere\0")


def test_a_device_with_a_comma_cannot_smuggle_an_option_in() -> None:
    with pytest.raises(InvalidRequest, match="comma"):
        kernel.mount_erofs("/dev/loop0", "/nowhere", ["/dev/loop1,dax"])


# ---- dadi doctor


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with all that is needed; EROFS is a module."""
    for directory in ("proc/self", "dev", "lib/modules/6.8.0-1"):
        (tmp_path / directory).mkdir(parents=True)
    (tmp_path / "proc/self/status").write_text("Name:\tx\nCapEff:\t000001ffffffffff\n")
    (tmp_path / "proc/filesystems").write_text("nodev\tproc\nnodev\toverlay\n\text4\n")
    (tmp_path / "lib/modules/6.8.0-1/modules.dep").write_text("kernel/fs/erofs/erofs.ko.zst: kernel/lib/x.ko\n")
    for device in ("fuse", "loop-control"):
        (tmp_path / "dev" / device).touch()
    monkeypatch.setattr(connection, "offered", lambda: (7, 38))
    return tmp_path


def lacking(machine: Path, release: str = "6.8.0-1") -> dict[str, str]:
    rows = kernel.probe(root=machine, release=release)
    assert len(rows) == 7
    assert all(bool(row.hint) != row.ok for row in rows), "advice where it is needed, and nowhere else"
    assert all(row.detail for row in rows)
    return {row.name: row.detail for row in rows if not row.ok}


def test_a_machine_that_has_everything_lacks_nothing(machine: Path) -> None:
    assert lacking(machine) == {}


@pytest.mark.parametrize(
    ("release", "ok"), [("6.4.0", True), ("6.4", True), ("6.18.44-x", True), ("7.0-rc1", True), ("6.3.9", False),
                        ("5.10.0-26-amd64", False), ("mystery", False)],
)  # fmt: skip
def test_kernels_older_than_6_4_are_too_old(machine: Path, release: str, ok: bool) -> None:
    (machine / "proc/filesystems").write_text("overlay erofs")
    assert lacking(machine, release) == ({} if ok else {"Linux 6.4 or newer": release})


def test_a_missing_device_privilege_or_file_system_is_named(machine: Path) -> None:
    (machine / "dev/fuse").unlink()
    assert list(lacking(machine)) == ["FUSE device"]
    (machine / "dev/loop-control").unlink()
    (machine / "lib/modules/6.8.0-1/modules.dep").unlink()
    (machine / "proc/self/status").write_text("CapEff:\t00000000a80425fb\n")
    (machine / "proc/filesystems").unlink()
    assert list(lacking(machine)) == [
        "privilege to mount", "FUSE device", "loop devices", "file system erofs", "file system overlay",
    ]  # fmt: skip


def test_a_kernel_that_cannot_be_asked_for_its_fuse_version_is_told(
    machine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse() -> tuple[int, int]:
        raise MissingFeature("the kernel speaks FUSE 7.31", hint="boot a newer kernel")

    monkeypatch.setattr(connection, "offered", refuse)
    assert lacking(machine) == {"FUSE protocol": "the kernel speaks FUSE 7.31"}


def test_an_error_of_the_kernel_says_what_was_done_and_what_to_do() -> None:
    with pytest.raises(DadiError) as caught:
        kernel.mount("nothing", "/nowhere-at-all", "no-such-file-system")
    assert "mounting nothing on /nowhere-at-all as no-such-file-system: " in caught.value.message
    assert caught.value.hint
