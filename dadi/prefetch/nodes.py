"""Which nodes an operator means by `--nodes`: all, zone=a,rack=r7, 20%, or these together (zone=a,20%). Pure.

Each superpeer decides for each node by itself, and all decide alike: a share is a hash of job and node.
"""

from __future__ import annotations

import msgspec
from xxhash import xxh3_64_intdigest

from dadi.errors import InvalidRequest

_HINT = "write all, 20%, or zone=a,rack=r7"
_LABELS = ("zone", "rack")


class Selection(msgspec.Struct, frozen=True):
    """All of these must fit. `share`: of the nodes, 0 to 1."""

    labels: tuple[tuple[str, str], ...] = ()
    share: float = 1.0


def parse(text: str) -> Selection:
    """Return what a text means. Raises InvalidRequest."""
    labels: dict[str, str] = {}
    share = 1.0
    for part in text.split(","):
        part = part.strip()
        name, equals, value = part.partition("=")
        if part.endswith("%") and not equals:
            share = _share(part)
        elif equals and name.strip() in _LABELS and name.strip() not in labels and value.strip():
            labels[name.strip()] = value.strip()
        elif part != "all":
            raise InvalidRequest(f"{text[:100]!r} names no nodes", hint=_HINT)
    return Selection(tuple(labels.items()), share)


def _share(text: str) -> float:
    try:
        share = float(text[:-1]) / 100
    except ValueError:
        share = -1.0
    if not 0 < share <= 1:
        raise InvalidRequest(f"{text[:100]!r} is no share of the nodes", hint=_HINT)
    return share


def chosen(selection: Selection, job: str, node: str, zone: str, rack: str) -> bool:
    """Whether a node is meant."""
    here = {"zone": zone, "rack": rack}
    if any(here[name] != value for name, value in selection.labels):
        return False
    return xxh3_64_intdigest(f"{job}\0{node}".encode()) < selection.share * 2**64
