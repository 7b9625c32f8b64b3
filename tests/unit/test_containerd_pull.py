"""The steps of a pull, with a containerd that remembers and fails as it is told: order, leases, what is kept.

A little longer than 400 lines: half of it is the containerd that remembers.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
from collections.abc import AsyncGenerator, Callable
from typing import Any

import pytest

from dadi.containerd import labels
from dadi.containerd.client import Info
from dadi.containerd.pull import LAZY, ORDINARY, PRESENT, Pull, PullReport
from dadi.errors import AlreadyExists, Conflict, DigestMismatch, NotFound, StoreFull, Unavailable
from dadi.oci import manifest as manifests
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor, Index, Manifest
from dadi.oci.platforms import Platform
from dadi.oci.reference import Reference
from dadi.oci.registry import ResolvedImage
from dadi.publish.progress import Progress

PLATFORM = Platform("linux", "amd64")
REFERENCE = Reference.parse("r.example/app:1")


def sha(data: bytes | str) -> str:
    return "sha256:" + hashlib.sha256(data if isinstance(data, bytes) else data.encode()).hexdigest()


class FakeRegistryClient:
    """One image, perhaps in an index; `asked` says what for."""

    def __init__(self, layers: int = 3, *, index: bool = True) -> None:
        self.layers = [f"layer {n}".encode() for n in range(layers)]
        self.diff_ids = [sha(f"diff {n}") for n in range(layers)]
        self.asked: list[str] = []
        self.wrong: list[bytes] = []
        """What is sent instead of layers, at first."""
        self.stalls = False
        config = {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": self.diff_ids}}
        self.config = json.dumps(config).encode()
        self.manifest_raw = json.dumps({
            "schemaVersion": 2, "mediaType": media_types.OCI_MANIFEST,
            "config": {"mediaType": media_types.OCI_CONFIG, "digest": sha(self.config), "size": len(self.config)},
            "layers": [{"mediaType": media_types.OCI_LAYER_GZIP, "digest": sha(data), "size": len(data)}
                       for data in self.layers],
        }).encode()  # fmt: skip
        entry = {"mediaType": media_types.OCI_MANIFEST, "digest": sha(self.manifest_raw),
                 "size": len(self.manifest_raw), "platform": {"os": "linux", "architecture": "amd64"}}  # fmt: skip
        other = {**entry, "digest": sha("other"), "platform": {"os": "linux", "architecture": "arm64"}}
        document = {"schemaVersion": 2, "mediaType": media_types.OCI_INDEX, "manifests": [other, entry]}
        self.index_raw = json.dumps(document).encode() if index else None

    @property
    def top(self) -> str:
        return sha(self.index_raw or self.manifest_raw)

    async def resolve(self, ref: Reference) -> Descriptor:
        self.asked.append("resolve")
        return Descriptor("", self.top, 1)

    async def image(self, ref: Reference, platform: Platform) -> ResolvedImage:
        self.asked.append("image")
        assert ref.digest == self.top, "what was resolved is what is pulled, whatever the tag leads to by now"
        manifest = manifests.parse(self.manifest_raw)
        assert isinstance(manifest, Manifest)
        descriptor = Descriptor(media_types.OCI_MANIFEST, sha(self.manifest_raw), len(self.manifest_raw))
        return ResolvedImage(
            ref, self.top if self.index_raw else None, descriptor, self.manifest_raw, manifest, self.config, PLATFORM,
            tuple(self.diff_ids),
        )  # fmt: skip

    async def manifest(self, ref: Reference, digest: str | None = None) -> tuple[Descriptor, bytes]:
        self.asked.append("manifest")
        assert digest == self.top
        assert self.index_raw is not None
        return Descriptor(media_types.OCI_INDEX, self.top, len(self.index_raw)), self.index_raw

    async def blob(
        self, ref: Reference, descriptor: Descriptor, *, offset: int = 0, mirrors: bool = True
    ) -> AsyncGenerator[bytes, None]:
        self.asked.append(f"blob{'' if mirrors else ' itself'}")
        if self.stalls:
            await asyncio.Event().wait()
        yield self.wrong.pop() if self.wrong else {sha(data): data for data in self.layers}[descriptor.digest]


class FakeContainerd:
    """containerd in memory; snapshots named in `lazy` are there as soon as they are asked for."""

    namespace = "ns"

    def __init__(self, lazy: list[str] | None = None) -> None:
        self.lazy = set(lazy or ())
        self.content: dict[str, bytes] = {}
        self.labels: dict[str, dict[str, str]] = {}
        self.snapshots: dict[str, str] = {}
        self.images: dict[str, str] = {}
        self.leases: dict[str, bool] = {}
        """Whether garbage was collected when they ended; what is under way is not in here."""
        self.open: set[str] = set()
        self.held: list[str] = []
        self.prepared: list[tuple[str, str, dict[str, str]]] = []
        self.removed: list[str] = []
        self.fail: dict[str, Exception] = {}
        self.unpacks_to: dict[str, str] = {}
        self.leased = False

    def under(self, lease: str) -> FakeContainerd:
        assert lease in self.open
        return self

    async def _called(self, name: str) -> None:
        await asyncio.sleep(0)
        if name in self.fail:
            raise self.fail[name]

    async def create_lease(self, lease: str, labels: dict[str, str]) -> None:
        self.open.add(lease)
        assert labels.keys() == {"containerd.io/gc.expire"}
        await self._called("create_lease")

    async def delete_lease(self, lease: str, *, collect: bool) -> None:
        await self._called("delete_lease")
        self.open.remove(lease)
        self.leases[lease] = collect

    async def hold_snapshot(self, lease: str, snapshotter: str, name: str) -> None:
        assert lease in self.open
        self.held.append(name)

    async def info(self, digest: str) -> Info:
        if digest not in self.content:
            raise NotFound(digest)
        return Info(digest, len(self.content[digest]), dict(self.labels.get(digest, {})))

    async def label(self, digest: str, labels: dict[str, str]) -> None:
        assert digest in self.content
        self.labels.setdefault(digest, {}).update(labels)

    async def read(self, digest: str, limit: int) -> bytes:
        if digest not in self.content:
            raise NotFound(digest)
        return self.content[digest]

    async def write(self, name: str, digest: str, size: int, source: Callable[[], AsyncGenerator[bytes, None]]) -> bool:
        await self._called("write")
        if digest in self.content:
            return False
        data = b"".join([piece async for piece in source()])
        if sha(data) != digest:
            raise Conflict("unexpected commit digest")
        self.content[digest] = data
        return True

    async def abort(self, name: str) -> None:
        await self._called("abort")

    async def check_snapshotter(self, snapshotter: str) -> None:
        await self._called("check_snapshotter")

    async def prepare(self, snapshotter: str, key: str, parent: str, labels: dict[str, str]) -> list[Any]:
        await self._called("prepare")
        chain_id = labels["containerd.io/snapshot.ref"]
        assert key.startswith("extract-")
        assert key.endswith(f" {chain_id}")
        assert not parent or parent in self.snapshots
        self.prepared.append((chain_id, parent, labels))
        if chain_id in self.lazy:
            self.snapshots[chain_id] = parent
        if chain_id in self.snapshots:
            raise AlreadyExists(chain_id)
        return []

    async def has_snapshot(self, snapshotter: str, name: str) -> bool:
        return name in self.snapshots

    async def commit(self, snapshotter: str, name: str, key: str, labels: dict[str, str]) -> None:
        self.snapshots[name] = "unpacked"
        await self._called("commit")

    async def remove(self, snapshotter: str, key: str) -> None:
        self.removed.append(key)

    async def apply(self, layer: Descriptor, mounts: list[Any]) -> str:
        await self._called("apply")
        assert layer.digest in self.content
        return self.unpacks_to[layer.digest]

    async def image(self, name: str) -> str | None:
        return self.images.get(name)

    async def set_image(self, name: str, target: Descriptor) -> None:
        assert target.digest in self.content
        self.images[name] = target.digest


class Notices(Progress):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.size = 0

    def notice(self, text: str) -> None:
        self.said.append(text)

    def expect(self, *, layers: int = 0, size: int = 0) -> None:
        self.size += size

    def advance(self, size: int) -> None:
        self.size -= size


class Pulling:
    """A pull of `registry`'s image into `containerd`."""

    def __init__(self, registry: FakeRegistryClient, containerd: FakeContainerd) -> None:
        self.registry, self.containerd, self.notices = registry, containerd, Notices()
        digests = [sha(data) for data in registry.layers]
        containerd.unpacks_to = dict(zip(digests, registry.diff_ids, strict=True))
        self.chain = labels.chain_ids(registry.diff_ids)

    async def run(self, reference: Reference = REFERENCE) -> PullReport:
        pull = Pull(self.registry, self.containerd, reference, PLATFORM, progress=self.notices)
        return await pull.run()


def pulling(lazy: slice = slice(None), **options: Any) -> Pulling:
    """A pull in which these layers can be lazy."""
    registry = FakeRegistryClient(**options)
    return Pulling(registry, FakeContainerd(labels.chain_ids(registry.diff_ids)[lazy]))


async def test_a_lazy_pull_fetches_documents_only_and_leaves_no_lease() -> None:
    one = pulling()
    report = await one.run()
    containerd, registry = one.containerd, one.registry
    config, manifest = sha(registry.config), sha(registry.manifest_raw)
    assert [row.how for row in report.layers] == [LAZY] * 3
    assert containerd.content.keys() == {registry.top, manifest, config}
    assert containerd.images == {str(REFERENCE): registry.top}
    assert (containerd.open, list(containerd.leases.values())) == (set(), [False])
    assert [(chain_id, parent) for chain_id, parent, _ in containerd.prepared] == [
        (one.chain[0], ""), (one.chain[1], one.chain[0]), (one.chain[2], one.chain[1]),
    ]  # fmt: skip
    assert containerd.held == one.chain
    assert containerd.labels[config]["containerd.io/gc.ref.snapshot.dadi"] == one.chain[-1]
    assert containerd.labels[registry.top]["containerd.io/gc.ref.content.m.1"] == manifest
    assert containerd.labels[manifest]["containerd.io/gc.ref.content.config"] == config
    assert one.notices.said == []
    said = containerd.prepared[1][2]
    assert said[labels.IMAGE_REFERENCE] == "r.example/app:1", "the name, without what it leads to now"
    assert said[labels.MANIFEST_DIGEST] == manifest


async def test_a_second_pull_asks_for_the_tag_and_nothing_else() -> None:
    one = pulling()
    first = await one.run()
    one.registry.asked.clear()
    second = await one.run()
    assert one.registry.asked == ["resolve"]
    assert second.already
    assert [row.how for row in second.layers] == [PRESENT] * 3
    assert (second.chain_id, second.digest, second.config_digest) == (
        first.chain_id, first.digest, first.config_digest,
    )  # fmt: skip
    assert len(one.containerd.leases) == 1


async def test_a_second_pull_by_digest_asks_nobody() -> None:
    one = pulling(index=False)
    reference = REFERENCE.at(one.registry.top)
    await one.run(reference)
    one.registry.asked.clear()
    assert (await one.run(reference)).already
    assert one.registry.asked == []


@pytest.mark.parametrize("what", ["snapshot", "config", "manifest", "label"])
async def test_what_is_not_whole_is_pulled_again(what: str) -> None:
    one = pulling()
    await one.run()
    config = sha(one.registry.config)
    match what:
        case "snapshot":
            del one.containerd.snapshots[one.chain[-1]]
        case "label":
            del one.containerd.labels[config]["containerd.io/gc.ref.snapshot.dadi"]
        case _:
            del one.containerd.content[config if what == "config" else sha(one.registry.manifest_raw)]
    assert not (await one.run()).already
    assert (await one.run()).already


async def test_layers_that_cannot_be_lazy_are_downloaded_unpacked_and_committed() -> None:
    one = pulling(slice(0, 1))
    report = await one.run()
    assert [row.how for row in report.layers] == [LAZY, ORDINARY, ORDINARY]
    digests = [sha(data) for data in one.registry.layers]
    assert digests[0] not in one.containerd.content
    for digest, diff_id in zip(digests[1:], one.registry.diff_ids[1:], strict=True):
        assert one.containerd.labels[digest]["containerd.io/uncompressed"] == diff_id
        assert one.containerd.labels[digest]["containerd.io/distribution.source.r.example"] == "app"
    assert report.downloaded_bytes == sum(len(data) for data in one.registry.layers[1:])
    assert len(one.notices.said) == 1
    assert "cannot be lazy" in one.notices.said[0]
    assert one.notices.size == 0, "what was expected has come"


async def test_a_lazy_layer_above_an_ordinary_one_is_not_waited_for() -> None:
    one = pulling(slice(1, None))
    report = await one.run()
    assert [row.how for row in report.layers] == [ORDINARY, LAZY, LAZY]
    assert one.containerd.leases


async def test_a_layer_that_is_wrong_once_is_asked_of_the_registry_itself() -> None:
    one = pulling(slice(0, 0), layers=1)
    one.registry.wrong = [b"lie"]
    assert [row.how for row in (await one.run()).layers] == [ORDINARY]
    assert one.registry.asked[-2:] == ["blob", "blob itself"]


@pytest.mark.parametrize("what", ["layer", "diff ID"])
async def test_wrong_bytes_end_the_pull_and_the_lease(what: str) -> None:
    one = pulling(slice(0, 0), layers=1)
    if what == "layer":
        one.registry.wrong = [b"lie", b"lie"]
    else:
        one.containerd.unpacks_to[sha(one.registry.layers[0])] = sha("else")
    with pytest.raises(DigestMismatch):
        await one.run()
    assert (one.containerd.open, list(one.containerd.leases.values())) == (set(), [True])
    assert one.containerd.images == {}


@pytest.mark.parametrize("step", ["create_lease", "write", "prepare", "apply", "commit"])
async def test_whatever_fails_ends_the_lease_and_has_garbage_collected(step: str) -> None:
    one = pulling(slice(0, 0))
    one.containerd.fail[step] = StoreFull("full")
    with pytest.raises(StoreFull):
        await one.run()
    assert (one.containerd.open, list(one.containerd.leases.values())) == (set(), [True])
    assert one.containerd.images == {}


async def test_a_cancelled_pull_ends_its_lease() -> None:
    one = pulling(slice(0, 0))
    one.registry.stalls = True
    task = asyncio.create_task(one.run())
    while "blob" not in one.registry.asked:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert (one.containerd.open, list(one.containerd.leases.values())) == (set(), [True])


async def test_a_lease_that_cannot_be_deleted_is_said_and_does_not_hide_what_happened() -> None:
    one = pulling()
    one.containerd.fail["delete_lease"] = Unavailable("gone")
    assert len((await one.run()).layers) == 3
    assert "ends by itself" in one.notices.said[0]
    one = pulling()
    one.containerd.fail |= {"delete_lease": Unavailable("gone"), "prepare": StoreFull("full")}
    with pytest.raises(StoreFull):
        await one.run()


async def test_somebody_who_commits_the_same_layer_first_is_no_error() -> None:
    one = pulling(slice(0, 0), layers=1)
    one.containerd.fail["commit"] = AlreadyExists("there")
    await one.run()
    assert len(one.containerd.removed) == 1


async def test_a_layer_that_is_there_and_is_not_ends_in_an_error() -> None:
    one = pulling(layers=1)
    one.containerd.fail["prepare"] = AlreadyExists("there")
    with pytest.raises(Conflict, match="is there, and that it is not"):
        await one.run()
    assert list(one.containerd.leases.values()) == [True]


async def test_an_unknown_snapshotter_is_found_before_the_registry_is_asked() -> None:
    one = pulling()
    one.containerd.fail["check_snapshotter"] = Conflict("none")
    with pytest.raises(Conflict):
        await one.run()
    assert one.registry.asked == []


async def test_an_image_without_layers_has_no_snapshot() -> None:
    one = pulling(layers=0)
    report = await one.run()
    assert (report.chain_id, report.layers, one.containerd.prepared) == ("", (), [])
    assert (await one.run()).already


def test_the_index_in_these_tests_is_one() -> None:
    raw = FakeRegistryClient().index_raw
    assert raw is not None
    assert isinstance(manifests.parse(raw), Index)
