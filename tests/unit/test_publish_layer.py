"""A layer's work on a disk that refuses: an error of ours that says what to do, whatever step it hits."""

from __future__ import annotations

import asyncio
import errno
import gzip
import os
import tempfile
import threading
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import pytest

from dadi import digest as digests
from dadi.errors import DadiError, NotFound, StoreFull
from dadi.index import seek_build
from dadi.index.chunks import DEFAULT_CHUNK_SIZE, ChunkTable
from dadi.index.layer import VERSION, LayerIndex
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor
from dadi.publish import layer as layers
from dadi.publish.local import FileExtent, read_at, stream
from dadi.publish.packed import PackedLayer, Packer
from dadi.publish.progress import Progress
from dadi.publish.work import opened
from tests.lab.layers import file, tar_of

FULL = Path("/dev/full")
TAR = tar_of(file(b"f", os.urandom(300_000)))
BLOB = gzip.compress(TAR, 1, mtime=0)
WANTED = Descriptor(media_types.OCI_LAYER_GZIP, digests.of(BLOB), len(BLOB))


class FromMemory:
    extent: FileExtent | None = None

    def open(self) -> AsyncGenerator[bytes, None]:
        return self._pieces()

    async def _pieces(self) -> AsyncGenerator[bytes, None]:
        for at in range(0, len(BLOB), 100_000):
            yield BLOB[at : at + 100_000]


class FromFile:
    def __init__(self, path: Path) -> None:
        self.extent: FileExtent | None = FileExtent(path, 0, len(BLOB), True)
        self._extent = self.extent

    def open(self) -> AsyncGenerator[bytes, None]:
        return stream(self._extent)


async def indexed(workspace: Path, origin: Any) -> layers.Made:
    return await layers.indexed(WANTED, digests.of(TAR), [origin], workspace, Progress())


async def packed(workspace: Path) -> tuple[layers.Made, Path]:
    with Packer(1, 1) as packer:
        return await layers.packed(WANTED, digests.of(TAR), [FromMemory()], workspace, Progress(), packer)


def full(*_: object, **__: object) -> Any:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def on_a_full_disk(workspace: Path) -> None:
    """Let the layer's file be on a disk without a free byte."""
    (workspace / WANTED.digest[7:]).symlink_to(FULL)


async def test_a_layer_that_fits_is_indexed_and_leaves_no_file(tmp_path: Path) -> None:
    made = await indexed(tmp_path, FromMemory())
    assert (made.index.diff_id, made.files) == (digests.of(TAR), 1)
    assert list(tmp_path.iterdir()) == []


async def test_a_full_disk_under_the_kept_layer_is_said(tmp_path: Path) -> None:
    on_a_full_disk(tmp_path)
    with pytest.raises(StoreFull, match=r"No space left.*set TMPDIR"):
        await indexed(tmp_path, FromMemory())


@pytest.mark.parametrize("size", [0, 1000, 3 << 20])
async def test_a_full_disk_is_said_whenever_it_is_noticed(size: int) -> None:
    """At once, when the last buffered bytes are written, and not a second time when the file is closed."""

    async def pieces() -> AsyncGenerator[bytes, None]:
        yield bytes(size)

    kept = b""
    try:
        async for piece in layers._kept(pieces(), FULL):
            kept += piece
    except StoreFull as error:
        assert "set TMPDIR" in str(error)  # noqa: PT017 (nothing else may be raised)
        assert size
    else:
        assert kept == b""


async def test_a_workspace_that_is_gone_is_said(tmp_path: Path) -> None:
    with pytest.raises(StoreFull, match="set TMPDIR"):
        await indexed(tmp_path / "gone", FromMemory())
    with pytest.raises(StoreFull, match="set TMPDIR"):
        await packed(tmp_path / "gone")


@pytest.mark.parametrize("local", [False, True])
async def test_no_room_for_finding_seek_points_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: bool
) -> None:
    (tmp_path / "blob").write_bytes(BLOB)
    monkeypatch.setattr(tempfile, "TemporaryDirectory", full)
    with pytest.raises(StoreFull, match=r"seek points.*set TMPDIR"):
        await indexed(tmp_path, FromFile(tmp_path / "blob") if local else FromMemory())


async def test_a_local_layer_that_vanishes_is_not_called_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "blob"
    path.write_bytes(BLOB)
    build = seek_build.build

    def vanished(path: Path, *arguments: Any, **options: Any) -> Any:
        path.unlink()
        return build(path, *arguments, **options)

    monkeypatch.setattr(seek_build, "build", vanished)
    with pytest.raises(NotFound, match="No such file"):
        await indexed(tmp_path, FromFile(path))


async def test_a_local_blob_that_cannot_be_read_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    extent = FileExtent(tmp_path, 0, 10, True)  # a directory opens, and does not read
    monkeypatch.setattr("dadi.publish.local.open_at", lambda _: Unreadable())
    with pytest.raises(NotFound, match="cannot be read"):
        await anext(stream(extent))
    monkeypatch.setattr(os, "pread", full)
    with pytest.raises(NotFound, match="cannot be read"):
        read_at(extent, 100, "it")


class Unreadable:
    def read(self, size: int) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def fileno(self) -> int:
        return 0

    def close(self) -> None: ...

    def __enter__(self) -> Unreadable:
        return self

    def __exit__(self, *_: object) -> None: ...


async def test_a_full_disk_under_a_packed_layer_is_said(tmp_path: Path) -> None:
    on_a_full_disk(tmp_path)
    with pytest.raises(StoreFull, match=r"No space left.*set TMPDIR"):
        await packed(tmp_path)


def test_what_is_noticed_when_a_packed_layer_is_closed_is_said_once() -> None:
    with Packer(1, 1) as packer:
        layer = PackedLayer(packer, FULL)
        layer.write(bytes(DEFAULT_CHUNK_SIZE))  # its frame is small, and stays in the buffer
        index = LayerIndex(VERSION, WANTED.digest, 1, WANTED.digest, ChunkTable(1, 4096, bytes(32)), ())
        with pytest.raises(DadiError, match="set TMPDIR"):
            layer.finish(index)
        layer.close()


class Held:
    def __init__(self, closed: threading.Event) -> None:
        self.close = closed.set


async def test_what_is_opened_for_somebody_who_is_gone_is_closed() -> None:
    begun, go, closed = threading.Event(), threading.Event(), threading.Event()

    def slowly() -> Held:
        begun.set()
        go.wait(10)
        return Held(closed)

    opening = asyncio.create_task(opened(slowly))
    assert await asyncio.to_thread(begun.wait, 10)
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert not closed.is_set()
    go.set()
    assert await asyncio.to_thread(closed.wait, 10)
