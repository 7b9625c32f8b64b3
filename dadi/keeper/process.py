"""`dadi-keeper`: holds descriptors while their owner is away, and does nothing else. Standard library only.

Packets over a SOCK_SEQPACKET unix socket (mode 0600; a peer with another user id is hung up on). NAME is ASCII text
without NUL, TEXT up to 32 KiB that is only handed back. A request is one packet, each answer ends with "." or "!why":

    "S" NAME NUL TEXT + one descriptor    hold it, instead of what was held under that name
    "L"                                   "E" NAME NUL TEXT + a copy of the descriptor, for each; these stay held
    "D" NAME                              let go of it; nothing happens if there is none

It ends when it holds nothing and nobody is connected. It never reads from, writes to or looks at what it holds. It is
started as a file, not as a module (`python -I -S …/process.py SOCKET`), so that it needs few megabytes and little time.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import struct
import sys

MAX_PACKET, MAX_HELD, BACKLOG = 40 << 10, 64, 16
FIRST_CALL = 30.0
"""Seconds until somebody must have called; a keeper that nobody knows would stay for ever."""


class Keeper:
    """What is held, and who is connected."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self._held: dict[bytes, tuple[int, bytes]] = {}
        self._peers: set[socket.socket] = set()
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)

    def run(self) -> None:
        """Serve until nothing is held and nobody is connected."""
        called = False
        while self._held or self._peers or not called:
            ready = self._selector.select(None if called else FIRST_CALL)
            if not ready:
                return
            for key, _ in ready:
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket):
                    self._serve(key.fileobj)
            called = True

    def _accept(self) -> None:
        peer, _ = self._listener.accept()
        _, uid, _ = struct.unpack("3i", peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        if uid != os.geteuid():
            peer.close()
            return
        peer.settimeout(5)
        self._peers.add(peer)
        self._selector.register(peer, selectors.EVENT_READ)

    def _serve(self, peer: socket.socket) -> None:
        fds: list[int] = []
        try:
            packet, fds, flags, _ = socket.recv_fds(peer, MAX_PACKET, 4)
            if not packet:
                raise ConnectionError
            if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
                peer.send(b"!the packet is too long")
            else:
                self._do(peer, packet[:1], packet[1:], fds)
        except OSError:
            self._peers.discard(peer)
            self._selector.unregister(peer)
            peer.close()
        finally:
            for fd in fds:
                os.close(fd)

    def _do(self, peer: socket.socket, what: bytes, body: bytes, fds: list[int]) -> None:
        name, _, text = body.partition(b"\0")
        if what == b"S" and name and len(fds) == 1 and (name in self._held or len(self._held) < MAX_HELD):
            self._drop(name)
            self._held[name] = fds.pop(), text
        elif what == b"D":
            self._drop(name)
        elif what == b"L":
            for name, (fd, text) in self._held.items():
                socket.send_fds(peer, [b"E" + name + b"\0" + text], [fd])
        else:
            peer.send(b"!not a request, or too much is held")
            return
        peer.send(b".")

    def _drop(self, name: bytes) -> None:
        fd, _ = self._held.pop(name, (-1, b""))
        if fd >= 0:
            os.close(fd)


def main() -> None:
    """Listen on the path that the command line names, go into the background, hold."""
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: dadi-keeper SOCKET   (dadi-node starts it; it ends by itself)")
    with contextlib.suppress(FileNotFoundError):
        os.unlink(sys.argv[1])
    os.umask(0o177)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    listener.bind(sys.argv[1])
    listener.listen(BACKLOG)
    mine = os.stat(sys.argv[1])
    if os.fork():
        os._exit(0)  # whoever started us knows now that we listen
    os.setsid()
    os.chdir("/")
    null = os.open(os.devnull, os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    Keeper(listener).run()
    with contextlib.suppress(OSError):
        if os.stat(sys.argv[1]).st_ino == mine.st_ino:  # not that of a keeper that has replaced us
            os.unlink(sys.argv[1])


if __name__ == "__main__":
    main()
