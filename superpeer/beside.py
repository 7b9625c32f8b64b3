"""Compressed layers that come by because an index is made of them: given to plain pulls, too, and kept if that is free.

The registry sends a layer once for both: what is read for the index goes into a file (`dadi/originals/arriving.py`),
and plain pulls that come while the index is made follow in it. When it is made:

    somebody has asked for the compressed layer    it is kept, as any blob
    nobody has, and there is room                  it is kept, and the first to go: a later pull costs the registry
                                                   nothing, unless something else wanted the room
    nobody has, and others would have to go        it is thrown away
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from dadi.blobs.disk import DiskBlobs

_UNPACKED = 5
"""Times its compressed size that a layer may take together with its tar; one of which that is not true is found out."""


class Beside:
    """One layer's; an `Unasked` for `Originals`. `on_wanted`: somebody asks for it who does not want the index."""

    def __init__(self, store: DiskBlobs, digest: str, size: int, on_wanted: Callable[[], None]) -> None:
        self.asked = False
        self._store = store
        self._digest = digest
        self._size = size
        self._on_wanted = on_wanted
        self._settled = asyncio.Event()

    def __repr__(self) -> str:
        return f"Beside({self._digest}, {self._size} bytes{', asked for' if self.asked else ''})"

    async def fits(self) -> bool:
        """Whether both forms have room together, and nobody has to go for it before it is known to be wanted."""
        room = await self._store.room(_UNPACKED * self._size)
        # With a limit nobody goes for a file that is no blob yet. Without one the disk itself is the limit.
        return room.enough and bool(self._store.limit or not room.evicted)

    def wanted(self) -> None:
        """See `Unasked`."""
        if not self.asked:
            self.asked = True
            self._settled.set()
            self._on_wanted()

    def over(self) -> None:
        """The index is made, or will not be."""
        self._settled.set()

    async def keep(self) -> bool:
        """See `Unasked`."""
        await self._settled.wait()
        if self._store.has(self._digest):
            return False  # it is a tar itself, and has been kept as that
        room = await self._store.room(self._size)
        return self.asked or (room.enough and not room.evicted)
