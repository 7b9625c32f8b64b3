"""Starting an image as a program would: mount it through the node's socket, read its files, say what was read.

What lives here: the reader's process (`main`, forked by tests/lab/forking.py), `Reading`, which is what it writes down,
and `tree_digest`, by which trees are compared. What never does: deciding whether that is right.

    tree digest    SHA-256 over the sorted paths: path, kind, size or target, SHA-256 of the content
"""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import socket
import stat
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

_PIECE = 1 << 20
_READ_TIMEOUT = 300.0


@dataclass
class Reading:
    """What one reader saw. Seconds count from the moment that all were told to begin.

    `startup`: when the files of the startup set were read; `done`: when the whole tree was. `errors`: a line for each
    file or call that failed; with any, `digest` says nothing.
    """

    mounted: float = 0.0
    startup: float = 0.0
    done: float = 0.0
    digest: str = ""
    bytes: int = 0
    errors: list[str] = field(default_factory=list)


Item = tuple[bytes, str, int, str]
"""Path without a leading slash, kind ("file", "directory", "symlink", "other"), size, content digest or link target."""


def tree_digest(items: Iterable[Item]) -> str:
    """Return the digest of a tree; the order of the items does not matter."""
    digest = hashlib.sha256()
    for path, kind, size, content in sorted(items):
        digest.update(b"%d %s %s %d %s\n" % (len(path), path, kind.encode(), size, content.encode()))
    return digest.hexdigest()


def main(arguments: Sequence[str]) -> None:
    """SOCKET IMAGE DIRECTORY RESULT BEGIN [STARTUP]: BEGIN is on the monotonic clock, which all processes share."""
    node, image, directory, result, begin, *startup = arguments
    start = float(begin)
    time.sleep(max(0.0, start - time.monotonic()))
    reading = Reading()
    try:
        _mount(node, image, directory)
        reading.mounted = time.monotonic() - start
        first = json.loads(Path(startup[0]).read_text()) if startup else []
        _read(reading, os.fsencode(directory), [os.fsencode(path) for path in first], start)
    except (OSError, http.client.HTTPException, RuntimeError) as error:
        reading.errors.append(f"{type(error).__name__}: {error}")
    reading.done = time.monotonic() - start
    partial = Path(f"{result}.partial")
    partial.write_text(json.dumps(asdict(reading)))
    partial.rename(result)
    sys.exit(bool(reading.errors))


def _mount(node: str, image: str, directory: str) -> None:
    connection = http.client.HTTPConnection("localhost", timeout=_READ_TIMEOUT)
    connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.sock.settimeout(_READ_TIMEOUT)
        connection.sock.connect(node)
        body = json.dumps({"image": image, "directory": directory})
        connection.request("POST", "/v1/mounts", body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
    finally:
        connection.close()
    if answer.status != 200 or '"mounted"' not in text:
        raise RuntimeError(f"mounting {image}: {answer.status} {text[-500:].strip()}")


def _read(reading: Reading, top: bytes, first: Sequence[bytes], start: float) -> None:
    known: dict[bytes, tuple[int, str]] = {}
    for path in first:
        _read_file(reading, known, top, path)
    reading.startup = time.monotonic() - start
    items: list[Item] = []
    todo = [b""]
    while todo:
        path = todo.pop()
        try:
            status = os.lstat(os.path.join(top, path))
            if stat.S_ISDIR(status.st_mode):
                names = sorted(os.listdir(os.path.join(top, path)), reverse=True)
                todo += [os.path.join(path, name) for name in names]
                items.append((path, "directory", 0, ""))
            elif stat.S_ISREG(status.st_mode):
                if path not in known:
                    _read_file(reading, known, top, path)
                items.append((path, "file", *known.get(path, (-1, ""))))
            elif stat.S_ISLNK(status.st_mode):
                items.append((path, "symlink", 0, os.fsdecode(os.readlink(os.path.join(top, path)))))
            else:
                items.append((path, "other", 0, ""))
        except OSError as error:
            reading.errors.append(f"{os.fsdecode(path)}: {error}")
    reading.digest = tree_digest(items)


def _read_file(reading: Reading, known: dict[bytes, tuple[int, str]], top: bytes, path: bytes) -> None:
    digest, size = hashlib.sha256(), 0
    try:
        with open(os.path.join(top, path), "rb", buffering=0) as file:
            while data := file.read(_PIECE):
                digest.update(data)
                size += len(data)
    except OSError as error:
        reading.errors.append(f"{os.fsdecode(path)} at {size}: {error}")
        return
    reading.bytes += size
    known[path] = size, digest.hexdigest()
