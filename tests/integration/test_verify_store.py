"""A store's disk is looked at: what is wrong is missing afterwards, what is right stays, nothing crashes."""

from __future__ import annotations

import asyncio
import json
import os
import random
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from dadi.blobs.disk import DiskBlobs
from dadi.blobs.layout import MAGIC, BlobDirectory
from dadi.blobs.verifying import Checked, ReadingPace, verify
from dadi.cli.main import cli
from dadi.errors import InvalidRequest, Unavailable, Unsupported
from dadi.index.chunks import Blob, ChunkTable, blob_of
from dadi.node.config import NodeConfig
from dadi.node.node import Node
from dadi.node.state_files import check
from dadi.snapshotter.db import open_database
from dadi.snapshotter.model import Kind
from registry_proxy import main as proxy_main
from registry_proxy.config import ProxyConfig
from superpeer import main as superpeer_main
from superpeer.config import SuperpeerConfig
from tests.contracts.store import C, content, parts_of, take_in

DATA = content(8 * C + 77)
BLOB = blob_of(DATA, C)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[DiskBlobs]:
    store = DiskBlobs(tmp_path / "store")
    yield store
    await store.close()


async def found(store: DiskBlobs) -> list[Checked]:
    return [checked async for checked in verify(store, ReadingPace(0), lambda length: None)]


def flip(path: Path, at: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        old = os.pread(file.fileno(), 1, at)
        os.pwrite(file.fileno(), bytes([old[0] ^ 1]), at)


async def test_a_store_in_order_is_found_so_and_stays_as_it_is(store: DiskBlobs) -> None:
    await take_in(store, DATA)
    partial = blob_of(content(5 * C, seed=1), C)
    await store.keep(partial, 1, parts_of(partial, content(5 * C, seed=1))[1:3])
    checked = await found(store)
    assert [(each.why, each.bad) for each in checked] == [("", ())] * 2
    assert sorted(each.bytes for each in checked) == [2 * C, len(DATA)]
    assert (store.has(BLOB.digest), await store.missing(partial)) == (True, [0, 3, 4])


@pytest.mark.parametrize("whole", [True, False])
async def test_a_chunk_with_wrong_bytes_is_missing_until_it_is_kept_again(store: DiskBlobs, whole: bool) -> None:
    await (take_in(store, DATA) if whole else store.keep(BLOB, 0, parts_of(BLOB, DATA)))
    flip(store.data_path(BLOB), 3 * C + 5)
    with store.open_device(BLOB) as device:
        (checked,) = await found(store)
        assert (checked.bad, checked.why) == ((3,), "1 of 9 chunks are not what they should be")
        assert (store.has(BLOB.digest), await store.missing(BLOB)) == (False, [3])
        assert list(device.present) == [1, 1, 1, 0, 1, 1, 1, 1, 1], "the kernel's readers miss it"
        assert store.statistics()["bytes"] == len(DATA) - C
        await store.keep(BLOB, 3, parts_of(BLOB, DATA)[3:4])
        await store.finish(BLOB)
        assert os.pread(device.fd, len(DATA), 0) == DATA, "in the very file that is open"
    assert store.has(BLOB.digest)
    assert store.statistics()["bytes"] == len(DATA)


async def test_what_was_withdrawn_stays_so_over_a_restart(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path / "store")
    await take_in(store, DATA)
    flip(store.data_path(BLOB), 0)
    await found(store)
    await store.close()
    again = DiskBlobs(tmp_path / "store")
    assert await again.missing(BLOB) == [0]
    await again.close()


async def test_a_file_that_was_cut_off_lacks_what_is_behind_and_gets_its_size_back(store: DiskBlobs) -> None:
    await take_in(store, DATA)
    os.truncate(store.data_path(BLOB), 6 * C + 1)
    (checked,) = await found(store)
    assert checked.bad == (6, 7, 8)
    assert store.data_path(BLOB).stat().st_size == 9 * C


async def test_a_table_that_lied_costs_the_whole_blob(tmp_path: Path) -> None:
    other = content(8 * C + 77, seed=9)
    lying = Blob(BLOB.digest, blob_of(other, C).table)
    directory = BlobDirectory.of(tmp_path / "store", BLOB.digest)

    def lie() -> None:
        directory.create(lying)
        directory.data.write_bytes(other.ljust(9 * C, b"\0"))
        directory.mark_complete()

    await asyncio.to_thread(lie)
    store = DiskBlobs(tmp_path / "store")
    (checked,) = await found(store)
    assert (len(checked.bad), store.has(BLOB.digest)) == (9, False)
    assert "the whole does not match" in checked.why
    await store.close()


async def test_a_damaged_table_over_right_bytes_is_thrown_away_unless_it_is_in_use(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path / "store")
    await take_in(store, DATA)
    await store.close()
    damaged = ChunkTable(BLOB.size, C, bytes(32) + BLOB.table.digests[32:])
    directory = BlobDirectory.of(tmp_path / "store", BLOB.digest)
    await asyncio.to_thread(directory.write_table, Blob(BLOB.digest, damaged))
    await asyncio.to_thread(directory.complete.write_bytes, b"")  # as a version before this one left it
    store = DiskBlobs(tmp_path / "store")
    known = store.find(BLOB.digest)
    assert known is not None
    with store.hold(known):
        (checked,) = await found(store)
        assert "table on the disk is damaged" in checked.why
        assert store.has(BLOB.digest)
    (checked,) = await found(store)
    assert checked.why.endswith("thrown away")
    assert store.find(BLOB.digest) is None
    await store.close()


async def test_a_table_that_was_damaged_is_not_believed_after_a_restart(tmp_path: Path) -> None:
    """Its bytes may be right, but whoever was given the table would find them wrong, again and again."""
    store = DiskBlobs(tmp_path / "store")
    await take_in(store, DATA)
    await store.close()
    flip(BlobDirectory.of(tmp_path / "store", BLOB.digest).table, 200)
    store = DiskBlobs(tmp_path / "store")
    assert store.find(BLOB.digest) is None
    await take_in(store, DATA)
    await store.close()
    store = DiskBlobs(tmp_path / "store")
    assert store.has(BLOB.digest)
    await store.close()


async def test_it_reads_no_faster_than_it_is_told() -> None:
    slept: list[float] = []
    now = 0.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        slept.append(seconds)
        now += seconds

    pace = ReadingPace(1000.0, clock=lambda: now, sleep=sleep)
    for _ in range(4):
        await pace.keep(500)
    assert slept == [0.5, 0.5, 0.5]


def run_cli(*arguments: object) -> tuple[int, dict[str, Any]]:
    done = CliRunner().invoke(cli, ["verify", "--json", *map(str, arguments)], catch_exceptions=False)
    return done.exit_code, json.loads(done.stdout)


def a_state(directory: Path) -> Path:
    """Make the state of a superpeer or node, with a blob that is whole, and one that is partly here."""
    async def make() -> None:
        store = DiskBlobs(directory / "store")
        await take_in(store, DATA)
        partial = blob_of(content(5 * C, seed=1), C)
        await store.keep(partial, 0, parts_of(partial, content(5 * C, seed=1))[:2])
        await store.close()

    asyncio.run(make())
    for name, text in (("images/1.json", b"{}"), ("tokens.json", b"[]"), ("keys/key.json", b"{}")):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(text)
    return directory


def test_the_command_looks_at_a_store_that_nobody_uses_and_its_status_says_what_was_found(tmp_path: Path) -> None:
    state = a_state(tmp_path / "state")
    assert run_cli("--state", state) == (0, {
        "event": "verified", "blobs": 2, "bytes": len(DATA) + 2 * C, "bad_blobs": 0, "bad_chunks": 0, "repaired": 0,
        "bad_files": 0, "bad": [],
    })  # fmt: skip
    flip(BlobDirectory.of(state / "store", BLOB.digest).data, 5)
    (state / "images" / "1.json").write_bytes(b'{"answer"')
    status, answer = run_cli("--state", state)
    assert (status, answer["bad_chunks"], answer["bad_files"]) == (1, 1, 1)
    assert [row.get("blob") or row["file"] for row in answer["bad"]] == [BLOB.digest, str(state / "images/1.json")]
    assert (state / "images" / "1.json").exists()
    assert run_cli("--state", state)[1]["bad_chunks"] == 0, "it was thrown away"


def test_where_no_node_answers_its_store_is_left_alone_and_what_to_do_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dadi.cli.verify.NODE", str(tmp_path / "state"))
    monkeypatch.setattr("dadi.cli.verify.SUPERPEER", str(tmp_path / "none"))
    error = CliRunner().invoke(cli, ["verify", "--node-socket", str(tmp_path / "none.sock")]).exception
    assert isinstance(error, Unavailable)
    assert str(tmp_path / "none.sock") in error.message
    assert f"--state {tmp_path}/state`" in (error.hint or "")
    error = CliRunner().invoke(cli, ["verify", "--repair", "--state", str(tmp_path)]).exception
    assert isinstance(error, InvalidRequest), "nothing would be repaired"
    assert "there is no store" in str(CliRunner().invoke(cli, ["verify", "--superpeer"]).exception)


def test_a_store_that_is_in_use_is_not_touched_and_one_that_is_not_there_is_said(tmp_path: Path) -> None:
    state = a_state(tmp_path / "state")
    store = DiskBlobs(state / "store")
    for place, why in ((state, "used by another process"), (tmp_path / "none", "there is no store")):
        done = CliRunner().invoke(cli, ["verify", "--state", str(place)])
        assert why in str(done.exception)
    store._lock.release()


def test_a_state_that_is_too_new_is_refused_before_anything_of_it_is_thrown_away(tmp_path: Path) -> None:
    state = a_state(tmp_path / "state")
    (state / "version").write_bytes(b'{"version": 9, "since": 8}')
    table = BlobDirectory.of(state / "store", BLOB.digest).table
    table.write_bytes(b"DADIBLB9 of version 9")
    done = CliRunner().invoke(cli, ["verify", "--state", str(state)])
    assert "has version 9, for version 8 or newer" in str(done.exception)
    with pytest.raises(Unsupported, match="nothing was changed"):
        asyncio.run(superpeer_main.serve(SuperpeerConfig(state=str(state)), asyncio.Event()))
    with pytest.raises(Unsupported, match="nothing was changed"):
        asyncio.run(proxy_main.serve(ProxyConfig(state=str(state)), asyncio.Event()))
    with pytest.raises(Unsupported, match="nothing was changed"):
        asyncio.run(Node.start(NodeConfig(state=str(state), run=str(tmp_path / "run"))))
    assert table.exists()


@pytest.fixture(scope="module")
def good_state(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_state(tmp_path_factory.mktemp("good") / "state")


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32), junk=st.binary(max_size=200))
def test_no_damage_crashes_it_and_what_it_leaves_is_right(good_state: Path, seed: int, junk: bytes) -> None:
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as temporary:
        state = Path(temporary) / "state"
        shutil.copytree(good_state, state, ignore=shutil.ignore_patterns("lock*"))
        files = sorted(path for path in state.rglob("*") if path.is_file())
        for path in chance.sample(files, 2):
            damages: list[Callable[[], object]] = [
                lambda path=path: path.write_bytes(junk),
                lambda path=path: path.write_bytes(path.read_bytes()[: chance.randrange(1 + path.stat().st_size)]),
                lambda path=path: path.unlink(),
                lambda path=path: (path.unlink(), path.mkdir()),
                lambda path=path: flip(path, chance.randrange(path.stat().st_size)) if path.stat().st_size else None,
                lambda path=path: path.write_bytes(MAGIC + msgspec.msgpack.encode([1, junk])),
            ]
            chance.choice(damages)()
        done = CliRunner().invoke(cli, ["verify", "--json", "--state", str(state)], catch_exceptions=False)
        assert done.exit_code in (0, 1)
        again = run_cli("--state", state)[1]
        assert again["bad_blobs"] == 0, "what was wrong is gone"


def test_the_snapshotter_s_database_is_looked_at_after_a_crash_too_and_damage_in_it_is_found(tmp_path: Path) -> None:
    (tmp_path / "running" / "snapshotter").mkdir(parents=True)
    database = open_database(tmp_path / "running" / "snapshotter")
    for number in range(200):
        database.create(number + 1, Kind.ACTIVE, f"name {number} " + "x" * 200, "", {})
    assert check(tmp_path / "running") == [], "who has it has looked at it"
    shutil.copytree(tmp_path / "running", tmp_path / "crashed")
    database.close()
    assert check(tmp_path / "crashed") == []
    again = open_database(tmp_path / "crashed" / "snapshotter")
    assert len(again.all()) == 200
    again.close()
    path = tmp_path / "crashed" / "snapshotter" / "metadata.db"
    data = bytearray(path.read_bytes())
    data[4096 * 3 : 4096 * 9] = b"\x5a" * (4096 * 6)
    path.write_bytes(data)
    assert [damaged.path for damaged in check(tmp_path / "crashed")] == [path]


@given(st.binary(max_size=300))
def test_no_bytes_in_a_small_file_crash_the_look_at_it(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    state = tmp_path_factory.getbasetemp() / "small"
    for name in ("mounts/1.json", "images/1.json", "prefetch/1.json", "traces/1.trace", "snapshotter/metadata.db"):
        (state / name).parent.mkdir(parents=True, exist_ok=True)
        (state / name).write_bytes(data)
    assert {damaged.path.suffix for damaged in check(state)} <= {".json", ".trace", ".db"}
