"""What a daemon tells systemd (sd_notify(3)): datagrams to $NOTIFY_SOCKET, or nothing where there is none.

    READY=1                     it serves; `Type=notify` units count as started from then on
    EXTEND_TIMEOUT_USEC=…       it is still starting, and its event loop runs: no reason to give it up, for half an hour
                                in all; one that has come no further by then systemd ends, and starts anew
    WATCHDOG=1                  its event loop runs; the unit's WatchdogSec= is told to us as $WATCHDOG_USEC
    STOPPING=1                  it was told to stop

What `dadi/keeper/systemd.py` sends goes to the same socket. TLS files are watched, so that there is no RELOADING=1.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable, Mapping

_WHILE_STARTING = 10.0
"""Seconds between two signs of life before READY=1; each asks for `_PATIENCE` more."""
_PATIENCE = 60.0
_LONGEST_START = 1800.0
"""Seconds for which a start is excused. Long: one that is slow and is ended begins again from its beginning."""


class Notify:
    """One for a process."""

    def __init__(self, environment: Mapping[str, str] = os.environ, *,
                 clock: Callable[[], float] = time.monotonic,
                 sleep: Callable[[float], Awaitable[None]] = asyncio.sleep) -> None:  # fmt: skip
        self._clock = clock
        self._sleep = sleep
        self._address = environment.get("NOTIFY_SOCKET", "")
        micros, pid = environment.get("WATCHDOG_USEC", ""), environment.get("WATCHDOG_PID", "")
        ours = pid in ("", str(os.getpid()))
        self.watchdog = int(micros) / 1e6 if ours and micros.isdigit() and len(micros) < 16 else 0.0
        """Seconds after which systemd takes our silence for death; 0: it does not."""
        self._ready = False

    def ready(self) -> None:
        """All is served."""
        self._ready = True
        self.send("READY=1")

    def stopping(self) -> None:
        """No more is."""
        self.send("STOPPING=1")

    def send(self, message: str) -> None:
        """Send; never waits, and what cannot be sent is nobody's loss but systemd's."""
        if not self._address:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
            notify.setblocking(False)
            notify.sendto(message.encode(), address)

    async def live(self) -> None:
        """Give signs of life from the event loop until cancelled; returns at once where nobody listens."""
        until = self._clock() + _LONGEST_START
        while self._address:
            if not self._ready:
                if (left := until - self._clock()) > 0:
                    self.send(f"EXTEND_TIMEOUT_USEC={int(min(_PATIENCE, left) * 1e6)}")
                await self._until_ready(_WHILE_STARTING)
                continue
            if not self.watchdog:
                return
            self.send("WATCHDOG=1")
            await self._sleep(self.watchdog / 3)

    async def _until_ready(self, seconds: float) -> None:
        for _ in range(int(seconds / 0.5)):
            if not self._ready:
                await self._sleep(0.5)


notify = Notify()
"""This process's."""
