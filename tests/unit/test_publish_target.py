"""An OCI layout as the place where indexes and images are brought."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest

from dadi import digest as digests
from dadi.errors import InvalidRequest, Malformed
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor
from dadi.oci.referrers import fallback_tag
from dadi.publish.local import open_layout
from dadi.publish.progress import Progress
from dadi.publish.target import LayoutTarget

SUBJECT = Descriptor(media_types.OCI_MANIFEST, digests.of(b"subject"), 7)
KIND = "application/vnd.test"


def blob(data: bytes) -> Descriptor:
    return Descriptor("application/octet-stream", digests.of(data), len(data))


def entries(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((directory / "index.json").read_bytes())["manifests"]
    return found


async def test_a_blob_is_written_once_from_bytes_or_from_a_file(tmp_path: Path) -> None:
    target = LayoutTarget(tmp_path / "out")
    (tmp_path / "file").write_bytes(b"file")
    assert await target.blob(blob(b"data"), b"data", Progress())
    assert await target.blob(blob(b"file"), tmp_path / "file", Progress())
    assert not await target.blob(blob(b"data"), b"data", Progress())
    assert {path.read_bytes() for path in (tmp_path / "out/blobs/sha256").iterdir()} == {b"data", b"file"}


@pytest.mark.parametrize("there", [b"", b"dat", b"dataX", b"DATA"])
async def test_a_blob_that_is_there_with_other_bytes_is_written_anew(tmp_path: Path, there: bytes) -> None:
    """A run that was broken off, or a bad disk: what has the name of the digest need not have its bytes."""
    target, path = LayoutTarget(tmp_path), tmp_path / "blobs/sha256" / blob(b"data").digest[7:]
    path.parent.mkdir(parents=True)
    path.write_bytes(there)
    assert await target.blob(blob(b"data"), b"data", Progress())
    assert path.read_bytes() == b"data"
    assert not await target.blob(blob(b"data"), b"data", Progress())
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("damage", ["gone", "other"])
async def test_a_list_of_referrers_that_is_not_what_its_name_says_is_left_alone(tmp_path: Path, damage: str) -> None:
    target = LayoutTarget(tmp_path)
    await target.referrer(b"one", SUBJECT, KIND, "index")
    name = fallback_tag(SUBJECT.digest)
    (listed,) = [e for e in entries(tmp_path) if e["annotations"]["org.opencontainers.image.ref.name"] == name]
    path = tmp_path / "blobs/sha256" / listed["digest"][7:]
    if damage == "gone":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes().replace(b"one", b"") + b" ")
    with pytest.raises(Malformed, match="choose another directory"):
        await target.referrer(b"two", SUBJECT, KIND, "index")


async def test_a_directory_in_the_place_of_index_json_is_said(tmp_path: Path) -> None:
    (tmp_path / "index.json").mkdir()
    with pytest.raises(Malformed, match=r"index\.json.*choose another directory"):
        await LayoutTarget(tmp_path).manifest(b"raw", media_types.OCI_MANIFEST, tagged=True)


async def test_a_tagged_manifest_takes_the_place_of_the_one_before(tmp_path: Path) -> None:
    for tag, raw in (("a", b"1"), ("b", b"2"), ("a", b"3")):
        await LayoutTarget(tmp_path, tag).manifest(raw, media_types.OCI_MANIFEST, tagged=True)
    found = {entry["annotations"]["org.opencontainers.image.ref.name"]: entry["digest"] for entry in entries(tmp_path)}
    assert found == {"a": digests.of(b"3"), "b": digests.of(b"2")}


async def test_referrers_are_entered_themselves_and_in_the_list_of_their_subject(tmp_path: Path) -> None:
    target = LayoutTarget(tmp_path)
    for raw in (b"one", b"two", b"two"):
        await target.referrer(raw, SUBJECT, KIND, "index")
    name = fallback_tag(SUBJECT.digest)
    assert name == f"sha256-{SUBJECT.digest[7:]}"
    found = await asyncio.to_thread(open_layout, tmp_path)
    listed = json.loads(await asyncio.to_thread(found.read, found.named(name), 1 << 20))
    assert [entry["digest"] for entry in listed["manifests"]] == [digests.of(b"one"), digests.of(b"two")]
    assert {entry["artifactType"] for entry in listed["manifests"]} == {KIND}
    (artifact,) = [entry for entry in entries(tmp_path) if entry.get("artifactType")]
    assert artifact["digest"] == digests.of(b"two")


async def test_what_else_is_in_a_layout_stays(tmp_path: Path) -> None:
    other = {"mediaType": "application/x", "digest": "sha512:" + "0" * 128, "size": 1, "strange": True}
    index = {"schemaVersion": 2, "manifests": [other], "annotations": {"a": "b"}}
    (tmp_path / "index.json").write_text(json.dumps(index))
    await LayoutTarget(tmp_path).manifest(b"raw", media_types.OCI_MANIFEST, tagged=True)
    written = json.loads((tmp_path / "index.json").read_bytes())
    assert other in written["manifests"]
    assert written["annotations"] == {"a": "b"}
    assert len(written["manifests"]) == 2


async def test_a_directory_with_another_index_json_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "index.json").write_text("my notes")
    with pytest.raises(Malformed, match="choose another directory"):
        await LayoutTarget(tmp_path).manifest(b"raw", media_types.OCI_MANIFEST, tagged=True)
    assert (tmp_path / "index.json").read_text() == "my notes"


async def test_a_place_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InvalidRequest, match="cannot be written"):
        await LayoutTarget(tmp_path / "out").blob(blob(b"data"), b"data", Progress())
