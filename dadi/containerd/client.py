"""containerd's gRPC API on its socket, as much of it as a pull needs. gRPC and nothing else; no decisions.

    status code                          our error
    NOT_FOUND                            NotFound
    ALREADY_EXISTS                       AlreadyExists
    FAILED_PRECONDITION                  Conflict
    INVALID_ARGUMENT, OUT_OF_RANGE       InvalidRequest
    PERMISSION_DENIED                    AccessDenied
    RESOURCE_EXHAUSTED                   StoreFull
    UNAVAILABLE, DEADLINE_EXCEEDED       Unavailable
    UNIMPLEMENTED                        Unsupported
    others                               DadiError

Each call carries containerd-namespace and, under a lease, containerd-lease. Each has an end: a call that should be
quick after `QUICK` seconds, one that may have to fetch or unpack after `LONG`; streams may be silent for `QUICK`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing, asynccontextmanager
from typing import Any, NamedTuple, TypeVar

import grpc
from google.protobuf.field_mask_pb2 import FieldMask

from dadi import errors
from dadi.containerd.proto import content_pb2 as content
from dadi.containerd.proto import (
    content_pb2_grpc,
    descriptor_pb2,
    diff_pb2,
    diff_pb2_grpc,
    images_pb2,
    images_pb2_grpc,
    introspection_pb2,
    introspection_pb2_grpc,
    leases_pb2,
    leases_pb2_grpc,
)
from dadi.errors import DadiError, NotFound, TooLarge
from dadi.oci.manifest import Descriptor
from dadi.snapshotter.proto import snapshots_pb2 as snapshots
from dadi.snapshotter.proto import snapshots_pb2_grpc

QUICK, LONG = 60.0, 3600.0
"""Seconds. LONG: at first sight of an image, a superpeer reads all of it before a Prepare is answered."""
_MESSAGE = 1 << 20
"""Bytes of content in one message; containerd takes 16 MiB."""
_OPTIONS = [("grpc.max_receive_message_length", 16 << 20), ("grpc.enable_http_proxy", 0)]
_CODES: dict[Any, type[DadiError]] = {
    grpc.StatusCode.NOT_FOUND: errors.NotFound,
    grpc.StatusCode.ALREADY_EXISTS: errors.AlreadyExists,
    grpc.StatusCode.FAILED_PRECONDITION: errors.Conflict,
    grpc.StatusCode.INVALID_ARGUMENT: errors.InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: errors.InvalidRequest,
    grpc.StatusCode.PERMISSION_DENIED: errors.AccessDenied,
    grpc.StatusCode.RESOURCE_EXHAUSTED: errors.StoreFull,
    grpc.StatusCode.UNAVAILABLE: errors.Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: errors.Unavailable,
    grpc.StatusCode.UNIMPLEMENTED: errors.Unsupported,
}

T = TypeVar("T")
_BUSY = "is it very busy, or does it hang? its log (journalctl -u containerd) may say"
_DIALS = 10.0
"""Seconds in which containerd dials a plugin's socket anew that was not there, or was gone, when it last looked: until
then it answers out of its memory."""


class Info(NamedTuple):
    """What containerd's content store says of a blob."""

    digest: str
    size: int
    labels: dict[str, str]


class Plugin(NamedTuple):
    """A plugin that containerd has loaded, or (`error`) tried to load."""

    type: str
    id: str
    exports: dict[str, str]
    error: str


class Containerd:
    """One namespace of the containerd behind a socket. Made by `connect`. All methods raise DadiError only."""

    def __init__(self, channel: Any, address: str, namespace: str, lease: str = "") -> None:
        self.address = address
        self.namespace = namespace
        self._channel = channel
        self._metadata = [("containerd-namespace", namespace)] + [("containerd-lease", lease)] * bool(lease)
        self._leases = leases_pb2_grpc.LeasesStub(channel)
        self._content = content_pb2_grpc.ContentStub(channel)
        self._images = images_pb2_grpc.ImagesStub(channel)
        self._snapshots = snapshots_pb2_grpc.SnapshotsStub(channel)
        self._diff = diff_pb2_grpc.DiffStub(channel)
        self._introspection = introspection_pb2_grpc.IntrospectionStub(channel)

    def __repr__(self) -> str:
        return f"Containerd({self.address}, {self.namespace})"

    # ---- leases

    def under(self, lease: str) -> Containerd:
        """Return the same, with everything under a lease."""
        return Containerd(self._channel, self.address, self.namespace, lease)

    async def create_lease(self, lease: str, labels: dict[str, str]) -> None:
        """Make a lease; raise AlreadyExists."""
        await self._call("making a lease", self._leases.Create, leases_pb2.CreateRequest(id=lease, labels=labels))

    async def delete_lease(self, lease: str, *, collect: bool) -> None:
        """Delete a lease; with `collect` wait until containerd has collected what is garbage now. Raises NotFound."""
        request = leases_pb2.DeleteRequest(id=lease, sync=collect)
        await self._call("deleting a lease", self._leases.Delete, request)

    async def hold_snapshot(self, lease: str, snapshotter: str, name: str) -> None:
        """Keep a snapshot, whether it is there or not, for as long as there is the lease."""
        resource = leases_pb2.Resource(id=name, type=f"snapshots/{snapshotter}")
        request = leases_pb2.AddResourceRequest(id=lease, resource=resource)
        await self._call("leasing a snapshot", self._leases.AddResource, request)

    # ---- content

    async def info(self, digest: str) -> Info:
        """Return what there is to know of a blob; raise NotFound."""
        answer = await self._call(f"blob {digest}", self._content.Info, content.InfoRequest(digest=digest))
        return Info(answer.info.digest, answer.info.size, dict(answer.info.labels))

    async def label(self, digest: str, labels: dict[str, str]) -> None:
        """Add labels to a blob; raise NotFound."""
        mask = FieldMask(paths=[f"labels.{key}" for key in labels])
        request = content.UpdateRequest(info=content.Info(digest=digest, labels=labels), update_mask=mask)
        await self._call(f"labelling blob {digest}", self._content.Update, request)

    async def read(self, digest: str, limit: int) -> bytes:
        """Return a small blob, which containerd verified when it came; raise NotFound, or TooLarge above `limit`."""
        data = bytearray()
        call = self._content.Read(content.ReadContentRequest(digest=digest), metadata=self._metadata)
        async with self._stream(f"reading blob {digest}", call):
            while (answer := await _next(call)) is not grpc.aio.EOF:
                data += answer.data
                if len(data) > limit:
                    raise TooLarge(f"containerd: blob {digest} has more than {limit} bytes")
        return bytes(data)

    async def write(self, name: str, digest: str, size: int, source: Callable[[], AsyncGenerator[bytes, None]]) -> bool:
        """Write a blob; return False if it is there already, in this namespace or (shared) in another.

        `name`: of this writing; nobody else may use it. `source` is called only if bytes are needed; what it raises is
        raised as it is. Raises Conflict if the bytes are not what `digest` and `size` say.
        """
        call = self._content.Write(metadata=self._metadata)

        async def ask(action: int, **fields: Any) -> int:
            await _within(call.write(content.WriteContentRequest(action=action, **fields)))
            answer = await _next(call)
            if answer is grpc.aio.EOF:
                raise errors.Unavailable(f"containerd ended the writing of blob {digest}")
            return int(answer.offset)

        try:
            async with self._stream(f"writing blob {digest}", call):
                there = offset = await ask(content.STAT, ref=name, total=size, expected=digest)
                if offset < size:
                    async with aclosing(_batches(source())) as batches:
                        async for data in batches:
                            offset = await ask(content.WRITE, offset=offset, data=data)
                await ask(content.COMMIT, offset=offset, total=size, expected=digest)
                return there < size
        except errors.AlreadyExists:
            return False

    async def abort(self, name: str) -> None:
        """Throw away what a writing that was given up has left; raise NotFound."""
        await self._call("giving up a blob", self._content.Abort, content.AbortRequest(ref=name))

    # ---- snapshots, and unpacking

    async def prepare(self, snapshotter: str, key: str, parent: str, labels: dict[str, str]) -> list[Any]:
        """Make an active snapshot, and return its mounts (for `apply`); raise AlreadyExists if the layer is there."""
        request = snapshots.PrepareSnapshotRequest(snapshotter=snapshotter, key=key, parent=parent, labels=labels)
        loop = asyncio.get_running_loop()
        end = loop.time() + _DIALS
        while True:
            try:
                return list((await self._call("preparing a snapshot", self._snapshots.Prepare, request, LONG)).mounts)
            except errors.Unavailable as error:
                if "dial" not in error.message or loop.time() >= end:
                    raise
            await asyncio.sleep(0.5)

    async def check_snapshotter(self, snapshotter: str) -> None:
        """Raise InvalidRequest if containerd knows no such snapshotter. Whether that answers is not looked at."""
        await self.has_snapshot(snapshotter, "none has this name")

    async def has_snapshot(self, snapshotter: str, name: str) -> bool:
        """Whether there is such a snapshot."""
        try:
            request = snapshots.StatSnapshotRequest(snapshotter=snapshotter, key=name)
            await self._call("looking for a snapshot", self._snapshots.Stat, request)
        except NotFound:
            return False
        return True

    async def commit(self, snapshotter: str, name: str, key: str, labels: dict[str, str]) -> None:
        """Make the active snapshot `key` the committed one `name`; raise AlreadyExists."""
        request = snapshots.CommitSnapshotRequest(snapshotter=snapshotter, name=name, key=key, labels=labels)
        await self._call("committing a snapshot", self._snapshots.Commit, request, LONG)

    async def remove(self, snapshotter: str, key: str) -> None:
        """Remove a snapshot; raise NotFound."""
        request = snapshots.RemoveSnapshotRequest(snapshotter=snapshotter, key=key)
        await self._call("removing a snapshot", self._snapshots.Remove, request)

    async def apply(self, layer: Descriptor, mounts: Iterable[Any]) -> str:
        """Have a layer of the content store unpacked onto mounts; return the diff ID of what was unpacked."""
        request = diff_pb2.ApplyRequest(diff=_descriptor(layer), mounts=mounts)
        answer = await self._call(f"unpacking layer {layer.digest}", self._diff.Apply, request, LONG)
        return str(answer.applied.digest)

    # ---- images

    async def image(self, name: str) -> str | None:
        """Return the digest of what an image's name leads to; None if there is no such image."""
        try:
            answer = await self._call(f"image {name}", self._images.Get, images_pb2.GetImageRequest(name=name))
        except NotFound:
            return None
        return str(answer.image.target.digest)

    async def set_image(self, name: str, target: Descriptor) -> None:
        """Have the name lead to `target`; labels that the image has stay."""
        image = images_pb2.Image(name=name, target=_descriptor(target))
        mask = FieldMask(paths=["target"])
        for _ in range(3):  # between two calls it may come, and go
            try:
                await self._call(f"image {name}", self._images.Create, images_pb2.CreateImageRequest(image=image))
                return
            except errors.AlreadyExists:
                pass
            try:
                request = images_pb2.UpdateImageRequest(image=image, update_mask=mask)
                await self._call(f"image {name}", self._images.Update, request)
                return
            except NotFound:
                pass
        told = f"containerd: somebody else makes and removes the image {name} all the time"
        raise errors.Conflict(told, hint="try again when that is over")

    # ---- containerd itself

    async def plugins(self, timeout: float = QUICK) -> list[Plugin]:
        """Return the plugins that containerd knows."""
        request = introspection_pb2.PluginsRequest()
        answer = await self._call("listing plugins", self._introspection.Plugins, request, timeout)
        return [
            Plugin(row.type, row.id, dict(row.exports), row.init_err.message if row.HasField("init_err") else "")
            for row in answer.plugins
        ]

    # ---- calling

    async def _call(self, what: str, method: Any, request: Any, timeout: float = QUICK) -> Any:
        try:
            return await method(request, timeout=timeout, metadata=self._metadata)
        except grpc.aio.AioRpcError as error:
            raise self._translated(what, error.code(), error.details()) from None

    @asynccontextmanager
    async def _stream(self, what: str, call: Any) -> AsyncIterator[None]:
        """End the call with the block, and have its errors translated."""
        try:
            yield
        except grpc.aio.AioRpcError as error:
            raise self._translated(what, error.code(), error.details()) from None
        except asyncio.InvalidStateError:  # it ended before we had said all
            raise self._translated(what, await call.code(), await call.details()) from None
        except TimeoutError:
            raise errors.Unavailable(f"containerd: {what}: no answer for {QUICK:.0f} s", hint=_BUSY) from None
        finally:
            call.cancel()

    def _translated(self, what: str, code: Any, details: str | None) -> DadiError:
        kind = _CODES.get(code, DadiError)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return errors.Unavailable(f"containerd: {what}: no answer in time", hint=_BUSY)
        return kind(f"containerd: {what}: {details or code.name}", hint=_hint(code, details or "", self.address))


@asynccontextmanager
async def connect(address: str, namespace: str) -> AsyncIterator[Containerd]:
    """Give the containerd behind the socket `address`. Nothing is contacted before the first call."""
    path = address.removeprefix("unix://")
    async with grpc.aio.insecure_channel(f"unix:{path}", options=_OPTIONS) as channel:
        yield Containerd(channel, path, namespace)


def _descriptor(of: Descriptor) -> Any:
    return descriptor_pb2.Descriptor(media_type=of.media_type, digest=of.digest, size=of.size)


async def _batches(source: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    waiting = bytearray()
    async with aclosing(source):
        async for data in source:
            waiting += data
            if len(waiting) >= _MESSAGE:
                yield bytes(waiting)
                waiting.clear()
    if waiting:
        yield bytes(waiting)


async def _within(step: Awaitable[T]) -> T:
    async with asyncio.timeout(QUICK):
        return await step


async def _next(call: Any) -> Any:
    return await _within(call.read())


def _hint(code: Any, details: str, address: str) -> str | None:
    if "snapshotter not loaded" in details:
        return "`dadi containerd-config` prints what containerd's configuration needs; then restart containerd"
    if code is grpc.StatusCode.UNAVAILABLE and "failed to connect to all addresses" in details:
        return f"is containerd running, and {address} its socket? It is root's"
    if code is grpc.StatusCode.UNAVAILABLE and "dial" in details:
        return "is dadi-node running?"
    return None
