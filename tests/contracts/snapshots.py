"""The contract of containerd's snapshot service, as tests over gRPC: the cases that containerd's own suite for
snapshotters checks, and what its proxy needs besides.

Inherit from `SnapshotsContract` (metadata), and as root from `SnapshotFilesContract` (what is in the mounts); give a
fixture `client`, of a snapshotter with nothing in it. containerd's own overlayfs passes them too
(tests/system/test_snapshotter_containerd.py): what they ask for is containerd's behaviour and not our idea of it.
Longer than 400 lines: it is one contract.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.field_mask_pb2 import FieldMask

from dadi.node import kernel
from dadi.snapshotter.proto import snapshots_pb2 as pb
from dadi.snapshotter.proto.snapshots_pb2_grpc import SnapshotsStub

ROOT = {"containerd.io/gc.root": "contract"}
"""A label that keeps containerd's garbage collection away from what a test has made."""
TIMEOUT = 30.0
Code = grpc.StatusCode
_numbers = itertools.count()


class Client:
    """The service as a client sees it. A failed call raises grpc.aio.AioRpcError; see `fails`."""

    def __init__(self, channel: Any, snapshotter: str = "dadi", namespace: str = "") -> None:
        self.stub = SnapshotsStub(channel)
        self._name = {"snapshotter": snapshotter}
        self._options = {"timeout": TIMEOUT, "metadata": [("containerd-namespace", namespace)] if namespace else []}

    async def prepare(self, key: str, parent: str = "", labels: dict[str, str] | None = None) -> list[Any]:
        request = pb.PrepareSnapshotRequest(**self._name, key=key, parent=parent, labels=ROOT | (labels or {}))
        return list((await self.stub.Prepare(request, **self._options)).mounts)

    async def view(self, key: str, parent: str = "", labels: dict[str, str] | None = None) -> list[Any]:
        request = pb.ViewSnapshotRequest(**self._name, key=key, parent=parent, labels=ROOT | (labels or {}))
        return list((await self.stub.View(request, **self._options)).mounts)

    async def mounts(self, key: str) -> list[Any]:
        return list((await self.stub.Mounts(pb.MountsRequest(**self._name, key=key), **self._options)).mounts)

    async def commit(self, name: str, key: str, labels: dict[str, str] | None = None, parent: str = "") -> None:
        request = pb.CommitSnapshotRequest(
            **self._name, name=name, key=key, labels=ROOT | (labels or {}), parent=parent
        )
        await self.stub.Commit(request, **self._options)

    async def remove(self, key: str) -> None:
        await self.stub.Remove(pb.RemoveSnapshotRequest(**self._name, key=key), **self._options)

    async def stat(self, key: str) -> Any:
        return (await self.stub.Stat(pb.StatSnapshotRequest(**self._name, key=key), **self._options)).info

    async def update(self, info: Any, *paths: str) -> Any:
        request = pb.UpdateSnapshotRequest(**self._name, info=info, update_mask=FieldMask(paths=paths))
        return (await self.stub.Update(request, **self._options)).info

    async def list(self, *filters: str) -> list[Any]:
        found: list[Any] = []
        async for part in self.stub.List(pb.ListSnapshotsRequest(**self._name, filters=filters), **self._options):
            found += part.info
        return found

    async def names(self, *filters: str) -> list[str]:
        return sorted(info.name for info in await self.list(*filters))

    async def usage(self, key: str) -> tuple[int, int]:
        answer = await self.stub.Usage(pb.UsageRequest(**self._name, key=key), **self._options)
        return answer.size, answer.inodes

    async def cleanup(self) -> None:
        await self.stub.Cleanup(pb.CleanupRequest(**self._name), **self._options)

    async def committed(self, name: str, parent: str = "", labels: dict[str, str] | None = None) -> None:
        """Make an empty committed snapshot."""
        await self.prepare(f"{name}-active", parent)
        await self.commit(name, f"{name}-active", labels)


@contextlib.contextmanager
def fails(code: Any) -> Iterator[Any]:
    """Expect a status code."""
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        yield caught
    assert caught.value.code() is code, caught.value.details()


# ---- mounts and trees


@contextlib.contextmanager
def mounted(mounts: list[Any], directory: Path) -> Iterator[Path]:
    """Mount what a snapshotter said, as containerd does it; take it down again."""
    target = directory / f"mounted-{next(_numbers)}"
    target.mkdir()
    (mount,) = mounts
    if mount.type == "bind":
        assert "rbind" in mount.options
        kernel.mount(mount.source, target, "", 4096 | 16384)  # MS_BIND, MS_REC
        if "ro" in mount.options:
            kernel.mount(mount.source, target, "", 32 | 4096 | kernel.READ_ONLY)  # MS_REMOUNT
    else:
        with _compacted(list(mount.options)) as options:
            kernel.mount(mount.source, target, mount.type, 0, ",".join(options))
    try:
        yield target
    finally:
        kernel.umount(target)
        target.rmdir()


@contextlib.contextmanager
def _compacted(options: list[str]) -> Iterator[list[str]]:
    """Give options that fit into a page: lower directories are named from the directory that they have in common."""
    if len(",".join(options)) < 4096 - 512:
        yield options
        return
    (lower,) = (option for option in options if option.startswith("lowerdir="))
    lowers = lower.removeprefix("lowerdir=").split(":")
    common, before = os.path.commonpath(lowers), os.getcwd()
    short = "lowerdir=" + ":".join(os.path.relpath(path, common) for path in lowers)
    os.chdir(common)
    try:
        yield [*(option for option in options if option != lower), short]
    finally:
        os.chdir(before)


def tree(root: Path) -> dict[str, tuple[int, int, int, bytes]]:
    """Return path → mode, owner, group, content, of everything below a directory."""
    found = {}
    for path in sorted(root.rglob("*")):
        status = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path.relative_to(root))] = (status.st_mode, status.st_uid, status.st_gid, content)
    return found


Step = Callable[[Path], None]


def write(name: str, content: str = "", mode: int = 0o644) -> Step:
    def step(root: Path) -> None:
        (root / name).write_text(content)
        (root / name).chmod(mode)

    return step


def mkdir(name: str, mode: int = 0o755) -> Step:
    def step(root: Path) -> None:
        (root / name).mkdir()
        (root / name).chmod(mode)

    return step


def remove(name: str) -> Step:
    def step(root: Path) -> None:
        path = root / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()

    return step


def chown(name: str, owner: int) -> Step:
    return lambda root: os.chown(root / name, owner, owner)


def rename(old: str, new: str) -> Step:
    def step(root: Path) -> None:
        (root / old).rename(root / new)

    return step


def link(old: str, new: str) -> Step:
    return lambda root: os.link(root / old, root / new)


async def layered(client: Client, work: Path, *layers: list[Step], prefix: str = "") -> str:
    """Apply layer after layer through mounts, and beside it to a plain directory; compare at each step and at the end.

    Returns the name of the topmost committed snapshot.
    """
    flat = work / f"flat-{next(_numbers)}"
    flat.mkdir()
    parent = ""
    for number, steps in enumerate(layers):
        key = f"{prefix}prepare-{number}"
        with mounted(await client.prepare(key, parent), work) as root:
            assert tree(root) == tree(flat)
            for step in steps:
                step(flat)
                step(root)
            assert tree(root) == tree(flat)
        parent = f"{prefix}committed-{number}"
        await client.commit(parent, key)
    with mounted(await client.view(f"{prefix}view", parent), work) as root:
        assert tree(root) == tree(flat)
    await client.remove(f"{prefix}view")
    return parent


# ---- the contract


class SnapshotsContract:
    """What needs no mount."""

    async def base(self, client: Client) -> dict[str, tuple[int, str]]:
        """Make one of each: name → kind, parent."""
        await client.committed("c1")
        await client.committed("c2", "c1")
        await client.prepare("a1", "c2")
        await client.prepare("a2")
        await client.view("v1", "c2")
        await client.view("v2")
        return {"c1": (pb.COMMITTED, ""), "c2": (pb.COMMITTED, "c1"), "a1": (pb.ACTIVE, "c2"), "a2": (pb.ACTIVE, ""),
                "v1": (pb.VIEW, "c2"), "v2": (pb.VIEW, "")}  # fmt: skip

    async def test_stat_says_kind_and_parent(self, client: Client) -> None:
        before = time.time_ns()
        for name, (kind, parent) in (await self.base(client)).items():
            info = await client.stat(name)
            assert (info.name, info.kind, info.parent) == (name, kind, parent)
            assert before <= info.created_at.ToNanoseconds() <= time.time_ns()
            assert info.created_at == info.updated_at

    async def test_a_committed_snapshot_has_another_name_and_the_old_key_is_gone(self, client: Client) -> None:
        await client.prepare("key")
        await client.commit("name", "key")
        with fails(Code.NOT_FOUND):
            await client.stat("key")
        assert (await client.stat("name")).kind == pb.COMMITTED
        await client.prepare("key")

    async def test_what_is_not_there_is_not_found(self, client: Client) -> None:
        with fails(Code.NOT_FOUND):
            await client.stat("none")
        with fails(Code.NOT_FOUND):
            await client.mounts("none")
        with fails(Code.NOT_FOUND):
            await client.remove("none")
        with fails(Code.NOT_FOUND):
            await client.commit("name", "none")
        with fails(Code.NOT_FOUND):
            await client.usage("none")
        with fails(Code.NOT_FOUND):
            await client.prepare("key", "none")
        with fails(Code.NOT_FOUND):
            await client.view("key", "none")
        with fails(Code.NOT_FOUND):
            await client.update(pb.Info(name="none", labels={"a": "b"}))
        assert await client.names() == []

    async def test_a_key_is_used_once(self, client: Client) -> None:
        await client.committed("parent")
        for first, second in itertools.product([client.prepare, client.view], repeat=2):
            await first("key", "parent")
            with fails(Code.ALREADY_EXISTS):
                await second("key", "parent")
            await client.remove("key")
        with fails(Code.ALREADY_EXISTS):
            await client.prepare("parent")

    async def test_commit_does_not_replace(self, client: Client) -> None:
        await client.committed("name")
        await client.prepare("key")
        with fails(Code.ALREADY_EXISTS):
            await client.commit("name", "key")
        assert (await client.stat("key")).kind == pb.ACTIVE

    async def test_a_parent_must_be_committed(self, client: Client) -> None:
        await client.prepare("active")
        await client.view("view")
        for parent in ("active", "view"):
            with fails(Code.INVALID_ARGUMENT):
                await client.prepare("key", parent)
            with fails(Code.INVALID_ARGUMENT):
                await client.view("key", parent)

    async def test_only_active_ones_are_committed(self, client: Client) -> None:
        await client.view("view")
        with fails(Code.FAILED_PRECONDITION):
            await client.commit("name", "view")
        assert await client.names() == ["view"]

    async def test_a_committed_snapshot_has_no_mounts(self, client: Client) -> None:
        await client.committed("name")
        with fails(Code.FAILED_PRECONDITION):
            await client.mounts("name")

    async def test_mounts_are_those_of_the_prepare(self, client: Client) -> None:
        await self.base(client)
        for key, parent in (("of none", ""), ("of one", "c1"), ("of two", "c2")):
            for make in (client.prepare, client.view):
                mounts = await make(key, parent)
                assert len(mounts) == 1
                assert await client.mounts(key) == mounts
                await client.remove(key)

    async def test_parents_are_removed_after_their_children(self, client: Client) -> None:
        await client.committed("base")
        await client.committed("middle", "base")
        await client.prepare("top", "middle")
        for name in ("base", "middle"):
            with fails(Code.FAILED_PRECONDITION) as caught:
                await client.remove(name)
            assert "remove" in caught.value.details()
        for name in ("top", "middle", "base"):
            await client.remove(name)
        assert await client.names() == []

    async def test_a_removed_name_can_be_used_again(self, client: Client) -> None:
        await client.committed("committed")
        await client.prepare("reused", "committed")
        await client.remove("reused")
        await client.view("reused", "committed")
        await client.remove("reused")
        await client.prepare("reused")
        await client.remove("committed")
        await client.commit("committed", "reused")
        assert (await client.stat("committed")).parent == ""

    async def test_update_changes_labels_and_nothing_else(self, client: Client) -> None:
        for name, (kind, parent) in (await self.base(client)).items():
            info = await client.stat(name)
            created, before = info.created_at.ToNanoseconds(), time.time_ns()
            info.parent = "does not exist"
            info.labels.clear()
            info.labels.update({**ROOT, "l1": "v1", "l2": "v2", "l3": "v3"})
            info = await client.update(info)
            assert info.labels == {**ROOT, "l1": "v1", "l2": "v2", "l3": "v3"}
            assert (info.name, info.kind, info.parent, info.created_at.ToNanoseconds()) == (name, kind, parent, created)
            assert before <= info.updated_at.ToNanoseconds() <= time.time_ns()
            assert await client.stat(name) == info

    async def test_update_by_field_paths(self, client: Client) -> None:
        await client.prepare("key", labels={"l1": "v1", "l2": "v2", "l3": "v3"})
        info = await client.update(pb.Info(name="key", labels={"l1": "new", "l4": "v4"}), "labels.l1", "labels.l2")
        assert info.labels == {**ROOT, "l1": "new", "l3": "v3"}
        info = await client.update(pb.Info(name="key", labels={**ROOT, "l4": "v4"}), "labels")
        assert info.labels == {**ROOT, "l4": "v4"}
        info = await client.update(pb.Info(name="key", labels={"with.a/dot": "v5"}), "labels.with.a/dot")
        assert info.labels == {**ROOT, "l4": "v4", "with.a/dot": "v5"}
        for path in ("parent", "name", "kind", "created_at", "nonsense"):
            with fails(Code.INVALID_ARGUMENT):
                await client.update(pb.Info(name="key", parent="other"), path)
        assert (await client.stat("key")).labels == info.labels

    async def test_commit_replaces_labels(self, client: Client) -> None:
        await client.prepare("key", labels={"old": "1"})
        await client.commit("name", "key", {"new": "2"})
        assert (await client.stat("name")).labels == {**ROOT, "new": "2"}

    async def test_a_label_has_a_largest_size(self, client: Client) -> None:
        await client.prepare("key", labels={"k": "v" * 4095})
        for labels in ({"k": "v" * 4096}, {"é" * 2000: "v" * 97}):
            with fails(Code.INVALID_ARGUMENT):
                await client.prepare("other", labels=labels)

    async def test_list_filters(self, client: Client) -> None:
        await client.prepare("a-np")
        await client.committed("p")
        await client.prepare("a", "p")
        await client.view("v", "p")
        await client.committed("p-wl", labels={"l": "1"})
        await client.prepare("a-wl", "p-wl", {"l": "2"})
        await client.view("v-wl", "p-wl", {"l": "3"})
        await client.prepare("a-np-wl", labels={"l": "2"})
        everything = ["a", "a-np", "a-np-wl", "a-wl", "p", "p-wl", "v", "v-wl"]
        for filters, expected in [
            ([], everything),
            ([""], everything),
            (['labels."containerd.io/gc.root"==contract'], everything),
            (["kind==active"], ["a", "a-np", "a-np-wl", "a-wl"]),
            (["kind==view"], ["v", "v-wl"]),
            (["kind==committed"], ["p", "p-wl"]),
            (["kind!=committed,kind!=active"], ["v", "v-wl"]),
            (["name==p", "name==a-np-wl"], ["a-np-wl", "p"]),
            (["name==a-wl,labels.l"], ["a-wl"]),
            (["name==a,labels.l"], []),
            (["parent==p"], ["a", "v"]),
            (['parent!=""'], ["a", "a-wl", "v", "v-wl"]),
            (["labels.l"], ["a-np-wl", "a-wl", "p-wl", "v-wl"]),
            (["labels.l==2"], ["a-np-wl", "a-wl"]),
            (["labels.l!=2"], ["a", "a-np", "p", "p-wl", "v", "v-wl"]),
            (["name~=^a"], ["a", "a-np", "a-np-wl", "a-wl"]),
            (["name~=/wl$/,kind==active"], ["a-np-wl", "a-wl"]),
            (["nonsense"], []),
            (["kind==nonsense"], []),
        ]:
            assert await client.names(*filters) == expected, filters

    async def test_the_filter_by_which_containerd_finds_a_remote_layer(self, client: Client) -> None:
        reference, parent = "sha256:" + "ab" * 32, "default/12/sha256:" + "cd" * 32
        await client.committed(parent)
        await client.committed("wanted", parent, {"containerd.io/snapshot.ref": reference})
        await client.committed("other parent", labels={"containerd.io/snapshot.ref": reference})
        ask = f'labels."containerd.io/snapshot.ref"=={reference},parent=="{parent}"'
        assert await client.names(ask) == ["wanted"]
        assert await client.names(f'labels."containerd.io/snapshot.ref"=={reference},parent==""') == ["other parent"]

    async def test_what_is_listed_is_what_stat_says(self, client: Client) -> None:
        await self.base(client)
        listed = await client.list()
        assert len(listed) == 6
        assert [await client.stat(info.name) for info in listed] == listed

    async def test_more_snapshots_than_fit_one_message_of_a_list(self, client: Client) -> None:
        await client.committed("parent")
        for number in range(204):
            await client.view(f"view-{number}", "parent")
        assert len(await client.names()) == 205
        assert len(await client.names("kind==view")) == 204

    async def test_names_with_any_characters(self, client: Client) -> None:
        names = ["/a/path", "ns/1/extract-5 sha256:00", "sp ace", "tab\tnewline\n", "ünïcödé 漢字 🐳", "../../etc",
                 ".", "%s%d", "'; DROP TABLE snapshots; --", 'quo"te', "back\\slash", "a" * 3000]  # fmt: skip
        for name in names:
            await client.committed(name)
            await client.prepare(f"{name} on it", name)
        assert await client.names("kind==committed") == sorted(names)
        for name in names:
            assert (await client.stat(f"{name} on it")).parent == name
            await client.remove(f"{name} on it")
            await client.remove(name)
        assert await client.names() == []

    async def test_many_at_once(self, client: Client) -> None:
        await client.committed("parent")
        await asyncio.gather(*(client.prepare(f"key-{number}", "parent") for number in range(20)))
        await asyncio.gather(*(client.commit(f"name-{number}", f"key-{number}") for number in range(20)))
        assert len(await client.names("parent==parent,kind==committed")) == 20
        mounts = await asyncio.gather(*(client.prepare(f"key-{n}", f"name-{n}") for n in range(20)))
        assert len({mount.SerializeToString() for (mount,) in mounts}) == 20
        await asyncio.gather(*(client.remove(f"key-{number}") for number in range(20)))
        await asyncio.gather(*(client.remove(f"name-{number}") for number in range(20)))
        assert await client.names() == ["parent"]

    async def test_of_many_with_one_key_one_wins(self, client: Client) -> None:
        done = await asyncio.gather(*(client.prepare("key") for _ in range(10)), return_exceptions=True)
        failed = [error for error in done if isinstance(error, grpc.aio.AioRpcError)]
        assert len(failed) == 9
        assert {error.code() for error in failed} == {Code.ALREADY_EXISTS}
        assert len(await client.mounts("key")) == 1


class SnapshotFilesContract:
    """What is in the mounts; needs root."""

    async def test_the_ordinary_way(self, client: Client, tmp_path: Path) -> None:
        with mounted(await client.prepare("preparing"), tmp_path) as root:
            for step in (write("foo", "foo\n", 0o777), mkdir("a"), mkdir("a/b"), mkdir("a/b/c")):
                step(root)
        await client.commit("committed", "preparing")
        with mounted(await client.prepare("next", "committed"), tmp_path) as root:
            assert sorted(tree(root)) == ["a", "a/b", "a/b/c", "foo"]
            for step in (write("bar", "bar\n", 0o777), write("foo", "bar\n", 0o777), remove("a/b")):
                step(root)
        await client.commit("committed-next", "next")
        with mounted(await client.view("view", "committed-next"), tmp_path) as root:
            assert sorted(tree(root)) == ["a", "bar", "foo"]
            assert (root / "foo").read_text() == "bar\n"
        with mounted(await client.view("first", "committed"), tmp_path) as root:
            assert (root / "foo").read_text() == "foo\n", "a layer does not change what is below it"

    async def test_a_file_is_replaced_by_an_upper_layer(self, client: Client, tmp_path: Path) -> None:
        await layered(
            client,
            tmp_path,
            [mkdir("etc", 0o700), write("etc/hosts", "10.0.0.1"), write("etc/profile", "PATH=/usr/bin")],
            [write("etc/hosts", "10.0.0.2"), write("etc/profile", "PATH=/usr/bin", 0o666), mkdir("root", 0o700),
             write("root/.bashrc", "PATH=/usr/sbin:/usr/bin")],
        )  # fmt: skip

    async def test_a_directory_is_replaced_and_nothing_shows_through(self, client: Client, tmp_path: Path) -> None:
        await layered(
            client,
            tmp_path,
            [mkdir("lib", 0o700), write("lib/hidden")],
            [remove("lib"), mkdir("lib", 0o700), write("lib/not-hidden")],
            [write("lib/newfile")],
        )

    async def test_a_deleted_file_stays_deleted(self, client: Client, tmp_path: Path) -> None:
        await layered(client, tmp_path, [write("foo", "foo"), write("foobar", "foobar")], [remove("foobar")], [])

    async def test_owners(self, client: Client, tmp_path: Path) -> None:
        names = ["opt", "opt/a", "opt/a/b", "opt/a/b/file.txt"]
        await layered(
            client,
            tmp_path,
            [mkdir("opt", 0o700), mkdir("opt/a", 0o700), mkdir("opt/a/b", 0o700), write("opt/a/b/file.txt", "hello")],
            [chown(name, 1) for name in names],
        )

    async def test_owners_of_directories_that_come_and_go(self, client: Client, tmp_path: Path) -> None:
        await layered(
            client,
            tmp_path,
            [*(mkdir(f"dir{n}", 0o700) for n in range(1, 6)), write("dir4/f1", "..."), write("dir5/f1", "..."),
             *(chown(name, 1) for name in ("dir1", "dir2", "dir3", "dir5", "dir5/f1"))],
            [chown("dir2", 0), remove("dir3"), chown("dir4", 1), chown("dir4/f1", 1)],
            [mkdir("dir3", 0o700), chown("dir3", 1), remove("dir5"), mkdir("dir5", 0o700), chown("dir5", 1)],
        )  # fmt: skip

    async def test_files_move_between_layers(self, client: Client, tmp_path: Path) -> None:
        await layered(
            client,
            tmp_path,
            [mkdir("dir1", 0o700), write("dir1/f1", "Hello"), mkdir("dir2", 0o700), write("dir2/f2", "...")],
            [mkdir("dir3", 0o700), write("dir3/f1", "Hello"), remove("dir1"), link("dir2/f2", "dir3/f2"),
             remove("dir2/f2")],
        )  # fmt: skip

    async def test_renames(self, client: Client, tmp_path: Path) -> None:
        await layered(
            client,
            tmp_path,
            [mkdir("files", 0o700), write("files/f1", "was here first!"), write("files/f2", "nothing interesting")],
            [write("files/f1-overwrite", "new content 1"), rename("files/f1-overwrite", "files/f1"),
             rename("files/f2", "files/f3")],
        )  # fmt: skip

    async def test_a_view_cannot_be_written_to(self, client: Client, tmp_path: Path) -> None:
        await client.committed("one")
        await client.committed("two", "one")
        for key, parent in (("of none", ""), ("of one", "one"), ("of two", "two")):
            with mounted(await client.view(key, parent), tmp_path) as root, pytest.raises(OSError, match="Read-only"):
                (root / "file").write_text("content")

    async def test_the_root_directory_is_for_everybody(self, client: Client, tmp_path: Path) -> None:
        before = os.umask(0o077)
        try:
            mounts = await client.prepare("key")
        finally:
            os.umask(before)
        with mounted(mounts, tmp_path) as root:
            assert root.stat().st_mode & 0o777 == 0o755

    async def test_the_root_directory_keeps_its_owner_in_layers_above(self, client: Client, tmp_path: Path) -> None:
        with mounted(await client.prepare("key"), tmp_path) as root:
            os.chown(root, 1234, 4321)
        await client.commit("name", "key")
        with mounted(await client.prepare("above", "name"), tmp_path) as root:
            assert (root.stat().st_uid, root.stat().st_gid) == (1234, 4321)

    async def test_a_hundred_and_twenty_eight_layers(self, client: Client, tmp_path: Path) -> None:
        parent = ""
        for number in range(128):
            with mounted(await client.prepare("key", parent), tmp_path) as root:
                write("overwritten", f"{number} was here")(root)
                write(f"file-{number}", "same")(root)
                if number:
                    remove("only")(root)
                mkdir("only")(root)
                write(f"only/{number}")(root)
            parent = f"committed-{number}"
            await client.commit(parent, "key")
        with mounted(await client.view("view", parent), tmp_path) as root:
            assert (root / "overwritten").read_text() == "127 was here"
            assert len(list(root.iterdir())) == 130
            assert [path.name for path in (root / "only").iterdir()] == ["127"]

    async def test_usage_counts_blocks_and_hard_links_once(self, client: Client, tmp_path: Path) -> None:
        with mounted(await client.prepare("key"), tmp_path) as root:
            empty = await client.usage("key")
            assert empty[1] == 1, "the root directory"
            (root / "file").write_bytes(os.urandom(1 << 20))
            os.link(root / "file", root / "again")
            os.sync()
            size, inodes = await client.usage("key")
            assert (1 << 20) <= size - empty[0] < (1 << 20) + (64 << 10)
            assert inodes == 2
            with open(root / "sparse", "wb") as file:
                file.truncate(1 << 30)
            os.sync()
            assert (await client.usage("key"))[0] - size < 64 << 10
            assert (await client.usage("key"))[1] == 3
        await client.commit("name", "key")
        committed = await client.usage("name")
        assert (committed[0] // (1 << 20), committed[1]) == (1, 3)
        await client.prepare("above", "name")
        assert (await client.usage("above"))[1] == 1, "without its parents"
        await client.view("view", "name")
        assert await client.usage("view") == (0, 0)
