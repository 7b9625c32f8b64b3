"""What a node answers to other nodes, over HTTP: bytes, "ask again", and every kind of no."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import zstandard
from structlog.testing import capture_logs

from dadi import http
from dadi.blobs.chain import Chain
from dadi.blobs.disk import DiskBlobs
from dadi.errors import AccessDenied, NotFound, StoreFull, TokenRefused
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob, blob_of
from dadi.peers import server as server_file
from dadi.peers import stream
from dadi.peers import upload as upload_file
from dadi.peers.frames import Frames
from dadi.peers.gate import OPEN
from dadi.peers.hops import HOPS
from dadi.peers.pressure import Pressure
from dadi.peers.server import PeerServer
from dadi.peers.upload import Upload
from tests.contracts.store import content
from tests.fakes.sources import ScriptedSource

C = 16 << 10
DATA = content(8 * C + 5)
TEXT = b"".join(b"%d green bottles\n" % n for n in range(9000))
BLOB, TEXT_BLOB, OTHER = blob_of(DATA, C), blob_of(TEXT, C), blob_of(content(3 * C, 7), C)


class Source(ScriptedSource):
    """Also remembers how many hops each read has come through."""

    def __init__(self) -> None:
        super().__init__((BLOB, DATA), (TEXT_BLOB, TEXT))
        self.hops: list[int] = []

    async def read(self, blob: Blob, chunks: range, *args: Any) -> list[bytes]:
        self.hops.append(HOPS.get())
        return await super().read(blob, chunks, *args)


class Served:
    def __init__(self, directory: Path, *, memory: float = 0.0, gate: Any = OPEN, rate: int = 0) -> None:
        self.store = DiskBlobs(directory / "store")
        self.source = Source()
        self.known = {blob.digest: blob for blob in (BLOB, TEXT_BLOB)}
        self.hurried: list[range] = []
        self.chain = Chain(self.store, self.source, patience=0.2, fallbacks=Fallbacks(),
                           hurry=lambda blob, chunks, urgency: self.hurried.append(chunks))  # fmt: skip
        self.upload = Upload(rate=rate, children=2)
        pressure = Pressure(memory=memory, cpu=0, root=directory)
        self.server = PeerServer(self.store, self.chain, Frames(1 << 20), self.upload, pressure,
                                 known=self.known.get, instead=lambda digest: "my-parent", gate=gate)  # fmt: skip

    async def start(self) -> None:
        self.runner, self.address = await http.serve_tcp(self.server.application(), "127.0.0.1:0")
        self.session = http.client(connect=1, read=5)

    async def close(self) -> None:
        await self.session.close()
        await self.runner.cleanup()
        await self.chain.close()
        await self.store.close()

    async def get(self, blob: Blob, span: str, **headers: str) -> tuple[aiohttp.ClientResponse, bytes]:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        url = f"http://{self.address}/v1/blobs/{blob.digest}"
        async with self.session.get(url, headers={"Range": f"bytes={span}", **named}) as response:
            return response, await response.read()


@pytest.fixture
async def served(tmp_path: Path) -> AsyncIterator[Served]:
    made = Served(tmp_path)
    await made.start()
    yield made
    await made.close()


async def test_what_is_here_is_sent_and_nothing_is_asked_for(served: Served) -> None:
    await served.store.keep(BLOB, 2, [DATA[2 * C : 3 * C], DATA[3 * C : 4 * C]])
    response, body = await served.get(BLOB, f"{2 * C}-{4 * C - 1}")
    assert (response.status, body) == (206, DATA[2 * C : 4 * C])
    assert response.headers["Content-Range"] == f"bytes {2 * C}-{4 * C - 1}/{len(DATA)}"
    assert served.source.asked == []


async def test_what_is_not_here_is_fetched_kept_and_sent(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setattr(server_file, "FIRST_SIGN", 20.0)
    response, body = await served.get(BLOB, f"{8 * C}-{len(DATA) - 1}", Dadi_Hops="3")
    assert (response.status, body) == (206, DATA[8 * C :])
    assert await served.store.missing(BLOB, range(8, 9)) == []
    assert served.source.hops == [4]


async def test_the_first_chunks_are_sent_while_the_others_are_fetched(served: Served) -> None:
    await served.store.keep(BLOB, 0, [DATA[:C], DATA[C : 2 * C]])
    served.source.gate = asyncio.Event()
    response, body = await served.get(BLOB, f"0-{6 * C - 1}")
    assert (response.status, body) == (206, DATA[: 2 * C])
    async with asyncio.timeout(5):
        while len(served.source.asked) < 4:
            await asyncio.sleep(0)
    assert served.source.chunks_asked == [2, 3, 4, 5]


async def test_who_asks_for_what_does_not_come_is_told_to_ask_again_and_it_is_fetched_once(
    served: Served, monkeypatch: Any
) -> None:
    served.source.gate = asyncio.Event()
    for _ in range(3):
        response, body = await served.get(BLOB, f"0-{C - 1}")
        assert (response.status, body, response.headers["Dadi-Waiting"]) == (202, b"", "1")
    monkeypatch.setattr(server_file, "FIRST_SIGN", 20.0)
    again = asyncio.create_task(served.get(BLOB, f"0-{C - 1}"))
    served.source.gate.set()
    response, body = await again
    assert (response.status, body) == (206, DATA[:C])
    assert served.source.asked == [range(1)]


async def test_a_chunk_that_cannot_be_kept_is_passed_on_all_the_same(served: Served, monkeypatch: Any) -> None:
    async def full(*args: object) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(served.store, "keep", full)
    response, body = await served.get(BLOB, f"0-{C - 1}")
    assert (response.status, body) == (206, DATA[:C])


async def test_compressed_it_is_a_frame_a_chunk_made_once(served: Served) -> None:
    await served.store.keep(TEXT_BLOB, 0, [TEXT[:C], TEXT[C : 2 * C]])
    for _ in range(2):
        response, body = await served.get(TEXT_BLOB, f"0-{2 * C - 1}", Accept_Encoding="zstd")
        assert response.headers["Content-Encoding"] == "zstd"
        assert response.headers["Content-Range"] == f"bytes 0-{2 * C - 1}/{len(TEXT)}"
        with zstandard.ZstdDecompressor().stream_reader(body, read_across_frames=True) as reader:
            assert reader.read(3 * C) == TEXT[: 2 * C]
        assert len(body) < C
    response, body = await served.get(TEXT_BLOB, f"0-{2 * C - 1}")
    assert (response.headers.get("Content-Encoding"), body) == (None, TEXT[: 2 * C])


async def test_what_does_not_compress_goes_plain_though_it_might(served: Served) -> None:
    await served.store.keep(BLOB, 0, [DATA[:C]])
    response, body = await served.get(BLOB, f"0-{C - 1}", Accept_Encoding="zstd")
    assert (response.headers.get("Content-Encoding"), body) == (None, DATA[:C])


async def test_a_blob_that_is_not_mounted_is_served_as_far_as_it_is_here(served: Served) -> None:
    await served.store.keep(OTHER, 0, [content(3 * C, 7)[:C]])
    response, body = await served.get(OTHER, f"0-{3 * C - 1}")
    assert (response.status, body) == (206, content(3 * C, 7)[:C])
    assert (await served.get(OTHER, f"{C}-{2 * C - 1}"))[0].status == 404
    assert (await served.get(blob_of(b"never heard of"), "0-5"))[0].status == 404
    assert served.source.asked == []


@pytest.mark.parametrize(
    "span", ["1-5", f"0-{C - 2}", f"5-{C - 1}", f"0-{2 * C - 2}", f"{len(DATA)}-{len(DATA) + 5}", "-5", "x", "5-1"]
)
async def test_anything_but_whole_chunks_is_refused(served: Served, span: str) -> None:
    response, _ = await served.get(BLOB, span)
    assert response.status == 400
    assert served.source.asked == []


async def test_a_third_child_is_sent_away_with_the_id_of_another(served: Served) -> None:
    await served.store.keep(BLOB, 0, [DATA[:C]])
    for child in ("a", "b", "a"):
        assert (await served.get(BLOB, f"0-{C - 1}", Dadi_Peer=child))[0].status == 206
    response, _ = await served.get(BLOB, f"0-{C - 1}", Dadi_Peer="c")
    assert response.status == 429
    assert int(response.headers["Retry-After"]) > 0
    assert response.headers["Dadi-Try"] == "my-parent"
    assert served.server.statistics()["children"] == ["a", "b"]


@pytest.mark.parametrize("streamed", [{}, {"Dadi-Stream": "1"}])
async def test_a_child_that_asks_and_does_not_read_has_so_much_under_way_and_no_more(
    served: Served, monkeypatch: Any, streamed: dict[str, str]
) -> None:
    monkeypatch.setattr(upload_file, "_MOST_ASKED", 3 * C)
    await served.store.keep(BLOB, 0, [DATA[:C]])
    stuck = asyncio.Event()
    sending = served.upload.sending

    @contextlib.asynccontextmanager
    async def slowly(*args: Any) -> AsyncIterator[None]:
        await stuck.wait()
        async with sending(*args):
            yield

    monkeypatch.setattr(served.upload, "sending", slowly)
    asks = [asyncio.ensure_future(served.get(BLOB, f"0-{C - 1}", Dadi_Peer="a", **streamed)) for _ in range(3)]
    while served.upload._asked["a"] < 3 * C:
        await asyncio.sleep(0.01)
    assert (await served.get(BLOB, f"0-{C - 1}", Dadi_Peer="a", **streamed))[0].status == 429
    stuck.set()
    assert {response.status for response, _ in await asyncio.gather(*asks)} <= {200, 206}
    assert (await served.get(BLOB, f"0-{C - 1}", Dadi_Peer="a", **streamed))[0].status in (200, 206)


async def test_so_much_is_fetched_for_a_child_and_no_more(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setattr(upload_file, "_MOST_ASKED", 3 * C)
    served.source.gate = asyncio.Event()
    for chunk in (0, 1, 2, 0, 1, 2):  # who asks again for what is being fetched asks for no more
        span = f"{chunk * C}-{(chunk + 1) * C - 1}"
        assert (await served.get(BLOB, span, Dadi_Peer="a"))[0].status == 202
    assert (await served.get(BLOB, f"{3 * C}-{4 * C - 1}", Dadi_Peer="a"))[0].status == 429
    assert (await served.get(BLOB, f"{3 * C}-{4 * C - 1}", Dadi_Peer="b"))[0].status == 202
    served.source.gate.set()
    while served.upload._fetched:
        await asyncio.sleep(0.01)
    assert (await served.get(BLOB, f"{4 * C}-{5 * C - 1}", Dadi_Peer="a"))[0].status == 206


async def test_a_child_that_hangs_up_while_it_is_sent_to_is_no_fault(served: Served) -> None:
    data = content(8 << 20)
    blob = blob_of(data, 256 << 10)
    await served.store.keep(blob, 0, [data[at : at + (256 << 10)] for at in range(0, len(data), 256 << 10)])
    host, _, port = served.address.rpartition(":")
    for more in ("", "Accept-Encoding: zstd\r\n", "Dadi-Stream: 1\r\n"):
        with socket.socket() as small:
            small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            small.setblocking(False)
            await asyncio.get_running_loop().sock_connect(small, (host, int(port)))
            head = f"GET /v1/blobs/{blob.digest} HTTP/1.1\r\nHost: x\r\nRange: bytes=0-{len(data) - 1}\r\n{more}\r\n"
            with capture_logs() as logs:
                await asyncio.get_running_loop().sock_sendall(small, head.encode())
                await asyncio.get_running_loop().sock_recv(small, 100)
                small.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                small.close()
                while served.upload._asked:
                    await asyncio.sleep(0.01)
                await asyncio.sleep(0)
        assert [line for line in logs if line["log_level"] == "error"] == []


async def test_a_node_short_of_memory_refuses_children(tmp_path: Path) -> None:
    (tmp_path / "memory").write_text("some avg10=50.00 avg60=0.00 avg300=0.00 total=0\n")
    served = Served(tmp_path, memory=0.3)
    await served.start()
    try:
        response, body = await served.get(BLOB, f"0-{C - 1}")
        assert response.status == 503
        assert response.headers["Retry-After"]
        assert b"memory" in body
        assert served.source.asked == []
    finally:
        await served.close()


class Closed:
    """A gate that lets nobody in."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    async def admit(self, headers: object, *blobs: str) -> None:
        raise self.error


@pytest.mark.parametrize(("error", "status"), [(TokenRefused("none"), 401), (AccessDenied("not this one"), 403)])
async def test_nothing_is_served_past_the_gate(tmp_path: Path, error: Exception, status: int) -> None:
    served = Served(tmp_path, gate=Closed(error))
    await served.start()
    try:
        await served.store.keep(BLOB, 0, [DATA[:C]])
        assert (await served.get(BLOB, f"0-{C - 1}"))[0].status == status
        assert (await served.get(OTHER, "0-5"))[0].status == status, "not even that a blob is not here is said"
    finally:
        await served.close()


def records(body: bytes) -> list[tuple[int, int, bytes]]:
    found = []
    while body:
        kind, chunk, length = stream.parse(body[: stream.SIZE])
        found.append((kind, chunk, body[stream.SIZE : stream.SIZE + length]))
        body = body[stream.SIZE + length :]
    return found


async def test_a_stream_has_each_chunk_once_those_that_are_here_first(served: Served) -> None:
    await served.store.keep(BLOB, 2, [DATA[2 * C : 3 * C], DATA[3 * C : 4 * C]])
    response, body = await served.get(BLOB, f"0-{len(DATA) - 1}", Dadi_Stream="1", Dadi_Hops="2")
    assert (response.status, response.content_type) == (200, stream.TYPE)
    sent = [record for record in records(body) if record[0] != stream.WAITS]
    assert [chunk for _, chunk, _ in sent[:2]] == [2, 3]
    assert sorted(sent) == [(stream.PLAIN, n, DATA[n * C : (n + 1) * C]) for n in range(9)]
    assert served.source.chunks_asked == [0, 1, 4, 5, 6, 7, 8]
    assert set(served.source.hops) == {3}


async def test_a_stream_shows_that_it_is_alive_while_it_waits(served: Served) -> None:
    served.source.gate = asyncio.Event()
    url = f"http://{served.address}/v1/blobs/{BLOB.digest}"
    headers = {"Range": f"bytes=0-{2 * C - 1}", stream.HEADER: "1"}
    async with asyncio.timeout(5), served.session.get(url, headers=headers) as response:
        for _ in range(2):
            assert await response.content.readexactly(stream.SIZE) == stream.WAITING
        served.source.gate.set()
        left = [record for record in records(await response.read()) if record[0] != stream.WAITS]
    assert sorted(left) == [(stream.PLAIN, n, DATA[n * C : (n + 1) * C]) for n in range(2)]
    assert sorted(served.source.chunks_asked) == [0, 1]


async def test_a_stream_that_cannot_go_on_says_why(served: Served) -> None:
    await served.store.keep(OTHER, 0, [content(3 * C, 7)[:C]])
    _, body = await served.get(OTHER, f"0-{3 * C - 1}", Dadi_Stream="1")
    (first, last) = records(body)
    assert first == (stream.PLAIN, 0, content(3 * C, 7)[:C])
    assert last[0] == stream.ERROR
    assert isinstance(stream.error_of(last[2], "peer")[0], NotFound)
    assert (await served.get(OTHER, f"{C}-{2 * C - 1}", Dadi_Stream="1"))[0].status == 404


async def test_a_stream_has_frames_where_they_pay(served: Served) -> None:
    await served.store.keep(TEXT_BLOB, 0, [TEXT[:C], TEXT[C : 2 * C]])
    _, body = await served.get(TEXT_BLOB, f"0-{2 * C - 1}", Dadi_Stream="1", Accept_Encoding="zstd")
    assert [(kind, chunk) for kind, chunk, _ in records(body)] == [(stream.FRAME, 0), (stream.FRAME, 1)]
    assert zstandard.decompress(records(body)[1][2]) == TEXT[C : 2 * C]


async def test_a_stream_of_scattered_chunks_has_them_and_no_others(served: Served) -> None:
    await served.store.keep(BLOB, 4, [DATA[4 * C : 5 * C]])
    response, body = await served.get(BLOB, f"0-{2 * C - 1}", Dadi_Stream="1", Dadi_Chunks="0-1,4,8")
    assert response.headers[stream.CHUNKS] == "1"
    sent = sorted(record for record in records(body) if record[0] != stream.WAITS)
    assert sent == [(stream.PLAIN, n, DATA[n * C : (n + 1) * C]) for n in (0, 1, 4, 8)]
    assert served.source.chunks_asked == [0, 1, 8]


@pytest.mark.parametrize("chunks", ["", "0-9", "8-1", "1,0", "0,x", "0-999999999"])
async def test_chunks_that_a_blob_has_not_are_refused(served: Served, chunks: str) -> None:
    response, _ = await served.get(BLOB, f"0-{C - 1}", Dadi_Stream="1", Dadi_Chunks=chunks)
    assert response.status == 400
    assert served.source.asked == []


async def test_one_request_names_no_more_chunks_than_a_range_may_have(served: Served, monkeypatch: Any) -> None:
    monkeypatch.setattr(server_file, "_LARGEST", 3 * C)
    assert (await served.get(BLOB, f"0-{C - 1}", Dadi_Stream="1", Dadi_Chunks="0-1,4"))[0].status == 200
    assert (await served.get(BLOB, f"0-{C - 1}", Dadi_Stream="1", Dadi_Chunks="0-1,4,6"))[0].status == 400


@pytest.mark.parametrize(
    ("version", "more", "status", "ends"),
    [("1.1", "Connection: close\r\n", 206, True), ("1.1", "", 206, False), ("1.0", "", 206, True),
     ("1.0", "Connection: keep-alive\r\n", 206, False), ("1.0", "Dadi-Stream: 1\r\n", 400, True)],
)  # fmt: skip
async def test_connections_are_kept_as_http_has_it(
    served: Served, version: str, more: str, status: int, ends: bool
) -> None:
    await served.store.keep(BLOB, 0, [DATA[:C]])
    host, _, port = served.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    try:
        target = f"/v1/blobs/{BLOB.digest}"
        writer.write(f"GET {target} HTTP/{version}\r\nHost: x\r\nRange: bytes=0-{C - 1}\r\n{more}\r\n".encode())
        async with asyncio.timeout(5):
            head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
            assert head.split()[1] == str(status)
            assert "\r\ndate: " in head
            body = await reader.read() if ends else await reader.readexactly(C)
        assert status != 206 or body == DATA[:C]
        assert ("connection: close" in head or version == "1.0") or not ends
        assert "connection: keep-alive" in head or version == "1.1" or ends
    finally:
        writer.close()
        await writer.wait_closed()
