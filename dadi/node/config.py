"""The node's configuration; `dadi-node --print-default-config` prints it with its explanations."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from dadi.blobs.config import StoreConfig
from dadi.config import RATE, SECONDS, SIZE, described
from dadi.log import LogLevel
from dadi.oci.config import CredentialsConfig, RegistryConfig
from dadi.originals.config import FrontConfig, OriginalsConfig
from dadi.tls import TlsConfig


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


class TraceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Startup traces: what containers read first is recorded, and fetched ahead of them the next time."""

    enabled: Annotated[bool, described("false: record nothing, replay nothing")] = True
    replay: Annotated[bool, described("false: record, but fetch nothing ahead")] = True
    longest: Annotated[
        float, described("how long the start of a container is watched at most", SECONDS, at_least=0)
    ] = 30.0
    quiet: Annotated[
        float, described("it is over when nothing new was read for so long", SECONDS, at_least=0)
    ] = 2.0
    rate: Annotated[int, described("how fast to fetch ahead at most; 0: no limit", RATE, at_least=0)] = 0
    drop_below: Annotated[
        float, described("a trace of which less than this share was read is not replayed again; 0: always", at_least=0)
    ] = 0.3


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


class CriConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What kubelet's --image-service-endpoint can be, so that pull secrets reach lazy images."""

    enabled: Annotated[bool, described("serve RUN/cri.sock, and pass CRI's ImageService on to containerd")] = False
    containerd: Annotated[str, described("containerd's socket")] = "/run/containerd/containerd.sock"
    remember: Annotated[
        float, described("how long a pull secret is kept, in memory only, for its repository", SECONDS, at_least=1)
    ] = 43200.0
    most: Annotated[int, described("of how many repositories pull secrets are kept", at_least=1)] = 1000


class PeersConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How this node and others give each other what they have."""

    enabled: Annotated[bool, described("false: ask superpeers only, and serve nobody")] = True
    listen: Annotated[str, described("address and port for other nodes; port 0 takes a free one")] = "0.0.0.0:7071"
    address: Annotated[
        str, described("host:port to tell others, where the superpeer believes it; empty: what it sees")
    ] = ""
    zone: Annotated[str, described("where this node is; empty: the environment's DADI_ZONE")] = ""
    rack: Annotated[str, described("where in the zone; empty: the environment's DADI_RACK")] = ""
    slots: Annotated[
        int, described("children of the own rack for each blob; 0: 2 on links of 10 Gbit/s, else 1", at_least=0)
    ] = 0
    link: Annotated[int, described("how fast the network link is; 0: as its interface says", RATE, at_least=0)] = 0
    upload_rate: Annotated[int, described("how fast to give to other nodes at most; 0: no limit", RATE, at_least=0)] = 0
    children: Annotated[int, described("how many nodes are served at a time; 0: any number", at_least=0)] = 64
    compressed_cache: Annotated[
        int, described("memory for chunks as they came compressed, to pass them on so; 0: pass on plain", SIZE,
                       at_least=0)
    ] = 32 << 20  # fmt: skip
    memory_pressure: Annotated[
        float, described("refuse children when this share of time waits for memory (PSI); 0: never", at_least=0)
    ] = 0.2
    cpu_pressure: Annotated[
        float, described("refuse children when this share of time waits for a processor (PSI); 0: never", at_least=0)
    ] = 0.0
    authorization: Annotated[
        Literal["registry", "open"],
        described('as the superpeers have it. "registry": serve who shows their token; "open": whoever reaches us'),
    ] = "registry"


class ProxyConfig(FrontConfig, frozen=True, forbid_unknown_fields=True):
    """A mirror of any registry, for engines without the plugin; as `dadi-registry-proxy`, over this node's store."""

    enabled: Annotated[bool, described("serve plain pulls")] = False
    listen: Annotated[str, described("address and port for container engines; port 0 takes a free one")] = (
        "127.0.0.1:7072"
    )


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    state: Annotated[str, described("directory for blobs and what is mounted")] = "/var/lib/dadi/node"
    run: Annotated[str, described("directory for the control socket (node.sock) and the FUSE mount")] = "/run/dadi"
    superpeers: Annotated[
        tuple[str, ...],
        described("URLs, or dns+http://NAME:PORT for all its addresses; none: this process embeds one of its own"),
    ] = ()
    superpeers_refresh: Annotated[
        float, described("how often the addresses of a dns+ name are asked for again", SECONDS, at_least=1)
    ] = 30.0
    platform: Annotated[str, described("what images are mounted for; empty: this machine's")] = ""
    unmount_on_stop: Annotated[
        bool, described("true: a stop unmounts all; false: all stays, lazy reads wait for the next start")
    ] = False
    fuse_threads: Annotated[int, described("threads that answer the kernel's reads; one is fastest", at_least=1)] = 1
    log_level: Annotated[LogLevel, described("debug, info, warning or error")] = "info"
    log_json: Annotated[bool, described("true: one JSON object a line; false: for people")] = False
    store: Annotated[StoreConfig, described("the blob store")] = StoreConfig()
    backfill: Annotated[BackfillConfig, described("fetching the rest of an image after its start")] = BackfillConfig()
    read: Annotated[ReadConfig, described("reads of mounted images")] = ReadConfig()
    trace: Annotated[TraceConfig, described("what containers read first")] = TraceConfig()
    snapshotter: Annotated[SnapshotterConfig, described("containerd's snapshotter")] = SnapshotterConfig()
    peers: Annotated[PeersConfig, described("nodes give each other what they have")] = PeersConfig()
    proxy: Annotated[ProxyConfig, described("the registry proxy in this process")] = ProxyConfig()
    originals: Annotated[
        OriginalsConfig, described("its tags and permissions; with superpeers it is theirs that counts")
    ] = OriginalsConfig()
    tls: Annotated[TlsConfig, described("TLS to superpeers, to and from nodes, for plain pulls")] = TlsConfig()
    cri: Annotated[CriConfig, described("pull secrets of Kubernetes")] = CriConfig()
    credentials: Annotated[CredentialsConfig, described("kubelet's credential providers")] = CredentialsConfig()
    registry: Annotated[RegistryConfig, described("registries, for what is embedded")] = RegistryConfig()
