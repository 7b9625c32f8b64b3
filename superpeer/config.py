"""The superpeer's configuration; `dadi-superpeer --print-default-config` prints it with its explanations."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from dadi.blobs.config import StoreConfig
from dadi.config import RATE, SECONDS, SIZE, described
from dadi.errors import Malformed
from dadi.index.chunks import DEFAULT_CHUNK_SIZE, ChunkTable
from dadi.log import LogLevel
from dadi.oci.config import RegistryConfig
from dadi.originals.config import OriginalsConfig
from dadi.tls import TlsConfig


class IndexingConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where indexes come from, and how layers are brought."""

    chunk_size: Annotated[int, described("the unit that is fetched and verified; a power of two", SIZE, at_least=0)] = (
        DEFAULT_CHUNK_SIZE
    )
    parallel_layers: Annotated[int, described("how many layers are streamed and indexed at a time", at_least=1)] = 2
    use_artifacts: Annotated[
        bool, described("use the indexes that `dadi index` and `dadi convert` put beside images; false: never")
    ] = True
    trusted_keys: Annotated[
        tuple[str, ...],
        described("PEM files of Ed25519 public keys; if there are any, only indexes that one of them signed are used"),
    ] = ()
    keep_compressed: Annotated[
        bool,
        described("layers that are indexed here are kept as the registry has them, too, while nothing else needs the "
                  "room: plain pulls of them then cost the registry nothing"),
    ] = True
    parallel_ranges: Annotated[
        int, described("how many ranges of a layer are asked for from a registry at a time", at_least=1)
    ] = 4
    rest_after: Annotated[
        float,
        described("without a request from nodes, after which the rest of lazy layers is fetched", SECONDS, at_least=0),
    ] = 3.0
    max_layer_size: Annotated[int, described("uncompressed; a layer that is larger is refused", SIZE, at_least=0)] = (
        256 << 30
    )

    def __post_init__(self) -> None:
        try:
            ChunkTable(0, self.chunk_size, b"").check()
        except Malformed as error:
            raise ValueError(error.message) from None


class PeersConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The directory: how nodes that start the same image are put into trees."""

    root_slots: Annotated[
        int,
        described(
            "nodes, for each blob, that are served here before others are sent to nodes; 0: as many children as nodes "
            "take, 1 or 2",
            at_least=0,
        ),
    ] = 0
    far_slots: Annotated[
        int, described("children in other racks that a node gets, for each blob", at_least=0)
    ] = 1
    standbys: Annotated[int, described("parents that a node is told of besides its first", at_least=0)] = 2
    heartbeat: Annotated[float, described("how often nodes are to be heard of", SECONDS, at_least=1)] = 5.0
    expiry: Annotated[
        float, described("a node that was not heard of for so long is forgotten", SECONDS, at_least=2)
    ] = 15.0
    zone: Annotated[str, described("where this superpeer is, as nodes call it; empty: equally near to all")] = ""
    trust_addresses: Annotated[
        bool, described("true: believe the address that a node gives, where all come from one (NAT, a proxy)")
    ] = False

    def __post_init__(self) -> None:
        if self.expiry < 2 * self.heartbeat:
            raise ValueError("peers.expiry must be at least twice peers.heartbeat")


class PrefetchConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """`dadi prefetch`: jobs that bring images before they are wanted."""

    rate: Annotated[
        float, described("what all jobs together may take from registries; 0: no limit", RATE, at_least=0)
    ] = 0.0
    parallel: Annotated[
        int, described("how many steps of jobs (an image that is indexed, a few MiB) go on at a time", at_least=1)
    ] = 4
    most_jobs: Annotated[int, described("how many jobs are remembered; those that ended first go", at_least=1)] = 1000
    keep_trying: Annotated[
        float,
        described("how long a job without a deadline is begun anew while its registry is away", SECONDS, at_least=0),
    ] = 3600.0
    operators: Annotated[
        str,
        described("file that says who may begin, cancel and retry jobs: lines `token sha256:HEX` and `client NAME` (of "
                  'a TLS certificate); "": who comes over loopback'),
    ] = ""


class TracesConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Startup traces: what containers of an image read first, learnt from nodes and handed out with the image."""

    most: Annotated[int, described("of how many images traces are kept; those learnt longest ago go", at_least=1)] = (
        1000
    )
    size: Annotated[int, described("memory for them", SIZE, at_least=1)] = 64 << 20
    recordings: Annotated[
        int, described("how many starts of an image nodes tell of in a minute, however many there are", at_least=1)
    ] = 16
    drop_below: Annotated[
        float, described("a trace of which nodes read less than this share is dropped; 0: never", at_least=0)
    ] = 0.3


class SuperpeerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    listen: Annotated[str, described("address and port for nodes; port 0 takes a free one")] = "0.0.0.0:7070"
    state: Annotated[str, described("directory for blobs and what is known of images")] = "/var/lib/dadi/superpeer"
    tag_ttl: Annotated[
        float, described("how long a tag is believed without asking the registry", SECONDS, at_least=0)
    ] = 60.0
    most_images: Annotated[int, described("how many references are remembered; the unused go first", at_least=1)] = 2000
    compressed_cache: Annotated[
        int, described("memory for compressed ranges; 0: nothing is sent compressed", SIZE, at_least=0)
    ] = 64 << 20
    authorization: Annotated[
        Literal["registry", "open"],
        described('who may have an image: "registry": whom its registry lets read it; "open": whoever reaches us'),
    ] = "registry"
    authorization_ttl: Annotated[
        float, described("how long a registry's yes is believed without asking again", SECONDS, at_least=0)
    ] = 300.0
    authorization_stale: Annotated[
        float, described("how long a yes is used while the registry cannot say", SECONDS, at_least=0)
    ] = 86400.0
    token_lifetime: Annotated[
        float, described("how long a token opens blobs; nodes renew it before", SECONDS, at_least=10)
    ] = 600.0
    key_lifetime: Annotated[
        float, described("how long tokens are signed with one key; then a new one is made", SECONDS, at_least=60)
    ] = 604800.0
    peers_key: Annotated[
        str, described('PEM file of an Ed25519 key that all superpeers here sign with; "": each makes its own')
    ] = ""
    log_level: Annotated[LogLevel, described("debug, info, warning or error")] = "info"
    log_json: Annotated[bool, described("true: one JSON object a line; false: for people")] = False
    url: Annotated[
        str, described("this superpeer's name among its siblings, as nodes write it in `superpeers`")
    ] = ""
    siblings: Annotated[
        tuple[str, ...],
        described("all superpeers of this datacenter, as nodes write them: URLs, or dns+http://NAME:PORT"),
    ] = ()
    siblings_refresh: Annotated[
        float, described("how often the addresses of a dns+ name are asked for again", SECONDS, at_least=1)
    ] = 30.0
    store: Annotated[StoreConfig, described("the blob store")] = StoreConfig()
    indexing: Annotated[
        IndexingConfig, described("indexes: found in the registry, else made on first sight")
    ] = IndexingConfig()
    peers: Annotated[PeersConfig, described("the directory of nodes that serve each other")] = PeersConfig()
    prefetch: Annotated[PrefetchConfig, described("jobs of `dadi prefetch`")] = PrefetchConfig()
    traces: Annotated[TracesConfig, described("what containers read first, as nodes tell")] = TracesConfig()
    tls: Annotated[
        TlsConfig, described("TLS for nodes and between superpeers; `listen` then speaks nothing else")
    ] = TlsConfig()
    originals: Annotated[
        OriginalsConfig, described("for registry proxies: images as the registry has them")
    ] = OriginalsConfig()
    registry: Annotated[RegistryConfig, described("the registries and how to talk to them")] = RegistryConfig()
