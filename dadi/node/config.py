"""The node's configuration; `dadi-node --print-default-config` prints it with its explanations."""

from __future__ import annotations

from typing import Annotated

import msgspec

from dadi.config import RATE, SECONDS, SIZE, described
from dadi.log import LogLevel
from dadi.oci.config import RegistryConfig


class BackfillConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When and how fast the rest of an image is fetched after its start."""

    enabled: Annotated[bool, described("false: fetch only what is read")] = True
    quiet: Annotated[
        float, described("start when no program has waited for a chunk for this long", SECONDS, at_least=0)
    ] = 2.0
    longest_wait: Annotated[
        float, described("start after this long at the latest, quiet or not", SECONDS, at_least=0)
    ] = 30.0
    rate: Annotated[int, described("how fast at most; 0: no limit", RATE, at_least=0)] = 0


class ReadConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How reads of a mounted image behave when upstream is away."""

    patience: Annotated[
        float, described("a read waits this long for upstream, then fails with EIO", SECONDS, at_least=0)
    ] = 300.0
    compress: Annotated[bool, described("take bytes compressed; false where links are faster than processors")] = True
    connect: Annotated[float, described("how long a connection to a superpeer may take", SECONDS, at_least=0)] = 3.0
    stall: Annotated[
        float, described("a superpeer that sends nothing for this long is asked anew", SECONDS, at_least=0)
    ] = 30.0


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where blobs are kept."""

    limit: Annotated[
        int, described("disk for blobs; unmounted ones go, least recently used first; 0: any", SIZE, at_least=0)
    ] = 0


class SnapshotterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What containerd talks to; `dadi containerd-config` prints its side of it."""

    enabled: Annotated[bool, described("serve RUN/snapshotter.sock for containerd")] = True
    sweep: Annotated[
        float, described("how often what no snapshot needs any more is looked for", SECONDS, at_least=1)
    ] = 600.0
    keep_idle: Annotated[
        float, described("an image on which no container stands stays mounted for so long", SECONDS, at_least=0)
    ] = 600.0
    replace_damaged: Annotated[
        bool, described("true: put a damaged metadata database aside and begin anew, once; then set it back")
    ] = False


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    state: Annotated[str, described("directory for blobs and what is mounted")] = "/var/lib/dadi/node"
    run: Annotated[str, described("directory for the control socket (node.sock) and the FUSE mount")] = "/run/dadi"
    superpeers: Annotated[tuple[str, ...], described("URLs; none: this process embeds a superpeer of its own")] = ()
    platform: Annotated[str, described("what images are mounted for; empty: this machine's")] = ""
    unmount_on_stop: Annotated[bool, described("true: a stop unmounts all; false: images that are local stay")] = False
    fuse_threads: Annotated[int, described("threads that answer the kernel's reads; one is fastest", at_least=1)] = 1
    log_level: Annotated[LogLevel, described("debug, info, warning or error")] = "info"
    log_json: Annotated[bool, described("true: one JSON object a line; false: for people")] = False
    store: Annotated[StoreConfig, described("the blob store")] = StoreConfig()
    backfill: Annotated[BackfillConfig, described("fetching the rest of an image after its start")] = BackfillConfig()
    read: Annotated[ReadConfig, described("reads of mounted images")] = ReadConfig()
    snapshotter: Annotated[SnapshotterConfig, described("containerd's snapshotter")] = SnapshotterConfig()
    registry: Annotated[RegistryConfig, described("registries, for the embedded superpeer")] = RegistryConfig()
