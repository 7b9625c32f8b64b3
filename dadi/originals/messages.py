"""What a proxy and a superpeer say to each other of originals, beside HTTP's own. Pure.

The routes are at the head of `superpeer/original.py`; `client.py` asks.
"""

from __future__ import annotations

from typing import Annotated

import msgspec

from dadi.index.chunks import Blob
from dadi.peers.token import MAX_TEXT

STALE, NEXT = "Dadi-Stale", "Dadi-Next"
"""Headers: how old a stale document is (seconds); the parameters of a list's next page."""
SMALL = 512 << 10
"""Bytes up to which a blob is taken as a stream from the superpeer."""
MOST_WAIT = 10.0
"""Seconds that a superpeer lets one request for a chunk table wait."""
HEAD = 16 << 10
"""Bytes that a superpeer gives in advance at a time."""


class OriginalAnswer(msgspec.Struct, frozen=True):
    """What a superpeer says of a blob: its size in bytes, and its chunk table if it knows it.

    `proven`: what others have of it may be given to the caller too, see `Proven`. `token`: opens it at /v1/blobs of
    peers and superpeers. `coming`: it is on its way, and will have a table; `head`: the bytes of it from where the
    proxy wants them, as far as they are there, not verified.
    """

    size: int
    blob: Blob | None = None
    proven: bool = False
    token: Annotated[str, msgspec.Meta(max_length=MAX_TEXT)] = ""
    coming: bool = False
    head: Annotated[bytes, msgspec.Meta(max_length=HEAD)] = b""
