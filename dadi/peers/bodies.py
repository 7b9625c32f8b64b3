"""The body of a request as one of our messages; both directories read theirs by this."""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from aiohttp import web

from dadi.errors import InvalidRequest

_MAX = 4 << 20
_TIME = 20.0
"""Seconds that a body may take."""

M = TypeVar("M", bound=msgspec.Struct)


async def message(request: web.Request, kind: type[M], most: int = _MAX) -> M:
    """Return the message in a request's body. Raises InvalidRequest for what is none, too long, or comes too slowly."""
    data = bytearray()
    try:
        async with asyncio.timeout(_TIME):
            async for piece in request.content.iter_any():
                data += piece
                if len(data) > most:
                    raise InvalidRequest(f"a message of more than {most} bytes")
        return msgspec.json.decode(data, type=kind)
    except TimeoutError:
        raise InvalidRequest("the body did not come in time") from None
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"no message of a node: {error}", hint="are the versions alike?") from None


def answer(said: msgspec.Struct) -> web.Response:
    """Return a message as an answer."""
    return web.Response(body=msgspec.json.encode(said), content_type="application/json")
