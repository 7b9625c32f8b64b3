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
    """How images without an index are indexed."""

    chunk_size: Annotated[int, described("the unit that is fetched and verified; a power of two", SIZE, at_least=0)] = (
        DEFAULT_CHUNK_SIZE
    )
    parallel_layers: Annotated[int, described("how many layers are streamed and indexed at a time", at_least=1)] = 2
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
    indexing: Annotated[IndexingConfig, described("indexing on first sight")] = IndexingConfig()
    registry: Annotated[RegistryConfig, described("the registries and how to talk to them")] = RegistryConfig()
