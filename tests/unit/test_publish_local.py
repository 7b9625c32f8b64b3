"""Images in files: OCI layouts and both forms of docker archives, and what is wrong with them."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dadi import digest as digests
from dadi.errors import DadiError, DigestMismatch, Malformed, NotFound, Unsupported
from dadi.oci import manifest as manifests
from dadi.oci import platforms
from dadi.oci.manifest import Descriptor, Manifest
from dadi.publish.archive import open_archive
from dadi.publish.images import LocalImage, select
from dadi.publish.local import FileExtent, LocalImages, open_layout, stream
from tests.lab import images
from tests.lab.layers import file, tar_of
from tests.lab.oci_layout import Image, Layout

AMD64 = platforms.parse("linux/amd64")
TARS = [tar_of(file(b"a", b"one")), tar_of(file(b"b", b"two" * 1000))]


def archive(path: Path, members: dict[str, bytes], links: dict[str, str] | None = None) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            tar.addfile(info)
    return path


def old_form(layers: list[bytes], **more: Any) -> dict[str, bytes]:
    config = {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [digests.of(tar) for tar in TARS]},
    }
    saved = {"Config": "config.json", "RepoTags": ["app:1", "team/app:2"], "Layers": ["0/layer.tar", "1/layer.tar"]}
    return {
        "config.json": json.dumps(config).encode(),
        "manifest.json": json.dumps([{**saved, **more}]).encode(),
        **{f"{number}/layer.tar": data for number, data in enumerate(layers)},
    }


async def bytes_of(images_: LocalImages, digest: str) -> bytes:
    extent = await asyncio.to_thread(images_.blob, digest)
    assert extent is not None
    return b"".join([piece async for piece in stream(extent)])


async def manifest_of(source: LocalImage) -> Manifest:
    return (await select(source, (), AMD64)).images[0].manifest


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    return images.synthetic(tmp_path_factory.mktemp("layout"), layers=2, files=4, size=10_000, tag="1")


async def test_a_layout_gives_images_by_name_and_blobs_by_digest(image: Image) -> None:
    found = await asyncio.to_thread(open_layout, image.layout)
    for names in (("1",), (image.manifest.digest,), ("nonsense", "1"), ("",), ()):
        manifest = await manifest_of(LocalImage(found, *names))
        assert [layer.digest for layer in manifest.layers] == [layer.blob.digest for layer in image.layers]
    digest = image.layers[1].blob.digest
    assert digests.of(await bytes_of(found, digest)) == digest
    assert await asyncio.to_thread(found.blob, digests.of(b"else")) is None


def test_a_name_that_is_not_there_is_said_with_those_that_are(image: Image) -> None:
    with pytest.raises(NotFound, match=r"no image '2'.*there is 1"):
        open_layout(image.layout).named("2")


def test_several_images_need_a_name(tmp_path: Path) -> None:
    images.synthetic(tmp_path, layers=1, files=1, size=10, tag="1")
    layout = Layout(tmp_path)
    layout._manifests = json.loads((tmp_path / "index.json").read_bytes())["manifests"]
    layout.add_image("2", [], command=[], environment={}, unpacked_size=0, files=0)
    with pytest.raises(NotFound, match="2 images, and none is named"):
        open_layout(tmp_path).named()


async def test_a_wrong_document_is_not_believed(tmp_path: Path) -> None:
    made = images.synthetic(tmp_path, layers=1, files=1, size=10)
    (tmp_path / "blobs/sha256" / made.manifest.digest[7:]).write_bytes(b"{}")
    with pytest.raises(DigestMismatch):
        await manifest_of(LocalImage(await asyncio.to_thread(open_layout, tmp_path)))


@pytest.mark.parametrize("lacking", ["oci-layout", "index.json"])
def test_a_directory_that_is_no_layout_is_not_one(tmp_path: Path, lacking: str) -> None:
    images.synthetic(tmp_path, layers=1, files=1, size=10)
    (tmp_path / lacking).unlink()
    with pytest.raises(NotFound, match="not an OCI layout"):
        open_layout(tmp_path)


async def test_an_old_archive_gives_plain_layers_by_their_diff_ids(tmp_path: Path) -> None:
    found = await asyncio.to_thread(open_archive, archive(tmp_path / "saved.tar", old_form(TARS)))
    assert found.made
    for name in ("app:1", "team/app:2"):
        manifest = await manifest_of(LocalImage(found, name))
        assert [layer.digest for layer in manifest.layers] == [digests.of(tar) for tar in TARS]
        assert [await bytes_of(found, layer.digest) for layer in manifest.layers] == TARS


async def test_a_layer_that_stands_in_the_archive_as_a_link_is_found(tmp_path: Path) -> None:
    members = old_form(TARS)
    members["shared/layer.tar"] = members.pop("1/layer.tar")
    path = archive(tmp_path / "saved.tar", members, {"1/layer.tar": "../shared/layer.tar"})
    found = await asyncio.to_thread(open_archive, path)
    assert await bytes_of(found, digests.of(TARS[1])) == TARS[1]


async def test_packed_layers_of_an_old_archive_are_known_by_their_own_digest(tmp_path: Path) -> None:
    packed = [gzip.compress(tar, mtime=0) for tar in TARS]
    found = await asyncio.to_thread(open_archive, archive(tmp_path / "saved.tar", old_form(packed)))
    manifest = await manifest_of(LocalImage(found, "app:1"))
    assert [layer.digest for layer in manifest.layers] == [digests.of(data) for data in packed]
    assert {layer.media_type.rpartition("+")[2] for layer in manifest.layers} == {"gzip"}
    assert await bytes_of(found, manifest.layers[0].digest) == packed[0]


async def test_a_new_archive_is_a_layout_in_a_tar(tmp_path: Path, image: Image) -> None:
    members = {
        str(path.relative_to(image.layout)): path.read_bytes() for path in image.layout.rglob("*") if path.is_file()
    }
    found = await asyncio.to_thread(open_archive, archive(tmp_path / "saved.tar", {**members, "manifest.json": b"[]"}))
    assert not found.made
    manifest = await manifest_of(LocalImage(found, "1"))
    for layer in manifest.layers:
        assert digests.of(await bytes_of(found, layer.digest)) == layer.digest


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ({"a": b"b"}, "no manifest.json"),
        ({"manifest.json": b"{"}, "not a valid manifest.json"),
        (old_form(TARS[:1]), "which it does not have"),
        (old_form(TARS, Layers=["0/layer.tar"]), "2 diff IDs for 1 layers"),
        (old_form(TARS, Layers=["../../etc/passwd", "1/layer.tar"]), "which it does not have"),
        ({**old_form(TARS), "config.json": b'{"rootfs": {"diff_ids": ["md5:1"]}}'}, "not a valid image config"),
    ],
)
def test_an_archive_that_makes_no_sense_is_malformed(tmp_path: Path, members: dict[str, bytes], why: str) -> None:
    with pytest.raises(Malformed, match=why):
        open_archive(archive(tmp_path / "saved.tar", members))


def test_a_compressed_archive_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = archive(tmp_path / "saved.tar", old_form(TARS))
    path.write_bytes(gzip.compress(path.read_bytes()))
    with pytest.raises(Unsupported, match="unpack it first"):
        open_archive(path)


async def test_a_file_that_is_cut_off_gives_an_error_and_no_end(tmp_path: Path) -> None:
    path = tmp_path / "blob"
    path.write_bytes(b"short")
    with pytest.raises(NotFound, match="shorter"):
        [_ async for _ in stream(FileExtent(path, 0, 6, True))]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=2000))
def test_any_bytes_are_an_archive_or_an_error_of_ours(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(data)
    with pytest.raises(DadiError):
        open_archive(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from(["config.json", "0/layer.tar"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from(["Config", "Layers", "RepoTags", "x"]), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(JSON, JSON)
def test_any_manifest_json_is_understood_or_an_error_of_ours(tmp_path: Path, saved: Any, config: Any) -> None:
    members = {**old_form(TARS), "manifest.json": json.dumps([saved]).encode()}
    if config is not None:
        members["config.json"] = json.dumps(config).encode()
    path = archive(tmp_path / "saved.tar", members)
    try:
        found = open_archive(path)
    except DadiError:
        return
    for entry in found.entries:
        assert isinstance(entry, Descriptor)
        assert isinstance(manifests.parse(found.read(entry, 1 << 20)), Manifest)
        assert hashlib.sha256(found.read(entry, 1 << 20)).hexdigest() == entry.digest[7:]
