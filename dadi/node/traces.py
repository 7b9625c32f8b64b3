"""What `dadi trace` asks of the node: an image's startup trace shown, brought, cleared. The superpeers keep it."""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

from aiohttp import web

from dadi.errors import InvalidRequest, Malformed, Unavailable
from dadi.peers.superpeer import ImageAnswer, image_answer
from dadi.prefetch import trace, trace_json
from dadi.prefetch.trace import Message, Trace

if TYPE_CHECKING:
    from dadi.node.node import Node

_MAX_BODY = 16 << 20


async def show(node: Node, image: str, platform: str) -> dict[str, Any]:
    """Return the answer to `GET /v1/traces`. Raises what resolving raises; Unavailable."""
    return await _shown(node, await _resolved(node, image, platform))


async def bring(node: Node, image: str, platform: str, value: dict[str, Any]) -> dict[str, Any]:
    """Give the superpeer a trace (JSON), as if starts of the image had been recorded. Raises InvalidRequest."""
    found = trace_json.from_json(value)
    answer = await _resolved(node, image, platform)
    if found.manifest != answer.manifest_digest:
        hint = "traces name chunks: they are of use for this very image only"
        raise InvalidRequest(f"the trace is of {found.manifest}, and {image} is {answer.manifest_digest}", hint=hint)
    blobs = {blob.digest: blob for blob in (await node.mounts.metadata.index(answer)).device_blobs()}
    recordings = trace_json.recordings(found)
    for recording in recordings:
        try:
            trace.check_fits(recording, blobs)
        except Malformed as error:
            raise InvalidRequest(error.message) from None
    for recording in reversed(recordings):
        if not await node.startups.keeper.send(Message(found.manifest, recording)):
            hint = "in a minute it takes some again"
            raise Unavailable(f"the superpeer has recordings enough of {image} now: the trace was not taken", hint=hint)
    return await _shown(node, answer)


async def clear(node: Node, image: str, platform: str) -> None:
    """Have the superpeers forget the trace."""
    answer = await _resolved(node, image, platform)
    await node.startups.keeper.clear(answer.manifest_digest)


async def body_of(request: web.Request) -> bytearray:
    """Return the body of a request; raise InvalidRequest if it is too large."""
    data = bytearray()
    async for piece in request.content.iter_any():
        data += piece
        if len(data) > _MAX_BODY:
            raise InvalidRequest(f"a trace of more than {_MAX_BODY} bytes")
    return data


async def _shown(node: Node, answer: ImageAnswer) -> dict[str, Any]:
    data = (await node.startups.keeper.fetch(answer.manifest_digest)).data
    found = trace_json.to_json(trace.decode(data, Trace)) if data else None
    return {"reference": answer.reference, "platform": answer.platform, "manifest_digest": answer.manifest_digest,
            "trace": found, "last_start": node.startups.row(answer.manifest_digest)}  # fmt: skip


async def _resolved(node: Node, image: str, platform: str) -> ImageAnswer:
    async with contextlib.aclosing(node.upstream.resolve(image, platform)) as events:
        async for event in events:
            if event.get("event") == "image":
                return image_answer(event)
    raise Malformed(f"the superpeer did not say what {image} is", hint="its log may; are the versions alike?")
