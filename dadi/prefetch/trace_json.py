"""A startup trace as JSON that people read, compare and keep under version control. Pure.

    {"format": "dadi startup trace 1", "manifest": D, "blobs": [[digest, chunk size], …],
     "groups": [{"recordings": N, "steps": [[place in blobs, first chunk, chunks, milliseconds], …]}, …]}

Neighbours that were read one after the other in the same 10 ms are one step.
"""

from __future__ import annotations

from typing import Any

import msgspec

from dadi.errors import InvalidRequest, Malformed
from dadi.prefetch import trace
from dadi.prefetch.trace import Recording, StartGroup, Trace

FORMAT = "dadi startup trace 1"
_SAME = 10


def to_json(found: Trace) -> dict[str, Any]:
    """Return the trace as what JSON can hold."""
    groups = [{"recordings": group.recordings, "steps": _joined(group)} for group in found.groups]
    return {"format": FORMAT, "manifest": found.manifest, "blobs": [list(pair) for pair in found.blobs],
            "groups": groups}  # fmt: skip


def from_json(value: Any) -> Trace:
    """Return the trace; raise InvalidRequest for what is none."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise InvalidRequest(f"this is no {FORMAT!r}", hint="`dadi trace export` writes one")
    try:
        groups = []
        for group in value["groups"]:
            steps: list[tuple[int, int, int]] = []
            for blob, first, count, at in msgspec.convert(group["steps"], list[tuple[int, int, int, int]]):
                if not 0 < count <= trace.MOST_STEPS - len(steps):
                    raise InvalidRequest(f"more than {trace.MOST_STEPS} chunks")
                steps += [(blob, chunk, at) for chunk in range(first, first + count)]
            groups.append({"recordings": group["recordings"], "steps": steps})
        rows = [[group["recordings"], group["steps"]] for group in groups]
        return trace.check(msgspec.convert([value["manifest"], value["blobs"], rows], Trace))
    except (KeyError, TypeError, ValueError, msgspec.MsgspecError, Malformed, RecursionError) as error:
        raise InvalidRequest(f"this startup trace cannot be used: {error}"[:300]) from None


def recordings(found: Trace, source: str = "import") -> list[Recording]:
    """Return what would have given the trace: a recording for each of its groups."""
    return [Recording(f"{source}-{place}", found.blobs, group.steps) for place, group in enumerate(found.groups)]


def _joined(group: StartGroup) -> list[list[int]]:
    rows: list[list[int]] = []
    for blob, chunk, at in group.steps:
        last = rows[-1] if rows else None
        if last and last[0] == blob and last[1] + last[2] == chunk and 0 <= at - last[3] < _SAME:
            last[2] += 1
        else:
            rows.append([blob, chunk, 1, at])
    return rows
