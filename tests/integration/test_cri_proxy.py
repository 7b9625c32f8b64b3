"""The image service proxy between a gRPC client and a gRPC server that plays containerd."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from dadi.containerd import cri
from dadi.containerd.proto import cri_pull_pb2 as pb
from dadi.errors import Conflict
from dadi.fallbacks import Fallbacks
from dadi.oci.credentials import Credentials
from dadi.oci.keychain import PullSecrets

NAME = "r.example/team/app"
ME = Credentials("me", "hush-hush")
PULL, V1 = "/runtime.v1.ImageService/PullImage", "/runtime.v1.ImageService/"
OPTIONS = [("grpc.max_receive_message_length", 64 << 20), ("grpc.max_send_message_length", 64 << 20)]


class FakeContainerd(grpc.GenericRpcHandler):
    """Answers each request with its own bytes, or with what `answers` or `fails` say; remembers what it saw."""

    def __init__(self, pulls: PullSecrets) -> None:
        self.pulls = pulls
        self.answers: list[bytes] | None = None
        self.fails: tuple[grpc.StatusCode, str] | None = None
        self.waits: asyncio.Event | None = None
        self.cancelled = asyncio.Event()
        self.called = asyncio.Event()
        self.seen: list[tuple[str, dict[str, Any], float | None, Credentials | None]] = []

    def service(self, details: Any) -> Any:
        async def handle(request: bytes, context: Any) -> None:
            metadata = dict(context.invocation_metadata())
            self.seen.append((details.method, metadata, context.time_remaining(), self.pulls.find(NAME)))
            self.called.set()
            try:
                if self.waits:
                    await self.waits.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                raise
            await context.send_initial_metadata([("early", "1"), ("raw-bin", b"\x00\xff")])
            if self.fails:
                await context.abort(*self.fails, (("late", "2"),))
            for answer in [request] if self.answers is None else self.answers:
                await context.write(answer)
            context.set_trailing_metadata([("late", "2")])

        return grpc.unary_stream_rpc_method_handler(handle)


class World:
    """The fake containerd, the proxy, and a client of the proxy."""

    def __init__(self, directory: Path) -> None:
        self.pulls, self.fallbacks = PullSecrets(), Fallbacks()
        self.containerd = FakeContainerd(self.pulls)
        self.there, self.here = directory / "containerd.sock", directory / "run" / "cri.sock"

    async def start_containerd(self) -> None:
        self.server = grpc.aio.server(handlers=[self.containerd], options=OPTIONS)
        self.server.add_insecure_port(f"unix:{self.there}")
        await self.server.start()

    def call(self, method: str, request: bytes, **how: Any) -> Any:
        return self.channel.unary_unary(method)(request, **{"timeout": 20, **how})

    async def fails(self, method: str, request: bytes, **how: Any) -> Any:
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            await self.call(method, request, **how)
        return failure.value


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[World]:
    world = World(tmp_path)
    await world.start_containerd()
    proxying = await cri.serve(world.here, str(world.there), world.pulls, world.fallbacks)
    async with grpc.aio.insecure_channel(f"unix:{world.here}", options=OPTIONS) as world.channel:
        yield world
    await proxying.stop()
    await world.server.stop(0)
    assert not world.here.exists()


def pull(image: str = NAME, **auth: str) -> bytes:
    auth = auth or {"username": ME.username, "password": ME.password}
    return bytes(pb.PullImageRequest(image=pb.ImageSpec(image=image), auth=pb.AuthConfig(**auth)).SerializeToString())


@pytest.mark.parametrize("method", [V1 + "ListImages", V1 + "OfTomorrow", "/runtime.v1alpha2.ImageService/ImageStatus"])
async def test_bytes_and_metadata_go_through_as_they_are(world: World, method: str) -> None:
    request = os.urandom(100)
    call = world.call(method, request, metadata=[("mine", "x"), ("raw-bin", b"\x01\xfe")], timeout=7)
    assert await call == request
    ((seen, metadata, remaining, _),) = world.containerd.seen
    assert seen == method
    assert (metadata["mine"], metadata["raw-bin"]) == ("x", b"\x01\xfe")
    assert remaining is not None
    assert 0 < remaining <= 7.5, "gRPC rounds it up"
    assert dict(await call.initial_metadata()) == {"early": "1", "raw-bin": b"\x00\xff"}
    assert dict(await call.trailing_metadata())["late"] == "2"


async def test_large_messages_and_streams_of_answers_go_through(world: World) -> None:
    large = os.urandom(20 << 20)
    assert await world.call(V1 + "ListImages", large) == large
    world.containerd.answers = [b"1", b"", b"3"]
    stream = world.channel.unary_stream(V1 + "StreamImages")(b"")
    assert [answer async for answer in stream] == [b"1", b"", b"3"]


@pytest.mark.parametrize("method", ["/runtime.v1.RuntimeService/Version", "/containerd.services.images.v1.Images/List"])
async def test_no_other_service_is_passed_on(world: World, method: str) -> None:
    error = await world.fails(method, b"")
    assert error.code() is grpc.StatusCode.UNIMPLEMENTED
    assert "--container-runtime-endpoint" in error.details()
    assert world.containerd.seen == []


@pytest.mark.parametrize("service", ["runtime.v1", "runtime.v1alpha2"])
async def test_a_pull_secret_is_known_before_containerd_has_the_pull(world: World, service: str) -> None:
    request = pull()
    assert await world.call(f"/{service}.ImageService/PullImage", request) == request
    assert [seen[3] for seen in world.containerd.seen] == [ME]
    assert world.pulls.find(NAME) == ME
    assert world.pulls.find("r.example/team/other") is None


async def test_the_secret_of_a_pull_that_failed_is_forgotten_unless_it_was_good_before(world: World) -> None:
    world.containerd.fails = (grpc.StatusCode.UNKNOWN, "401 Unauthorized")
    error = await world.fails(PULL, pull())
    assert (error.code(), error.details()) == (grpc.StatusCode.UNKNOWN, "401 Unauthorized")
    assert dict(error.trailing_metadata())["late"] == "2"
    assert world.containerd.seen[0][3] == ME
    assert world.pulls.find(NAME) is None
    world.containerd.fails = None
    await world.call(PULL, pull())
    world.containerd.fails = (grpc.StatusCode.UNAVAILABLE, "the registry is away")
    error = await world.fails(PULL, pull())
    assert error.details() == "the registry is away"
    assert world.pulls.find(NAME) == ME


async def test_a_pull_that_is_cancelled_is_cancelled_in_containerd(world: World) -> None:
    world.containerd.waits = asyncio.Event()
    call = world.call(PULL, pull())
    await asyncio.wait_for(world.containerd.called.wait(), 20)
    call.cancel()
    await asyncio.wait_for(world.containerd.cancelled.wait(), 20)
    async with asyncio.timeout(20):
        while world.pulls.find(NAME) is not None:
            await asyncio.sleep(0.01)


async def test_a_deadline_ends_the_call_in_containerd_too(world: World) -> None:
    world.containerd.waits = asyncio.Event()
    error = await world.fails(PULL, pull(), timeout=0.3)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await asyncio.wait_for(world.containerd.cancelled.wait(), 20)


@pytest.mark.parametrize("request_", [b"\xff\xff", pull("Not An Image"), pull(auth="hush-hush")])
async def test_what_cannot_be_understood_is_passed_on_and_noted(world: World, request_: bytes) -> None:
    assert await world.call(PULL, request_) == request_
    (noted,) = world.fallbacks.statistics()
    assert noted["kind"] == cri.NOT_REMEMBERED
    assert "hush" not in repr(noted)
    assert len(world.pulls) == 0


async def test_while_containerd_is_away_the_error_says_so_and_then_it_goes_on(world: World) -> None:
    await world.server.stop(0)
    error = await world.fails(V1 + "ListImages", b"x")
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    assert f"dadi-node cannot reach containerd at {world.there} (cri.containerd" in error.details()
    await world.start_containerd()
    async with asyncio.timeout(20):
        while True:
            try:
                assert await world.call(V1 + "ListImages", b"x") == b"x"
                break
            except grpc.aio.AioRpcError:
                await asyncio.sleep(0.05)


async def test_a_socket_that_is_served_is_left_to_who_serves_it(world: World) -> None:
    with pytest.raises(Conflict, match="another process listens"):
        await cri.serve(world.here, str(world.there), world.pulls, world.fallbacks)
    assert await world.call(V1 + "ListImages", b"x") == b"x"
