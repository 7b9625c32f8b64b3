"""gRPC and nothing else: containerd.services.snapshots.v1.Snapshots on a unix socket, over `Snapshots`.

    our error                              status code
    NotFound                               NOT_FOUND
    AlreadyExists                          ALREADY_EXISTS          for a Prepare of a layer: go on without it
    Conflict                               FAILED_PRECONDITION
    InvalidRequest                         INVALID_ARGUMENT
    AccessDenied                           PERMISSION_DENIED
    StoreFull                              RESOURCE_EXHAUSTED
    Unavailable                            UNAVAILABLE
    MissingFeature, Unsupported            FAILED_PRECONDITION     not UNIMPLEMENTED: containerd overlooks that one
    others, and faults of ours             INTERNAL

A call whose client has gone is cancelled by grpc; what that leaves is the business of `snapshots.py`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import Any, TypeVar

import grpc
import structlog
from google.protobuf.empty_pb2 import Empty
from google.protobuf.timestamp_pb2 import Timestamp

from dadi import errors
from dadi.errors import DadiError
from dadi.grpc_socket import Serving, listen
from dadi.snapshotter.model import Info, Mount
from dadi.snapshotter.proto import mount_pb2, snapshots_pb2_grpc
from dadi.snapshotter.proto import snapshots_pb2 as pb
from dadi.snapshotter.snapshots import Snapshots

log = structlog.get_logger()
_BATCH = 100
"""Snapshots in one message of a List."""
_MAX_TEXT = 2000
"""Characters of an error's text: it travels in a header."""
_SECOND = 10**9
_CODES: list[tuple[type[DadiError], Any]] = [
    (errors.NotFound, grpc.StatusCode.NOT_FOUND),
    (errors.AlreadyExists, grpc.StatusCode.ALREADY_EXISTS),  # before Conflict, of which it is one
    (errors.Conflict, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.InvalidRequest, grpc.StatusCode.INVALID_ARGUMENT),
    (errors.AccessDenied, grpc.StatusCode.PERMISSION_DENIED),
    (errors.StoreFull, grpc.StatusCode.RESOURCE_EXHAUSTED),
    (errors.Unavailable, grpc.StatusCode.UNAVAILABLE),
    (errors.MissingFeature, grpc.StatusCode.FAILED_PRECONDITION),
    (errors.Unsupported, grpc.StatusCode.FAILED_PRECONDITION),
]

T = TypeVar("T")


class Service:
    """The ten calls, each a translation there and back."""

    def __init__(self, snapshots: Snapshots) -> None:
        self._snapshots = snapshots

    async def Prepare(self, request: Any, context: Any) -> Any:
        """Make an active snapshot; ALREADY_EXISTS for a layer: it is there, lazily."""
        call = self._snapshots.prepare(request.key, request.parent, dict(request.labels))
        return pb.PrepareSnapshotResponse(mounts=_mounts(await _told(context, call)))

    async def View(self, request: Any, context: Any) -> Any:
        """Make a snapshot that cannot be written to."""
        call = self._snapshots.view(request.key, request.parent, dict(request.labels))
        return pb.ViewSnapshotResponse(mounts=_mounts(await _told(context, call)))

    async def Mounts(self, request: Any, context: Any) -> Any:
        """Return the mounts of a snapshot again."""
        return pb.MountsResponse(mounts=_mounts(await _told(context, self._snapshots.mounts(request.key))))

    async def Commit(self, request: Any, context: Any) -> Any:
        """Make an active snapshot a committed one, under another name."""
        call = self._snapshots.commit(request.name, request.key, dict(request.labels), request.parent)
        await _told(context, call)
        return Empty()

    async def Remove(self, request: Any, context: Any) -> Any:
        """Forget a snapshot."""
        await _told(context, self._snapshots.remove(request.key))
        return Empty()

    async def Stat(self, request: Any, context: Any) -> Any:
        """Return what there is to know of a snapshot."""
        return pb.StatSnapshotResponse(info=_info(await _told(context, self._snapshots.stat(request.key))))

    async def Update(self, request: Any, context: Any) -> Any:
        """Change labels."""
        info = request.info
        call = self._snapshots.update(info.name, dict(info.labels), list(request.update_mask.paths))
        return pb.UpdateSnapshotResponse(info=_info(await _told(context, call)))

    async def List(self, request: Any, context: Any) -> AsyncIterator[Any]:
        """Send all snapshots that match the filters, in batches."""
        found = await _told(context, self._snapshots.list(list(request.filters)))
        for start in range(0, len(found), _BATCH):
            yield pb.ListSnapshotsResponse(info=[_info(info) for info in found[start : start + _BATCH]])

    async def Usage(self, request: Any, context: Any) -> Any:
        """Return what a snapshot takes on disk."""
        usage = await _told(context, self._snapshots.usage(request.key))
        return pb.UsageResponse(size=usage.size, inodes=usage.inodes)

    async def Cleanup(self, request: Any, context: Any) -> Any:
        """Delete what was removed."""
        await _told(context, self._snapshots.cleanup())
        return Empty()


async def _told(context: Any, call: Awaitable[T]) -> T:
    """Return what the call returns, or end the RPC with the status of its error."""
    try:
        return await call
    except DadiError as error:
        code = next((code for kind, code in _CODES if isinstance(error, kind)), grpc.StatusCode.INTERNAL)
        text = str(error)
    except Exception:
        log.exception("a fault of ours")
        code, text = grpc.StatusCode.INTERNAL, "a fault of ours; the log has its trace"
    await context.abort(code, text[:_MAX_TEXT])
    raise AssertionError("abort returned")


def _mounts(mounts: list[Mount]) -> list[Any]:
    return [mount_pb2.Mount(type=mount.type, source=mount.source, options=mount.options) for mount in mounts]


def _info(info: Info) -> Any:
    return pb.Info(name=info.name, parent=info.parent, kind=int(info.kind), created_at=_timestamp(info.created),
                   updated_at=_timestamp(info.updated), labels=info.labels)  # fmt: skip


def _timestamp(nanoseconds: int) -> Any:
    return Timestamp(seconds=nanoseconds // _SECOND, nanos=nanoseconds % _SECOND)


async def serve(path: Path, snapshots: Snapshots) -> Serving:
    """Serve on a unix socket that only our own user may use; its directory is made. Raises Conflict if it is taken."""
    server = grpc.aio.server()
    snapshots_pb2_grpc.add_SnapshotsServicer_to_server(Service(snapshots), server)
    return await listen(server, path)
