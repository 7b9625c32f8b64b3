"""The directory's client: which superpeer is told what, who stands in, what names mean."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import msgspec
import pytest
from aiohttp import web
from hypothesis import given
from hypothesis import strategies as st

from dadi import http
from dadi.errors import ConfigError, DadiError, Unavailable, Unreachable
from dadi.fallbacks import Fallbacks
from dadi.peers.directory_client import DirectoryClient
from dadi.peers.owners import owners
from dadi.peers.places import Fault, Heartbeat, Join, Peer, Place, Told
from dadi.peers.superpeers import Superpeers

BLOBS = ["sha256:" + f"{number:064x}" for number in range(20)]
ME = Peer("me", "10.0.0.1:7071", "z", "r")


class FakeDirectory:
    """Gives everybody the place of a first node, and remembers what it was told. `answer` replaces that."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.answer: bytes | None = None
        self.busy: int | None = None
        """Seconds after which whoever joins is told to come again."""

    async def handle(self, request: web.Request) -> web.Response:
        body = msgspec.json.decode(await request.read() or b"{}")
        self.seen.append((request.match_info.get("verb", "trees"), body))
        if self.busy is not None:
            raise Unavailable("many nodes join just now", retry_after=self.busy - 1)
        if self.answer is not None:
            return web.Response(body=self.answer)
        if request.method == "GET":
            return web.json_response({"trees": {blob: [] for blob in request.query.getall("blob")}})
        place = Place(1, 1)
        blobs = body.get("blobs", ())
        places = {b if isinstance(b, str) else b["blob"]: place for b in blobs}
        return web.Response(body=msgspec.json.encode({"places": places, "heartbeat": 7.0}))

    def blobs(self, verb: str) -> list[str]:
        told = [blob for seen, body in self.seen if seen == verb for blob in body["blobs"]]
        return sorted(blob if isinstance(blob, str) else blob["blob"] for blob in told)

    async def serve(self, port: int = 0) -> tuple[web.AppRunner, str]:
        app = http.application()
        app.router.add_post("/v1/peers/{verb}", self.handle)
        app.router.add_get("/v1/peers", self.handle)
        runner, address = await http.serve_tcp(app, f"127.0.0.1:{port}")
        return runner, f"http://{address}"


class Pair:
    """Two directories that answer, and a client of both."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.directories: dict[str, FakeDirectory] = {}
        self.runners: dict[str, web.AppRunner] = {}
        self.fallbacks = Fallbacks()

    async def start(self) -> None:
        for _ in range(2):
            directory = FakeDirectory()
            runner, url = await directory.serve()
            self.directories[url], self.runners[url] = directory, runner
        self.session = http.client(connect=1, read=5)
        self.superpeers = Superpeers(list(self.directories), self.fallbacks, clock=lambda: self.now)
        self.client = DirectoryClient(self.superpeers, self.session, self.fallbacks)

    def kinds(self) -> Counter[str]:
        return Counter({row["kind"]: row["count"] for row in self.fallbacks.statistics()})

    def owned(self, url: str) -> list[str]:
        return [blob for blob in BLOBS if owners(blob, self.directories)[0] == url]

    async def kill(self, url: str) -> None:
        await self.runners.pop(url).cleanup()

    async def revive(self, url: str) -> None:
        self.runners[url], _ = await self.directories[url].serve(int(url.rpartition(":")[2]))

    async def close(self) -> None:
        await self.superpeers.close()
        await self.session.close()
        for runner in self.runners.values():
            await runner.cleanup()


@pytest.fixture
async def pair() -> AsyncIterator[Pair]:
    pair = Pair()
    await pair.start()
    yield pair
    await pair.close()


def beat(*blobs: str, **more: Any) -> Heartbeat:
    return Heartbeat(ME, blobs=tuple(Told(blob, 1, 1) for blob in blobs), **more)


async def test_one_join_a_superpeer_for_all_blobs_that_it_owns(pair: Pair) -> None:
    places = await pair.client.join(ME, BLOBS)
    assert sorted(places) == BLOBS
    for url, directory in pair.directories.items():
        assert [verb for verb, _ in directory.seen] == ["join"]
        assert directory.blobs("join") == pair.owned(url) != []
    assert pair.client.heartbeat_every == 7.0
    assert not pair.kinds()


async def test_a_superpeer_that_is_away_is_stood_in_for_skipped_then_tried_again(pair: Pair) -> None:
    gone, here = pair.directories
    await pair.kill(gone)
    assert sorted(await pair.client.join(ME, BLOBS)) == BLOBS
    assert pair.directories[here].blobs("join") == BLOBS
    assert pair.kinds()["superpeer passed over"] == 1
    assert sorted(await pair.client.join(ME, BLOBS)) == BLOBS
    assert pair.kinds()["superpeer passed over"] == 1, "the second time it was not even tried"
    assert pair.kinds()["superpeer away, its stand-in asked"] == len(pair.owned(gone))
    await pair.revive(gone)
    pair.now += 1.01
    await pair.client.heartbeat(beat(*BLOBS))
    assert pair.directories[gone].blobs("heartbeat") == pair.owned(gone), "it is told what its trees were"
    assert pair.directories[here].blobs("heartbeat") == pair.owned(here), "the stand-in is not told of them any more"
    assert pair.client.state(gone) == "good"


async def test_with_nobody_there_no_place_is_no_error_and_is_said(pair: Pair) -> None:
    for url in list(pair.runners):
        await pair.kill(url)
    assert await pair.client.join(ME, BLOBS) == {}
    assert await pair.client.heartbeat(beat(*BLOBS)) == {}
    await pair.client.leave()
    assert pair.kinds()["no directory for blobs"] == 2
    assert pair.client.statistics()["failures"] == 2 * len(BLOBS)


async def test_reports_that_reached_nobody_are_told_later_and_then_no_more(pair: Pair) -> None:
    ports = list(pair.runners)
    for url in ports:
        await pair.kill(url)
    await pair.client.heartbeat(beat(*BLOBS, reports=(("slow-one", Fault.SLOW),)))
    for url in ports:
        await pair.revive(url)
    pair.now += 60
    await pair.client.heartbeat(beat(*BLOBS))
    await pair.client.heartbeat(beat(*BLOBS))
    for directory in pair.directories.values():
        told = [body["reports"] for _, body in directory.seen]
        assert told == [[["slow-one", "slow"]], []]


async def test_leaving_is_told_to_all_who_were_told_of_us(pair: Pair) -> None:
    await pair.client.join(ME, BLOBS)
    await pair.client.leave()
    await pair.client.leave()
    assert [[verb for verb, _ in d.seen] for d in pair.directories.values()] == [["join", "leave"]] * 2


async def test_trees_are_asked_of_the_owners(pair: Pair) -> None:
    assert await pair.client.trees(BLOBS) == {blob: [] for blob in BLOBS}
    assert all(len(directory.seen) == 1 for directory in pair.directories.values())


async def test_places_of_blobs_that_were_not_asked_for_are_dropped(pair: Pair) -> None:
    other = "sha256:" + "f" * 64
    answer = msgspec.json.encode({"places": {other: Place(1, 1)}, "heartbeat": 5})
    for directory in pair.directories.values():
        directory.answer = answer
    assert await pair.client.join(ME, BLOBS[:3]) == {}
    assert await pair.client.heartbeat(beat(*BLOBS[:3])) == {}


@pytest.mark.parametrize(
    "answer",
    [b"", b"{}", b"[]", b'{"places": 1}', b"\xff" * 100, b'{"places":{},"heartbeat":0}', b" " * (9 << 20),
     b'{"places":{"sha256:x":{"order":1,"depth":1}},"heartbeat":5}', b"[" * 100_000],
)  # fmt: skip
async def test_an_answer_that_makes_no_sense_is_as_good_as_none(pair: Pair, answer: bytes) -> None:
    for directory in pair.directories.values():
        directory.answer = answer
    assert await pair.client.join(ME, BLOBS) == {}
    assert pair.kinds()["no directory for blobs"] == 1


@given(st.binary(max_size=200))
def test_any_bytes_are_a_message_or_an_error(data: bytes) -> None:
    for kind in (Join, Heartbeat):
        try:
            assert isinstance(msgspec.json.decode(data, type=kind), kind)
        except (msgspec.MsgspecError, UnicodeDecodeError):
            pass


class TestNames:
    async def test_a_dns_name_is_all_its_addresses_and_is_asked_again(self) -> None:
        found = ["10.0.0.2", "10.0.0.1"]
        asked: list[tuple[str, int]] = []

        async def resolver(host: str, port: int) -> list[str]:
            asked.append((host, port))
            if not found:
                raise OSError("no answer")
            return found

        fallbacks = Fallbacks()
        superpeers = Superpeers(["dns+http://superpeers:7070", "http://10.0.0.9:7070/"], fallbacks, resolver=resolver)
        try:
            assert superpeers.names == ("http://10.0.0.9:7070",)
            await superpeers.ready()
            three = ("http://10.0.0.1:7070", "http://10.0.0.2:7070", "http://10.0.0.9:7070")
            assert (superpeers.names, asked) == (three, [("superpeers", 7070)])
            found[:] = ["10.0.0.2", "fd00::7"]
            await superpeers.ask_names()
            assert superpeers.names == ("http://10.0.0.2:7070", "http://10.0.0.9:7070", "http://[fd00::7]:7070")
            found.clear()
            await superpeers.ask_names()
            assert len(superpeers.names) == 3, "what was known stays"
            assert [row["kind"] for row in fallbacks.statistics()] == ["superpeers' name not resolved"]
        finally:
            await superpeers.close()

    async def test_who_cannot_be_resolved_at_the_start_is_later(self) -> None:
        answers: list[list[str]] = [[], ["10.0.0.1"]]

        async def resolver(host: str, port: int) -> list[str]:
            return answers.pop(0) if answers else ["10.0.0.1"]

        superpeers = Superpeers(["dns+http://superpeers:7070"], Fallbacks(), refresh=0.01, resolver=resolver)
        try:
            with pytest.raises(Unavailable):
                await superpeers.ready()
            async with asyncio.timeout(5):
                while not superpeers.names:
                    await asyncio.sleep(0.01)
            assert superpeers.order("x") == ["http://10.0.0.1:7070"]
        finally:
            await superpeers.close()

    @pytest.mark.parametrize("url", ["", "here", "ftp://x", "http://", "http://h:0", "http://h:99999", "dns+h:1",
                                     "http://h/path", "file:///etc/passwd"])  # fmt: skip
    def test_what_is_no_url_is_refused(self, url: str) -> None:
        with pytest.raises(ConfigError):
            Superpeers([url], Fallbacks())

    async def test_only_silence_makes_somebody_away(self) -> None:
        superpeers = Superpeers(["http://a:1", "http://b:1"], Fallbacks(), clock=lambda: 5.0)
        first, second = superpeers.order("x")
        for error, order in ((Unavailable("the registry is away"), [first, second]),
                             (Unreachable("refused"), [second, first])):  # fmt: skip
            with pytest.raises(DadiError):
                async with superpeers.asking(first):
                    raise error
            assert superpeers.to_ask("x") == order

    async def test_who_is_tried_again_gets_one_request_at_a_time(self) -> None:
        now = [0.0]
        superpeers = Superpeers(["http://a:1", "http://b:1"], Fallbacks(), clock=lambda: now[0])
        first, second = superpeers.order("x")
        with pytest.raises(Unreachable):
            async with superpeers.asking(first):
                raise Unreachable("timed out")
        now[0] = 2.0
        async with superpeers.asking(superpeers.to_ask("x")[0]):
            assert superpeers.to_ask("x") == [second, first]
        assert superpeers.to_ask("x") == [first, second]


async def test_a_session_that_fails_in_the_middle_of_an_answer_is_away(pair: Pair) -> None:
    url = owners(BLOBS[0], pair.directories)[0]

    async def cut(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": "1000"})
        await response.prepare(request)
        await response.write(b"{")
        assert request.transport is not None
        request.transport.abort()
        return response

    await pair.kill(url)
    app = web.Application()
    app.router.add_post("/v1/peers/{verb}", cut)
    pair.runners[url], _ = await http.serve_tcp(app, url.removeprefix("http://"))
    assert sorted(await pair.client.join(ME, BLOBS)) == BLOBS
    assert pair.client.state(url) == "dropped"
    assert isinstance(pair.session, aiohttp.ClientSession)


async def test_a_directory_that_is_slow_or_gone_is_no_reason_to_read_from_somebody_else(pair: Pair) -> None:
    slow, gone = pair.directories

    async def never(request: web.Request) -> web.Response:
        await asyncio.get_running_loop().create_future()
        raise AssertionError

    await pair.kill(gone)
    await pair.kill(slow)
    app = web.Application()
    app.router.add_post("/v1/peers/{verb}", never)
    pair.runners[slow], _ = await http.serve_tcp(app, slow.removeprefix("http://"))
    client = DirectoryClient(pair.superpeers, pair.session, pair.fallbacks, timeout=0.1)
    assert await client.join(ME, BLOBS) == {}
    assert [client.state(url) for url in pair.directories] == ["dropped", "dropped"]
    assert [pair.superpeers.state(url) for url in pair.directories] == ["good", "good"]
    assert all(pair.superpeers.to_ask(blob) == pair.superpeers.order(blob) for blob in BLOBS)


async def test_a_directory_that_takes_no_more_joins_is_asked_later_and_no_stand_in_meanwhile(pair: Pair) -> None:
    full, other = pair.directories
    pair.directories[full].busy = 7
    report = ("slow-one", Fault.SLOW)
    assert sorted(await pair.client.join(ME, BLOBS, reports=[report])) == pair.owned(other)
    assert sorted(pair.client.waits) == pair.owned(full)
    assert all(7 <= seconds < 8 for seconds in pair.client.waits.values())
    assert pair.directories[other].blobs("join") == pair.owned(other)
    assert pair.client.state(full) == "good"
    assert set(pair.kinds()) == {"directory asked later"}
    pair.directories[full].busy = 10**5 - 1
    await pair.client.join(ME, BLOBS)
    assert max(pair.client.waits.values()) <= 121, "whatever it says"
    pair.directories[full].busy = None
    assert sorted(await pair.client.join(ME, BLOBS)) == BLOBS
    assert pair.client.waits == {}


async def test_reports_that_only_somebody_too_busy_was_told_are_told_again(pair: Pair) -> None:
    for directory in pair.directories.values():
        directory.busy = 1
    await pair.client.join(ME, BLOBS, reports=[("slow-one", Fault.SLOW)])
    for directory in pair.directories.values():
        directory.busy = None
        directory.seen.clear()
    await pair.client.join(ME, BLOBS)
    for directory in pair.directories.values():
        assert [body["reports"] for _, body in directory.seen] == [[["slow-one", "slow"]]]
