"""A peer that lies: joins the directory as nodes do, says that it has all of an image, and sends wrong bytes.

What lives here: the liar's process (`main`, forked by tests/lab/forking.py). What never does: anything of a real node;
it speaks the protocols by itself. Its answers have the right status, range and length; only the bytes are wrong.

    RESULT    a file with one byte for each lie that was told
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from dadi.index import image as image_index

_RANGE = re.compile(r"bytes=(\d+)-(\d+)")
Find = Callable[[aiohttp.ClientSession, str, str, str], Awaitable[tuple[dict[str, int], dict[str, str]]]]
"""Returns the sizes of blobs, and the headers that let us into their trees; it gets superpeer, IMAGE and PLATFORM."""


def main(arguments: Sequence[str]) -> None:
    """SUPERPEER IMAGE PLATFORM ID PORT ZONE RACK SLOTS RESULT"""
    asyncio.run(lie(*arguments))


async def lie(superpeer: str, image: str, platform: str, own: str, port: str, zone: str, rack: str, slots: str,
              result: str, answers: type[Answers] | None = None, find: Find | None = None) -> None:  # fmt: skip
    """Join, and answer as `answers` does; of the blobs that `find` finds, else of those of the image."""
    peer = {"id": own, "address": f"0.0.0.0:{port}", "zone": zone, "rack": rack, "slots": int(slots)}
    async with aiohttp.ClientSession() as session:
        blobs, headers = await (find or _blobs)(session, superpeer, image, platform)
        app = web.Application()
        app.router.add_get("/v1/blobs/{digest}", (answers or Answers)(blobs, Path(result)).handle)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, "0.0.0.0", int(port)).start()
        wish = {"peer": peer, "blobs": list(blobs), "without": [], "reports": []}
        async with session.post(f"{superpeer}/v1/peers/join", json=wish, headers=headers) as answer:
            said = await answer.json()
            if answer.status != 200:
                raise RuntimeError(f"join: {answer.status} {said}")
        told = [
            {"blob": blob, "order": place["order"], "depth": place["depth"],
             "parents": [parent["id"] for parent in place.get("parents", [])], "chunks": 1 << 20, "complete": True}
            for blob, place in said["places"].items()
        ]  # fmt: skip
        Path(result).touch()
        while True:
            await asyncio.sleep(said["heartbeat"])
            beat = {"peer": peer, "load": 0.0, "refuses": False, "blobs": told, "liars": [], "reports": []}
            async with session.post(f"{superpeer}/v1/peers/heartbeat", json=beat, headers=headers) as answer:
                await answer.read()


async def _blobs(session: aiohttp.ClientSession, superpeer: str, image: str,
                 platform: str) -> tuple[dict[str, int], dict[str, str]]:  # fmt: skip
    """Return the sizes of the image's blobs, and the headers that let us in."""
    found: dict[str, Any] = {}
    parameters = {"reference": image, "platform": platform}
    async with session.get(f"{superpeer}/v1/images", params=parameters) as answer:
        async for line in answer.content:
            event = json.loads(line)
            if event.get("event") == "image":
                found = event
    tokens = found.get("tokens")
    headers = {"Authorization": f"Bearer {tokens[0]}"} if tokens else {}
    async with session.get(f"{superpeer}/v1/blobs/{found['index_digest']}", headers=headers) as answer:
        index = image_index.decode(await answer.read())
    return {blob.digest: blob.size for blob in (*index.device_blobs(), index.metadata)}, headers


class Answers:
    """What it answers: wrong bytes."""

    def __init__(self, blobs: dict[str, int], result: Path) -> None:
        self._blobs = blobs
        self._result = result

    async def handle(self, request: web.Request) -> web.StreamResponse:
        digest = request.match_info["digest"]
        match = _RANGE.fullmatch(request.headers.get("Range", ""))
        if digest not in self._blobs or match is None:
            return web.Response(status=404)
        first, last = int(match[1]), int(match[2])
        with self._result.open("ab") as file:
            file.write(b"!")
        headers = {"Content-Range": f"bytes {first}-{last}/{self._blobs[digest]}"}
        return await self.answer(request, headers, last - first + 1)

    async def answer(self, request: web.Request, headers: dict[str, str], length: int) -> web.StreamResponse:
        return web.Response(status=206, body=b"\x55" * length, headers=headers)
