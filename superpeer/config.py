"""The superpeer's configuration; `dadi-superpeer --print-default-config` prints it with its explanations."""

from __future__ import annotations

from typing import Annotated

import msgspec

from dadi.config import SECONDS, SIZE, described
from dadi.errors import Malformed
from dadi.index.chunks import DEFAULT_CHUNK_SIZE, ChunkTable
from dadi.log import LogLevel
from dadi.oci.config import RegistryConfig


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where blobs are kept."""

    limit: Annotated[
        int, described("how much disk blobs may take; the least recently used go first; 0: no limit", SIZE, at_least=0)
    ] = 0


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


class SuperpeerConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    listen: Annotated[str, described("address and port for nodes; port 0 takes a free one")] = "0.0.0.0:7070"
    state: Annotated[str, described("directory for blobs and what is known of images")] = "/var/lib/dadi/superpeer"
    tag_ttl: Annotated[
        float, described("how long a tag is believed without asking the registry", SECONDS, at_least=0)
    ] = 60.0
    most_images: Annotated[int, described("how many references are remembered; the oldest go first", at_least=1)] = 2000
    compressed_cache: Annotated[
        int, described("memory for compressed ranges; 0: nothing is sent compressed", SIZE, at_least=0)
    ] = 64 << 20
    log_level: Annotated[LogLevel, described("debug, info, warning or error")] = "info"
    log_json: Annotated[bool, described("true: one JSON object a line; false: for people")] = False
    store: Annotated[StoreConfig, described("the blob store")] = StoreConfig()
    indexing: Annotated[
        IndexingConfig, described("indexes: found in the registry, else made on first sight")
    ] = IndexingConfig()
    registry: Annotated[RegistryConfig, described("the registries and how to talk to them")] = RegistryConfig()
