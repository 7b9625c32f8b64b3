"""Downloads from a registry that cuts, stalls, lies and goes away: whatever happens, no wrong bytes come out."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi.errors import (
    DadiError,
    DigestMismatch,
    InvalidRequest,
    Unavailable,
    Unsupported,
)
from dadi.oci.config import RegistryConfig
from dadi.oci.credentials import FixedCredentials
from dadi.oci.manifest import Descriptor
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient
from tests.fakes.clients import DATA, MakeClient, blob, ranges, read, ref
from tests.fakes.registry import FakeRegistry, FakeTime, Fault, cut, redirect, status


async def test_a_blob_is_read_whole_or_from_an_offset(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    assert await read(client, ref(registry), descriptor) == DATA
    assert await read(client, ref(registry), descriptor, offset=999_999) == DATA[-1:]
    assert await read(client, ref(registry), descriptor, offset=1_000_000) == b""
    assert ranges(registry) == [None, "bytes=999999-999999"]
    for offset in (-1, 1_000_001):
        with pytest.raises(InvalidRequest):
            client.blob(ref(registry), descriptor, offset=offset)


async def test_an_empty_blob_needs_no_request(client: RegistryClient, registry: FakeRegistry) -> None:
    assert await read(client, ref(registry), blob(registry, b"")) == b""
    assert registry.seen == []


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_download_that_is_cut_goes_on_where_it_stopped(
    client: RegistryClient, registry: FakeRegistry, time: FakeTime, chunked: bool
) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", *[cut(100_000, chunked=chunked)] * 7)
    assert await read(client, ref(registry), descriptor) == DATA
    assert ranges(registry) == [None, *(f"bytes={n * 100_000}-999999" for n in range(1, 8))]
    # Each cut came after progress, so patience never ran out and the waits did not grow.
    assert time.slept == [0.2] * 7
    assert client.statistics()["resumed"] == 7


async def test_a_trickle_is_no_progress(client: RegistryClient, registry: FakeRegistry, time: FakeTime) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", *[cut(1000)] * 50)
    with pytest.raises(Unavailable, match="gave up after 6 attempts"):
        await read(client, ref(registry), descriptor)
    assert time.slept == [0.2, 0.4, 0.8, 1.6, 3.2]


async def test_a_200_to_a_range_request_does_not_put_wrong_bytes_in(
    client: RegistryClient, registry: FakeRegistry
) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", cut(300_000), cut(700_000, ignore_range=True), Fault(ignore_range=True, chunked=True))
    assert await read(client, ref(registry), descriptor) == DATA
    assert len(ranges(registry)) == 3


async def test_a_200_that_never_gets_further_is_given_up(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", cut(500_000), *[cut(500_000, ignore_range=True)] * 20)
    with pytest.raises(Unavailable):
        await read(client, ref(registry), descriptor)
    assert len(ranges(registry)) == 1 + 5


@pytest.mark.parametrize(
    "content_range",
    [
        "",
        "bytes 0-699999/1000000",
        "bytes 300001-999999/1000000",
        "bytes 300000-999998/1000000",
        "bytes */1000000",
        "x",
    ],
)
async def test_a_206_with_other_bytes_is_refused(
    client: RegistryClient, registry: FakeRegistry, content_range: str
) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", cut(300_000), Fault(headers={"Content-Range": content_range}))
    assert await read(client, ref(registry), descriptor) == DATA
    assert len(ranges(registry)) == 3


async def test_a_206_of_another_blob_is_refused(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    wrong = Fault(headers={"Content-Range": "bytes 300000-999999/1000001"})
    registry.script("/blobs/", cut(300_000), wrong, wrong)
    with pytest.raises(DigestMismatch, match="1000001"):
        await read(client, ref(registry), descriptor)


async def test_a_body_that_goes_on_too_long_is_refused(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    short = Descriptor("", descriptor.digest, 10)
    registry.script("/blobs/", *[Fault(chunked=True)] * 3)
    with pytest.raises(DigestMismatch, match="longer"):
        await read(client, ref(registry), short)


async def test_a_registry_that_stalls_is_left_and_asked_again(make: MakeClient, registry: FakeRegistry) -> None:
    client = make(read_timeout=0.05)
    descriptor = blob(registry)
    registry.script("/blobs/", Fault(stall_after=400_000), Fault(stall_after=0))
    assert await read(client, ref(registry), descriptor) == DATA
    assert ranges(registry) == [None, "bytes=400000-999999", "bytes=400000-999999"]


async def test_dropped_connections_are_made_again(
    client: RegistryClient, registry: FakeRegistry, time: FakeTime
) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", Fault(drop=True), Fault(drop=True), Fault(drop=True))
    assert await read(client, ref(registry), descriptor) == DATA
    assert len(time.slept) in (1, 2, 3)  # the HTTP library repeats a request once on a kept connection by itself


async def test_a_registry_that_does_not_listen_is_unavailable(make: MakeClient, time: FakeTime) -> None:
    async with FakeRegistry() as gone:
        pass
    client = make(plain_http=(gone.host,), retries=2)
    with pytest.raises(Unavailable, match=r"no connection to 127\.0\.0\.1:\d+: .*gave up after 3 attempts"):
        await client.resolve(ref(gone))
    assert time.slept == [0.2, 0.4]


async def test_a_registry_that_does_not_accept_connections_is_given_up(make: MakeClient) -> None:
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # fill the queue, so that the kernel does not answer any more
            client_socket = stack.enter_context(socket.socket())
            client_socket.setblocking(False)
            client_socket.connect_ex(server.getsockname())
        host = f"127.0.0.1:{server.getsockname()[1]}"
        client = make(plain_http=(host,), connect_timeout=0.05, retries=0)
        with pytest.raises(Unavailable, match=r"no connection to .* within 0\.05 s"):
            await client.resolve(Reference.parse(f"{host}/a:1"))


@pytest.mark.parametrize(
    "answer",
    [
        b"SSH-2.0-x\r\n",
        b"\x00" * 100,
        b"HTTP/1.1 999999 x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nA: " + b"a" * 100_000 + b"\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
async def test_what_does_not_speak_http_is_unavailable(make: MakeClient, answer: bytes) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(answer)
        writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
        host = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        client = make(plain_http=(host,), retries=1)
        with pytest.raises(Unavailable, match=host):
            await client.manifest(Reference.parse(f"{host}/a:1"))


_faults = st.lists(
    st.builds(
        Fault,
        cut_after=st.none() | st.integers(0, 1_000_000),
        ignore_range=st.booleans(),
        chunked=st.booleans(),
    )
    | st.sampled_from([Fault(drop=True), status(503), status(429, Retry_After="1"), status(500), redirect("/v2/x")])
    | st.integers(0, 10).map(lambda n: Fault(headers={"Content-Range": f"bytes {n * 100_000}-999999/1000000"})),
    max_size=8,
)


@given(_faults, st.integers(0, 1_000_000))
@settings(max_examples=40)
def test_whatever_goes_wrong_no_wrong_bytes_come_out(faults: list[Fault], offset: int) -> None:
    async def run() -> None:
        async with FakeRegistry() as registry:
            config = RegistryConfig(plain_http=(registry.host,), retries=3)
            client = RegistryClient(config, credentials=FixedCredentials(), clock=FakeTime().clock())
            descriptor = blob(registry)
            registry.script("/blobs/", *faults)
            got = b""
            try:
                async for piece in client.blob(ref(registry), descriptor, offset=offset):
                    got += piece
                assert got == DATA[offset:]
            except DadiError:
                assert faults
                assert DATA[offset:].startswith(got)
            finally:
                await client.close()

    asyncio.run(run())


async def test_a_reader_may_leave_early(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    async with contextlib.aclosing(client.blob(ref(registry), descriptor)) as pieces:
        first = await anext(pieces)
    assert DATA.startswith(first)
    assert await read(client, ref(registry), descriptor) == DATA


async def test_a_cancelled_reader_leaves_the_client_usable(make: MakeClient, registry: FakeRegistry) -> None:
    client = make()
    descriptor = blob(registry)
    stalled = asyncio.Event()
    registry.script("/blobs/", Fault(stall_after=10, after=stalled.set))
    task = asyncio.create_task(read(client, ref(registry), descriptor))
    await stalled.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await read(client, ref(registry), descriptor) == DATA


async def test_ranges_are_exact(client: RegistryClient, registry: FakeRegistry) -> None:
    descriptor = blob(registry)
    assert await client.blob_range(ref(registry), descriptor, 1000, 5) == DATA[1000:1005]
    assert await client.blob_range(ref(registry), descriptor, 0, 5) == DATA[:5]
    assert await client.blob_range(ref(registry), descriptor, 999_000, 1000) == DATA[-1000:]
    assert await client.blob_range(ref(registry), descriptor, 0, 1_000_000) == DATA
    assert await client.blob_range(ref(registry), descriptor, 7, 0) == b""
    registry.script("/blobs/", cut(2000))
    assert await client.blob_range(ref(registry), descriptor, 10, 5000) == DATA[10:5010]
    for offset, length in ((-1, 5), (0, -1), (999_999, 2)):
        with pytest.raises(InvalidRequest):
            await client.blob_range(ref(registry), descriptor, offset, length)


@pytest.mark.parametrize("offset", [0, 1000])
async def test_a_registry_without_ranges_is_said_to_have_none(
    client: RegistryClient, registry: FakeRegistry, offset: int
) -> None:
    descriptor = blob(registry)
    registry.script("/blobs/", Fault(ignore_range=True))
    with pytest.raises(Unsupported, match="whole blob"):
        await client.blob_range(ref(registry), descriptor, offset, 5)
    assert len(registry.seen) == 1
