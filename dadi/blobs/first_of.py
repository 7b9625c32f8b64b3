"""Ask sources in order; the first that answers wins. Whoever was passed over is counted, logged and shown."""

from __future__ import annotations

from collections.abc import Sequence

from dadi.blobs.source import Source, Urgency
from dadi.errors import DadiError, NotFound, Unavailable
from dadi.fallbacks import Fallbacks
from dadi.index.chunks import Blob


class FirstOf:
    """A source over sources, nearest first.

    Raises the most hopeful of their errors: a retryable one if there was any, else the last.
    """

    def __init__(self, sources: Sequence[Source], fallbacks: Fallbacks) -> None:
        self.sources = list(sources)
        self._fallbacks = fallbacks

    def __repr__(self) -> str:
        return f"FirstOf({', '.join(map(repr, self.sources))})"

    async def read(self, blob: Blob, chunks: range, urgency: Urgency = Urgency.DEMAND) -> list[bytes]:
        """Return the run from the first source that has it."""
        errors: list[DadiError] = []
        for place, source in enumerate(self.sources):
            try:
                return await source.read(blob, chunks, urgency)
            except DadiError as error:
                errors.append(error)
                if place + 1 < len(self.sources) and not isinstance(error, NotFound):
                    name = getattr(source, "name", repr(source))
                    self._fallbacks.note("source passed over", f"{name}: {error}")
        if not errors:
            raise Unavailable("there is nobody to ask", hint="configure a superpeer")
        raise next((error for error in errors if error.retryable), errors[-1])
