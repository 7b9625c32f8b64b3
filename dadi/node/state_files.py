"""The small files below a STATE directory, node's, superpeer's or proxy's: can each of them be read?

    mounts/*.json, images/*.json, originals/*.json, prefetch/*.json    JSON, of the kind that is written there
    traces/*.trace                                                     see `dadi/prefetch/trace.py`
    *.json, keys/*.json, snapshotter/metadata.db                       JSON; SQLite's own check, if nobody uses it
    superpeer/…                                                        the same of a superpeer within the node

Nothing is changed: who reads such a file for its work decides what becomes of a damaged one.
"""

from __future__ import annotations

import contextlib
import sqlite3
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from dadi.errors import DadiError, Malformed
from dadi.node.records import MountRecord
from dadi.originals.records import Record
from dadi.peers.superpeer import ImageAnswer
from dadi.prefetch import trace
from dadi.prefetch.messages import Job


class Damaged(NamedTuple):
    """A file, and what is wrong with it."""

    path: Path
    why: str


class _Image(msgspec.Struct):
    """A node's record of an image has `answer`, a superpeer's has not: what both have is that they are objects."""

    answer: ImageAnswer | None = None


def _json(kind: Any) -> Callable[[bytes], object]:
    decoder = msgspec.json.Decoder(kind)
    return decoder.decode


_KINDS: dict[str, Callable[[bytes], object]] = {
    "mounts/*.json": _json(MountRecord),
    "images/*.json": _json(_Image),
    "originals/*.json": _json(Record),
    "prefetch/*.json": _json(Job),
    "traces/*.trace": lambda data: trace.decode(data, trace.KeptTrace),
    "*.json": _json(Any),
    "keys/*.json": _json(Any),
}
EMBEDDED: Final = "superpeer"
"""Where a node that is its own superpeer has that one's files."""
_MOST = 256 << 20
"""Bytes that such a file may have."""


def check(state: Path) -> list[Damaged]:
    """Return the files that cannot be read as what they are; blocks."""
    found = []
    for pattern, parse in _KINDS.items():
        for path in sorted(_files(state, pattern)):
            try:
                status = path.stat()
                if not stat.S_ISREG(status.st_mode) or status.st_size > _MOST:
                    raise Malformed("not a file of a sensible size")
                parse(path.read_bytes())
            except FileNotFoundError:
                if path.is_symlink():
                    found.append(Damaged(path, "a link to nothing"))
                # else it went away meanwhile, as records of what has ended do
            except (OSError, DadiError, msgspec.MsgspecError, ValueError, RecursionError, struct.error) as error:
                # Not what a decoder says: it may quote secrets.
                why = error.message if isinstance(error, DadiError) else type(error).__name__
                found.append(Damaged(path, why))
    found += _database(state / "snapshotter" / "metadata.db")
    if (state / EMBEDDED).is_dir():
        found += check(state / EMBEDDED)
    return found


def _files(state: Path, pattern: str) -> Iterator[Path]:
    with contextlib.suppress(OSError):
        yield from state.glob(pattern)


def _database(path: Path) -> list[Damaged]:
    if not path.exists():
        return []
    try:
        with contextlib.closing(sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=0)) as db:
            (answer,) = db.execute("PRAGMA quick_check(1)").fetchone()
    except sqlite3.OperationalError as error:
        if "locked" in str(error):
            return []  # a node that runs has it: it looked when it opened it
        return [Damaged(path, str(error))]
    except sqlite3.Error as error:
        return [Damaged(path, str(error))]
    return [] if answer == "ok" else [Damaged(path, str(answer))]
