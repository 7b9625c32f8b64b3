"""What can be set of a blob store: for node, superpeer and proxy. `DiskBlobs.of_state` is how all of them open it."""

from __future__ import annotations

from typing import Annotated

import msgspec

from dadi.config import SIZE, described


class StoreConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where blobs are kept."""

    limit: Annotated[
        int,
        described("how much disk blobs may take; those not in use go, least recently used first; 0: no limit", SIZE,
                  at_least=0),
    ] = 0  # fmt: skip
