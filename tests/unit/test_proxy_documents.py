"""Tags: pushed while the registry is asked about them; while it fails for others; when the clock is put back."""

from __future__ import annotations

import asyncio
import importlib.util
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.errors import Unavailable
from dadi.fallbacks import Fallbacks
from dadi.originals.away import Away
from dadi.originals.config import OriginalsConfig
from dadi.originals.documents import Documents, Fetched
from dadi.originals.records import Records, steady
from dadi.originals.service import Originals
from tests.lab.waiting import until

NAME, KEY = "reg.example/team/app", "manifest reg.example/team/app:1"


class Site:
    def __init__(self, directory: Path, store: DiskBlobs) -> None:
        self.now = 1000.0
        self.records = Records(directory / "originals", most=100, clock=lambda: self.now)
        self.absent = Away(patience=5.0, clock=lambda: self.now)
        self.documents = Documents(store, self.records, OriginalsConfig(), self.absent, Fallbacks())
        self.tag = b"old"
        self.answers = asyncio.Event()
        self.answers.set()
        self.asked = 0
        self.away = False

    async def _fetch(self) -> Fetched:
        self.asked += 1
        found = self.tag
        await self.answers.wait()
        if self.away:
            raise Unavailable("away")
        return Fetched(found, digests.of(found), "text/plain")

    async def get(self) -> bytes:
        return (await self.documents.get("reg.example", KEY, self._fetch, of=NAME)).raw

    def push(self, tag: bytes) -> None:
        self.now += 1
        self.tag = tag
        self.documents.changed(NAME)
        self.now += 1


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    store = DiskBlobs(tmp_path / "store")
    (tmp_path / "originals").mkdir()
    site = Site(tmp_path, store)
    yield site
    await site.documents.close()
    await store.close()


async def test_after_a_push_the_registry_is_asked_once_and_then_believed_again(site: Site) -> None:
    assert [await site.get(), await site.get()] == [b"old", b"old"]
    site.push(b"new")
    assert [await site.get(), await site.get()] == [b"new", b"new"]
    assert site.asked == 2


async def test_what_was_asked_before_a_push_is_not_joined_nor_believed_after_it(site: Site) -> None:
    site.answers.clear()
    before = asyncio.create_task(site.get())
    while not site.asked:
        await asyncio.sleep(0)
    site.push(b"new")
    after = asyncio.create_task(site.get())
    while site.asked < 2:
        await asyncio.sleep(0)
    site.answers.set()
    assert [await before, await after, await site.get()] == [b"old", b"new", b"new"]


async def test_an_answer_that_comes_after_a_push_to_who_asked_before_it_is_not_kept_as_new(site: Site) -> None:
    site.answers.clear()
    before = asyncio.create_task(site.get())
    while not site.asked:
        await asyncio.sleep(0)
    site.push(b"new")
    site.answers.set()
    assert [await before, await site.get()] == [b"old", b"new"]


async def test_a_push_takes_nothing_away_where_the_registry_cannot_be_asked(site: Site) -> None:
    await site.get()
    site.push(b"new")
    site.away = True
    found = await site.documents.get("reg.example", KEY, site._fetch, of=NAME)
    assert (found.raw, found.stale) == (b"old", 2.0)


# ---- a registry that is away for others


async def test_what_fails_for_others_again_and_again_keeps_no_tag_old(site: Site) -> None:
    await site.get()
    site.now += 100
    site.tag = b"new"
    found = []
    for _ in range(6):
        site.absent.failed("reg.example")
        found.append(await site.get())
        site.now += 2
        await until(lambda: not site.documents._flights._flights)
    assert (found[0], found[-1]) == (b"old", b"new")
    assert site.asked == 2


async def test_while_it_is_away_one_looks_and_nobody_waits(site: Site) -> None:
    await site.get()
    site.now += 100
    site.absent.failed("reg.example")
    site.now += 6
    site.answers.clear()
    async with asyncio.timeout(4):  # less than its patience
        assert set(await asyncio.gather(*(site.get() for _ in range(100)))) == {b"old"}
    assert site.asked == 2


# ---- clocks


async def test_time_does_not_go_back_with_the_clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wall = 1.7e9
    monkeypatch.setattr(time, "time", lambda: wall)
    spec = importlib.util.find_spec("dadi.originals.records")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)  # as a program has it that has just begun
    records = module.Records(tmp_path, most=10)
    record = await records.learn("manifest a:1", digests.of(b""), 0)
    assert wall <= record.checked_at < wall + 3600
    wall -= 86400
    assert records.age(record) > 0, "it would be young for a day"
    assert (await records.learn("manifest a:1", digests.of(b"new"), 3, asked_at=records.now())).size == 3
    defaults = Originals.__init__.__kwdefaults__
    assert defaults is not None
    assert defaults["clock"] is steady


async def test_what_a_clock_that_was_ahead_has_left_is_believed_no_longer_than_what_is_new(tmp_path: Path) -> None:
    now = 1e9
    ahead, right = (Records(tmp_path, most=10, clock=clock) for clock in (lambda: 9e9, lambda: now))
    await ahead.learn("manifest a:1", digests.of(b"old"), 3)
    await right.load()
    now += 61
    record = right.find("manifest a:1")
    assert record is not None
    assert right.age(record) == 61
    assert (await right.learn("manifest a:1", digests.of(b"new"), 3, asked_at=now)).digest == digests.of(b"new")
