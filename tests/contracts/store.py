"""The contract of `dadi.blobs.store.BlobStore`, as tests; each implementation runs all of them (test_*_store.py)."""

from __future__ import annotations

import asyncio
import random

import pytest

from dadi.blobs.store import BlobStore
from dadi.errors import DigestMismatch, NotFound, StoreFull
from dadi.index.chunks import Blob, ChunkTable, blob_of

C = 4096
LIMIT = 64 * C


def content(size: int, seed: int = 0) -> bytes:
    """Return bytes no chunk of which is like another."""
    return random.Random(seed).randbytes(size)


def parts_of(blob: Blob, data: bytes) -> list[bytes]:
    """Return the blob's chunks."""
    return [data[offset : offset + length] for offset, length in map(blob.table.extent, range(blob.table.count))]


async def take_in(store: BlobStore, data: bytes) -> Blob:
    """Ingest and commit."""
    blob = blob_of(data, C)
    ingest = store.ingest()
    await asyncio.to_thread(ingest.write, data)
    await store.commit(ingest, blob)
    return blob


class StoreContract:
    """Inherit, and give a fixture `store` that is an empty store with a limit of LIMIT bytes."""

    async def test_a_blob_that_was_never_seen_is_all_missing(self, store: BlobStore) -> None:
        blob = blob_of(content(3 * C + 1), C)
        assert not store.has(blob.digest)
        assert store.find(blob.digest) is None
        assert await store.missing(blob) == [0, 1, 2, 3]
        with pytest.raises(NotFound):
            await store.read(blob, range(1))

    async def test_a_kept_chunk_is_present_and_its_neighbours_are_not(self, store: BlobStore) -> None:
        data = content(3 * C + 100)
        blob = blob_of(data, C)
        await store.keep(blob, 1, [data[C : 2 * C]])
        assert await store.missing(blob) == [0, 2, 3]
        assert await store.missing(blob, range(1, 2)) == []
        assert await store.read(blob, range(1, 2)) == [data[C : 2 * C]]
        with pytest.raises(NotFound):
            await store.read(blob, range(1, 3))
        assert not store.has(blob.digest)

    async def test_chunks_come_back_each_with_its_own_length(self, store: BlobStore) -> None:
        data = content(2 * C + 7)
        blob = blob_of(data, C)
        await store.keep(blob, 0, parts_of(blob, data))
        assert await store.read(blob, range(3)) == parts_of(blob, data)
        assert await store.read(blob, range(2, 3)) == [data[2 * C :]]
        assert await store.read(blob, range(0)) == []

    async def test_keeping_twice_changes_nothing(self, store: BlobStore) -> None:
        data = content(2 * C)
        blob = blob_of(data, C)
        await store.keep(blob, 0, [data[:C]])
        await store.keep(blob, 0, [data[:C]])
        assert store.statistics()["bytes"] == C
        assert await store.missing(blob) == [1]

    async def test_many_keepers_of_one_new_blob_lose_nothing(self, store: BlobStore) -> None:
        data = content(16 * C)
        blob = blob_of(data, C)
        await asyncio.gather(*(store.keep(blob, i, [part]) for i, part in enumerate(parts_of(blob, data))))
        assert b"".join(await store.read(blob, range(16))) == data
        assert store.statistics()["bytes"] == 16 * C

    async def test_finishing_makes_it_whole(self, store: BlobStore) -> None:
        data = content(2 * C + 1)
        blob = blob_of(data, C)
        await store.keep(blob, 0, parts_of(blob, data))
        assert not store.has(blob.digest)
        await store.finish(blob)
        await store.finish(blob)
        assert store.has(blob.digest)
        assert await store.get(blob.digest) == data

    async def test_finishing_early_is_refused(self, store: BlobStore) -> None:
        data = content(2 * C)
        blob = blob_of(data, C)
        await store.keep(blob, 0, [data[:C]])
        with pytest.raises(NotFound):
            await store.finish(blob)
        assert not store.has(blob.digest)

    async def test_a_lying_chunk_table_is_found_out_when_the_whole_is_hashed(self, store: BlobStore) -> None:
        true, false = content(2 * C), content(2 * C, seed=1)
        lie = Blob(blob_of(true, C).digest, blob_of(false, C).table)
        await store.keep(lie, 0, parts_of(lie, false))
        with pytest.raises(DigestMismatch):
            await store.finish(lie)
        assert not store.has(lie.digest)
        assert await store.missing(lie) == [0, 1]

    async def test_what_is_ingested_is_there_after_the_commit_and_not_before(self, store: BlobStore) -> None:
        data = content(5 * C + 9)
        blob = blob_of(data, C)
        ingest = store.ingest()
        await asyncio.to_thread(ingest.write, data[:100])
        await asyncio.to_thread(ingest.write, memoryview(data)[100:])
        assert not store.has(blob.digest)
        await store.commit(ingest, blob)
        assert store.has(blob.digest)
        assert await store.get(blob.digest) == data

    async def test_an_ingest_of_the_wrong_length_is_refused(self, store: BlobStore) -> None:
        data = content(C)
        ingest = store.ingest()
        await asyncio.to_thread(ingest.write, data[:-1])
        with pytest.raises(DigestMismatch):
            await store.commit(ingest, blob_of(data, C))
        assert store.statistics()["blobs"] == 0

    async def test_an_aborted_ingest_leaves_nothing(self, store: BlobStore) -> None:
        ingest = store.ingest()
        await asyncio.to_thread(ingest.write, content(C))
        await asyncio.to_thread(ingest.abort)
        await asyncio.to_thread(ingest.abort)
        assert store.statistics()["bytes"] == 0

    async def test_committing_the_same_blob_at_once_counts_it_once(self, store: BlobStore) -> None:
        data = content(4 * C)
        await asyncio.gather(*(take_in(store, data) for _ in range(4)))
        assert store.statistics() | {"held": 0} == store.statistics()
        assert (store.statistics()["blobs"], store.statistics()["bytes"]) == (1, 4 * C)

    async def test_an_ingest_completes_a_blob_that_is_partly_here(self, store: BlobStore) -> None:
        data = content(4 * C)
        blob = blob_of(data, C)
        await store.keep(blob, 1, [data[C : 2 * C]])
        with store.hold(blob):
            await take_in(store, data)
        assert store.has(blob.digest)
        assert await store.get(blob.digest) == data
        assert store.statistics()["bytes"] == 4 * C

    async def test_small_blobs_go_in_and_out_by_digest(self, store: BlobStore) -> None:
        blob = await store.put(b"index")
        assert (await store.put(b"index")).digest == blob.digest
        assert await store.get(blob.digest) == b"index"
        assert store.find(blob.digest) == blob
        empty = await store.put(b"")
        assert await store.get(empty.digest) == b""
        with pytest.raises(NotFound):
            await store.get("sha256:" + "0" * 64)

    async def test_the_least_recently_used_blob_makes_room(self, store: BlobStore) -> None:
        old, used, new = (content(30 * C, seed) for seed in range(3))
        first = await take_in(store, old)
        second = await take_in(store, used)
        await store.read(first, range(1))
        third = await take_in(store, new)
        assert [store.has(blob.digest) for blob in (first, second, third)] == [True, False, True]
        assert store.statistics()["evicted"] == 1
        assert store.statistics()["bytes"] <= LIMIT

    async def test_a_held_blob_is_never_evicted(self, store: BlobStore) -> None:
        held = await take_in(store, content(40 * C))
        with store.hold(held), store.hold(held):
            with pytest.raises(StoreFull):
                await take_in(store, content(40 * C, seed=1))
            blob = blob_of(content(64 * C, seed=2), C)
            with pytest.raises(StoreFull):
                await store.keep(blob, 0, parts_of(blob, content(64 * C, seed=2)))
            assert await store.missing(blob) == list(range(64))
        await take_in(store, content(40 * C, seed=1))
        assert not store.has(held.digest)

    async def test_an_evicted_blob_can_be_taken_in_again(self, store: BlobStore) -> None:
        first = await take_in(store, content(40 * C))
        await take_in(store, content(40 * C, seed=1))
        assert not store.has(first.digest)
        await take_in(store, content(40 * C))
        assert await store.get(first.digest) == content(40 * C)

    async def test_a_blob_larger_than_the_store_is_refused(self, store: BlobStore) -> None:
        ingest = store.ingest()
        with pytest.raises(StoreFull):
            await asyncio.to_thread(ingest.write, content(LIMIT + 1))
        await asyncio.to_thread(ingest.abort)
        assert store.statistics()["bytes"] == 0

    async def test_another_table_for_a_complete_blob_reads_its_true_bytes(self, store: BlobStore) -> None:
        data = content(4 * C)
        await take_in(store, data)
        other = Blob(blob_of(data).digest, ChunkTable(len(data), 2 * C, blob_of(data, 2 * C).table.digests))
        assert await store.missing(other) == []
        assert b"".join(await store.read(other, range(2))) == data

    async def test_holding_what_is_not_here_is_an_error(self, store: BlobStore) -> None:
        with pytest.raises(NotFound), store.hold(blob_of(b"never", C)):
            pass
