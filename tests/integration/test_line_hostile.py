"""One request to a peer that means no good: what it sends is right, or an error; memory is bounded; it ends."""

from __future__ import annotations

import asyncio
import tracemalloc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi import http
from dadi.blobs.source import Urgency
from dadi.errors import DadiError, DigestMismatch, Unavailable
from dadi.index.chunks import blob_of
from dadi.peers import line as line_file
from dadi.peers import stream
from dadi.peers.frames import longest
from dadi.peers.incoming import Alive
from dadi.peers.line import HttpLine
from tests.contracts.store import content

C = 16 << 10
DATA = content(7 * C + 5)
BLOB = blob_of(DATA, C)
PARTS = [DATA[at : at + C] for at in range(0, len(DATA), C)]
HEAD = f"HTTP/1.1 200 OK\r\nContent-Type: {stream.TYPE}\r\nDadi-Chunks: 1\r\nConnection: close\r\n\r\n".encode()
Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


class Heard:
    """Keeps what is handed on; all of it must be right."""

    def __init__(self) -> None:
        self.chunks: list[int] = []
        self.signs = 0

    def begins(self, chunk: int | None = None) -> None: ...

    def waits(self) -> None:
        self.signs += 1

    def chunk(self, chunk: int, data: bytes, frame: bytes | None) -> None:
        assert data == PARTS[chunk]
        self.chunks.append(chunk)


def plain(chunk: int, body: bytes | None = None, length: int | None = None) -> bytes:
    body = PARTS[chunk] if body is None else body
    return stream.head(stream.PLAIN, chunk, len(body) if length is None else length) + body


@asynccontextmanager
async def asking(script: Script, read: float = 5.0) -> AsyncIterator[tuple[HttpLine, list[bytes]]]:
    """A peer that answers each request with what `script` writes; give the line to it, and requests that it got."""
    requests: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            requests.append(await reader.readuntil(b"\r\n\r\n"))
            await script(writer)
            await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    session = http.client(connect=1, read=read)
    try:
        yield HttpLine(lambda: f"http://127.0.0.1:{port}", session), requests
    finally:
        await session.close()
        server.close()
        await server.wait_closed()


async def asked(script: Script, chunks: Sequence[int] = range(4), read: float = 5.0) -> Heard:
    """Ask for chunks; raises what comes of it, with what was heard in `heard`."""
    heard = Heard()
    async with asyncio.timeout(20), asking(script, read) as (line, _):
        try:
            await line.ask(BLOB, chunks, Urgency.STARTUP, 0, heard)
        except DadiError as error:
            error.heard = heard
            raise
    return heard


def sends(*pieces: bytes) -> Script:
    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + b"".join(pieces))

    return script


async def test_chunks_may_come_in_any_order() -> None:
    heard = await asked(sends(plain(3), stream.WAITING, plain(0), plain(2), plain(1)))
    assert (heard.chunks, heard.signs) == ([3, 0, 2, 1], 1)


WRONG = {
    "other bytes": [plain(0), plain(1, PARTS[2])],
    "a chunk twice": [plain(0), plain(0)],
    "a chunk that nobody asked for": [plain(5)],
    "a chunk that the blob has not": [plain(0), stream.head(stream.PLAIN, 2**32 - 1, C)],
    "a byte too few": [plain(0, PARTS[0][:-1])],
    "a byte too many": [plain(0, PARTS[0] + b"x")],
    "nothing as a chunk": [plain(0, b"")],
    "four gigabytes as a chunk": [plain(0, length=2**32 - 1)],
    "four gigabytes as an error": [stream.head(stream.ERROR, 0, 2**32 - 1)],
    "a sign of life with something in it": [stream.head(stream.WAITS, 0, 5)],
    "a kind that there is not": [stream.head(9, 0, C), PARTS[0]],
    "what is no frame": [stream.head(stream.FRAME, 0, C), PARTS[0]],
    "a frame of something else": [stream.head(stream.FRAME, 0, len(f := zstandard.compress(bytes(C)))), f],
    "a frame that grows": [stream.head(stream.FRAME, 0, len(f := zstandard.compress(bytes(64 << 20)))), f],
    "a frame longer than any of its chunk": [stream.head(stream.FRAME, 0, longest(C) + 1)],
    "more than all": [*map(plain, range(4)), b"x"],
    "one record more than all": [*map(plain, range(4)), plain(0)],
}


@pytest.mark.parametrize("what", WRONG)
async def test_what_is_wrong_is_a_lie_and_nothing_of_it_is_handed_on(what: str) -> None:
    with pytest.raises(DigestMismatch) as raised:
        await asked(sends(*WRONG[what]))
    told: Any = raised.value
    assert told.heard.chunks == [chunk for chunk in range(4) if plain(chunk) in WRONG[what]]


@pytest.mark.parametrize("end", [0, 1, stream.SIZE - 1, stream.SIZE, stream.SIZE + 1, stream.SIZE + C - 1])
async def test_a_stream_that_is_cut_is_an_upstream_that_failed(end: int) -> None:
    with pytest.raises(Unavailable) as raised:
        await asked(sends(plain(1), plain(0)[:end]))
    told: Any = raised.value
    assert told.heard.chunks == [1]


async def test_a_stream_byte_by_byte_is_as_right_as_any() -> None:
    async def dribble(writer: asyncio.StreamWriter) -> None:
        for byte in HEAD + stream.WAITING + plain(7):
            writer.write(bytes([byte]))
            await writer.drain()
        writer.write(plain(6))

    heard = await asked(dribble, range(6, 8))
    assert (heard.chunks, heard.signs) == ([7, 6], 1)


async def test_a_chunk_that_grew_when_it_was_compressed_is_right_and_not_passed_on_so() -> None:
    """A superpeer compresses ranges, and a node passes frames on: an honest one must not be taken for a liar."""
    frame = zstandard.compress(PARTS[0])
    assert len(frame) > C, "it is as good as random"
    short = zstandard.compress(bytes(C))
    blob = blob_of(PARTS[0] + bytes(C), C)
    kept: list[bytes | None] = []

    class Keeps(Heard):
        def chunk(self, chunk: int, data: bytes, frame: bytes | None) -> None:
            kept.append(frame)

    async with asyncio.timeout(20), asking(sends(*(
        stream.head(stream.FRAME, chunk, len(each)) + each for chunk, each in enumerate((frame, short))
    ))) as (line, _):  # fmt: skip
        await line.ask(blob, range(2), Urgency.STARTUP, 0, Keeps())
    assert kept == [b"", short]


async def test_who_says_nothing_at_all_is_given_up() -> None:
    async def silent(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + plain(0)[:-1])
        await writer.drain()
        await asyncio.get_running_loop().create_future()

    with pytest.raises(Unavailable, match="nothing came"):
        await asked(silent, read=0.3)


async def test_bytes_that_come_put_the_end_off() -> None:
    """Longer than `read` altogether, and never so long without a byte."""

    async def slowly(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        for at in range(12):
            writer.write(plain(0)[at : at + 1])
            await asyncio.sleep(0.1)
        writer.write(plain(0)[12:])

    assert (await asked(slowly, range(1), read=1.0)).chunks == [0]


async def test_endless_signs_of_life_end() -> None:
    async def waits(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        while not writer.is_closing():
            writer.write(stream.WAITING * 50)
            await writer.drain()

    with pytest.raises(DigestMismatch, match="waits") as raised:
        await asked(waits)
    told: Any = raised.value
    assert told.heard.signs <= line_file._SIGNS + 20 * line_file._SIGNS_A_SECOND


async def test_what_is_sent_and_not_asked_for_is_not_kept_in_memory() -> None:
    async def floods(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + plain(0) + stream.head(stream.PLAIN, 1, C))
        for _ in range(1000):
            writer.write(bytes(64 << 10))
            await writer.drain()

    tracemalloc.start()
    try:
        with pytest.raises(DigestMismatch):
            await asked(floods)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


async def test_chunks_that_are_no_neighbours_are_one_request_to_who_knows_that() -> None:
    async with asking(sends(plain(6), plain(0), plain(1))) as (line, requests):
        heard = Heard()
        assert not line.scattered
        assert await line.ask(BLOB, [0, 1, 6], Urgency.STARTUP, 0, heard)
        assert line.scattered
    assert f"Dadi-Chunks: 0-1,6\r\nRange: bytes=0-{2 * C - 1}".encode() in _sorted(requests[0])
    assert heard.chunks == [6, 0, 1]


async def test_who_does_not_know_it_answers_for_the_range_and_no_more() -> None:
    async def script(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD.replace(b"Dadi-Chunks: 1\r\n", b"") + plain(1) + plain(0))

    async with asking(script) as (line, _):
        heard = Heard()
        assert await line.ask(BLOB, [0, 1, 6], Urgency.STARTUP, 0, heard)
        assert not line.scattered
    assert heard.chunks == [1, 0]


def _sorted(request: bytes) -> bytes:
    lines = request.split(b"\r\n")
    return b"\r\n".join(sorted(line for line in lines if line.startswith((b"Dadi-Chunks", b"Range"))))


# ---- whatever comes, in whatever pieces


class Content:
    """The body of a response, in pieces."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    async def readany(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def read(self, most: int) -> bytes:
        return (await self.readany())[:most]


class Response:
    connection = None

    def __init__(self, pieces: list[bytes]) -> None:
        self.content = Content(pieces)


RECORDS = st.one_of(
    st.builds(plain, st.integers(0, 7)),
    st.builds(lambda kind, chunk, length: stream.head(kind, chunk, length), st.integers(0, 4), st.integers(0, 9),
              st.sampled_from([0, 1, 5, C - 1, C, C + 1, 2**32 - 1])),
    st.builds(lambda chunk, body: stream.head(stream.FRAME, chunk, len(body)) + body, st.integers(0, 7),
              st.sampled_from([zstandard.compress(part) for part in PARTS])),
    st.just(stream.WAITING),
    st.binary(max_size=20),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(records=st.lists(RECORDS, max_size=12), cuts=st.lists(st.integers(0, 3 * C), max_size=8))
def test_of_whatever_comes_only_right_chunks_are_handed_on_each_once(records: list[bytes], cuts: list[int]) -> None:
    body = b"".join(records)
    at = sorted({0, *(min(cut, len(body)) for cut in cuts), len(body)})
    response: Any = Response([body[a:b] for a, b in pairwise(at)])
    heard = Heard()

    async def take() -> None:
        session: Any = http.client()
        line = HttpLine(lambda: "http://peer", session)
        async with session, asyncio.timeout(20) as limit:
            await line._stream(response, BLOB, range(8), heard, Alive(limit, None))

    try:
        asyncio.run(take())
    except (DadiError, line_file.aiohttp.ClientPayloadError):
        whole = False
    else:
        whole = True
    assert len(set(heard.chunks)) == len(heard.chunks)
    assert not whole or sorted(heard.chunks) == list(range(8))
