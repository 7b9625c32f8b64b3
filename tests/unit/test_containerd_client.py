"""The client of containerd's API over a channel that answers what a test says: errors, ends, headers, streams."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any

import grpc
import pytest

from dadi import errors
from dadi.containerd import client
from dadi.containerd.client import Containerd
from dadi.containerd.proto import content_pb2 as content
from dadi.containerd.proto import introspection_pb2
from dadi.errors import DadiError
from dadi.oci.manifest import Descriptor

Code = grpc.StatusCode
BLOB = Descriptor("application/x", "sha256:" + "a" * 64, 5)


def failure(code: grpc.StatusCode, details: str = "why") -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details)


class Stream:
    """A call of which the test says what `read` gives: messages, or errors to be raised; then it is silent."""

    def __init__(self, *answers: Any) -> None:
        self.answers = list(answers)
        self.sent: list[Any] = []
        self.cancelled = False

    async def write(self, message: Any) -> None:
        self.sent.append(message)

    async def read(self) -> Any:
        if not self.answers:
            await asyncio.Event().wait()
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def cancel(self) -> None:
        self.cancelled = True


class Channel:
    """A grpc channel; `answer` is called with the method's name, or is raised, or returned."""

    def __init__(self, answer: Any = None) -> None:
        self.answer = answer
        self.calls: list[tuple[str, Any, float | None, list[tuple[str, str]]]] = []

    def _method(self, path: str, **_: Any) -> Callable[..., Any]:
        name = path.rpartition("/")[2]

        async def call(request: Any, *, timeout: float | None = None, metadata: Any = ()) -> Any:
            self.calls.append((name, request, timeout, list(metadata)))
            if isinstance(self.answer, Exception):
                raise self.answer
            return self.answer(name) if callable(self.answer) else self.answer

        return call

    def _stream(self, path: str, **_: Any) -> Callable[..., Any]:
        def call(request: Any = None, *, metadata: Any = ()) -> Any:
            self.calls.append((path.rpartition("/")[2], request, None, list(metadata)))
            return self.answer

        return call

    unary_unary = _method
    unary_stream = stream_stream = _stream


def containerd(channel: Channel) -> Containerd:
    return Containerd(channel, "/run/c.sock", "ns")


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (Code.NOT_FOUND, errors.NotFound), (Code.ALREADY_EXISTS, errors.AlreadyExists),
        (Code.FAILED_PRECONDITION, errors.Conflict), (Code.INVALID_ARGUMENT, errors.InvalidRequest),
        (Code.PERMISSION_DENIED, errors.AccessDenied), (Code.RESOURCE_EXHAUSTED, errors.StoreFull),
        (Code.UNAVAILABLE, errors.Unavailable), (Code.DEADLINE_EXCEEDED, errors.Unavailable),
        (Code.UNIMPLEMENTED, errors.Unsupported), (Code.UNKNOWN, DadiError), (Code.INTERNAL, DadiError),
    ],
)  # fmt: skip
async def test_status_codes_become_our_errors(code: grpc.StatusCode, error: type[DadiError]) -> None:
    with pytest.raises(error, match="containerd: ") as raised:
        await containerd(Channel(failure(code))).commit("dadi", "name", "key", {})
    assert type(raised.value) is error


async def test_what_is_not_there_is_no_error_where_that_was_the_question() -> None:
    machine = containerd(Channel(failure(Code.NOT_FOUND)))
    assert await machine.image("x") is None
    assert not await machine.has_snapshot("dadi", "x")
    await machine.check_snapshotter("dadi")


@pytest.mark.parametrize(
    ("code", "details", "hint"),
    [
        (Code.INVALID_ARGUMENT, "snapshotter not loaded: dadi: invalid argument", "containerd-config"),
        (Code.UNAVAILABLE, 'connection error: desc = "transport: Error while dialing dial unix /run/x"', "dadi-node"),
        (Code.UNAVAILABLE, "failed to connect to all addresses; last error: UNKNOWN: unix:/x", "is containerd running"),
    ],
)
async def test_errors_that_have_a_remedy_say_it(
    code: grpc.StatusCode, details: str, hint: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client, "_DIALS", 0.2)  # seconds that a snapshotter has to come up
    with pytest.raises(DadiError) as raised:
        await containerd(Channel(failure(code, details))).prepare("dadi", "key", "", {})
    assert hint in (raised.value.hint or "")


async def test_every_call_has_an_end_and_says_its_namespace_and_lease() -> None:
    channel = Channel(failure(Code.UNAVAILABLE))
    machine = containerd(channel).under("lease-1")
    every = [
        machine.create_lease("l", {}), machine.delete_lease("l", collect=True), machine.hold_snapshot("l", "dadi", "n"),
        machine.info("d"), machine.label("d", {"a": "b"}), machine.abort("n"), machine.prepare("dadi", "k", "", {}),
        machine.check_snapshotter("dadi"), machine.has_snapshot("dadi", "n"), machine.commit("dadi", "n", "k", {}),
        machine.remove("dadi", "k"), machine.apply(BLOB, []), machine.image("n"), machine.set_image("n", BLOB),
        machine.plugins(),
    ]  # fmt: skip
    for call in every:
        with pytest.raises(errors.Unavailable):
            await call
    assert len(channel.calls) == len(every)
    for name, _, timeout, metadata in channel.calls:
        assert timeout is not None, name
        assert 0 < timeout <= client.LONG
        assert metadata == [("containerd-namespace", "ns"), ("containerd-lease", "lease-1")]


async def test_an_image_that_comes_and_goes_is_made_or_changed() -> None:
    outcomes = iter([Code.ALREADY_EXISTS, Code.NOT_FOUND, None])

    def answer(name: str) -> None:
        code = next(outcomes)
        if code is not None:
            raise failure(code)

    channel = Channel(answer)
    await containerd(channel).set_image("n", BLOB)
    assert [call[0] for call in channel.calls] == ["Create", "Update", "Create"]
    assert list(channel.calls[1][1].update_mask.paths) == ["target"], "labels of others stay"

    outcomes = iter([Code.ALREADY_EXISTS, Code.NOT_FOUND] * 10)
    with pytest.raises(errors.Conflict):
        await containerd(channel).set_image("n", BLOB)


async def test_plugins_with_and_without_an_error() -> None:
    rows = [
        introspection_pb2.Plugin(type="t", id="good", exports={"address": "/x"}),
        introspection_pb2.Plugin(type="t", id="bad", init_err=introspection_pb2.Status(code=2, message="why")),
    ]
    good, bad = await containerd(Channel(introspection_pb2.PluginsResponse(plugins=rows))).plugins()
    assert (good.id, good.exports, good.error) == ("good", {"address": "/x"}, "")
    assert (bad.id, bad.error) == ("bad", "why")


# ---- content


def at(offset: int) -> Any:
    return content.WriteContentResponse(offset=offset)


def source(*pieces: bytes) -> tuple[Callable[[], AsyncGenerator[bytes, None]], list[str]]:
    events: list[str] = []

    async def generate() -> AsyncGenerator[bytes, None]:
        events.append("begun")
        try:
            for piece in pieces:
                yield piece
        finally:
            events.append("closed")

    return generate, events


async def test_a_blob_is_written_in_large_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_MESSAGE", 3)
    stream = Stream(at(0), at(4), at(5), at(5))
    pieces, events = source(b"a", b"b", b"cd", b"e")
    assert await containerd(Channel(stream)).write("name", BLOB.digest, 5, pieces)
    first, *rest = stream.sent
    assert (first.action, first.ref, first.total, first.expected) == (content.STAT, "name", 5, BLOB.digest)
    assert [(row.action, row.offset, row.data) for row in rest] == [
        (content.WRITE, 0, b"abcd"), (content.WRITE, 4, b"e"), (content.COMMIT, 5, b""),
    ]  # fmt: skip
    assert events == ["begun", "closed"]
    assert stream.cancelled


@pytest.mark.parametrize("answers", [[failure(Code.ALREADY_EXISTS)], [at(5), at(5)]])
async def test_a_blob_that_is_there_is_not_fetched(answers: list[Any]) -> None:
    pieces, events = source(b"never")
    assert not await containerd(Channel(Stream(*answers))).write("name", BLOB.digest, 5, pieces)
    assert events == []


@pytest.mark.parametrize(
    ("answers", "error"),
    [
        ([at(0), at(5), failure(Code.FAILED_PRECONDITION, "unexpected commit digest")], errors.Conflict),
        ([at(0), grpc.aio.EOF], errors.Unavailable),
        ([at(0)], errors.Unavailable),
    ],
)
async def test_a_writing_that_fails_or_hangs_ends(
    monkeypatch: pytest.MonkeyPatch, answers: list[Any], error: type[DadiError]
) -> None:
    monkeypatch.setattr(client, "QUICK", 0.05)
    stream = Stream(*answers)
    pieces, events = source(b"abcde")
    with pytest.raises(error):
        await containerd(Channel(stream)).write("name", BLOB.digest, 5, pieces)
    assert events == ["begun", "closed"]
    assert stream.cancelled


async def test_a_small_blob_is_read_and_a_large_one_refused() -> None:
    def parts() -> Stream:
        return Stream(content.ReadContentResponse(data=b"abc"), content.ReadContentResponse(data=b"de"), grpc.aio.EOF)

    assert await containerd(Channel(parts())).read(BLOB.digest, 5) == b"abcde"
    with pytest.raises(errors.TooLarge):
        await containerd(Channel(parts())).read(BLOB.digest, 4)
    with pytest.raises(errors.NotFound):
        await containerd(Channel(Stream(failure(Code.NOT_FOUND)))).read(BLOB.digest, 4)
