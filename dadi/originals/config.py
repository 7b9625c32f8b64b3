"""What can be set of originals and of giving them out: for superpeer, proxy, and a node that embeds one."""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec

from dadi.config import SECONDS, described


class OriginalsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Tags, who may, and what is done while the registry is away."""

    tag_ttl: Annotated[
        float, described("how long tags and lists are believed without asking the registry", SECONDS, at_least=0)
    ] = 60.0
    access_ttl: Annotated[
        float, described("how long a caller whom the registry has accepted may go on without asking it", SECONDS,
                         at_least=0)
    ] = 60.0  # fmt: skip
    stale: Annotated[
        float, described("while the registry is away: how old tags, lists and permissions may be", SECONDS, at_least=0)
    ] = 86400.0
    patience: Annotated[
        float, described("how long the registry may take before what is here, though old, is given", SECONDS,
                         at_least=0)
    ] = 2.0  # fmt: skip
    lend_credentials: Annotated[
        bool, described("true: who shows no credentials is served with those of this machine, whoever he is")
    ] = False
    most_records: Annotated[
        int, described("how many tags, manifests and places of blobs are remembered; the oldest go first", at_least=1)
    ] = 50_000


class FrontConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the proxy answers its clients; the part that does not depend on where bytes come from."""

    upstream: Annotated[
        str, described("the registry of requests that name none, neither by ?ns= nor as the path's first part")
    ] = "docker.io"
    uploads: Annotated[
        Literal["refuse", "pass"], described("what is pushed: refused, or passed on to the registry")
    ] = "refuse"
    most_connections: Annotated[
        int,
        described("connections at a time; beyond it idle ones are closed, and who comes is refused if all are busy",
                  at_least=1),
    ] = 4096  # fmt: skip
    login: Annotated[
        bool,
        described("ask for credentials at /v2/, if the upstream does: clients that only look there then show theirs"),
    ] = False
