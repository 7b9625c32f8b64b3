"""What long work tells about itself while it runs. The command line draws it (`dadi/cli/show.py`).

All methods are called on the event loop. Bytes are counted where they come in (layers that are read) and where they go
out (blobs that are pushed); both are work that a person waits for.
"""

from __future__ import annotations


class Progress:
    """Says nothing; whoever wants to see something overrides what it wants to see."""

    def expect(self, *, layers: int = 0, size: int = 0) -> None:
        """So many more layers and bytes are to be done."""

    def advance(self, size: int) -> None:
        """So many more bytes are done; negative if a part has to be done again."""

    def layer(self, digest: str, text: str) -> None:
        """A layer is done; `text` says how, in a few words."""

    def stage(self, text: str) -> None:
        """What is being done now."""

    def notice(self, text: str) -> None:
        """Something that a person should know although the work goes on."""


class Part:
    """One part of the work, reported as how much of it is done in all (`on_progress` of build and push)."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._done = 0

    def __call__(self, done: int) -> None:
        """Report that `done` bytes of the part are done."""
        self._progress.advance(done - self._done)
        self._done = done

    def again(self) -> None:
        """The part begins anew."""
        self(0)
