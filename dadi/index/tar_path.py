"""Names of tar members: paths in the image, and the names that mean something else (whiteouts). Pure.

    last component       means
    .wh.NAME             NAME in the same directory is removed from the layers below
    .wh..wh..opq         whatever the layers below have in this directory is hidden
    .wh..wh.ANYTHING     bookkeeping of aufs (also as a directory): not part of the image

Source: OCI image specification, "Image Layer Filesystem Changeset > Representing Changes".
"""

from __future__ import annotations

from dadi.errors import Malformed, TooLarge
from dadi.index.layer import Kind

MAX_COMPONENT = 255
"""Bytes of a file name on Linux (NAME_MAX)."""
MAX_PATH = 4096
"""Bytes of a path on Linux (PATH_MAX)."""

_WHITEOUT, _META, _OPAQUE = b".wh.", b".wh..wh.", b".wh..wh..opq"


def normal(name: bytes, what: str = "name") -> bytes:
    """Return the path that a member's or hard link's name means, relative to the root; b"" is the root itself.

    Slashes in front, "." components and doubled or final slashes mean nothing and go, as container engines do it.
    Raises Malformed for an empty name, one with a NUL and one with a ".." component, TooLarge for what Linux could
    not name.
    """
    path = name.strip(b"/")
    if path.startswith(b"./"):
        path = path[2:]
    if b"/." in path or b"//" in path or path[:1] in (b".", b"/"):
        components = [part for part in path.split(b"/") if part not in (b"", b".")]
        if b".." in components:
            raise Malformed(f'its {what} has a ".." component: {name[:200]!r}')
        path = b"/".join(components)
    if not name:
        raise Malformed(f"its {what} is empty")
    if b"\0" in path:
        raise Malformed(f"its {what} has a NUL in it")
    if len(path) > MAX_COMPONENT:
        if len(path) > MAX_PATH:
            raise TooLarge(f"its {what} has {len(path)} bytes; Linux allows {MAX_PATH}")
        if max(map(len, path.split(b"/"))) > MAX_COMPONENT:
            raise TooLarge(f"a component of its {what} has more than {MAX_COMPONENT} bytes")
    return path


def whiteout(path: bytes) -> tuple[Kind | None, bytes]:
    """Return what a path that contains ".wh." stands for: WHITEOUT or OPAQUE and the path concerned.

    (None, path) is an ordinary member, (None, b"") one that is to be ignored. Raises Malformed for a whiteout of
    nothing, "." or "..".
    """
    directory, _, last = path.rpartition(b"/")
    if last == _OPAQUE:
        return Kind.OPAQUE, directory
    if path.startswith(_META) or b"/" + _META in path:
        return None, b""
    if not last.startswith(_WHITEOUT):
        return None, path
    removed = last[len(_WHITEOUT) :]
    if removed in (b"", b".", b".."):
        raise Malformed("it is a whiteout of no name")
    return Kind.WHITEOUT, directory + b"/" + removed if directory else removed
