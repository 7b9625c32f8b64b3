"""The one rule by which a program reads what another version of it has left. Pure.

    version   of who wrote it
    since     the oldest version that understands it; who adds what others may ignore leaves it as it is, who changes a
              meaning raises it. What was written before there was such a number is understood by its own version

So a step back is possible wherever a step forward was compatible; and what is not understood is refused, never touched.
"""

from __future__ import annotations

from dadi.errors import Unsupported


def check(what: str, version: int, since: int | None, *, known: int, oldest: int = 1, hint: str | None = None) -> None:
    """Raise Unsupported unless a program of version `known` understands this; `oldest`: the first that it still reads.

    `what` is what was left: "the state in /var/lib/dadi/node".
    """
    if oldest <= version <= known or (version > known and since is not None and since <= known):
        return
    needs = f", for version {since} or newer" if since is not None and since != version else ""
    raise Unsupported(f"{what} has version {version}{needs}; this dadi knows version {known}", hint=hint)
