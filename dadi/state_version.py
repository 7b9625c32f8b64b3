"""Which version of dadi a state directory is of: looked at before anything in it is read, and thus thrown away.

    STATE/version     {"version": 1, "since": 1, "written_by": "0.1.0"}; see `dadi/versions.py`

One number for all that is below STATE: blobs, mounts, images, tokens, keys, jobs, traces. A state without the file is
of version 1. A newer program's file is left as it is, so that it finds its own way back. Formats with a number of their
own: `fuse/state.py`, `dadi/snapshotter/db.py`, image and layer indexes, seek tables, index artifacts.

What may be added without raising `SINCE`: fields that have a default, and that an older program may pass over and lose.
Not to a prefetch job's `Request`, which is hashed and refuses what it does not know.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec
import structlog

from dadi import __version__, versions
from dadi.blobs.layout import write_durably

log = structlog.get_logger()
VERSION: Final = 1
SINCE: Final = 1
"""The oldest version that may go on with what this one leaves."""
_HINT = "start the version that wrote it, or name another `state`; nothing was changed"


class _Written(msgspec.Struct):
    version: int
    since: int | None = None
    written_by: str = ""


def check(state: Path) -> None:
    """Raise Unsupported if a newer dadi has left what this one does not understand; else say that it is ours. Blocks.

    A file that cannot be read says nothing: damage of the disk is no reason to stop, what is below has its own checks.
    """
    path = state / "version"
    written: _Written | None = None
    try:
        written = msgspec.json.decode(path.read_bytes(), type=_Written)
    except FileNotFoundError:
        pass
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        log.error("the version of the state cannot be read; taken for ours", file=str(path), why=str(error))
    if written is not None:
        versions.check(f"the state in {state}", written.version, written.since, known=VERSION, hint=_HINT)
        if written.version >= VERSION:
            return
    try:
        write_durably(path, msgspec.json.encode(_Written(VERSION, SINCE, __version__)))
    except OSError as error:
        log.error("could not write the version of the state", file=str(path), why=str(error))
