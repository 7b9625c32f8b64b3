"""A superpeer whose disk is full: plain pulls pass by, also those of nodes that would wait for a chunk table."""

from __future__ import annotations

import hashlib
from pathlib import Path

import aiohttp
import msgspec
import pytest

from dadi.blobs.ingest import DiskIngest
from dadi.errors import StoreFull
from dadi.originals.messages import OriginalAnswer
from tests.fakes.registry import FakeRegistry
from tests.lab.services import running

DATA = hashlib.shake_256(b"full").digest(1_000_000)


async def test_a_blob_for_which_there_is_no_room_has_no_table_and_is_given_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(ingest: DiskIngest, data: bytes) -> None:
        raise StoreFull("no space left")

    monkeypatch.setattr(DiskIngest, "write", write)
    async with (
        FakeRegistry() as registry,
        running(tmp_path, registry.host) as run,
        aiohttp.ClientSession(run.url, raise_for_status=True) as session,
    ):
        digest, of = registry.add_blob(DATA), {"reference": f"{registry.host}/team/app:1"}
        async with session.get(f"/v1/original/{digest}/table", params={**of, "wait": "5", "from": "0"}) as answer:
            said = msgspec.msgpack.decode(await answer.read(), type=OriginalAnswer)
        assert (said.size, said.blob, said.coming) == (len(DATA), None, False)
        async with session.get(f"/v1/original/{digest}", params=of) as answer:
            assert await answer.read() == DATA
