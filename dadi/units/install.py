"""Writes units below a root directory; one that somebody has edited stays as it is.

The first line of a unit of ours has the SHA-256 of what is below it: so an edited one is told from an old one of ours.
"""

from __future__ import annotations

import difflib
import enum
import hashlib
import os
import re
from pathlib import Path
from typing import NamedTuple

from dadi.blobs.files import full_or_broken
from dadi.blobs.layout import write_durably

PLACE = "etc/systemd/system"
_FIRST = "# Written by `dadi install-units`; edit a drop-in (systemctl edit), not this. "
_HEAD = re.compile(re.escape(_FIRST) + r"([0-9a-f]{64})\n")


class Outcome(enum.Enum):
    """What there was, so what is done."""

    NEW = "new"
    SAME = "unchanged"
    OLD = "replaced"
    EDITED = "edited by somebody: left as it is"
    FORCED = "edited by somebody: replaced"


class Change(NamedTuple):
    """What becomes of a unit file; `diff`: unified, "" if there is none."""

    path: Path
    outcome: Outcome
    diff: str


def headed(text: str) -> str:
    """Return a unit's text with the line that vouches for it."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{_FIRST}{digest}\n{text}"


def install(root: Path, name: str, text: str, *, force: bool) -> Change:
    """Write the unit `name`, if it is not there, or is ours and another. Blocks. Raises StoreFull, Unavailable."""
    path, wanted = root / PLACE / name, headed(text)
    try:
        old = _there(path)
        if old is None:
            outcome = Outcome.NEW
        elif old == wanted:
            return Change(path, Outcome.SAME, "")
        elif _is_ours(old):
            outcome = Outcome.OLD
        else:
            outcome = Outcome.FORCED if force else Outcome.EDITED
        if outcome is not Outcome.EDITED:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_durably(path, wanted.encode())  # a link is replaced, not followed
            path.chmod(0o644)
    except OSError as error:
        raise full_or_broken(path, error) from None
    lines = difflib.unified_diff((old or "").splitlines(True), wanted.splitlines(True), f"{path} (there)", str(path))
    return Change(path, outcome, "".join(lines))


def _there(path: Path) -> str | None:
    if path.is_symlink():
        return f"a link to {os.readlink(path)}\n"  # masked, or somebody's own
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None


def _is_ours(text: str) -> bool:
    head = _HEAD.match(text)
    return head is not None and hashlib.sha256(text[head.end() :].encode()).hexdigest() == head[1]
