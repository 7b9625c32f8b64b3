"""The node's side of `dadi-keeper` (see `process.py` for the packets): finds one, or starts one.

Unreachable says that there is one which does not answer (stopped, or the machine is busy), or that it has just gone:
what it holds is not known. Any other Unavailable is an answer: nothing is held, or it refuses.
"""

from __future__ import annotations

import array
import contextlib
import os
import select
import socket
import subprocess
import sys
from pathlib import Path

from dadi.errors import Unavailable, Unreachable
from dadi.keeper import process

_PATIENCE = 10.0
"""Seconds for a keeper to start, or to answer."""
_WITHOUT = "without it mounts of lazy images do not outlive dadi-node"


class KeeperProcess:
    """A connection to the keeper that listens on `path`; see `DescriptorStore`."""

    def __init__(self, path: Path, connection: socket.socket) -> None:
        self._path = path
        self._connection = connection

    def __repr__(self) -> str:
        return f"KeeperProcess({self._path})"

    @classmethod
    def connect(cls, path: Path) -> KeeperProcess:
        """Return a connection to the keeper at `path`, which is started if there is none.

        Raises Unreachable if there is one that does not answer, else Unavailable.
        """
        try:
            return cls(path, _connected(path))
        except (FileNotFoundError, ConnectionError):
            pass
        except OSError as error:
            silent = isinstance(error, TimeoutError | BlockingIOError)
            raise (Unreachable if silent else Unavailable)(f"connecting to the keeper at {path}: {error}") from None
        try:
            # In a session of its own, so that no signal for our group reaches it; its mark is our environment.
            command = [sys.executable, "-I", "-S", process.__file__, str(path)]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                                  timeout=_PATIENCE, start_new_session=True, check=False, cwd="/")  # fmt: skip
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip()[-500:]
                raise Unavailable(f"dadi-keeper did not start at {path}: {said}", hint=_WITHOUT)
            return cls(path, _connected(path))
        except (OSError, subprocess.SubprocessError) as error:
            raise Unavailable(f"dadi-keeper cannot be started at {path}: {error}", hint=_WITHOUT) from None

    @property
    def fd(self) -> int:
        """Readable when the keeper has ended, or this connection to it."""
        return self._connection.fileno()

    def has_ended(self) -> bool:
        """Say whether the keeper is gone, or was given up since it did not answer; does not wait."""
        poll = select.poll()
        poll.register(self._connection, 0)
        return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))

    def put(self, name: str, fd: int, text: bytes) -> None:
        """See `DescriptorStore`."""
        self._ask(b"S" + name.encode() + b"\0" + text, [fd])

    def take(self) -> dict[str, tuple[int, bytes]]:
        """See `DescriptorStore`."""
        return self._ask(b"L")

    def drop(self, name: str) -> None:
        """See `DescriptorStore`."""
        self._ask(b"D" + name.encode())

    def close(self) -> None:
        """See `DescriptorStore`."""
        self._connection.close()

    def _ask(self, request: bytes, send: list[int] | None = None) -> dict[str, tuple[int, bytes]]:
        found: dict[str, tuple[int, bytes]] = {}
        try:
            socket.send_fds(self._connection, [request], send or [])
            while True:
                packet, fds = _received(self._connection)
                if packet == b".":
                    return found
                if packet[:1] == b"!":
                    raise Unavailable(f"the keeper at {self._path} refuses: {packet[1:].decode(errors='replace')}")
                name, _, text = packet[1:].partition(b"\0")
                if packet[:1] != b"E" or len(fds) != 1:
                    for fd in fds:
                        os.close(fd)
                    raise ConnectionError("no such answer" if packet else "it hung up")
                found[name.decode("ascii", "replace")] = fds[0], text
        except BaseException as error:
            for fd, _ in found.values():
                os.close(fd)
            if isinstance(error, Unavailable):
                raise
            # The next question would hear the rest of this answer. Not closed: who watches knows us by our descriptor.
            with contextlib.suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            if isinstance(error, OSError):
                raise Unreachable(f"the keeper at {self._path} does not answer: {error}") from None
            raise


def _received(connection: socket.socket) -> tuple[bytes, list[int]]:
    """Return a packet and its descriptors, which no program that is started meanwhile gets (`recv_fds` drops flags)."""
    fds = array.array("i")
    room = socket.CMSG_SPACE(fds.itemsize)
    packet, ancillary, _, _ = connection.recvmsg(process.MAX_PACKET, room, socket.MSG_CMSG_CLOEXEC)
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    return packet, list(fds)


def _connected(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        connection.settimeout(_PATIENCE)
        connection.connect(str(path))
    except BaseException:
        connection.close()
        raise
    return connection
