"""The proxy's configuration; `dadi-registry-proxy --print-default-config` prints it with its explanations."""

from __future__ import annotations

from typing import Annotated

import msgspec

from dadi.blobs.config import StoreConfig
from dadi.config import SECONDS, described
from dadi.log import LogLevel
from dadi.oci.config import RegistryConfig
from dadi.originals.config import FrontConfig, OriginalsConfig
from dadi.tls import TlsConfig


class ProxyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    listen: Annotated[str, described("address and port for container engines; port 0 takes a free one")] = (
        "127.0.0.1:7072"
    )
    state: Annotated[str, described("directory for blobs and what registries have said")] = "/var/lib/dadi/proxy"
    superpeers: Annotated[
        tuple[str, ...],
        described("URLs, or dns+http://NAME:PORT for all its addresses; none: all comes straight from the registries"),
    ] = ()
    connect: Annotated[float, described("how long a connection to a superpeer may take", SECONDS, at_least=0)] = 3.0
    stall: Annotated[
        float, described("a superpeer that sends nothing for this long is asked anew", SECONDS, at_least=0)
    ] = 30.0
    log_level: Annotated[LogLevel, described("debug, info, warning or error")] = "info"
    log_json: Annotated[bool, described("true: one JSON object a line; false: for people")] = False
    front: Annotated[FrontConfig, described("how clients are answered")] = FrontConfig()
    store: Annotated[StoreConfig, described("the blob store")] = StoreConfig()
    originals: Annotated[
        OriginalsConfig, described("tags and permissions; with superpeers it is theirs that counts")
    ] = OriginalsConfig()
    tls: Annotated[TlsConfig, described("TLS towards superpeers, and for container engines")] = TlsConfig()
    registry: Annotated[
        RegistryConfig, described("the registries and how to talk to them; with superpeers only for what is pushed")
    ] = RegistryConfig()
