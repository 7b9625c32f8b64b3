"""A peer that has joined an image's trees, says that it has everything, and then does its children no good.

What lives here: the process, `tests/lab/liar.py` with other answers. What never does: how it joins.

    wrong     the right length, wrong bytes          silent    nothing at all, the connection stays
    trickle   one byte a second                      length    a byte too few or too many, and says so
    refuse    the connection is reset, each time
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

from aiohttp import web

from tests.faults.door import reset
from tests.lab import liar


class _Silent(liar.Answers):
    async def answer(self, request: web.Request, headers: dict[str, str], length: int) -> web.StreamResponse:
        await asyncio.sleep(3600)
        raise ConnectionResetError


class _Trickle(liar.Answers):
    async def answer(self, request: web.Request, headers: dict[str, str], length: int) -> web.StreamResponse:
        answer = web.StreamResponse(status=206, headers={**headers, "Content-Length": str(length)})
        await answer.prepare(request)
        for _ in range(length):
            await answer.write(b"\x55")
            await asyncio.sleep(1)
        return answer


class _Length(liar.Answers):
    count = itertools.count()

    async def answer(self, request: web.Request, headers: dict[str, str], length: int) -> web.StreamResponse:
        return web.Response(status=206, body=b"\x55" * (length + (1, -1)[next(self.count) % 2]), headers=headers)


class _Refuse(liar.Answers):
    async def answer(self, request: web.Request, headers: dict[str, str], length: int) -> web.StreamResponse:
        reset(request)
        raise ConnectionResetError


MANNERS: dict[str, type[liar.Answers]] = {
    "wrong": liar.Answers, "silent": _Silent, "trickle": _Trickle, "length": _Length, "refuse": _Refuse,
}  # fmt: skip


def main(arguments: Sequence[str]) -> None:
    """MANNER, and what tests/lab/liar.py wants."""
    manner, superpeer, image, platform, own, port, zone, rack, slots, result = arguments
    asyncio.run(
        liar.lie(superpeer, image, platform, own, port, zone, rack, slots, result, answers=MANNERS[manner])
    )
