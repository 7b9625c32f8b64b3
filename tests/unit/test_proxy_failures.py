"""Originals where the store's disk breaks or fills: who asks gets what the registry has sent all the same."""

from __future__ import annotations

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from dadi import digest as digests
from dadi.blobs.disk import DiskBlobs
from dadi.errors import DadiError, StoreFull, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.originals.arriving import Arriving
from dadi.originals.away import Away
from dadi.originals.config import OriginalsConfig
from dadi.originals.documents import Documents, Fetched
from dadi.originals.records import Records
from tests.unit.test_proxy_arriving import DATA, DIGEST, Stream, pieces_of, read

RAW = b'{"schemaVersion": 2}'
KEY = "manifest reg.example/app@" + digests.of(RAW)


class Site:
    def __init__(self, directory: Path, store: DiskBlobs) -> None:
        self.fallbacks = Fallbacks()
        self.store = store
        self._directory = directory
        self.asked = 0

    async def documents(self) -> Documents:
        """Return what a proxy has after a start: nothing in memory."""
        records = Records(self._directory / "originals", most=100)
        await records.load()
        away = Away(patience=5.0, clock=time.monotonic)
        return Documents(self.store, records, OriginalsConfig(), away, self.fallbacks)

    async def fetch(self) -> Fetched:
        self.asked += 1
        return Fetched(RAW, digests.of(RAW), "text/plain")

    async def get(self) -> bytes:
        documents = await self.documents()
        try:
            return (await documents.get("reg.example", KEY, self.fetch, immutable=True)).raw
        finally:
            await documents.close()

    @property
    def noted(self) -> set[str]:
        return {row["kind"] for row in self.fallbacks.statistics()}

    @property
    def data(self) -> Path:
        return self._directory / "store" / "blobs" / digests.of(RAW).removeprefix("sha256:") / "data"


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    store = DiskBlobs(tmp_path / "store")
    yield Site(tmp_path, store)
    await store.close()


async def test_a_document_that_the_disk_has_spoilt_is_never_given(site: Site) -> None:
    assert await site.get() == RAW
    with site.data.open("r+b") as file:
        file.write(b"[")
    assert await site.get() == RAW
    assert site.asked == 2
    assert site.noted == {"local document spoilt by our disk"}


async def test_a_document_that_the_disk_does_not_give_is_fetched_again(site: Site) -> None:
    assert await site.get() == RAW
    os.truncate(site.data, 3)
    assert await site.get() == RAW
    assert site.asked == 2
    assert site.noted == {"local document not readable"}


@pytest.mark.parametrize(
    ("error", "told"),
    [(StoreFull("no room"), "not kept: store full"), (Unavailable("cannot write"), "not kept: disk failed")],
    ids=["full", "broken"],
)
async def test_a_document_that_cannot_be_kept_is_given(
    site: Site, monkeypatch: pytest.MonkeyPatch, error: DadiError, told: str
) -> None:
    async def put(data: bytes) -> None:
        raise error

    monkeypatch.setattr(site.store, "put", put)
    assert [await site.get(), await site.get()] == [RAW, RAW]
    assert site.asked == 2
    assert site.noted == {told}


async def test_a_blob_that_cannot_be_kept_is_read_to_its_end_by_who_has_begun(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def commit(*arguments: Any, **options: Any) -> None:
        raise StoreFull("no room")

    monkeypatch.setattr(site.store, "commit", commit)
    stream, ended = Stream(pieces_of(DATA)), asyncio.Event()
    blob = Arriving(site.store, DIGEST, len(DATA), stream, site.fallbacks, lambda _: ended.set())
    reader = asyncio.create_task(read(blob))
    stream.go(1)
    while not blob.here:
        await asyncio.sleep(0)
    stream.go()
    assert await reader == DATA
    await ended.wait()
    await blob.close()
    assert site.noted == {"original not kept"}
    assert not list((site.store.root / "incoming").iterdir())


async def test_a_disk_that_breaks_under_a_blob_is_told_to_readers_and_a_stop_is_still_a_stop(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream, ended = Stream(pieces_of(DATA)), asyncio.Event()
    blob = Arriving(site.store, DIGEST, len(DATA), stream, site.fallbacks, lambda _: ended.set())
    reader = asyncio.create_task(read(blob))
    stream.go(1)
    while not blob.here:
        await asyncio.sleep(0)

    def refused(*arguments: Any, **options: Any) -> int:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", lambda fd, data: refused() if len(data) > 10_000 else len(data))
        patch.setattr(Path, "unlink", refused)
        stream.go()
        with pytest.raises(Unavailable, match="cannot write"):
            await reader
        await ended.wait()
        await blob.close()
    assert stream.closed
