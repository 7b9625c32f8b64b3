"""Layers from two states of a tree: every kind of change becomes the members that the specification asks for."""

from __future__ import annotations

import io
import os
import tarfile
import time
from pathlib import Path

import pytest

from tests.lab import images, oci_layout
from tests.lab.tree import STAMP, Tree, scan, size_and_count, write_difference


def difference(root: Path, before: Tree, started: float | None = None) -> dict[str, tarfile.TarInfo]:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        write_difference(tar, root, before, scan(root), started=time.time() + 1e6 if started is None else started)
    stream.seek(0)
    with tarfile.open(fileobj=stream) as tar:
        return {member.name: member for member in tar}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "tree"
    (root / "directory/below").mkdir(parents=True)
    (root / "directory/file").write_text("one")
    (root / "directory/below/deep").write_text("two")
    (root / "other").write_text("three")
    return root


def test_first_layer_holds_everything_parents_first(root: Path) -> None:
    everything = ["directory", "directory/below", "directory/below/deep", "directory/file", "other"]
    assert list(difference(root, {})) == everything


def test_nothing_changed_gives_an_empty_layer(root: Path) -> None:
    assert difference(root, scan(root)) == {}


def test_deleted_directory_gets_one_whiteout(root: Path) -> None:
    before = scan(root)
    (root / "directory/below/deep").unlink()
    (root / "directory/below").rmdir()
    assert list(difference(root, before)) == ["directory", "directory/.wh.below"]


def test_directory_in_another_ones_place_is_opaque(root: Path) -> None:
    before = scan(root)
    (root / "new").mkdir()
    (root / "new/only").write_text("here")
    os.rename(root / "directory", root.parent / "away")
    os.rename(root / "new", root / "directory")
    assert list(difference(root, before)) == ["directory", "directory/.wh..wh..opq", "directory/only"]


def test_changes_of_type_are_the_new_member_alone(root: Path) -> None:
    before = scan(root)
    (root / "other").unlink()
    (root / "other").symlink_to("directory")
    (root / "directory/file").unlink()
    (root / "directory/file").mkdir()
    members = difference(root, before)
    assert list(members) == ["directory", "directory/file", "other"]
    assert (members["directory/file"].isdir(), members["other"].linkname) == (True, "directory")


def test_attributes_survive(root: Path) -> None:
    path = root / "other"
    os.utime(path, ns=(0, 1_700_000_000_123_456_789))
    path.chmod(0o6755)
    os.link(path, root / "zlink")
    os.setxattr(path, "user.x", b"\xff\x00value")
    members = difference(root, {})
    assert members["other"].pax_headers["mtime"] == "1700000000.123456789"
    assert members["other"].mode == 0o6755
    assert members["other"].pax_headers["SCHILY.xattr.user.x"].encode("utf-8", "surrogateescape") == b"\xff\x00value"
    assert (members["zlink"].islnk(), members["zlink"].linkname) == (True, "other")


def test_what_the_build_made_gets_the_fixed_time(root: Path) -> None:
    os.utime(root / "other", (1_600_000_000, 1_600_000_000))
    members = difference(root, {}, started=1_650_000_000)
    assert (members["other"].mtime, members["directory/file"].mtime) == (1_600_000_000, STAMP)


def test_size_counts_hard_links_once(root: Path) -> None:
    os.link(root / "other", root / "again")
    assert size_and_count(scan(root)) == (len("onetwothree"), 6)


def test_synthetic_images_are_deterministic_and_read_back(tmp_path: Path) -> None:
    both: list[oci_layout.Compression] = ["fast-gzip", "zstd"]
    made = [images.synthetic(tmp_path / name, layers=4, size=1 << 16, compression=both) for name in "12"]
    assert made[0].manifest == made[1].manifest
    assert oci_layout.load(tmp_path / "1", "latest") == made[0]
    assert images.synthetic(tmp_path / "3", layers=4, size=1 << 16, seed=1).manifest != made[0].manifest


def test_recompressed_layer_holds_the_same_tar(tmp_path: Path) -> None:
    image = images.synthetic(tmp_path / "image", layers=1, size=1 << 16)
    layout = oci_layout.Layout(tmp_path / "image")
    for compression in ("zstd", "none", "gzip"):
        again = layout.recompress(image.layers[0], compression)
        assert (again.diff_id, again.tar_size) == (image.layers[0].diff_id, image.layers[0].tar_size)
