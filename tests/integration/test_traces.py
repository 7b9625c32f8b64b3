"""Startup traces between nodes and a superpeer over HTTP; only the kernel is missing: marks and misses are the test's.

A node here is the real `Startups`, recorder, replay and chain over a superpeer's client.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import aiohttp
import pytest

from dadi.blobs.chain import Chain
from dadi.errors import AccessDenied, DadiError, InvalidRequest, TokenRefused, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index import image as image_index
from dadi.index.chunks import Blob
from dadi.index.image import ImageIndex
from dadi.node import traces as traces_of_node
from dadi.node.config import TraceConfig
from dadi.node.demand import Demand
from dadi.node.devices import DeviceState
from dadi.node.startup import Startups
from dadi.peers.owners import owners
from dadi.peers.superpeer import SuperpeerClient, image_answer
from dadi.prefetch import trace, trace_json
from dadi.prefetch.client import TraceClient
from dadi.prefetch.trace import Chunk, Message, Recording, Report, Trace
from superpeer.config import TracesConfig
from tests.fakes.memory_blobs import MemoryBlobs
from tests.fakes.registry import FakeRegistry
from tests.lab.network import free_ports
from tests.lab.services import CHUNK, PLATFORM, Running, running, tar_of

QUIET = 60.0
"""Seconds: a start is over when the test says so, however busy the machine is."""
FILES = {f"file{number}": random.Random(number).randbytes(10 * CHUNK) for number in range(4)}


class Node:
    """One node without a kernel. `index`: of the image that was resolved last."""

    def __init__(self, url: str, name: str, **options: Any) -> None:
        self.fallbacks = Fallbacks()
        self.client = SuperpeerClient([url] if isinstance(url, str) else url, self.fallbacks, connect=3, read=10)
        self.store = MemoryBlobs()
        self.demand = Demand()
        self.chain = Chain(self.store, self.client.source, patience=1, fallbacks=self.fallbacks)
        self.marks: dict[str, bytearray] = {}
        self.local: list[Blob] = []
        devices: Any = self
        self.misses = 0
        self.keeper = TraceClient(self.client)
        store: Any = self.store
        self.startups = Startups(TraceConfig(quiet=QUIET, **options), store, self.chain, devices, self.demand,
                                 self.keeper, self.fallbacks, name=lambda: name)  # fmt: skip
        self.index: ImageIndex

    def all(self) -> list[Any]:
        return [SimpleNamespace(blob=blob, state=DeviceState.LOCAL) for blob in self.local]

    def becomes_local(self, blob: Blob) -> None:
        """As if backfill had completed the layer."""
        self.startups.recorder.look()
        self.local.append(blob)
        del self.marks[blob.digest]

    def touched(self, digest: str) -> bytearray | None:
        return self.marks.get(digest)

    async def mount(self, reference: str) -> None:
        async with contextlib.aclosing(self.client.resolve(reference, PLATFORM)) as events:
            async for event in events:
                if event["event"] == "image":
                    answer = image_answer(event)
        self.index = image_index.decode(await self.client.whole(answer.index_digest, answer.index_size))
        self.marks = {blob.digest: bytearray(blob.table.count) for blob in self.index.device_blobs()}
        mounted = asyncio.Event()
        mounted.set()
        self.startups.begin(self.index, mounted)

    async def run(self, order: Iterable[Chunk]) -> None:
        """Read as a program does, one after the other, through a kernel that asks once."""
        blobs = {blob.digest: blob for blob in self.index.device_blobs()}
        for digest, chunk in order:
            blob, run = blobs[digest], range(chunk, chunk + 1)
            if not await self.store.missing(blob, run):
                self.marks[digest][chunk] = 1
                continue
            self.misses += 1
            with self.demand.waiting():
                self.demand.on_miss(blob, run)
                await self.chain.read(blob, run)

    async def replayed(self) -> None:
        """Wait until the replay is over, not for the window."""
        async with asyncio.timeout(10):
            await asyncio.sleep(0)
            while not self.startups.counts["replays"] or self.demand.replays:
                await asyncio.sleep(0.005)

    async def told(self) -> None:
        """End the start, as if it had become quiet, and wait until the superpeer knows."""
        recorder = self.startups.recorder
        recorder.look()
        for window in list(recorder._windows):
            recorder.close_window(window)
        async with asyncio.timeout(10):
            await asyncio.gather(*self.startups._tasks.values())


@contextlib.asynccontextmanager
async def nodes(run: Running, *names: str, **options: Any) -> AsyncIterator[list[Node]]:
    made = [Node(run.url, name, **options) for name in names]
    try:
        yield made
    finally:
        for node in made:
            await node.startups.close()
            await node.chain.close()
            await node.client.close()


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        lower = {name: data for name, data in FILES.items() if name != "file3"}
        fake.add_image("team/app", "1", [tar_of(**lower), tar_of(file3=FILES["file3"])])
        yield fake


@pytest.fixture
async def run(tmp_path: Path, registry: FakeRegistry) -> AsyncIterator[Running]:
    async with running(tmp_path, registry.host) as made:
        made.reference = f"{registry.host}/team/app:1"
        yield made


def node_like(node: Node) -> Any:
    """Return what `dadi trace import` needs of a node."""

    async def index(answer: Any) -> ImageIndex:
        return node.index

    return SimpleNamespace(upstream=node.client, startups=node.startups,
                           mounts=SimpleNamespace(metadata=SimpleNamespace(index=index)))  # fmt: skip


def program(index: ImageIndex, *pieces: tuple[int, range | list[int]]) -> list[Chunk]:
    blobs = index.device_blobs()
    return [(blobs[place].digest, chunk) for place, chunks in pieces for chunk in chunks]


async def start(node: Node, run: Running, *pieces: tuple[int, range | list[int]], ahead: bool = False) -> list[Chunk]:
    """Mount, run the program (when the replay is over, with `ahead`), wait for what is told."""
    await node.mount(run.reference)
    if ahead:
        await node.replayed()
    order = program(node.index, *pieces)
    await node.run(order)
    await node.told()
    return order


async def test_what_one_node_reads_another_one_has_before_it_reads(run: Running) -> None:
    async with nodes(run, "one", "two") as (one, two):
        order = await start(one, run, (0, [9, 3, 4]), (1, [2]), (0, [20]))
        assert one.misses == 5
        manifest = one.index.manifest_digest
        found = trace.decode((await one.keeper.fetch(manifest)).data, Trace)
        assert found.chunks(found.groups[0]) == order
        await start(two, run, (0, [9, 3, 4]), (1, [2]), (0, [20]), ahead=True)
        assert two.misses == 0
        row = two.startups.row(manifest)
        assert row is not None
        assert (row["hit_ratio"], row["covered"], row["fetched_chunks"]) == (1.0, 1.0, 5)
        assert two.startups.statistics()["hit_ratio"] == 1.0
        assert run.superpeer.traces.statistics()["hit_ratio"] == 1.0
        assert trace.decode((await two.keeper.fetch(manifest)).data, Trace).groups[0].recordings == 2
        assert not two.fallbacks.statistics()


async def test_a_read_that_overtakes_the_replay_is_served_and_recorded(run: Running) -> None:
    async with nodes(run, "one", "two") as (one, two):
        order = await start(one, run, (0, range(30)))
        await two.mount(run.reference)
        await two.run(reversed(order))  # nothing of the replay has come by now for the first of them
        await two.told()
        assert two.misses > 0
        row = two.startups.row(two.index.manifest_digest)
        assert row is not None
        assert row["covered"] == 1.0
        assert await two.store.missing(two.index.device_blobs()[0], range(30)) == []


async def test_a_wrong_trace_is_not_replayed_again_and_dropped_by_the_superpeer(run: Running) -> None:
    async with nodes(run, "liar", "two", "three", "four") as (liar, two, three, four):
        await start(liar, run, (0, range(20)))
        manifest = liar.index.manifest_digest
        for node, reads in ((two, (1, range(8))), (three, (0, range(22, 30)))):
            await start(node, run, reads, ahead=True)
            assert node.misses == 8, "it cost bandwidth, and no read failed"
            assert "startup trace useless" in [row["kind"] for row in node.fallbacks.statistics()]
        assert run.superpeer.traces.statistics()["dropped"] == 1
        order = await start(four, run, (0, range(22, 30)), ahead=True)
        assert four.misses == 0
        found = trace.decode((await four.keeper.fetch(manifest)).data, Trace)
        assert [found.chunks(group) for group in found.groups] == [order], "learning has begun anew"


async def test_what_became_local_in_the_middle_of_a_start_is_not_held_against_the_trace(run: Running) -> None:
    async with nodes(run, "one", "two") as (one, two):
        order = await start(one, run, (0, range(20)), (1, [2]))
        await two.mount(run.reference)
        await two.replayed()
        await two.run(program(two.index, (1, [2]), (0, range(3))))
        two.becomes_local(two.index.device_blobs()[0])
        await two.told()
        row = two.startups.row(two.index.manifest_digest)
        assert row is not None
        assert (row["trace_chunks"], row["used_chunks"], row["covered"]) == (1, 1, 1.0)
        assert not two.fallbacks.statistics(), "nobody saw the other seventeen reads: that is no useless trace"
        found = trace.decode((await one.keeper.fetch(one.index.manifest_digest)).data, Trace)
        assert [(group.recordings, found.chunks(group)) for group in found.groups] == [(2, order)]


async def test_a_trace_that_was_useless_here_is_not_replayed_here_again(run: Running) -> None:
    async with nodes(run, "liar", "two") as (liar, two):
        await start(liar, run, (0, range(30)))
        data = (await liar.keeper.fetch(liar.index.manifest_digest)).data
        two.startups._useless[trace.name_of(data)] = None
        await start(two, run, (1, range(8)))
        assert two.startups.counts["replays"] == 0
        assert two.misses == 8


async def test_the_rate_of_the_configuration_holds_replays_back_and_no_read(run: Running) -> None:
    async with nodes(run, "one") as (one,), nodes(run, "two", rate=1) as (two,):
        await start(one, run, (0, [0, 5, 10, 15]))
        await start(two, run, (0, [0, 5, 10, 15]))
        assert two.misses == 4, "a chunk would have to wait for hours, and nothing waited for it"
        assert two.startups.counts["replays"] == 1
        assert two.startups.counts["fetched_chunks"] == 0


async def test_two_entry_points_are_told_apart_by_what_they_read(run: Running) -> None:
    common, server, worker = (0, range(3)), (0, range(10, 20)), (1, range(8))
    async with nodes(run, "one", "two", "three", "four", replay=False) as (one, two, three, four):
        await start(one, run, common, server)
        await start(two, run, common, server)
        await start(three, run, common, worker)
        found = trace.decode((await one.keeper.fetch(one.index.manifest_digest)).data, Trace)
        assert [group.recordings for group in found.groups] == [2, 1]
        assert found.chunks(found.groups[1]) == program(one.index, common, worker)
        assert [node.startups.counts["replays"] for node in (one, two, three, four)] == [0] * 4


async def test_traces_outlive_a_restart_and_what_is_damaged_is_dropped(tmp_path: Path, registry: FakeRegistry) -> None:
    reference = f"{registry.host}/team/app:1"
    async with running(tmp_path, registry.host) as run, nodes(run, "one") as (one,):
        run.reference = reference
        await start(one, run, (0, range(3)))
        manifest = one.index.manifest_digest
        data = run.superpeer.traces.given(manifest)
    directory = tmp_path / "traces"
    (directory / f"{'0' * 64}.trace").write_bytes(b"DADITRK1 and then nothing of sense")
    (directory / f"{'1' * 64}.trace").write_bytes((directory / f"{manifest[7:]}.trace").read_bytes())
    (directory / "half.trace.new").write_bytes(b"half")
    async with running(tmp_path, registry.host) as run, nodes(run, "one") as (one,):
        assert data
        assert run.superpeer.traces.given(manifest) == data
        assert [path.name for path in (tmp_path / "traces").iterdir()] == [f"{manifest[7:]}.trace"]
        await one.mount(reference)
        await one.keeper.clear(manifest)
        assert (await one.keeper.fetch(manifest)).data == b""
        assert list((tmp_path / "traces").iterdir()) == []


async def test_what_the_image_does_not_have_and_what_is_no_message_is_refused(run: Running) -> None:
    async with nodes(run, "one") as (one,):
        await one.mount(run.reference)
        manifest, blob = one.index.manifest_digest, one.index.device_blobs()[0]
        for blobs, chunk in ((((blob.digest, CHUNK),), blob.table.count), (((blob.digest, 2 * CHUNK),), 0),
                             ((("sha256:" + "0" * 64, CHUNK),), 0)):  # fmt: skip
            with pytest.raises(InvalidRequest):
                await one.keeper.send(Message(manifest, Recording("one", blobs, ((0, chunk, 0),))))
        async with aiohttp.ClientSession() as session:
            for body in (b"", b"DADIREC1", b"x" * 2000):
                async with session.post(f"{run.url}/v1/traces", data=body) as response:
                    assert response.status == 400
            async with session.get(f"{run.url}/v1/traces") as response:
                assert response.status == 400
        assert (await one.keeper.fetch(manifest)).data == b""


async def test_only_who_may_have_the_image_gets_and_gives_its_traces(run: Running, registry: FakeRegistry) -> None:
    registry.add_image("team/other", "1", [tar_of(other=b"other")])
    async with nodes(run, "one", "stranger") as (one, stranger):
        await start(one, run, (0, range(3)))
        manifest = one.index.manifest_digest
        for wanted in (stranger.keeper.fetch(manifest), stranger.keeper.clear(manifest),
                       stranger.keeper.send(Message(manifest, report=Report("t", 9, 0, 9)))):  # fmt: skip
            with pytest.raises(TokenRefused):
                await wanted
        await stranger.mount(f"{registry.host}/team/other:1")
        header = stranger.client.tokens.headers(stranger.index.manifest_digest)
        async with (
            aiohttp.ClientSession() as session,
            session.get(f"{run.url}/v1/traces", params={"manifest": manifest}, headers=header) as response,
        ):
            assert response.status == AccessDenied.status, "a token, but of another image"


async def test_most_images_and_bytes_are_kept(tmp_path: Path, registry: FakeRegistry) -> None:
    registry.add_image("team/other", "1", [tar_of(other=bytes(5 * CHUNK))])
    async with (
        running(tmp_path, registry.host, traces=TracesConfig(most=1)) as run,
        nodes(run, "one", "two") as (one, two),
    ):
        run.reference = f"{registry.host}/team/app:1"
        await start(one, run, (0, range(3)))
        run.reference = f"{registry.host}/team/other:1"
        await start(two, run, (0, range(3)))
        assert run.superpeer.traces.given(one.index.manifest_digest) == b""
        assert run.superpeer.traces.given(two.index.manifest_digest) != b""
        assert len(list((tmp_path / "traces").iterdir())) == 1


async def test_a_crowd_costs_a_few_merges_and_tells_of_a_few_starts(run: Running) -> None:
    async with nodes(run, "one") as (one,):
        await one.mount(run.reference)
        manifest, (first, second) = one.index.manifest_digest, one.index.device_blobs()
        traces = run.superpeer.traces
        blobs = ((first.digest, CHUNK), (second.digest, CHUNK))
        told = [Message(manifest, Recording(f"n{n}", blobs, ((0, 4, 0), (0, 5, 1), (1, n % 8, 2)))) for n in range(300)]
        wanted = [(await traces.asked(manifest)).wanted for _ in told]
        assert 16 <= wanted.count(True) <= 32, "the others are not even asked to tell"
        taken = await asyncio.gather(*(traces.learn(message, one.index) for message in told))
        assert taken == [True] * 16 + [False] * 284
        counts = traces.statistics()
        assert (counts["recordings"], counts["sampled_out"]) == (16, 284)
        assert counts["merges"] <= 2
        assert (await traces.asked(manifest)).wanted is False
        (group,) = trace.decode(traces.given(manifest), Trace).groups
        assert group.recordings == trace.MOST_IN_GROUP
        with pytest.raises(Unavailable):
            await traces_of_node.bring(node_like(one), run.reference, PLATFORM,
                                       trace_json.to_json(trace.decode(traces.given(manifest), Trace)))  # fmt: skip
        row = await one.keeper.send(told[0])
        assert row is False, "what is not taken is not kept back from who sent it"


async def test_a_node_that_is_not_asked_tells_only_of_a_trace_that_is_no_use(
    run: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = run.superpeer.traces._sampling
    async with nodes(run, "one", "two", "three") as (one, two, three):
        await start(one, run, (0, range(10)))
        monkeypatch.setattr(sampling, "ask", lambda image: False)
        await start(two, run, (0, range(10)), ahead=True)
        assert two.startups.counts["recordings"] == 0
        assert run.superpeer.traces.statistics()["reports"] == 0
        row = two.startups.row(two.index.manifest_digest)
        assert row is not None
        assert row["hit_ratio"] == 1.0
        await start(three, run, (1, range(8)), ahead=True)
        assert run.superpeer.traces.statistics()["reports"] == 1
        assert run.superpeer.traces.statistics()["recordings"] == 1


async def test_what_would_take_too_much_memory_is_refused_and_who_goes_away_stops_nobody(
    run: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with nodes(run, "one") as (one,):
        await one.mount(run.reference)
        manifest, (first, _) = one.index.manifest_digest, one.index.device_blobs()
        traces = run.superpeer.traces
        monkeypatch.setattr("superpeer.traces._MOST_STEPS_WAITING", 3)
        messages = [Message(manifest, Recording(f"n{n}", ((first.digest, CHUNK),), ((0, n, 0), (0, 9, 1))))
                    for n in range(2)]  # fmt: skip
        leaving = asyncio.create_task(traces.learn(messages[0], one.index))
        await asyncio.sleep(0)
        with pytest.raises(Unavailable):
            await traces.learn(messages[1], one.index)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        async with asyncio.timeout(10):
            while not traces.has(manifest) or traces._steps:
                await asyncio.sleep(0.005)
        assert await traces.learn(messages[1], one.index)


async def test_a_report_on_a_trace_that_is_no_more_says_nothing_of_the_one_in_its_place(run: Running) -> None:
    async with nodes(run, "one", "two") as (one, two):
        await start(one, run, (0, range(20)))
        manifest, traces = one.index.manifest_digest, run.superpeer.traces
        old = trace.name_of(traces.given(manifest))
        bad = [Message(manifest, report=Report(old, 20, 0, 9)) for _ in range(40)]
        for message in bad[:2]:
            await traces.learn(message, one.index)
        assert traces.statistics()["dropped"] == 1
        await start(two, run, (1, range(8)))
        for message in bad[2:]:
            await traces.learn(message, one.index)
        assert traces.statistics()["dropped"] == 1
        assert traces.has(manifest)


async def test_a_prefetch_of_scope_startup_warms_what_the_trace_names(run: Running) -> None:
    async with nodes(run, "one") as (one,):
        await start(one, run, (0, [4, 5, 9]), (1, [2]))
        record = run.superpeer.catalog.record_of(one.index.manifest_digest)
        assert record is not None
        first, second = one.index.device_blobs()
        assert run.superpeer.prefetch.shares.startup_chunks(record) == {
            first: [range(4, 6), range(9, 10)], second: [range(2, 3)],
        }  # fmt: skip
        again = run.superpeer.prefetch.shares.startup_chunks(record)
        assert again is run.superpeer.prefetch.shares.startup_chunks(record), "it is not decoded each time"
        await one.keeper.clear(record.manifest_digest)
        assert run.superpeer.prefetch.shares.startup_chunks(record) is None


async def test_a_superpeer_that_is_away_costs_the_start_nothing_but_the_trace(run: Running) -> None:
    async with nodes(run, "one") as (one,):
        async def away(*arguments: object) -> bytes:
            raise DadiError("away")

        await one.mount(run.reference)
        await one.startups.close()
        one.keeper.fetch = one.keeper.send = away
        await start(one, run, (0, range(3)))
        assert [row["kind"] for row in one.fallbacks.statistics()] == ["no startup trace", "startup trace not sent"]


async def test_siblings_learn_what_one_of_them_is_told(tmp_path: Path, registry: FakeRegistry) -> None:
    ports = free_ports(2)
    urls = tuple(f"http://127.0.0.1:{port}" for port in ports)
    async with contextlib.AsyncExitStack() as stack:
        made = [
            await stack.enter_async_context(
                running(tmp_path / str(port), registry.host, port=port, url=url, siblings=urls)
            )
            for port, url in zip(ports, urls, strict=True)
        ]
        by_url = dict(zip(urls, made, strict=True))
        (one,) = await stack.enter_async_context(nodes(made[0], "one"))
        one.client.superpeers._static = list(urls)
        one.client.superpeers._update()
        made[0].reference = f"{registry.host}/team/app:1"
        await start(one, made[0], (0, range(3)))
        manifest = one.index.manifest_digest
        first, second = (by_url[url].superpeer.traces for url in owners(manifest, urls))
        assert first.given(manifest)
        async with asyncio.timeout(10):
            while not second.given(manifest):
                await asyncio.sleep(0.01)
        assert first.given(manifest) == second.given(manifest)
        await one.keeper.clear(manifest)
        async with asyncio.timeout(10):
            while second.given(manifest):
                await asyncio.sleep(0.01)
