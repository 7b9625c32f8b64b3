"""The archives that `docker save` writes: an uncompressed tar, in one of two forms.

    new form    an OCI layout (since Docker 25)
    old form    manifest.json: [{"Config": NAME, "RepoTags": [NAME, ...], "Layers": [NAME, ...]}], the names being those
                of members. A layer is a plain tar as a rule, and its digest is then the diff ID that the config says; a
                layer that is packed (some tools do) is hashed to learn its digest. Such an image has no manifest of
                its own: one is made for it, which is good for converting, not for indexing

Blocks: for threads. (containers-transports(5), "docker-archive".)
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from pathlib import Path
from typing import IO

import msgspec

from dadi import digest as digests
from dadi.errors import InvalidRequest, Malformed, NotFound, TooLarge, Unsupported
from dadi.oci import media_types
from dadi.oci.index_document import encode_descriptor
from dadi.oci.manifest import MAX_SIZE, Descriptor
from dadi.publish.local import REF_NAME, FileExtent, LocalImages, layout_in, open_at, read_at

_MAX_MEMBERS = 100_000
_PACKED = {b"\x1f\x8b": media_types.OCI_LAYER_GZIP, b"\x28\xb5\x2f\xfd": media_types.OCI_LAYER_ZSTD}
_PIECE = 1 << 20


class _Saved(msgspec.Struct, rename="pascal"):
    config: str
    layers: list[str]
    repo_tags: list[str] | None = None


class _Rootfs(msgspec.Struct):
    diff_ids: list[str] | None = None


class _Config(msgspec.Struct):
    rootfs: _Rootfs | None = None


def open_archive(path: Path) -> LocalImages:
    """Return the images of a docker archive, of either form. Blocks."""
    try:
        with path.open("rb") as file:
            members = _members(path, file)
            if "index.json" in members and "oci-layout" in members:
                return layout_in(str(path), members.get)
            return _old_archive(str(path), members)
    except OSError as error:
        raise NotFound(f"{path} cannot be read: {error.strerror}") from None


def _members(path: Path, file: IO[bytes]) -> dict[str, FileExtent]:
    if file.read(4).startswith(tuple(_PACKED)):
        raise Unsupported(f"{path} is compressed", hint="unpack it first: blobs are read from its middle")
    file.seek(0)
    found: dict[str, FileExtent] = {}
    links: dict[str, str] = {}
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for number, member in enumerate(tar):
                if number >= _MAX_MEMBERS:
                    raise TooLarge(f"{path} has more than {_MAX_MEMBERS} members")
                name = os.path.normpath(member.name)
                if member.isreg() and not member.issparse():
                    found[name] = FileExtent(path, member.offset_data, member.size, False)
                elif member.issym():  # a layer that another image of the archive has too
                    links[name] = os.path.normpath(os.path.join(os.path.dirname(name), member.linkname))
                elif member.islnk():
                    links[name] = os.path.normpath(member.linkname)
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise Malformed(f"{path} is not a docker archive: {error}") from None
    for name, target in links.items():
        if target in found:
            found[name] = found[target]
    return found


def _old_archive(where: str, members: dict[str, FileExtent]) -> LocalImages:
    try:
        listed = members["manifest.json"]
        saved = msgspec.json.decode(read_at(listed, MAX_SIZE, f"the manifest.json of {where}"), type=list[_Saved])
    except KeyError:
        raise Malformed(f"{where} is not a docker archive: it has no manifest.json and no index.json") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"{where}: not a valid manifest.json: {error}") from None
    entries: list[Descriptor] = []
    extra: dict[str, bytes | FileExtent] = {}
    for image in saved:
        manifest = _manifest_for(where, image, members, extra)
        digest = digests.of(manifest)
        extra[digest] = manifest
        bare = Descriptor(media_types.OCI_MANIFEST, digest, len(manifest))
        names = image.repo_tags or [""]
        entries += [msgspec.structs.replace(bare, annotations={REF_NAME: name} if name else {}) for name in names]
    return LocalImages(where, lambda name: None, tuple(entries), extra, made=True)


def _manifest_for(where: str, image: _Saved, members: dict[str, FileExtent],
                  extra: dict[str, bytes | FileExtent]) -> bytes:  # fmt: skip
    """Return a manifest for an image of the old form; enter config and layers by their digests."""

    def member(name: str) -> FileExtent:
        try:
            return members[os.path.normpath(name)]
        except KeyError:
            raise Malformed(f"{where}: its manifest.json names {name[:100]!r}, which it does not have") from None

    config = read_at(member(image.config), MAX_SIZE, f"the config of {where}")
    described = Descriptor(media_types.OCI_CONFIG, digests.of(config), len(config))
    extra[described.digest] = config
    diff_ids = _diff_ids(config)
    if len(diff_ids) != len(image.layers):
        raise Malformed(f"{where}: a config of {len(diff_ids)} diff IDs for {len(image.layers)} layers")
    layers = []
    for name, diff_id in zip(image.layers, diff_ids, strict=True):
        extent = member(name)
        layer = _layer(extent, diff_id)
        extra[layer.digest] = extent
        layers.append(msgspec.Raw(encode_descriptor(layer)))
    return msgspec.json.encode({
        "schemaVersion": 2, "mediaType": media_types.OCI_MANIFEST,
        "config": msgspec.Raw(encode_descriptor(described)), "layers": layers,
    })  # fmt: skip


def _diff_ids(config: bytes) -> list[str]:
    try:
        rootfs = msgspec.json.decode(config, type=_Config).rootfs or _Rootfs()
        return [digests.parse(diff_id) for diff_id in rootfs.diff_ids or ()]
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, InvalidRequest) as error:
        raise Malformed(f"not a valid image config: {error}") from None


def _layer(extent: FileExtent, diff_id: str) -> Descriptor:
    with open_at(extent) as file:
        head = file.read(min(4, extent.size))
        for magic, media_type in _PACKED.items():
            if head.startswith(magic):
                return Descriptor(media_type, _hash(file, extent), extent.size)
    return Descriptor(media_types.OCI_LAYER, diff_id, extent.size)


def _hash(file: IO[bytes], extent: FileExtent) -> str:
    found = hashlib.sha256()
    file.seek(extent.offset)
    left = extent.size
    while left and (piece := file.read(min(left, _PIECE))):
        found.update(piece)
        left -= len(piece)
    return digests.from_raw(found.digest())
