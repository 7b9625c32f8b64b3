"""Prefetch jobs on disk."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import msgspec
import pytest

from dadi.prefetch.life import State
from dadi.prefetch.messages import Job, Lacking, Request, canonical, job_id
from superpeer import job_store
from superpeer.job_store import JobStore


def job(name: str = "nginx", created: float = 1.0) -> Job:
    request = canonical(Request(name, "linux/amd64", rate=5.0))
    return Job(id=job_id(request), request=request, created=created, state=State.WARMING,
               lacking=[Lacking("layer", "sha256:1", 5, ((0, 3),))],
               error={"error": "internal", "message": "m", "hint": None})  # fmt: skip


async def test_jobs_are_read_as_they_were_written_oldest_first(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "prefetch")
    assert await store.load() == []
    jobs = [job("b", 2.0), job("a", 3.0), job("c", 1.0)]
    for each in jobs:
        await store.save(each)
    assert await JobStore(tmp_path / "prefetch").load() == [jobs[2], jobs[0], jobs[1]]
    await store.remove(jobs[0])
    assert [each.created for each in await store.load()] == [1.0, 3.0]


async def test_damaged_files_and_jobs_under_another_name_are_thrown_away(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    good = job()
    await store.save(good)
    (tmp_path / "0123456789ab.json").write_bytes((tmp_path / f"{good.id}.json").read_bytes())
    (tmp_path / "damaged.json").write_bytes(b'{"id": "x')
    (tmp_path / "zeros.json").write_bytes(bytes(100))
    assert await store.load() == [good]
    assert [path.name for path in tmp_path.iterdir()] == [f"{good.id}.json"]


async def test_a_directory_that_cannot_be_written_stops_nobody(tmp_path: Path) -> None:
    store = JobStore(tmp_path / "gone" / "deeper")
    await store.save(job())
    assert not (tmp_path / "gone").exists()


async def test_a_request_that_is_refused_by_now_stops_no_start(tmp_path: Path) -> None:
    for name, request in {"a" * 12: Request("UPPER CASE//", "linux/amd64"),
                          "b" * 12: Request("nginx", "linux/amd64", nodes="300%")}.items():  # fmt: skip
        (tmp_path / f"{name}.json").write_bytes(msgspec.json.encode(Job(id=name, request=request)))
    assert await JobStore(tmp_path).load() == []
    assert list(tmp_path.iterdir()) == []


async def test_a_save_that_is_cancelled_does_not_replace_a_newer_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, each, write = JobStore(tmp_path), job(), job_store.write_durably
    began, may = threading.Event(), threading.Event()

    def slow(path: Path, data: bytes) -> None:
        began.set()
        may.wait(10)
        write(path, data)

    monkeypatch.setattr(job_store, "write_durably", slow)
    first = asyncio.create_task(store.save(each))
    await asyncio.to_thread(began.wait, 10)
    first.cancel()
    each.state = State.CANCELLED
    second = asyncio.create_task(store.save(each))
    await asyncio.sleep(0)
    may.set()
    await asyncio.gather(first, second, return_exceptions=True)
    assert first.cancelled()
    assert [loaded.state for loaded in await store.load()] == [State.CANCELLED]
