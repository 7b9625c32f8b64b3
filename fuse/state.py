"""What a process must know, besides the descriptor itself, to serve a FUSE mount that another one made. Pure.

JSON, so that a person can read it, and so that a version can add keys without the one before minding:

    version       1; another number is another meaning of what is here, or of node ids (`fuse/device.py`, `id_of`)
    since         the oldest version that understands it all the same, see `dadi/versions.py`
    major, minor, max_readahead, flags       what the kernel offered at INIT
    max_read      bytes that one read asks for at most, as was agreed
    device        "0:55": the mount's device number, as in the mount table
"""

from __future__ import annotations

from typing import Final

import msgspec

from dadi import versions
from dadi.errors import Malformed
from fuse import wire

VERSION: Final = 1
SINCE: Final = 1
_NEWER = """start the version that left it; or give up what reads lazy images: end dadi-keeper (or, for systemd's \
descriptor store: systemctl clean --what=fdstore), then start"""
_HINT = "lazy images are mounted anew; programs that have files of them open get errors"


class State(msgspec.Struct, frozen=True):
    """See the head of this file."""

    version: int
    major: int
    minor: int
    max_readahead: int
    flags: int
    max_read: int
    device: str
    since: int | None = None

    @property
    def offered(self) -> wire.Init:
        """What the kernel offered."""
        return wire.Init(self.major, self.minor, self.max_readahead, self.flags)


class _Version(msgspec.Struct):
    version: int
    since: int | None = None


def encode(offered: wire.Init, max_read: int, device: str) -> bytes:
    """Return the text for a mount."""
    return msgspec.json.encode(State(VERSION, *offered, max_read, device, SINCE))


def decode(text: bytes) -> State:
    """Return what `encode` was given; raise Unsupported if it is too new, Malformed for what is no state."""
    try:
        head = msgspec.json.decode(text, type=_Version)
        versions.check("what is kept about the FUSE mount", head.version, head.since, known=VERSION, hint=_NEWER)
        state = msgspec.json.decode(text, type=State)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise Malformed(f"what is kept about the FUSE mount is damaged: {error}", hint=_HINT) from None
    if state.max_read <= 0 or state.max_read % wire.PAGE or state.max_read > 64 << 20 or state.major != wire.MAJOR:
        raise Malformed(f"what is kept about the FUSE mount cannot be: {state}", hint=_HINT)
    return state
