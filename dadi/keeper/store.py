"""What keeps descriptors, as the node sees it."""

from __future__ import annotations

import os
from typing import Protocol


class DescriptorStore(Protocol):
    """Holds copies of descriptors, by name, each with a small text. The calls block: use them in threads."""

    @property
    def fd(self) -> int:
        """A descriptor that becomes readable when what is held is lost; -1 if it cannot be."""
        ...

    def put(self, name: str, fd: int, text: bytes) -> None:
        """Hold a copy of `fd`, instead of what was held under this name. Raises Unavailable."""
        ...

    def take(self) -> dict[str, tuple[int, bytes]]:
        """Return copies of all that is held, which stays held: name → (descriptor, text). Raises Unavailable."""
        ...

    def drop(self, name: str) -> None:
        """Let go; nothing happens if nothing is held under this name. Raises Unavailable."""
        ...

    def close(self) -> None:
        """Hang up; what is held stays held. Idempotent."""
        ...


def close_all(taken: dict[str, tuple[int, bytes]], *but: str) -> None:
    """Close the descriptors that `take` returned, apart from some."""
    for name, (fd, _) in taken.items():
        if name not in but:
            os.close(fd)
