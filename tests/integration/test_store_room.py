"""What a store says would be evicted for something, without evicting it."""

from __future__ import annotations

import shutil
from pathlib import Path

from dadi.blobs.disk import DiskBlobs
from dadi.index.chunks import blob_of


async def test_room_names_what_is_not_used_the_oldest_first(tmp_path: Path) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1
        return now

    store = DiskBlobs(tmp_path / "store", limit=10_000, clock=clock)
    blobs = [await store.put(bytes([n]) * 2000) for n in range(4)]
    free = await store.room(2000)
    assert (free.free, free.evicted, free.enough) == (2000, (), True)
    some = await store.room(5000)
    assert (some.evicted, some.enough) == (((blobs[0].digest, 2000), (blobs[1].digest, 2000)), True)
    with store.hold(blobs[0]):
        assert [digest for digest, _ in (await store.room(3000)).evicted] == [blobs[1].digest]
        assert not (await store.room(10_000)).enough
    kept = await store.room(10_000, {blobs[3].digest})
    assert (len(kept.evicted), kept.enough) == (3, False)
    assert sorted(store.digests()) == sorted(blob.digest for blob in blobs), "nothing has gone"
    assert blob_of(bytes(2000)).digest in store.digests()
    await store.close()


async def test_without_a_limit_room_is_what_the_disk_has(tmp_path: Path) -> None:
    store = DiskBlobs(tmp_path / "store")
    room = await store.room(1)
    assert room.enough
    assert 0 < room.free <= shutil.disk_usage(tmp_path).total
    assert not (await store.room(1 << 60)).enough
    await store.close()
