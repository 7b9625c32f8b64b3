"""Images and blobs in files, each blob looked up by its digest; and OCI layouts, the plain case of that.

    DIR/oci-layout          says that it is one
    DIR/index.json          its images, named by annotations
    DIR/blobs/sha256/HEX    manifests, configs, layers

(OCI image specification, "Image Layout".) The archives of `docker save` are in `archive.py`. Opening and looking up
block (for threads); `stream` does not. Nothing here is believed: documents are verified by their digest when they are
read, layers by whoever reads them.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import IO

import msgspec

from dadi import digest as digests
from dadi.errors import DadiError, DigestMismatch, NotFound, TooLarge
from dadi.oci import manifest as manifests
from dadi.oci import media_types
from dadi.oci.manifest import MAX_SIZE, Descriptor, Index
from dadi.publish.work import opened

REF_NAME = "org.opencontainers.image.ref.name"
_NAMES = (REF_NAME, "io.containerd.image.name")
_PIECE = 1 << 20
_FALLBACK = re.compile(r"sha256-[0-9a-f]{64}")
"""Names under which registries without the referrers API keep lists of referrers; not of images."""


class FileExtent(msgspec.Struct, frozen=True):
    """Where the bytes of a blob stand; `whole` if they are all of the file."""

    path: Path
    offset: int
    size: int
    whole: bool


Find = Callable[[str], FileExtent | None]
"""Return where a member, named relative to the top, stands; None if there is none."""


class LocalImages:
    """The images of one layout or archive, and all of its blobs."""

    def __init__(
        self, where: str, find: Find, entries: tuple[Descriptor, ...], extra: dict[str, bytes | FileExtent], made: bool
    ) -> None:
        self.where = where
        self.entries = entries
        """The images, as in index.json: with their names in the annotations."""
        self.made = made
        """Whether the manifests were made here, and so are nobody's."""
        self._find = find
        self._extra = extra

    def __repr__(self) -> str:
        return f"LocalImages({self.where}, {len(self.entries)} images)"

    def named(self, *names: str) -> Descriptor:
        """Return the image that has one of the names (or a digest); the only one if no name is given."""
        wanted = [name for name in names if name]
        images = [entry for entry in self.entries if not entry.artifact_type and not _is_fallback(entry)]
        for name in wanted:
            for entry in self.entries:
                if name == entry.digest or name in names_of(entry):
                    return entry
        if len(images) == 1 and (not wanted or not names_of(images[0])):
            return images[0]
        known = ", ".join(sorted({name for entry in images for name in names_of(entry)}) or ["images without a name"])
        what = f"no image {' or '.join(map(repr, wanted))}" if wanted else f"{len(images)} images, and none is named"
        raise NotFound(f"{self.where} has {what}", hint=f"there is {known}" if images else "it has no image at all")

    def blob(self, digest: str) -> FileExtent | None:
        """Return where a blob stands; None if it is not here. Blocks."""
        made = self._extra.get(digest)
        return made if isinstance(made, FileExtent) else self._find(f"blobs/sha256/{digests.parse(digest)[7:]}")

    def read(self, descriptor: Descriptor, limit: int) -> bytes:
        """Return a document, verified. Blocks."""
        data = self._extra.get(descriptor.digest)
        if not isinstance(data, bytes):
            extent = self.blob(descriptor.digest)
            if extent is None:
                raise NotFound(f"{self.where} has no blob {descriptor.digest}")
            data = read_at(extent, limit, f"blob {descriptor.digest} of {self.where}")
        if digests.of(data) != descriptor.digest:
            raise DigestMismatch(f"blob {descriptor.digest} of {self.where} is not what its name says")
        return data


def names_of(entry: Descriptor) -> set[str]:
    """Return the names that an entry of an index.json has."""
    return {entry.annotations[key] for key in _NAMES if entry.annotations.get(key)}


def _is_fallback(entry: Descriptor) -> bool:
    return any(_FALLBACK.fullmatch(name) for name in names_of(entry))


def open_layout(directory: Path) -> LocalImages:
    """Return the images of an OCI layout. Blocks."""

    def find(name: str) -> FileExtent | None:
        path = directory / name
        try:
            return FileExtent(path, 0, path.stat().st_size, True)
        except (FileNotFoundError, NotADirectoryError):
            return None

    try:
        return layout_in(str(directory), find)
    except OSError as error:
        raise NotFound(f"{directory} cannot be read: {error.strerror}") from None


async def stream(extent: FileExtent) -> AsyncGenerator[bytes, None]:
    """Yield the bytes of a blob; NotFound if the file is gone or cut off."""
    file = await opened(lambda: open_at(extent))
    left = extent.size
    try:
        while left:
            try:
                piece = await asyncio.to_thread(file.read, min(left, _PIECE))
            except OSError as error:
                raise _unreadable(extent, error) from None
            if not piece:
                raise NotFound(f"{extent.path} has become shorter")
            left -= len(piece)
            yield piece
    finally:
        file.close()


def open_at(extent: FileExtent) -> IO[bytes]:
    """Return the file that has a blob, at the blob's first byte. Blocks."""
    try:
        file = extent.path.open("rb", buffering=0)
        file.seek(extent.offset)
    except OSError as error:
        raise _unreadable(extent, error) from None
    return file


def _unreadable(extent: FileExtent, error: OSError) -> NotFound:
    return NotFound(f"{extent.path} cannot be read: {error.strerror or error}")


def read_at(extent: FileExtent, limit: int, what: str) -> bytes:
    """Return a blob; TooLarge, which names `what`, if it has more than `limit` bytes. Blocks."""
    if extent.size > limit:
        raise TooLarge(f"{what} has {extent.size} bytes; the limit is {limit}")
    with open_at(extent) as file:
        try:
            return os.pread(file.fileno(), extent.size, extent.offset)
        except OSError as error:
            raise _unreadable(extent, error) from None


def layout_in(where: str, find: Find) -> LocalImages:
    """Return the images of the OCI layout in which `find` looks. Blocks."""
    top = find("index.json")
    if find("oci-layout") is None or top is None:
        raise NotFound(f"{where} is not an OCI layout", hint="it has no oci-layout file, or no index.json")
    try:
        index = manifests.parse(read_at(top, MAX_SIZE, f"the index.json of {where}"), media_types.OCI_INDEX)
    except DadiError as error:
        error.message = f"{where}: {error.message}"
        raise
    assert isinstance(index, Index)
    return LocalImages(where, find, index.manifests, {}, made=False)
