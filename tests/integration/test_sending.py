"""Bytes of a file on their way to a socket: slow readers, cold pages, readers that go, a file that is too short."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import itertools
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from dadi.blobs import sending
from dadi.blobs.answering import Answer
from dadi.errors import DadiError

DATA = random.Random(1).randbytes(9 << 20)
SIZE = len(DATA)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_bytes(DATA)
    return path


@contextlib.asynccontextmanager
async def serving(
    file: Path, ended: asyncio.Queue[str], said: int = SIZE, *, answered: bool = False
) -> AsyncIterator[int]:
    """Serve a file as one that has `said` bytes; yields the port. `ended` gets how each answer ended."""
    fd = await asyncio.to_thread(os.open, file, os.O_RDONLY)

    async def handle(request: web.Request) -> web.StreamResponse:
        headers = {"Content-Length": str(said)}
        response = Answer(request, 200, headers) if answered else web.StreamResponse(headers=headers)
        await response.prepare(request)
        try:
            if isinstance(response, Answer):
                await response.file(fd, 0, said)
            else:
                await sending.send_file(request, fd, 0, said)
            ended.put_nowait("")
        except (ConnectionResetError, DadiError) as error:
            ended.put_nowait(f"{type(error).__name__}: {error}")
            if request.transport is not None:
                request.transport.abort()
        return response

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield runner.addresses[0][1]
    finally:
        await runner.cleanup()
        os.close(fd)


async def ask(port: int) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 16)
    writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    await reader.readuntil(b"\r\n\r\n")
    return reader, writer


@pytest.mark.parametrize("cold", [False, True])
async def test_slow_readers_get_all_of_it_also_where_pages_are_cold(
    file: Path, monkeypatch: pytest.MonkeyPatch, cold: bool
) -> None:
    if cold:
        turns = itertools.cycle([True, False, False])
        monkeypatch.setattr(sending, "_in_page_cache", lambda *_: next(turns))
    ended: asyncio.Queue[str] = asyncio.Queue()

    async def read(port: int) -> bytes:
        reader, writer = await ask(port)
        found = bytearray()
        while len(found) < SIZE:
            piece = await reader.read(100_000)
            assert piece
            found += piece
            await asyncio.sleep(0)  # others have their turn: the sender finds the socket full again and again
        writer.close()
        return bytes(found)

    async with serving(file, ended) as port:
        descriptors = len(os.listdir("/proc/self/fd"))
        found = await asyncio.gather(*(read(port) for _ in range(4)))
        assert [await ended.get() for _ in range(4)] == [""] * 4
        assert set(found) == {DATA}
        async with asyncio.timeout(10):
            while len(os.listdir("/proc/self/fd")) > descriptors:
                await asyncio.sleep(0.01)


async def test_a_reader_that_goes_in_the_middle_ends_it(file: Path) -> None:
    ended: asyncio.Queue[str] = asyncio.Queue()
    async with serving(file, ended) as port, asyncio.timeout(10):
        reader, writer = await ask(port)
        await reader.readexactly(100_000)
        writer.transport.abort()
        assert await ended.get()


async def test_a_reader_of_whom_the_socket_says_first_that_he_has_gone_has_gone(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def gone(*_: object) -> int:
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    monkeypatch.setattr(os, "writev", gone)
    ended: asyncio.Queue[str] = asyncio.Queue()
    async with serving(file, ended, answered=True) as port, asyncio.timeout(10):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (await ended.get()).startswith("ConnectionResetError: the reader has gone")
        writer.close()


async def test_a_file_that_is_shorter_than_it_should_be_cuts_the_answer_off(file: Path) -> None:
    ended: asyncio.Queue[str] = asyncio.Queue()
    async with serving(file, ended, SIZE + 1000) as port, asyncio.timeout(10):
        reader, writer = await ask(port)
        with contextlib.suppress(ConnectionResetError):
            assert len(await reader.read(SIZE + 1)) <= SIZE
            while await reader.read(1 << 20):
                pass
        ours = "DadiError: a blob's file in the store is shorter"
        assert (await ended.get()).startswith(ours), "our own fault, not the reader's"
        writer.close()


async def test_who_is_cancelled_leaves_nothing_behind(file: Path) -> None:
    ended: asyncio.Queue[str] = asyncio.Queue()
    async with serving(file, ended) as port, asyncio.timeout(10):
        reader, writer = await ask(port)
        await reader.readexactly(100_000)
        sending = [task for task in asyncio.all_tasks() if "RequestHandler" in repr(task)]
        assert sending
        for task in sending:
            task.cancel()
        await asyncio.gather(*sending, return_exceptions=True)
        writer.close()
    assert ended.empty()


@pytest.mark.parametrize("slowly", [True, False])
async def test_who_takes_a_little_each_time_is_not_given_up_and_who_takes_nothing_is(
    file: Path, monkeypatch: pytest.MonkeyPatch, slowly: bool
) -> None:
    looks: asyncio.Queue[int] = asyncio.Queue()
    numbers = itertools.count()

    def taken(_: object) -> int:
        looks.put_nowait(1)
        return next(numbers) if slowly else 7

    monkeypatch.setattr(sending, "STALLED", 0.001)
    monkeypatch.setattr(sending, "_taken", taken)
    ended: asyncio.Queue[str] = asyncio.Queue()
    async with serving(file, ended) as port, asyncio.timeout(10):
        reader, writer = await ask(port)
        for _ in range(10 if slowly else 2):
            await looks.get()
        if slowly:
            assert await reader.readexactly(SIZE) == DATA
            assert await ended.get() == ""
        else:
            assert "does not read" in await ended.get()
        writer.close()


async def test_what_a_reader_has_taken_is_what_its_kernel_has_acknowledged(file: Path) -> None:
    ended: asyncio.Queue[str] = asyncio.Queue()
    async with serving(file, ended) as port, asyncio.timeout(10):
        _, writer = await ask(port)
        before = sending._taken(writer.transport)
        writer.write(b"GET /")
        while sending._taken(writer.transport) < before + 5:
            await asyncio.sleep(0.01)
        assert sending._taken(writer.transport) == before + 5
        writer.transport.abort()
        await ended.get()


async def test_a_disk_that_fails_is_told_as_our_own_fault(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sending, "_in_page_cache", lambda *_: False)
    monkeypatch.setattr(sending, "_read_ahead", fails)
    ended: asyncio.Queue[str] = asyncio.Queue()
    async with serving(file, ended) as port, asyncio.timeout(10):
        _, writer = await ask(port)
        assert (await ended.get()).startswith("DadiError: a blob's file cannot be sent: Input/output error")
        writer.close()


def test_a_hole_in_the_page_cache_is_found_though_both_ends_are_there(
    file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def preadv(fd: int, into: list[bytearray], at: int, flags: int) -> int:
        if 300 << 10 <= at < 428 << 10:
            raise BlockingIOError
        return 1

    monkeypatch.setattr(os, "preadv", preadv)
    assert not sending._in_page_cache(-1, 0, 1 << 20)
    assert sending._in_page_cache(-1, 1 << 20, 1 << 20)


async def test_an_error_in_the_middle_of_a_file_is_not_followed_by_what_would_be_taken_for_its_rest(file: Path) -> None:
    fd = await asyncio.to_thread(os.open, file, os.O_RDONLY)

    async def handle(request: web.Request) -> web.StreamResponse:
        answer = Answer(request, 200, {}, chunked=True)
        await answer.begin()
        try:
            await answer.file(fd, 0, SIZE + 1)
        except DadiError:
            await answer.write(b"an error, told where nobody would take it for one")
        await answer.end()
        return answer

    app = web.Application()
    app.router.add_get("/", handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        reader, writer = await ask(runner.addresses[0][1])
        async with asyncio.timeout(10):
            with contextlib.suppress(ConnectionResetError):
                received = await reader.read()
                while more := await reader.read(1 << 20):
                    received += more
                assert b"an error, told" not in received
            assert reader.at_eof() or reader.exception() is not None, "the connection is cut"
        writer.close()
    finally:
        await runner.cleanup()
        os.close(fd)
