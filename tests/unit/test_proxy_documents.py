"""Tags that are pushed while the registry is asked about them: nobody believes later what it said before."""

from __future__ import annotations

import asyncio
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
from dadi.originals.records import Records

NAME, KEY = "reg.example/team/app", "manifest reg.example/team/app:1"


class Site:
    def __init__(self, directory: Path, store: DiskBlobs) -> None:
        self.now = 1000.0
        self.records = Records(directory / "originals", most=100, clock=lambda: self.now)
        away = Away(patience=5.0, clock=lambda: self.now)
        self.documents = Documents(store, self.records, OriginalsConfig(), away, Fallbacks())
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
