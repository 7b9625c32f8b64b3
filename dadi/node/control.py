"""The node's control socket: HTTP on RUN/node.sock, for our own user only. Routes and translation; no decisions.

    GET    /healthz
    GET    /metrics                                     Prometheus
    GET    /v1/status                                   JSON, see `Node.statistics`
    GET    /v1/peers?image=I                            JSON, see `Peering.trees`
    POST   /v1/mounts {image, directory, platform}      events: "progress" …, "mounted" (a row of the status), "done"
    DELETE /v1/mounts?directory=D[&force=1]             {}
    POST   /v1/drain[?timeout=SECONDS]                  events: "progress" …, "drained", "done"; see `Drain.watch`
    DELETE /v1/drain                                    {}
    POST   /v1/verify[?repair=1][&rate=BYTES]           events: "progress" …, "bad" …, "verified", "done": `Verifying`
    GET    /v1/traces?image=I[&platform=P]              {reference, platform, manifest_digest, trace: JSON or null}
    POST   /v1/traces {image, platform, trace}          the same, after the trace was given to the superpeer
    DELETE /v1/traces?image=I[&platform=P]              {}
    GET    /v1/inspect?image=I[&platform=P][&files=1]   events: "progress" …, "image", "layer" …, each followed by its
                                                        "files" (at most 1,000 an event), "done"
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncGenerator
from typing import Annotated, Any

import msgspec
from aiohttp import web

from dadi import http, metrics
from dadi.errors import Conflict, InvalidRequest, Malformed
from dadi.index import layer as layer_index
from dadi.index.image import ImageIndex
from dadi.index.layer import Entry, Kind
from dadi.node import traces
from dadi.node.node import Node
from dadi.node.peering import image_blobs
from dadi.peers.superpeer import image_answer
from dadi.wire import Event

_FILES_PER_EVENT = 1000


class MountRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/mounts`."""

    image: Annotated[str, msgspec.Meta(max_length=1024)]
    directory: Annotated[str, msgspec.Meta(max_length=4096)]
    platform: Annotated[str, msgspec.Meta(max_length=100)] = ""


class TraceRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The body of `POST /v1/traces`; `trace` as in `dadi/prefetch/trace_json.py`."""

    image: Annotated[str, msgspec.Meta(max_length=1024)]
    trace: dict[str, Any]
    platform: Annotated[str, msgspec.Meta(max_length=100)] = ""


def create(node: Node) -> web.Application:
    """Return the application for a node that has been started."""
    app, control = http.application(), _Control(node)
    app.router.add_get("/healthz", control.healthz)
    app.router.add_get("/metrics", metrics.handler("dadi_node", node.statistics))
    app.router.add_get("/v1/status", control.status)
    app.router.add_get("/v1/peers", control.peers)
    app.router.add_post("/v1/mounts", control.mount)
    app.router.add_delete("/v1/mounts", control.unmount)
    app.router.add_post("/v1/drain", control.drain)
    app.router.add_delete("/v1/drain", control.undo_drain)
    app.router.add_post("/v1/verify", control.verify)
    app.router.add_get("/v1/traces", control.trace)
    app.router.add_post("/v1/traces", control.import_trace)
    app.router.add_delete("/v1/traces", control.clear_trace)
    app.router.add_get("/v1/inspect", control.inspect)
    return app


class _Control:
    """A handler for each route; see the head of this file."""

    def __init__(self, node: Node) -> None:
        self._node = node

    async def healthz(self, request: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def status(self, request: web.Request) -> web.Response:
        return web.json_response(self._node.statistics())

    async def mount(self, request: web.Request) -> web.StreamResponse:
        try:
            body = msgspec.json.decode(await request.read(), type=MountRequest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"not a mount request: {error}") from None
        work = self._node.mounts.mount(body.image, normalized(body.directory), body.platform or self._node.platform)
        return await http.stream_events(request, work)

    async def unmount(self, request: web.Request) -> web.Response:
        directory, force = normalized(request.query.get("directory", "")), request.query.get("force") == "1"
        if not force and directory.startswith(f"{self._node.images.directory}/"):
            # umount(2) would not find it in use: overlayfs has a mount of its own below a container.
            hint = "remove the image in containerd; --force all the same"
            raise Conflict(f"{directory} belongs to containerd's snapshots", hint=hint)
        await self._node.mounts.unmount(directory, force=force)
        return web.json_response({})

    async def drain(self, request: web.Request) -> web.StreamResponse:
        return await http.stream_events(request, self._node.drain.watch(_number(request.query.get("timeout", "0"))))

    async def undo_drain(self, request: web.Request) -> web.Response:
        await self._node.drain.end()
        return web.json_response({})

    async def verify(self, request: web.Request) -> web.StreamResponse:
        rate, repair = _number(request.query.get("rate", "0")), request.query.get("repair") == "1"
        return await http.stream_events(request, self._node.verifying.run(repair=repair, rate=rate))

    async def peers(self, request: web.Request) -> web.Response:
        if self._node.peering is None:
            raise Conflict("this node has no peers", hint="it embeds a superpeer, or has peers.enabled = false")
        in_use = [device.blob for device in self._node.devices.all()]
        blobs = image_blobs(request.query.get("image", ""), self._node.mounts.statistics(), in_use)
        return web.json_response(await self._node.peering.trees(blobs))

    async def inspect(self, request: web.Request) -> web.StreamResponse:
        image, platform = self._image(request)
        files = request.query.get("files") == "1"
        return await http.stream_events(request, inspecting(self._node, image, platform, files))

    async def trace(self, request: web.Request) -> web.Response:
        return web.json_response(await traces.show(self._node, *self._image(request)))

    async def import_trace(self, request: web.Request) -> web.Response:
        try:
            body = msgspec.json.decode(await traces.body_of(request), type=TraceRequest)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
            raise InvalidRequest(f"not a trace to import: {error}") from None
        platform = body.platform or self._node.platform
        return web.json_response(await traces.bring(self._node, body.image, platform, body.trace))

    async def clear_trace(self, request: web.Request) -> web.Response:
        await traces.clear(self._node, *self._image(request))
        return web.json_response({})

    def _image(self, request: web.Request) -> tuple[str, str]:
        image = request.query.get("image")
        if not image:
            raise InvalidRequest("image must be given")
        return image, request.query.get("platform") or self._node.platform


def _number(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < 1e12:
        raise InvalidRequest(f"{text[:40]!r} is no number that has a meaning here")
    return number


def normalized(directory: str) -> str:
    """Return an absolute path without "..", "//" and the like; raise InvalidRequest for another."""
    if not os.path.isabs(directory):
        raise InvalidRequest(f"{directory!r} is not an absolute path")
    return os.path.normpath(directory)


async def inspecting(node: Node, image: str, platform: str, files: bool) -> AsyncGenerator[Event, None]:
    """Yield the events of `GET /v1/inspect`."""
    answer = None
    async for event in node.upstream.resolve(image, platform):
        if event.get("event") == "image":
            answer = image_answer(event)
        else:
            yield event
    if answer is None:
        raise Malformed(f"the superpeer did not say what {image} is", hint="its log may; are the versions alike?")
    index = await node.mounts.metadata.index(answer)
    yield {"event": "image", **msgspec.structs.asdict(answer), "config_digest": index.config_digest,
           "compressed_bytes": index.layers_size, "unpacked_bytes": index.unpacked_size,
           "metadata_bytes": index.metadata.size, "layers": len(index.layers), "index_origin": index.origin,
           "index_version": index.version, "artifact_digest": index.artifact, "signer": index.signer}  # fmt: skip
    for number in range(len(index.layers)):
        async for event in _layer(node, index, number, files):
            yield event


async def _layer(node: Node, index: ImageIndex, number: int, files: bool) -> AsyncGenerator[Event, None]:
    layer = index.layers[number]
    data = await node.upstream.whole(layer.index_digest, layer.index_size)
    entries = (await asyncio.to_thread(layer_index.decode, data)).entries
    yield {
        "event": "layer",
        "number": number,
        "digest": layer.layer_digest,
        "media_type": layer.media_type,
        "compressed_bytes": layer.layer_size,
        "diff_id": layer.diff_id,
        "unpacked_bytes": layer.table.size,
        "files": sum(entry.kind is Kind.FILE for entry in entries),
        "chunks": layer.table.count,
        "chunk_size": layer.table.chunk_size,
        "index_bytes": layer.index_size,
        "seek_points": layer.seek_points,
        "seek_bytes": layer.seek_size,
        "device": index.devices.index(number) + 1 if number in index.devices else None,
    }
    if files:
        for at in range(0, len(entries), _FILES_PER_EVENT):
            rows = [_file(entry) for entry in entries[at : at + _FILES_PER_EVENT]]
            yield {"event": "files", "layer": number, "files": rows}


def _file(entry: Entry) -> dict[str, Any]:
    """Return a tar member as JSON; bytes of names that are not UTF-8 are shown as \\xNN."""
    row: dict[str, Any] = {"path": _text(entry.path), "type": Kind(entry.kind).name.lower(), "mode": entry.mode}
    row |= {"uid": entry.uid, "gid": entry.gid, "mtime_ns": entry.mtime, "size": entry.size}
    if entry.kind is Kind.FILE:
        row |= {"offset": entry.offset, "length": entry.size}
    if entry.target:
        row["target"] = _text(entry.target)
    if entry.extents:
        row["extents"] = [[e.file_offset, e.tar_offset, e.length] for e in entry.extents]
    return row


def _text(name: bytes) -> str:
    return name.decode("utf-8", "backslashreplace")
