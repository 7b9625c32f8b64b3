"""Send an `Original` over HTTP: status and headers of the range that is asked for, then parts as they come.

The bytes go as `dadi/blobs/answering.py` sends them. When it fails after the headers are out there is no way to say so
but to cut the connection: the client then has fewer bytes than Content-Length promised, which every client takes for a
failure.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Mapping

import structlog
from aiohttp import web
from aiohttp.http import SERVER_SOFTWARE

from dadi.blobs.answering import Answer
from dadi.errors import DadiError
from dadi.originals import byte_range
from dadi.originals.original import Original, OriginalPart

log = structlog.get_logger()


async def respond(request: web.Request, digest: str, original: Original, headers: Mapping[str, str],
                  counts: Counter[str]) -> web.StreamResponse:  # fmt: skip
    """Answer GET or HEAD; raises what fails before the headers are out.

    Counts "requests", "bytes" and "cut" in `counts`.
    """
    etag = f'"{digest}"'
    wanted = request.headers.get("Range")
    if request.headers.get("If-Range") not in (None, etag) or request.method == "HEAD":
        wanted = None
    offset, length, status = byte_range.parse(wanted, original.size)
    answer = {"Accept-Ranges": "bytes", "Docker-Content-Digest": digest, "ETag": etag, **headers}
    answer["Server"] = SERVER_SOFTWARE  # as aiohttp has it for HEAD: both say the same
    if _is_known(request, etag):
        return web.Response(status=304, headers={"ETag": etag, "Docker-Content-Digest": digest})
    if status == 416:
        answer["Content-Range"] = f"bytes */{original.size}"
    elif status == 206:
        answer["Content-Range"] = f"bytes {offset}-{offset + length - 1}/{original.size}"
    answer["Content-Length"] = str(length)
    counts["requests"] += 1
    if request.method == "HEAD" or not length:
        empty = web.StreamResponse(status=status, headers=answer)
        await empty.prepare(request)
        return empty
    response = Answer(request, status, answer)
    async with contextlib.aclosing(original.parts(offset, length)) as parts:
        part = await anext(parts)  # what fails now can still be told
        await response.begin()
        try:
            await _send(response, part)
            counts["bytes"] += part.length
            async for part in parts:
                await _send(response, part)
                counts["bytes"] += part.length
            await response.end()
        except DadiError as error:
            counts["cut"] += 1
            log.warning("cut an answer off", blob=digest, why=error.message)
            if request.transport is not None:
                request.transport.abort()
    return response


def _is_known(request: web.Request, etag: str) -> bool:
    said = request.headers.get("If-None-Match", "")
    return said == "*" or etag in [one.strip().removeprefix("W/") for one in said.split(",")]


async def _send(response: Answer, part: OriginalPart) -> None:
    if part.data is None:
        await response.file(part.fd, part.offset, part.length)
    else:
        await response.write(part.data)
