"""A node on the real kernel: mounts, lazy reads, backfill, the swap, restarts, and bad days.

The node runs in the test's own loop, so files of a mount are read in threads (their own: a read may hang, and must not
take a thread that the node needs). The registry is the fake, so that tests can take it, or the superpeer, away.
Longer than 400 lines: one node, from its first mount to its bad days.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
from collections.abc import AsyncIterator, Awaitable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from dadi.blobs.config import StoreConfig
from dadi.errors import Conflict, DadiError, NotFound, Unavailable
from dadi.node import kernel, restoring
from dadi.node.config import NodeConfig, ReadConfig
from dadi.node.node import Node
from dadi.oci.config import RegistryConfig
from tests.fakes.registry import FakeRegistry
from tests.lab.mounting import EAGER, LAZY, begin_to_read, in_thread, loops_below, mounted, node_of, read
from tests.lab.services import CHUNK, running, tar_of
from tests.lab.waiting import until

pytestmark = pytest.mark.root

BIG = random.Random(1).randbytes(40 * CHUNK + 123)
LOWER = tar_of(**{"small.txt": b"hello\n", "big.bin": BIG, "gone.txt": b"x"})
UPPER = tar_of(**{"app.py": b"print('hi')\n" * 1000, ".wh.gone.txt": b""})


@pytest.fixture
async def registry() -> AsyncIterator[FakeRegistry]:
    async with FakeRegistry() as fake:
        fake.add_image("team/app", "1", [LOWER, UPPER])
        fake.add_image("team/other", "1", [LOWER, tar_of(**{"other.txt": b"other"})])
        yield fake


async def test_an_image_is_mounted_before_its_bytes_are_there(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        row = await mounted(node, f"{registry.host}/team/app:1", target)
        assert row["state"] == "lazy"
        assert [device["bytes_present"] for device in row["devices"][1:]] == [0, 0], "metadata only"
        assert sorted(await in_thread(lambda: os.listdir(target))) == ["app.py", "big.bin", "small.txt"]
        assert await read(target / "small.txt") == b"hello\n"
        present = node.statistics()["mounts"][0]["devices"][1]["bytes_present"]
        assert 0 < present < len(LOWER), "what was touched, and not the rest"
        assert await read(target / "big.bin") == BIG
        assert await read(target / "app.py") == b"print('hi')\n" * 1000
        with pytest.raises(OSError, match="Read-only"):
            (target / "new").write_bytes(b"")
        await node.mounts.unmount(str(target))
        assert os.listdir(target) == []
        assert loops_below(tmp_path) == []


async def test_backfill_completes_the_image_and_leaves_the_read_path(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, backfill=EAGER, unmount_on_stop=False) as node:
            await mounted(node, f"{registry.host}/team/app:1", target)
            await until(lambda: node.statistics()["mounts"][0]["state"] == "local")
            row = node.statistics()["mounts"][0]
            assert row["bytes_present"] == row["bytes"]
            assert node.statistics()["sources"][0]["bytes"] == row["bytes"], "each byte came once"
        # The node is gone; the mount is not, and its pages must come from the disk.
        Path("/proc/sys/vm/drop_caches").write_text("3")
        assert await read(target / "big.bin") == BIG
        async with node_of(tmp_path, run.url) as again:
            assert again.statistics()["mounts"][0]["state"] == "local"
            assert [d["device"] for d in again.statistics()["mounts"][0]["devices"]] == [
                d["device"] for d in row["devices"]
            ], "adopted, not made again"
            await again.mounts.unmount(str(target))
        assert loops_below(tmp_path) == []


async def test_a_layer_whose_last_file_is_not_padded_is_mounted_lazily_and_locally(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    layer = tar_of(**{"small.txt": b"hello\n", "big.bin": BIG})
    layer = layer[: layer.rindex(BIG[-64:]) + 64]
    assert len(layer) % 512
    registry.add_image("team/bare", "1", [layer])
    async with running(tmp_path / "superpeer", registry.host) as run:
        for backfill, state in ((LAZY, "lazy"), (EAGER, "local")):
            async with node_of(tmp_path, run.url, backfill=backfill) as node:
                await mounted(node, f"{registry.host}/team/bare:1", target)
                await until(lambda node=node, state=state: node.statistics()["mounts"][0]["state"] == state)
                await in_thread(lambda: Path("/proc/sys/vm/drop_caches").write_text("3"))
                assert await read(target / "big.bin") == BIG
                assert await read(target / "small.txt") == b"hello\n"
                await node.mounts.unmount(str(target))


async def test_what_is_local_is_attached_locally_at_once(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, backfill=EAGER) as node:
            await mounted(node, f"{registry.host}/team/app:1", target)
            await until(lambda: node.statistics()["mounts"][0]["state"] == "local")
            await node.mounts.unmount(str(target))
            assert (await mounted(node, f"{registry.host}/team/app:1", target))["state"] == "local"
            assert node.session.statistics()["files"] == 0


async def test_a_node_that_is_told_to_unmounts_what_is_lazy_and_mounts_it_again_without_losing_a_chunk(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=True) as node:
            await mounted(node, f"{registry.host}/team/app:1", target)
            await read(target / "big.bin")
            fetched = node.statistics()["bytes"]["fetched"]
        assert not await in_thread(lambda: kernel.is_mounted(target))
        async with node_of(tmp_path, run.url) as again:
            assert again.statistics()["taken_over"] == {"mounts": 0, "devices": 0}
            assert again.statistics()["mounts"][0]["state"] == "lazy"
            assert await read(target / "big.bin") == BIG
            assert again.statistics()["bytes"]["fetched"] == 0
            assert fetched > len(BIG)


async def test_reads_of_a_lazy_image_wait_while_the_node_is_stopped_and_go_on_with_the_next(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            row = await mounted(node, f"{registry.host}/team/app:1", target)
            assert await read(target / "small.txt") == b"hello\n"
            fetched = node.statistics()["bytes"]["fetched"]
        assert await in_thread(lambda: kernel.is_mounted(target))
        Path("/proc/sys/vm/drop_caches").write_text("3")
        readers = [asyncio.create_task(read(target / name)) for name in ("small.txt", "big.bin", "app.py")]
        done, _ = await asyncio.wait(readers, timeout=0.5)
        assert not done, "neither what is here nor what is missing is answered, or fails"
        async with node_of(tmp_path, run.url) as again:
            assert await asyncio.gather(*readers) == [b"hello\n", BIG, b"print('hi')\n" * 1000]
            assert again.statistics()["taken_over"] == {"mounts": 1, "devices": 2}
            assert [d["device"] for d in again.statistics()["mounts"][0]["devices"]] == [
                d["device"] for d in row["devices"]
            ], "adopted, not made again"
            assert again.statistics()["bytes"]["fetched"] < row["bytes"] - fetched + 2 * CHUNK, "nothing came twice"
            assert again.fallbacks.statistics() == []
        assert loops_below(tmp_path) == []


async def test_images_that_share_a_layer_share_its_device_and_chunks(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    second = tmp_path / "second"
    second.mkdir()
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        one = await mounted(node, f"{registry.host}/team/app:1", target)
        two = await mounted(node, f"{registry.host}/team/other:1", second)
        assert one["devices"][1]["device"] == two["devices"][1]["device"]
        assert await read(target / "big.bin") == BIG
        before = node.statistics()["bytes"]["fetched"]
        assert await read(second / "big.bin") == BIG
        assert node.statistics()["bytes"]["fetched"] == before
        await node.mounts.unmount(str(target))
        assert await read(second / "other.txt") == b"other"
        assert await read(second / "small.txt") == b"hello\n"


async def test_the_same_image_twice_is_two_mounts(tmp_path: Path, registry: FakeRegistry, target: Path) -> None:
    second = tmp_path / "second"
    second.mkdir()
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        await mounted(node, f"{registry.host}/team/app:1", target)
        await mounted(node, f"{registry.host}/team/app:1", second)
        await node.mounts.unmount(str(target))
        assert await read(second / "small.txt") == b"hello\n"
        with pytest.raises(Conflict, match="mounted at"):
            await mounted(node, f"{registry.host}/team/other:1", second)


async def test_reads_wait_while_the_superpeer_is_away_and_go_on_when_it_is_back(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with running(tmp_path / "superpeer", registry.host) as run:
            node = await stack.enter_async_context(node_of(tmp_path, run.url))
            await mounted(node, f"{registry.host}/team/app:1", target)
            await read(target / "app.py")
        reader = asyncio.create_task(read(target / "big.bin"))
        await until(lambda: node.statistics()["waiting"]["for_upstream"] > 0)
        assert await read(target / "app.py") == b"print('hi')\n" * 1000, "what is here is read meanwhile"
        port = int(run.url.rpartition(":")[2])
        async with running(tmp_path / "superpeer", registry.host, port=port):
            assert await reader == BIG
        assert "read waits for upstream" in [row["kind"] for row in node.statistics()["fallbacks"]]
        await stack.aclose()


async def test_when_patience_ends_reads_fail_and_later_ones_succeed(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    options = {"read": ReadConfig(patience=0.2, connect=0.2)}
    async with contextlib.AsyncExitStack() as stack:
        async with running(tmp_path / "superpeer", registry.host) as run:
            node = await stack.enter_async_context(node_of(tmp_path, run.url, **options))
            await mounted(node, f"{registry.host}/team/app:1", target)
        with pytest.raises(OSError) as error:  # noqa: PT011  # the errno is looked at below
            await read(target / "big.bin")
        assert error.value.errno == errno.EIO
        assert node.statistics()["reads"]["errors"] > 0
        port = int(run.url.rpartition(":")[2])
        async with running(tmp_path / "superpeer", registry.host, port=port):
            assert await read(target / "big.bin") == BIG
        await stack.aclose()


async def test_a_superpeer_that_is_not_there_fails_the_mount_within_seconds_and_leaves_nothing(
    tmp_path: Path, target: Path
) -> None:
    async with node_of(tmp_path, "http://127.0.0.1:1") as node:
        with pytest.raises(Unavailable, match="cannot connect"):
            async with asyncio.timeout(10):
                await mounted(node, "127.0.0.1:5000/team/app:1", target)
        assert node.statistics()["mounts"] == []
        assert loops_below(tmp_path) == []


async def test_a_mount_in_use_is_busy_and_a_forced_unmount_frees_it_while_reads_hang(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with running(tmp_path / "superpeer", registry.host) as run:
            node = await stack.enter_async_context(node_of(tmp_path, run.url))
            await mounted(node, f"{registry.host}/team/app:1", target)
        reader = asyncio.create_task(read(target / "big.bin"))
        await until(lambda: node.statistics()["waiting"]["for_upstream"] > 0)
        with pytest.raises(Conflict):
            await node.mounts.unmount(str(target))
        await node.mounts.unmount(str(target), force=True)
        with pytest.raises(OSError) as error:  # noqa: PT011  # the errno is looked at below
            await reader
        assert error.value.errno == errno.EIO
        assert not await in_thread(lambda: kernel.is_mounted(target))
        await until(lambda: loops_below(tmp_path) == [])
        await stack.aclose()


async def test_a_full_store_goes_on_reading_without_keeping_and_says_so(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, store=StoreConfig(limit=200_000)) as node:
            await mounted(node, f"{registry.host}/team/app:1", target)
            assert await read(target / "big.bin") == BIG
            assert "not kept: store full" in [row["kind"] for row in node.statistics()["fallbacks"]]
            assert node.statistics()["store"]["bytes"] <= 200_000


@pytest.mark.parametrize(
    ("reference", "directory", "error"),
    [("team/none:1", "mnt", NotFound), ("team/app:1", "nowhere", NotFound), ("team/app@sha256:12", "mnt", DadiError)],
)
async def test_a_mount_that_fails_leaves_nothing(
    tmp_path: Path, registry: FakeRegistry, target: Path, reference: str, directory: str, error: type[DadiError]
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        with pytest.raises(error):
            await mounted(node, f"{registry.host}/{reference}", tmp_path / directory)
        assert (node.statistics()["mounts"], loops_below(tmp_path)) == ([], [])
        assert list(Path(node.config.state, "mounts").iterdir()) == []


async def test_without_a_superpeer_the_node_is_its_own(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    config = RegistryConfig(allowed=(registry.host,), plain_http=(registry.host,))
    async with node_of(tmp_path, registry=config) as node:
        row = await mounted(node, f"{registry.host}/team/app:1", target)
        assert await read(target / "big.bin") == BIG
        assert row["state"] == "local", "indexed on first sight: all of it came by, and was kept once"
        assert node.store.statistics()["bytes"] < 2 * len(BIG)


async def test_a_chunk_table_that_lies_breaks_the_device_and_is_never_local(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        # A superpeer whose disk was changed behind its back, and whose index goes with it.
        answer = await run.image(f"{registry.host}/team/app:1")
        await lie_about(run, answer.reference)
        async with node_of(tmp_path, run.url, backfill=EAGER, read=ReadConfig(patience=0.1)) as node:
            await mounted(node, f"{registry.host}/team/app:1", target)
            await until(lambda: node.statistics()["mounts"][0]["state"] == "broken")
            Path("/proc/sys/vm/drop_caches").write_text("3")
            with pytest.raises(OSError, match="Input/output error"):
                await read(target / "big.bin")
            assert "does not match its digest" in node.statistics()["mounts"][0]["devices"][1]["error"]


async def lie_about(run: Any, reference: str) -> None:
    """Make the superpeer's index of an image, and its copy of the first layer, agree on wrong bytes."""
    import msgspec

    from dadi.index import image as image_index
    from dadi.index.chunks import Blob, table_of

    catalog, store = run.superpeer.catalog, run.superpeer.store
    record = catalog.find(reference, "linux/amd64")
    index = catalog.image(record)
    at = LOWER.index(BIG[:64]) + 3 * CHUNK
    wrong = LOWER[:at] + bytes(64) + LOWER[at + 64 :]
    layer = msgspec.structs.replace(index.layers[0], table=table_of(wrong, CHUNK))
    assert await store.remove(layer.diff_id)
    ingest = store.ingest()
    await asyncio.to_thread(ingest.write, wrong)
    await store.commit(ingest, Blob(layer.diff_id, layer.table))
    lie = msgspec.structs.replace(index, layers=(layer, *index.layers[1:]))
    await catalog.add(record.reference, record.platform, record.top_digest, lie, image_index.encode(lie))


async def test_a_local_mount_outlives_a_restart_although_the_superpeer_is_away(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, backfill=EAGER, unmount_on_stop=False) as node:
            row = await mounted(node, f"{registry.host}/team/app:1", target)
            await until(lambda: node.statistics()["mounts"][0]["state"] == "local")
            for blob in node.store.digests():
                assert not await node.store.remove(blob), "all of it is held while it is mounted"
    async with node_of(tmp_path, "http://127.0.0.1:1") as again:
        assert again.statistics()["mounts"][0]["state"] == "local"
        assert again.statistics()["mounts"][0]["devices"][0]["device"] == row["devices"][0]["device"]
        assert await read(target / "big.bin") == BIG


async def test_what_cannot_be_restored_is_shown_tried_again_and_can_be_dropped(
    tmp_path: Path, registry: FakeRegistry, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(restoring, "_RETRY_EVERY", 0.05)
    async with running(tmp_path / "superpeer", registry.host) as run:
        async with node_of(tmp_path, run.url, unmount_on_stop=False) as node:
            row = await mounted(node, f"{registry.host}/team/app:1", target)
            metadata = row["devices"][0]["blob"]
        os.rename(tmp_path / f"node/state/store/blobs/{metadata[7:]}", tmp_path / "away")
    async with node_of(tmp_path, run.url, unmount_on_stop=False) as again:
        (lost,) = again.statistics()["mounts"]
        assert (lost["state"], lost["directory"]) == ("lost", str(target))
        assert "cannot connect" in lost["error"]
        port = int(run.url.rpartition(":")[2])
        async with running(tmp_path / "superpeer", registry.host, port=port):
            await until(lambda: again.statistics()["mounts"][0]["state"] == "lazy")
            assert await read(target / "small.txt") == b"hello\n"
        await again.mounts.unmount(str(target))
        assert again.statistics()["mounts"] == []


async def test_a_directory_has_one_name_whatever_link_leads_to_it(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    link = tmp_path / "link"
    link.symlink_to(target)
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        row = await mounted(node, f"{registry.host}/team/app:1", link)
        assert row["directory"] == str(target)
        with pytest.raises(Conflict):
            await mounted(node, f"{registry.host}/team/other:1", target)
        await node.mounts.unmount(str(link))
        assert not await in_thread(lambda: kernel.is_mounted(target))


async def test_two_nodes_cannot_share_a_run_directory(tmp_path: Path, registry: FakeRegistry, target: Path) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        config = NodeConfig(state=str(tmp_path / "other"), run=node.config.run, superpeers=(run.url,))
        with pytest.raises(Conflict, match="used by another process"):
            await Node.start(config)
        await mounted(node, f"{registry.host}/team/app:1", target)
        assert await read(target / "small.txt") == b"hello\n"


async def test_many_unmounts_that_wait_for_readahead_do_not_stop_the_node(
    tmp_path: Path, registry: FakeRegistry
) -> None:
    """Each waits in the kernel for reads whose chunks must be verified: these must not need the same threads."""
    directories = []
    for number in range(10):
        registry.add_image("team/many", str(number), [tar_of(**{"big.bin": BIG + b"%d" % number})])
        directories.append(tmp_path / f"mnt{number}")
        directories[-1].mkdir()
    async with contextlib.AsyncExitStack() as stack:
        async with running(tmp_path / "superpeer", registry.host) as run:
            node = await stack.enter_async_context(node_of(tmp_path, run.url))
            for number, directory in enumerate(directories):
                await mounted(node, f"{registry.host}/team/many:{number}", directory)
        for directory in directories:
            await in_thread(partial(begin_to_read, directory / "big.bin"))
        await until(lambda: node.statistics()["waiting"]["for_upstream"] >= 10)
        unmounts = [asyncio.create_task(node.mounts.unmount(str(directory))) for directory in directories]
        port = int(run.url.rpartition(":")[2])
        async with running(tmp_path / "superpeer", registry.host, port=port), asyncio.timeout(60):
            await asyncio.gather(*unmounts)
        assert node.statistics()["mounts"] == []
        await stack.aclose()


async def test_many_readers_of_a_cold_image_cost_one_copy(
    tmp_path: Path, registry: FakeRegistry, target: Path
) -> None:
    async with running(tmp_path / "superpeer", registry.host) as run, node_of(tmp_path, run.url) as node:
        await mounted(node, f"{registry.host}/team/app:1", target)

        def chunks_of_it(seed: int) -> bool:
            rng = random.Random(seed)
            with open(target / "big.bin", "rb", buffering=0) as file:
                for _ in range(50):
                    at = rng.randrange(len(BIG))
                    if os.pread(file.fileno(), 5000, at) != BIG[at : at + 5000]:
                        return False
            return True

        work: list[Awaitable[bool]] = [in_thread(partial(chunks_of_it, seed)) for seed in range(8)]
        assert all(await asyncio.gather(*work))
        assert node.statistics()["sources"][0]["bytes"] <= len(LOWER) + 4096 * 100
