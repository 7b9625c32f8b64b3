"""What a conversion says about itself: sizes before and after, and how many chunks are there more than once."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from dadi.digest import SIZE
from dadi.index.chunks import ChunkTable


class LayerReport(msgspec.Struct, frozen=True):
    """One layer, before and after; sizes in bytes. `pushed` is False if the target had it already.

    `repeated_chunks` are those that stand earlier in the image too (or earlier in the same layer).
    """

    digest: str
    new_digest: str
    diff_id: str
    before_bytes: int
    after_bytes: int
    unpacked_bytes: int
    files: int
    chunks: int
    repeated_chunks: int
    index_bytes: int
    seek_bytes: int
    pushed: bool
    seconds: float


class PlatformReport(msgspec.Struct, frozen=True):
    """One platform: its manifest before and after, and the artifact with its index."""

    platform: str
    manifest_digest: str
    new_manifest_digest: str
    artifact_digest: str
    key_id: str
    layers: tuple[str, ...]
    """The new digests of its layers."""


class Sums(msgspec.Struct, frozen=True):
    """The distinct layers, and sums over them.

    `known_chunks` of `chunks` were in the image that the target had under its tag before; None: it had none there, or
    none with an index.
    """

    layers: tuple[LayerReport, ...]
    before_bytes: int
    after_bytes: int
    unpacked_bytes: int
    chunks: int
    repeated_chunks: int
    known_chunks: int | None
    index_bytes: int
    seek_bytes: int


class ConvertReport(Sums, frozen=True, kw_only=True):
    """What was done. `digest`: what the target's tag leads to; `left_out`: platforms that were not copied."""

    source: str
    target: str
    digest: str
    level: int
    platforms: tuple[PlatformReport, ...]
    left_out: tuple[str, ...] = ()


def chunk_digests(table: ChunkTable) -> list[bytes]:
    """Return the digest of each chunk."""
    return [table.digests[at : at + SIZE] for at in range(0, len(table.digests), SIZE)]


def counted(layers: Iterable[tuple[LayerReport, ChunkTable]], before: set[bytes] | None) -> Sums:
    """Return the layers' reports with their repeated chunks, and the sums."""
    seen: set[bytes] = set()
    rows: list[LayerReport] = []
    known = 0
    for layer, table in layers:
        chunks = chunk_digests(table)
        new = set(chunks) - seen
        seen |= new
        known += sum(chunk in (before or ()) for chunk in chunks)
        rows.append(msgspec.structs.replace(layer, repeated_chunks=len(chunks) - len(new)))
    return Sums(
        layers=tuple(rows),
        before_bytes=sum(row.before_bytes for row in rows),
        after_bytes=sum(row.after_bytes for row in rows),
        unpacked_bytes=sum(row.unpacked_bytes for row in rows),
        chunks=sum(row.chunks for row in rows),
        repeated_chunks=sum(row.repeated_chunks for row in rows),
        known_chunks=None if before is None else known,
        index_bytes=sum(row.index_bytes for row in rows),
        seek_bytes=sum(row.seek_bytes for row in rows),
    )
