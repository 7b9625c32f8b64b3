"""A lazy pull through containerd's API; `ctr image pull` of containerd 1.x downloads everything.

    1  what the reference leads to, from the registry; all there already: done
    2  a lease: what is made under it is not garbage until it ends
    3  index, manifest and config into the content store, each labelled with what it refers to
    4  for each layer, the lowest first, Prepare with the layer's chain ID and where it comes from:
         "exists already"   the snapshotter has it, lazily, or it is there from before
         mounts             it cannot be lazy: download, unpack, commit
    5  the config is labelled with the snapshot of all layers, and the image gets its name
    6  the lease ends. Whatever fails before 5, or a cancelled pull: it ends too, and containerd collects what there is

From 5 on `ctr run --snapshotter …` needs nothing more: it looks for the name, reads the three documents, and finds the
chain ID's snapshot.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec

from dadi.containerd import labels
from dadi.containerd.client import Containerd
from dadi.containerd.downloads import LayerDownloads
from dadi.containerd.reading import Unpacked, unpacked
from dadi.errors import AlreadyExists, Conflict, DadiError, DigestMismatch, NotFound
from dadi.oci import manifest as manifests
from dadi.oci import media_types
from dadi.oci.manifest import Descriptor, Index
from dadi.oci.platforms import Platform
from dadi.oci.reference import Reference
from dadi.oci.registry import RegistryClient, ResolvedImage
from dadi.publish.progress import Progress

LAZY, PRESENT, ORDINARY = "lazy", "there already", "not lazy: downloaded and unpacked"
_LEASE_TIME = datetime.timedelta(hours=24)
"""Until containerd ends the lease of a pull that was killed; containerd's own client has the same."""
_TRIES = 3
_MAX_DEPTH = 3


class LayerReport(msgspec.Struct, frozen=True):
    """One layer; `how` is LAZY, PRESENT or ORDINARY."""

    digest: str
    chain_id: str
    how: str
    compressed_bytes: int


class PullReport(msgspec.Struct, frozen=True):
    """What a pull has done. `already`: nothing. `name`: of the image in containerd."""

    name: str
    namespace: str
    snapshotter: str
    platform: str
    digest: str
    manifest_digest: str
    config_digest: str
    chain_id: str
    layers: tuple[LayerReport, ...]
    already: bool = False
    downloaded_bytes: int = 0


class Pull:
    """One pull. `snapshotter`: the plugin's name in containerd's configuration."""

    def __init__(
        self,
        registry: RegistryClient,
        containerd: Containerd,
        reference: Reference,
        platform: Platform,
        *,
        snapshotter: str = "dadi",
        progress: Progress | None = None,
    ) -> None:
        self._registry, self._containerd, self._reference, self._platform = registry, containerd, reference, platform
        self._snapshotter = snapshotter
        self._progress = progress or Progress()
        self._lease = f"dadi-pull-{secrets.token_hex(8)}"
        self._said = False

    async def run(self) -> PullReport:
        """Pull; raises what the registry client and containerd raise, and DigestMismatch."""
        await self._containerd.check_snapshotter(self._snapshotter)  # before the registry, which may take its time
        self._progress.stage("asking the registry")
        top = await self._top()
        name = str(self._reference)
        there = await unpacked(self._containerd, self._snapshotter, name, top, self._platform)
        if there is not None:
            return self._already(top, there)
        image = await self._registry.image(self._reference.at(top), self._platform)
        async with self._leased() as containerd:
            target = await self._documents(containerd, image)
            chain = labels.chain_ids(image.diff_ids)
            rows, downloaded = await self._layers(containerd, image, chain)
            if chain:
                await containerd.label(
                    image.manifest.config.digest, {labels.unpacked_in(self._snapshotter): chain[-1]}
                )
            await containerd.set_image(name, target)
        return PullReport(
            name, self._containerd.namespace, self._snapshotter, str(image.platform), target.digest,
            image.descriptor.digest, image.manifest.config.digest, chain[-1] if chain else "", tuple(rows),
            downloaded_bytes=downloaded,
        )  # fmt: skip

    async def _top(self) -> str:
        """Return the digest of the manifest or index that the reference leads to."""
        return self._reference.digest or (await self._registry.resolve(self._reference)).digest

    def _already(self, top: str, there: Unpacked) -> PullReport:
        rows = tuple(
            LayerReport(layer.digest, chain_id, PRESENT, layer.size)
            for layer, chain_id in zip(there.manifest.layers, there.chain_ids, strict=True)
        )
        return PullReport(
            str(self._reference), self._containerd.namespace, self._snapshotter, str(there.platform), top,
            there.manifest_digest, there.config_digest, there.chain_id, rows, already=True,
        )  # fmt: skip

    # ---- the lease

    @asynccontextmanager
    async def _leased(self) -> AsyncIterator[Containerd]:
        ends = datetime.datetime.now(datetime.UTC) + _LEASE_TIME
        try:
            await self._containerd.create_lease(self._lease, {labels.EXPIRES: ends.strftime("%Y-%m-%dT%H:%M:%SZ")})
            yield self._containerd.under(self._lease)
        except BaseException:
            await asyncio.shield(self._end_lease(collect=True))
            raise
        await asyncio.shield(self._end_lease(collect=False))

    async def _end_lease(self, *, collect: bool) -> None:
        try:
            await self._containerd.delete_lease(self._lease, collect=collect)
        except NotFound:
            pass
        except DadiError as error:
            self._progress.notice(f"the lease {self._lease} could not be deleted, it ends by itself: {error.message}")

    # ---- documents

    async def _documents(self, containerd: Containerd, image: ResolvedImage) -> Descriptor:
        """Write config, manifest and indexes, in this order; return the descriptor of the topmost one."""
        manifest = image.manifest
        await self._document(containerd, manifest.config, image.config, {})
        await self._document(
            containerd, image.descriptor, image.raw, labels.children((manifest.config, *manifest.layers))
        )
        top = image.descriptor
        if image.index_digest is not None:
            for top, raw, index in await self._indexes(image.index_digest, image.descriptor.digest):
                await self._document(containerd, top, raw, labels.children(index.manifests))
        return top

    async def _indexes(self, digest: str, wanted: str, depth: int = 1) -> list[tuple[Descriptor, bytes, Index]]:
        """Return the indexes through which `digest` leads to the manifest `wanted`, the outermost last."""
        descriptor, raw = await self._registry.manifest(self._reference, digest)
        index = manifests.parse(raw, expected=descriptor.media_type)
        assert isinstance(index, Index)
        here = [(descriptor, raw, index)]
        if any(entry.digest == wanted for entry in index.manifests):
            return here
        for entry in index.manifests:
            if entry.media_type in media_types.INDEXES and depth < _MAX_DEPTH:
                inner = await self._indexes(entry.digest, wanted, depth + 1)
                if inner:
                    return inner + here
        return []

    async def _document(
        self, containerd: Containerd, descriptor: Descriptor, data: bytes, refers_to: dict[str, str]
    ) -> None:
        """Have a document in the content store, labelled."""

        async def source() -> AsyncGenerator[bytes, None]:
            yield data

        await containerd.write(f"{self._lease}-{descriptor.digest}", descriptor.digest, len(data), source)
        there = (await containerd.info(descriptor.digest)).labels
        wanted = refers_to | labels.source(self._reference, there)
        if wanted.items() - there.items():
            await containerd.label(descriptor.digest, wanted)

    # ---- layers

    async def _layers(
        self, containerd: Containerd, image: ResolvedImage, chain: list[str]
    ) -> tuple[list[LayerReport], int]:
        layers = image.manifest.layers
        self._progress.expect(layers=len(layers))
        self._progress.stage("layers (an image that no superpeer has seen is read once, by the superpeer)")
        downloads = LayerDownloads(self._registry, containerd, self._reference, layers, self._lease, self._progress)
        rows = []
        try:
            for number, layer in enumerate(layers):
                how = await self._layer(containerd, image, chain, number, downloads)
                self._progress.layer(layer.digest, how)
                rows.append(LayerReport(layer.digest, chain[number], how, layer.size))
        finally:
            await downloads.close()
        return rows, downloads.fetched

    async def _layer(
        self, containerd: Containerd, image: ResolvedImage, chain: list[str], number: int, downloads: LayerDownloads
    ) -> str:
        """Have the snapshot of one layer; return how it came to be."""
        chain_id, parent = chain[number], chain[number - 1] if number else ""
        there = await containerd.has_snapshot(self._snapshotter, chain_id)
        wanted = labels.for_layer(
            str(self._reference), image.descriptor.digest, image.manifest.layers, number, chain_id
        )
        for _ in range(_TRIES):
            key = f"extract-{time.time_ns() % 10**9}-{secrets.token_urlsafe(3)} {chain_id}"
            try:
                mounts = await containerd.prepare(self._snapshotter, key, parent, wanted)
            except AlreadyExists:
                # containerd 1.x leases only what it has made just now; what was there could go away under us
                await self._containerd.hold_snapshot(self._lease, self._snapshotter, chain_id)
                if await containerd.has_snapshot(self._snapshotter, chain_id):
                    await downloads.drop(number)
                    return PRESENT if there else LAZY
                continue
            await self._unpack(containerd, image, number, key, mounts, wanted, downloads)
            return ORDINARY
        hint = "somebody removes it meanwhile? pull again; does `ctr snapshots --snapshotter dadi ls` answer?"
        raise Conflict(f"containerd says that the layer {chain_id} is there, and that it is not", hint=hint)

    async def _unpack(
        self,
        containerd: Containerd,
        image: ResolvedImage,
        number: int,
        key: str,
        mounts: list[Any],
        wanted: dict[str, str],
        downloads: LayerDownloads,
    ) -> None:
        """Download a layer, unpack it into the active snapshot `key`, and commit that."""
        layer, diff_id = image.manifest.layers[number], image.diff_ids[number]
        if not self._said:
            self._said = True
            self._progress.notice(f"layer {layer.digest[7:19]} cannot be lazy: it is downloaded and unpacked, so is "
                                  "each above it that cannot be either; `dadi status` says why")  # fmt: skip
        await downloads.have(number)
        unpacked_as = await containerd.apply(layer, mounts)
        if unpacked_as != diff_id:
            raise DigestMismatch(
                f"layer {layer.digest} of {self._reference.name} unpacks to {unpacked_as}, the config says {diff_id}",
                source=self._reference.registry,
                hint="the image contradicts itself: build and push it again",
            )
        try:
            await containerd.commit(self._snapshotter, wanted[labels.SNAPSHOT_REF], key, wanted)
        except AlreadyExists:  # somebody else was quicker
            with contextlib.suppress(DadiError):
                await containerd.remove(self._snapshotter, key)
        there = (await containerd.info(layer.digest)).labels
        await containerd.label(layer.digest, {labels.UNCOMPRESSED: diff_id, **labels.source(self._reference, there)})
