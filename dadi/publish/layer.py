"""One layer's work: its bytes are read once, verified, and become its index and its seek table.

    as it is    pieces ──► build ──► layer index            what is read from afar is kept in a temporary file
                      └──► file ───► seek points            on the way; a local file is read where it is
    packed      pieces ──► build ──► layer index of what it was
                             └─────► zstd frames ──► file, seek points, and the index of what it is now

Several origins are tried in turn: bytes that are not what their digest says are thrown away, and the next one is asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable
from pathlib import Path
from typing import IO, Protocol, TypeVar

import msgspec

from dadi.errors import DigestMismatch, NotFound, StoreFull
from dadi.index import artifact, build, layer, seek, seek_build
from dadi.index.build import LayerSource, Limits
from dadi.index.layer import Kind, LayerIndex
from dadi.index.seek import SeekTable
from dadi.oci.manifest import Descriptor
from dadi.publish.images import Origin
from dadi.publish.packed import PackedLayer, Packer
from dadi.publish.progress import Part, Progress
from dadi.publish.work import opened, temporary

T = TypeVar("T", covariant=True)

_PIECE = 1 << 20
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class Made(msgspec.Struct, frozen=True):
    """The index and the seek table of a layer, as objects and as the blobs that go into the registry."""

    index: LayerIndex
    table: SeekTable
    index_blob: bytes
    seek_blob: bytes
    seconds: float = 0.0

    @property
    def files(self) -> int:
        """How many regular files it has."""
        return sum(entry.kind is Kind.FILE for entry in self.index.entries)


class Nothing:
    """A sink for bytes that only had to be looked at."""

    def write(self, data: bytes, /) -> None:
        """Forget them."""


async def indexed(
    wanted: Descriptor, diff_id: str, origins: list[Origin], workspace: Path, progress: Progress, *,
    spacing: int | None = None, limits: Limits | None = None,
) -> Made:  # fmt: skip
    """Return what the layer `wanted` is made of. Raises as `build.build` does; the last origin's word counts."""
    begin = time.monotonic()

    async def once(origin: Origin, part: Part) -> tuple[LayerIndex, Path, bool]:
        source = LayerSource(wanted.digest, wanted.size, wanted.media_type, diff_id)
        extent = origin.extent
        if extent is not None and extent.whole:
            async with contextlib.aclosing(origin.open()) as pieces:
                return await build.build(pieces, source, Nothing(), limits=limits, on_progress=part), extent.path, False
        path = workspace / wanted.digest[7:]
        async with contextlib.aclosing(origin.open()) as pieces, contextlib.aclosing(_kept(pieces, path)) as kept:
            return await build.build(kept, source, Nothing(), limits=limits, on_progress=part), path, True

    index, path, ours = await _first(wanted, origins, progress, once)
    try:
        made = await asyncio.to_thread(_seekable, path, ours, index, spacing)
    finally:
        if ours:
            with contextlib.suppress(OSError):  # the workspace goes away as a whole
                await asyncio.to_thread(path.unlink, missing_ok=True)
    return msgspec.structs.replace(made, seconds=time.monotonic() - begin)


async def packed(
    wanted: Descriptor, diff_id: str, origins: list[Origin], workspace: Path, progress: Progress, packer: Packer, *,
    limits: Limits | None = None,
) -> tuple[Made, Path]:  # fmt: skip
    """Return the same of the layer packed anew, and the file with its bytes, which is the caller's to remove."""
    begin = time.monotonic()

    async def once(origin: Origin, part: Part) -> tuple[Made, Path]:
        source = LayerSource(wanted.digest, wanted.size, wanted.media_type, diff_id)
        sink = await opened(lambda: PackedLayer(packer, workspace / wanted.digest[7:]))
        try:
            async with contextlib.aclosing(origin.open()) as pieces:
                index = await build.build(pieces, source, sink, limits=limits, on_progress=part)
            return await asyncio.to_thread(lambda: _encoded(*sink.finish(index))), sink.path
        finally:
            sink.close()  # here, not in a thread: whoever is cancelled twice would leave it open

    made, path = await _first(wanted, origins, progress, once)
    return msgspec.structs.replace(made, seconds=time.monotonic() - begin), path


class _Attempt(Protocol[T]):
    def __call__(self, origin: Origin, part: Part, /) -> Awaitable[T]: ...


async def _first(wanted: Descriptor, origins: list[Origin], progress: Progress, attempt: _Attempt[T]) -> T:
    """Return what the first origin gives whose bytes are what they should be."""
    part = Part(progress)
    for number, origin in enumerate(origins, 1):
        try:
            return await attempt(origin, part)
        except DigestMismatch as error:
            if number == len(origins):
                raise
            progress.notice(f"{error.message}; trying again from another place")
            part.again()
    raise NotFound(f"layer {wanted.digest} is not there")


async def _kept(pieces: AsyncIterator[bytes], path: Path) -> AsyncGenerator[bytes, None]:
    """Yield the pieces, joined to larger ones, and write them to a file on the way."""
    with _kept_in(path):
        file = await opened(lambda: path.open("wb"))
    held: list[bytes] = []
    size = 0
    try:
        async for piece in pieces:
            held.append(piece)
            size += len(piece)
            if size >= _PIECE:
                data, held, size = b"".join(held), [], 0
                with _kept_in(path):
                    await asyncio.to_thread(file.write, data)
                yield data
        data = b"".join(held)
        with _kept_in(path):
            await asyncio.to_thread(_end, file, data)
        yield data
    finally:
        # Here, not in a thread: whoever is cancelled twice would leave it open.
        with contextlib.suppress(OSError):  # it has been told, or nobody needs the file any more
            file.close()


def _end(file: IO[bytes], data: bytes) -> None:
    file.write(data)
    file.close()  # what is buffered is written now


def _kept_in(path: Path) -> contextlib.AbstractContextManager[None]:
    return temporary(f"no room for a layer in {path}")


def _seekable(path: Path, ours: bool, index: LayerIndex, spacing: int | None) -> Made:
    """Return the layer in a file, temporary (`ours`) or somebody's, with its seek points."""
    options = {} if spacing is None else {"spacing": spacing}
    try:
        table = seek_build.build(path, index, **options)
    except OSError as error:
        what = f"the seek points of layer {index.layer_digest} cannot be found: {path}: {error.strerror or error}"
        if ours or error.errno in _FULL:
            raise StoreFull(what, hint="set TMPDIR") from None
        raise NotFound(what) from None
    return _encoded(index, table)


def _encoded(index: LayerIndex, table: SeekTable) -> Made:
    return Made(index, table, artifact.index_blob(layer.encode(index)), seek.encode(table))
