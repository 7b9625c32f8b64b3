"""The delaying relay of the tests: all bytes, in order, both ways, none too soon; an end is seen at the other side."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator

import pytest

from tests.lab.relay import Relay

RTT = 0.04
BODY = os.urandom(5 << 20) + b"the end"


async def _echo_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.write(await reader.read())
    await writer.drain()
    writer.close()


@pytest.fixture
async def port() -> AsyncIterator[int]:
    server = await asyncio.start_server(_echo_all, "127.0.0.1", 0)
    relay = Relay(("127.0.0.1", server.sockets[0].getsockname()[1]), RTT)
    yield await relay.start("127.0.0.1", 0)
    await relay.close()
    server.close()
    await server.wait_closed()


async def test_all_bytes_come_back_in_order_and_not_before_two_round_trips(port: int) -> None:
    begin = asyncio.get_running_loop().time()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(BODY)
    writer.write_eof()
    assert await reader.read() == BODY
    assert asyncio.get_running_loop().time() - begin >= 2 * RTT
    writer.close()
    await writer.wait_closed()


async def test_many_small_pieces_stay_in_order(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    pieces = [b"%d," % number for number in range(3000)]
    for piece in pieces:
        writer.write(piece)
        await asyncio.sleep(0)
    writer.write_eof()
    assert await reader.read() == b"".join(pieces)
    writer.close()
    await writer.wait_closed()


async def test_who_is_not_there_is_seen_as_the_end() -> None:
    relay = Relay(("127.0.0.1", 1), RTT)
    reader, writer = await asyncio.open_connection("127.0.0.1", await relay.start("127.0.0.1", 0))
    assert await reader.read() == b""
    writer.close()
    await relay.close()
