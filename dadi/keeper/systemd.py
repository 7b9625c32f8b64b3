"""systemd's file descriptor store (sd_notify(3), FDSTORE=1; sd_listen_fds(3)), spoken directly.

systemd keeps descriptors with a name and nothing else, so that the text is a descriptor too, of a memfd that is padded
with NULs. Names are `dadi-NAME.N` and `dadi-NAME.N.text`: a replacement gets the next number N, and only when it is
held is the one before let go of. Who is killed in between leaves both; of those that are whole the highest is meant.

    NOTIFY_SOCKET, FDSTORE              where to send what is to be held; how many the unit allows (systemd 254; an
                                        older one needs `Environment=FDSTORE=…` beside `FileDescriptorStoreMax=…`)
    LISTEN_PID, LISTEN_FDS, LISTEN_FDNAMES     what was held when we were started: descriptors from 3 on

systemd takes a descriptor that it holds already for a duplicate, and keeps it under the name that it had. So the same
one is never sent twice; a new text for it is written into the memfd that is held. A stop of the unit empties the store,
unless the unit has `FileDescriptorStorePreserve=yes`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import select
import socket
from collections.abc import Mapping, MutableMapping
from typing import NamedTuple

from dadi.errors import Unavailable

_FIRST = 3  # SD_LISTEN_FDS_START
_NAME = re.compile(r"dadi-([A-Za-z0-9_-]+)\.([0-9]{1,9})(\.text)?")
_MAX_TEXT = 32 << 10
_PATIENCE = 10.0
"""Seconds for systemd to say that it has done what it was told."""
_F_DUPFD_QUERY = 1027
"""fcntl(2), Linux 6.10: whether two descriptors are of one open file."""


class _Held(NamedTuple):
    """What is held under a name, and our own copies of it."""

    number: int
    fd: int
    text: int

    def close(self) -> None:
        os.close(self.fd)
        os.close(self.text)


class SystemdStore:
    """See the head of this file, and `DescriptorStore`. One for a process: what it was given is given once.

    `first` is where the descriptors begin that we were given. The variables that say so are removed: the numbers may
    come to mean something else.
    """

    def __init__(self, environment: MutableMapping[str, str], first: int = _FIRST) -> None:
        self._address = environment["NOTIFY_SOCKET"]
        self._held: dict[str, _Held] = {}
        self._stale: list[str] = []
        """What is to be let go of, once that instead of which it was held is held."""
        self._unsure: set[str] = set()
        """Those of which systemd has not confirmed yet that it holds them."""
        pid, count, names = (environment.pop(f"LISTEN_{key}", "") for key in ("PID", "FDS", "FDNAMES"))
        if pid == str(os.getpid()) and count.isdigit():
            self._receive(names.split(":")[: int(count)], first)
        self.fd = -1

    def _receive(self, names: list[str], first: int) -> None:
        found: dict[tuple[str, int], dict[bool, int]] = {}
        for fd, each in enumerate(names, first):
            with contextlib.suppress(OSError):  # somebody has closed it
                os.set_inheritable(fd, False)
                if parsed := _NAME.fullmatch(each):
                    pair = found.setdefault((parsed[1], int(parsed[2])), {})
                    if pair.setdefault(bool(parsed[3]), fd) != fd:
                        os.close(fd)
        for (name, number), pair in sorted(found.items(), reverse=True):
            if name not in self._held and len(pair) == 2:
                self._held[name] = _Held(number, pair[False], pair[True])
                continue
            self._stale += [f"{name}.{number}", f"{name}.{number}.text"]
            for fd in pair.values():
                os.close(fd)

    def __repr__(self) -> str:
        return f"SystemdStore({self._address})"

    @staticmethod
    def offered(environment: Mapping[str, str]) -> bool:
        """Say whether systemd holds descriptors for us."""
        most = environment.get("FDSTORE", "")
        # A descriptor and its text, and their replacement.
        return bool(environment.get("NOTIFY_SOCKET")) and most.isdigit() and int(most) >= 4

    def put(self, name: str, fd: int, text: bytes) -> None:
        """See `DescriptorStore`."""
        held = self._held.get(name)
        if held is None or not _are_one(held.fd, fd):
            held = self._replace(name, held, fd, text)
        if _text_of(held.text) != text:
            os.pwrite(held.text, text.ljust(_MAX_TEXT, b"\0"), 0)
        if name in self._unsure:
            self._send(f"FDSTORE=1\nFDNAME=dadi-{name}.{held.number}.text", held.text)
            self._send(f"FDSTORE=1\nFDNAME=dadi-{name}.{held.number}", held.fd)
            self._wait()
            self._unsure.discard(name)
        self._forget()

    def _replace(self, name: str, before: _Held | None, fd: int, text: bytes) -> _Held:
        """Get ready to have something else held under a name."""
        numbers = [int(number) for each in self._stale for other, number, *_ in [each.split(".")] if other == name]
        number = 1 + max([0, *numbers, *([before.number] if before else [])])
        memory = os.memfd_create(f"dadi-{name}")
        try:
            os.pwrite(memory, text.ljust(_MAX_TEXT, b"\0"), 0)
            held = self._held[name] = _Held(number, os.dup(fd), memory)
        except BaseException:
            os.close(memory)
            raise
        self._unsure.add(name)  # also if it cannot be said now, and is said again: by the same number
        if before is not None:
            before.close()
            self._stale += _names(name, before)
        return held

    def take(self) -> dict[str, tuple[int, bytes]]:
        """See `DescriptorStore`; only what was held when this process started, and what it has put, is known."""
        return {name: (os.dup(held.fd), _text_of(held.text)) for name, held in self._held.items()}

    def drop(self, name: str) -> None:
        """See `DescriptorStore`."""
        held = self._held.pop(name, None)
        if held is not None:
            held.close()
            self._stale += _names(name, held)
        self._forget()

    def close(self) -> None:
        """See `DescriptorStore`."""
        for held in self._held.values():
            held.close()
        self._held.clear()

    def _forget(self) -> None:
        for name in self._stale:
            self._send(f"FDSTOREREMOVE=1\nFDNAME=dadi-{name}")
        if self._stale:
            self._wait()
            self._stale.clear()

    def _wait(self) -> None:
        """Return when systemd has done what it was told; see sd_notify_barrier(3)."""
        ours, theirs = os.pipe()
        try:
            try:
                self._send("BARRIER=1", theirs)
            finally:
                os.close(theirs)
            poll = select.poll()
            poll.register(ours, 0)
            if not poll.poll(_PATIENCE * 1000):
                raise Unavailable(f"systemd's notification socket {self._address}: nobody reads it")
        finally:
            os.close(ours)

    def _send(self, message: str, *fds: int) -> None:
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.settimeout(_PATIENCE)
                notify.connect(address)
                socket.send_fds(notify, [message.encode()], fds)
        except OSError as error:
            raise Unavailable(f"systemd's notification socket {self._address}: {error}") from None


def _names(name: str, held: _Held) -> list[str]:
    return [f"{name}.{held.number}", f"{name}.{held.number}.text"]


def _text_of(memory: int) -> bytes:
    return os.pread(memory, _MAX_TEXT, 0).rstrip(b"\0")


def _are_one(one: int, other: int) -> bool:
    """Say whether two descriptors are of one open file."""
    try:
        return fcntl.fcntl(one, _F_DUPFD_QUERY, other) == 1
    except OSError:  # Linux 6.9: all /dev/fuse are one file; a mount made anew has dropped the one before it
        return os.path.sameopenfile(one, other)
