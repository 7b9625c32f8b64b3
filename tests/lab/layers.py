"""Layers in memory: small tars made of members, and layer indexes made of tars by Python's tarfile.

What lives here: `tar_of` and its members, `index_of_tar`, `index_of`. What never does: code of dadi that reads tars;
these indexes are what that code is compared with, and what the EROFS writer is tested with.
"""

from __future__ import annotations

import hashlib
import io
import os
import tarfile
from collections.abc import Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from dadi.index.chunks import DEFAULT_CHUNK_SIZE, ChunkTable
from dadi.index.layer import VERSION, Entry, Extent, Kind, LayerIndex

XATTR = "SCHILY.xattr."
WHITEOUT, OPAQUE = b".wh.", b".wh..wh..opq"
_KINDS = {
    tarfile.REGTYPE: Kind.FILE,
    tarfile.AREGTYPE: Kind.FILE,
    tarfile.GNUTYPE_SPARSE: Kind.FILE,
    tarfile.DIRTYPE: Kind.DIRECTORY,
    tarfile.SYMTYPE: Kind.SYMLINK,
    tarfile.LNKTYPE: Kind.HARDLINK,
    tarfile.CHRTYPE: Kind.CHARACTER,
    tarfile.BLKTYPE: Kind.BLOCK,
    tarfile.FIFOTYPE: Kind.FIFO,
}


class Member(NamedTuple):
    info: tarfile.TarInfo
    data: bytes


def member(
    path: bytes,
    kind: bytes = tarfile.REGTYPE,
    *,
    data: bytes = b"",
    mode: int = 0o644,
    owner: tuple[int, int] = (0, 0),
    mtime: int = 1_700_000_000 * 10**9,
    target: bytes = b"",
    device: tuple[int, int] = (0, 0),
    xattrs: Mapping[str, bytes] | None = None,
) -> Member:
    """Return one tar member; `mtime` in ns since 1970."""
    info = tarfile.TarInfo(_text(path))
    info.type, info.mode, info.size = kind, mode, len(data)
    info.uid, info.gid = owner
    info.linkname = _text(target)
    info.devmajor, info.devminor = device
    info.mtime = mtime // 10**9
    info.pax_headers = {XATTR + name: _text(value) for name, value in (xattrs or {}).items()}
    if mtime % 10**9 or mtime < 0:
        info.pax_headers["mtime"] = format(Decimal(mtime).scaleb(-9), "f")
    return Member(info, data)


def file(path: bytes, data: bytes = b"", **attributes: object) -> Member:
    return member(path, data=data, **attributes)


def directory(path: bytes, mode: int = 0o755, **attributes: object) -> Member:
    return member(path, tarfile.DIRTYPE, mode=mode, **attributes)


def symlink(path: bytes, target: bytes, **attributes: object) -> Member:
    return member(path, tarfile.SYMTYPE, target=target, mode=0o777, **attributes)


def hardlink(path: bytes, target: bytes, **attributes: object) -> Member:
    return member(path, tarfile.LNKTYPE, target=target, **attributes)


def fifo(path: bytes, **attributes: object) -> Member:
    return member(path, tarfile.FIFOTYPE, **attributes)


def device(path: bytes, kind: str, major: int, minor: int, **attributes: object) -> Member:
    kinds = {"c": tarfile.CHRTYPE, "b": tarfile.BLKTYPE}
    return member(path, kinds[kind], device=(major, minor), **attributes)


def whiteout(path: bytes) -> Member:
    """The mark that removes `path` from the layers below."""
    head, name = os.path.split(path)
    return member(os.path.join(head, WHITEOUT + name))


def opaque(path: bytes) -> Member:
    """The mark that hides what the layers below have in the directory `path`."""
    return member(os.path.join(path, OPAQUE))


def tar_of(*members: Member) -> bytes:
    """Return a tar of these members."""
    buffer = io.BytesIO()
    options = {"format": tarfile.PAX_FORMAT, "encoding": "utf-8", "errors": "surrogateescape"}
    with tarfile.open(fileobj=buffer, mode="w", **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def index_of_tar(source: bytes | Path) -> LayerIndex:
    """Return the index of an uncompressed tar. Its chunk table has a size and no digests."""
    stream: io.BufferedIOBase = io.BytesIO(source) if isinstance(source, bytes) else source.open("rb")
    with stream, tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
        entries = [_entry(info) for info in tar]
        stream.seek(0)
        diff_id = "sha256:" + hashlib.file_digest(stream, "sha256").hexdigest()
        size = stream.seek(0, os.SEEK_END)
    return LayerIndex(VERSION, diff_id, size, diff_id, ChunkTable(size, DEFAULT_CHUNK_SIZE, b""), tuple(entries))


def index_of(entries: Sequence[Entry], *, name: str = "", size: int = 0) -> LayerIndex:
    """Return the index of a layer that has no tar; `name` makes its diff ID."""
    diff_id = "sha256:" + hashlib.sha256(name.encode()).hexdigest()
    return LayerIndex(VERSION, diff_id, size, diff_id, ChunkTable(size, DEFAULT_CHUNK_SIZE, b""), tuple(entries))


def _entry(info: tarfile.TarInfo) -> Entry:
    path = _normal(_bytes(info.name))
    head, name = os.path.split(path)
    if name == OPAQUE:
        return Entry(head, Kind.OPAQUE)
    if name.startswith(WHITEOUT):
        return Entry(os.path.join(head, name[len(WHITEOUT) :]), Kind.WHITEOUT)
    kind = _KINDS[info.type]
    target = b""
    if kind is Kind.SYMLINK:
        target = _bytes(info.linkname)
    elif kind is Kind.HARDLINK:
        target = _normal(_bytes(info.linkname))
    mtime = Decimal(info.pax_headers["mtime"]) if "mtime" in info.pax_headers else Decimal(info.mtime)
    xattrs = [(k.removeprefix(XATTR), v) for k, v in info.pax_headers.items() if k.startswith(XATTR)]
    return Entry(
        path=path,
        kind=kind,
        mode=info.mode & 0o7777,
        uid=info.uid,
        gid=info.gid,
        mtime=int(mtime.scaleb(9)),
        size=info.size if kind is Kind.FILE else len(target) if kind is Kind.SYMLINK else 0,
        offset=info.offset_data if kind is Kind.FILE and not info.issparse() else 0,
        target=target,
        major=info.devmajor if kind in (Kind.CHARACTER, Kind.BLOCK) else 0,
        minor=info.devminor if kind in (Kind.CHARACTER, Kind.BLOCK) else 0,
        xattrs=tuple((_bytes(name), _bytes(value)) for name, value in xattrs),
        extents=_extents(info) if info.issparse() else None,
    )


def _extents(info: tarfile.TarInfo) -> tuple[Extent, ...]:
    found, at = [], info.offset_data
    for offset, length in info.sparse or ():
        found.append(Extent(offset, at, length))
        at += length
    return tuple(found)


def _normal(path: bytes) -> bytes:
    return b"/".join(part for part in path.split(b"/") if part not in (b"", b"."))


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogateescape")
