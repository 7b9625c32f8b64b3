"""What containerd has of an image already, read from its content store: so that a second pull is a quick one."""

from __future__ import annotations

import msgspec

from dadi.containerd import labels
from dadi.containerd.client import Containerd
from dadi.errors import Malformed, NoSuchPlatform, NotFound, Unsupported
from dadi.oci import manifest as manifests
from dadi.oci.manifest import Index, Manifest
from dadi.oci.platforms import Platform

_MAX_DEPTH = 3
_MAX_CONFIG = 8 << 20


class Unpacked(msgspec.Struct, frozen=True):
    """An image that is in containerd, all of its layers as snapshots. `chain_id` is "" if it has no layers."""

    manifest_digest: str
    manifest: Manifest
    config_digest: str
    platform: Platform
    chain_id: str
    chain_ids: list[str]


async def unpacked(
    containerd: Containerd, snapshotter: str, name: str, digest: str, platform: Platform
) -> Unpacked | None:
    """Return the image `name` if it leads to `digest` and a container can be run from it now; None if not."""
    if await containerd.image(name) != digest:
        return None
    try:
        found = await _find(containerd, digest, platform, depth=0)
        label = (await containerd.info(found.config_digest)).labels.get(labels.unpacked_in(snapshotter), "")
    except (NotFound, Malformed, Unsupported):
        return None
    if label != found.chain_id or (found.chain_id and not await containerd.has_snapshot(snapshotter, found.chain_id)):
        return None
    return found


async def _find(containerd: Containerd, digest: str, platform: Platform, *, depth: int, named: bool = True) -> Unpacked:
    """Return the image that a manifest or index has for a platform; raise NotFound, NoSuchPlatform."""
    document = manifests.parse(await containerd.read(digest, manifests.MAX_SIZE))
    if isinstance(document, Manifest):
        config = manifests.parse_config(await containerd.read(document.config.digest, _MAX_CONFIG), document)
        if not named and config.platform.known and not config.platform.runs_on(platform):
            raise manifests.no_such_platform(platform, (config.platform,))
        chain = labels.chain_ids(config.diff_ids)
        return Unpacked(digest, document, document.config.digest, config.platform, chain[-1] if chain else "", chain)
    return await _find_in(containerd, document, platform, depth)


async def _find_in(containerd: Containerd, index: Index, platform: Platform, depth: int) -> Unpacked:
    if depth == _MAX_DEPTH:
        raise Malformed(f"indexes within indexes, more than {_MAX_DEPTH} deep")
    for entry in manifests.candidates(index, platform):
        try:
            return await _find(containerd, entry.digest, platform, depth=depth + 1, named=entry.platform is not None)
        except NoSuchPlatform:
            continue
    raise manifests.no_such_platform(platform, ())
