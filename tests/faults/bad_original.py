"""A peer that has joined the tree of one blob of plain pulls, says that it has it, and then does its children no good.

What lives here: how it joins. What never does: what it answers (bad_peer.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import aiohttp
import msgspec

from dadi.originals.messages import OriginalAnswer
from tests.faults.bad_peer import MANNERS
from tests.lab import liar


async def _one(session: aiohttp.ClientSession, superpeer: str, repository: str, digest: str
               ) -> tuple[dict[str, int], dict[str, str]]:  # fmt: skip
    """Return the blob's size, and the headers that let us into its tree; has the superpeer get it before."""
    parameters = {"reference": repository, "wait": "10"}
    async with session.get(f"{superpeer}/v1/original/{digest}/table", params=parameters) as answer:
        said = msgspec.msgpack.decode(await answer.read(), type=OriginalAnswer)
    return {digest: said.size}, {"Authorization": f"Bearer {said.token}"}


def main(arguments: Sequence[str]) -> None:
    """MANNER SUPERPEER REPOSITORY DIGEST PORT RESULT"""
    manner, superpeer, repository, digest, port, result = arguments
    asyncio.run(
        liar.lie(superpeer, repository, digest, f"bad-{manner}", port, "zone", "rack", "1", result,
                 answers=MANNERS[manner], find=_one)
    )  # fmt: skip
