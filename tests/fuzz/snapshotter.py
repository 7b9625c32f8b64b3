"""The snapshotter's ten calls, fed with messages: the real service over an empty database in memory.

What lives here: one function of bytes. What never does: gRPC, directories, images.

    input      request NUL NUL NUL NUL request …      one call after the other, on the same snapshots
    request    a byte that chooses the call, the message
"""

from __future__ import annotations

import asyncio
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import grpc
from google.protobuf.message import DecodeError

from dadi.errors import Unsupported
from dadi.fallbacks import Fallbacks
from dadi.snapshotter.database_thread import DatabaseThread
from dadi.snapshotter.db import Database
from dadi.snapshotter.images import LazyImage
from dadi.snapshotter.lazy_mounts import LazyMounts
from dadi.snapshotter.model import REF, Usage
from dadi.snapshotter.proto import snapshots_pb2 as pb
from dadi.snapshotter.service import Service
from dadi.snapshotter.snapshots import Snapshots
from tests.fakes.lazy_images import labels_for, sha

_BETWEEN = b"\0" * 4
_REQUESTS: list[tuple[str, Any]] = [
    ("Prepare", pb.PrepareSnapshotRequest), ("View", pb.ViewSnapshotRequest), ("Mounts", pb.MountsRequest),
    ("Commit", pb.CommitSnapshotRequest), ("Remove", pb.RemoveSnapshotRequest), ("Stat", pb.StatSnapshotRequest),
    ("Update", pb.UpdateSnapshotRequest), ("List", pb.ListSnapshotsRequest), ("Usage", pb.UsageRequest),
    ("Cleanup", pb.CleanupRequest),
]  # fmt: skip
_CHAIN = sha("the layer that is lazy")


class _Memory(DatabaseThread):
    async def open(self, root: Path, *, replace_damaged: bool = False) -> None:
        opening = partial(Database, Path(":memory:"))
        self._database = await asyncio.get_running_loop().run_in_executor(self._thread, opening)


class _NoDirectories:
    """Stands in for `Directories`, and touches no disk."""

    def make(self, number: int, *, work: bool) -> None: ...

    def delete(self, number: int) -> None: ...

    def take_owner(self, number: int, lower: str) -> None: ...

    def present(self) -> set[int]:
        return set()

    def usage(self, number: int) -> Usage:
        return Usage(0, 0)

    def upper(self, number: int) -> str:
        return f"/snapshots/{number}/fs"

    def work(self, number: int) -> str:
        return f"/snapshots/{number}/work"


class _OneImage:
    """Stands in for `LazyImages`: every reference that is one leads to an image of one layer."""

    async def resolve(self, reference: str, manifest_digest: str | None, layer_digests: list[str]) -> LazyImage:
        if "/" not in reference:
            raise Unsupported("not lazy")
        return LazyImage(sha("image"), [_CHAIN])

    async def mount(self, key: str, layers: int, *origin: object) -> str:
        return f"/images/{layers}"

    async def release(self, key: str, layers: int) -> None: ...

    async def usage(self, key: str, layer: int) -> int:
        return 0

    async def keep_only(self, keys: set[str]) -> None: ...


class _Aborted(Exception):
    pass


class _Context:
    async def abort(self, code: Any, text: str) -> NoReturn:
        assert text
        assert "a fault of ours" not in text
        assert code not in (grpc.StatusCode.OK, grpc.StatusCode.UNKNOWN, grpc.StatusCode.UNIMPLEMENTED)
        raise _Aborted


def feed(data: bytes) -> None:
    """Make the calls that the input is. Raises AssertionError for a fault of ours."""
    asyncio.run(_feed([piece for piece in data.split(_BETWEEN)[:20] if piece]))


async def _feed(pieces: list[bytes]) -> None:
    kept, fallbacks = _Memory(), Fallbacks()
    await kept.open(Path())
    try:
        snapshots = Snapshots(Path("/snapshots"), LazyMounts(_OneImage(), kept, fallbacks, keep_idle=0.0), kept)
        snapshots._directories = _NoDirectories()  # type: ignore[assignment]
        for piece in pieces:
            await _call(Service(snapshots), piece)
        assert not any("fault of ours" in row["why"] for row in fallbacks.statistics())
    finally:
        await kept.close()


async def _call(service: Service, piece: bytes) -> None:
    name, kind = _REQUESTS[piece[0] % len(_REQUESTS)]
    try:
        request = kind.FromString(piece[1:])
    except DecodeError:  # gRPC answers those itself
        return
    answer = getattr(service, name)(request, _Context())
    try:
        if name == "List":
            async for part in answer:
                part.SerializeToString()
        else:
            (await answer).SerializeToString()
    except _Aborted:
        pass


def _seed(*requests: Any) -> bytes:
    kinds = [kind for _, kind in _REQUESTS]
    return _BETWEEN.join(bytes([kinds.index(type(each))]) + each.SerializeToString() for each in requests)


SEEDS = (
    _seed(
        pb.PrepareSnapshotRequest(key="ns/1/a", labels={"x": "y"}),
        pb.CommitSnapshotRequest(name="ns/2/b", key="ns/1/a"),
        pb.UpdateSnapshotRequest(info=pb.Info(name="ns/2/b", labels={"z": "1"}), update_mask={"paths": ["labels.z"]}),
        pb.ListSnapshotsRequest(filters=['labels.z==1,kind==committed', "name~=b"]),
        pb.ViewSnapshotRequest(key="ns/3/c", parent="ns/2/b"),
        pb.MountsRequest(key="ns/3/c"),
        pb.RemoveSnapshotRequest(key="ns/2/b"),
        pb.UsageRequest(key="ns/3/c"),
        pb.CleanupRequest(),
    ),
    _seed(
        pb.PrepareSnapshotRequest(key=f"ns/1/extract-1 {_CHAIN}", labels=labels_for(_CHAIN, "registry.example/a:1")),
        pb.PrepareSnapshotRequest(key="ns/2/a", parent=f"lazy/1/{_CHAIN}"),
        pb.StatSnapshotRequest(key=f"lazy/1/{_CHAIN}"),
        pb.ListSnapshotsRequest(filters=[f'labels."{REF}"=={_CHAIN}']),
    ),
)  # fmt: skip
