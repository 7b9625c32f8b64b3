"""Where things are brought: a repository of a registry, or an OCI layout on this machine's disk.

    a blob        only if it is not there yet
    a manifest    under a tag, or under its digest alone
    a referrer    a manifest with a subject, so that it is found when one asks for what refers to the subject

A layout keeps a referrer under a name of its own (index-… or signature-…), and enters it into an index under the name
that the OCI distribution specification gives to lists of referrers, sha256-<hex of the subject>. Copied with all that
is in it, to a tag of this name, that index makes referrers findable in every registry, also without the referrers API.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Protocol

import msgspec

from dadi import digest as digests
from dadi.errors import AccessDenied, DadiError, InvalidRequest, Malformed, StoreFull, Unsupported
from dadi.oci import index_document, media_types
from dadi.oci.index_document import IndexDocument
from dadi.oci.manifest import Descriptor
from dadi.oci.push import INSTEAD
from dadi.oci.reference import Reference
from dadi.oci.referrers import fallback_tag
from dadi.oci.registry import RegistryClient
from dadi.publish.local import REF_NAME, FileExtent, names_of, stream
from dadi.publish.progress import Part, Progress

Content = bytes | Path


class Target(Protocol):
    """See the head of this file. All calls are idempotent. Errors say what could not be brought there."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        ...

    async def blob(self, descriptor: Descriptor, content: Content, progress: Progress) -> bool:
        """Bring a blob there; return False if it was there already."""
        ...

    async def manifest(self, raw: bytes, media_type: str, *, tagged: bool) -> Descriptor:
        """Bring a manifest there: under the target's tag, or without one."""
        ...

    async def referrer(self, raw: bytes, subject: Descriptor, artifact_type: str, kind: str) -> Descriptor:
        """Bring the manifest of an artifact there; `kind` ("index", "signature") is for names that people read."""
        ...


class RegistryTarget:
    """A repository. `hint` says what else one can do where the registry refuses to be written."""

    def __init__(self, client: RegistryClient, reference: Reference, hint: str) -> None:
        self.client, self.reference = client, reference
        self._hint = hint

    @property
    def name(self) -> str:
        return str(self.reference)

    async def blob(self, descriptor: Descriptor, content: Content, progress: Progress) -> bool:
        part = Part(progress)
        source: bytes | Callable[[], AsyncIterator[bytes]] = b""
        if isinstance(content, bytes):
            source = content
        else:
            extent = FileExtent(content, 0, descriptor.size, True)
            source = lambda: stream(extent)  # noqa: E731
        progress.expect(size=descriptor.size)
        with self._refusals(f"blob {descriptor.digest}"):
            pushed = await self.client.push_blob(
                self.reference, descriptor.digest, descriptor.size, source, on_progress=part
            )
        part(descriptor.size)
        return pushed

    async def manifest(self, raw: bytes, media_type: str, *, tagged: bool) -> Descriptor:
        digest = digests.of(raw)
        reference = self.reference if tagged else self.reference.at(digest)
        with self._refusals(f"the manifest {digest}"):
            await self.client.push_manifest(reference, raw, media_type)
        return Descriptor(media_type, digest, len(raw))

    async def referrer(self, raw: bytes, subject: Descriptor, artifact_type: str, kind: str) -> Descriptor:
        with self._refusals(f"the {kind} of {subject.digest}"):
            return await self.client.push_referrer(self.reference, raw, media_types.OCI_MANIFEST, subject.digest)

    @contextlib.contextmanager
    def _refusals(self, what: str) -> Iterator[None]:
        try:
            yield
        except (AccessDenied, Unsupported) as error:
            hint = (error.hint or INSTEAD).replace(INSTEAD, self._hint)
            hint = hint if self._hint in hint else f"{hint}; or {self._hint}"
            message = f"{what} cannot be pushed to {self.reference.name}: {error.message}"
            raise type(error)(message, hint=hint) from None


class LayoutTarget:
    """An OCI layout, made if there is none; what is in it already stays."""

    def __init__(self, directory: Path, tag: str = "latest") -> None:
        self.directory, self._tag = directory, tag
        self._one = asyncio.Lock()

    @property
    def name(self) -> str:
        return f"oci:{self.directory}"

    async def blob(self, descriptor: Descriptor, content: Content, progress: Progress) -> bool:
        return await asyncio.to_thread(self._blob, descriptor.digest, content)

    async def manifest(self, raw: bytes, media_type: str, *, tagged: bool) -> Descriptor:
        descriptor = Descriptor(media_type, digests.of(raw), len(raw))
        await asyncio.to_thread(self._blob, descriptor.digest, raw)
        if tagged:
            named = msgspec.structs.replace(descriptor, annotations={REF_NAME: self._tag})
            async with self._one:
                await asyncio.to_thread(self._enter, named)
        return descriptor

    async def referrer(self, raw: bytes, subject: Descriptor, artifact_type: str, kind: str) -> Descriptor:
        digest = digests.of(raw)
        described = Descriptor(media_types.OCI_MANIFEST, digest, len(raw), artifact_type=artifact_type)
        name = f"{kind}-{digests.short(subject.digest)}"
        async with self._one:
            await asyncio.to_thread(self._blob, digest, raw)
            await asyncio.to_thread(
                self._enter, msgspec.structs.replace(described, annotations={REF_NAME: name})
            )
            await asyncio.to_thread(self._list, described, fallback_tag(subject.digest))
        return described

    def _list(self, referrer: Descriptor, name: str) -> None:
        """Enter a referrer into the index of that name."""
        document = index_document.EMPTY
        for entry in self._index().descriptors:
            if name in names_of(entry):
                document = self._document(entry.digest)
        raw = document.with_descriptors(
            [*(item for item in document.descriptors if item.digest != referrer.digest), referrer]
        )
        described = Descriptor(media_types.OCI_INDEX, digests.of(raw), len(raw), annotations={REF_NAME: name})
        self._blob(described.digest, raw)
        self._enter(described)

    def _enter(self, described: Descriptor) -> None:
        """Enter a manifest into index.json, in the place of what has its name."""
        names = names_of(described)
        document = self._index()
        kept = [entry for entry in document.descriptors if not names & names_of(entry)]
        _write(self.directory / "oci-layout", b'{"imageLayoutVersion":"1.0.0"}')
        _write(self.directory / "index.json", document.with_descriptors([*kept, described]))

    def _index(self) -> IndexDocument:
        path = self.directory / "index.json"
        try:
            return index_document.parse(path.read_bytes())
        except FileNotFoundError:
            return index_document.EMPTY
        except (DadiError, OSError) as error:
            raise _not_a_layout(path, error) from None

    def _document(self, digest: str) -> IndexDocument:
        """Return the index that is a blob here, verified."""
        path = self._blobs / digest.rpartition(":")[2]
        try:
            raw = path.read_bytes()
            if digests.of(raw) != digest:
                raise Malformed("not what its name says")
            return index_document.parse(raw)
        except (DadiError, OSError) as error:
            raise _not_a_layout(path, error) from None

    @property
    def _blobs(self) -> Path:
        return self.directory / "blobs" / "sha256"

    def _blob(self, digest: str, content: Content) -> bool:
        path = self._blobs / digests.parse(digest)[7:]
        if _holds(path, digest):
            return False
        try:
            self._blobs.mkdir(parents=True, exist_ok=True)
            _write(path, content)
        except OSError as error:
            raise _not_written(path, error) from None
        return True


def _holds(path: Path, digest: str) -> bool:
    """Whether a file has the bytes of its digest: a run that was broken off, or a bad disk, may have left others."""
    try:
        with path.open("rb") as file:
            return digests.from_raw(hashlib.file_digest(file, "sha256").digest()) == digest
    except OSError:
        return False  # there is none; or what cannot be read cannot be written either, and that is said


def _write(path: Path, content: Content) -> None:
    """Write a file so that it appears whole or not at all."""
    part: Path | None = None
    try:
        number, name = tempfile.mkstemp(prefix="part-", dir=path.parent)
        part = Path(name)
        with os.fdopen(number, "wb") as file:
            if isinstance(content, bytes):
                file.write(content)
            else:
                with content.open("rb") as source:
                    while piece := source.read(1 << 20):
                        file.write(piece)
        part.chmod(0o644)
        part.rename(path)
    except OSError as error:
        raise _not_written(path, error) from None
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def _not_a_layout(path: Path, error: DadiError | OSError) -> DadiError:
    why = error.message if isinstance(error, DadiError) else error.strerror
    return Malformed(f"{path}: {why}", hint="choose another directory")


def _not_written(path: Path, error: OSError) -> DadiError:
    if isinstance(error, PermissionError | NotADirectoryError | FileExistsError):
        return InvalidRequest(f"{path} cannot be written: {error.strerror}", hint="choose another directory")
    return StoreFull(f"{path} cannot be written: {error.strerror}")
