"""OCI image layouts on disk: blobs, layers, images; written and read back.

What lives here: the layout's files, as in the OCI image specification ("Image Layout"), and the compression of
layers. What never does: what is in a layer (tests/lab/tree.py, tests/lab/images.py) or its transport (skopeo's job).

    DIR/oci-layout          {"imageLayoutVersion": "1.0.0"}
    DIR/index.json          the manifests, each with its tag in the annotation org.opencontainers.image.ref.name
    DIR/blobs/sha256/HEX    manifests, configs, layers

The same calls give the same bytes: no clock is read, gzip members carry no time and no name.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, Literal, Protocol, cast

import zstandard
from isal import igzip

Compression = Literal["gzip", "fast-gzip", "zstd", "none"]
"""gzip is zlib's level 6, about what image builders make; fast-gzip is isa-l's, for when only the format matters."""

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"
LAYER = {
    "gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "fast-gzip": "application/vnd.oci.image.layer.v1.tar+gzip",
    "zstd": "application/vnd.oci.image.layer.v1.tar+zstd",
    "none": "application/vnd.oci.image.layer.v1.tar",
}
TAG = "org.opencontainers.image.ref.name"
CREATED = "2025-01-01T00:00:00Z"
_igzip: Callable[..., Any] = igzip.IGzipFile  # has no type annotations of its own


@dataclass(frozen=True)
class Descriptor:
    media_type: str
    digest: str
    size: int

    def json(self) -> dict[str, Any]:
        return {"mediaType": self.media_type, "digest": self.digest, "size": self.size}


@dataclass(frozen=True)
class Layer:
    """A layer's blob, and the digest and size in bytes of the tar inside it."""

    blob: Descriptor
    diff_id: str
    tar_size: int


@dataclass(frozen=True)
class Image:
    """One tagged image of a layout. Sizes in bytes; `files` and `unpacked_size` count the merged tree.

    `unpacked_size` is the sum of the sizes of the merged tree's regular files, hard links once.
    """

    layout: Path
    tag: str
    manifest: Descriptor
    config: Mapping[str, Any]
    layers: tuple[Layer, ...]
    unpacked_size: int
    files: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    """What else its maker wants known: paths to look at, the line that its program prints first."""

    @property
    def compressed_size(self) -> int:
        return sum(layer.blob.size for layer in self.layers)

    @property
    def command(self) -> list[str]:
        return [*self.config["config"].get("Entrypoint", []), *self.config["config"].get("Cmd", [])]

    @property
    def environment(self) -> dict[str, str]:
        return dict(item.split("=", 1) for item in self.config["config"].get("Env", []))

    def start_in(self, directory: Path) -> list[str]:
        """Return the command line that runs this image's program in its tree at `directory`, by chroot, as root."""
        chroot = shutil.which("chroot", path="/usr/sbin:/usr/bin:/sbin:/bin") or "chroot"
        settings = [f"{name}={value}" for name, value in self.environment.items()]
        return ["/usr/bin/env", "-i", *settings, chroot, str(directory), *self.command]

    def push(self, destination: str, *, prefix: Sequence[str] = (), options: Sequence[str] = ()) -> None:
        """Copy this image to `destination` ("HOST/name:tag") by skopeo, digests unchanged.

        `prefix` goes before the command line (tests/lab/network.py, `Host.prefix`), `options` after its verb.
        """
        command = ["skopeo", "copy", "--insecure-policy", "--preserve-digests", "--dest-tls-verify=false", *options]
        command += [f"oci:{self.layout}:{self.tag}", f"docker://{destination}"]
        done = subprocess.run([*prefix, *command], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"skopeo copy to {destination} failed with status {done.returncode}:\n{done.stderr}")


class _Compressor(Protocol):
    def write(self, data: bytes, /) -> int: ...
    def close(self) -> None: ...


class _Digesting(io.RawIOBase):
    """Passes what is written on to `target` and keeps digest and length."""

    def __init__(self, target: _Compressor | BinaryIO) -> None:
        self._target = target
        self._hash = hashlib.sha256()
        self.length = 0

    @property
    def digest(self) -> str:
        return f"sha256:{self._hash.hexdigest()}"

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self._hash.update(data)
        self._target.write(data)
        self.length += len(data)
        return len(data)


class Layout:
    """A layout that is being written. Blobs appear under their digest when complete, so readers see whole ones."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._blobs = directory / "blobs" / "sha256"
        self._blobs.mkdir(parents=True, exist_ok=True)
        self._manifests: list[dict[str, Any]] = []

    def add_blob(self, data: bytes, media_type: str) -> Descriptor:
        digest = hashlib.sha256(data).hexdigest()
        (self._blobs / digest).write_bytes(data)
        return Descriptor(media_type, f"sha256:{digest}", len(data))

    @contextmanager
    def layer(self, compression: Compression = "gzip") -> Iterator[LayerWriter]:
        """Give a writer for one layer; its `result` is set when the block has ended."""
        part = self._blobs / f"part-{len(os.listdir(self._blobs))}"
        with part.open("wb") as file:
            blob = _Digesting(file)
            compressor = _compressor(compression, blob)
            tar = _Digesting(compressor)
            writer = LayerWriter(tar)
            yield writer
            writer.close()
            if compressor is not cast(object, blob):
                compressor.close()
        part.rename(self._blobs / blob.digest.removeprefix("sha256:"))
        writer.result = Layer(Descriptor(LAYER[compression], blob.digest, blob.length), tar.digest, tar.length)

    def recompress(self, layer: Layer, compression: Compression) -> Layer:
        """Add the same tar in another compression."""
        with self.layer(compression) as writer:
            path = self._blobs / layer.blob.digest.removeprefix("sha256:")
            with _reader(path, layer.blob.media_type) as source:
                while data := source.read(1 << 20):
                    writer.write_raw(data)
        return writer.result

    def add_image(
        self,
        tag: str,
        layers: Sequence[Layer],
        *,
        command: Sequence[str],
        environment: Mapping[str, str],
        unpacked_size: int,
        files: int,
        architecture: str = "amd64",
        facts: Mapping[str, Any] | None = None,
    ) -> Image:
        """Write config and manifest, and enter the image into index.json under `tag`."""
        config = {
            "created": CREATED,
            "architecture": architecture,
            "os": "linux",
            "config": {"Cmd": list(command), "Env": [f"{k}={v}" for k, v in environment.items()], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
            "history": [{"created": CREATED, "created_by": f"layer {n}"} for n in range(1, len(layers) + 1)],
        }
        config_blob = self.add_blob(_json(config), CONFIG)
        manifest = {
            "schemaVersion": 2,
            "mediaType": MANIFEST,
            "config": config_blob.json(),
            "layers": [layer.blob.json() for layer in layers],
        }
        blob = self.add_blob(_json(manifest), MANIFEST)
        entry = {**blob.json(), "annotations": {TAG: tag}, "platform": {"architecture": architecture, "os": "linux"}}
        self._manifests.append(entry)
        (self.directory / "index.json").write_bytes(_json({"schemaVersion": 2, "manifests": self._manifests}))
        (self.directory / "oci-layout").write_bytes(_json({"imageLayoutVersion": "1.0.0"}))
        return Image(self.directory, tag, blob, config, tuple(layers), unpacked_size, files, dict(facts or {}))


class LayerWriter:
    """A tar stream that is being written: by members (`tar`), or as bytes that are a tar already (`write_raw`)."""

    result: Layer

    def __init__(self, target: _Digesting) -> None:
        self._target = target
        self._tar: tarfile.TarFile | None = None

    @property
    def tar(self) -> tarfile.TarFile:
        if self._tar is None:
            self._tar = tarfile.open(
                fileobj=self._target, mode="w|", format=tarfile.PAX_FORMAT, errors="surrogateescape", bufsize=1 << 20
            )
        return self._tar

    def write_raw(self, data: bytes) -> None:
        self._target.write(data)

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()


def save(images: Iterable[Image]) -> None:
    """Write what a layout does not hold itself (tar sizes, counts, facts) beside it, for `load`."""
    for image in images:
        extra = {
            "tar_sizes": [layer.tar_size for layer in image.layers],
            "unpacked_size": image.unpacked_size,
            "files": image.files,
            "facts": dict(image.facts),
        }
        (image.layout / f"lab-{image.tag}.json").write_bytes(_json(extra))


def load(directory: Path, tag: str) -> Image:
    """Read an image that `Layout.add_image` and `save` have written."""
    manifests = json.loads((directory / "index.json").read_bytes())["manifests"]
    entry = next(m for m in manifests if m["annotations"][TAG] == tag)
    blobs = directory / "blobs" / "sha256"

    def blob(descriptor: Mapping[str, Any]) -> Any:
        return json.loads((blobs / descriptor["digest"].removeprefix("sha256:")).read_bytes())

    manifest = blob(entry)
    config = blob(manifest["config"])
    extra = json.loads((directory / f"lab-{tag}.json").read_bytes())
    layers = tuple(
        Layer(_descriptor(layer), diff_id, size)
        for layer, diff_id, size in zip(
            manifest["layers"], config["rootfs"]["diff_ids"], extra["tar_sizes"], strict=True
        )
    )
    return Image(
        directory, tag, _descriptor(entry), config, layers, extra["unpacked_size"], extra["files"], extra["facts"]
    )


def _descriptor(value: Mapping[str, Any]) -> Descriptor:
    return Descriptor(value["mediaType"], value["digest"], value["size"])


def _compressor(compression: Compression, target: _Digesting) -> _Compressor:
    raw = cast(BinaryIO, target)
    makers: dict[str, Callable[[], Any]] = {
        "gzip": lambda: gzip.GzipFile(filename="", mode="wb", compresslevel=6, fileobj=raw, mtime=0),
        "fast-gzip": lambda: _igzip(filename="", mode="wb", compresslevel=1, fileobj=raw, mtime=0),
        "zstd": lambda: zstandard.ZstdCompressor(level=3).stream_writer(raw, closefd=False),
        "none": lambda: target,
    }
    return cast(_Compressor, makers[compression]())


@contextmanager
def _reader(path: Path, media_type: str) -> Iterator[BinaryIO]:
    with path.open("rb") as file:
        if media_type.endswith("+gzip"):
            yield cast(BinaryIO, _igzip(fileobj=file, mode="rb"))
        elif media_type.endswith("+zstd"):
            yield cast(BinaryIO, zstandard.ZstdDecompressor().stream_reader(file, read_across_frames=True))
        else:
            yield file


def _json(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"
